"""`activations`: where base, aligned and other models lie on the alignment direction, and which subspaces their states fill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lox_merge.diagnostics.activations.direction import FOLDS
from lox_merge.diagnostics.activations.notes import notes_of
from lox_merge.diagnostics.activations.passes import Found, Passes
from lox_merge.diagnostics.activations.reading import Reading, chosen_layers, read
from lox_merge.diagnostics.activations.residuals import VECTORS, compared, residual
from lox_merge.diagnostics.activations.results import Activations, Domain, DomainPair
from lox_merge.diagnostics.activations.summary import layer_directions
from lox_merge.errors import RequestError
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, conversations, load_conversations
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.model_labels import ALIGNED, BASE, labelled
from lox_merge.safety.model_set import ModelSet, Reference
from lox_merge.safety.outline import outline
from lox_merge.safety.progress import ProgressFactory, no_progress
from lox_merge.safety.prompts import load_prompts, prompt_set
from lox_merge.safety.seeds import check_seed
from lox_merge.safety.types import PromptSet
from lox_merge.safety.vocabulary import common_vocabulary

ETAS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
PERMUTATIONS, DIRECTIONS, TOKENS = 200, 4, 64

PairsLike = str | Path | Conversations
PromptsLike = str | Path | PromptSet


def activations(
    base: Reference,
    aligned: Reference,
    models: Sequence[Reference] | Mapping[str, Reference] = (),
    *,
    pairs: Sequence[PairsLike] = (),
    prompts: Mapping[str, PromptsLike] | None = None,
    tokens: int = TOKENS,
    layers: Sequence[int] | None = None,
    etas: Sequence[float] = ETAS,
    directions: int = DIRECTIONS,
    vector: str = "mean",
    permutations: int = PERMUTATIONS,
    limit: int | None = None,
    rendering: Rendering | None = None,
    one_by_one: bool | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    base_is_right: bool = False,
    progress: ProgressFactory = no_progress,
) -> Activations:
    """Alignment direction per layer with projections of all models; residual directions of domains; overlaps of prompt sets' subspaces.

    base, aligned, models: folders, Hub ids, or models in memory (LoadedModel; see `in_memory`); models may be PEFT adapters over
    aligned (base_is_right: although they name another model), and have labels where a mapping is given. pairs: files of prompts and
    responses, conversations or plain texts, or such
    data loaded, each a domain; responses are read, not generated. prompts: two or more sets by name, whose last tokens' states are
    compared. tokens: of each response, the first so many. layers: 0 (what the first block reads) to L (what the output head reads, after
    the final normalisation), negative ones from the end; None for all. etas: shares of energy for the overlaps. directions: leading ones
    of each domain. vector: of a response at the last layer, 'mean' over its tokens read or the 'last' of them. permutations: draws
    of rows shuffled between domains. limit: of each set, the first so many. All models read the same tokens, rendered by aligned's
    tokenizer and template. one_by_one: one model in memory at a time; None where they do not fit together. seed: of folds, halves,
    permutations and bootstraps. Nothing is written, and weights are not changed.
    Kept of the states: sums per layer, position and fold; one vector a response; last-token states or their Gram matrix, the smaller.
    Raises RequestError or PlanError before weights are loaded: models that cannot be compared, layers that do not exist, texts that
    cannot be read whole; NumericalError for states that are not finite.
    """
    seed = check_seed(seed)
    domains, sets = _domains(pairs, limit), _prompt_sets(prompts or {}, limit, cache_dir)
    _check(domains, sets, tokens, etas, directions, vector, permutations)
    named = {BASE: base, ALIGNED: aligned, **labelled(models)}
    rendering = rendering or Rendering()
    opened = ModelSet(
        named,
        over={label: ALIGNED for label in named if label not in (BASE, ALIGNED)},
        device=device,
        dtype=dtype,
        device_map=device_map,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        together=None if one_by_one is None else not one_by_one,
        base_is_right=base_is_right,
    )
    with opened:
        outlines = {
            label: outline(given if isinstance(given, LoadedModel) else opened.checkpoint(label), trust_remote_code=trust_remote_code)
            for label, given in named.items()
        }
        chosen, depth, width = chosen_layers(layers, outlines)
        # Tables may be padded to different sizes: of states only the tokens that go in must mean the same.
        vocabulary = common_vocabulary({label: (known.vocabulary, known.tokenizer) for label, known in outlines.items()}, shared=True)
        tokenizer = outlines[ALIGNED].tokenizer
        reading = read(domains, sets, tokens, rendering, outlines, tokenizer, vocabulary)
        passes = Passes(reading, list(sets), chosen, depth, width, etas=etas, vector=vector, seed=seed, batch_size=batch_size)
        found = passes.run(opened, progress)
        together, sources = opened.together, opened.identity()
    described = tuple(_described(data, place, reading, found, chosen, directions, seed) for place, data in enumerate(domains))
    settings = {
        "tokens": tokens,
        "layers": chosen,
        "last_layer": depth,
        "last_layer_is": "after the final normalisation, as the output head reads it",
        "width": width,
        "etas": list(etas),
        "vector": vector,
        "permutations": permutations,
        "folds": {data.name: min(len(data.conversations), FOLDS) for data in domains},
        "limit": limit,
        "seed": seed,
        "rendering": rendering.identity(tokenizer),
        "vocabulary": vocabulary,
        "one_by_one": not together,
        "dtypes": found.dtypes,
        "interval": "bootstrap 95 % over responses, percentile; the direction is held fixed",
    }
    return Activations(
        tuple(named),
        sources,
        settings,
        described,
        tuple(_pairs(domains, found, directions, permutations, seed, progress)),
        tuple({"name": name, "source": given.source, "sha256": given.sha256, "n": len(given)} for name, given in sets.items()),
        tuple(found.overlaps),
        tuple(notes_of(described, found, tokens)),
    )


def _described(data: Conversations, place: int, reading: Reading, found: Found, layers: list[int], directions: int, seed: int) -> Domain:
    lengths = tuple(len(positions) for positions in reading.positions(place))
    return Domain(
        data,
        lengths,
        sum(length < reading.tokens for length in lengths),
        layer_directions(layers, found.directions[place], found.projections[place], seed),
        residual(found.residuals[place], directions),
    )


def _pairs(
    domains: Sequence[Conversations], found: Found, directions: int, permutations: int, seed: int, progress: ProgressFactory
) -> list[DomainPair]:
    names = [data.name for data in domains]
    with progress(len(names) * (len(names) - 1) * permutations, "permutations") as bar:
        return compared(names, found.residuals, count=directions, permutations=permutations, seed=seed, bar=bar)


def _domains(pairs: Sequence[PairsLike], limit: int | None) -> list[Conversations]:
    if limit is not None and limit < 1:
        raise RequestError(f"a limit of {limit} texts leaves nothing to read; give 1 or more.")
    found = [given if isinstance(given, Conversations) else load_conversations(given, "file of pairs") for given in pairs]
    return [data if limit is None else conversations(data.name, data.source, data.conversations[:limit]) for data in found]


def _prompt_sets(prompts: Mapping[str, PromptsLike], limit: int | None, cache_dir: Path | None) -> dict[str, PromptSet]:
    found = {name: given if isinstance(given, PromptSet) else load_prompts(given, cache_dir=cache_dir) for name, given in prompts.items()}
    return found if limit is None else {name: prompt_set(given.prompts[:limit], given.source) for name, given in found.items()}


def _check(
    domains: Sequence[Conversations],
    sets: Mapping[str, PromptSet],
    tokens: int,
    etas: Sequence[float],
    directions: int,
    vector: str,
    permutations: int,
) -> None:
    if not domains and not sets:
        raise RequestError("nothing to read: give pairs of prompt and response (--pairs FILE), or two sets of prompts (--prompts FILE, twice).")
    names = [data.name for data in domains]
    if len(set(names)) < len(names):
        raise RequestError(f"two domains of the same name among {', '.join(names)}. Give files of different names.")
    if empty := [data.source for data in domains if not data.conversations] + [name for name, given in sets.items() if not len(given)]:
        raise RequestError(f"{empty[0]} holds nothing to read. Give at least one.")
    if len(sets) == 1:
        raise RequestError("one set of prompts has nothing to be compared with. Give a second --prompts FILE.")
    small: dict[str, Any] = {"tokens": tokens, "directions": directions}
    if bad := next((name for name, value in small.items() if value < 1), None):
        raise RequestError(f"{small[bad]} {bad} leave nothing to look at; give 1 or more.")
    if permutations < 0:
        raise RequestError(f"{permutations} permutations cannot be drawn; give 0 for none.")
    if not etas or any(not (math.isfinite(eta) and 0 < eta <= 1) for eta in etas):
        raise RequestError("each --eta is a share of energy above 0 and up to 1, such as 0.5,0.9,0.99.")
    if vector not in VECTORS:
        raise RequestError(f"the vector {vector!r} of a response is not known; use {' or '.join(VECTORS)}.")
