"""Objectives under transformations and at extremes; modifiers; batches; what the shapes mean; refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives_closed_forms import (
    ARGS,
    LEN_L,
    LEN_W,
    MATCHED_L,
    MEAN_REWARD,
    NAMES,
    REF_L,
    REF_W,
    B,
    L,
    N,
    Q,
    W,
    ls,
    s,
)

from simgrad import objectives
from simgrad.objectives import (
    AOT,
    BCO,
    DPO,
    DPOP,
    EXO,
    IPO,
    KTO,
    SFT,
    Combined,
    FDivergence,
    Gated,
    Hinge,
    KTOPair,
    LabelSmoothed,
    LengthNormalized,
    ReferenceFree,
    Robust,
    SimPO,
    Swapped,
)
from simgrad.objectives.base import number

RNG = np.random.default_rng(1)
COMPOSITES = (
    DPO(0.2) + 0.5 * SFT("batch"),
    FDivergence(Robust(IPO(0.3), 0.2), "forward_kl"),
    Gated(LengthNormalized(LabelSmoothed(SimPO(), 0.1)), -3.0, 0.5),
    ReferenceFree(Swapped(KTO())),
)


# dtypes, transformations, extremes


@pytest.mark.parametrize("objective", [*map(objectives.get, NAMES), *COMPOSITES], ids=repr)
def test_objectives_work_under_transformations_in_float32(objective):
    narrow = [x.astype(jnp.float32) if x.dtype == jnp.float64 else x for x in ARGS]
    d = jax.jit(lambda o, *x: o.coefficients(*x), static_argnums=0)(objective, *narrow)
    loss = objective.loss(*narrow)
    assert d.chosen.dtype == d.rejected.dtype == loss.dtype == jnp.float32
    assert hash(objective) == hash(dataclasses.replace(objective))
    close(loss, objective.loss(*ARGS), "float32", scale=5)
    close(d, objective.coefficients(*ARGS), "float32", scale=5)
    if not objectives.batch_coupled(objective):
        close(jax.vmap(objective.loss)(*ARGS), objective.loss(*ARGS))


EXTREMES = [-1e4, -300.0, -1.0, -1e-9, 0.0]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_probs_give_finite_losses_and_coefficients(name, dtype):
    grid = jnp.asarray(np.stack(np.meshgrid(*[EXTREMES] * 4), 0).reshape(4, -1), dtype)
    for length in (1, 7):
        lengths = (jnp.full(grid.shape[1], length), jnp.full(grid.shape[1], 3))
        objective = objectives.get(name)
        assert jnp.isfinite(objective.loss(*grid, *lengths)).all()
        d = objective.coefficients(*grid, *lengths)
        assert jnp.isfinite(d.chosen).all()
        assert jnp.isfinite(d.rejected).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_are_finite_at_extremes(divergence):
    grid = jnp.asarray(np.stack(np.meshgrid(*[EXTREMES] * 4), 0).reshape(4, -1), "float32")
    one = (jnp.ones(grid.shape[1], int),) * 2
    objective = FDivergence(DPO(), divergence, alpha=-1.5)
    d = objective.coefficients(*grid, *one)
    assert all(
        bool(jnp.isfinite(x).all()) for x in (objective.loss(*grid, *one), d.chosen, d.rejected)
    )


# modifiers


logps = st.lists(st.floats(-50, 0), min_size=4, max_size=4)
lengths = st.tuples(st.integers(1, 40), st.integers(1, 40))


def arrays(logp, length):
    return (*(jnp.array([x]) for x in logp), *(jnp.array([n]) for n in length))


def swap(x):
    return x[1], x[0], x[3], x[2], x[5], x[4]


@settings(max_examples=30, deadline=None)
@given(logps, lengths, st.floats(0, 0.45), st.sampled_from([DPO(), IPO(), SimPO(), KTO(kl=0.3)]))
def test_robust_is_unbiased_under_flipped_labels(logp, length, epsilon, objective):
    x = arrays(logp, length)
    robust = Robust(objective, epsilon)
    expected = (1 - epsilon) * robust.loss(*x) + epsilon * robust.loss(*swap(x))
    np.testing.assert_allclose(expected, objective.loss(*x), rtol=1e-10, atol=1e-9)
    smooth = LabelSmoothed(objective, epsilon).loss(*x)
    np.testing.assert_allclose(
        smooth, (1 - epsilon) * objective.loss(*x) + epsilon * objective.loss(*swap(x)), rtol=1e-12
    )


@pytest.mark.parametrize("wrap", [LabelSmoothed, Robust])
def test_no_smoothing_is_no_change_and_some_is_one(wrap):
    close(wrap(DPO(B), 0.0).loss(*ARGS), DPO(B).loss(*ARGS))
    assert np.abs(wrap(DPO(B), 0.1).loss(*ARGS) - DPO(B).loss(*ARGS)).max() > 0.1


@pytest.mark.parametrize("objective", [*map(objectives.get, NAMES)], ids=repr)
def test_swapping_twice_is_no_change_and_once_exchanges_the_coefficients(objective):
    once, twice, d = (
        Swapped(objective),
        Swapped(Swapped(objective)),
        objective.coefficients(*swap(ARGS)),
    )
    close(twice.loss(*ARGS), objective.loss(*ARGS))
    close(once.coefficients(*ARGS).chosen, -d.rejected)
    close(once.coefficients(*ARGS).rejected, -d.chosen)


def test_length_normalization():
    one = jnp.ones(N, int)
    for inner in (DPO(B), IPO(B), SimPO()):
        normalized = LengthNormalized(inner)
        close(normalized.loss(*ARGS[:4], one, one), inner.loss(*ARGS[:4], one, one))
    per_token = [
        jnp.asarray(x / n) for x, n in zip((W, L, REF_W, REF_L), (LEN_W, LEN_L) * 2, strict=True)
    ]
    close(LengthNormalized(IPO(B)).loss(*ARGS), IPO(B).loss(*per_token, one, one))
    d, inner = (
        LengthNormalized(IPO(B)).coefficients(*ARGS),
        IPO(B).coefficients(*per_token, one, one),
    )
    close(np.asarray(d.chosen) * LEN_W, inner.chosen)
    close(np.asarray(d.rejected) * LEN_L, inner.rejected)


def test_reference_free():
    free = ReferenceFree(DPO(B))
    close(free.loss(*ARGS), -ls(B * Q.h))
    assert objectives.uses_reference(DPO(B))
    assert not objectives.uses_reference(free)


def generator(divergence, u, alpha):
    """f(u) of the f-divergence Σ ref f(π/ref), up to terms linear in u with constant slope."""
    if divergence == "reverse_kl":
        return u * jnp.log(u)
    if divergence == "forward_kl":
        return u - jnp.log(u)
    if divergence == "js":
        return u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2)
    return (u**alpha - alpha * u + alpha - 1) / (alpha * (alpha - 1))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_scores_are_derivatives_of_the_divergence(divergence):
    u = jnp.asarray(RNG.uniform(0.05, 20, 50))
    objective = FDivergence(DPO(), divergence, 0.3)
    slope = jax.vmap(jax.grad(lambda x: generator(divergence, x, 0.3)))(u)
    shift = objective.score(jnp.log(u)) - slope
    np.testing.assert_allclose(shift, shift[0], rtol=1e-10, atol=1e-10)


def test_divergences():
    close(FDivergence(DPO(B), "reverse_kl").loss(*ARGS), DPO(B).loss(*ARGS))
    close(FDivergence(DPO(B), "alpha", 1.0).loss(*ARGS), DPO(B).loss(*ARGS))
    near = [x / 5 for x in ARGS[:4]]
    forward = FDivergence(DPO(B), "forward_kl")
    close(FDivergence(DPO(B), "alpha", 0.0).loss(*near, *ARGS[4:]), forward.loss(*near, *ARGS[4:]))
    close(forward.loss(*near, *ARGS[4:]), -ls(B * (np.exp(-Q.dl / 5) - np.exp(-Q.dw / 5))))
    d = FDivergence(DPO(B), "alpha", 0.4).coefficients(*ARGS)
    close(d.chosen * np.exp(0.6 * Q.dw), d.rejected * np.exp(0.6 * Q.dl))
    close(objectives.get("f_dpo", beta=B, divergence="alpha", alpha=0.4).coefficients(*ARGS), d)


def test_alphapo_tends_to_simpo():
    simpo = SimPO(2.0, 0.5).loss(*ARGS)
    close(objectives.get("alphapo", beta=2.0, gamma=0.5, alpha=0.0).loss(*ARGS), simpo)
    misses = [
        float(
            jnp.abs(
                objectives.get("alphapo", beta=2.0, gamma=0.5, alpha=a).loss(*ARGS) - simpo
            ).max()
        )
        for a in (2e-4, 1e-4)
    ]
    assert 1.9 < misses[0] / misses[1] < 2.1


@pytest.mark.parametrize("inner", [DPO(B), SimPO(), KTO()], ids=repr)
def test_a_gate_changes_only_the_push_on_the_rejected(inner):
    gated = Gated(inner, -2.0, 0.5)
    np.testing.assert_array_equal(gated.loss(*ARGS), inner.loss(*ARGS))
    d, plain = gated.coefficients(*ARGS), inner.coefficients(*ARGS)
    close(d.chosen, plain.chosen)
    close(d.rejected, plain.rejected * s((Q.ml + 2) / 0.5))
    assert (d.rejected[Q.ml < -6] < 1e-3 * plain.rejected[Q.ml < -6]).all()
    assert (Q.ml < -6).any()


def test_sums_are_linear():
    dpo, sft = DPO(B), SFT()
    combined = 2 * dpo + 0.5 * sft
    close(combined.loss(*ARGS), 2 * dpo.loss(*ARGS) + 0.5 * sft.loss(*ARGS))
    close(combined.coefficients(*ARGS).chosen, 2 * dpo.coefficients(*ARGS).chosen + 0.5)
    assert 2 * (dpo + 0.5 * sft) + IPO() == Combined((dpo, sft, IPO()), (2.0, 1.0, 1.0))
    assert repr(dpo + 0.5 * sft) == "DPO(beta=0.3) + 0.5 * SFT(normalization='sum')"
    close(
        (dpo + 0.5 * SFT("length")).loss(*ARGS),
        objectives.get("dpo_sft", beta=B, sft_weight=0.5).loss(*ARGS),
    )


def test_normalizations_of_sft():
    close(SFT("length").loss(*ARGS), -Q.mw)
    close(SFT("batch").loss(*ARGS).mean(), -W.sum() / LEN_W.sum())
    close(SFT("batch").coefficients(*ARGS).chosen, np.full(N, N / LEN_W.sum()))


# batches


@pytest.mark.parametrize("objective", [*map(objectives.get, NAMES), *COMPOSITES], ids=repr)
def test_the_order_of_the_pairs_is_that_of_the_results(objective):
    order = RNG.permutation(N)
    d, shuffled = objective.coefficients(*ARGS), objective.coefficients(*(x[order] for x in ARGS))
    close(shuffled.chosen, d.chosen[order])
    close(shuffled.rejected, d.rejected[order])


def test_sorting_couples_through_values_while_reference_points_are_detached():
    moved = [ARGS[0].at[1:].add(3.0), *ARGS[1:]]
    for objective in (AOT(B), objectives.get("aot_unpaired", beta=B), BCO(B), KTOPair(B)):
        change = objective.coefficients(*moved).chosen[0] - objective.coefficients(*ARGS).chosen[0]
        other = (
            objective.coefficients(*moved).rejected[0] - objective.coefficients(*ARGS).rejected[0]
        )
        assert max(abs(change), abs(other)) > 1e-4
    # were z_0 and δ differentiated, the loss of one pair would pull on the others
    for objective in (BCO(B), KTOPair(B)):
        first = jax.grad(lambda w, o=objective: o.loss(w, *ARGS[1:])[0])(ARGS[0])
        assert first[0] != 0
        np.testing.assert_array_equal(first[1:], 0)
    pulled = jax.grad(lambda x: objectives.get("aot_unpaired").loss(ARGS[0], x, *ARGS[2:])[0])(
        ARGS[1]
    )
    assert np.flatnonzero(pulled).tolist() == np.flatnonzero(MATCHED_L[0] == Q.dl).tolist()


def test_given_reference_points_replace_those_of_the_batch():
    assert not objectives.batch_coupled(BCO(B, 0.4))
    close(BCO(B, 0.0).loss(*ARGS), objectives.get("bco_pair", beta=B).loss(*ARGS))
    close(BCO(B, MEAN_REWARD.item()).coefficients(*ARGS), BCO(B).coefficients(*ARGS))
    close(KTO(B).loss(*ARGS), objectives.get("apo_zero", beta=B).loss(*ARGS))


def test_a_single_pair_is_its_own_batch():
    one = [x[:1] for x in ARGS]
    for name in ("aot", "aot_unpaired"):
        close(objectives.get(name, beta=B).coefficients(*one), DPO(B).coefficients(*one))
    scalars = [x[0] for x in ARGS]
    assert AOT(B).loss(*scalars).shape == ()


# what the shapes of the losses mean


def at(objective, w, l, ref_w=0.0, ref_l=0.0, n=(1, 1)):  # noqa: E741
    d = objective.coefficients(
        *(jnp.array([float(x)]) for x in (w, l, ref_w, ref_l)), *(jnp.array([k]) for k in n)
    )
    return float(d.chosen[0]), float(d.rejected[0])


@pytest.mark.parametrize(
    ("objective", "kink"),
    [(Hinge(0.5), 2.0), (objectives.get("slic_hf", delta=2.0), 2.0), (objectives.get("rrhf"), 0.0)],
    ids=repr,
)
def test_hinges_act_on_one_side_only(objective, kink):
    rest = at(objective, -1.0, -1.0 - kink - 1e-6)
    push = at(objective, -1.0, -1.0 - kink + 1e-6)
    assert rest[1] == 0.0
    assert push[1] > 0
    np.testing.assert_allclose(push[0] - rest[0], push[1], rtol=1e-12)


def test_dpop_jumps_where_the_chosen_meets_its_reference():
    objective = DPOP(0.1, 50.0)
    below, above = at(objective, -5 - 1e-9, -5, -5, -5), at(objective, -5 + 1e-9, -5, -5, -5)
    np.testing.assert_allclose(below[0] / above[0], 51, rtol=1e-6)
    np.testing.assert_allclose(below[1] / above[1], 1, rtol=1e-6)


def test_discopop_pushes_the_chosen_down_where_training_starts():
    d_w, d_l = at(objectives.get("discopop"), -3.0, -3.0)
    assert d_w == d_l < 0
    assert at(DPO(), -3.0, -3.0)[0] > 0


def test_orpo_meets_certainty_with_its_limit():
    """As p_w → 1 the odds part's pull tends to λ e^(o_l): the growing 1/(1-p_w) and the vanishing s cancel."""
    objective = objectives.get("orpo", odds_weight=1.0)
    for mu in (-1e-3, -1e-6, -1e-9):
        d_w, _ = at(objective, mu, np.log(0.25))
        np.testing.assert_allclose(d_w, 1 + 1 / 3, rtol=2e-3)


# what is refused


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: objectives.get("dpoo"), "unknown objective 'dpoo'; did you mean 'dpo'"),
        (lambda: objectives.get("sigmoid"), "did you mean 'trl:sigmoid'"),
        (lambda: objectives.get("apo_zero_unpaired"), "did you mean 'trl:kto/apo_zero_unpaired'"),
        (
            lambda: objectives.get("xyz"),
            "there are: alphapo, aot, .*sppo_hard; TRL's loss types as trl:",
        ),
        (lambda: objectives.describe("xyz"), "unknown objective 'xyz'"),
        (
            lambda: objectives.get("dpo", gamma=1.0),
            "dpo has no hyperparameter gamma; it takes: beta",
        ),
        (lambda: objectives.get("ipo", beta=0.0), "ipo: beta must be positive, got 0.0"),
        (lambda: objectives.get("simpo", beta=float("nan")), "beta must be positive"),
        (lambda: objectives.get("simpo", gamma=float("inf")), "gamma must be finite"),
        (lambda: objectives.get("cdpo", beta=-1.0), "beta must be positive, got -1.0"),
        (lambda: objectives.get("cdpo", epsilon=1.0), r"epsilon must lie in \[0, 1\), got 1.0"),
        (
            lambda: objectives.get("robust_dpo", epsilon=0.5),
            r"epsilon must lie in \[0, 0.5\), got 0.5",
        ),
        (lambda: EXO(0.1, 0.0), r"epsilon must lie in \(0, 1\), got 0.0"),
        (lambda: objectives.get("dpop", penalty=-1.0), "penalty must be non-negative"),
        (lambda: objectives.get("bco", delta=float("nan")), "delta must be finite"),
        (
            lambda: objectives.get("dpo_sft", sft_weight=-1.0),
            "dpo_sft: sft_weight must be non-negative",
        ),
        (lambda: objectives.get("alphapo", alpha=float("nan")), "alphapo: alpha must be finite"),
        (lambda: Gated(DPO(), 0.0, 0.0), "temperature must be positive"),
        (lambda: Combined((DPO(),), ()), "a weight for each objective"),
        (lambda: float("nan") * DPO(), "weights must be finite"),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_unknown_choices_are_refused():
    with pytest.raises(Exception, match="normalization"):
        objectives.get("sft", normalization="tokens")
    with pytest.raises(Exception, match="divergence"):
        objectives.get("f_dpo", divergence="tv")


def test_a_name_is_given_once():
    with pytest.raises(TypeError, match="'dpo' is taken by DPO"):

        class Another(objectives.Objective):
            name = "dpo"


def test_the_base_class_has_no_loss():
    with pytest.raises(TypeError, match="Objective has no loss"):
        objectives.Objective().loss(*ARGS)


def test_hyperparameters_become_plain_numbers_and_others_are_refused():
    """So that equal objectives are equal, hash, and print alike, whatever the numbers came as."""
    for beta in (1, np.float32(1), jnp.array(1.0)):
        plain = number(beta, "beta")
        assert type(plain) is float
        assert plain == 1.0
    for bad in ("0.1", None, True, [1.0]):
        with pytest.raises(ValueError, match=re.escape(f"dpo: beta must be a number, got {bad!r}")):
            number(bad, "dpo: beta")
    assert hash(2 * (DPO() + SFT())) == hash(2.0 * DPO() + 2.0 * SFT())


def test_printed_sums_tell_close_weights_apart():
    assert repr(DPO() + 0.1234567 * SFT()) != repr(DPO() + 0.1234571 * SFT())


def test_gate_looks_at_the_policy_inside_any_modifier():
    gated, plain = (FDivergence(o, "js").coefficients(*ARGS) for o in (Gated(DPO()), DPO()))
    gate = 1 / (1 + np.exp(-(L / LEN_L + 5.0)))
    close(gated.rejected, gate * plain.rejected)
    close(gated.chosen, plain.chosen)
