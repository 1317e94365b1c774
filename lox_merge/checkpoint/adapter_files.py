"""The files of an adapter with those of its base behind them: what a copy of the merged model would consist of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.adapter_config import CONFIG
from lox_merge.checkpoint.files import FileSource
from lox_merge.checkpoint.safetensors_format import Header
from lox_merge.checkpoint.stamps import Stamp

WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
# What an adapter may bring along for the tokenizer; everything else in its folder belongs to its training.
_TOKENIZER_FILE = re.compile(
    r"(tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja)"
)


@dataclass(frozen=True)
class OverBase:
    """The files of an adapter, with those of its base behind them."""

    adapter: FileSource
    base: FileSource

    @property
    def title(self) -> str:
        return self.adapter.title

    def own(self, name: str) -> bool:
        return name in (CONFIG, WEIGHTS, PICKLED_WEIGHTS) or _TOKENIZER_FILE.fullmatch(name) is not None

    def names(self) -> dict[str, int]:
        own = {name: size for name, size in self.adapter.names().items() if self.own(name)}
        behind = self.base.names()
        if "tokenizer_config.json" in own:
            # A template file would win over the template inside the adapter's tokenizer_config.json.
            behind = {name: size for name, size in behind.items() if "chat_template" not in name}
        return behind | own

    def holder(self, name: str) -> FileSource:
        """Whose file it is."""
        return self.adapter if self.own(name) and name in self.adapter.names() else self.base

    def path(self, name: str) -> Path:
        return self.holder(name).path(name)

    def header(self, name: str) -> Header:
        return self.holder(name).header(name)

    def seen(self, name: str) -> Stamp | None:
        return self.holder(name).seen(name)

    def look_at(self, name: str) -> None:
        self.holder(name).look_at(name)

    def fetch(self, names: Sequence[str]) -> None:
        for source in (self.adapter, self.base):
            wanted = [name for name in names if self.holder(name) is source]
            if wanted:
                source.fetch(wanted)

    def identity(self) -> dict[str, Any]:
        # Ranks and factors of the update are in this file, so it is as much a source as the weights.
        digest = hashlib.sha256(self.adapter.path(CONFIG).read_bytes()).hexdigest()
        return self.adapter.identity() | {"form": "adapter", "config_sha256": digest}
