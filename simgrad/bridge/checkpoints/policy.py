"""Hugging Face checkpoints as pure functions: ``simgrad.load``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from simgrad.bridge.checkpoints.families import UnsupportedCheckpointError, family_of
from simgrad.bridge.checkpoints.mesh import placed
from simgrad.bridge.checkpoints.weights import parameters
from simgrad.bridge.checkpoints.worlds import PREFIX, world_policy
from simgrad.errors import InputError
from simgrad.models import ModelConfig, TransformerApply
from simgrad.typing import Theta

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
_FILES = ["*.json", "model*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Policy:
    """A language model as data: ``apply(theta, tokens, ...)`` with its configuration and tokenizer.

    Attributes:
        apply: the forward pass, a pure function of ``theta``.
        theta: the parameters, a nested dictionary of arrays.
        config: shapes and variants of the transformer.
        tokenizer: of the checkpoint (None: token ids only).
        name: how reports call it.
    """

    apply: TransformerApply
    theta: Theta
    config: ModelConfig
    tokenizer: Any = None
    name: str = "policy"


def load(
    path_or_hub_id: str | Path,
    dtype: Dtype = "float32",
    revision: str | None = None,
    mesh: Mesh | None = None,
) -> Policy:
    """Load a checkpoint from a folder or the Hub. PyTorch is not needed.

    The configuration is read by ``AutoConfig``, the tokenizer by ``AutoTokenizer`` and the weights
    from safetensors files (one or sharded). Families: gpt2, llama, mistral, qwen2.

    Args:
        path_or_hub_id: folder with config.json, a Hub id such as ``"HuggingFaceTB/SmolLM2-135M"``,
            or a world of :mod:`simgrad.worlds`, pretrained on the spot: ``"world:verdicts"``,
            ``"world:verdicts:3"`` (seed 3).
        dtype: of parameters and activations; sums always accumulate in float32 or better.
            ``float64`` needs ``jax.config.update("jax_enable_x64", True)`` first.
        revision: Hub branch, tag or commit.
        mesh: devices to split the parameters over, from :func:`simgrad.bridge.device_mesh` (None:
            one device). Each part is read from the files by itself; in a run of many processes each
            reads its own devices'.

    Peak of host memory: what this process's devices hold (on a CPU that is host memory too), and
    one part of one leaf, all layers of it (plus a tensor's pages and 32 MiB while they are read). A
    Llama shape of 730 MiB, its largest leaf 128 MiB, takes 1.23 times its size on one CPU device,
    and 0.67 times in each of two processes with ``model=2``.

    Raises:
        UnsupportedCheckpointError: family, attribute or tensor that simgrad would not reproduce, by
            name; a file that is damaged.
        FileNotFoundError: no such folder, and the Hub has no such model or cannot be reached.
        InputError: ``dtype="float64"`` while JAX is in 32-bit mode.
    """
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise InputError(
            'dtype="float64" needs jax.config.update("jax_enable_x64", True) before loading'
        )
    if str(path_or_hub_id).startswith(PREFIX):
        apply, theta, config, tokenizer = world_policy(str(path_or_hub_id), dtype)
        theta = theta if mesh is None else placed(theta, config, mesh)
        return Policy(apply, theta, config, tokenizer, str(path_or_hub_id))
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = _folder(str(path_or_hub_id), revision)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UnsupportedCheckpointError(
            f"{folder} holds an adapter, not a model: merge it into its base first"
        )
    try:
        attributes = AutoConfig.from_pretrained(folder).to_dict()
    except (
        ValueError,
        KeyError,
        TypeError,
        OSError,
        RecursionError,
        StrictDataclassError,
    ) as error:
        raise UnsupportedCheckpointError(
            f"transformers cannot read {folder / 'config.json'}: {error}"
        ) from error
    family, fields = family_of(attributes)
    config = ModelConfig(**fields, dtype=dtype)
    theta = parameters(folder, family, config, mesh)
    return Policy(TransformerApply(config), theta, config, _tokenizer(folder), str(path_or_hub_id))


def _folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES)
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a valid Hub id") from error
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is not a folder, and the Hub did not give it: {type(error).__name__}. Check "
            "the spelling, the network, and for gated models `hf auth login`"
        ) from error


def _tokenizer(folder: Path) -> Any:
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").exists():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain exceptions for files that are damaged
        raise UnsupportedCheckpointError(
            f"transformers cannot read the tokenizer in {folder} ({error}): download or copy it "
            "again"
        ) from error
