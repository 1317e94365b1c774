"""A file of factors: leading singular triplets of every delta of one pair, for later commands to use without an SVD.

One safetensors file: `<tensor><part>.left` (d_out, k) and `.right` (d_in, k) in float32, `.values` (k,) in float64. What is
needed to trust them (certificates, norms, fingerprints of both sources) is JSON in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.checkpoint.safetensors_format import Header, read_header
from lox_merge.checkpoint.weights import SafetensorsFile
from lox_merge.errors import CheckpointFormatError, RequestError
from lox_merge.jobs.atomic import sha256_of
from lox_merge.jobs.recipe import Recipe
from lox_merge.maths.subspace import Certificate, Subspace

METADATA_KEY = "lox_merge_factors"
FORMAT = 1
# The settings of a recipe that decide which triplets there are; alpha, rounding and dtype come later.
SELECTION = ("include", "exclude", "linear_only", "fused", "skip_non_finite")
# No singular value is above the norm, but for the rounding of both.
_ROUNDED = 1.001


@dataclass(frozen=True)
class MatrixRecord:
    """What is known of one matrix beside its vectors.

    norm: ||Delta||_F. noise_edge: singular value that rounding of the aligned weights alone would give. complete: whether
    every direction above working precision is held, so that no higher rank exists.
    """

    name: str
    part: str
    shape: tuple[int, int]
    rank: int
    norm: float
    noise_edge: float
    complete: bool
    certificate: dict[str, Any]


class Factors:
    """An open file of factors. Vectors are mapped from disk when asked for.

    rank: the number of triplets that was asked for; a matrix holds fewer where it has no more.
    """

    def __init__(self, path: Path, document: dict[str, Any], file: SafetensorsFile) -> None:
        self.path, self.document, self._file = path, document, file
        self.rank = int(document["job"]["recipe"]["rank"])
        names = [field.name for field in fields(MatrixRecord)]
        entries = [{name: entry[name] for name in names} | {"shape": tuple(entry["shape"])} for entry in document["matrices"]]
        self.matrices = {(entry["name"], entry["part"]): MatrixRecord(**entry) for entry in entries}

    def __reduce__(self) -> tuple[Callable[[Path], Factors], tuple[Path]]:
        return Factors.open, (self.path.absolute(),)  # another process maps the file itself

    @classmethod
    def open(cls, path: str | Path) -> Factors:
        """Maps a file that `lox-merge decompose` wrote. Raises RequestError for anything else."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise RequestError(f"there is no file of factors {file}. Make it: lox-merge decompose BASE ALIGNED {file}")
        try:
            header = read_header(file, file.name)
        except CheckpointFormatError as error:
            raise RequestError(f"factors: {error}") from error
        document = read_document(header.metadata)
        if document is None:
            raise RequestError(f"{file.name} holds no factors of lox-merge. Make them: lox-merge decompose BASE ALIGNED FILE")
        # Here, because pydantic takes a tenth of a second to import and few runs read factors.
        from lox_merge.jobs.recorded import factors_damage

        damage = factors_damage(document) or _missing_vectors(document, header)
        if damage:
            raise _damaged(file.name, damage)
        return cls(file, document, SafetensorsFile(file, header, file.name))

    @property
    def recipe(self) -> Recipe:
        """The settings that decide which matrices were decomposed, and into how many triplets."""
        settings = self.document["job"]["recipe"]
        return Recipe(rank=self.rank, tolerance=settings["tolerance"], seed=settings["seed"], **{key: settings[key] for key in SELECTION})

    @property
    def titles(self) -> tuple[str, str]:
        """Names of base and aligned as they were given."""
        sources = self.document["sources"]
        return _title(sources["base"]), _title(sources["aligned"])

    def __contains__(self, matrix: tuple[str, str]) -> bool:
        return matrix in self.matrices

    def require(self, rank: int) -> None:
        """Raises RequestError for a rank above what is held."""
        if rank > self.rank:
            raise RequestError(
                f"rank {rank} is asked and {self.path.name} holds {self.rank} triplets per matrix. "
                f"Ask for at most {self.rank}, or decompose again with --rank {rank}."
            )

    def subspace(self, name: str, part: str = "", rank: int | None = None) -> Subspace:
        """The triplets of one matrix: left (d_out, k) and right (d_in, k) float32, mapped (do not write to them).

        part: the label of a matrix inside a stacked tensor, such as '[3].gate'. rank: how many (default: all that are
        held); a matrix that has fewer directions gives those. Raises RequestError for a rank above what is held, or a
        matrix that was not decomposed.
        """
        if rank is not None:
            self.require(rank)
        record = self.matrices.get((name, part))
        if record is None:
            raise RequestError(
                f"{self.path.name} holds no factors of {name}{part}. Decompose again with settings that select it (--include, --exclude)."
            )
        found = record.certificate
        values = self._file.tensor(f"{name}{part}.values")
        # Not > and not <, or NaN would pass.
        if record.rank and not (float(values.min()) > 0 and float(values.max()) <= record.norm * _ROUNDED):
            raise _damaged(self.path.name, f"the singular values of {name}{part} are none of a matrix of norm {record.norm:g}")
        smallest = float(values[-1]) if record.rank else 0.0
        certificate = Certificate(found["method"], found["residual"], smallest, found["next_singular_value"], found["passes"])
        left, right = self._file.tensor(f"{name}{part}.left"), self._file.tensor(f"{name}{part}.right")
        subspace = Subspace(left, values, right, record.norm, certificate)
        return subspace if rank is None else subspace.truncate(min(rank, subspace.rank))

    def check(self, base: Checkpoint, aligned: Checkpoint) -> None:
        """Raises RequestError when these factors are of another pair; reads the weight files of local folders to tell."""
        sources = self.document["sources"]
        differences = [text for checkpoint in (base, aligned) if (text := source_difference(sources[checkpoint.role], checkpoint))]
        if differences:
            raise RequestError(
                f"{self.path.name} holds the factors of another pair: base {self.titles[0]}, aligned {self.titles[1]}; "
                f"given were base {base.title}, aligned {aligned.title} ({'; '.join(differences)}). "
                "Give that pair, or decompose this one: lox-merge decompose BASE ALIGNED FACTORS"
            )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Factors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def source_difference(recorded: dict[str, Any], checkpoint: Checkpoint) -> str | None:
    """What shows that `checkpoint` is not the source that was recorded (identity, and size and sha256 by file); None when it is."""
    identity = checkpoint.source.identity()
    if identity["kind"] == "hub" and identity.get("commit") == recorded.get("commit"):
        return None  # a commit fixes every byte
    headers = {file: header.file_size for file, header in checkpoint.weight_headers.items()}
    for file, entry in recorded["files"].items():
        if headers.get(file) != entry["size"]:
            return f"{checkpoint.role} has no {file} of {entry['size']:,} bytes"
    checkpoint.fetch(list(recorded["files"]))
    for file, entry in recorded["files"].items():
        if sha256_of(checkpoint.source.path(file)) != entry["sha256"]:
            return f"{checkpoint.role}: {file} has other contents"
    return None


@contextmanager
def open_factors(path: str | Path | None) -> Iterator[Factors | None]:
    """The factors in a file for the time of a `with` statement; None for none. Raises RequestError as `Factors.open`."""
    if path is None:
        yield None
        return
    with Factors.open(path) as factors:
        yield factors


def read_document(metadata: Any) -> dict[str, Any] | None:
    """The JSON that decompose wrote into a file's metadata; None where there is none that this version reads."""
    try:
        document = parse_json(metadata[METADATA_KEY])
    except (KeyError, TypeError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None


def _missing_vectors(document: dict[str, Any], header: Header) -> str | None:
    """Which tensor of the file is not what its document says of it; None where all are."""
    for entry in document["matrices"]:
        (rows, columns), rank = entry["shape"], entry["rank"]
        for what, dtype, shape in (("left", "F32", (rows, rank)), ("right", "F32", (columns, rank)), ("values", "F64", (rank,))):
            info = header.tensors.get(f"{entry['name']}{entry['part']}.{what}")
            if info is None or (info.dtype, info.shape) != (dtype, shape):
                return f"its {what} of {entry['name']}{entry['part']} is not {dtype} {list(shape)}"
    return None


def _damaged(file: str, damage: str) -> RequestError:
    return RequestError(f"{file} is damaged ({damage}). Make it again: lox-merge decompose BASE ALIGNED FILE --overwrite")


def _title(source: dict[str, Any]) -> str:
    return f"{source['name']}@{source['revision']}" if source.get("revision") else str(source["name"])
