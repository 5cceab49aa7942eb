"""Groups of responses: token and group scores against autodiff and against loops over the
definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PAIRS, close, model

from simgrad.pairs import padded
from simgrad.theory import head_gap, head_kernel, responses
from simgrad.theory.groups import (
    Group,
    group_advantages,
    group_kernel,
    group_rates,
    gwhes,
    nthr,
    read_group,
    token_influence,
)

LENGTHS = [4, 1, 3, 5, 2]
CORRECT = jnp.array([True, False, True, False, False])
WIDTH, TOKENS = 6, 9


def draw(seed):
    """W, and a group of five responses whose padding holds NaN; a head-only model."""
    rng = np.random.default_rng(seed)
    w, hidden = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(5, 5, WIDTH)) + 0.5
    valid = np.arange(5) < np.array(LENGTHS)[:, None]
    logits = hidden @ w.T
    hidden[~valid] = logits[~valid] = np.nan
    targets = rng.integers(0, TOKENS, (5, 5))
    return jnp.asarray(w), Group(*(jnp.asarray(x) for x in (hidden, logits, targets, valid)))


@jax.jit
def log_probs(w, group):
    """log π(y_i) of every response as a function of W."""
    hidden = jnp.where(group.valid[..., None], group.hidden, 0.0)
    every = jax.nn.log_softmax(jnp.einsum("grd,vd->grv", hidden, w), axis=-1)
    tokens = jnp.take_along_axis(every, group.targets[..., None], -1)[..., 0]
    return jnp.where(group.valid, tokens, 0.0).sum(-1)


gradients = jax.jit(jax.jacrev(log_probs))


def alpha(group, i, k, j, m):
    """⟨e - π, e' - π'⟩ of two tokens."""
    errors = []
    for a, b in ((i, k), (j, m)):
        z = np.asarray(group.logits[a, b])
        errors.append(np.eye(len(z))[int(group.targets[a, b])] - np.exp(z) / np.exp(z).sum())
    return errors[0] @ errors[1]


@pytest.mark.parametrize("seed", range(3))
def test_kernel_and_rates_against_autodiff(seed):
    w, group = draw(seed)
    g = np.asarray(gradients(w, group))
    close(group_kernel(group), np.einsum("ivd,jvd->ij", g, g))
    weights = np.random.default_rng(seed).normal(size=5)
    step = jnp.asarray(np.einsum("j,jvd->vd", weights, g))
    close(
        group_rates(group, jnp.asarray(weights)),
        jax.jvp(lambda w: log_probs(w, group), (w,), (step,))[1],
    )


def test_nthr_is_its_double_sum():
    _, group = draw(3)
    scores = np.asarray(nthr(group, CORRECT))
    hidden = np.asarray(group.hidden)
    for j in range(5):
        for m in range(5):
            expected = 0.0
            if not CORRECT[j] and m < LENGTHS[j]:
                for i in (0, 2):
                    for k in range(LENGTHS[i]):
                        expected += alpha(group, i, k, j, m) * (hidden[i, k] @ hidden[j, m])
            np.testing.assert_allclose(scores[j, m], expected, rtol=1e-10, atol=1e-12)


def test_gwhes_is_its_double_sum():
    _, group = draw(4)
    hidden = np.asarray(group.hidden)
    plus, minus = 1.7, 0.6
    scores = gwhes(group, CORRECT, jnp.where(CORRECT, plus, -minus))
    for i in range(5):
        expected = 0.0
        if CORRECT[i]:
            for j in range(5):
                for k in range(LENGTHS[i]):
                    for m in range(LENGTHS[j]):
                        term = alpha(group, i, k, j, m) * (hidden[i, k] @ hidden[j, m])
                        expected += -plus * term if CORRECT[j] else minus * term
        np.testing.assert_allclose(scores[i], expected, rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_gwhes_is_minus_the_flow_of_the_correct_responses(seed):
    """Against the derivative along the actual GRPO direction Σ_j a_j ∇_W log π(y_j)."""
    w, group = draw(seed)
    a = group_advantages(CORRECT.astype(float))
    objective = jax.grad(lambda w: (a * log_probs(w, group)).sum())(w)
    _, flow = jax.jvp(lambda w: log_probs(w, group), (w,), (objective,))
    close(gwhes(group, CORRECT, a), np.where(CORRECT, -np.asarray(flow), 0.0))


def test_nthr_prices_each_token():
    """Dropping one wrong token's penalty raises the correct log-probs by a times its score."""
    w, group = draw(5)
    a = group_advantages(CORRECT.astype(float))

    def summed_flow(group):
        objective = jax.grad(lambda w: (a * log_probs(w, group)).sum())(w)
        _, flow = jax.jvp(lambda w: log_probs(w, group_all), (w,), (objective,))
        return flow[np.asarray(CORRECT)].sum()

    group_all = group
    scores = nthr(group, CORRECT)
    for j, m in ((1, 0), (3, 2), (4, 1)):
        without = dataclasses.replace(group, valid=group.valid.at[j, m].set(False))
        close(summed_flow(without) - summed_flow(group), -float(a[j]) * float(scores[j, m]))


def test_sums_agree():
    """NTHR summed over all wrong tokens is the wrong-correct part of the kernel; so much of GWHES
    is its."""
    _, group = draw(6)
    kernel, right = np.asarray(group_kernel(group)), np.asarray(CORRECT)
    close(nthr(group, CORRECT).sum(), kernel[np.ix_(right, ~right)].sum())
    only_wrong = jnp.where(CORRECT, 0.0, -1.0)
    close(gwhes(group, CORRECT, only_wrong).sum(), nthr(group, CORRECT).sum())
    close(token_influence(group).sum(1), kernel)


def test_a_pair_is_a_group_of_two():
    """With one correct and one wrong response and weights ±1, GWHES is the head gap, in a
    transformer too."""
    apply, theta = model("no_norm_no_mlp_no_positions", depth=1)
    batch = padded(PAIRS)
    result = responses(apply, theta, batch)
    pair = jnp.array([True, False])
    close(group_advantages(pair.astype(float)), np.array([1.0, -1.0]))
    kernel, gap = head_kernel(result, batch), head_gap(result, batch)
    for i in (0, 1):
        group = read_group(apply, theta, PAIRS[i].prompt, [PAIRS[i].chosen, PAIRS[i].rejected])
        k = group_kernel(group)
        close(
            [k[0, 0], k[0, 1], k[1, 1]],
            [kernel.sq_chosen[i], kernel.inner[i], kernel.sq_rejected[i]],
        )
        close(gwhes(group, pair, jnp.array([1.0, -1.0])), np.array([gap[i], 0.0]))
        close(nthr(group, pair).sum(), kernel.inner[i])


def test_reading_a_group_of_unequal_lengths():
    """Padding changes nothing: each response alone gives the same log-probs; the unembedding's
    block is exact."""
    apply, theta = model("unconstrained_features")
    prompt, answers = PAIRS[0].prompt, [(7, 2, 7, 1), (8,), (8, 9, 2)]
    group = read_group(apply, theta, prompt, answers)
    np.testing.assert_array_equal(group.valid.sum(1), [4, 1, 3])

    def alone(table, answer):
        logits = apply(
            {**theta, "unembedding": {"table": table}}, jnp.array([(*prompt, *answer)])
        ).logits[0]
        every = jax.nn.log_softmax(logits[len(prompt) - 1 : -1])
        return sum(every[k, y] for k, y in enumerate(answer))

    table = theta["unembedding"]["table"]
    values, g = zip(
        *(
            jax.jit(jax.value_and_grad(alone), static_argnums=1)(table, answer)
            for answer in answers
        ),
        strict=True,
    )
    close(log_probs(table, group), np.array(values))
    close(group_kernel(group), np.array([[(a * b).sum() for b in g] for a in g]))


@pytest.mark.parametrize(("prompt", "answers"), [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_unusable_groups_are_refused(prompt, answers):
    apply, theta = model("unconstrained_features")
    with pytest.raises(ValueError, match="at least one token"):
        read_group(apply, theta, prompt, answers)


def test_features_that_learn_are_not_counted():
    """The scores hold for W alone: with trained features the flow of a correct response is another
    number."""
    w, group = draw(7)
    group = dataclasses.replace(group, hidden=jnp.where(group.valid[..., None], group.hidden, 0.0))
    a = group_advantages(CORRECT.astype(float))

    def both(w, hidden):
        return log_probs(w, dataclasses.replace(group, hidden=hidden))

    g_w, g_h = jax.jacrev(both, argnums=(0, 1))(w, group.hidden)
    direction = tuple(jnp.tensordot(a, g, 1) for g in (g_w, g_h))
    _, flow = jax.jvp(both, (w, group.hidden), direction)
    scores = np.asarray(gwhes(group, CORRECT, a))
    assert not np.isclose(scores[0], -flow[0], rtol=1e-3)


@pytest.mark.parametrize("correct", [1, 3, 7])
def test_advantages_of_binary_rewards(correct):
    rewards = np.arange(8) < correct
    p = correct / 8
    expected = np.where(rewards, np.sqrt((1 - p) / p), -np.sqrt(p / (1 - p)))
    close(group_advantages(jnp.asarray(rewards, float)), expected)
    sample = (rewards - p) / (np.std(rewards, ddof=1) + 1e-4)
    close(group_advantages(jnp.asarray(rewards, float), ddof=1, epsilon=1e-4), sample)


@pytest.mark.parametrize("size", [1, 4])
def test_groups_without_contrast_have_no_signal(size):
    np.testing.assert_array_equal(group_advantages(jnp.full(size, 0.3)), np.zeros(size))
