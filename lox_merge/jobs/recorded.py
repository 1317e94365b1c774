"""Shapes of the JSON that this program wrote once and reads back: it lies in folders that others may have changed, or made."""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AllowInfNan, BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator

from lox_merge.checkpoint.files import check_file_name
from lox_merge.errors import CheckpointFormatError


def _inside(name: str) -> str:
    try:
        check_file_name(name, "it")
    except CheckpointFormatError as error:
        raise ValueError(str(error)) from None
    return name


def _with_a_square(norm: float) -> float:
    if 0 < norm < _SMALLEST:
        raise ValueError("a norm that no float32 matrix has")
    return norm


# Norms of float32 matrices: one entry of the smallest size, and far more entries of the largest than any matrix has. Squares of both are
# float64 numbers, and quotients of those are.
_SMALLEST, _LARGEST = 1e-45, 1e45
# Of a singular value: what is reached is below 1. The bounds that are made of it are finite numbers, too.
_LARGEST_RESIDUAL = 1e6

FileName = Annotated[str, AfterValidator(_inside)]
# Not '1', not true.
Count = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Size = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=_LARGEST)]
Norm = Annotated[Size, AfterValidator(_with_a_square)]
Residual = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=_LARGEST_RESIDUAL)]
# A whole number as text, of no more digits than a finite float has: such a rank is never a share or an energy.
FixedRank = Annotated[str, Strict(), Field(pattern=r"^[1-9][0-9]{0,307}$")]
# What torch takes as a seed.
Seed = Annotated[int, Strict(), Field(ge=-(2**63), lt=2**64)]
Flag = Annotated[bool, Strict()]
Sides = Annotated[list[Count], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    """Fields that are not named here are left alone: checks are about what is read."""

    model_config = ConfigDict(extra="ignore")


class _Stored(_Part):
    file: FileName
    size: Count
    sha256: str


class _Hashed(_Part):
    size: Count
    sha256: str


class _Identity(_Part):
    kind: Literal["hub", "folder"]
    name: str
    revision: str | None = None
    commit: str | None = None
    form: str | None = None

    @model_validator(mode="after")
    def _has_commit(self) -> _Identity:
        if self.kind == "hub" and not self.commit:
            raise ValueError("a source on the Hub without its commit")
        return self


class _Source(_Identity):
    files: dict[FileName, _Hashed]


class _Headers(_Identity):
    headers: dict[str, str]


class _Tool(_Part):
    name: str
    version: str
    torch: str


class _Triplets(_Part):
    rank: FixedRank
    tolerance: Number
    seed: Seed


class _Job(_Part):
    tool: _Tool
    method: str
    device: str
    recipe: dict[str, Any]
    factors: _Triplets | None = None
    base: _Headers
    aligned: _Headers
    finetuned: _Headers | None = None


class _Sources(_Part):
    model_config = ConfigDict(extra="forbid")  # readers go through all of them

    base: _Source
    aligned: _Source
    finetuned: _Source | None = None


class _Realised(_Part):
    gain: Number | None
    intended_norm: Number


class _Certificate(_Part):
    angle_bound: Number | None
    ambiguous: Flag | None


class _Matrix(_Part):
    part: str
    shape: Sides
    rank: Count | Literal["full"] | None
    certificate: _Certificate | None
    realised: _Realised | None


class _LoxMatrix(_Matrix):
    delta_norm: Number
    r_align: Number | None
    singular_values: list[Number] | None


class _FilterMatrix(_Matrix):
    decision: str | None
    finetuned_norm: Number
    cosine: Number | None
    kept: Number | None
    kept_random: Number | None
    energy_kept: Number | None
    method: str | None


class _LeftOut(_Part):
    reason: str
    intended_norm: Number


class _Tensor(_Part):
    name: str
    shape: list[Count]
    dtype: str
    action: Literal["edited", "copied"]
    reason: str | None = None
    alpha: Number | None = None
    factors: list[str] = []
    left_out: _LeftOut | None = None


class _LoxTensor(_Tensor):
    matrices: list[_LoxMatrix] = []


class _FilterTensor(_Tensor):
    matrices: list[_FilterMatrix] = []


class _Output(_Part):
    form: str = "checkpoint"
    shards: list[_Stored]
    files: dict[FileName, str]


class _Adapter(_Part):
    dtype: str
    left_out_share: Number | None


class _LoxSummary(_Part):
    edited_tensors: Count
    edited_matrices: Count
    copied_tensors: Count
    zero_deltas: Count
    mean_rank: Number | None
    mean_r_align: Number | None
    energy_r_align: Number | None
    realised_gain: Number | None
    smallest_gain: Number | None
    smallest_gain_tensor: str | None
    largest_angle_bound: Number | None
    largest_angle_tensor: str | None
    ambiguous_matrices: Count


class _Manifest(_Part):
    format: Literal[1]
    job: _Job
    sources: _Sources
    output: _Output
    warnings: list[str]
    confirmed: list[Literal["order", "base"]] = []
    adapter: _Adapter | None = None


class _LoxManifest(_Manifest):
    summary: _LoxSummary
    tensors: list[_LoxTensor]


class _FilterManifest(_Manifest):
    summary: dict[str, Any]
    tensors: list[_FilterTensor]


class _Selection(_Part):
    rank: FixedRank
    tolerance: Number
    seed: Seed
    include: list[str]
    exclude: list[str]
    linear_only: Flag
    fused: str
    skip_non_finite: Flag


class _FactorsJob(_Part):
    recipe: _Selection


class _Spectral(_Part):
    method: str
    residual: Residual
    next_singular_value: Size | None
    passes: Count


class _Decomposed(_Part):
    name: str
    part: str
    shape: Sides
    rank: Count
    norm: Norm
    noise_edge: Size
    complete: Flag
    certificate: _Spectral

    @model_validator(mode="after")
    def _has_a_norm(self) -> _Decomposed:
        if self.rank and not self.norm:
            raise ValueError("directions of a matrix whose norm is 0")
        return self


class _Piece(_Decomposed):
    values: list[Number]


class _Factors(_Part):
    job: _FactorsJob
    sources: _Sources
    warnings: list[str]
    non_finite: list[str]
    matrices: list[_Decomposed]


class _Record(_Part):
    output: _Stored
    sources: dict[Literal["base", "aligned", "finetuned"], dict[str, str]]


class _ShardRecord(_Record):
    tensors: list[_LoxTensor] | list[_FilterTensor]


class _PieceRecord(_Record):
    matrices: list[_Piece]
    skipped: list[str]


def manifest_damage(manifest: dict[str, Any]) -> str | None:
    """What a manifest lacks of what is read of it, or has of another kind; None for a sound one."""
    job = manifest.get("job")
    return _damage(_FilterManifest if isinstance(job, dict) and job.get("method") == "project" else _LoxManifest, manifest)


def factors_damage(document: dict[str, Any]) -> str | None:
    """The same of the document in a file of factors."""
    return _damage(_Factors, document)


def sources_damage(sources: Any) -> str | None:
    """The same of sources alone, as a study keeps them."""
    return _damage(_Sources, sources)


def record_damage(record: dict[str, Any]) -> str | None:
    """The same of the record of a finished shard, or of a piece of factors."""
    return _damage(_PieceRecord if "skipped" in record else _ShardRecord, record)


@cache
def _adapter(shape: type[_Part]) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _damage(shape: type[_Part], value: Any) -> str | None:
    try:
        _adapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {'missing' if first['type'] == 'missing' else first['msg']}"
    try:  # what is kept of it, its shape not looked at, is written again
        json.dumps(value, allow_nan=False)
    except ValueError:
        return "a number that is not finite"
    return None
