"""Objectives under transformations, at extremes; modifiers; batches; what shapes mean; refusals."""

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
    LENGTHS,
    LOGP,
    MATCHED_L,
    MEAN_REWARD,
    NAMES,
    REF,
    B,
    L,
    N,
    Q,
    W,
    ls,
    pull_and_push,
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
    d_w, d_l = jax.jit(pull_and_push, static_argnums=0)(objective, *narrow)
    loss = objective.loss(*narrow)
    assert d_w.dtype == d_l.dtype == loss.dtype == jnp.float32
    assert hash(objective) == hash(dataclasses.replace(objective))
    close(loss, objective.loss(*ARGS), "float32", scale=5)
    close((d_w, d_l), pull_and_push(objective, *ARGS), "float32", scale=5)
    if not objectives.batch_coupled(objective):
        close(jax.vmap(objective.loss)(*ARGS), objective.loss(*ARGS))


EXTREMES = [-1e4, -300.0, -1.0, -1e-9, 0.0]


def extremes(dtype, lengths):
    """Log-probs, references and lengths: all combinations, with one pair of lengths."""
    grid = jnp.asarray(np.stack(np.meshgrid(*[EXTREMES] * 4), -1).reshape(-1, 4), dtype)
    return grid[:, :2], grid[:, 2:], jnp.tile(jnp.array(lengths), (len(grid), 1))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_probs_give_finite_losses_and_forces(name, dtype):
    for length in (1, 7):
        x = extremes(dtype, (length, 3))
        objective = objectives.get(name)
        assert jnp.isfinite(objective.loss(*x)).all()
        assert jnp.isfinite(objective.force(*x)).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_are_finite_at_extremes(divergence):
    x = extremes("float32", (1, 1))
    objective = FDivergence(DPO(), divergence, alpha=-1.5)
    assert jnp.isfinite(objective.loss(*x)).all()
    assert jnp.isfinite(objective.force(*x)).all()


# modifiers


logps = st.lists(st.floats(-50, 0), min_size=4, max_size=4)
lengths = st.tuples(st.integers(1, 40), st.integers(1, 40))


def arrays(logp, length):
    """One pair: log-probs of chosen and rejected, the reference's, numbers of tokens."""
    return jnp.array([logp[:2]], float), jnp.array([logp[2:]], float), jnp.array([length])


def swap(x):
    return [y[..., ::-1] for y in x]


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
def test_swapping_twice_is_no_change_and_once_exchanges_the_forces(objective):
    once, twice = Swapped(objective), Swapped(Swapped(objective))
    close(twice.loss(*ARGS), objective.loss(*ARGS))
    d_w, d_l = pull_and_push(objective, *swap(ARGS))
    close(once.force(*ARGS)[:, 0], -d_l)
    close(-once.force(*ARGS)[:, 1], -d_w)


def test_length_normalization():
    one = jnp.ones((N, 2), int)
    for inner in (DPO(B), IPO(B), SimPO()):
        normalized = LengthNormalized(inner)
        close(normalized.loss(LOGP, REF, one), inner.loss(LOGP, REF, one))
    per_token = [jnp.asarray(np.divide(x, LENGTHS)) for x in (LOGP, REF)]
    close(LengthNormalized(IPO(B)).loss(*ARGS), IPO(B).loss(*per_token, one))
    d_w, d_l = map(np.asarray, pull_and_push(LengthNormalized(IPO(B)), *ARGS))
    close((d_w * LEN_W, d_l * LEN_L), pull_and_push(IPO(B), *per_token, one))


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
    u = jnp.asarray(RNG.uniform(0.05, 20, (25, 2)))
    objective = FDivergence(DPO(), divergence, 0.3)
    slope = jax.grad(lambda x: generator(divergence, x, 0.3).sum())(u)
    shift = objective.score(jnp.log(u)) - slope
    np.testing.assert_allclose(shift, shift[0, 0], rtol=1e-10, atol=1e-10)


def test_divergences():
    close(FDivergence(DPO(B), "reverse_kl").loss(*ARGS), DPO(B).loss(*ARGS))
    close(FDivergence(DPO(B), "alpha", 1.0).loss(*ARGS), DPO(B).loss(*ARGS))
    near = (LOGP / 5, REF / 5, LENGTHS)
    forward = FDivergence(DPO(B), "forward_kl")
    close(FDivergence(DPO(B), "alpha", 0.0).loss(*near), forward.loss(*near))
    close(forward.loss(*near), -ls(B * (np.exp(-Q.dl / 5) - np.exp(-Q.dw / 5))))
    d_w, d_l = pull_and_push(FDivergence(DPO(B), "alpha", 0.4), *ARGS)
    close(d_w * np.exp(0.6 * Q.dw), d_l * np.exp(0.6 * Q.dl))
    named = objectives.get("f_dpo", beta=B, divergence="alpha", alpha=0.4)
    close(pull_and_push(named, *ARGS), (d_w, d_l))


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
    (d_w, d_l), (plain_w, plain_l) = (pull_and_push(o, *ARGS) for o in (gated, inner))
    close(d_w, plain_w)
    close(d_l, plain_l * s((Q.ml + 2) / 0.5))
    assert (d_l[Q.ml < -6] < 1e-3 * plain_l[Q.ml < -6]).all()
    assert (Q.ml < -6).any()


def test_sums_are_linear():
    dpo, sft = DPO(B), SFT()
    combined = 2 * dpo + 0.5 * sft
    close(combined.loss(*ARGS), 2 * dpo.loss(*ARGS) + 0.5 * sft.loss(*ARGS))
    close(combined.force(*ARGS)[:, 0], 2 * dpo.force(*ARGS)[:, 0] + 0.5)
    assert 2 * (dpo + 0.5 * sft) + IPO() == Combined((dpo, sft, IPO()), (2.0, 1.0, 1.0))
    assert repr(dpo + 0.5 * sft) == "DPO(beta=0.3) + 0.5 * SFT(normalization='sum')"
    close(
        (dpo + 0.5 * SFT("length")).loss(*ARGS),
        objectives.get("dpo_sft", beta=B, sft_weight=0.5).loss(*ARGS),
    )


def test_normalizations_of_sft():
    close(SFT("length").loss(*ARGS), -Q.mw)
    close(SFT("batch").loss(*ARGS).mean(), -W.sum() / LEN_W.sum())
    close(SFT("batch").force(*ARGS)[:, 0], np.full(N, N / LEN_W.sum()))


# batches


@pytest.mark.parametrize("objective", [*map(objectives.get, NAMES), *COMPOSITES], ids=repr)
def test_the_order_of_the_pairs_is_that_of_the_results(objective):
    order = RNG.permutation(N)
    force, shuffled = objective.force(*ARGS), objective.force(*(x[order] for x in ARGS))
    close(shuffled[:, 0], force[order, 0])
    close(shuffled[:, 1], force[order, 1])


def test_sorting_couples_through_values_while_reference_points_are_detached():
    moved = LOGP.at[1:, 0].add(3.0)
    for objective in (AOT(B), objectives.get("aot_unpaired", beta=B), BCO(B), KTOPair(B)):
        change = objective.force(moved, REF, LENGTHS)[0] - objective.force(*ARGS)[0]
        assert jnp.abs(change).max() > 1e-4
    # were z_0 and δ differentiated, the loss of one pair would pull on the others
    for objective in (BCO(B), KTOPair(B)):
        first = jax.grad(lambda x, o=objective: o.loss(x, REF, LENGTHS)[0])(LOGP)
        assert first[0, 0] != 0
        np.testing.assert_array_equal(first[1:], 0)
    pulled = jax.grad(lambda x: objectives.get("aot_unpaired").loss(x, REF, LENGTHS)[0])(LOGP)
    assert np.flatnonzero(pulled[:, 1]).tolist() == np.flatnonzero(MATCHED_L[0] == Q.dl).tolist()


def test_given_reference_points_replace_those_of_the_batch():
    assert not objectives.batch_coupled(BCO(B, 0.4))
    close(BCO(B, 0.0).loss(*ARGS), objectives.get("bco_pair", beta=B).loss(*ARGS))
    given = BCO(B, MEAN_REWARD.item())
    close(pull_and_push(given, *ARGS), pull_and_push(BCO(B), *ARGS))
    close(KTO(B).loss(*ARGS), objectives.get("apo_zero", beta=B).loss(*ARGS))


def test_a_single_pair_is_its_own_batch():
    one = [x[:1] for x in ARGS]
    for name in ("aot", "aot_unpaired"):
        close(pull_and_push(objectives.get(name, beta=B), *one), pull_and_push(DPO(B), *one))
    scalars = [x[0] for x in ARGS]
    assert AOT(B).loss(*scalars).shape == ()


# what the shapes of the losses mean


def at(objective, w, l, ref_w=0.0, ref_l=0.0, n=(1, 1)):  # noqa: E741
    d_w, d_l = pull_and_push(objective, *arrays((w, l, ref_w, ref_l), n))
    return float(d_w[0]), float(d_l[0])


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
    """As p_w → 1 the odds part's pull tends to λ e^(o_l): growing 1/(1-p_w), vanishing s cancel."""
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
    gated, plain = (FDivergence(o, "js").force(*ARGS) for o in (Gated(DPO()), DPO()))
    gate = 1 / (1 + np.exp(-(L / LEN_L + 5.0)))
    close(gated[:, 1], gate * plain[:, 1])
    close(gated[:, 0], plain[:, 0])
