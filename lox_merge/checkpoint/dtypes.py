"""Dtype names: safetensors' codes, PyTorch's dtypes, and the ones this package can edit or write.

No torch import at module level: the command line needs the names for its help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# safetensors code: (name in torch, bits per element)
_CODES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
# Sub-byte packed formats: no torch dtype to read them as, and never editable.
_PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_CODE_OF = {torch_name: code for code, (torch_name, _) in _CODES.items()}
_BITS = _PACKED_BITS | {code: count for code, (_, count) in _CODES.items()}

# What torch has a dtype for, by code and by its own name.
READABLE, TORCH_NAMES = frozenset(_CODES), frozenset(_CODE_OF)
EDITABLE = frozenset({"BF16", "F16", "F32", "F64"})
FP8 = frozenset(code for code in _CODES if code.startswith("F8_"))
OUTPUT_DTYPES = ("float32", "bfloat16", "float16")
OUTPUT_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def known(code: str) -> bool:
    return code in _BITS


def bits(code: str) -> int:
    """Bits of one element."""
    return _BITS[code]


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors code. KeyError for packed formats, which torch cannot read element by element."""
    import torch

    dtype: torch.dtype = getattr(torch, _CODES[code][0])
    return dtype


def code_of(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype. KeyError where there is none."""
    return _CODE_OF[str(dtype).removeprefix("torch.")]
