"""The code cells of a notebook at reduced size, in a process of its own: ``notebook_runs.py NAME
PARAMETERS``."""

import os
import sys
import warnings
from pathlib import Path

if (
    __name__ == "__main__"
):  # collecting doctests imports this file, and must leave the suite's flags alone
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    os.environ["MPLBACKEND"] = "agg"

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WORLDS = ("percentiles", "suffix", "refusals", "verdicts")


def small_worlds():
    """Pretraining of a few steps, enough to have words and gradients."""
    from simgrad import worlds
    from simgrad.worlds import Pretraining

    for name in WORLDS:
        type(worlds.get(name)).pretraining = Pretraining(steps=30, batch_size=8, warmup=5)


def run(name, parameters):
    """Every code cell in order, the one tagged ``parameters`` replaced."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    scope = {"__name__": "__main__"}
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            source = parameters if "parameters" in cell.metadata.get("tags", []) else cell.source
            exec(compile(source, f"{name}, cell {i}", "exec"), scope)


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", ".*non-interactive.*|.*FigureCanvasAgg.*")
    import IPython.display

    IPython.display.display = lambda *shown, **options: None
    small_worlds()
    run(*sys.argv[1:])
