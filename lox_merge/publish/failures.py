"""What goes wrong on the way to the Hub: tried again where that may help, and otherwise said in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from lox_merge.checkpoint.hub_failures import is_passing, kinds_of, quoted_reason, seconds_to_wait, server_message, status_of
from lox_merge.errors import LoxMergeError, PublishError, RequestError

T = TypeVar("T")

# Seconds before the further attempts. The library itself tries most requests five times before we hear of a failure.
_WAITS = (0.5, 2.0, 5.0)
# Longer than this nobody wants to watch; the message says when to come back.
_LONGEST_WAIT = 300
_AGAIN, _GO_ON = "Run the same command again.", "What was uploaded is kept; run the same command again to go on."
_QUOTA_WORDS = ("storage", "quota", "limit reached", "exceed", "upgrade")


def insistently(action: Callable[[], T], *, also: frozenset[int] = frozenset()) -> T:
    """Result of `action`, tried again after a broken connection, a Hub in trouble, or a request limit (after the time it names).

    `action` must look for what an earlier attempt did before doing it again: an answer can be lost after the work was done.
    also: further statuses to try again.
    """
    for wait in _WAITS:
        try:
            return action()
        except Exception as error:
            cause = _cause(error)
            status = status_of(cause)
            if status == 429:
                wait = seconds_to_wait(cause) or wait
                if wait > _LONGEST_WAIT:
                    raise
            elif status not in also and not is_passing(cause):
                raise
        time.sleep(wait)
    return action()


@dataclass
class Sent:
    """Whether anything was uploaded, which the same command need not upload again."""

    any: bool = False


@contextmanager
def explained_push(repo: str, sent: Sent | None = None) -> Iterator[None]:
    """Turns every failure of the Hub or the network inside the block into a RequestError (access) or a PublishError (the rest)."""
    try:
        yield
    except LoxMergeError:
        raise
    except Exception as error:
        # Broad on purpose, as in reading: the library's own errors, httpx's, hf_xet's, and RuntimeErrors around them.
        raise _explanation(_cause(error), repo, _GO_ON if sent and sent.any else _AGAIN) from error


def _cause(error: Exception) -> Exception:
    """What is behind "Error while uploading FILE to the Hub", and behind hf_xet's failure to get a token."""
    while status_of(error) is None and isinstance(error.__cause__, Exception) and isinstance(error, RuntimeError):
        error = error.__cause__
    return error


def _explanation(error: Exception, repo: str, go_on: str) -> LoxMergeError:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, LocalTokenNotFoundError):
        return no_token()
    if isinstance(error, OfflineModeIsEnabled):
        return RequestError(f"{repo}: nothing can be published in offline mode. Unset HF_HUB_OFFLINE.")
    if isinstance(error, RepositoryNotFoundError):
        return RequestError(
            f"{repo} was not found on the Hub{quoted_reason(error)}. Check the name, and with `hf auth whoami` whose token is in use."
        )
    status = status_of(error)
    if status is not None:
        return _refusal(error, status, repo, go_on)
    if "TimeoutException" in kinds_of(error) or isinstance(error, TimeoutError):
        return PublishError(f"{repo}: the Hub did not answer in time. {go_on}")
    if kinds_of(error) & {"ConnectError", "ProxyError", "UnsupportedProtocol", "InvalidURL"}:
        return PublishError(f"{repo}: the Hub cannot be reached. Check the network, the proxy and HF_ENDPOINT. {go_on}")
    if isinstance(error, ConnectionError) or "TransportError" in kinds_of(error):
        return PublishError(f"{repo}: the connection to the Hub broke. {go_on}")
    if isinstance(error, OSError) and error.errno is not None:
        return PublishError(f"{repo}: a file cannot be read: {error.strerror}. {go_on}")
    if isinstance(error, ValueError) and str(error).startswith("LFS batch API returned errors"):
        # One line for each file; the first says it.
        return PublishError(f"{repo}: the Hub does not take a file ({str(error).splitlines()[1].rpartition('`')[2]}). {go_on}")
    if "Xet" in type(error).__name__ or isinstance(error, RuntimeError):
        return PublishError(f"{repo}: the Hub's Xet storage did not take the files. {go_on} HF_HUB_DISABLE_XET=1 uploads in the plain way.")
    return PublishError(f"{repo}: what came back is not an answer of the Hub ({type(error).__name__}). Check the proxy and HF_ENDPOINT. {go_on}")


def _refusal(error: Exception, status: int, repo: str, go_on: str) -> LoxMergeError:
    """The Hub answered, but not with what was asked for. go_on: the end of the message, where trying again may help."""
    reason = quoted_reason(error)
    if status == 401:
        return RequestError(f"{repo}: the Hub does not accept your access token{reason}. Log in anew with `hf auth login`, or correct HF_TOKEN.")
    if status == 413 or (status in (402, 403) and any(word in server_message(error).lower() for word in _QUOTA_WORDS)):
        return PublishError(
            f"{repo}: the Hub does not take that much ({status}){reason}. Make room in your Hub storage, ask for more, or publish to another "
            f"namespace. {go_on}"
        )
    if status == 403:
        return RequestError(
            f"{repo}: the Hub does not let the token in use write there{reason}. Use a token with write access to it (`hf auth login`, HF_TOKEN)."
        )
    if status == 429:
        seconds = seconds_to_wait(error)
        wait = f"Wait {seconds} seconds" if seconds else "Wait a few minutes"
        return PublishError(f"{repo}: the Hub limits the number of requests (429){reason}. {wait}. {go_on}")
    if status >= 500:
        return PublishError(f"{repo}: the Hub has trouble of its own ({status}){reason}. Wait a few minutes. {go_on}")
    return PublishError(f"{repo}: the Hub refused the request ({status}){reason}. {go_on}")


def no_token() -> RequestError:
    return RequestError(
        "publishing needs an access token of the Hub, and there is none. Run `hf auth login`, or set HF_TOKEN to a token that may write."
    )
