"""The model card and the configuration that a `lox` merge leaves in its output, without a trace of this machine's folders."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_merge._version import __version__
from lox_merge.publish.metadata import PAPER, base_models, card_data

if TYPE_CHECKING:
    from lox_merge.mergekit.plan import MergePlan

_CARD = """---
{metadata}
---
# {name}

{what}, with lox-merge {version} and mergekit {mergekit}. {edited} of {total} tensors were edited.

```yaml
{configuration}```
"""


def without_paths(value: Any) -> Any:
    """The configuration with each local folder replaced by its own name: a published file tells nothing of this machine."""
    if isinstance(value, Mapping):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and len(value) < 4096 and "\n" not in value:
        return "+".join(Path(part).expanduser().resolve().name if _is_local(part) else part for part in value.split("+"))
    return value


def _is_local(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../")) or (bool(text) and Path(text).is_dir())


def merge_card(plan: MergePlan, configuration: str, name: str) -> str:
    """README.md of the output folder `name`; configuration: the YAML as published."""
    sources = [checkpoint.source.identity() for checkpoint in plan.files.checkpoints.values()]
    tag = "lox" if plan.files.edit.method == "lox" else "projection-filter"
    metadata = card_data(base_model=base_models(sources), relation="merge", library="transformers", tags=("mergekit", "merge", tag))
    return _CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        what=_what(plan),
        version=__version__,
        mergekit=importlib.metadata.version("mergekit"),
        edited=sum(tensor.edited for tensor in plan.tensors),
        total=len(plan.tensors),
        configuration=configuration,
    )


def _what(plan: MergePlan) -> str:
    base, aligned, mirrored = plan.files.base.title, plan.files.aligned.title, plan.mirrored.title
    if plan.files.edit.method == "lox":
        return f"{aligned}, hardened by low-rank extrapolation (LoX, [arXiv 2506.15606]({PAPER})) away from its\npre-trained model {base}"
    return (
        f"{mirrored}, its change from {aligned} filtered by the subspace in which {aligned} differs from its pre-trained\nmodel {base} "
        "([arXiv 2505.14185](https://arxiv.org/abs/2505.14185), which finds that this costs usefulness as much as harm)"
    )
