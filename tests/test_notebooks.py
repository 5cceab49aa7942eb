"""Notebooks run from start to end, are committed with clean outputs, and their sliders fall back
to figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from simgrad.drawing import notebook as sliders

nbformat = pytest.importorskip("nbformat", reason="pip install 'simgrad[notebooks]'")

HERE = Path(__file__).parent
NOTEBOOKS = sorted((HERE.parent / "notebooks").glob("*.ipynb"))
SMALL = {
    "01_entanglement_in_ten_minutes": "SEED, PAIRS = 0, 12",
    "02_displacement_and_ches": "SEEDS, PAIRS, STEPS = 2, 8, 5",
    "03_where_the_mass_goes": "SEEDS, STEPS, PAIRS = 2, 3, 64",
    "04_objectives_and_mitigations": "SEEDS, STEPS, EPOCHS = 2, 2, 1",
    "05_your_checkpoint": 'MODEL, DATA, LIMIT = "world:percentiles", "world:percentiles", 16',
    "06_predict_a_run": "SEED, PAIRS, RATES = 0, 32, (0.01,)",
}
LONGEST, LARGEST = 15, 400_000
SOMEWHERE = re.compile(
    rf"{re.escape(str(HERE.parent))}|/home/|/root/|/Users/|[A-Z]:\\\\|0x[0-9a-f]{{6,}}"
)


def named(path):
    return path.stem


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_all_notebooks_are_known():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_cells_are_short_and_one_holds_the_parameters(path):
    lines = [
        sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code_cells(path)
    ]
    assert max(lines) <= LONGEST
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code_cells(path)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_outputs_are_those_of_one_run_from_start_to_end(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert all("widget" not in kind for output in outputs for kind in output.get("data", {}))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_files_are_small_and_say_nothing_of_where_and_when(path):
    assert path.stat().st_size < LARGEST
    whole = nbformat.read(path, as_version=4)
    assert set(whole.metadata) == {"kernelspec", "language_info"}
    assert [cell.id for cell in whole.cells] == [f"cell-{i:02d}" for i in range(len(whole.cells))]
    for cell in whole.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") + json.dumps(
                {k: v for k, v in output.get("data", {}).items() if "text" in k}
            )
            assert not SOMEWHERE.search(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_links_between_notebooks_lead_somewhere(path):
    text = "".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (path.parent / target).exists(), target


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of a fresh process: as a reader's, with a cache shared by all notebooks of this worker."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"SIMGRAD_CACHE": str(tmp_path_factory.mktemp("notebooks"))}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_it_runs_at_reduced_size(path, environment):
    pytest.importorskip("IPython", reason="pip install 'simgrad[notebooks]'")
    command = [sys.executable, str(HERE / "notebook_runs.py"), path.stem, SMALL[path.stem]]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_kernel_executes_to_the_same_bytes_twice(tmp_path, environment):
    pytest.importorskip("nbclient", reason="pip install 'simgrad[notebooks]'")
    pytest.importorskip("ipykernel", reason="pip install 'simgrad[notebooks]'")
    whole = nbformat.read(NOTEBOOKS[2], as_version=4)
    kept = [cell for cell in whole.cells if "import" in cell.source or "def squeeze" in cell.source]
    whole.cells = [cell for cell in kept if cell.cell_type == "code"]
    (tmp_path / "execute.py").write_bytes((NOTEBOOKS[0].parent / "execute.py").read_bytes())
    found = []
    for _ in range(2):
        nbformat.write(whole, tmp_path / "few.ipynb")
        command = [sys.executable, str(tmp_path / "execute.py"), "few"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append((tmp_path / "few.ipynb").read_bytes())
    assert found[0] == found[1]
    (output,) = code_cells(tmp_path / "few.ipynb")[-1].outputs
    assert set(output.data) == {"image/png", "text/plain"}


def curve(power=1, height=2.0):
    figure, axis = plt.subplots()
    axis.plot([0, 1, 2], [0, height, height * 2**power])
    return figure


def shown(monkeypatch, **choices):
    display = pytest.importorskip("IPython.display", reason="pip install 'simgrad[notebooks]'")
    seen = []
    monkeypatch.setattr(display, "display", lambda bundle, raw: seen.append(bundle))
    sliders.explore(curve, **choices)
    return seen[0]


def test_sliders_redraw_and_carry_the_figure_of_the_defaults(monkeypatch):
    widgets = pytest.importorskip("ipywidgets", reason="pip install 'simgrad[notebooks]'")
    boxes = []

    class Box(widgets.VBox):
        def __init__(self, children):
            super().__init__(children)
            boxes.append(self)

    monkeypatch.setattr(widgets, "VBox", Box)
    bundle = shown(monkeypatch, power=[0, 1, 2])
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    slider, image = boxes[0].children
    before = image.value
    slider.value = 2
    assert image.value != before
    slider.value = 1
    assert image.value == before
    assert not plt.get_fignums()


def test_without_widgets_the_figure_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    bundle = shown(monkeypatch, power=[0, 1, 2], height=[1.0, 2.0])
    assert set(bundle) == {"image/png", "text/plain"}
    assert len(bundle["image/png"]) > 1000


def test_sliders_refuse_what_draw_does_not_know(monkeypatch):
    with pytest.raises(ValueError, match="no argument 'colour'; it has: power, height"):
        sliders.explore(curve, colour=[1])
    with pytest.raises(ValueError, match=r"power: the default 1 is not among \[2, 3\]"):
        sliders.explore(curve, power=[2, 3])
