"""Worlds without a network: effects have the signs that theory says, nulls are null, knobs are
checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

from simgrad import experiments
from simgrad.experiments.squeezing import CORRECT, _stepping
from simgrad.experiments.unconstrained import SMALL
from simgrad.models import ContextApply
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.theory import entanglement_kernel, pair_kernel, responses
from simgrad.theory.closed_forms import unconstrained
from simgrad.theory.groups import Group, group_kernel
from simgrad.worlds.linear import Linear
from simgrad.worlds.squeezing import Squeezing
from simgrad.worlds.tuning import recipe_for, trained
from simgrad.worlds.unconstrained import RESPONSES, Unconstrained

SMALL_WORLDS = {
    "squeezing": Squeezing(
        draws=8,
        prompts=4,
        vocabulary=16,
        push_steps=(5,),
        groups=4,
        length=5,
        peaks=(0.0, 1.0, 2.0),
    ),
    "linear": Linear(n_pairs=3, suffixes=(0, 3), prefix=2, draws=8, steps=10),
    "unconstrained": Unconstrained(
        draws=12, longest=4, vocabulary=12, steps=5, alignments=(0.0, 0.95)
    ),
}
SEEDS = [0, 1]


@functools.cache
def found(name):
    return experiments.run(SMALL_WORLDS[name], SEEDS)


def check_tables_are_tidy(name):
    findings = found(name)
    assert findings.world == name
    assert findings.seeds == tuple(SEEDS)
    assert dict(findings.knobs) == vars(SMALL_WORLDS[name])
    for table in findings.tables:
        assert len(table) == len(table.settings()) * len(SEEDS)
        assert sorted(set(table["seed"].tolist())) == SEEDS
        assert "null" in table.caption or "control" in table.caption or table.name == "scores"
        for column in table.measured:
            assert np.isfinite(table[column]).all() or table.name == "longer"
    assert all(isinstance(c.holds, bool) and c.text and c.numbers for c in findings.claims)
    assert len({c.text for c in findings.claims}) == len(findings.claims)


def check_a_seed_gives_the_same_rows_whatever_the_others(name):
    again = experiments.run(SMALL_WORLDS[name], [1, 7])
    for table, other in zip(found(name).tables, again.tables, strict=True):
        for column in table.measured:
            np.testing.assert_allclose(
                table[column][table["seed"] == 1],
                other[column][other["seed"] == 1],
                rtol=1e-9,
                atol=1e-12,
            )
        assert not all(np.array_equal(table[c][::2], table[c][1::2]) for c in table.measured)


def check_squeezing_and_its_uniform_null():
    table, vocabulary = found("squeezing")["squeeze"], 16
    null = table.where(peak=0.0)
    assert (null["lead"] < 1e-6).all()
    np.testing.assert_array_equal(null["rise"], vocabulary - 1)
    np.testing.assert_allclose(null["gain / freed"], 1 / (vocabulary - 1))
    for peak in (1.0, 2.0):
        squeezed = table.where(pushed="least likely", peak=peak)
        assert (squeezed["gain / freed"] > 1).all()
        assert (squeezed["bystanders lost"] > 0).all()
        assert (squeezed["rise"] < vocabulary / 2).all()


def check_fine_tuning_on_both_responses_weakens_squeezing():
    table = found("squeezing")["extend"]
    for push in ("rejected", "DPO"):
        only, both = (table.where(push=push, first=x) for x in ("chosen", "chosen, rejected"))
        assert (both["Δ others"] > only["Δ others"]).all()
        assert (only["Δ others"] < 0).all()
        assert (only["rejected"] < 0.05).all()
        assert (both["rejected"] > 0.2).all()


def check_nthr_is_exact_for_the_unembedding_and_not_for_features():
    scores, drops = found("squeezing")["scores"], found("squeezing")["drops"]
    np.testing.assert_allclose(scores.where(learns="W")["NTHR, exact"], 1)
    assert (scores.where(learns="W and h")["NTHR, exact"] < 0.95).all()
    assert (scores.where(overlap=0.0)["shared"] == 0).all()
    at = {"learns": "W", "overlap": 0.5}
    high, random = (
        drops.where(**at, dropped=f"{x}")["protected"] for x in ("highest NTHR", "random")
    )
    assert (high > random).all()
    assert (drops.where(**at, dropped="lowest NTHR")["protected"] < 0).all()
    assert (drops.where(learns="W", overlap=0.0, dropped="highest NTHR")["protected"] < 0.01).all()


def test_a_dropped_penalty_protects_by_its_exact_effect():
    """To first order in the rate, dropping tokens gains Σ_i Δ log π(y_i) = rate Σ_dropped a/|y| ·
    exact."""
    world, count, rate = SMALL_WORLDS["squeezing"], 3, 1e-6
    group = world.group(np.random.default_rng(0), 0.5)
    after = jax.tree.map(
        np.asarray, jax.jit(_stepping(rate, count, True))(jax.tree.map(jnp.asarray, group))
    )
    exact, gained = after["exact"][~CORRECT].ravel(), after["change"][3] - after["change"][0]
    dropped = np.sort(exact)[::-1][:count].sum()
    np.testing.assert_allclose(gained[CORRECT].sum(), rate * dropped / world.length, rtol=1e-4)


def check_single_tokens_with_frozen_features_never_fall():
    table = found("linear")["single"]
    holds = table.where(assumptions="all hold")
    assert (holds["least Δ chosen"] > 0).all()
    assert (holds["least margin"] > 0).all()
    assert (table["error"] < 1e-9).all()
    assert table.where(assumptions="another pair opposes")["falls"].max() > 0


def check_suffixes_entangle_and_prefixes_do_not():
    table = found("linear")["shared"]
    for trained_ in ("alone", "together"):
        none, suffix, prefix = (
            table.where(features="correlated", prefix=p, suffix=s, trained=trained_)
            for p, s in ((0, 0), (0, 3), (2, 0))
        )
        assert (suffix["cosine"] > none["cosine"]).all()
        assert (suffix["Δ chosen"] < none["Δ chosen"]).all()
        assert (prefix["cosine"] > none["cosine"]).all()
        close(prefix["gap"], none["gap"])
    null = table.where(features="orthogonal")
    assert (null["falls"] == 0).all()
    assert (table["flow R²"] > 0.8).all()


def test_the_linear_policy_has_the_probabilities_asked_for():
    world = Linear(n_pairs=2, suffixes=(0, 2), jitter=0.0)
    apply, theta = world.policy(0, 0, 2)
    theta, batch = jax.tree.map(jnp.asarray, theta), padded(world.pairs(0, 0, 2))
    result = responses(apply, theta, batch)
    close(np.exp(result.token_logp), np.tile([[0.7, 0.9, 0.9], [0.2, 0.4, 0.4]], (2, 1, 1)))
    h = result.hidden[0]
    close(h @ jnp.swapaxes(h, -1, -2), np.tile(np.eye(3), (2, 1, 1)))
    close((h[0] * h[1]).sum(-1), np.array([1.0, 0.8, 0.8]))
    close((result.hidden[0, 0] * result.hidden[1, 0]).sum(-1), np.full(3, 0.4))
    flat = [
        x.reshape(-1, *x.shape[2:])
        for x in (result.hidden, result.logits, batch.targets, batch.valid)
    ]
    close(group_kernel(Group(*flat)), entanglement_kernel(apply, theta, batch))


@pytest.mark.parametrize("alignment", [0.0, 0.95])
def test_the_closed_form_is_the_slope(alignment):
    """Against a central difference of a step there and back, and against autodiff."""
    apply, batch = ContextApply(((0,),)), padded([Pair([0], [0], [1])])
    theta = jax.tree.map(
        lambda x: jnp.asarray(x[0]), SMALL_WORLDS["unconstrained"].single(0, alignment)
    )
    w, h = theta["unembedding"]["table"], theta["features"]["table"][0]
    rate = unconstrained.single_token_rate(w, h, jnp.array(0), jnp.array(1)).total
    after = trained(apply, recipe_for(DPO(0.1), "sgd", SMALL, 1), theta, batch)
    back = jax.tree.map(lambda a, b: 2 * a - b, theta, after)
    forth_and_back = [responses(apply, x, batch).logp[0, 0] for x in (after, back)]
    np.testing.assert_allclose(
        (forth_and_back[0] - forth_and_back[1]) / (2 * SMALL * 0.05), rate, rtol=1e-6
    )
    close(-pair_kernel(apply, theta, batch).gap[0], rate)


def check_what_alignment_does_and_where_the_mass_goes():
    table = found("unconstrained")["single"]
    apart, aligned = (table.where(alignment=a) for a in (0.0, 0.95))
    assert (aligned["falls"] > apart["falls"]).all()
    assert (table["falls, W alone"] == 0).all()
    assert (apart["order"] > 0.9).all()
    assert (table["sign right"] == 1).all()


@pytest.mark.parametrize("alignment", [-0.5, 0.0, 1.0])
def test_alignment_is_a_cosine(alignment):
    w = Unconstrained(draws=4).single(3, alignment)["unembedding"]["table"]
    plus, minus = (w[:, k] / np.linalg.norm(w[:, k], axis=-1, keepdims=True) for k in (0, 1))
    np.testing.assert_allclose((plus * minus).sum(-1), alignment, atol=1e-12)


def check_scores_of_longer_pairs():
    table = found("unconstrained")["longer"]
    single = table.where(responses="one token")
    assert np.isnan(single["CHES"]).all()
    assert np.isnan(single["length"]).all()
    assert (single["largest CHES"] < 1e-9).all()
    for kind in RESPONSES:
        rows = table.where(responses=kind)
        assert (rows["full gap"] > 0.5).all()
    agree = table.where(responses="long, one error", **{"state norms": "varied"})
    assert (agree["CHES"] > 0.8).all()


def test_states_start_at_one_norm_or_not():
    world = SMALL_WORLDS["unconstrained"]
    for equal in (True, False):
        h = world.longer(0, "long", equal)[1]["features"]["table"]
        assert (np.ptp(np.linalg.norm(h, axis=-1)) < 1e-9) == equal


CHECKS = {
    "squeezing": (
        check_squeezing_and_its_uniform_null,
        check_fine_tuning_on_both_responses_weakens_squeezing,
        check_nthr_is_exact_for_the_unembedding_and_not_for_features,
    ),
    "linear": (
        check_single_tokens_with_frozen_features_never_fall,
        check_suffixes_entangle_and_prefixes_do_not,
    ),
    "unconstrained": (
        check_what_alignment_does_and_where_the_mass_goes,
        check_scores_of_longer_pairs,
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_experiment(name):
    """In one test a world, so that one process compiles its programs."""
    check_tables_are_tidy(name)
    check_a_seed_gives_the_same_rows_whatever_the_others(name)
    for check in CHECKS[name]:
        check()


@pytest.mark.parametrize(
    ("world", "knobs", "message"),
    [
        (Squeezing, {"draws": 0}, "draws must be positive"),
        (Squeezing, {"peaks": (1.0, 2.0)}, "peaks takes 0"),
        (Squeezing, {"push_steps": ()}, "push_steps"),
        (Squeezing, {"vocabulary": 36}, "vocabulary must exceed 36"),
        (Squeezing, {"overlap": 0.0}, "overlap must be positive"),
        (Squeezing, {"peak": 1.0}, "no knob peak"),
        (Linear, {"across": 0.9}, "across ≤ correlation"),
        (Linear, {"chosen": 0.9}, "probabilities"),
        (Linear, {"suffixes": (1, 2)}, "suffixes takes lengths"),
        (Linear, {"steps": 0}, "steps must be positive"),
        (Unconstrained, {"alignments": (1.5,)}, "cosines"),
        (Unconstrained, {"vocabulary": 10}, "vocabulary must be at least 17"),
        (Unconstrained, {"rows": (1.0, -1.0)}, "rows takes two positive"),
        (Unconstrained, {"longest": 1}, "longest"),
        (Unconstrained, {"alike": 2.0}, "alike"),
    ],
)
def test_bad_knobs_are_refused(world, knobs, message):
    with pytest.raises(ValueError, match=message):
        world().with_knobs(**knobs)


def test_worlds_without_a_network_say_so():
    for world in SMALL_WORLDS.values():
        assert all(pair.problem() is None for pair in world.pairs(0))
        with pytest.raises(TypeError, match="no transformer"):
            world.model()
