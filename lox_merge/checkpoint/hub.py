"""Reading from the Hub: one look to fix the commit, headers by ranges, files into the ordinary cache.

huggingface_hub does the talking, so that HF_TOKEN, `hf auth login`, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE mean here
what they mean everywhere. It reads them when it is imported, and takes a tenth of a second for it: all its imports are in functions.
"""

from __future__ import annotations

from pathlib import Path

from lox_merge.checkpoint import hub_cache
from lox_merge.checkpoint.hub_download import download
from lox_merge.checkpoint.hub_failures import explained, persistently
from lox_merge.checkpoint.hub_reference import HubFile, HubReference, HubSnapshot, parse_hub_reference
from lox_merge.errors import SourceError

__all__ = ["HubFile", "HubReference", "HubSnapshot", "download", "parse_hub_reference", "read_safetensors_header", "resolve"]

# Listing a large repository with sizes takes the Hub longer than the library's 10 seconds for a file's metadata.
_LISTING_SECONDS = 30
# Holds most headers whole: about 100 bytes a tensor, some hundred tensors a shard.
_FIRST_READ = 32 * 1024


def resolve(reference: HubReference, cache_dir: Path | None = None) -> HubSnapshot:
    """Fixes the commit and lists the files. Checks that file contents may be read, but reads none. Raises SourceError.

    In offline mode the answer comes from the cache. cache_dir: where to look then; None for HF_HUB_CACHE.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, is_offline_mode

    if is_offline_mode():
        return hub_cache.resolve_offline(reference, cache_dir)
    where = str(reference)
    with explained(where):
        information = persistently(
            lambda: HfApi().model_info(reference.repo_id, revision=reference.revision, files_metadata=True, timeout=max(_LISTING_SECONDS, _timeout()))
        )
        commit, siblings = information.sha, information.siblings or []
        files = {
            sibling.rfilename: HubFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None) for sibling in siblings
        }
    if commit is None or not files:
        raise SourceError(f"{where} holds no files on the Hub. Give a repository with the model's weights.")
    # Anybody may list a gated repository; only asking for a file shows whether its contents may be read. The largest one, because
    # the Hub shows a model card to everybody.
    largest = max(files.values(), key=lambda file: file.size).name
    with explained(where):
        persistently(lambda: get_hf_file_metadata(hf_hub_url(reference.repo_id, largest, revision=commit), timeout=_timeout()))
    return HubSnapshot(reference.repo_id, reference.revision, commit, files)


def read_safetensors_header(snapshot: HubSnapshot, name: str, cache_dir: Path | None = None) -> bytes:
    """The first 8 + N bytes of a safetensors file (length and JSON), from the cache or else by ranged reads from the Hub.

    Raises SourceError, or CheckpointFormatError when N is larger than the file or than the format allows.
    """
    from huggingface_hub import is_offline_mode

    from lox_merge.checkpoint.safetensors_format import header_length

    size = snapshot.file(name).size
    where = f"{snapshot}/{name}"
    cached = hub_cache.cached_file(snapshot, name, cache_dir)
    if cached is None and is_offline_mode():
        raise hub_cache.missing_offline(snapshot, [name])

    def first(count: int) -> bytes:
        if cached is None:
            return _read_start(snapshot, name, min(count, size))
        with cached.open("rb") as file:
            return file.read(count)

    with explained(where):
        start = first(_FIRST_READ)
        length = header_length(start, size, where)
        return start[:length] if length <= len(start) else first(length)


def _read_start(snapshot: HubSnapshot, name: str, count: int) -> bytes:
    """The first `count` bytes. The session follows the redirect to the storage host and leaves the Authorization header behind."""
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    if count == 0:
        return b""
    url = hf_hub_url(snapshot.repo_id, name, revision=snapshot.commit)
    # Some content networks compress on the fly and then ignore the range.
    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}

    def read() -> bytes:
        with get_session().stream("GET", url, headers=headers, timeout=_timeout(), follow_redirects=True) as response:
            hf_raise_for_status(response)
            data = b""
            # A server may ignore the range and send the whole file: stop, rather than read gigabytes.
            for piece in response.iter_bytes(_FIRST_READ):
                data += piece
                if len(data) >= count:
                    break
        if len(data) < count:
            raise ConnectionError(f"{len(data)} of {count} bytes arrived")
        return data[:count]

    return persistently(read)


def _timeout() -> int:
    """Seconds without a byte from the Hub; HF_HUB_DOWNLOAD_TIMEOUT sets it."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    return HF_HUB_DOWNLOAD_TIMEOUT
