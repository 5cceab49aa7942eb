"""Preference objectives as plain functions of log-probs, and the two numbers theory sees of them.

Every pairwise objective L(log π_w, log π_l; references, lengths) reaches the parameters only
through

    -∇L = d_w ∇log π_w - d_l ∇log π_l,    d_w = -∂L/∂log π_w,    d_l = ∂L/∂log π_l

(Yuan et al., arXiv 2410.13828, Sec. 3), so an objective here is its loss, and its force
c = (d_w, -d_l) on the two log-probs comes from automatic differentiation, never from a formula
typed in twice.

    get("dpo", beta=0.05)                   a textbook objective by name; names() lists them
    get("trl:ipo")                          TRL's loss of that name, also from_trl("ipo")
    DPO() + 0.5 * SFT()                     sums
    LengthNormalized(LabelSmoothed(DPO(), 0.1))     modifiers
    catalog()                               formulas, d_w/d_l, when d_w < 0, sources
"""

from __future__ import annotations

from simgrad.objectives.base import Combined, Objective
from simgrad.objectives.catalog import (
    FAMILIES,
    NOTATION,
    SYMBOLS,
    Description,
    batch_coupled,
    catalog,
    describe,
    get,
    names,
    uses_reference,
)
from simgrad.objectives.composed import CDPO, DPOSFT, FDPO, AlphaPO, GateDPO, RobustDPO, SigmoidNorm
from simgrad.objectives.coupled import AOT, BCO, AOTUnpaired, KTOPair
from simgrad.objectives.margin import DPO, EXO, IPO, RDPO, DiscoPOP, Hinge
from simgrad.objectives.reference_free import CPO, ORPO, RRHF, SFT, OddsRatio, SimPO, SLiC
from simgrad.objectives.separate import (
    DPOP,
    KTO,
    APODown,
    APOZero,
    BCOPair,
    CalDPO,
    DPOShift,
    NCAPair,
    SPPOHard,
)
from simgrad.objectives.trl import TRL_LOSS_TYPES, from_trl
from simgrad.objectives.wrappers import (
    FDivergence,
    Gated,
    LabelSmoothed,
    LengthNormalized,
    ReferenceFree,
    Robust,
    Swapped,
)

__all__ = [
    "AOT",
    "BCO",
    "CDPO",
    "CPO",
    "DPO",
    "DPOP",
    "DPOSFT",
    "EXO",
    "FAMILIES",
    "FDPO",
    "IPO",
    "KTO",
    "NOTATION",
    "ORPO",
    "RDPO",
    "RRHF",
    "SFT",
    "SYMBOLS",
    "TRL_LOSS_TYPES",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AlphaPO",
    "BCOPair",
    "CalDPO",
    "Combined",
    "DPOShift",
    "Description",
    "DiscoPOP",
    "FDivergence",
    "GateDPO",
    "Gated",
    "Hinge",
    "KTOPair",
    "LabelSmoothed",
    "LengthNormalized",
    "NCAPair",
    "Objective",
    "OddsRatio",
    "ReferenceFree",
    "Robust",
    "RobustDPO",
    "SLiC",
    "SPPOHard",
    "SigmoidNorm",
    "SimPO",
    "Swapped",
    "batch_coupled",
    "catalog",
    "describe",
    "from_trl",
    "get",
    "names",
    "uses_reference",
]
