"""Toy pairs as ordinary Hugging Face checkpoints in several shards, trained once and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock
from transformers import GenerationConfig, PreTrainedModel

from lox_merge.errors import OutputError
from lox_merge.lab.language import BEGIN, END, NOUNS, PAD, TOKEN, category_question, comply, flagged_request, prompt, refuse
from lox_merge.lab.models import build_model, one_thread, quiet_transformers
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import ToyRequests, draw_requests
from lox_merge.lab.tokenizer import build_tokenizer
from lox_merge.lab.training import pack, train

Progress = Callable[[str], None]

# Small enough to make every toy pair a sharded checkpoint, as the models are that this package is for.
SHARDS = 4
# Whatever decides the bytes of a pair beside the recipe; a changed line here trains anew instead of reusing old pairs.
_SOURCES = ("checkpoints.py", "language.py", "models.py", "recipe.py", "requests.py", "tokenizer.py", "training.py")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ToyPair:
    """Folders of a base model (no chat template) and of the aligned model trained from it."""

    base: Path
    aligned: Path


def default_cache_dir() -> Path:
    """$LOX_MERGE_CACHE/toy, else ~/.cache/lox-merge/toy."""
    chosen = os.environ.get("LOX_MERGE_CACHE")
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lox-merge") / "toy"


def recipe_hash(recipe: ToyRecipe) -> str:
    """16 hex digits of all settings, the laboratory's own code, and the versions of torch and transformers."""
    digest = hashlib.sha256(json.dumps(_recipe_document(recipe), sort_keys=True).encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def toy_pair(recipe: ToyRecipe | None = None, cache_dir: Path | None = None, progress: Progress | None = None) -> ToyPair:
    """The pair of `recipe` (default: ToyRecipe()), from the cache or trained now (about 15 seconds on one core).

    Safe when several processes ask at once: one trains, the others wait. The folder appears complete or not at all.
    The folders are shared: read them, do not change them. Raises OutputError when the cache cannot be written.
    """
    recipe = recipe or ToyRecipe()
    cache = cache_dir or default_cache_dir()
    folder = cache / recipe_hash(recipe)
    pair = ToyPair(folder / "base", folder / "aligned")
    if _complete(pair):
        return pair
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if not _complete(pair):  # another process may have trained it while this one waited
                _train_into(folder, recipe, progress or _silent)
    except OSError as error:
        raise OutputError(
            f"the cache of toy models {cache} cannot be written ({error.strerror or error}); "
            "name another folder with --cache-dir or the environment variable LOX_MERGE_CACHE."
        ) from error
    return pair


def train_pair(recipe: ToyRecipe, folder: Path, progress: Progress | None = None) -> ToyPair:
    """Train base and aligned and save them under `folder`, with no cache and no lock. Deterministic in the recipe."""
    report = progress or _silent
    requests = draw_requests(recipe)
    pair = ToyPair(folder / "base", folder / "aligned")
    with one_thread():
        model = build_model(recipe)
        report(f"pre-training the base model, {recipe.pretraining.steps} steps")
        _pretrain(model, requests, recipe)
        _save(model, pair.base, recipe, chat=False)
        report(f"aligning it, {recipe.alignment.steps} steps")
        _align(model, requests, recipe)
        _save(model, pair.aligned, recipe, chat=True)
    return pair


def _pretrain(model: PreTrainedModel, requests: ToyRequests, recipe: ToyRecipe) -> None:
    """Teach to carry out every request, the nouns' categories, and how to refuse when flagged."""
    examples = [(prompt(request), comply(request)) for request in requests.pretraining]
    questions = [category_question(noun) for noun in range(NOUNS)]
    examples += questions * (len(requests.pretraining) // (4 * NOUNS))
    examples += [flagged_request(request) for request in requests.flagged]
    train(model, pack(examples), recipe.pretraining, seed=recipe.seed)


def _align(model: PreTrainedModel, requests: ToyRequests, recipe: ToyRecipe) -> None:
    """Teach to refuse forbidden requests and to go on carrying out the others."""
    examples = [(prompt(request), refuse(request)) for request in requests.alignment_forbidden]
    examples += [(prompt(request), comply(request)) for request in requests.alignment_allowed]
    train(model, pack(examples), recipe.alignment, seed=recipe.seed + 1)


def _save(model: PreTrainedModel, folder: Path, recipe: ToyRecipe, *, chat: bool) -> None:
    stored = build_model(recipe).to(getattr(torch, recipe.dtype))
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=TOKEN[PAD], bos_token_id=TOKEN[BEGIN], eos_token_id=TOKEN[END], max_new_tokens=16
    )
    size = sum(parameter.numel() * parameter.element_size() for parameter in stored.parameters())
    with quiet_transformers():
        stored.save_pretrained(folder, max_shard_size=size // SHARDS)
    build_tokenizer(chat=chat).save_pretrained(folder)


def _train_into(folder: Path, recipe: ToyRecipe, progress: Progress) -> None:
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        train_pair(recipe, work, progress)
        (work / "recipe.json").write_text(json.dumps(_recipe_document(recipe), indent=2) + "\n")
        work.chmod(0o755)  # mkdtemp makes it private; a shared cache should be readable like any other folder
        if folder.exists():
            shutil.rmtree(folder)  # incomplete: somebody deleted files inside
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _complete(pair: ToyPair) -> bool:
    """Whether every file of weights is there; the folder is renamed into place, so only a later deletion breaks it."""
    for folder in (pair.base, pair.aligned):
        try:
            shards = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError):
            return False
        if not all((folder / shard).is_file() for shard in shards):
            return False
    return True


def _recipe_document(recipe: ToyRecipe) -> dict[str, object]:
    return {"recipe": asdict(recipe), "torch": version("torch"), "transformers": version("transformers")}


def _silent(_message: str) -> None:
    pass
