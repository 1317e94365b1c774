"""What went wrong on the Hub, in words that say where and what to do next.

huggingface_hub's own messages hold URLs, request ids and several paragraphs; a plan that lists ten problems needs one line each.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lox_merge.errors import SourceError

T = TypeVar("T")

# Seconds before the second and the third attempt: enough for a dropped connection or a restarting server, short enough to watch.
_WAITS = (0.5, 2.0)
_SERVER_TROUBLE = frozenset({408, 500, 502, 503, 504})
_LONGEST_REASON = 200


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns every failure of the Hub, the network or the cache's disk inside the block into a SourceError about `where`."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        # Broad on purpose: the library raises its own errors, httpx's, hf_xet's RuntimeError, and ValueError or TypeError for an
        # answer that is no Hub's. The original stays attached.
        raise SourceError(explain(error, where)) from error


def persistently(action: Callable[[], T]) -> T:
    """Result of `action`, tried again (two times) after a broken connection, a timeout or a server in trouble."""
    for wait in _WAITS:
        try:
            return action()
        except Exception as error:
            if not is_passing(error):
                raise
        time.sleep(wait)
    return action()


def explain(error: Exception, where: str) -> str:
    """One line for `error`: what failed, the Hub's own reason in short, and what to do next. Names no server and no token."""
    from huggingface_hub import errors

    error = _root(error)
    if isinstance(error, errors.GatedRepoError):
        return _gated(error, where)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{where}: the Hub has the repository, but not this revision. Check the spelling of the branch, tag or commit."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{where} is not there on the Hub{quoted_reason(error)}. Check the file's name and the revision."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{where} was not found on the Hub{quoted_reason(error)}: {_not_found()}"
    if isinstance(error, errors.DisabledRepoError):
        return f"{where}: the Hub has disabled access to this repository. Use another source."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{where} cannot be read from the Hub: offline mode is on. Unset HF_HUB_OFFLINE and try again."
    status = status_of(error)
    if status is not None:
        return _refused(error, status, where)
    return _not_reached(error, where)


def _gated(error: Exception, where: str) -> str:
    page = re.search(r"https?://\S+?(?=[.,;]?(\s|$))", server_message(error))
    at = f" at {page.group()}" if page else " on the model's page on the Hub"
    return f"{where} is gated{quoted_reason(error)}. Request access{at}, then log in with `hf auth login` (or set HF_TOKEN) and try again."


def _not_found() -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        return (
            "there is no model of this name, or it is private and this machine is not logged in. "
            "Check the name; for a private model run `hf auth login` or set HF_TOKEN."
        )
    return (
        "there is no model of this name, or it is private and your token has no access to it. "
        "Check the name, and with `hf auth whoami` whose token is in use."
    )


def _refused(error: Exception, status: int, where: str) -> str:
    """The Hub answered, but not with what was asked for."""
    reason = quoted_reason(error)
    if status == 401:
        return f"{where}: the Hub does not accept your access token{reason}. Log in anew with `hf auth login`, or correct HF_TOKEN."
    if status == 403:
        return (
            f"{where}: the Hub refuses access with the token in use{reason}. Give the token read access to this repository in "
            "your Hub settings, or log in with another one (`hf auth login`, HF_TOKEN)."
        )
    if status == 429:
        seconds = seconds_to_wait(error)
        wait = f"Wait {seconds} seconds" if seconds else "Wait a few minutes"
        return f"{where}: the Hub limits the number of requests (429){reason}. {wait} and try again; logged-in users have a higher limit."
    if status >= 500:
        return f"{where}: the Hub has trouble of its own ({status}){reason}. Try again in a few minutes; finished downloads are kept."
    return f"{where}: the Hub refused the request ({status}){reason}. Check the name and HF_ENDPOINT, and try again."


def _not_reached(error: Exception, where: str) -> str:
    """No answer of the Hub: the network, this machine's disk, or somebody else answering."""
    kinds = kinds_of(error)
    cached = "if it was downloaded before, HF_HUB_OFFLINE=1 reads it from the cache"
    if "TimeoutException" in kinds or isinstance(error, TimeoutError):
        return f"{where}: the Hub did not answer in time. Check the network and try again; {cached}."
    if kinds & {"ConnectError", "ProxyError", "UnsupportedProtocol", "InvalidURL"}:
        reason = re.search(r"\[Errno -?\d+\] ([\w ,']+)", str(error))
        why = f" ({reason.group(1).strip()})" if reason else ""
        return f"{where}: the Hub cannot be reached{why}. Check the network, the proxy and HF_ENDPOINT; {cached}."
    if isinstance(error, ConnectionError) or "TransportError" in kinds or _incomplete(error):
        return f"{where}: the connection to the Hub broke. Try again; finished downloads are kept."
    if isinstance(error, OSError) and error.errno is not None:
        at = f" at {error.filename}" if error.filename else ""
        return f"{where} cannot be kept in the local cache{at}: {error.strerror}. Make room there, or set HF_HOME to a folder that can be written."
    if "Xet" in type(error).__name__ or isinstance(error, RuntimeError):  # hf_xet's own kinds, and what it has no kind for
        return f"{where}: the Hub's Xet storage did not deliver the file. Try again; HF_HUB_DISABLE_XET=1 downloads in the plain way."
    return (
        f"{where}: what came back is not an answer of the Hub ({type(error).__name__}). Check the proxy and HF_ENDPOINT (a login page in "
        "between?), and try again."
    )


def is_passing(error: Exception) -> bool:
    """Failures that another attempt may get over. Not "connection refused" nor "too many requests": those the user should see."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if status is not None:
        return status in _SERVER_TROUBLE
    broken = kinds_of(error) & {"TimeoutException", "ReadError", "WriteError", "CloseError", "RemoteProtocolError"}
    return bool(broken) or (isinstance(error, ConnectionError) and not isinstance(error, OfflineModeIsEnabled)) or _incomplete(error)


def _incomplete(error: Exception) -> bool:
    # The library says so with a bare OSError after fewer bytes than announced.
    return isinstance(error, OSError) and str(error).startswith("Consistency check failed")


def _root(error: Exception) -> Exception:
    """Behind "file not found locally", hf_hub_download hides why it could not look on the Hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def kinds_of(error: Exception) -> set[str]:
    """Names of the error's classes, its own first and its parents'."""
    # By name, because the classes are httpx's for huggingface_hub 1 and httpx2's for huggingface_hub 2.
    return {kind.__name__ for kind in type(error).__mro__}


def status_of(error: Exception) -> int | None:
    """The status that the Hub answered with; None where there was no answer of the Hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def server_message(error: Exception) -> str:
    """What the Hub itself said about a failure, '' if nothing."""
    return str(getattr(error, "server_message", None) or "")


def quoted_reason(error: Exception) -> str:
    """The Hub's own reason in brackets, without the sentences that hold addresses; nothing if it gave none."""
    first_line = server_message(error).split("\n")[0]
    sentences = [sentence for sentence in re.split(r"(?<=\.)\s+", first_line) if "://" not in sentence]
    reason = " ".join(sentences).strip().rstrip(".")[:_LONGEST_REASON]
    return f' (the Hub says: "{reason}")' if reason else ""


def seconds_to_wait(error: Exception) -> int | None:
    """How long the Hub asks to wait before the next request; None where it does not say."""
    headers = getattr(error, "response").headers  # noqa: B009  only errors with a status come here
    limit = re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))
    after = headers.get("retry-after", "")
    return int(limit.group(1)) if limit else int(after) if after.isdigit() else None
