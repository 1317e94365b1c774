"""Xet storage as a folder: hf_xet's own `local://` back end, used by the client and by the server."""

from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path

_SHARD_HEADER = 48
_FILE_ENTRY = 48
_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


class XetStorage:
    """Content by Xet hash. Only one process can hold the folder open, so nothing here keeps a session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"local://{folder}"

    def put(self, source: Path) -> str:
        """Stores the file and returns its Xet hash."""
        import hf_xet

        session = hf_xet.XetSession()
        with session.new_upload_commit(endpoint=self.url) as commit:
            upload = commit.start_upload_file(str(source), sha256=hf_xet.COMPUTE_SHA256)
        return upload.result().xet_info.hash

    def hash_of(self, sha256: str) -> str | None:
        """Xet hash of the content with this sha256, or None if it was never stored."""
        for shard in self.folder.glob("**/shards/*.mdb"):
            hashes = _files_of_shard(shard.read_bytes())
            if sha256 in hashes:
                return hashes[sha256]
        return None

    def read(self, xet_hash: str, size: int, target: Path) -> None:
        """Writes the content to `target`: proof that the client really stored it."""
        import hf_xet

        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # A copy, because the client's process may still hold the store open.
            copy, output = Path(folder) / "cas", Path(folder) / "content"
            shutil.copytree(self.folder, copy)
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(output))
            output.replace(target)


def _files_of_shard(data: bytes) -> dict[str, str]:
    """{sha256: Xet hash} from the file section of a shard (MDB format): per file a hash, flags, a count, then entries."""
    hashes, position = {}, _SHARD_HEADER
    while data[position : position + 32] != _END:
        flags, entries = struct.unpack_from("<II", data, position + 32)
        xet_hash = _hexadecimal(data[position : position + 32])
        position += _FILE_ENTRY + _FILE_ENTRY * entries * (2 if flags & _HAS_VERIFICATION else 1)
        if flags & _HAS_SHA256:
            hashes[_hexadecimal(data[position : position + 32])] = xet_hash
            position += _FILE_ENTRY
    return hashes


def _hexadecimal(data: bytes) -> str:
    # Xet prints a hash as four little-endian 64-bit words.
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))
