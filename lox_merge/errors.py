"""Typed errors. Each message says what is wrong, where, and what to do next; the command line prints it as it is."""

from __future__ import annotations

from collections.abc import Sequence


class LoxMergeError(Exception):
    """Work that was asked for correctly failed (the command line exits with 1)."""

    exit_code = 1


class RequestError(LoxMergeError):
    """The request cannot be carried out as asked (the command line exits with 2)."""

    exit_code = 2


class RecipeError(RequestError):
    """A setting has a value that is not allowed."""


class SourceError(RequestError):
    """A checkpoint cannot be found, reached or read."""


class CheckpointFormatError(SourceError):
    """A checkpoint's files are damaged, incomplete, or point outside their folder."""


class OutputError(RequestError):
    """The output folder cannot be used as asked."""


class PlanError(RequestError):
    """Preflight found problems. `problems` holds one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        if count == 1:
            message = self.problems[0]
        else:
            message = f"{count} problems, nothing was written:\n" + "\n".join(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))
        super().__init__(message)

    def __reduce__(self) -> tuple[type[PlanError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)  # an exception is made again from what it was made from, not from its message


class NumericalError(LoxMergeError):
    """A computation met values it cannot work with, or did not converge."""


class NonFiniteDeltaError(NumericalError):
    """Alignment deltas hold NaN or Inf. `counts` maps tensor name to the number of such entries."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.counts = dict(counts)
        shown = "; ".join(f"{name}: {count:,} of them" for name, count in list(self.counts.items())[:8])
        more = f"; and {len(self.counts) - 8} more tensors" if len(self.counts) > 8 else ""
        super().__init__(
            f"NaN or Inf in the delta of {len(self.counts)} tensor(s): {shown}{more}. "
            "One of the checkpoints is damaged or overflowed. Nothing was kept of this run. "
            "Repair the checkpoint, or pass --skip-non-finite to copy these tensors from the aligned model unchanged."
        )

    def __reduce__(self) -> tuple[type[NonFiniteDeltaError], tuple[dict[str, int]]]:
        return type(self), (self.counts,)


class WriteError(LoxMergeError):
    """Output could not be written. What was finished before stays and can be resumed."""


class SourceChangedError(LoxMergeError):
    """A source file changed while it was being used, or between a run and its resumption."""


class PublishError(LoxMergeError):
    """The Hub, or the way to it, failed while publishing. What was uploaded stays there, unseen, and the same command goes on."""


class Interrupted(LoxMergeError):
    """The user stopped the job. What was finished stays and can be resumed."""


class LoxMergeWarning(UserWarning):
    """Something was done in another way than the plain reading of the request; the text names it."""
