"""A matrix takes as many cores as the engine says, in whichever thread and from its first product on: the number decides the bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# A process of its own, whose libraries take two cores where nobody says how many.
_PROGRAM = """
import json, sys
from pathlib import Path
import torch
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.harden import harden
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.work import Crew, CrewSize

folder = Path(sys.argv[1])
torch.manual_seed(0)
squares = [torch.randn(side, side, dtype=torch.float64) for side in (40, 75, 128, 300)]
vectors = lambda square: torch.linalg.eigh(square @ square.T if len(square) == 300 else square + square.T)[1]

def in_a_new_thread(square):
    crew = Crew(torch.device("cpu"), CrewSize(1, 1))
    with crew.threads():
        try:
            return crew.submit(vectors, square).result()
        finally:
            crew.close()

found = [in_a_new_thread(square) for square in squares]
torch.set_num_threads(1)
same = [torch.equal(one, vectors(square)) for one, square in zip(found, squares)]
torch.set_num_threads(2)
factors, manifests = set(), set()
for turn in range(3):
    decompose(folder / "base", folder / "aligned", folder / f"{turn}.safetensors", recipe=Recipe(rank=5))
    factors.add((folder / f"{turn}.safetensors").read_bytes())
    manifests.add((harden(folder / "base", folder / "aligned", folder / f"out{turn}").out / "lox_merge.json").read_bytes())
print(json.dumps({"same": same, "factors": len(factors), "manifests": len(manifests)}))
"""


def test_a_new_thread_computes_as_one_that_has_worked(tmp_path: Path) -> None:
    """Threads of a crew begin with another matrix in every run; all of them are small, but for a few."""
    generator = torch.Generator().manual_seed(1)
    base = {f"layers.{number}.weight": torch.randn(60, 90, generator=generator) for number in range(24)}
    base |= {f"layers.{number}.weight": torch.randn(300, 300, generator=generator) for number in (0, 9, 17)}
    aligned = {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in base.items()}
    for name, weights in (("base", base), ("aligned", aligned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"same": [True] * 4, "factors": 1, "manifests": 1}
