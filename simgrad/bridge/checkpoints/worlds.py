"""Worlds as checkpoints and data: ``world:verdicts``, ``world:verdicts:3`` for another seed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from simgrad import worlds
from simgrad.bridge.checkpoints.words import word_tokenizer
from simgrad.errors import InputError
from simgrad.models import ModelConfig, TransformerApply
from simgrad.typing import Theta

PREFIX = "world:"


def _parsed(source: str) -> tuple[worlds.World, int]:
    name, _, seed = source.removeprefix(PREFIX).partition(":")
    if seed and not seed.isdecimal():
        raise InputError(
            f"{source!r}: a world is named as world:verdicts, or world:verdicts:3 for seed 3"
        )
    world = worlds.get(name)
    if not world.has_transformer:
        there = [n for n in worlds.names() if worlds.get(n).has_transformer]
        raise InputError(
            f"{source!r}: world {name} has no transformer; worlds that have: {', '.join(there)}"
        )
    return world, int(seed or 0)


def world_policy(
    source: str, dtype: str = "float32"
) -> tuple[TransformerApply, Theta, ModelConfig, Any]:
    """``(apply, theta, config, tokenizer)`` of a pretrained world; words are whitespace separated.

    Raises:
        InputError: no such world, or one without a transformer.
    """
    world, seed = _parsed(source)
    apply, thetas = worlds.pretrained(world, [seed])
    config = dataclasses.replace(apply.config, dtype=dtype)  # type: ignore[arg-type]
    theta = jax.tree.map(lambda x: jnp.asarray(x[0], dtype), thetas)
    return (
        TransformerApply(config),
        theta,
        config,
        word_tokenizer(world.words, bos=world.words[0], eos=world.end),
    )


def world_rows(source: str, limit: int | None = None) -> list[dict[str, str]]:
    """A world's preference pairs as rows of text.

    Raises:
        InputError: no such world, or one without a transformer.
    """
    world, seed = _parsed(source)

    def text(tokens: tuple[int, ...]) -> str:
        return " ".join(world.words[t] for t in tokens)

    rows = []
    for pair in world.pairs(seed)[:limit]:
        prompt = tuple(pair.prompt)[1:]  # the tokenizer puts the first word before every text
        rows.append(
            {"prompt": text(prompt)}
            | {k: " " + text(tuple(getattr(pair, k))) for k in ("chosen", "rejected")}
        )
    return rows
