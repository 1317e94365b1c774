"""Files of a Hub snapshot into the Hub's ordinary cache, where every other tool finds them too."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from pathlib import Path

from lox_merge.checkpoint import hub_cache
from lox_merge.checkpoint.hub_failures import explained, persistently
from lox_merge.checkpoint.hub_progress import DownloadProgress, silent_bar
from lox_merge.checkpoint.hub_reference import HubSnapshot
from lox_merge.errors import SourceError

# Xet and the Hub's storage fill a line with few streams; more only make the bars unreadable.
_PARALLEL_FILES = 4


def download(snapshot: HubSnapshot, names: Sequence[str], cache_dir: Path | None = None, *, for_offline: bool = True) -> Path:
    """Puts these files, and no others, into the Hub's cache and returns the folder of the snapshot.

    Files that are there stay untouched, so the same call continues after an interruption. cache_dir: None for HF_HUB_CACHE.
    for_offline: keep what an offline run has to know, too. Raises SourceError.
    """
    from huggingface_hub import is_offline_mode

    for name in names:
        snapshot.file(name)
    missing = [name for name in dict.fromkeys(names) if hub_cache.cached_file(snapshot, name, cache_dir) is None]
    if missing:
        if is_offline_mode():
            raise hub_cache.missing_offline(snapshot, missing)
        _fetch(snapshot, missing, cache_dir)
        for name in missing:
            if hub_cache.cached_file(snapshot, name, cache_dir) is None:
                expected = snapshot.files[name].size
                raise SourceError(f"{snapshot}/{name} arrived with another length than the {expected:,} bytes that the Hub lists. Try again.")
        if for_offline:
            _keep_for_offline(snapshot, missing[0], cache_dir)
    return hub_cache.snapshot_folder(snapshot.repo_id, snapshot.commit, cache_dir)


def _fetch(snapshot: HubSnapshot, names: Sequence[str], cache_dir: Path | None) -> None:
    """Downloads in a few threads. The first failure, or Ctrl-C, stops the others instead of waiting for their gigabytes."""
    progress = DownloadProgress(f"Downloading {snapshot}", sum(snapshot.files[name].size for name in names))
    with closing(progress), ThreadPoolExecutor(_PARALLEL_FILES, thread_name_prefix="hub-download") as pool:
        downloads = [pool.submit(_fetch_file, snapshot, name, cache_dir, progress) for name in names]
        try:
            for finished in as_completed(downloads):
                finished.result()
        except BaseException:
            progress.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            _break_connections()
            raise


def _fetch_file(snapshot: HubSnapshot, name: str, cache_dir: Path | None, progress: DownloadProgress) -> None:
    from huggingface_hub import hf_hub_download

    # The library takes any file that is there for complete; one of another length was cut off by a crash or a full disk.
    damaged = (hub_cache.snapshot_folder(snapshot.repo_id, snapshot.commit, cache_dir) / name).is_file()
    bar = progress.bar_of_one_file()

    def fetch() -> None:
        progress.check()
        hf_hub_download(snapshot.repo_id, name, revision=snapshot.commit, cache_dir=cache_dir, force_download=damaged, tqdm_class=bar)

    with explained(f"{snapshot}/{name}"):
        persistently(fetch)


def _break_connections() -> None:
    """Ends what is on its way: a piece takes long on a slow line, and Xet downloads run outside Python and ask no progress bar."""
    from huggingface_hub import close_session

    close_session()
    try:
        from huggingface_hub.utils._xet import abort_xet_session
    except ImportError:  # early versions of huggingface_hub 1 have no such session
        return
    abort_xet_session()  # type: ignore[no-untyped-call]


def _keep_for_offline(snapshot: HubSnapshot, name: str, cache_dir: Path | None) -> None:
    """Notes revision and full file list in the cache, so that a later run can do without the network and miss nothing."""
    from huggingface_hub import snapshot_download

    hub_cache.remember_revision(snapshot, cache_dir)
    if hub_cache.keeps_listing(snapshot, cache_dir):
        return
    # The files themselves have arrived: without the list, an offline run warns, and that is all.
    with suppress(SourceError), explained(str(snapshot)):
        # It keeps the list before it looks at its pattern, which names a file that is there already.
        snapshot_download(snapshot.repo_id, revision=snapshot.commit, cache_dir=cache_dir, allow_patterns=glob.escape(name), tqdm_class=silent_bar())
