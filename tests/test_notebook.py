"""The notebook runs from its first cell to its last as it is stored, and shows what it says it shows."""

from __future__ import annotations

import base64
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from lab_fixtures import TOY_CACHE
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lox_merge.lab.checkpoints import ToyPair

NOTEBOOK = Path(__file__).parent.parent / "examples" / "inspect_weights.ipynb"


class ThisInterpreter(AsyncKernelManager):
    """A kernel of the Python that runs the tests, whatever kernels are installed on this machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python of the tests", language="python")


def execute(notebook: Any, folder: Path) -> Any:
    """`notebook` with its outputs; everything that a kernel writes is under `folder`. Raises CellExecutionError where a cell fails."""
    places = {name: str(folder / name) for name in ("IPYTHONDIR", "TMPDIR")}
    for place in places.values():
        Path(place).mkdir()
    here = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=300, kernel_manager_class=ThisInterpreter, resources=here)
    return client.execute(env={**os.environ, **places, "LOX_MERGE_CACHE": str(TOY_CACHE.parent)})


@pytest.fixture(autouse=True)
def own_connection_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))


def outputs(cell: Any) -> dict[str, str]:
    """What a cell shows, by MIME type; what it prints as 'stdout'."""
    found: dict[str, str] = {}
    for output in cell.outputs:
        shown = {output.name: output.text} if output.output_type == "stream" else output.get("data", {})
        for kind, text in shown.items():
            found[kind] = found.get(kind, "") + text
    return found


def test_the_notebook_runs_and_shows_figures_beside_chance(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    cells = {cell.id: outputs(cell) for cell in execute(stored, tmp_path).cells if cell.cell_type == "code"}
    table = cells["inspect"]["text/html"]
    assert "Alignment: base → aligned" in table and "Fine-tuning: aligned → new task" in table and "<th>random</th>" in table
    said = cells["attributes"]["stdout"]
    mean, expected, low, _high = (float(number) for number in re.findall(r"\d\.\d{3}", said))
    assert mean < low < expected and "\nless than chance would leave" in said and f"<td>{mean:.3f}</td><td>{expected:.3f}</td>" in table
    assert all(text in cells["pandas"]["text/html"] for text in ("embed_tokens", "q_proj", "new task.ratio"))
    assert base64.b64decode(cells["layers"]["image/png"]).startswith(b"\x89PNG")
    # The weakened model is gone with the kernel.
    assert not [file for file in tmp_path.rglob("*") if file.suffix == ".safetensors"]


def test_a_cell_that_raises_fails(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import lox_merge\nlox_merge.no_such_name")])
    with pytest.raises(CellExecutionError, match="no_such_name"):
        execute(notebook, tmp_path)
