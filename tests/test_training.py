"""Training agrees with steps taken by hand, resumes exactly, and stops where the loss does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PAIRS, close, model

from simgrad import tree
from simgrad.dynamics import DivergedError, Recipe, Trajectory, batch_order, train
from simgrad.models import add_lora, bind, only
from simgrad.objectives import DPO, SFT, get
from simgrad.pairs import Pair, padded
from simgrad.store import content
from simgrad.theory import band, first_order, pair_kernel, regime, responses
from simgrad.theory.mitigation import (
    Calibrated,
    PairwiseNormalized,
    Projected,
    RunningCalibrated,
    SparseMask,
)
from simgrad.theory.optimizers import updated

BATCH = padded(PAIRS)
KINDS = ["rope_gqa_head_dim", "linear_softmax", "unconstrained_features"]


def by_hand(apply, theta, batch, recipe, optimizer=None):
    """Steps of plain jax.grad on the mean loss written out, with optax."""
    optimizer = optimizer or recipe.optimizer
    bound = bind(apply, theta)
    trained, whole = bound.trained, bound.whole
    reference = responses(apply, theta, batch).logp
    state = optimizer.init(trained)
    for index in recipe.order(batch.size):
        some = batch.take(index)

        def loss(t, some=some, index=index):
            logp = responses(apply, whole(t), some).logp
            return recipe.objective.loss(logp, reference[index], some.lengths).mean()

        update, state = updated(optimizer, jax.grad(loss)(trained), state, trained)
        trained = jax.tree.map(jnp.add, trained, update)
    return whole(trained)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "clipped adamw": optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1)
    ),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-2, 5)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_the_steps_that_optax_takes(kind, optimizer):
    apply, theta = model(kind)
    recipe = Recipe(DPO(), OPTIMIZERS[optimizer], steps=5, batch_size=2, seed=3)
    run = train(apply, theta, BATCH, recipe, record=2)
    close(run.theta, by_hand(apply, theta, BATCH, recipe))
    assert run.trajectory.steps.tolist() == [0, 2, 4, 5]
    assert int(run.state.step) == 5


@pytest.mark.parametrize("objective", ["ipo", "simpo", "kto", "aot"])
def test_any_objective_those_that_couple_pairs_included(objective):
    apply, theta = model("rope_gqa_head_dim")
    recipe = Recipe(get(objective), optax.sgd(0.05), steps=3)
    close(train(apply, theta, BATCH, recipe).theta, by_hand(apply, theta, BATCH, recipe))


@pytest.mark.parametrize("objective", [DPO(), get("aot"), DPO() + 0.1 * SFT()], ids=repr)
def test_accumulated_gradients_are_the_batch_gradient(objective):
    apply, theta = model("rope_gqa_head_dim")
    recipe = Recipe(objective, optax.adam(1e-2), steps=3)
    whole, parts = (train(apply, theta, BATCH, recipe.replace(accumulate=k)) for k in (1, 2))
    close(parts.theta, whole.theta)
    close(parts.trajectory.losses, whole.trajectory.losses)


def test_frozen_parameters_stay_and_trained_ones_move():
    apply, theta = model("rope_gqa_head_dim")
    recipe = Recipe(DPO(), optax.adam(1e-2), steps=2)
    after = train(only(apply, "layers/attention/*"), theta, BATCH, recipe).theta
    for name, a, b in zip(
        tree.names(theta), jax.tree.leaves(theta), jax.tree.leaves(after), strict=True
    ):
        assert bool((a == b).all()) != name.startswith("layers/attention/"), name


def test_lora_trains_the_adapters_alone_and_moves_the_policy():
    apply, theta = model("rope_gqa_head_dim")
    adapted, whole = add_lora(apply, theta, ["layers/mlp/*"], rank=2)
    run = train(adapted, whole, BATCH, Recipe(DPO(), optax.adam(1e-2), steps=3))
    close(run.theta["base"], theta)
    assert (jnp.abs(run.trajectory.change[-1]) > 1e-4).all()


@pytest.mark.parametrize(
    ("mitigation", "where"),
    [
        (None, "memory"),
        (None, "disk"),
        (RunningCalibrated(), "disk"),
        ("mask", "memory"),
        ("mask", "disk"),
    ],
    ids=repr,
)
def test_a_stopped_run_resumes_exactly(mitigation, where, tmp_path):
    apply, theta = model("rope_gqa_head_dim")
    extra = {"mask": SparseMask()} if mitigation == "mask" else {"mitigation": mitigation}
    recipe = Recipe(DPO(), optax.adam(1e-2), steps=7, batch_size=2, **extra)
    options = {"record": 1, "probes": padded([Pair([1, 2], [3], [4])]), "watch": [[1, 2], [3]]}
    whole = train(apply, theta, BATCH, recipe, **options)
    short = recipe.replace(steps=4)
    if where == "memory":
        resumed = train(
            apply,
            theta,
            BATCH,
            recipe,
            resume=train(apply, theta, BATCH, short, **options),
            **options,
        )
    else:
        out = tmp_path / "run.npz"
        train(apply, theta, BATCH, short, out=out, **options)
        resumed = train(apply, theta, BATCH, recipe, out=out, **options)
        close(Trajectory.load(out).logp, whole.trajectory.logp)
        assert Trajectory.load(out).config["identity"]["recipe.objective"] == "DPO(beta=0.1)"
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(whole.trajectory), jax.tree.leaves(resumed.trajectory), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_run_of_other_arguments_is_not_continued(tmp_path):
    apply, theta = model("linear_softmax")
    out, recipe = tmp_path / "run.npz", Recipe(DPO(), optax.sgd(0.1), steps=2)
    train(apply, theta, BATCH, recipe, out=out)
    before = out.read_bytes()
    with pytest.raises(
        ValueError,
        match=r"run\.npz belongs to another run \(recipe\.objective: \S+ there, \S+ now\)",
    ):
        train(apply, theta, BATCH, recipe.replace(objective=DPO(beta=0.2)), out=out)
    with pytest.raises(ValueError, match=r"run \(theta: \w{16} there, \w{16} now\)"):
        train(apply, jax.tree.map(lambda x: 2 * x, theta), BATCH, recipe, out=out)
    for other in (optax.adam(0.1), optax.sgd(0.2), optax.sgd(0.1, momentum=0.5)):
        with pytest.raises(
            ValueError, match=r"run \(recipe\.optimizer: \w{16} there, \w{16} now\)"
        ):
            train(apply, theta, BATCH, recipe.replace(optimizer=other), out=out)
    with pytest.raises(
        ValueError, match=r"run \(followed: \(None, \[\], False\) there, \S+ \S+ True\) now\)"
    ):
        train(apply, theta, BATCH, recipe, out=out, kernels=True)
    with pytest.raises(ValueError, match=r"taken 2 steps already"):
        train(apply, theta, BATCH, recipe.replace(steps=1), out=out)
    assert out.read_bytes() == before


def test_divergence_names_the_step_and_keeps_the_trajectory(tmp_path):
    apply, theta = model("linear_softmax")
    jump = optax.scale_by_schedule(lambda t: jnp.where(t == 5, jnp.inf, -0.1))
    with pytest.raises(DivergedError, match=r"step 5 .*lower the learning rate") as caught:
        train(
            apply, theta, BATCH, Recipe(DPO(), jump, steps=40), record=2, out=tmp_path / "run.npz"
        )
    assert caught.value.step == 5
    assert caught.value.trajectory.steps.tolist() == [0, 2, 4]
    assert np.isfinite(caught.value.trajectory.logp).all()
    assert Trajectory.load(tmp_path / "run.npz").steps.tolist() == [0, 2, 4]
    with pytest.raises(DivergedError, match=r"step 6 .*"):
        train(apply, theta, BATCH, Recipe(DPO(), jump, steps=40))


def test_a_policy_that_is_not_finite_is_not_returned():
    apply, theta = model("linear_softmax")
    with pytest.raises(DivergedError, match=r"step 0 "):
        train(apply, theta, BATCH, Recipe(DPO(), optax.sgd(jnp.inf), steps=1))


def test_a_run_is_resumed_with_its_own_arguments_only():
    apply, theta = model("linear_softmax")
    recipe = Recipe(DPO(), optax.adam(0.1), steps=2)
    run = train(apply, theta, BATCH, recipe)
    longer = recipe.replace(steps=4)
    with pytest.raises(
        ValueError, match=r"another one \(theta: \S+ there, \S+ now\).*at its start"
    ):
        train(apply, run.theta, BATCH, longer, resume=run)
    with pytest.raises(ValueError, match=r"\(pairs\.\w+: \S+ there, \S+ now"):
        train(apply, theta, BATCH.take(slice(2)), longer, resume=run)
    with pytest.raises(
        ValueError, match=r"\(recipe\.objective: .* now; recipe\.seed: 0 there, 4 now\)"
    ):
        train(apply, theta, BATCH, longer.replace(objective=DPO(0.3), seed=4), resume=run)
    with pytest.raises(ValueError, match=r"\(recipe\.optimizer: \w{16} there, \w{16} now\)"):
        train(apply, theta, BATCH, longer.replace(optimizer=optax.adam(0.2)), resume=run)


def late(factor):
    """A learning rate that depends on ``factor`` after six steps only."""
    return optax.adam(optax.piecewise_constant_schedule(0.05, {6: factor}))


def masked(trained):
    """SGD of the unembedding, and of the features if they are trained."""
    mask = {"features": {"table": trained}, "unembedding": {"table": True}}
    return optax.masked(optax.sgd(0.1), mask)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    ("make", "mine", "other"), [(late, 0.5, 0.25), (masked, True, False)], ids=["late", "masked"]
)
def test_what_an_optimizer_holds_inside_is_told_apart(make, mine, other, where, tmp_path):
    """Both optimizers have states alike and have taken the same steps when the run stops."""
    apply, theta = model("unconstrained_features")
    recipe = Recipe(DPO(), make(mine), steps=8)
    begun = train(apply, theta, BATCH, recipe.replace(steps=2), out=tmp_path / "run.npz")
    more = {"resume": begun} if where == "memory" else {"out": tmp_path / "run.npz"}
    with pytest.raises(
        ValueError, match=r"another .*\(recipe\.optimizer: \w{16} there, \w{16} now\)"
    ):
        train(apply, theta, BATCH, recipe.replace(optimizer=make(other)), **more)
    anew = recipe.replace(optimizer=make(mine))
    assert anew.optimizer is not recipe.optimizer
    resumed, whole = train(apply, theta, BATCH, anew, **more), train(apply, theta, BATCH, recipe)
    close(resumed.theta, whole.theta)
    close(resumed.trajectory.losses, whole.trajectory.losses)


def test_parameters_are_read_once_for_the_identity_of_many_runs(monkeypatch, tmp_path):
    apply, theta = model("linear_softmax")
    theta = jax.tree.map(lambda x: x + 0.0, theta)  # arrays that nothing has read yet
    read, slabs = [], content._slabs

    def note(x):
        read.append(id(x))
        yield from slabs(x)

    monkeypatch.setattr(content, "_slabs", note)
    for rate in (0.1, 0.2):
        recipe = Recipe(DPO(), optax.sgd(rate), steps=1)
        train(apply, theta, BATCH, recipe, out=tmp_path / f"{rate}.npz")
    assert [read.count(id(x)) for x in jax.tree.leaves(theta)] == [1] * len(jax.tree.leaves(theta))


def test_optimizers_that_know_the_parameters_tree():
    apply, theta = model("rope_gqa_head_dim")
    labels = jax.tree.map_with_path(
        lambda path, _: "on" if "['mlp']" in jax.tree_util.keystr(path) else "off", theta
    )
    optimizer = optax.partition({"on": optax.adam(1e-2), "off": optax.set_to_zero()}, labels)
    recipe = Recipe(DPO(), optimizer, steps=3)
    after = train(apply, theta, BATCH, recipe).theta
    plain = recipe.replace(optimizer=optax.adam(1e-2))
    close(after, train(only(apply, "*mlp/*"), theta, BATCH, plain).theta)


def test_pairs_and_prompts_that_the_model_does_not_know():
    apply, theta = model("linear_softmax")
    recipe = Recipe(DPO(), optax.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match=r"log π of pair 1 is not finite before the first step"):
        train(apply, theta, padded([PAIRS[0], Pair([9, 9], [1], [2])]), recipe)
    with pytest.raises(ValueError, match=r"log π of watched prompt 0"):
        train(apply, theta, BATCH, recipe, watch=[[9, 9]])


def test_the_trajectory_holds_what_theory_says_of_each_record():
    apply, theta = model("rope_gqa_head_dim")
    probes = padded([Pair([1, 2], [3], [4, 5])])
    recipe = Recipe(DPO(), optax.sgd(0.1), steps=4, batch_size=2)
    run = train(
        apply, theta, BATCH, recipe, probes=probes, watch=[[1, 5], [4]], record=[1, 3], kernels=True
    )
    trajectory, result = run.trajectory, responses(apply, run.theta, BATCH)
    assert trajectory.steps.tolist() == [0, 1, 3, 4]
    close(trajectory.token_logp[-1], result.token_logp)
    close(trajectory.probes[-1], responses(apply, run.theta, probes).logp)
    close(jax.tree.map(lambda x: x[-1], trajectory.kernel), pair_kernel(apply, run.theta, BATCH))
    close(jnp.exp(trajectory.watched).sum(-1), jnp.ones((4, 2)))
    close(
        trajectory.watched[-1, 0],
        jax.nn.log_softmax(apply(run.theta, jnp.array([[1, 5]])).logits[0, -1]),
    )
    start = responses(apply, theta, BATCH).logp
    delta = result.logp - start
    close(trajectory.margin[-1], delta[:, 0] - delta[:, 1])
    close(trajectory.change[-1], delta)
    close(trajectory.force[-1], DPO().force(result.logp, start, BATCH.lengths))
    assert trajectory.regime.shape == (4, len(PAIRS))
    change = first_order(pair_kernel(apply, run.theta, BATCH), trajectory.force[-1])
    np.testing.assert_array_equal(trajectory.regime[-1], regime(change))


def test_a_trajectory_survives_the_disk(tmp_path):
    apply, theta = model("linear_softmax")
    run = train(apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.1), steps=3), kernels=True, record=1)
    run.trajectory.save(tmp_path / "trajectory.npz")
    loaded = Trajectory.load(tmp_path / "trajectory.npz")
    assert loaded.config == dict(run.trajectory.config)
    for a, b in zip(jax.tree.leaves(run.trajectory), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    (tmp_path / "other.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"not a file that simgrad wrote"):
        Trajectory.load(tmp_path / "other.npz")


PAIR = padded([Pair([1, 5], [7, 2, 3, 3], [8, 2, 3, 3])])


def one_step(mitigation, rate=1e-7):
    apply, theta = model("rope_gqa_head_dim", pairs=PAIRS)
    run = train(apply, theta, PAIR, Recipe(DPO(), optax.sgd(rate), steps=1, mitigation=mitigation))
    return apply, theta, run.trajectory.change[-1, 0] / rate


@pytest.mark.parametrize(
    "mitigation", [PairwiseNormalized(), Calibrated(), RunningCalibrated(), Projected()], ids=repr
)
def test_a_mitigation_changes_the_step_as_its_force_says(mitigation):
    apply, theta, change = one_step(mitigation)
    kernel, logp = pair_kernel(apply, theta, PAIR), responses(apply, theta, PAIR).logp
    force = DPO().force(logp, logp, PAIR.lengths)
    force, _ = mitigation.update(force, mitigation.init("float64"), kernel)
    d_w, d_l = force[:, 0], -force[:, 1]
    predicted = [
        d_w * kernel.sq_chosen - d_l * kernel.inner,
        d_w * kernel.inner - d_l * kernel.sq_rejected,
    ]
    np.testing.assert_allclose(change, np.concatenate(predicted), rtol=1e-4)
    if not isinstance(mitigation, Projected):
        assert bool(band(kernel, force).inside.all())


def test_running_calibration_is_the_bias_corrected_average():
    mitigation, kernel = RunningCalibrated(decay=0.5), pair_kernel(*model("linear_softmax"), BATCH)
    random = np.random.default_rng(0)
    average, logs = mitigation.init("float64"), []
    for _ in range(3):
        d_w, d_l = jnp.asarray(random.random((2, BATCH.size)) + 0.1)
        ratio = jnp.sqrt(kernel.sq_rejected / kernel.sq_chosen) / (d_w / d_l)
        logs.append(float(0.5 * jnp.log(ratio).mean()))
        changed, average = mitigation.update(jnp.stack([d_w, -d_l], -1), average, kernel)
        weights = 0.5 ** np.arange(len(logs))[::-1]
        expected = np.exp(np.dot(weights, logs) / weights.sum())
        np.testing.assert_allclose(changed[:, 0] / d_w, expected, rtol=1e-10)
        np.testing.assert_allclose(-changed[:, 0] * changed[:, 1], d_w * d_l, rtol=1e-10)


def test_a_learned_mask_takes_weight_from_tokens_that_do_not_help():
    apply, theta = model("rope_gqa_head_dim")
    plain = Recipe(DPO(), optax.adam(1e-2), steps=60, mask=SparseMask(strength=0.0))
    sparse = plain.replace(mask=SparseMask(strength=0.5))
    weights = [train(apply, theta, BATCH, r).trajectory.token_weights for r in (plain, sparse)]
    close(weights[0][0], weights[1][0])
    assert float(weights[1][-1].sum()) < 0.5 * float(weights[0][-1].sum())
    assert bool((weights[0][:, ~BATCH.valid] == 0).all())


def test_a_mask_without_penalty_and_slope_is_a_scaled_objective():
    """All weights σ(b): one step of the policy is that of the objective on σ(b) log π."""
    apply, theta = model("rope_gqa_head_dim")
    frozen = optax.partition(
        {"policy": optax.sgd(0.1), "mask": optax.set_to_zero()},
        lambda learned: jax.tree.map_with_path(lambda path, _: path[0].name, learned),
    )
    masked = train(
        apply, theta, BATCH, Recipe(DPO(), frozen, steps=1, mask=SparseMask(0.0, bias=0.0))
    )
    plain = train(
        apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.05), steps=1)
    )  # d(½x) = ½ dx at zero margin
    close(masked.theta, plain.theta)
    close(masked.trajectory.logp[-1], plain.trajectory.logp[-1])


ERRORS = {
    "steps must not be negative": {"steps": -1},
    "batch_size must be at least 1": {"batch_size": 0},
    "accumulate must be at least 1": {"accumulate": 0},
    "do not combine": {"mask": SparseMask(), "mitigation": Calibrated()},
    "drop one of the three": {"mask": SparseMask(), "accumulate": 2, "objective": get("aot")},
}


@pytest.mark.parametrize("match", ERRORS)
def test_recipes_that_cannot_be_followed(match):
    with pytest.raises(ValueError, match=match):
        Recipe(**{"objective": DPO(), "optimizer": optax.sgd(0.1), "steps": 2, **ERRORS[match]})


def test_calls_that_cannot_be_followed(tmp_path):
    apply, theta = model("linear_softmax")
    recipe = Recipe(DPO(), optax.sgd(0.1), steps=2)
    with pytest.raises(ValueError, match=r"batch_size=9, but there are only 4"):
        train(apply, theta, BATCH, recipe.replace(batch_size=9))
    with pytest.raises(ValueError, match=r"does not split in accumulate=3"):
        train(apply, theta, BATCH, recipe.replace(accumulate=3))
    with pytest.raises(ValueError, match=r"no parameter matches 'nothing'"):
        train(only(apply, "nothing"), theta, BATCH, recipe)
    with pytest.raises(ValueError, match=r"reference has shape"):
        train(apply, theta, BATCH, recipe, reference=jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"record names step 5"):
        train(apply, theta, BATCH, recipe, record=[5])
    with pytest.raises(ValueError, match=r"prompt 0 is empty"):
        train(apply, theta, BATCH, recipe, watch=[[]])
    with pytest.raises(ValueError, match=r"recorded no kernels"):
        _ = train(apply, theta, BATCH, recipe).trajectory.regime
    with pytest.raises(ValueError, match=r"written as .npz"):
        train(apply, theta, BATCH, recipe, out=tmp_path / "run.json")
    half = jax.tree.map(lambda x: x.astype("bfloat16"), theta)
    with pytest.raises(ValueError, match=r"bfloat16: small steps would be rounded away"):
        train(apply, half, BATCH, recipe)


def test_every_pair_comes_once_an_epoch_and_longer_orders_begin_alike():
    order = batch_order(7, 3, 14, seed=2)
    assert sorted(order.ravel()[:7]) == sorted(order.ravel()[7:14]) == list(range(7))
    np.testing.assert_array_equal(batch_order(7, 3, 30, seed=2)[:14], order)
    assert not np.array_equal(batch_order(7, 3, 14, seed=3), order)


def test_zero_steps_record_the_start():
    apply, theta = model("linear_softmax")
    run = train(apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.1), steps=0))
    assert run.trajectory.steps.tolist() == [0]
