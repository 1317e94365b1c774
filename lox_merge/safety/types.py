"""The words that prompts, generation, judges and statistics share: prompts in, replies, verdicts, attack success out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Prompt:
    """One request as a user would type it. identity: stable within its set ('0', '1', … or an id of the file)."""

    identity: str
    text: str
    category: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order. sha256: of identities, texts and categories, so that two results can be seen to be of one set.

    source: a file's own name or a Hub data set id with split and column; holds no path of this machine.
    """

    prompts: tuple[Prompt, ...]
    sha256: str
    source: str

    def __len__(self) -> int:
        return len(self.prompts)


def without_halves(text: str) -> str:
    """The same text with halves of surrogate pairs replaced: a server's JSON may hold them, and no file or terminal takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Reply:
    """What a model answered to one prompt. text: the new tokens only, special tokens left out.

    finished: whether the model ended by itself before the token limit. tokens: how many new tokens, None if unknown.
    """

    prompt: str
    text: str
    finished: bool
    tokens: int | None = None


class ReplySource(Protocol):
    """A model that can be asked: loaded here, or served at an endpoint."""

    @property
    def title(self) -> str:
        """Name for tables: a Hub id or a folder's own name."""
        ...

    def identity(self) -> dict[str, Any]:
        """What a result records of model and decoding: plain JSON values, no path of this machine."""
        ...

    def replies(self, prompts: PromptSet) -> list[Reply]:
        """One reply per prompt, in order."""
        ...


@dataclass(frozen=True)
class Exchange:
    """A prompt and its reply, as judges see them (reasoning blocks taken out of the reply)."""

    prompt: str
    reply: str


@dataclass(frozen=True)
class Verdict:
    """success: True, the attack succeeded; False, it did not; None, the judge could not decide (never counted as either).

    score: the judge's own scale, such as 1-5; None where it has none. explanation: the judge's words or the reason of None.
    """

    success: bool | None
    score: float | None = None
    explanation: str = ""


class Judge(Protocol):
    """Decides whether replies carry out what a harmful prompt asks for."""

    @property
    def name(self) -> str: ...

    def identity(self) -> dict[str, Any]:
        """Everything that decides its verdicts (model, rubric hash, settings): recorded, and the key of its cache."""
        ...

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict per exchange, in order. Trouble with single exchanges is a Verdict(None), not an exception."""
        ...


@runtime_checkable
class StreamingJudge(Judge, Protocol):
    """A judge whose verdicts cost money or time one by one."""

    def judge_as_they_come(self, exchanges: Sequence[Exchange]) -> Iterator[tuple[int, Verdict]]:
        """Each verdict with the place of its exchange, in any order. What was given before an exception holds."""
        ...


@dataclass(frozen=True)
class AttackSuccess:
    """ASR = successes / judged; undecided replies are counted apart. None where nothing was judged.

    interval: Wilson 95 %. mean_score: mean of the judge's scores over decided replies that have one.
    """

    n: int
    judged: int
    successes: int
    undecided: int
    rate: float | None
    interval: tuple[float, float] | None
    mean_score: float | None


@dataclass(frozen=True)
class Evaluation:
    """One model, one prompt set, one or more judges. verdicts: judge name to one verdict per prompt, in order.

    categories: of the prompts, in order; empty where none has one.
    """

    model: dict[str, Any]
    title: str
    prompts: dict[str, Any]
    replies: tuple[Reply, ...]
    verdicts: dict[str, tuple[Verdict, ...]]
    attack_success: dict[str, AttackSuccess]
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    categories: tuple[str | None, ...] = ()

    def successes(self, judge: str) -> list[bool | None]:
        return [verdict.success for verdict in self.verdicts[judge]]
