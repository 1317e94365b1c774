"""A repository as the place where workers send finished shards: out of sight until a commit names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lox_merge.errors import PublishError, RequestError
from lox_merge.publish.access import Target, check_write, check_xet
from lox_merge.publish.failures import Sent, explained_push, insistently, no_token
from lox_merge.publish.marks import ensure_repository
from lox_merge.publish.output import OutputFile
from lox_merge.publish.upload import Item, send


@dataclass(frozen=True)
class HubStore:
    """See jobs.store.Store. endpoint: the Hub of the one who gives orders. Every machine uses the access token that it is logged in with."""

    target: Target
    endpoint: str

    @classmethod
    def of(cls, target: Target) -> HubStore:
        from huggingface_hub import constants

        return cls(target, constants.ENDPOINT)

    @property
    def repo(self) -> str:
        return self.target.repo

    @property
    def identity(self) -> dict[str, str]:
        return {"repository": self.repo, "branch": self.target.branch}

    def prepare(self) -> None:
        """Makes the repository, empty, where it is not there: uploads need one."""
        with explained_push(self.repo):
            ensure_repository(self.target)

    def check_here(self) -> None:
        from huggingface_hub import constants, get_token, is_offline_mode
        from huggingface_hub.utils import disable_progress_bars, logging

        if is_offline_mode():
            raise RequestError("It is in offline mode. Unset HF_HUB_OFFLINE there.")
        if self.endpoint != constants.ENDPOINT:
            raise RequestError("It talks to another Hub than the machine that gave the order. Set HF_ENDPOINT alike on all machines.")
        if get_token() is None:
            raise no_token()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        disable_progress_bars()
        with explained_push(self.repo):
            check_write(self.repo)

    def send(self, file: str, path: Path, size: int, sha256: str) -> None:
        from huggingface_hub import CommitOperationAdd

        status = path.stat()
        item = Item(file, size, sha256, None, OutputFile(file, path, sha256, (status.st_size, status.st_mtime_ns)))
        with explained_push(self.repo, Sent(any=True)):  # shards before this one
            check_xet(self.repo, self.target.branch)
            addition = CommitOperationAdd(file, path)
            insistently(lambda: send(self.repo, self.target.branch, [item], [addition]))
        if addition._upload_mode != "lfs":
            raise PublishError(
                f"{self.repo}: its .gitattributes has {file} in git itself, where a shard cannot be put ahead of the commit. "
                "Add a line for *.safetensors there, and run the same command again."
            )
