"""Predictors of whole runs against their definitions, and the numbers that compare them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PAIRS, close, model
from scipy import stats

from simgrad import tree
from simgrad.dynamics import Recipe
from simgrad.dynamics.agreement import agreement, partial_spearman
from simgrad.dynamics.directional import directional_change, directional_score, run_direction
from simgrad.dynamics.predictors import PREDICTORS, Setting, measured
from simgrad.experiments.comparison import predictor_table
from simgrad.models import linear_softmax, only
from simgrad.objectives import DPO
from simgrad.pairs import Pair, packed, padded
from simgrad.theory import ches, displacement, entanglement_kernel, loss_gradient, responses
from simgrad.theory.mitigation import Calibrated

BATCH = padded(PAIRS)
KIND = "rope_gqa_head_dim"


def minibatch_gradients(apply, theta, recipe):
    order = recipe.replace(steps=BATCH.size // recipe.batch_size).order(BATCH.size)
    logp = responses(apply, theta, BATCH).logp
    return [loss_gradient(apply, theta, BATCH.take(i), recipe.objective, logp[i]) for i in order]


def test_the_direction_of_sgd_is_all_its_steps_along_the_mean_gradient():
    apply, theta = model(KIND)
    direction = run_direction(
        apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.01), steps=7, batch_size=2)
    )
    mean = loss_gradient(apply, theta, BATCH, DPO())
    close(direction, jax.tree.map(lambda g: -0.07 * g, mean))


def test_the_direction_of_a_schedule_is_its_sum():
    apply, theta = model(KIND)
    schedule = optax.linear_schedule(0.02, 0.0, 4)
    direction = run_direction(apply, theta, BATCH, Recipe(DPO(), optax.sgd(schedule), steps=4))
    total = sum(float(schedule(t)) for t in range(4))
    gradient = loss_gradient(
        apply, theta, BATCH, DPO()
    )  # optax keeps a schedule's values in float32
    close(direction, jax.tree.map(lambda g: -total * g, gradient), scale=1e4)


def test_the_direction_of_adam_is_preconditioned_by_the_mean_squared_minibatch_gradient():
    apply, theta = model(KIND)
    recipe = Recipe(DPO(), optax.adam(1e-3, eps=1e-4), steps=5, batch_size=2)
    direction = run_direction(apply, theta, BATCH, recipe)
    parts = minibatch_gradients(apply, theta, recipe)
    mean = jax.tree.map(lambda *gs: sum(gs) / len(gs), *parts)
    square = jax.tree.map(lambda *gs: sum(g**2 for g in gs) / len(gs), *parts)
    # optax's second moment takes in ḡ² with weight 1 - b2
    expected = jax.tree.map(
        lambda m, v: -5e-3 * m / (jnp.sqrt(0.999 * v + 0.001 * m**2) + 1e-4), mean, square
    )
    close(direction, expected, scale=1e5)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_pair_is_left_out_of_the_direction(size):
    apply, theta = model(KIND)
    direction = run_direction(
        apply, theta, BATCH, Recipe(DPO(), optax.sgd(1.0), steps=1, batch_size=size)
    )
    close(direction, jax.tree.map(jnp.negative, loss_gradient(apply, theta, BATCH, DPO())))


def test_second_moments_of_other_kinds_are_refused():
    apply, theta = model(KIND)
    for optimizer in (
        optax.radam(1e-3),
        optax.adamax(1e-3),
        optax.rmsprop(1e-3, centered=True),
        optax.adabelief(1e-3),
        optax.adafactor(1e-3),
        optax.adagrad(1e-3),
        optax.adadelta(1e-3),
        optax.lion(1e-3),
        optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
    ):
        with pytest.raises(ValueError, match=r"known for SGD, momentum, Adam, AdamW and RMSProp"):
            run_direction(apply, theta, BATCH, Recipe(DPO(), optimizer, steps=1))


def test_masked_optimizers_have_a_direction():
    apply, theta = model(KIND)
    labels = jax.tree.map_with_path(
        lambda path, _: "on" if "['mlp']" in jax.tree_util.keystr(path) else "off", theta
    )
    optimizer = optax.partition({"on": optax.adam(1e-3), "off": optax.set_to_zero()}, labels)
    found = run_direction(apply, theta, BATCH, Recipe(DPO(), optimizer, steps=3, batch_size=2))
    plain = run_direction(
        apply, theta, BATCH, Recipe(DPO(), optax.adam(1e-3), steps=3, batch_size=2)
    )
    inside, outside = (tree.partition(x, ["*mlp/*"]) for x in (found, plain))
    close(inside[0], outside[0])
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(inside[1]))


def test_one_step_on_everything_is_the_optimizers_own():
    apply, theta = model(KIND)
    for optimizer in (optax.sgd(0.1), optax.adam(1e-3), optax.rmsprop(1e-3, decay=0.0)):
        direction = run_direction(apply, theta, BATCH, Recipe(DPO(), optimizer, steps=1))
        gradient = loss_gradient(apply, theta, BATCH, DPO())
        with jax.numpy_dtype_promotion("standard"):
            expected, _ = optimizer.update(gradient, optimizer.init(gradient), theta)
        close(direction, expected, scale=1e4)


CLIP, DECAY, PEAK = 0.5, 0.1, 1e-3
WARM = optax.linear_schedule(0.0, PEAK, 4)


def is_decayed(path, _):
    return "kernel" in jax.tree_util.keystr(path)


def labelled(theta):
    return jax.tree.map_with_path(lambda *x: "some" if is_decayed(*x) else "others", theta)


def marked(theta, others=False):
    return jax.tree.map_with_path(lambda *x: is_decayed(*x) != others, theta)


def groups(theta, some, others):
    return optax.multi_transform({"some": some, "others": others}, labelled(theta))


# by name: the optimizer behind the clipping, decay of kernels and of others, and how many times the
# mean gradient itself the others move a step (None: as Adam says)
ADAMS = {
    "adam": (lambda theta: optax.adam(WARM), 0.0, 0.0, None),
    "adamw": (lambda theta: optax.adamw(WARM, weight_decay=DECAY), DECAY, DECAY, None),
    "adamw, decay masked": (
        lambda theta: optax.adamw(WARM, weight_decay=DECAY, mask=marked(theta)), DECAY, 0.0, None
    ),
    "two groups": (
        lambda theta: groups(theta, optax.adamw(WARM, weight_decay=DECAY), optax.adam(WARM)),
        DECAY, 0.0, None,
    ),
    "a frozen group": (
        lambda theta: groups(theta, optax.adam(WARM), optax.set_to_zero()), 0.0, 0.0, 0.0
    ),
    "a group of sgd": (
        lambda theta: groups(theta, optax.adam(WARM), optax.sgd(0.01)), 0.0, 0.0, -0.01
    ),
    "masked": (lambda theta: optax.masked(optax.adam(WARM), marked(theta)), 0.0, 0.0, 1.0),
}  # fmt: skip


def clipped(gradient):
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(gradient)))
    assert norm > CLIP
    return jax.tree.map(lambda x: x * (CLIP / norm), gradient)


def held(theta, gradients, decayed, others_decayed, others, steps):
    """Steps of Adam with moments held, written out; returns what θ moves by."""
    mean = jax.tree.map(lambda *gs: sum(gs) / len(gs), *gradients)
    square = jax.tree.map(lambda *gs: sum(g**2 for g in gs) / len(gs), *gradients)
    rate = sum(PEAK * min(t / 4, 1) for t in range(steps))

    def move(path, t, m, v):
        if others is not None and not is_decayed(path, t):
            return others * steps * m
        decay = decayed if is_decayed(path, t) else others_decayed
        # optax's second moment takes in the mean's square with weight 1 - b2
        return -rate * (m / (jnp.sqrt(0.999 * v + 0.001 * m**2) + 1e-8) + decay * t)

    return jax.tree.map_with_path(move, theta, mean, square)


@pytest.mark.parametrize("name", ADAMS)
def test_adam_behind_clipping_and_a_warm_up_has_a_direction(name):
    """What TRL trains with; each minibatch's gradient is clipped before the moments see it."""
    apply, theta = model(KIND)
    inner, *rest = ADAMS[name]
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), inner(theta))
    recipe = Recipe(DPO(), optimizer, steps=6, batch_size=2)
    plain = minibatch_gradients(apply, theta, recipe)
    behind = [clipped(g) for g in plain]
    direction = run_direction(apply, theta, BATCH, recipe)
    close(direction, held(theta, behind, *rest, 6), scale=1e4)  # schedules are in float32
    with pytest.raises(AssertionError):
        close(direction, held(theta, plain, *rest, 6), scale=1e8)


@pytest.mark.parametrize("rate", [1e-3, 1e-9])
def test_which_second_moments_settle_does_not_depend_on_sizes(rate):
    """ε, rates and thresholds of all sizes, also those below what comparisons take for equal."""
    apply, theta = model(KIND)
    clip = optax.clip_by_global_norm(0.1)
    for optimizer in (optax.rmsprop(rate), optax.adam(rate, eps=1e-3), optax.nadam(rate)):
        for chain in (optimizer, optax.chain(clip, optimizer)):
            run_direction(apply, theta, BATCH, Recipe(DPO(), chain, steps=1))
    for chain in (optax.radam(rate), optax.chain(clip, optax.radam(rate))):
        with pytest.raises(ValueError, match=r"known for SGD, momentum, Adam, AdamW and RMSProp"):
            run_direction(apply, theta, BATCH, Recipe(DPO(), chain, steps=1))


def test_rmsprop_of_some_parameters_behind_clipping_has_a_direction():
    apply, theta = model(KIND)
    inner = groups(theta, optax.rmsprop(PEAK, eps=1e-6, eps_in_sqrt=False), optax.sgd(0.01))
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), inner)
    recipe = Recipe(DPO(), optimizer, steps=3, batch_size=2)
    parts = [clipped(g) for g in minibatch_gradients(apply, theta, recipe)]
    mean = jax.tree.map(lambda *gs: sum(gs) / len(gs), *parts)
    square = jax.tree.map(lambda *gs: sum(g**2 for g in gs) / len(gs), *parts)

    def move(path, m, v):
        if not is_decayed(path, m):
            return -0.03 * m
        # optax's second moment takes in the mean's square with weight 1 - decay
        return -3 * PEAK * m / (jnp.sqrt(0.9 * v + 0.1 * m**2) + 1e-6)

    found = run_direction(apply, theta, BATCH, recipe)
    close(found, jax.tree.map_with_path(move, mean, square), scale=1e4)


@pytest.mark.parametrize("l2", [1e-3, 0.05, 0.5])
def test_adam_behind_an_l2_term_keeps_its_digits_in_float32(l2):
    """What the moments see is read off the optimizer; an L2 term is far larger than a probe."""
    parts = optax.clip_by_global_norm(CLIP), optax.add_decayed_weights(l2), optax.adam(PEAK)
    recipe = Recipe(DPO(), optax.chain(*parts), steps=4, batch_size=2)
    wide, theta = model(KIND)
    narrow, _ = model(KIND, "float32")
    exact = run_direction(wide, theta, BATCH, recipe)
    near = run_direction(narrow, jax.tree.map(lambda x: x.astype("float32"), theta), BATCH, recipe)
    miss = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)), exact, near)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(exact))
    assert max(float(x.max()) for x in jax.tree.leaves(miss)) < 0.01 * size
    kernels = [m.mean() for m in jax.tree.leaves(miss)]
    assert max(kernels) < 1e-3 * size


def test_a_gradient_that_cannot_be_read_is_no_silent_nan():
    apply, theta = model(KIND)
    optimizer = optax.chain(optax.centralize(), optax.adam(1e-3))
    with pytest.raises(ValueError, match="direction of this run is not finite"):
        run_direction(apply, theta, BATCH, Recipe(DPO(), optimizer, steps=1))


def test_a_direction_can_be_compiled_with_what_reads_it():
    apply, theta = model(KIND)
    recipe = Recipe(DPO(), optax.adam(1e-3), steps=2, batch_size=2)
    compiled = jax.jit(lambda t: directional_score(apply, t, BATCH, recipe).change)
    close(compiled(theta), directional_score(apply, theta, BATCH, recipe).change, scale=1e4)


def test_adam_masked_by_shape_has_a_direction():
    apply, theta = model(KIND)
    matrices = optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    chosen = jax.tree.map(lambda x: x.ndim > 1, theta)
    named = optax.masked(optax.adam(1e-3), chosen)
    found = [
        run_direction(apply, theta, BATCH, Recipe(DPO(), optimizer, steps=2, batch_size=2))
        for optimizer in (matrices, named)
    ]
    close(*found)


def test_accumulation_does_not_bind_the_sample_of_a_direction():
    apply, theta = model(KIND)
    recipe = Recipe(DPO(), optax.sgd(0.1), steps=2, batch_size=4, accumulate=4)
    batch = padded(PAIRS * 3)
    found = directional_score(apply, theta, batch, recipe, sample=len(PAIRS) * 2 + 2)
    assert np.isfinite(found.change).all()


def test_rmsprop_behind_an_l2_term_is_refused():
    apply, theta = model(KIND)
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.rmsprop(1e-3))
    with pytest.raises(ValueError, match=r"not known for RMSProp behind an L2 term"):
        run_direction(apply, theta, BATCH, Recipe(DPO(), optimizer, steps=1))


@pytest.mark.parametrize("layout", [padded, packed])
def test_the_directional_change_is_the_first_order_term(layout):
    apply, theta = model(KIND)
    direction = jax.tree.map(
        lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), theta
    )
    close(
        directional_change(apply, theta, layout(PAIRS), direction),
        displacement(apply, theta, BATCH, direction).first,
    )
    part, _ = tree.partition(direction, ["layers/*"])
    some = only(apply, "layers/*")
    found = directional_change(some, theta, layout(PAIRS), part)
    close(found, displacement(some, theta, BATCH, part).first)
    with pytest.raises(ValueError, match=r"give the model \(.*only\) that it was made with"):
        directional_change(apply, theta, BATCH, part)


def test_the_directional_score_is_the_kernel_of_the_data_set():
    apply, theta = model(KIND)
    score = directional_score(apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.01), steps=3))
    kernel = entanglement_kernel(apply, theta, BATCH)
    logp = responses(apply, theta, BATCH).logp
    pull = DPO().force(logp, logp, BATCH.lengths).reshape(-1) / BATCH.size
    close(score.change.reshape(-1), 0.03 * kernel @ pull)
    assert (score.error == 0).all()


def test_the_sampling_error_is_the_size_of_the_deviation():
    """Root mean squares over many samples agree; with no sample error at full size."""
    random = np.random.default_rng(0)
    draws = random.integers(0, 4, (40, 2)).tolist()
    pairs = [
        Pair([x], [chosen], [rejected])
        for x, (chosen, rejected) in enumerate(draws)
        if chosen != rejected
    ]
    apply, theta = linear_softmax(pairs, 60, 8, dtype="float64")
    batch, recipe = padded(pairs), Recipe(DPO(), optax.sgd(1.0), steps=1)
    whole = directional_score(apply, theta, batch, recipe).change
    draws = [
        directional_score(apply, theta, batch, recipe, sample=12, groups=4, seed=s)
        for s in range(40)
    ]
    deviation = np.sqrt(np.mean([np.square(d.change - whole) for d in draws]))
    error = np.sqrt(np.mean([np.square(d.error) for d in draws]))
    assert 0.8 < error / deviation < 1.25
    with pytest.raises(ValueError, match=r"groups <= sample <= pairs"):
        directional_score(apply, theta, batch, recipe, sample=100)


def test_directions_of_what_is_no_plain_objective_are_refused():
    apply, theta = model(KIND)
    with pytest.raises(ValueError, match=r"plain objective"):
        run_direction(
            apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.1), steps=1, mitigation=Calibrated())
        )


@pytest.mark.parametrize("alone", [False, True])
def test_every_predictor_has_one_shape_and_the_refreshed_ones_are_near(alone):
    apply, theta = model(KIND)
    setting = Setting(
        apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.004), steps=8, batch_size=2), alone=alone
    )
    truth = measured(setting)
    for name, predictor in PREDICTORS.items():
        guess = predictor(setting)
        assert guess.shape == truth.shape == (len(PAIRS), 2), name
        if name in ("two big steps", "kernel flow, refreshed"):
            np.testing.assert_allclose(
                guess, truth, rtol=0.1, atol=0.05 * np.abs(truth).max(), err_msg=name
            )


def test_measured_alone_is_one_run_a_pair():
    apply, theta = model("linear_softmax")
    setting = Setting(apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.1), steps=3), alone=True)
    first = measured(Setting(apply, theta, BATCH.take(slice(1)), setting.recipe))
    close(measured(setting)[:1], first)


def test_linear_models_are_predicted_as_far_as_they_are_linear():
    apply, theta = linear_softmax(PAIRS, 13, 8, dtype="float64")
    small = Setting(apply, theta, BATCH, Recipe(DPO(), optax.sgd(1e-3), steps=4, batch_size=2))
    names = ["CHES", "directional", "kernel flow", "rerun, other order"]
    table = predictor_table({"small": small}, names)
    for name in names[1:]:
        row = table.where(predictor=name)
        assert row["r2"][0] > 0.999, name
        assert row["sign"][0] == 1
    assert np.isnan(table.where(predictor="CHES")["r2"][0])
    with pytest.raises(ValueError, match=r"no predictor 'chess'; there are"):
        predictor_table({"small": small}, ["chess"])


@pytest.mark.parametrize(
    ("optimizer", "alone", "nats"),
    [
        (optax.sgd(1e-3), False, True),
        (optax.adam(1e-5), False, False),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-5)), False, False),
        (optax.adam(1e-5), True, True),
    ],
    ids=["sgd", "adam", "clipped adam", "adam alone"],
)
def test_a_pairs_own_share_is_in_nats_only_where_steps_are_shared_out(optimizer, alone, nats):
    """Adam divides by the batch's size of gradients: a pair's own step is not 1/B of it."""
    apply, theta = linear_softmax(PAIRS, 13, 8, dtype="float64")
    setting = Setting(apply, theta, BATCH, Recipe(DPO(), optimizer, steps=2), alone=alone)
    table = predictor_table({"run": setting}, ["own first order", "directional"])
    own, whole = (table.where(predictor=p) for p in ("own first order", "directional"))
    for name in ("r2", "sign"):
        assert np.isfinite(own[name][0]) == nats, name
        assert np.isfinite(whole[name][0]), name
    assert np.isfinite(own["spearman"][0])
    assert np.isfinite(own["precision"][0])


def test_similarities_predict_minus_themselves():
    apply, theta = model(KIND)
    setting = Setting(apply, theta, BATCH, Recipe(DPO(), optax.sgd(0.1), steps=1))
    close(PREDICTORS["CHES"](setting)[:, 0], -ches(responses(apply, theta, BATCH), BATCH))


def test_agreement_by_its_definitions():
    random = np.random.default_rng(1)
    x, y, z = random.normal(size=(3, 30))
    found = agreement(x, y, np.stack([z, x + z], 1))
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    ranks = np.stack([stats.rankdata(c) for c in (x, y, z, x + z)])
    inverse = np.linalg.inv(np.corrcoef(ranks))
    assert found.partial == pytest.approx(-inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1]))
    assert found.r2 == pytest.approx(1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert found.precision == len(set(np.argsort(x)[:10]) & set(np.argsort(y)[:10])) / 10
    assert found.sign == np.mean((x < 0) == (y < 0))
    perfect = agreement(y, y, z[:, None])
    assert (perfect.spearman, perfect.r2, perfect.precision, perfect.sign) == (1, 1, 1, 1)


def test_agreement_of_nothing_is_not_a_number():
    x = np.arange(4.0)
    assert np.isnan(agreement(np.zeros(4), x).spearman)
    assert np.isnan(agreement(np.array([0, 1, np.inf, 2]), x).spearman)
    assert np.isnan(partial_spearman(x, np.exp(x), x[:, None]))
    with pytest.raises(ValueError, match=r"two arrays of one length"):
        agreement(x[:1], x[:1])
