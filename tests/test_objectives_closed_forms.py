"""Every objective against its closed form, and the printed formulas against every objective."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

from simgrad import objectives
from simgrad.objectives import BCO, DPO, IPO, KTO

N = 60
RNG = np.random.default_rng(0)
W, L, REF_W, REF_L = -20 * RNG.random((4, N))
LEN_W, LEN_L = RNG.integers(1, 30, (2, N))
LOGP, REF, LENGTHS = ARGS = tuple(
    jnp.stack(columns, -1) for columns in ((W, L), (REF_W, REF_L), (LEN_W, LEN_L))
)
COUPLED = ("aot", "aot_unpaired", "bco", "kto_pair")


def s(x):
    return 1 / (1 + np.exp(-x))


def ds(x):
    return s(x) * (1 - s(x))


def ls(x):
    return -np.log1p(np.exp(-x))


def pull_and_push(objective, *args):
    """d_w and d_l: the force on the chosen log-prob, and minus that on the rejected one."""
    force = objective.force(*args)
    return force[..., 0], -force[..., 1]


def quantities(w, l, ref_w, ref_l, n_w, n_l):  # noqa: E741
    """All that closed forms need, from the definitions."""
    q = SimpleNamespace(
        w=w, l=l, n_w=n_w, n_l=n_l, dw=w - ref_w, dl=l - ref_l, mw=w / n_w, ml=l / n_l
    )
    q.m = q.dw - q.dl
    q.pw, q.pl = np.exp(q.mw), np.exp(q.ml)
    q.ow, q.ol = np.log(q.pw / (1 - q.pw)), np.log(q.pl / (1 - q.pl))
    q.h, q.h_ref = w - l, ref_w - ref_l
    q.zw, q.zl = max(0, q.dw.mean()), max(0, q.dl.mean())
    return q


Q = quantities(W, L, REF_W, REF_L, LEN_W, LEN_L)


def partner(values, others):
    """By definition: the k-th smallest of ``others`` for the k-th smallest of ``values``."""
    return np.array([sorted(others)[sum(v < value for v in values)] for value in values])


MATCHED_REF, MATCHED_L, MATCHED_W = partner(Q.h, Q.h_ref), partner(Q.dw, Q.dl), partner(Q.dl, Q.dw)
B, A, G, E, LAM = 0.3, 0.37, 0.7, 0.15, 1.7
SMALL = 1 / (2 * B)
MEAN_REWARD = B * (Q.dw.mean() + Q.dl.mean()) / 2


def both(d):
    return d, d


def _orpo():
    k = s(Q.ol - Q.ow)
    return (1 + LAM * k / (1 - Q.pw)) / Q.n_w, LAM * k / ((1 - Q.pl) * Q.n_l)


def _discopop(tau=0.05):
    z = B * Q.m
    k = s(z / tau)
    loss = (1 - k) * np.log1p(np.exp(-z)) + k * np.exp(-z)
    slope = (
        -(1 - k) * s(-z) - k * np.exp(-z) + ds(z / tau) / tau * (np.exp(-z) - np.log1p(np.exp(-z)))
    )
    return {"beta": B, "tau": tau}, loss, both(-B * slope)


def _exo(z=B * Q.m):
    kl = sum(p * np.log(p / label) for p, label in ((s(z), 1 - E), (s(-z), E)))
    return {"beta": B, "epsilon": E}, kl, both(B * ds(z) * (np.log((1 - E) / E) - z))


def _alphapo():
    r_w, r_l = (1 - Q.pw**-A) / A, (1 - Q.pl**-A) / A
    k = B * s(G - B * (r_w - r_l))
    d = k * Q.pw**-A / Q.n_w, k * Q.pl**-A / Q.n_l
    return {"beta": B, "gamma": G, "alpha": A}, -np.log(s(B * (r_w - r_l) - G)), d


def _logit(z, d_w, d_l=None):
    """-log σ(z), ∂z/∂log π_w = d_w, -∂z/∂log π_l = d_l."""
    return -np.log(s(z)), (d_w * s(-z), (d_w if d_l is None else d_l) * s(-z))


CLOSED = {  # hyperparameters, loss, (d_w, d_l)
    "dpo": ({"beta": B}, *_logit(B * Q.m, B)),
    "r_dpo": ({"beta": B, "alpha": 0.05}, *_logit(B * Q.m + 0.05 * (Q.n_w - Q.n_l), B)),
    "ipo": ({"beta": B}, (Q.m - SMALL) ** 2, both(2 * (SMALL - Q.m))),
    "hinge": ({"beta": B}, np.where(B * Q.m < 1, 1 - B * Q.m, 0), both(B * (B * Q.m < 1))),
    "exo_pair": _exo(),
    "discopop": _discopop(),
    "cdpo": (
        {"beta": B, "epsilon": E},
        -(1 - E) * np.log(s(B * Q.m)) - E * np.log(s(-B * Q.m)),
        both(B * (s(-B * Q.m) - E)),
    ),
    "robust_dpo": (
        {"beta": B, "epsilon": E},
        (-(1 - E) * np.log(s(B * Q.m)) + E * np.log(s(-B * Q.m))) / (1 - 2 * E),
        both(B * ((1 - E) * s(-B * Q.m) + E * s(B * Q.m)) / (1 - 2 * E)),
    ),
    "simpo": (
        {"beta": 2.5, "gamma": G},
        *_logit(2.5 * (Q.mw - Q.ml) - G, 2.5 / Q.n_w, 2.5 / Q.n_l),
    ),
    "alphapo": _alphapo(),
    "sigmoid_norm": ({"beta": B}, *_logit(B * (Q.dw / Q.n_w - Q.dl / Q.n_l), B / Q.n_w, B / Q.n_l)),
    "rrhf": (
        {"sft_weight": LAM},
        np.maximum(0, Q.ml - Q.mw) - LAM * Q.w,
        ((Q.ml > Q.mw) / Q.n_w + LAM, (Q.ml > Q.mw) / Q.n_l),
    ),
    "slic_hf": (
        {"delta": 2.0, "sft_weight": LAM},
        np.maximum(0, 2 - Q.h) - LAM * Q.w,
        ((Q.h < 2) + LAM, 1.0 * (Q.h < 2)),
    ),
    "cpo": (
        {"beta": B, "sft_weight": LAM},
        -np.log(s(B * Q.h)) - LAM * Q.w,
        (B * s(-B * Q.h) + LAM, B * s(-B * Q.h)),
    ),
    "orpo": ({"odds_weight": LAM}, -Q.mw - LAM * np.log(s(Q.ow - Q.ol)), _orpo()),
    "sft": ({}, -Q.w, (np.ones(N), np.zeros(N))),
    "dpop": (
        {"beta": B, "penalty": LAM},
        *_logit(B * (Q.m - LAM * np.maximum(0, -Q.dw)), B * (1 + LAM * (Q.dw < 0)), B),
    ),
    "dpo_shift": (
        {"beta": B, "rejected_weight": 0.6},
        *_logit(B * (Q.dw - 0.6 * Q.dl), B, 0.6 * B),
    ),
    "cal_dpo": (
        {"beta": B},
        -np.log(s(Q.m)) + ((Q.dw - SMALL) ** 2 + (Q.dl + SMALL) ** 2) / 2,
        (s(-Q.m) + SMALL - Q.dw, s(-Q.m) + SMALL + Q.dl),
    ),
    "kto": (
        {"beta": B, "desirable_weight": 1.3, "undesirable_weight": 0.8, "kl": 0.9},
        1.3 * (1 - s(B * (Q.dw - 0.9))) + 0.8 * (1 - s(B * (0.9 - Q.dl))),
        (1.3 * B * ds(B * (Q.dw - 0.9)), 0.8 * B * ds(B * (0.9 - Q.dl))),
    ),
    "sppo_hard": (
        {"beta": B},
        (Q.dw - SMALL) ** 2 + (Q.dl + SMALL) ** 2,
        (2 * (SMALL - Q.dw), 2 * (Q.dl + SMALL)),
    ),
    "bco_pair": (
        {"beta": B},
        -np.log(s(B * Q.dw) * s(-B * Q.dl)),
        (B * s(-B * Q.dw), B * s(B * Q.dl)),
    ),
    "nca_pair": (
        {"beta": B},
        -np.log(s(B * Q.dw)) - np.log(s(-B * Q.dw) * s(-B * Q.dl)) / 2,
        (B * (1 - 1.5 * s(B * Q.dw)), B / 2 * s(B * Q.dl)),
    ),
    "apo_zero": ({"beta": B}, 1 - s(B * Q.dw) + s(B * Q.dl), (B * ds(B * Q.dw), B * ds(B * Q.dl))),
    "apo_down": (
        {"beta": B},
        s(B * Q.dw) + 1 - s(B * Q.m),
        (B * (ds(B * Q.m) - ds(B * Q.dw)), B * ds(B * Q.m)),
    ),
    "dpo_sft": (
        {"beta": B, "sft_weight": LAM},
        -np.log(s(B * Q.m)) - LAM * Q.mw,
        (B * s(-B * Q.m) + LAM / Q.n_w, B * s(-B * Q.m)),
    ),
    "f_dpo": (
        {"beta": B, "divergence": "js"},
        *_logit(B * (ls(Q.dw) - ls(Q.dl)), B * s(-Q.dw), B * s(-Q.dl)),
    ),
    "gate_dpo": (
        {"beta": B, "threshold": -2.0, "temperature": 1.5},
        *_logit(B * Q.m, B, B * s((Q.ml + 2) / 1.5)),
    ),
    "aot": ({"beta": B}, *_logit(B * (Q.h - MATCHED_REF), B)),
    "aot_unpaired": (
        {"beta": B},
        -np.log(s(B * (Q.dw - MATCHED_L))),
        (B * s(B * (MATCHED_L - Q.dw)), B * s(B * (Q.dl - MATCHED_W))),
    ),
    "kto_pair": (
        {"beta": B},
        1 - s(B * (Q.dw - Q.zl)) + 1 - s(B * (Q.zw - Q.dl)),
        (B * ds(B * (Q.dw - Q.zl)), B * ds(B * (Q.zw - Q.dl))),
    ),
    "bco": (
        {"beta": B},
        -np.log(s(B * Q.dw - MEAN_REWARD) * s(MEAN_REWARD - B * Q.dl)),
        (B * s(MEAN_REWARD - B * Q.dw), B * s(B * Q.dl - MEAN_REWARD)),
    ),
}
NAMES = objectives.names()


def test_every_name_has_a_closed_form():
    assert sorted(CLOSED) == NAMES
    assert Q.zw == 0 or Q.zl == 0, "the draw shows the clamp of kto_pair's reference point"
    assert Q.zw + Q.zl > 0, "and a reference point that is not clamped"


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_force_in_closed_form(name):
    hyperparameters, loss, (d_w, d_l) = CLOSED[name]
    objective = objectives.get(name, **hyperparameters)
    close(objective.loss(*ARGS), loss)
    force = objective.force(*ARGS)
    close(force[..., 0], np.broadcast_to(d_w, N))
    close(-force[..., 1], np.broadcast_to(d_l, N))


def loss_with_constants_held(name):
    """The loss of log-probs; what its gradient takes as constant keeps its value at LOGP."""
    if name == "gate_dpo":
        slope = jnp.stack([jnp.ones(N), s((Q.ml + 2) / 1.5)], -1)
        return lambda logp: DPO(B).loss(LOGP + slope * (logp - LOGP), REF, LENGTHS)
    held = {
        "bco": BCO(B, MEAN_REWARD),
        "kto_pair": KTO(B, 1.0, 0.0, float(Q.zl)) + KTO(B, 0.0, 1.0, float(Q.zw)),
    }
    objective = held.get(name, objectives.get(name, **CLOSED[name][0]))
    return lambda logp: objective.loss(logp, REF, LENGTHS)


@pytest.mark.parametrize("name", NAMES)
def test_the_force_is_minus_the_slope_of_the_summed_loss(name):
    """On each log-prob, by central differences; pairs may be laid out along several axes."""
    loss, h = loss_with_constants_held(name), 1e-5
    steps = h * jnp.eye(2 * N).reshape(2 * N, N, 2)
    rise = jax.vmap(lambda step: (loss(LOGP + step) - loss(LOGP - step)).sum())(steps)
    objective = objectives.get(name, **CLOSED[name][0])
    force = objective.force(*ARGS)
    np.testing.assert_allclose(
        -rise.reshape(N, 2) / (2 * h), force, rtol=1e-8, atol=2e-9 * jnp.abs(force).max()
    )
    folded = objective.force(*(x.reshape(N // 4, 4, 2) for x in ARGS)).reshape(N, 2)
    close(folded[:, 0], force[:, 0])
    close(folded[:, 1], force[:, 1])


def test_a_positive_force_is_up():
    force = DPO().force(*ARGS)
    assert force.shape == (N, 2)
    assert (force[:, 0] > 0).all()
    assert (force[:, 1] < 0).all()


DETACHED = ("gate_dpo", "kto_pair")
"""Their gradient is by definition not that of their value."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DETACHED])
def test_the_force_is_what_the_gradient_of_the_loss_pulls_with(name):
    """-∇ΣL = Σ d_w ∇log π_w - d_l ∇log π_l along any direction, by central differences."""
    objective = objectives.get(name, **({"delta": 0.1} if name == "bco" else {}))
    d_w, d_l = pull_and_push(objective, *ARGS)
    a, b, h = RNG.normal(size=N), RNG.normal(size=N), 1e-6
    step = h * jnp.stack([a, b], -1)
    up = objective.loss(LOGP + step, REF, LENGTHS).sum()
    down = objective.loss(LOGP - step, REF, LENGTHS).sum()
    np.testing.assert_allclose((up - down) / (2 * h), (d_l * b - d_w * a).sum(), rtol=1e-5)


# what is printed


def evaluate(text, objective):
    """A printed formula in numpy: · is a product, ² a square, a star is part of the name."""
    starred = {"Δ_l*": MATCHED_L, "Δ_w*": MATCHED_W, "h*": MATCHED_REF, "z_w*": Q.zw, "z_l*": Q.zl}
    starred["δ*"] = getattr(objective, "beta", 0) * MEAN_REWARD / B
    names = {
        **{
            "σ": s,
            "logσ": ls,
            "dσ": ds,
            "log": np.log,
            "exp": np.exp,
            "max": np.maximum,
            "I": lambda x: 1.0 * x,
        },
        **{
            "logπ_w": Q.w,
            "logπ_l": Q.l,
            "n_w": Q.n_w,
            "n_l": Q.n_l,
            "Δ_w": Q.dw,
            "Δ_l": Q.dl,
            "m": Q.m,
        },
        **{
            "μ_w": Q.mw,
            "μ_l": Q.ml,
            "p_w": Q.pw,
            "p_l": Q.pl,
            "o_w": Q.ow,
            "o_l": Q.ol,
            "inf": np.inf,
        },
    }
    for field in dataclasses.fields(objective):
        names[objectives.SYMBOLS.get(field.name, field.name)] = getattr(objective, field.name)
    for k, symbol in enumerate(starred):
        text = text.replace(symbol, f"star_{k}")
        names[f"star_{k}"] = starred[symbol]
    for printed, python in (
        ("·", "*"),
        ("²", "**2"),
        ("|y_w|", "n_w"),
        ("|y_l|", "n_l"),
        ("σ'", "dσ"),
        ("∞", "inf"),
    ):
        text = text.replace(printed, python)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.broadcast_to(eval(text, {"__builtins__": {}}, names), N)


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_formula_is_the_loss(name):
    objective = objectives.get(name, **CLOSED[name][0])
    close(objective.loss(*ARGS), evaluate(objective.formula, objective))


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_ratio_is_that_of_pull_and_push(name):
    objective = objectives.get(name, **CLOSED[name][0])
    d_w, d_l = map(np.asarray, pull_and_push(objective, *ARGS))
    acts = (d_w != 0) | (d_l != 0)
    assert acts.mean() > 0.3
    with np.errstate(divide="ignore"):
        ratio = d_w[acts] / d_l[acts]
    np.testing.assert_allclose(evaluate(objective.ratio, objective)[acts], ratio, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_condition_is_when_the_chosen_is_pushed_down(name):
    objective = objectives.get(name, **CLOSED[name][0])
    down = np.asarray(objective.force(*ARGS)[..., 0]) < 0
    if objective.pushes_chosen_down:
        np.testing.assert_array_equal(evaluate(objective.pushes_chosen_down, objective), down)
        assert down.any()
        assert not down.all()
    else:
        assert not down.any()


@pytest.mark.parametrize("description", objectives.catalog(), ids=lambda d: d.name)
def test_the_catalog_agrees_with_what_the_objective_does(description):
    objective = objectives.get(description.name)
    d_w, d_l = pull_and_push(objective, *ARGS)
    assert description.uses_reference == objectives.uses_reference(objective)
    assert (
        description.batch_coupled
        == objectives.batch_coupled(objective)
        == (description.name in COUPLED)
    )
    equal = bool(jnp.allclose(d_w, d_l, rtol=1e-12, atol=0))
    assert equal == (description.ratio == "1")
    assert description.hyperparameters == {
        f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)
    }
    assert {f.name for f in dataclasses.fields(objective)} <= {
        *objectives.SYMBOLS,
        "normalization",
        "divergence",
    }
    for text in (description.formula, description.ratio, description.source):
        assert text in type(objective).__doc__


def test_catalog_functions_work_inside_a_compiled_function():
    @jax.jit
    def f(x):
        return (
            x
            if objectives.uses_reference(IPO(0.11)) and not objectives.batch_coupled(IPO(0.11))
            else -x
        )

    assert f(2.0) == 2.0
