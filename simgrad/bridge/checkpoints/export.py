"""Pure functions as Hugging Face checkpoints: ``simgrad.bridge.save``, the inverse of ``load``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.bridge.checkpoints.families import (
    FAMILIES,
    UnsupportedCheckpointError,
    family_of,
    rope_attributes,
)
from simgrad.bridge.checkpoints.policy import Policy
from simgrad.errors import InputError
from simgrad.models import LoraApply, ModelConfig, TransformerApply, init_transformer
from simgrad.typing import Theta

_ORDER = ("llama", "gpt2", "qwen2", "mistral")
_INDEX = "model.safetensors.index.json"
# not pad's: transformers keeps gradients from its embedding
_TOKEN_IDS = ("bos_token_id", "eos_token_id")
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json vocab.json "
    "vocab.txt added_tokens.json merges.txt chat_template.jinja chat_template.json".split()
)


def save(policy: Policy, folder: str | Path) -> Path:
    """Write a checkpoint that transformers, and :func:`simgrad.load`, read back exactly.

    config.json, model.safetensors (in the policy's dtype) and the tokenizer's files. The family is
    llama where that can express the model, else gpt2, qwen2 or mistral. ``init`` of the
    configuration is not stored; what its kind of model never uses comes back with its default.
    A checkpoint that stands in the folder is replaced, file by file and each at once; files that
    would change the new one's meaning (shards, generation settings, another tokenizer's files) are
    removed. Where one of the errors below is raised, nothing has been written.

    Args:
        policy: from :func:`simgrad.load`, or ``Policy(apply, theta, apply.config)`` of a
            transformer from :func:`simgrad.models.create`.
        folder: made if need be.

    Returns:
        The folder.

    Raises:
        UnsupportedCheckpointError: no family expresses the model; names the nearest one, and each
            attribute that would have to be different. Or transformers would not read the tokenizer
            back as it is.
        InputError: parameters that do not fit the configuration, by name; adapters that are not
            merged.
        FileExistsError: the folder holds an adapter, another program's config.json, or a tokenizer
            while the policy has none.
    """
    folder = Path(folder)
    leaves = _leaves(policy)
    kind, attributes = _expressed(policy.config)
    attributes |= {"model_type": kind, "dtype": policy.config.dtype, **_token_ids(policy)}
    text = json.dumps(attributes, indent=2, sort_keys=True) + "\n"
    _check_tokenizer(policy.tokenizer, kind, text)
    stale = _stale(folder, policy.tokenizer is not None)
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        temporary = Path(name)
        tensors = _tensors(kind, policy.config, leaves)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        _write_texts(temporary, text, policy.tokenizer)
        # else for its owner only
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        written = [
            path.relative_to(temporary) for path in sorted(temporary.rglob("*")) if path.is_file()
        ]
        for path in written:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / path, folder / path)
    for path in stale - {folder / path for path in written}:
        path.unlink(missing_ok=True)
    return folder


def _leaves(policy: Policy) -> dict[str, np.ndarray]:
    """Path to parameter, once all are known to be those of the configuration."""
    apply, config = policy.apply, policy.config
    theta: Theta = policy.theta
    if isinstance(apply, LoraApply) or (
        isinstance(theta, Mapping) and set(theta) == {"base", "lora"}
    ):
        raise InputError(
            "the parameters hold adapters, which a checkpoint has no place for: merge them first "
            "with simgrad.models.merge_lora(apply, theta), and save the base model's apply with "
            "the result"
        )
    if not isinstance(apply, TransformerApply):
        raise UnsupportedCheckpointError(
            f"only transformers can be saved, not {type(apply).__name__}"
        )
    if _meaning(vars(apply.config)) != _meaning(vars(config)):
        raise InputError("policy.apply.config and policy.config describe different models")
    abstract = jax.eval_shape(lambda: init_transformer(replace(config, dtype="float32")))
    shapes = {path: x.shape for path, x in tree.by_name(abstract).items()}
    given = tree.by_name(theta) if jax.tree.leaves(theta) else {}
    problems = [f"{path} is missing" for path in shapes if path not in given]
    problems += [f"{path} has no place in the model" for path in given if path not in shapes]
    dtype = jnp.dtype(config.dtype)
    for path in [path for path in shapes if path in given]:
        shape, found = np.shape(given[path]), jnp.result_type(given[path])
        if shape != shapes[path]:
            problems.append(
                f"{path} has shape {shape} where the configuration asks for {shapes[path]}"
            )
        if found != dtype:
            problems.append(f"{path} is {found} where the configuration asks for {dtype}")
    if problems:
        raise InputError("parameters do not fit the configuration: " + "; ".join(problems))
    return {path: np.asarray(x) for path, x in given.items()}


def _meaning(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the fields of a :class:`ModelConfig` say, whether by a value or by a default."""
    known = {**vars(ModelConfig(vocab_size=1)), **fields}
    width, heads = known["width"], known["heads"]
    resolved = {
        "kv_heads": heads,
        "head_dim": width / heads if width % heads else width // heads,
        "mlp_width": 4 * width,
    }
    said = {name: resolved.get(name) if value is None else value for name, value in known.items()}
    rope = rope_attributes(known["rope"], known["max_length"])
    said |= {"rope": rope if known["positions"] == "rope" else None}
    return {name: value for name, value in said.items() if name not in ("init", "dtype")}


def _expressed(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The first family that expresses the configuration, and its attributes."""
    refusals = []
    for kind in _ORDER:
        attributes = json.loads(
            json.dumps(FAMILIES[kind].attributes(config), default=np.generic.item)
        )
        differences, refusal = _read_back(kind, attributes, config)
        if not differences and refusal is None:
            return kind, attributes
        refusals.append((refusal is not None, len(differences), kind, differences, refusal))
    _, _, kind, differences, refusal = min(refusals, key=lambda r: r[:2])
    needs = [
        f"{name}={theirs!r} instead of {ours!r}" for name, (ours, theirs) in differences.items()
    ]
    needs += [f"transformers to accept it ({refusal})"] if refusal else []
    raise UnsupportedCheckpointError(
        f"no checkpoint family expresses this model. The nearest is {kind}, which needs "
        f"{', '.join(needs)}"
    )


def _read_back(
    kind: str, attributes: dict[str, Any], config: ModelConfig
) -> tuple[dict[str, tuple[Any, Any]], str | None]:
    """Fields that loading would change, as (the configuration's, the family's); or a refusal."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    refusal = None
    try:
        attributes = AutoConfig.for_model(kind, **attributes, **dict.fromkeys(_TOKEN_IDS)).to_dict()
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        refusal = " ".join(str(error).split())
    if (config.positions, config.rope.kind, config.head_features) == ("rope", "dynamic", 2):
        refusal = "its dynamic rotary positions divide by head_dim - 2"
    _, fields = family_of({**attributes, "model_type": kind})
    ours, theirs = _meaning(vars(config)), _meaning(fields)
    if config.positions != theirs["positions"]:
        del ours["rope"]
    return {
        name: (value, theirs[name]) for name, value in ours.items() if value != theirs[name]
    }, refusal


def _token_ids(policy: Policy) -> dict[str, int | None]:
    """Special tokens for config.json; null rather than a default or an id beyond the vocabulary."""
    ids = {name: getattr(policy.tokenizer, name, None) for name in _TOKEN_IDS}
    return {
        name: i if i is not None and 0 <= i < policy.config.vocab_size else None
        for name, i in ids.items()
    }


def _check_tokenizer(tokenizer: Any, kind: str, config: str) -> None:
    """For some families transformers builds its own class of tokenizer, whatever the files say."""
    if tokenizer is None:
        return
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        _write_texts(Path(name), config, tokenizer)
        again = AutoTokenizer.from_pretrained(name)
    ours, theirs = (getattr(t, "backend_tokenizer", None) for t in (tokenizer, again))
    same = ours is not None and theirs is not None and ours.to_str() == theirs.to_str()
    if type(again) is not type(tokenizer) and not same:
        raise UnsupportedCheckpointError(
            f"transformers reads every tokenizer of a {kind} checkpoint as {type(again).__name__}, "
            f"which does not do what this {type(tokenizer).__name__} does: save the policy without "
            "it, or with the attributes of another family"
        )


def _stale(folder: Path, tokenizer: bool) -> set[Path]:
    """Files of an earlier checkpoint that would change the new one's meaning, unless written anew.

    Raises:
        FileExistsError: see :func:`save`.
    """
    if (folder / "adapter_config.json").exists():
        raise FileExistsError(
            f"{folder} holds an adapter, which transformers would add to the model: use another one"
        )
    there = {path for name in _TOKENIZER_FILES if (path := folder / name).exists()}
    if there and not tokenizer:
        names = ", ".join(sorted(path.name for path in there))
        raise FileExistsError(
            f"{folder} holds a tokenizer ({names}) but the policy has none: it would come with it"
        )
    if not (folder / "config.json").exists():
        return there
    try:
        mine = "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        mine = False
    if not mine:
        raise FileExistsError(
            f"{folder / 'config.json'} is not a model's configuration: use another folder"
        )
    there |= {folder / _INDEX, folder / "generation_config.json"}
    if (folder / _INDEX).exists():
        shards = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        there |= {folder / Path(shard).name for shard in shards}
    return there


def _tensors(
    kind: str, config: ModelConfig, leaves: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The family's tensors, by the names that transformers gives them."""
    family, parts = FAMILIES[kind], {}
    sources = family.sources(config)
    for leaf, array in leaves.items():
        source = sources[leaf]
        index = source.part[0] if source.part else 0
        for layer, x in enumerate(array) if leaf.startswith("layers/") else [(None, array)]:
            name = family.full_name(source.name.format(layer=layer))
            parts.setdefault(name, {})[index] = x.T if source.transpose else x
    return {
        name: np.ascontiguousarray(np.concatenate([pieces[i] for i in sorted(pieces)], axis=-1))
        for name, pieces in parts.items()
    }


def _write_texts(folder: Path, config: str, tokenizer: Any) -> None:
    (folder / "config.json").write_text(config, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
