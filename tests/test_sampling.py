"""Sampled and enumerated responses: the cache, the draws and the probabilities are those of the
plain forward pass."""

import functools
import itertools
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import TRANSFORMERS, VOCAB, close, model, tolerance

from simgrad.dynamics import enumerate_responses, next_token_logp, sample
from simgrad.dynamics.prompts import token_ids
from simgrad.models import Apply, CachedApply, Rereading, add_lora, cached, merge_lora
from simgrad.pairs import Pair, padded
from simgrad.theory import responses

PROMPTS = [[1, 5, 3], [7], [4, 4, 4, 4, 2], [2, 6]]
STOP = [0, 9]


def by_definition(apply, theta, pairs):
    """Log π(response | prompt) of (prompt, response) pairs, one plain sequence each."""
    return np.array([reference.sequence(apply, theta, x, y)[0].sum() for x, y in pairs])


def theory_logp(apply, theta, prompts, found):
    """Log-probs of every found response, evaluated as the chosen one of a preference pair."""
    rows = [(p, y) for p, ys in zip(prompts, found, strict=True) for y in ys]
    pairs = [Pair(p, y, [1, 1, 1, 1, 1, 1]) for p, y in rows]
    return np.asarray(responses(apply, theta, padded(pairs)).logp)[:, 0]


def adapted(dtype="float64"):
    apply, theta = model("plain", dtype)
    lora, theta = add_lora(apply, theta, ["layers/attention/*/kernel"], rank=2, alpha=3.0)
    noise = np.random.default_rng(0)
    theta["lora"] = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * noise.normal(size=x.shape), x.dtype), theta["lora"]
    )
    return lora, theta


@functools.lru_cache
def table(max_tokens=3):
    """A context table that holds every prefix of every response over {1, 2, 3} to [1] and [2]."""
    sequences = [
        (p, *y) for p in (1, 2) for y in itertools.product((0, 1, 2, 3), repeat=max_tokens)
    ]
    return model("unconstrained_features", pairs=[Pair(s[:1], s[1:], [5]) for s in sequences])


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float64") for kind in TRANSFORMERS), ("rope_gqa_head_dim", "float32")],
)
def test_cached_logits_are_those_of_the_whole_sequence(kind, dtype):
    """Prompts of different lengths, right-padded with junk, then several tokens each at its own
    position."""
    apply, theta = model(kind, dtype)
    assert cached(apply) is apply
    rng = np.random.default_rng(0)
    lengths, steps, size = np.array([3, 1, 5, 2]), 4, 12
    tokens = jnp.asarray(rng.integers(0, VOCAB, (4, 5 + steps)))
    junk = jnp.asarray(rng.integers(0, VOCAB, (4, 5)))
    prompt = jnp.where(jnp.arange(5)[None] < lengths[:, None], tokens[:, :5], junk)
    extend = jax.jit(apply.extend)
    at = jnp.broadcast_to(jnp.arange(5)[None], (4, 5))
    output, cache = extend(
        theta, prompt, at, apply.cache(theta, 4, size), jnp.asarray(lengths - 1)[:, None]
    )
    whole = jax.jit(apply)(theta, tokens)
    whole_logits, whole_states = np.asarray(whole.logits), np.asarray(whole.hidden)
    for k in range(steps + 1):
        logits, states = np.asarray(output.logits), np.asarray(output.hidden)
        for i, n in enumerate(lengths):
            close(logits[i, 0], whole_logits[i, n - 1 + k], dtype)
            close(states[i, 0 if k else n - 1], whole_states[i, n - 1 + k], dtype)
        if k < steps:
            position = jnp.asarray(lengths + k)[:, None]
            output, cache = extend(
                theta, jnp.take_along_axis(tokens, position, axis=1), position, cache
            )


def test_a_cache_can_be_read_several_tokens_at_a_time_and_repeated():
    apply, theta = model("rope_gqa_head_dim")
    tokens = np.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    at = np.broadcast_to(np.arange(6), (2, 6))
    for one in (apply, Rereading(apply)):
        assert isinstance(one, CachedApply)
        extend, (twice, at_twice) = (
            jax.jit(one.extend),
            (np.repeat(x, 2, axis=0) for x in (tokens, at)),
        )
        _, cache = extend(theta, tokens[:, :2], at[:, :2], one.cache(theta, 2, 8))
        output, _ = extend(theta, twice[:, 2:], at_twice[:, 2:], cache.repeat(2))
        whole = jax.jit(apply)(theta, twice)
        close((output.logits, output.hidden), (whole.logits[:, 2:], whole.hidden[:, 2:]))


def test_slots_beyond_the_query_do_matter_if_they_are_read():
    """Without the rule that a query reads slots <= its position, a short prompt's padding would
    leak in."""
    apply, theta = model("plain")
    extend = jax.jit(apply.extend)
    right, cache = extend(
        theta, jnp.array([[1, 2, 8, 8]]), jnp.arange(4)[None], apply.cache(theta, 1, 4)
    )
    later, _ = extend(theta, jnp.array([[5]]), jnp.array([[3]]), cache)
    plain = jax.jit(apply)(theta, jnp.array([[1, 2, 5]]))
    assert np.abs(later.logits[0, 0] - plain.logits[0, 2]).max() > 1e-3
    close(right.logits[0, 1], plain.logits[0, 1])


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["plain", "rope_gqa_head_dim"])
def test_logp_of_samples_is_the_theorys(kind, dtype):
    apply, theta = model(kind, dtype)
    samples = sample(apply, theta, PROMPTS, 6, STOP, count=5, temperature=1.7, seed=3)
    assert samples.logp.dtype == dtype
    close(np.ravel(samples.logp), theory_logp(apply, theta, PROMPTS, samples.responses), dtype)
    lengths = {len(y) for ys in samples.responses for y in ys}
    assert {1, 6} <= lengths
    for y in itertools.chain(*samples.responses):
        assert not set(y[:-1]) & set(STOP)
        assert y[-1] in STOP or len(y) == 6
    outside = np.arange(6) >= np.asarray(samples.lengths)[..., None]
    assert not np.asarray(samples.tokens)[outside].any()


def test_samples_do_not_depend_on_what_is_sampled_with_them():
    apply, theta = model("plain")
    whole = sample(apply, theta, PROMPTS, 6, STOP, count=5)
    for at_once in (3, 10):
        parts = sample(apply, theta, PROMPTS, 6, STOP, count=5, at_once=at_once)
        assert parts.responses == whole.responses
        close(parts.logp, whole.logp)
    longer = sample(apply, theta, [*PROMPTS, [3] * 20], 6, STOP, count=7)
    assert tuple(ys[:5] for ys in longer.responses[:4]) == whole.responses
    assert sample(apply, theta, PROMPTS, 6, STOP, count=5, seed=1).responses != whole.responses
    # prompts of equal tokens get different draws, and so do the samples of one prompt
    same = sample(apply, theta, [[1, 2, 3, 4, 5]] * 4, 6, STOP, count=5, temperature=9.0).responses
    assert len({y[:3] for y in itertools.chain(*same)}) > 15


def test_models_without_a_cache_give_the_same_samples():
    apply, theta = model("rope_mqa_gated_tied")

    @dataclass(frozen=True)
    class Plain(Apply):
        """A user's model: nothing but what every model has."""

        def readout(self, theta, hidden):
            return apply.readout(theta, hidden)

        def read(self, theta, inputs):
            return apply.read(theta, inputs)

    assert isinstance(cached(Plain()), Rereading)
    fast, slow = (sample(one, theta, PROMPTS, 6, STOP, count=3) for one in (apply, Plain()))
    assert fast.responses == slow.responses
    close(fast.logp, slow.logp)


def test_temperature_zero_is_greedy():
    apply, theta = model("post_norm")
    logits = jax.jit(lambda tokens: apply(theta, tokens).logits[0])
    found = sample(apply, theta, PROMPTS, 5, STOP, temperature=0.0)
    for prompt, (response,) in zip(PROMPTS, found.responses, strict=True):
        greedy = []
        while len(greedy) < 5 and not set(greedy) & set(STOP):
            read = [*prompt, *greedy]
            greedy.append(
                int(
                    np.asarray(logits(jnp.array([read + [0] * (12 - len(read))])))[
                        len(read) - 1
                    ].argmax()
                )
            )
        assert response == tuple(greedy)
    cold = sample(apply, theta, PROMPTS, 5, STOP, temperature=1e-6)
    assert cold.responses == found.responses


@pytest.mark.parametrize(("temperature", "drawn_from"), [(1.0, 1.0), (0.5, 0.5), (0.5, 1.0)])
def test_frequencies_are_the_enumerated_probabilities(temperature, drawn_from):
    """χ² of 4000 responses against the exact law is near its mean; against another law it is far
    from it."""
    apply, theta = model("plain")
    count = 4000
    [ys] = sample(
        apply, theta, [[1, 5, 3]], 2, STOP, count, drawn_from, seed=1, at_once=count
    ).responses
    exact = enumerate_responses(apply, theta, [[1, 5, 3]], 2, STOP)
    first = np.asarray(next_token_logp(apply, theta, [[1, 5, 3]]))[0]
    after = np.asarray(next_token_logp(apply, theta, [[1, 5, 3, v] for v in range(VOCAB)]))

    def tempered(logp):
        return logp / temperature - np.logaddexp.reduce(logp / temperature, axis=-1, keepdims=True)

    law = [
        tempered(first)[y[0]] + (tempered(after)[y[0], y[1]] if len(y) > 1 else 0.0)
        for y in exact.responses[0]
    ]
    if temperature == 1.0:
        close(np.array(law), exact.logp[0])
    expected = count * np.exp(law)
    frequent = expected >= 5
    seen = np.array([Counter(ys)[y] for y in exact.responses[0]])
    seen, expected = (np.append(x[frequent], x[~frequent].sum()) for x in (seen, expected))
    np.testing.assert_allclose((seen.sum(), expected.sum()), count)
    standard = (((seen - expected) ** 2 / expected).sum() - (len(seen) - 1)) / np.sqrt(
        2 * (len(seen) - 1)
    )
    assert abs(standard) < 4 if temperature == drawn_from else standard > 20


def test_sampling_stops_when_all_have_ended():
    apply, theta = model("bare_embedding")
    calls = []

    @dataclass(frozen=True)
    class Counted(Apply):
        def readout(self, theta, hidden):
            return apply.readout(theta, hidden)

        def read(self, theta, inputs):
            jax.debug.callback(lambda: calls.append(1))
            return apply.read(theta, inputs)

    samples = sample(Counted(), theta, PROMPTS, 27, STOP, temperature=5.0)
    jax.effects_barrier()
    assert len(calls) == samples.lengths.max() < 27


def test_contexts_that_a_table_does_not_hold_are_not_silent():
    apply, theta = table()
    samples = sample(apply, theta, [[1], [2]], 50, stop=list(range(VOCAB)), count=4)
    assert samples.tokens.shape == (2, 4, 50)
    assert (samples.lengths == 1).all()
    with pytest.raises(ValueError, match="NaN logits after prompt 0"):
        sample(apply, theta, [[1], [2]], 50, count=4)


def test_adapters_are_merged():
    lora, theta = adapted()
    merged = merge_lora(lora, theta)
    found = sample(lora, theta, PROMPTS, 6, STOP, count=3)
    assert found.responses == sample(lora.base, merged, PROMPTS, 6, STOP, count=3).responses
    close(np.ravel(found.logp), theory_logp(lora, theta, PROMPTS, found.responses))
    assert found.responses != sample(lora.base, theta["base"], PROMPTS, 6, STOP, count=3).responses
    close(next_token_logp(lora, theta, PROMPTS), next_token_logp(lora.base, merged, PROMPTS))


# ---------------------------------------------------------------- exact probabilities


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["plain", "rope_gqa_head_dim"])
def test_next_token_logp(kind, dtype):
    apply, theta = model(kind, dtype)
    found = next_token_logp(apply, theta, PROMPTS)
    assert found.shape == (4, VOCAB)
    for i, prompt in enumerate(PROMPTS):
        close(found[i], by_definition(apply, theta, [(prompt, [v]) for v in range(VOCAB)]), dtype)
    close(next_token_logp(apply, theta, PROMPTS, at_once=3), found, dtype)


def test_next_token_logp_can_be_traced():
    apply, theta = model("plain")
    f = jax.jit(lambda theta: next_token_logp(apply, theta, PROMPTS)[0, 3])
    close(f(theta), by_definition(apply, theta, [(PROMPTS[0], [3])])[0])
    gradient = jax.grad(f)(theta)
    np.testing.assert_allclose(
        reference.dot(gradient, gradient),
        reference.dot(reference.gradient(apply, theta, PROMPTS[0], [3]), gradient),
        rtol=tolerance("float64"),
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_responses_have_probability_one(dtype):
    apply, theta = model("plain", dtype)
    found = enumerate_responses(apply, theta, PROMPTS, 3, STOP)
    count = 2 + 11 * 2 + 11 * 11 * 13
    for ys, logp in zip(found.responses, found.logp, strict=True):
        assert len(ys) == len(set(ys)) == len(logp) == count
        assert list(ys) == sorted(ys, key=lambda y: (len(y), y))
        assert all(not set(y[:-1]) & set(STOP) and (len(y) == 3 or y[-1] in STOP) for y in ys)
        np.testing.assert_allclose(np.exp(logp).sum(), 1.0, rtol=tolerance(dtype))
    some = [0, 1, 2, 30, 500, count - 1]
    expected = theory_logp(apply, theta, PROMPTS, [[ys[k] for k in some] for ys in found.responses])
    close(np.concatenate([logp[some] for logp in found.logp]), expected, dtype)
    assert not found.pruned.any()
    assert not found.outside.any()
    again = enumerate_responses(apply, theta, PROMPTS, 3, STOP, at_once=1000)
    assert again.responses == found.responses
    close(again.logp, found.logp, dtype)


def test_one_token_is_the_next_token():
    apply, theta = model("plain")
    found = enumerate_responses(apply, theta, PROMPTS, 1)
    assert found.responses == (tuple((v,) for v in range(VOCAB)),) * 4
    close(np.stack(found.logp), next_token_logp(apply, theta, PROMPTS))


def test_pruning_keeps_the_likely_responses_and_reports_the_rest():
    apply, theta = model("plain")
    everything = enumerate_responses(apply, theta, PROMPTS, 3, STOP)
    some = enumerate_responses(apply, theta, PROMPTS, 3, STOP, least=0.002)
    for i in range(4):
        likely = np.exp(everything.logp[i]) >= 0.002
        assert 0 < likely.sum() < len(likely)
        assert some.responses[i] == tuple(
            y for y, keep in zip(everything.responses[i], likely, strict=True) if keep
        )
        close(some.logp[i], everything.logp[i][likely])
    close(some.pruned, np.array([np.exp(a[np.exp(a) < 0.002]).sum() for a in everything.logp]))
    assert (some.pruned > 0.1).all()
    nothing = enumerate_responses(apply, theta, PROMPTS, 3, STOP, least=1.0)
    assert nothing.responses == ((), (), (), ())
    close(nothing.pruned, np.ones(4))


def test_alphabet_restricts_without_renormalising():
    apply, theta = model("plain")
    everything = enumerate_responses(apply, theta, PROMPTS, 3, STOP)
    some = enumerate_responses(apply, theta, PROMPTS, 3, STOP, alphabet=[5, 3, 3, 8])
    for i in range(4):
        kept = dict(zip(everything.responses[i], everything.logp[i], strict=True))
        inside = [y for y in kept if set(y) <= {3, 5, 8, *STOP}]
        assert list(some.responses[i]) == inside
        close(some.logp[i], np.array([kept[y] for y in inside]))
        close(some.outside[i], sum(np.exp(p) for y, p in kept.items() if y not in set(inside)))
    both = enumerate_responses(apply, theta, PROMPTS, 3, STOP, alphabet=[5, 3, 8], least=0.01)
    assert (both.pruned > 0).all()
    close(np.array([np.exp(p).sum() for p in both.logp]) + both.pruned + both.outside, np.ones(4))


def test_context_tables_and_adapters_are_enumerated_too():
    apply, theta = table()
    found = enumerate_responses(apply, theta, [[1], [2]], 3, stop=[0], alphabet=[1, 2, 3])
    assert len(found.responses[0]) == 1 + 3 + 9 * 4
    for prompt, ys, logp in zip([[1], [2]], found.responses, found.logp, strict=True):
        close(logp, by_definition(apply, theta, [(prompt, y) for y in ys]))
    with pytest.raises(ValueError, match="NaN logits after prompt 1"):
        enumerate_responses(apply, theta, [[1], [3]], 1)
    lora, theta = adapted()
    found = enumerate_responses(lora, theta, PROMPTS[:1], 2, STOP)
    close(found.logp[0], theory_logp(lora, theta, PROMPTS[:1], found.responses))
    np.testing.assert_allclose(np.exp(found.logp[0]).sum(), 1.0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, VOCAB]]}, "prompt 0: token id 13 is outside the vocabulary of 13"),
        ({"prompts": [[-1]]}, "token id -1 is outside"),
        (
            {"prompts": [[1], [1] * 30]},
            "prompt 1 has 30 tokens: with max_tokens=3 .* more than the 32",
        ),
        ({"stop": [VOCAB]}, "stop: token id 13"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"at_once": 0}, "at_once must be at least 1"),
    ],
)
@pytest.mark.parametrize("call", [sample, enumerate_responses])
def test_what_cannot_be_read_is_refused(call, change, text):
    apply, theta = model("plain")
    with pytest.raises(ValueError, match=text):
        call(apply, theta, **{"prompts": PROMPTS, "max_tokens": 3, **change})


def test_other_refusals():
    apply, theta = model("plain")
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        sample(apply, theta, PROMPTS, 2, temperature=-1.0)
    with pytest.raises(ValueError, match="count must be at least 1"):
        sample(apply, theta, PROMPTS, 2, count=0)
    with pytest.raises(ValueError, match="least is a probability, got 1.5"):
        enumerate_responses(apply, theta, PROMPTS, 2, least=1.5)
    with pytest.raises(ValueError, match="alphabet: token id 99"):
        enumerate_responses(apply, theta, PROMPTS, 2, alphabet=[99])
    with pytest.raises(ValueError, match=r"there may be 10\^3.8 responses, more than limit=1000"):
        enumerate_responses(apply, theta, PROMPTS, 3, STOP, limit=1000)
    with pytest.raises(ValueError, match=r"10\^29"):
        enumerate_responses(apply, theta, [[1]], 26)
    enumerate_responses(apply, theta, PROMPTS, 3, STOP, limit=1000, least=0.01)
    for alien in ("hello", [1.5], [None]):
        with pytest.raises(ValueError, match="prompt 0 must hold token ids .* tokenize text first"):
            token_ids("prompt 0", alien, VOCAB)
    with pytest.raises(ValueError, match="prompt 0 has 33 tokens"):
        next_token_logp(apply, theta, [[1] * 33])


def test_prompts_that_just_fit():
    """The widths that prompts are padded to never go beyond what the model reads."""
    apply, theta = model("plain")
    prompts = [[1] * 25, [2]]
    samples = sample(apply, theta, prompts, 7, seed=2)
    pairs = [(x, y) for x, (y,) in zip(prompts, samples.responses, strict=True)]
    close(np.ravel(samples.logp), by_definition(apply, theta, pairs))
    assert next_token_logp(apply, theta, [[1] * 32]).shape == (1, VOCAB)
