"""What torch.save keeps and safetensors cannot: refused when the file is opened, not at that tensor's turn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.materials import WEIGHTS, Materials
from safetensors.torch import load_file

from lox_merge import harden
from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.checkpoint.weights import TorchFile
from lox_merge.errors import CheckpointFormatError, LoxMergeWarning, PlanError


def pickled(materials: Materials, folder: Path, extra: dict[Any, torch.Tensor]) -> Path:
    """The aligned model as pytorch_model.bin, with more tensors."""
    shutil.copytree(materials.single, folder)
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state | extra, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("x", torch.zeros(3, dtype=torch.complex128), "tensor 'x' is of dtype complex128, which safetensors lacks"),
        (7, torch.zeros(3), "tensor 7 has a name of type int, not a text"),
        ("x\ud800", torch.zeros(3), r"tensor 'x\ud800' has a name with half a surrogate pair"),
        ("__metadata__", torch.zeros(3), "the name that safetensors keeps for metadata"),
        ("a\x1b[2J", torch.zeros(3), "control characters"),
        ("x", torch.zeros(3).to_sparse(), "is not dense (Tensor, sparse_coo)"),
        ("x", torch.zeros(3, device="meta"), "is on the meta device, without values"),
        ("x", torch.zeros(3, dtype=torch.complex64).conj(), "is a conjugate or negative view"),
        ("x", torch.zeros(3, dtype=torch.complex64).conj().imag, "is a conjugate or negative view"),
        ("x", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "is not dense (NestedTensor, nested)"),
    ],
)
def test_what_no_safetensors_file_holds(materials: Materials, tmp_path: Path, name: Any, tensor: torch.Tensor, words: str) -> None:
    aligned = pickled(materials, tmp_path / "aligned", {name: tensor})
    with pytest.raises(CheckpointFormatError) as caught:
        TorchFile(aligned / "pytorch_model.bin", "the file")
    assert words in str(caught.value) and str(caught.value).startswith("the file") and str(caught.value).isprintable()
    with pytest.warns(LoxMergeWarning, match="read with"), pytest.raises(PlanError, match=r"aligned/pytorch_model\.bin"):
        harden(materials.base, aligned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # torch's, that these tensors are on their way out
def test_quantised_tensors_of_torch(tmp_path: Path) -> None:
    torch.save({"x": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8)}, tmp_path / "file.bin")
    with pytest.raises(CheckpointFormatError, match="is of dtype quint8"):
        TorchFile(tmp_path / "file.bin", "the file")


def test_parameters_and_views_are_plain_tensors(materials: Materials, tmp_path: Path) -> None:
    extra = {"p": torch.nn.Parameter(torch.ones(2)), "t": torch.arange(6).view(2, 3).T, "e": torch.ones(1, 1).expand(2, 2)}
    aligned = pickled(materials, tmp_path / "aligned", extra)
    with pytest.warns(LoxMergeWarning, match="read with"):
        checkpoint = open_checkpoint(aligned, "aligned")
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in extra.items())
    checkpoint.close()


def test_dtypes_have_codes_or_one_error() -> None:
    assert all(dtypes.code_of(dtypes.torch_dtype(code)) == code for code in dtypes.READABLE)
    with pytest.raises(KeyError):
        dtypes.code_of(torch.complex128)
