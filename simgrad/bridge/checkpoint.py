"""Hugging Face checkpoints as pure functions: ``simgrad.load``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.bridge.families import Family, Source, UnsupportedCheckpointError, family_of
from simgrad.bridge.worlds import PREFIX, world_policy
from simgrad.models import ModelConfig, TransformerApply, init_transformer
from simgrad.typing import Theta

__all__ = ["Policy", "load"]

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
_FILES = ["*.json", "model*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Policy:
    """A language model as data: ``apply(theta, tokens, ...)`` with its configuration and tokenizer."""

    apply: TransformerApply
    theta: Theta
    config: ModelConfig
    tokenizer: Any = None
    name: str = "policy"


def load(path_or_hub_id: str | Path, dtype: Dtype = "float32", revision: str | None = None) -> Policy:
    """Load a checkpoint from a folder or the Hub. PyTorch is not needed.

    The configuration is read by ``AutoConfig``, the tokenizer by ``AutoTokenizer`` and the weights from
    safetensors files (one or sharded). Families: gpt2, llama, mistral, qwen2.

    Args:
        path_or_hub_id: folder with config.json, a Hub id such as ``"HuggingFaceTB/SmolLM2-135M"``, or a world
            of :mod:`simgrad.worlds`, pretrained on the spot: ``"world:verdicts"``, ``"world:verdicts:3"`` (seed 3).
        dtype: of parameters and activations; sums always accumulate in float32 or better. ``float64``
            needs ``jax.config.update("jax_enable_x64", True)`` first.
        revision: Hub branch, tag or commit.

    Raises:
        UnsupportedCheckpointError: family, attribute or tensor that simgrad would not reproduce, by name.
        FileNotFoundError: no such folder, and the Hub has no such model or cannot be reached.
        ValueError: ``dtype="float64"`` while JAX is in 32-bit mode.
    """
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError('dtype="float64" needs jax.config.update("jax_enable_x64", True) before loading')
    if str(path_or_hub_id).startswith(PREFIX):
        return Policy(*world_policy(str(path_or_hub_id), dtype), name=str(path_or_hub_id))
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = _folder(str(path_or_hub_id), revision)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UnsupportedCheckpointError(f"{folder} holds an adapter, not a model: merge it into its base first")
    try:
        attributes = AutoConfig.from_pretrained(folder).to_dict()
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise UnsupportedCheckpointError(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    family, fields = family_of(attributes)
    config = ModelConfig(**fields, dtype=dtype)
    theta = _parameters(folder, family, config)
    return Policy(TransformerApply(config), theta, config, _tokenizer(folder), str(path_or_hub_id))


def _folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a valid Hub id") from error
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is not a folder, and the Hub did not give it: {type(error).__name__}. Check the spelling, "
            "the network, and for gated models `hf auth login`"
        ) from error


def _tokenizer(folder: Path) -> Any:
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / shard for shard in shards]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            others = [p.name for p in folder.glob("*.bin")]
            hint = f" (only {', '.join(others)}: convert to safetensors first)" if others else ""
            raise UnsupportedCheckpointError(f"{file} is missing{hint}")
    return files


def _tensors(files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                yield name, handle.get_tensor(name)


def _expected(family: Family, config: ModelConfig) -> dict[str, list[tuple[str, int | None, Source]]]:
    """Tensor name to the leaves (with layer) that it fills."""
    expected: dict[str, list[tuple[str, int | None, Source]]] = {}
    for leaf, source in family.sources(config).items():
        layers = range(config.depth) if leaf.startswith("layers/") else [None]
        for layer in layers:
            expected.setdefault(source.name.format(layer=layer), []).append((leaf, layer, source))
    return expected


def _parameters(folder: Path, family: Family, config: ModelConfig) -> Theta:
    abstract = jax.eval_shape(lambda: init_transformer(config))
    paths = tree.names(abstract)
    leaves = {path: np.empty(x.shape, x.dtype) for path, x in zip(paths, jax.tree.leaves(abstract), strict=True)}
    expected = _expected(family, config)
    if unfilled := sorted(set(leaves) - {leaf for uses in expected.values() for leaf, _, _ in uses}):
        raise UnsupportedCheckpointError(f"no tensor is known for parameters {', '.join(unfilled)}")
    surplus, seen, tied_head = [], set(), None
    for full_name, tensor in _tensors(_weight_files(folder)):
        name = full_name.removeprefix(family.prefix)
        if name in seen:
            raise UnsupportedCheckpointError(f"tensor {full_name} is there twice")
        if name in expected:
            seen.add(name)
            for leaf, layer, source in expected[name]:
                _fill(leaves[leaf] if layer is None else leaves[leaf][layer], tensor, source, full_name)
        elif name == "lm_head.weight" and config.tied:
            tied_head = tensor
        elif not name.endswith(family.ignorable or ("\0",)):
            surplus.append(full_name)
    if surplus:
        raise UnsupportedCheckpointError(f"surplus tensors that this model has no place for: {_listing(surplus)}")
    if missing := sorted(set(expected) - seen):
        raise UnsupportedCheckpointError(f"missing tensors: {_listing([family.prefix + m for m in missing])}")
    if tied_head is not None and not np.array_equal(
        tied_head.astype(leaves["embedding/table"].dtype), leaves["embedding/table"]
    ):
        raise UnsupportedCheckpointError(
            "lm_head.weight differs from the embedding although tie_word_embeddings=True: "
            "set it to false in config.json"
        )
    treedef = jax.tree.structure(abstract)
    return treedef.unflatten([jnp.asarray(leaves[path]) for path in paths])


def _fill(leaf: np.ndarray, tensor: np.ndarray, source: Source, name: str) -> None:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UnsupportedCheckpointError(f"tensor {name} has dtype {tensor.dtype}: quantised weights are not supported")
    if source.part is not None:
        index, count = source.part
        if tensor.shape[-1] % count:
            raise UnsupportedCheckpointError(f"tensor {name} of shape {tensor.shape} does not split in {count}")
        tensor = np.split(tensor, count, axis=-1)[index]
    tensor = tensor.T if source.transpose else tensor
    if tensor.shape != leaf.shape:
        raise UnsupportedCheckpointError(
            f"tensor {name} gives shape {tensor.shape} where the configuration asks for {leaf.shape}"
        )
    leaf[...] = tensor.astype(leaf.dtype)


def _listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
