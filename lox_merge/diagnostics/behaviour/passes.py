"""One forward pass per model and batch: log-probabilities of the texts' own tokens, KL from the base model, distributions after prefixes.

Models that are in memory together go through the batches side by side; others one after another, with the base model's
log-probabilities on disk. Both ways give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from lox_merge.diagnostics.behaviour.spool import Spool
from lox_merge.diagnostics.behaviour.texts import Reading
from lox_merge.errors import NumericalError, RequestError
from lox_merge.maths.distributions import entropy, kl_divergence, restricted
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.log_probabilities import ROWS, log_probabilities
from lox_merge.safety.model_set import ModelSet
from lox_merge.safety.progress import CountProgress, ProgressFactory

Vector = numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]


@dataclass(frozen=True)
class Scores:
    """One model on one text, a number a scored token, float64 (of float32 scores), nats.

    log_probabilities: of the token that is there. entropy: of what was expected in its place. divergence: KL(model ‖ base) there,
    None for the base model itself.
    """

    log_probabilities: Vector
    entropy: Vector
    divergence: Vector | None


@dataclass
class Findings:
    """One model. texts: by number. prefixes: (vocabulary,) float32 log-probabilities after each, on the CPU. dtype: of its weights."""

    texts: dict[int, Scores] = field(default_factory=dict)
    prefixes: dict[int, Tensor] = field(default_factory=dict)
    dtype: str = ""


class Reader:
    """Lets every model of a set read the same tokens. The first model is the one that others are compared with.

    size: token numbers that count; models that score more are renormalised over these.
    """

    def __init__(self, reading: Reading, size: int, *, batch_size: int | None = None) -> None:
        self._reading, self._texts = reading, reading.texts
        # What a text's last token is followed by is of no interest.
        self._rows = [text.tokens[:-1] for text in self._texts] + list(reading.prefixes)
        self._positions = [range(text.start - 1, len(text.tokens) - 1) for text in self._texts]
        self._positions += [range(len(prefix) - 1, len(prefix)) for prefix in reading.prefixes]
        self._size, self._batch_size = size, batch_size or ROWS

    def read(self, models: ModelSet, progress: ProgressFactory, say: Callable[[str], None]) -> dict[str, Findings]:
        """Raises NumericalError for NaN and infinite divergence, RequestError where the disk lacks room."""
        found = {label: Findings() for label in models.labels}
        with progress(len(self._rows) * len(found), "reading") as bar:
            if models.together:
                self._side_by_side(models, found, bar)
            else:
                self._in_turn(models, found, bar, say)
        return found

    def _side_by_side(self, models: ModelSet, found: dict[str, Findings], bar: CountProgress) -> None:
        streams = [self._stream(models.get(label), found[label]) for label in found]
        for row in zip(*streams, strict=True):
            for label, (number, values) in zip(found, row, strict=True):
                self._take(label, found[label], number, values, None if values is row[0][1] else row[0][1])
                bar.advance(1)

    def _in_turn(self, models: ModelSet, found: dict[str, Findings], bar: CountProgress, say: Callable[[str], None]) -> None:
        first = next(iter(found))
        with Spool([len(text.scored) for text in self._texts], self._size) as spool:
            if spool.bytes and len(found) > 1:
                say(f"models are visited one after another; {first}'s log-probabilities take {spool.bytes / 1e6:,.1f} MB of temporary disk")
            for label in found:
                for number, values in self._stream(models.get(label), found[label]):
                    base = None
                    if number < len(self._texts):
                        if label == first:
                            spool.write(number, values)
                        else:
                            base = spool.read(number, values.device)
                    self._take(label, found[label], number, values, base)
                    bar.advance(1)

    def _stream(self, loaded: LoadedModel, found: Findings) -> Iterator[tuple[int, Tensor]]:
        found.dtype = str(loaded.model.dtype).removeprefix("torch.")
        for number, values in log_probabilities(loaded.model, self._rows, self._positions, batch_size=self._batch_size):
            if values.shape[1] < self._size:
                raise RequestError(f"{loaded.title} scores {values.shape[1]:,} tokens, fewer than its config says. Repair its config.json.")
            yield number, restricted(values, self._size)

    def _take(self, label: str, found: Findings, number: int, values: Tensor, base: Tensor | None) -> None:
        if number >= len(self._texts):
            found.prefixes[number - len(self._texts)] = values[0].cpu()
            return
        tokens = torch.tensor(self._texts[number].scored, device=values.device)
        own = values.gather(1, tokens[:, None])[:, 0]
        divergence = None if base is None else kl_divergence(values, base.to(values.device))
        for what, figures in (("log-probability of a token", own), ("KL from base", divergence)):
            if figures is not None and not bool(torch.isfinite(figures).all()):
                raise NumericalError(
                    f"{label}: the {what} is not finite in {self._reading.where(number)}: a model rules out what it reads or another one expects. "
                    "Leave the text out, or check the model's weights."
                )
        found.texts[number] = Scores(_vector(own), _vector(entropy(values)), None if divergence is None else _vector(divergence))


def _vector(values: Tensor) -> Vector:
    return numpy.asarray(values.double().cpu().numpy())
