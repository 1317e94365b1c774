"""Any inspect_ai scorer as judge."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.safety.judges.loading import finite_threshold, load_object, source_hash
from lox_merge.safety.types import Exchange, Verdict


class InspectJudge:
    """A scorer by its registered name (`package/scorer`) or as `module:function` or `file.py:function`, called without arguments.

    It sees the prompt as input, the reply as the model's output, and an empty target. Of its values, C(orrect) and true mean
    that the attack succeeded, I(ncorrect) and false that it did not; a number is a score and a success from the threshold on;
    everything else (N, P, NaN, several values) is undecided, and so is a scorer that fails. Scorers that ask a model take it
    from inspect_ai's own settings (INSPECT_EVAL_MODEL, model roles).
    """

    def __init__(self, scorer: str, *, threshold: float = 0.5) -> None:
        """Raises RequestError for a missing extra, a scorer that is not there, or a threshold that is not finite."""
        try:
            import inspect_ai  # noqa: F401
        except ImportError as error:
            raise RequestError("the judge inspect: needs the inspect_ai library: pip install 'lox-merge[inspect]'.") from error
        self._text, self._threshold = scorer, finite_threshold(threshold)
        self._factory, self._scorer = _find(scorer)

    @property
    def name(self) -> str:
        return f"inspect:{self._text.replace(chr(92), '/').rpartition('/')[2] if ':' in self._text else self._text}"

    def identity(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "kind": "inspect",
            "scorer": self.name,
            "source_sha256": source_hash(self._text, self._factory),
            "inspect_ai": version("inspect-ai"),
            "threshold": self._threshold,
        }

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        import anyio

        async def all_of_them() -> list[Verdict]:
            return [await self._verdict(exchange) for exchange in exchanges]

        return anyio.run(all_of_them)

    async def _verdict(self, exchange: Exchange) -> Verdict:
        from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelName, ModelOutput
        from inspect_ai.scorer import Target
        from inspect_ai.solver import TaskState

        state = TaskState(
            model=ModelName("lox_merge/replies"),
            sample_id=0,
            epoch=1,
            input=exchange.prompt,
            messages=[ChatMessageUser(content=exchange.prompt), ChatMessageAssistant(content=exchange.reply)],
            output=ModelOutput.from_content("lox_merge/replies", exchange.reply),
            completed=True,
        )
        try:
            score = await self._scorer(state, Target(""))
            if score is None:
                return Verdict(None, None, "the scorer gave no score")
            return self._read(score.value, str(score.explanation or ""))
        except (Exception, SystemExit) as error:  # a scorer's own code, and what it gives
            return Verdict(None, None, f"the scorer failed: {type(error).__name__}: {error}")

    def _read(self, value: Any, explanation: str) -> Verdict:
        if isinstance(value, bool) or value in ("C", "I"):
            return Verdict(value is True or value == "C", None, explanation)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return Verdict(value >= self._threshold, float(value), explanation)
        return Verdict(None, None, f"the scorer's value {value!r} decides nothing. {explanation}".strip())


def _find(text: str) -> tuple[Any, Any]:
    """The function that makes the scorer, and the scorer."""
    from inspect_ai.util import registry_create

    if ":" in text:
        factory = load_object(text, "the judge inspect:")
        try:
            return factory, factory()
        except Exception as error:
            raise RequestError(f"the scorer inspect:{text} can't be made: {type(error).__name__}: {error}") from error
    package = text.partition("/")[0]
    try:
        importlib.import_module(package)  # registers its scorers, if it has no entry point that does
    except ImportError as error:
        raise RequestError(f"the judge inspect:{text}: the package {package} can't be imported: {error}. Install it.") from error
    try:
        scorer = registry_create("scorer", text)
    except Exception as error:  # inspect_ai raises LookupError for an unknown name, and whatever a factory raises
        raise RequestError(f"the scorer inspect:{text} can't be made: {type(error).__name__}: {error}") from error
    return scorer, scorer
