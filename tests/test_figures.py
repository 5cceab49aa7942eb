"""Figures at smoke size: right numbers, same bytes twice."""

import json

import numpy as np
import pytest

from simgrad.figures import predicted_vs_measured
from simgrad.figures.gallery import FIGURES, render

SMALL = {"predicted_vs_measured": predicted_vs_measured.Config(pairs=3, rates=9, largest=(1.0, 1.0, 0.01))}


@pytest.mark.parametrize("name", FIGURES)
def test_rendered_twice_gives_the_same_bytes(name, tmp_path):
    first = render(name, tmp_path / "a", SMALL[name])
    second = render(name, tmp_path / "b", SMALL[name])
    assert [p.suffix for p in first] == [".json", ".pdf", ".png"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
    record = json.loads(first[0].read_text())
    assert set(record) == {"figure", "caption", "config", "provenance", "data"}
    assert "{" not in record["caption"]


def test_predictions_hold_and_slopes_are_two(tmp_path):
    result = predicted_vs_measured.compute(SMALL["predicted_vs_measured"])
    np.testing.assert_allclose(result.slopes, 2.0, atol=0.1)
    small = np.abs(result.predicted[:, 0])
    np.testing.assert_allclose(result.measured[:, 0], result.predicted[:, 0], atol=0.01 * small.max())
    assert np.isfinite(result.measured).all()


def test_unknown_figure(tmp_path):
    with pytest.raises(ValueError, match="no figure 'nothing'; there are: predicted_vs_measured"):
        render("nothing", tmp_path)
