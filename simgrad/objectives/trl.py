"""TRL's loss types by TRL's names, options and defaults (TRL 1.16)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simgrad.objectives.base import Combined, Objective
from simgrad.objectives.coupled import AOT, AOTUnpaired
from simgrad.objectives.margin import DPO, EXO, IPO, DiscoPOP, Hinge
from simgrad.objectives.reference_free import SFT, OddsRatio, SimPO
from simgrad.objectives.separate import KTO, APODown, APOZero, BCOPair, NCAPair, SPPOHard
from simgrad.objectives.wrappers import (
    Divergence,
    FDivergence,
    LabelSmoothed,
    LengthNormalized,
    ReferenceFree,
    Robust,
    Swapped,
)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_weights": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "discopop_tau": 0.05,
        "use_weighting": False,
        "ld_alpha": None,
    },
    "cpo": {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "cpo_alpha": 1.0,
        "simpo_gamma": 0.5,
        "alpha": 0.0,
    },
    "orpo": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "kl": 0.0},
}
_DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
_OF_SCORES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
TRL_LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": (
        *_OF_SCORES,
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
    ),
    "cpo": ("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
    "orpo": ("orpo",),
    "kto": ("kto", "apo_zero_unpaired"),
}
"""Loss types of each trainer."""


def from_trl(loss_type: str | Sequence[str], trainer: str = "dpo", **config: Any) -> Objective:
    """The objective whose mean over a batch is the loss of a TRL trainer.

    >>> from_trl("sigmoid", beta=0.2)
    DPO(beta=0.2)
    >>> from_trl(["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    DPO(beta=0.1) + 0.5 * SFT(normalization='batch')
    >>> from_trl("ipo")
    LengthNormalized(objective=IPO(beta=0.1))

    ``trainer`` is dpo, cpo, orpo or kto. Keywords are the fields of DPOConfig, CPOConfig,
    ORPOConfig and KTOConfig that define the loss, with their defaults. An option that TRL ignores
    for a loss type, as ``label_smoothing`` for most, is ignored here too. Where a trainer's loss is
    more than a function of the response's log-probs:

    * ``kto``: a batch of n pairs is 2n examples to TRL, so the mean over pairs is halved; its
      estimate of the KL divergence, made on mismatched responses, is to be given as ``kl`` (not a
      field of TRL's).
    * ``orpo``: TRL's NLL also covers the prompt, which is left out here; equal for prompts of one
      token.

    Raises:
        ValueError: unknown trainer, loss type or option; an option that needs more than sequence
            log-probs.
    """
    if trainer not in TRL_LOSS_TYPES:
        raise ValueError(f"unknown TRL trainer {trainer!r}; there are: {', '.join(TRL_LOSS_TYPES)}")
    loss_types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in loss_types:
        if name not in TRL_LOSS_TYPES[trainer]:
            known = ", ".join(TRL_LOSS_TYPES[trainer])
            elsewhere = [
                f"trl:{other}/{name}" for other, kinds in TRL_LOSS_TYPES.items() if name in kinds
            ]
            hint = f" did you mean {elsewhere[0]!r}?" if elsewhere else ""
            raise ValueError(
                f"unknown loss type {name!r} of TRL's {trainer} trainer;{hint} there are: {known}"
            )
    if not loss_types:
        raise ValueError("no loss type given")
    defaults = _DEFAULTS[trainer]
    if unknown := sorted(set(config) - set(defaults)):
        known = ", ".join(defaults)
        raise ValueError(
            f"TRL's {trainer} loss has no option {', '.join(unknown)}; it takes: {known}"
        )
    options = defaults | config
    if trainer == "dpo":
        return _dpo(loss_types, options)
    if len(loss_types) != 1:
        raise ValueError(f"TRL's {trainer} trainer takes one loss type, got {len(loss_types)}")
    return {"cpo": _cpo, "orpo": _orpo, "kto": _kto}[trainer](loss_types[0], options)


def _dpo(loss_types: Sequence[str], options: Mapping[str, Any]) -> Objective:
    if options["use_weighting"]:
        raise ValueError(
            "use_weighting (WPO) needs whole next-token distributions, not only log-probs of "
            "responses"
        )
    if options["ld_alpha"] is not None:
        raise ValueError(
            "ld_alpha (LD-DPO) splits responses, which log-probs of whole responses do not show"
        )
    divergence = options["f_divergence_type"]
    if divergence not in ("reverse_kl", *_DIVERGENCES):
        known = ", ".join(("reverse_kl", *_DIVERGENCES))
        raise ValueError(f"unknown f_divergence_type {divergence!r}; there are: {known}")
    if divergence != "reverse_kl" and (
        alien := [name for name in loss_types if name not in _OF_SCORES]
    ):
        raise ValueError(
            f"f_divergence_type is only for {', '.join(_OF_SCORES)}, not for {', '.join(alien)}"
        )
    weights = options["loss_weights"] or [1.0] * len(loss_types)
    if len(weights) != len(loss_types):
        raise ValueError(f"loss_weights: {len(weights)} for {len(loss_types)} loss types")
    parts = tuple(_dpo_part(name, options) for name in loss_types)
    return parts[0] if tuple(weights) == (1.0,) else Combined(parts, tuple(map(float, weights)))


def _dpo_part(name: str, options: Mapping[str, Any]) -> Objective:
    beta, smoothing = options["beta"], options["label_smoothing"]
    if name == "sft":
        return SFT("batch")
    part: Objective = {
        "sigmoid": lambda: DPO(beta),
        "hinge": lambda: Hinge(beta),
        "ipo": lambda: LengthNormalized(IPO(beta)),
        "exo_pair": lambda: EXO(beta, smoothing),
        "robust": lambda: Robust(DPO(beta), smoothing),
        "discopop": lambda: DiscoPOP(beta, options["discopop_tau"]),
        "sigmoid_norm": lambda: LengthNormalized(DPO(beta)),
        "nca_pair": lambda: NCAPair(beta),
        "bco_pair": lambda: BCOPair(beta),
        "sppo_hard": lambda: SPPOHard(beta),
        "aot": lambda: _smoothed(AOT(beta), smoothing),
        "aot_unpaired": lambda: _smoothed(AOTUnpaired(beta), smoothing),
        "apo_zero": lambda: APOZero(beta),
        "apo_down": lambda: APODown(beta),
    }[name]()
    return _with_divergence(part, options["f_divergence_type"], options["f_alpha_divergence_coef"])


def _with_divergence(part: Objective, divergence: str, alpha: float) -> Objective:
    # the scores replace the log-ratios first, whatever the loss then does with them
    if divergence == "reverse_kl":
        return part
    return FDivergence(part, _DIVERGENCES[divergence], alpha)


def _smoothed(part: Objective, smoothing: float) -> Objective:
    return LabelSmoothed(part, smoothing) if smoothing else part


def _cpo(name: str, options: Mapping[str, Any]) -> Objective:
    beta, smoothing, gamma = options["beta"], options["label_smoothing"], options["simpo_gamma"]
    sft_weight = 0.0 if name == "alphapo" else options["cpo_alpha"]
    if name in ("simpo", "alphapo"):
        part: Objective = SimPO(beta, gamma)
        if smoothing:  # TRL flips the sign of the whole logit, margin included
            part = (1 - smoothing) * part + smoothing * Swapped(SimPO(beta, -gamma))
    else:
        part = {"sigmoid": _smoothed(DPO(beta), smoothing), "hinge": Hinge(beta), "ipo": IPO(beta)}[
            name
        ]
    if options["alpha"]:
        part = FDivergence(part, "alpha", 1 - options["alpha"])
    if name in ("ipo", "simpo", "alphapo"):
        part = LengthNormalized(part)
    part = ReferenceFree(part)
    return part + sft_weight * SFT("batch") if sft_weight else part


def _orpo(name: str, options: Mapping[str, Any]) -> Objective:
    return SFT("batch") + options["beta"] * OddsRatio()


def _kto(name: str, options: Mapping[str, Any]) -> Objective:
    kl = options["kl"] if name == "kto" else 0.0
    return 0.5 * KTO(
        options["beta"], options["desirable_weight"], options["undesirable_weight"], kl
    )
