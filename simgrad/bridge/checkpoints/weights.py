"""Parameters from safetensors files: check everything in the headers, read only what is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from simgrad import tree
from simgrad.bridge.checkpoints.families import Family, Source, UnsupportedCheckpointError
from simgrad.bridge.checkpoints.mesh import MODEL, spec, split_array
from simgrad.models import ModelConfig, init_transformer
from simgrad.typing import Theta

_BLOCK = 2**25  # bytes of a tensor that are read at once
_FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = {"I": "int", "U": "uint"}


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copy the part at ``index`` (with plain bounds) to ``out``, a block of rows at a time."""
        first, rest = index[0], index[1:]
        rows = max(1, _BLOCK * len(out) // max(1, out.nbytes))
        # closed again each time: else all that was read stays mapped
        with _opened(self.file) as handle:
            stored = handle.get_slice(self.name)
            for start in range(first.start, first.stop, rows):
                stop = min(start + rows, first.stop)
                out[start - first.start : stop - first.start] = stored[(slice(start, stop), *rest)]


def parameters(
    folder: Path, family: Family, config: ModelConfig, mesh: Mesh | None = None
) -> Theta:
    """A checkpoint's parameters, on the default device or split over a mesh.

    Raises:
        UnsupportedCheckpointError: a tensor that is missing, surplus, twice there, of another shape
            or quantised; a tied head that differs from the embedding. Only the last needs more than
            the headers.
    """
    abstract = jax.eval_shape(lambda: init_transformer(config))
    shapes = {path: x.shape for path, x in tree.by_name(abstract).items()}
    sources, dtype = family.sources(config), jnp.dtype(config.dtype)
    tensors = _tensors(_weight_files(folder), family, config, shapes)

    def leaf(path: str) -> jax.Array:
        shape = shapes[path]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            return _part(tensors[path], sources[path], index, tree.is_layered(path), dtype)

        if mesh is None:
            return jax.device_put(read(tuple(slice(0, n) for n in shape)))
        return split_array(shape, NamedSharding(mesh, spec(path, config, mesh.shape[MODEL])), read)

    return jax.tree.structure(abstract).unflatten(
        [jax.block_until_ready(leaf(path)) for path in shapes]
    )


def _part(
    tensors: list[_Tensor], source: Source, index: tuple[slice, ...], layered: bool, dtype: np.dtype
) -> np.ndarray:
    """The part of a leaf at ``index``."""
    out = np.empty([part.stop - part.start for part in index], dtype)
    if layered:
        for x, tensor in zip(out, tensors[index[0]], strict=True):
            _fill(x, tensor, source, index[1:])
    else:
        _fill(out, tensors[0], source, index)
    return out


def _fill(out: np.ndarray, tensor: _Tensor, source: Source, index: tuple[slice, ...]) -> None:
    if source.transpose:
        out, index = out.T, index[::-1]
    if source.part:
        number, count = source.part
        shift = number * (tensor.shape[-1] // count)
        index = (*index[:-1], slice(index[-1].start + shift, index[-1].stop + shift))
    tensor.read(index, out)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            files = [folder / shard for shard in shards]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnsupportedCheckpointError(
                f"{index} is damaged ({error}): download or copy it again"
            ) from error
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            others = [p.name for p in folder.glob("*.bin")]
            hint = f" (only {', '.join(others)}: convert to safetensors first)" if others else ""
            raise UnsupportedCheckpointError(f"{file} is missing{hint}")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; one that is damaged is refused by name."""
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise UnsupportedCheckpointError(
            f"{file} is damaged or not complete ({error}): download or copy it again"
        ) from error


def _headers(files: list[Path]) -> Iterator[_Tensor]:
    for file in files:
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                header = handle.get_slice(name)
                yield _Tensor(file, name, tuple(header.get_shape()), header.get_dtype())


def _tensors(
    files: list[Path], family: Family, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[_Tensor]]:
    """Each leaf's tensor, or one for each layer."""
    sources = family.sources(config)
    if unfilled := sorted(set(shapes) - set(sources)):
        raise UnsupportedCheckpointError(f"no tensor is known for parameters {', '.join(unfilled)}")
    expected: dict[str, list[str]] = {}  # tensor to leaves
    for path, source in sources.items():
        for layer in range(config.depth) if tree.is_layered(path) else [0]:
            expected.setdefault(source.name.format(layer=layer), []).append(path)
    surplus, seen, tied_head = [], {}, None
    for tensor in _headers(files):
        name = tensor.name.removeprefix(family.prefix)
        if name in seen:
            raise UnsupportedCheckpointError(f"tensor {tensor.name} is there twice")
        if name in expected:
            seen[name] = tensor
            for path in expected[name]:
                _check(tensor, sources[path], shapes[path][tree.is_layered(path) :])
        elif name == "lm_head.weight" and config.tied:
            tied_head = tensor
        elif not name.endswith(family.ignorable or ("\0",)):
            surplus.append(tensor.name)
    if surplus:
        raise UnsupportedCheckpointError(
            f"surplus tensors that this model has no place for: {_listing(surplus)}"
        )
    if missing := sorted(set(expected) - set(seen)):
        raise UnsupportedCheckpointError(
            f"missing tensors: {_listing([family.prefix + m for m in missing])}"
        )
    if tied_head is not None and not _equal(
        tied_head, seen[sources["embedding/table"].name], config.dtype
    ):
        raise UnsupportedCheckpointError(
            "lm_head.weight differs from the embedding although tie_word_embeddings=True: "
            "set it to false in config.json"
        )
    layers = {path: range(config.depth if tree.is_layered(path) else 1) for path in shapes}
    return {
        path: [seen[sources[path].name.format(layer=layer)] for layer in layers[path]]
        for path in shapes
    }


def _check(tensor: _Tensor, source: Source, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in _FLOATS:
        name = (
            f"{_INTEGERS[tensor.dtype[0]]}{tensor.dtype[1:]}"
            if tensor.dtype[0] in _INTEGERS
            else tensor.dtype
        )
        raise UnsupportedCheckpointError(
            f"tensor {tensor.name} has dtype {name}: quantised weights are not supported"
        )
    given = tensor.shape
    if source.part is not None:
        count = source.part[1]
        if given[-1] % count:
            raise UnsupportedCheckpointError(
                f"tensor {tensor.name} of shape {given} does not split in {count}"
            )
        given = (*given[:-1], given[-1] // count)
    given = given[::-1] if source.transpose else given
    if given != shape:
        raise UnsupportedCheckpointError(
            f"tensor {tensor.name} gives shape {given} where the configuration asks for {shape}"
        )


def _equal(tensor: _Tensor, other: _Tensor, dtype: str) -> bool:
    """Whether two matrices are the same in ``dtype``, a block of rows at a time."""
    if tensor.shape != other.shape:
        return False
    rows, width = tensor.shape
    step = max(1, _BLOCK // (8 * width))
    for start in range(0, rows, step):
        index = (slice(start, min(start + step, rows)), slice(0, width))
        one, two = (np.empty((index[0].stop - start, width), dtype) for _ in range(2))
        tensor.read(index, one)
        other.read(index, two)
        if not np.array_equal(one, two):
            return False
    return True


def _listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
