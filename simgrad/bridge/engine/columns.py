"""The columns of tables, each declared once, and the program that computes them.

The engine, ``help(simgrad.score)``, the printed summary, the report and the documentation read
these declarations. To add a score, add one :class:`Column`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax

from simgrad.models import Apply
from simgrad.objectives import Objective
from simgrad.pairs import Batch
from simgrad.theory import (
    PairKernel,
    Regime,
    Responses,
    ches,
    first_order,
    head_gap,
    ln_ches,
    regime,
    responses,
)
from simgrad.theory.kernel import kernel_and_responses
from simgrad.theory.similarity import embedding_cosine, last_hidden_inner, normalized_edit_distance
from simgrad.typing import Array, Float, Theta

PER_RATE = "nats per unit learning rate"
"""Unit of a first-order change; with a learning rate, it is nats."""


@dataclass(frozen=True)
class Evaluated:
    """What the model says about a batch of pairs, of which scores are made.

    Attributes:
        batch: the pairs.
        responses: their log-probs and hidden states.
        force: (d_w, -d_l) of each pair alone, the policy its own reference.
        kernel: their gradients' inner products (None: not asked for).
        learning_rate: η of the predicted change.
    """

    batch: Batch
    responses: Responses
    force: Float[Array, "B 2"]
    kernel: PairKernel | None
    learning_rate: float | Float[Array, ""]

    @property
    def logp(self) -> Float[Array, "B 2"]:
        """Log π(y | x) in nats."""
        return self.responses.logp

    @property
    def change(self) -> Float[Array, "B 2"]:
        """First-order Δlog π of both responses after a step on the pair alone."""
        kernel = cast(PairKernel, self.kernel)  # only columns that need gradients ask
        return first_order(kernel, self.force, self.learning_rate)


@dataclass(frozen=True)
class Read:
    """What a run's direction says about a batch of pairs: start, Δlog π and its error, in nats."""

    logp: Float[Array, "B 2"]
    change: Float[Array, "B 2"]
    error: Float[Array, "B 2"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: in the table.
        label: for people, in the summary and the report.
        meaning: one line, with its formula or the function that says more.
        needs: ``tokens`` (the pair alone), ``forward`` (a forward pass), ``gradients`` or a run's
            ``direction``; ``row`` is filled in by the engine.
        of: the values, of a :class:`simgrad.pairs.Pair` where tokens are enough, else of an
            :class:`Evaluated` or a :class:`Read`.
        unit: of the values; empty for pure numbers.
        risk: 1 where a high value should mean that the chosen falls, -1 where a low one should, 0
            for what is no score of a pair.
        labels: what the values stand for, where they are codes.
        show: how the printed summary formats a value.
        short: its header there (default: the label).
    """

    name: str
    label: str
    meaning: str
    needs: Literal["row", "tokens", "forward", "gradients", "direction", "table"]
    of: Callable[[Any], Any] | None
    unit: str = ""
    risk: int = 0
    labels: tuple[str, ...] = ()
    show: str = ".4g"
    short: str = ""


_ROW = Column("index", "row", "row number in the data, from 0", "row", None, show="d")
_LENGTHS = tuple(
    Column(
        f"n_{part}",
        f"{part} tokens",
        f"tokens of the {part}" + ("" if part == "prompt" else ", end of sequence included"),
        "tokens",
        lambda pair, part=part: len(getattr(pair, part)),
        "tokens",
        show="d",
        short=f"{part}\ntokens",
    )
    for part in ("prompt", "chosen", "rejected")
)
_LOGP = tuple(
    Column(
        f"logp_{side}",
        f"log π({side})",
        "Σ_k log π(y_k | x, y_<k)",
        "forward",
        lambda found, k=k: found.logp[:, k],
        "nats",
        short=f"log π\n{side}",
    )
    for k, side in enumerate(("chosen", "rejected"))
)

# fmt: off
SCORE_COLUMNS: tuple[Column, ...] = (
    _ROW,
    *_LENGTHS,
    *_LOGP,
    Column("ches", "CHES", "simgrad.theory.ches", "forward",
           lambda e: ches(e.responses, e.batch), risk=1),
    Column("ln_ches", "length-normalised CHES", "simgrad.theory.ln_ches", "forward",
           lambda e: ln_ches(e.responses, e.batch), risk=1, show=".3g", short="ln-CHES"),
    Column("last_hidden_inner", "last hidden states' inner product",
           "simgrad.theory.similarity.last_hidden_inner", "forward",
           lambda e: last_hidden_inner(e.responses), risk=1),
    Column("edit_distance", "edit distance, normalised",
           "simgrad.theory.similarity.normalized_edit_distance, of tokens", "tokens",
           lambda pair: normalized_edit_distance(pair.chosen, pair.rejected), risk=-1),
    Column("embedding_cosine", "cosine of response embeddings",
           "simgrad.theory.similarity.embedding_cosine", "forward",
           lambda e: embedding_cosine(e.responses, e.batch), risk=1),
    Column("head_gap", "head gap",
           "⟨g_w,g_l⟩ - ‖g_w‖² of the unembedding alone: simgrad.theory.head_gap", "forward",
           lambda e: head_gap(e.responses, e.batch), f"{PER_RATE}, d = 1", risk=1),
    Column("grad_inner", "⟨g_w,g_l⟩", "inner product of the gradients g = ∇_θ log π(y|x)",
           "gradients", lambda e: e.kernel.inner),
    Column("grad_sq_chosen", "‖g_w‖²", "square of the chosen's gradient",
           "gradients", lambda e: e.kernel.sq_chosen),
    Column("grad_sq_rejected", "‖g_l‖²", "square of the rejected's gradient",
           "gradients", lambda e: e.kernel.sq_rejected),
    Column("grad_cosine", "cosine of gradients", "⟨g_w,g_l⟩ / (‖g_w‖ ‖g_l‖)", "gradients",
           lambda e: e.kernel.cosine, risk=1, show=".3f", short="cosine of\ngradients"),
    Column("d_chosen", "d_w", "the objective's pull on log π(chosen), for the pair alone, the "
           "policy its own reference", "forward", lambda e: e.force[:, 0]),
    Column("d_rejected", "d_l", "the objective's push on log π(rejected), likewise", "forward",
           lambda e: -e.force[:, 1]),
    *(
        Column(f"predicted_dlogp_{side}", f"predicted Δ log π({side})",
               "first-order change after one SGD step on the pair alone, per unit learning rate "
               "unless one is given", "gradients", lambda e, k=k: e.change[:, k], PER_RATE,
               risk=-1, short=f"Δ log π\n{side}")
        for k, side in enumerate(("chosen", "rejected"))
    ),
    Column("regime", "regime", "ideal, both_fall, both_rise or reversed", "gradients",
           lambda e: regime(e.change), labels=tuple(r.label for r in Regime),
           show="s"),
)
# fmt: on

PREDICTION_COLUMNS: tuple[Column, ...] = (
    _ROW,
    *_LENGTHS,
    *_LOGP,
    *(
        Column(
            f"{name}_{side}",
            f"{label}({side})",
            meaning,
            "direction",
            lambda read, k=k, name=name: (read.error if name == "error" else read.change)[:, k],
            "nats",
            show=show,
            short=f"{short}\n{side}",
        )
        for name, label, meaning, show, short in (
            (
                "predicted_dlogp",
                "predicted Δ log π",
                "⟨∇log π(y), D⟩ of the whole run",
                ".3g",
                "Δ log π",
            ),
            (
                "error",
                "error of predicted Δ log π",
                "its standard error, from having seen a sample only",
                ".2g",
                "± (sample)",
            ),
        )
        for k, side in enumerate(("chosen", "rejected"))
    ),
)

DERIVED: tuple[Column, ...] = (
    Column(
        "gap",
        "full gap ⟨g_w,g_l⟩ − ‖g_w‖²",
        "the gap whose sign decides for d_w = d_l",
        "table",
        lambda table: table["grad_inner"] - table["grad_sq_chosen"],
        f"{PER_RATE}, d = 1",
        risk=1,
    ),
)
"""What the report makes of two columns of a score table."""

RISKS = tuple(column for column in (*SCORE_COLUMNS, *DERIVED) if column.risk)
"""What may tell whether the chosen response falls."""


def score_columns(gradients: bool) -> tuple[Column, ...]:
    """The columns of a score table, those that need gradients only where asked for."""
    return tuple(c for c in SCORE_COLUMNS if gradients or c.needs != "gradients")


def text_table(columns: Iterable[Column]) -> str:
    """Name, meaning and unit of columns, a line each.

    >>> print(text_table(SCORE_COLUMNS[:2]))
    index                     row number in the data, from 0
    n_prompt                  tokens of the prompt
    """

    def line(c: Column) -> str:
        unit = f" [{c.unit}]" if c.unit and c.unit not in ("tokens", PER_RATE) else ""
        return f"{c.name:<25} {c.meaning}{unit}"

    return "\n".join(map(line, columns))


@functools.partial(jax.jit, static_argnames=("apply", "objective", "gradients"))
def score_batch(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    learning_rate: float | Float[Array, ""],
    gradients: bool,
) -> dict[str, Array]:
    """All scores of a batch that need the model: column name to array (B,)."""
    if gradients:
        kernel, result = kernel_and_responses(apply, theta, batch)
    else:
        kernel, result = None, responses(apply, theta, batch)

    # one pair at a time, so that objectives which couple pairs see the batch that the columns
    # speak of
    def alone(logp: Array, lengths: Array) -> Array:
        return objective.force(logp[None], logp[None], lengths[None])[0]

    force = jax.vmap(alone)(result.logp, batch.lengths)
    found = Evaluated(batch, result, force, kernel, learning_rate)
    asked = score_columns(gradients)
    return {c.name: c.of(found) for c in asked if c.of and c.needs in ("forward", "gradients")}
