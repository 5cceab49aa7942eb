"""Figures at smoke size: what they show is the theory, the same bytes twice, clear refusals."""

import dataclasses
import importlib
import json
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from tueplots import figsizes

from simgrad import worlds
from simgrad.drawing import draw, style
from simgrad.figures import (
    checkpoint,
    checkpoint_layers,
    dynamics,
    features,
    layers,
    optimizers,
    overview,
    percentiles,
    predicted_vs_measured,
    refusals,
    regimes,
    squeezing,
    suffix,
    token_kernel,
    trust_radius,
    verdicts,
)
from simgrad.figures.gallery import FIGURES, render, require_formats, write_index
from simgrad.figures.stored import NotDrawn, _code, computed
from simgrad.worlds.world import Pretraining

WORLD = {"model": "world:percentiles", "data": "world:percentiles", "limit": 4}
SMALL = {
    "overview": overview.Config(suffix=2, pairs=4, steps=2, weights=(0.0, 0.05), seeds=(0,)),
    "predicted_vs_measured": predicted_vs_measured.Config(
        pairs=3, rates=9, largest=(1.0, 1.0, 0.01)
    ),
    "regimes": regimes.Config(suffixes=(2,), pairs=4),
    "dynamics": dynamics.Config(
        objectives=("dpo",), suffix=2, pairs=4, steps=2, record=1, seeds=(0,)
    ),
    "token_kernel": token_kernel.Config(suffix=2),
    "suffix": suffix.Config(lengths=(0, 2), seeds=(0,)),
    "verdicts": verdicts.Config(seeds=(0,), steps=2),
    "refusals": refusals.Config(seeds=(0,), n_pairs=32, epochs=1),
    "percentiles": percentiles.Config(
        seeds=(0,), n_pairs=16, predictors=("CHES", "full gap"), shown=("CHES", "full gap")
    ),
    "squeezing": squeezing.Config(peaks=(0.0, 2.0), draws=4, seeds=(0, 1)),
    "layers": layers.Config(pairs=2, suffix=2),
    "optimizers": optimizers.Config(pairs=4, suffix=2, steps=2, seeds=(0, 1)),
    "trust_radius": trust_radius.Config(
        pairs=8, rates=4, smallest=1e-3, largest=1.0, steps=4, refresh=2
    ),
    "features": features.Config(alignments=(0.0, 0.9), draws=8, seeds=(0, 1)),
    "checkpoint": checkpoint.Config(**WORLD, batch_size=2, learning_rate=1e-4),
    "checkpoint_layers": checkpoint_layers.Config(**WORLD),
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(autouse=True)
def hasty(monkeypatch, cache):
    """Worlds that hardly pretrain, in a cache of their own."""
    monkeypatch.setenv("SIMGRAD_CACHE", str(cache))
    for name in worlds.names():
        monkeypatch.setattr(
            type(worlds.get(name)), "pretraining", Pretraining(steps=2, batch_size=4, warmup=1)
        )


def test_every_figure_has_a_smoke_size():
    assert set(SMALL) == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_rendered_twice_gives_the_same_bytes(name, tmp_path):
    first = render(name, tmp_path / "a", SMALL[name], formats=("pdf", "png", "svg"))
    second = render(name, tmp_path / "b", SMALL[name], formats=("pdf", "png", "svg"))
    assert [p.suffix for p in first] == [".json", ".pdf", ".png", ".svg"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
    record = json.loads(first[0].read_text())
    assert set(record) == {"figure", "title", "caption", "bears_on", "config", "provenance", "data"}
    assert "{" not in record["caption"]
    assert re.search(r"arXiv \d{4}\.\d{5}", record["bears_on"])
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(SMALL[name])))
    assert b"Type3" not in first[1].read_bytes()  # fonts are embedded as TrueType


def test_computing_again_gives_the_same_numbers(tmp_path):
    for name in ("features", "squeezing", "predicted_vs_measured"):
        first, again = (render(name, tmp_path / side, SMALL[name], fresh=True)[0] for side in "ab")
        assert first.read_bytes() == again.read_bytes()


@dataclasses.dataclass(frozen=True)
class Found:
    """What a computation may find."""

    numbers: np.ndarray
    names: tuple[str, ...]
    nested: tuple[tuple[float, ...], ...]


def test_results_are_kept_by_configuration_and_input():
    calls = []

    def compute(config):
        calls.append(config)
        return Found(np.array([[1.0, np.nan]]) * config, ("a", "b"), ((0.1, 0.2), (1 / 3,)))

    first = computed(compute, 2.0, Found)
    again = computed(compute, 2.0, Found)
    np.testing.assert_array_equal(first.numbers, again.numbers)
    assert (again.names, again.nested) == (first.names, first.nested)
    assert calls == [2.0]
    computed(compute, 3.0, Found)
    computed(compute, 2.0, Found, False, "a file that has changed")
    computed(compute, 2.0, Found, True)
    assert calls == [2.0, 3.0, 2.0, 2.0]


FIGURE = """
from simgrad.pairs import Pair
from simgrad.drawing import style
CAPTION = "words"
def compute(config):
    return config * 2
def plot(result):
    return 1
"""


@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [
        ("* 2", "* 3", True),
        ("simgrad.pairs import Pair", "simgrad.tree import names", True),
        ('"words"', '"other words"', False),
        ("return 1", "return 2", False),
        ("drawing import style", "drawing import draw", False),
    ],
)
def test_words_and_drawing_do_not_make_numbers_stale(old, new, stale, tmp_path, monkeypatch):
    names = []
    for i, source in enumerate((FIGURE, FIGURE.replace(old, new))):
        (tmp_path / f"figure{i}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        names.append(_code(importlib.import_module(f"figure{i}").__name__))
        del sys.modules[f"figure{i}"]
    assert (names[0] != names[1]) == stale


def test_predictions_hold_and_slopes_are_two():
    result = predicted_vs_measured.compute(SMALL["predicted_vs_measured"])
    np.testing.assert_allclose(result.slopes, 2.0, atol=0.1)
    small = np.abs(result.predicted[:, 0])
    np.testing.assert_allclose(
        result.measured[:, 0], result.predicted[:, 0], atol=0.01 * small.max()
    )
    assert np.isfinite(result.measured).all()


def test_pairs_obey_cauchy_schwarz_and_ratios_are_the_catalog_s():
    result = regimes.compute(SMALL["regimes"])
    assert (result.over_chosen * result.over_rejected <= 1 + 1e-5).all()
    ratio = dict(zip(result.objectives, result.ratio, strict=True))
    np.testing.assert_allclose(ratio["dpo"], 1.0, rtol=1e-9)
    np.testing.assert_allclose(ratio["dpo_shift"], 1 / 0.75, rtol=1e-9)
    assert np.isnan(ratio["ipo"][result.margins > 5]).all()  # m > 1/(2β): it pushes the chosen down


def test_token_changes_add_up_to_the_pair_s():
    result = token_kernel.compute(SMALL["token_kernel"])
    for kernel, change, cosine in (
        (result.first, result.first_change, result.cosines[0]),
        (result.second, result.second_change, result.cosines[1]),
    ):
        assert np.sign(kernel.sum()) == np.sign(cosine)
        assert change[0].sum() - change[1].sum() > 0  # the margin of the pair alone grows


def test_errors_of_one_step_are_of_first_and_second_order():
    result = trust_radius.compute(SMALL["trust_radius"])
    slope = np.diff(np.log([result.first[:2], result.second[:2]]), axis=1)[:, 0] / np.diff(
        np.log(result.learning_rates[:2])
    )
    np.testing.assert_allclose(slope, [1.0, 2.0], atol=0.1)
    assert (result.refreshed[1:] < result.flow[1:]).all()


def test_closed_form_is_the_measured_rate():
    result = features.compute(SMALL["features"])
    np.testing.assert_allclose(result.closed_form, result.measured, rtol=1e-3)
    assert (result.falls_frozen == 0).all()


def test_block_shares_add_up():
    result = layers.compute(layers.Config(pairs=1, suffix=2))
    for groups in (result.by_layer, result.by_matrix):
        for blocks in groups:
            assert sum(block[0][1] for block in blocks) == pytest.approx(1.0, abs=1e-5)


def test_an_optimizer_s_own_kernel_ranks_its_first_step():
    result = optimizers.compute(
        optimizers.Config(pairs=4, suffix=2, steps=1, learning_rate=1e-6, seeds=(0,))
    )
    np.testing.assert_allclose(
        result.adam_says * 1e-6, result.measured, atol=0.02 * np.abs(result.measured).max()
    )
    scaled = result.sgd_says * np.abs(result.measured).max() / np.abs(result.sgd_says).max()
    assert np.abs(scaled - result.measured).max() > 0.1 * np.abs(result.measured).max()


def test_index_says_what_to_see_and_how_to_make_it(tmp_path):
    config = dataclasses.replace(SMALL["checkpoint_layers"], limit=2)
    for name in ("features", "checkpoint_layers"):
        render(name, tmp_path, config if name == "checkpoint_layers" else SMALL[name])
    text = write_index(tmp_path).read_text()
    assert "simgrad figures features`" in text
    assert (
        "simgrad figures checkpoint_layers --model world:percentiles --data world:percentiles`"
        in text
    )
    assert "![Frozen or free features](features.png)" in text
    assert "regimes" not in text.replace("plane of regimes", "")  # not in this folder


def test_vector_files_do_not_depend_on_what_is_written_with_them(tmp_path):
    lists = (("pdf", "png", "svg"), ("svg", "pdf"), ("svg",))
    files = [
        render("features", tmp_path / str(i), SMALL["features"], formats=kinds)
        for i, kinds in enumerate(lists)
    ]
    svgs = [next(f for f in some if f.suffix == ".svg").read_bytes() for some in files]
    assert svgs[0] == svgs[1] == svgs[2]


def test_a_readme_that_is_no_index_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(
        ValueError, match="README.md is not an index of figures and would be overwritten"
    ):
        render("features", tmp_path, SMALL["features"])
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: --out takes a folder"):
        render("features", tmp_path / "file", SMALL["features"])


def test_clear_refusals(tmp_path):
    with pytest.raises(
        ValueError, match="no figure 'nothing'; there are: overview, predicted_vs_measured"
    ):
        render("nothing", tmp_path)
    with pytest.raises(NotDrawn, match="--model FOLDER_OR_ID --data PAIRS"):
        render("checkpoint", tmp_path)
    with pytest.raises(ValueError, match="no format 'jpg'; there are: pdf, png, svg, pgf"):
        require_formats(["jpg"])
    with pytest.raises(ValueError, match="no format given"):
        require_formats([])
    with pytest.raises(
        ValueError, match="pgf measures its texts with xelatex, which is not installed"
    ):
        _without_tex(tmp_path)
    with (
        pytest.raises(ValueError, match="no venue 'acl'; there are: neurips, icml, iclr"),
        style.paper_style("acl"),
    ):
        pass
    short = dataclasses.replace(SMALL["checkpoint"], max_length=2)
    with pytest.raises(ValueError, match="no pair of at most 2 tokens; the shortest has"):
        render("checkpoint", tmp_path, short)


def _without_tex(folder):
    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setenv("PATH", str(folder))
        render("features", folder, formats=("pgf",))


@pytest.mark.parametrize(("venue", "width"), [("neurips", 5.5), ("icml", 6.75), ("iclr", 5.5)])
def test_figures_are_as_wide_as_the_text(venue, width):
    with style.paper_style(venue):
        assert style.size(2, 3)[0] == pytest.approx(width)
    assert figsizes.neurips2024()["figure.figsize"][0] == pytest.approx(5.5)


def test_labels_keep_their_distance_on_any_scale():
    for scale in ("linear", "log", "symlog"):
        figure, axis = plt.subplots()
        axis.plot([0, 1], [1, 10])
        axis.set_yscale(scale)
        draw.direct_labels(axis, 1.0, {"a": (5.0, "k"), "b": (5.1, "k"), "c": (5.2, "k")}, gap=0.1)
        heights = np.sort([text.xy[1] for text in axis.texts])
        assert (np.diff(heights) >= 0.1 - 1e-6).all()
        plt.close(figure)


def test_bars_and_bands_are_means():
    figure, axis = plt.subplots()
    runs = np.array([[0.1, 0.6], [0.3, 0.2]])
    draw.mass_bars(axis, ["No", "Never"], runs, 1 - runs, "No", "Never")
    np.testing.assert_allclose([bar.get_height() for bar in axis.patches], [0.2, 0.4, 0.8, 0.6])
    axis.clear()
    draw.band(axis, np.arange(2.0), runs, "k")
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0.2, 0.4])
    plt.close(figure)
