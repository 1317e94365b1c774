"""A finished output onto the Hub: access, verification, card, repository, upload, tag, in this order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lox_merge._version import __version__
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import Interrupted, RequestError
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.verify import raise_for_problems, verify
from lox_merge.publish.access import Target, check_can_push
from lox_merge.publish.card import Card, CardSettings
from lox_merge.publish.failures import Sent, explained_push, insistently
from lox_merge.publish.marks import ensure_pull_request, ensure_repository, ensure_tag
from lox_merge.publish.output import FinishedOutput, open_output
from lox_merge.publish.privacy import check_files
from lox_merge.publish.readme import card_to_publish
from lox_merge.publish.upload import Item, Remote, files_of_earlier_output, items_of, look, upload


@dataclass(frozen=True)
class PushPlan:
    """What would be published. unchanged: names that are on the Hub already; removed: files of an earlier output that would go."""

    target: Target
    output: FinishedOutput = field(repr=False)
    items: tuple[Item, ...] = field(repr=False)
    card: Card = field(repr=False)
    card_from: str
    unchanged: frozenset[str]
    removed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        files = [{"file": item.name, "size": item.size, "sha256": item.sha256, "unchanged": item.name in self.unchanged} for item in self.items]
        return {
            "command": "push",
            "dry_run": True,
            "repository": self.target.repo,
            "branch": self.target.branch,
            "pull_request": self.target.pull_request,
            "creates": not self.target.exists,
            "private": self.target.private,
            "files": files,
            "removes": list(self.removed),
            "card": self.card.content,
        }


@dataclass(frozen=True)
class PushResult:
    """What was published. url: of the commit's files, or of the pull request. tag: None for a pull request."""

    repository: str
    branch: str
    commit: str
    url: str
    tag: str | None
    private: bool
    created: bool
    sent: tuple[Item, ...]
    removed: tuple[str, ...]
    files: int

    def to_json(self) -> dict[str, Any]:
        sent = [{"file": item.name, "size": item.size, "sha256": item.sha256} for item in self.sent]
        same = {key: getattr(self, key) for key in ("repository", "branch", "commit", "url", "tag", "private", "created", "files")}
        return {"command": "push", "dry_run": False, **same, "sent": sent, "removed": list(self.removed)}


@dataclass(frozen=True)
class Verifying:
    """How much is verified before publishing: hashes and structure always; recompute: the weights too, all or `sample` tensors."""

    recompute: bool = False
    sample: int | None = None
    device: torch.device | None = None
    progress: Progress | None = None


def plan_push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    settings: CardSettings | None = None,
    verifying: Verifying | None = None,
) -> PushPlan:
    """Everything but the publishing. Raises OutputError for what is no finished output, RequestError for access and licence,
    LoxMergeError where the output is not what its manifest says.
    """
    settings, verifying = settings or CardSettings(), verifying or Verifying()
    output = open_output(folder)
    target = check_can_push(repo, public=public, revision=revision, pull_request=pull_request)
    verified = verify(
        output.folder,
        base=settings.sources.get("base"),
        aligned=settings.sources.get("aligned"),
        sample=verifying.sample,
        offline=not verifying.recompute,
        device=verifying.device,
        cache_dir=settings.cache_dir,
        progress=verifying.progress,
    )
    raise_for_problems(verified)
    return assemble(target, output, settings)


def assemble(target: Target, output: FinishedOutput, settings: CardSettings, held: Sequence[Item] = ()) -> PushPlan:
    """The plan for an output that was looked through. held: its shards, where the Hub holds them and the folder does not."""
    repo = target.repo
    card, card_from = card_to_publish(output, repo, settings)
    items = [*held, *items_of(output, card.files)]
    check_files({item.name: item.content for item in items if not item.held_by_hub}, output.folder)
    with explained_push(repo):
        validate_card(card)
        there = look(repo, target.branch) if target.exists and target.branch_exists else Remote("", {})
        removed = there.obsolete(items, files_of_earlier_output(repo, there))
    missing = {item.name for item in there.differs(items)}
    unchanged = frozenset(item.name for item in items) - missing
    return PushPlan(target, output, tuple(items), card, card_from, unchanged, tuple(removed))


def push(plan: PushPlan) -> PushResult:
    """Publishes a plan. Called again after a failure it goes on. Raises RequestError, PublishError or SourceChangedError."""
    target = plan.target
    title = f"LoX-hardened weights (lox-merge {__version__}, manifest {plan.output.manifest_sha256[:12]})"
    sent = Sent(any(item.held_by_hub for item in plan.items))
    try:
        with explained_push(target.repo, sent), quiet():
            created = ensure_repository(target)
            branch, url = target.branch, None
            if target.pull_request:
                branch, url = ensure_pull_request(target, title, "Made and verified with lox-merge; README.md and lox_merge.json say how.")
            earlier = files_of_earlier_output(target.repo, look(target.repo, branch))
            done = upload(target.repo, branch, plan.items, title, earlier=earlier, sent=sent)
            tag = None if branch.startswith("refs/") else ensure_tag(target.repo, done.commit)
    except KeyboardInterrupt:
        kept = f". What was uploaded to {target.repo} is kept and stays out of sight" if sent.any else ""
        raise Interrupted(f"interrupted{kept}; run the same command again to go on.") from None
    return PushResult(
        repository=target.repo,
        branch=branch,
        commit=done.commit,
        url=url or _address(target.repo, tag),
        tag=tag,
        private=target.private,
        created=created,
        sent=done.sent,
        removed=done.removed,
        files=len(plan.items),
    )


def _address(repo: str, tag: str | None) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}" + (f"/tree/{tag}" if tag else "")


def validate_card(card: Card, remedy: str = "Correct README.md, or --license.") -> None:
    """The Hub's own check of the metadata. Raises RequestError for what it does not take."""
    from huggingface_hub import ModelCard

    try:
        insistently(lambda: ModelCard(card.content).validate())
    except ValueError as error:
        raise RequestError(f"the Hub does not accept the metadata of the card: {_reasons(str(error))}. {remedy}") from error


def _reasons(answer: str) -> str:
    """The messages in the Hub's JSON, or the answer as it is."""
    try:
        return "; ".join(str(problem["message"]) for problem in parse_json(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return answer.splitlines()[0] if answer else "it does not say why"


@contextmanager
def quiet() -> Iterator[None]:
    """The library's warnings hold addresses with signatures, and every failure is told by us; its bars belong on a terminal only."""
    import sys

    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars and not sys.stderr.isatty():
            enable_progress_bars()
