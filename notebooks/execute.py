"""Execute notebooks in place, to the same bytes every time: ``python notebooks/execute.py [NAMES]``."""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # it warns where torch is not installed
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def execute(path: Path) -> None:
    """Run all cells in a fresh kernel and write the notebook with its outputs and nothing of when and where."""
    notebook = nbformat.read(path, as_version=4)
    quiet = {"store_widget_state": False, "record_timing": False, "coalesce_streams": True}
    NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}, **quiet
    ).execute()
    notebook.metadata = KERNEL | {"language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            output.pop("transient", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in [HERE / f"{Path(name).stem}.ipynb" for name in sys.argv[1:]] or sorted(
        HERE.glob("*.ipynb")
    ):
        begin = time.perf_counter()
        execute(path)
        print(
            f"{path.stem}: {time.perf_counter() - begin:.0f} s, {path.stat().st_size / 1000:.0f} kB"
        )
