"""Objectives by name, and what is known about each."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.objectives.base import REGISTRY, Objective
from simgrad.objectives.trl import TRL_LOSS_TYPES, from_trl

SYMBOLS = {
    "beta": "β",
    "gamma": "γ",
    "alpha": "α",
    "epsilon": "ε",
    "delta": "δ",
    "tau": "τ",
    "kl": "z_0",
    "desirable_weight": "λ_D",
    "undesirable_weight": "λ_U",
    "sft_weight": "λ",
    "penalty": "λ",
    "rejected_weight": "λ",
    "odds_weight": "λ",
    "threshold": "τ",
    "temperature": "T",
}
"""How formulas write a hyperparameter."""

NOTATION = {
    "logπ_w, logπ_l": "summed log-prob of the chosen, the rejected response",
    "|y_w|, |y_l|": "their numbers of tokens",
    "Δ": "logπ - logπ_ref, the log-ratio to the reference",
    "m": "Δ_w - Δ_l, the margin",
    "μ": "logπ/|y|, mean log-prob of a token",
    "p": "exp(μ)",
    "o": "log(p/(1 - p)), log-odds",
    "σ, σ', I": "logistic function, its derivative, 1 if true and else 0",
    "d_w, d_l": "-∂loss/∂logπ_w, ∂loss/∂logπ_l: the pull on the chosen, the push on the rejected",
    "*": "a star marks what is taken from the whole batch:",
    "h*": "(aot) the reference's logπ_w - logπ_l of the same rank",
    "Δ_w*, Δ_l*": "(aot_unpaired) the log-ratio of the same rank on the other side",
    "z_w*, z_l*": "(kto_pair) mean Δ_w, mean Δ_l, at least 0",
    "δ*": "(bco) mean of β·Δ over all responses",
}
"""What the formulas are written in."""

FAMILIES = (
    "Reference needed, chosen and rejected weigh the same (d_w = d_l)",
    "Reference needed, chosen and rejected weigh differently",
    "No reference needed",
    "Reference needed, pairs coupled across the batch",
)


@dataclass(frozen=True)
class Description:
    """What is known of a named objective; formulas are in the notation of :data:`NOTATION`.

    Attributes:
        name: for :func:`get`.
        title: first line of its docstring.
        family: one of :data:`FAMILIES`.
        formula: loss of a pair.
        ratio: d_w/d_l.
        pushes_chosen_down: when d_w < 0, whatever the kernel; empty: never.
        uses_reference: whether the loss depends on log π_ref.
        batch_coupled: whether a pair's d_w, d_l depend on the other pairs of the batch.
        hyperparameters: with their defaults.
        source: paper and equation.
    """

    name: str
    title: str
    family: str
    formula: str
    ratio: str
    pushes_chosen_down: str
    uses_reference: bool
    batch_coupled: bool
    hyperparameters: dict[str, Any]
    source: str


def names() -> list[str]:
    """Names that :func:`get` understands, besides TRL's (``trl:ipo``).

    >>> {"dpo", "ipo", "simpo"} <= set(names())
    True
    """
    return sorted(REGISTRY)


def get(name: str, **hyperparameters: Any) -> Objective:
    """An objective by name: one of :func:`names`, or ``trl:`` and a TRL loss type with options.

    >>> get("dpo", beta=0.05)
    DPO(beta=0.05)
    >>> get("trl:sigmoid_norm")
    LengthNormalized(objective=DPO(beta=0.1))
    >>> get("trl:cpo/simpo", cpo_alpha=0.0)
    ReferenceFree(objective=LengthNormalized(objective=SimPO(beta=0.1, gamma=0.5)))

    Raises:
        ValueError: unknown name, unknown hyperparameter, or one out of range.
    """
    if name.startswith("trl:"):
        trainer, _, loss_type = name.removeprefix("trl:").rpartition("/")
        return from_trl(loss_type, **{"trainer": trainer or "dpo", **hyperparameters})
    if name not in REGISTRY:
        raise ValueError(_unknown(name))
    fields = [field.name for field in dataclasses.fields(REGISTRY[name])]
    if unknown := sorted(set(hyperparameters) - set(fields)):
        raise ValueError(
            f"{name} has no hyperparameter {', '.join(unknown)}; it takes: {', '.join(fields)}"
        )
    return REGISTRY[name](**hyperparameters)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, REGISTRY, 1)
    near = [
        f"trl:{trainer}/{name}" for trainer, kinds in TRL_LOSS_TYPES.items() if name in kinds
    ] or near
    hint = f" did you mean {near[0].replace('dpo/', '')!r}?" if near else ""
    known = ", ".join(names())
    trl = "TRL's loss types as trl:sigmoid, ..."
    return f"unknown objective {name!r};{hint} there are: {known}; {trl}"


@functools.cache
def uses_reference(objective: Objective) -> bool:
    """Whether the loss depends on the reference's log-probs, found by changing them.

    >>> uses_reference(get("dpo")), uses_reference(get("simpo"))
    (True, False)
    """
    with jax.ensure_compile_time_eval():
        logp, reference, lengths = _example()
        before = objective.loss(logp, reference, lengths)
        return bool((before != objective.loss(logp, jnp.flip(reference, -1), lengths)).any())


@functools.cache
def batch_coupled(objective: Objective) -> bool:
    """Whether d_w, d_l of a pair depend on the other pairs, found by leaving half of these out.

    >>> batch_coupled(get("dpo")), batch_coupled(get("aot"))
    (False, True)
    """
    with jax.ensure_compile_time_eval():
        example = _example()
        whole, half = objective.force(*example), objective.force(*(x[:4] for x in example))
        return bool((whole[:4] != half).any())


def _example() -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    logp, reference = (jnp.asarray(-20 * random.random((8, 2))) for _ in range(2))
    return logp, reference, jnp.asarray(random.integers(1, 9, (8, 2)))


def catalog() -> list[Description]:
    """What is known of every named objective, by family.

    >>> [d.name for d in catalog()][:3]
    ['cdpo', 'discopop', 'dpo']
    """
    return sorted(map(describe, names()), key=lambda d: FAMILIES.index(d.family))


def describe(name: str) -> Description:
    """What is known of a named objective.

    >>> describe("simpo").ratio
    '|y_l|/|y_w|'

    Raises:
        ValueError: unknown name.
    """
    if name not in REGISTRY:
        raise ValueError(_unknown(name))
    kind = REGISTRY[name]
    # the formulas are proven by the tests, so they can be asked
    reference, coupled = bool(re.search(r"Δ|h\*|\bm\b", kind.formula)), "*" in kind.formula
    family = 3 if coupled else 2 if not reference else 0 if kind.ratio == "1" else 1
    return Description(
        name=kind.name,
        title=(kind.__doc__ or "").split("\n")[0],
        family=FAMILIES[family],
        formula=kind.formula,
        ratio=kind.ratio,
        pushes_chosen_down=kind.pushes_chosen_down,
        uses_reference=reference,
        batch_coupled=coupled,
        hyperparameters={field.name: field.default for field in dataclasses.fields(kind)},
        source=kind.source,
    )
