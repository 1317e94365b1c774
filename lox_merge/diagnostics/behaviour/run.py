"""`behaviour`: what base, aligned and other models expect of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy

from lox_merge.diagnostics.behaviour.measures import Likelihood
from lox_merge.diagnostics.behaviour.next_tokens import next_tokens as next_tokens_of
from lox_merge.diagnostics.behaviour.notes import notes_of
from lox_merge.diagnostics.behaviour.passes import Reader, Scores
from lox_merge.diagnostics.behaviour.results import ALIGNED, BASE, Behaviour, SetBehaviour
from lox_merge.diagnostics.behaviour.reversion import RULE, reversion
from lox_merge.diagnostics.behaviour.shift import shift
from lox_merge.diagnostics.behaviour.texts import Prefix, prepare
from lox_merge.errors import RequestError
from lox_merge.safety.bootstrap import bootstrap_interval
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, conversations, load_conversations
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.model_labels import labelled
from lox_merge.safety.model_set import ModelSet, Reference
from lox_merge.safety.outline import outline
from lox_merge.safety.progress import ProgressFactory, no_progress
from lox_merge.safety.seeds import check_seed
from lox_merge.safety.vocabulary import common_vocabulary

PairsLike = str | Path | Conversations


def behaviour(
    base: Reference,
    aligned: Reference,
    models: Sequence[Reference] | Mapping[str, Reference] = (),
    *,
    pairs: Sequence[PairsLike] = (),
    next_tokens: Sequence[str | Prefix] = (),
    top: int = 10,
    limit: int | None = None,
    rendering: Rendering | None = None,
    shared_vocabulary: bool = False,
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
    report: Callable[[str], None] | None = None,
) -> Behaviour:
    """Per-token KL from base, log-probabilities and a reversion index on given responses; next-token distributions after prefixes.

    base, aligned, models: folders, Hub ids, or models in memory (LoadedModel; see `in_memory`); models may be PEFT adapters over
    aligned (base_is_right: although they name another model), and have labels where a mapping is given. pairs: files of prompts and
    responses, conversations or plain texts, or such
    data loaded; each a set of its own, so that harmless ones can stand beside harmful ones. next_tokens: prompts, or a Prefix with
    the beginning of a reply. top: tokens of each model in a next-token table. limit: of each set, the first so many.
    All models read the same tokens, rendered by aligned's tokenizer and template. one_by_one: one model in memory at a time; None where
    they do not fit together. seed: of the bootstrap. Weights are not changed, and nothing is written but a nameless temporary file
    when models are visited one by one.
    Raises RequestError or PlanError for models of different vocabularies and for texts that cannot be read whole, before weights are
    loaded; NumericalError for scores that are not finite.
    """
    seed = check_seed(seed)
    sets, prefixes = _sets(pairs, limit), [Prefix(prefix) if isinstance(prefix, str) else prefix for prefix in next_tokens]
    _check(sets, prefixes, top)
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
        size = common_vocabulary({label: (known.vocabulary, known.tokenizer) for label, known in outlines.items()}, shared=shared_vocabulary)
        tokenizer = outlines[ALIGNED].tokenizer
        reading = prepare(sets, prefixes, rendering, outlines, tokenizer, size)
        found = Reader(reading, size, batch_size=batch_size).read(opened, progress, report or (lambda _text: None))
        together, sources = opened.together, opened.identity()
    settings = {
        "limit": limit,
        "seed": seed,
        "top": top,
        "rendering": rendering.identity(tokenizer),
        "vocabulary": size,
        "vocabularies": {label: known.vocabulary for label, known in outlines.items()},
        "shared_vocabulary": shared_vocabulary,
        "one_by_one": not together,
        "dtypes": {label: findings.dtype for label, findings in found.items()},
        "reversion_rule": RULE,
        "interval": "bootstrap 95 % over texts (of a single text: over its tokens), percentile",
    }
    measured, first = [], 0
    for data, texts in zip(sets, reading.sets, strict=True):
        scores = {label: tuple(findings.texts[number] for number in range(first, first + len(texts))) for label, findings in found.items()}
        measured.append(_measured(data, scores, seed))
        first += len(texts)
    after = tuple(
        next_tokens_of(prefix, len(tokens), {label: findings.prefixes[place] for label, findings in found.items()}, tokenizer, top=top)
        for place, (prefix, tokens) in enumerate(zip(prefixes, reading.prefixes, strict=True))
    )
    result = Behaviour(tuple(named), sources, settings, tuple(measured), after, ())
    return Behaviour(result.models, sources, settings, result.sets, after, tuple(notes_of(result)))


def _measured(data: Conversations, scores: Mapping[str, tuple[Scores, ...]], seed: int) -> SetBehaviour:
    own = {label: [found.log_probabilities for found in texts] for label, texts in scores.items()}
    joint = {label: [float(values.sum()) for values in texts] for label, texts in own.items()}
    between = {label: reversion(texts, own[ALIGNED], own[BASE], seed=seed) for label, texts in own.items() if label not in (BASE, ALIGNED)}
    return SetBehaviour(
        data,
        scores,
        {label: shift(texts, seed=seed) for label, texts in scores.items() if label != BASE},
        {
            label: Likelihood(float(numpy.mean(sums)), bootstrap_interval(sums, seed=seed), float(numpy.concatenate(own[label]).mean()))
            for label, sums in joint.items()
        },
        {label: whole for label, (whole, _) in between.items()},
        {label: texts for label, (_, texts) in between.items()},
    )


def _sets(pairs: Sequence[PairsLike], limit: int | None) -> list[Conversations]:
    if limit is not None and limit < 1:
        raise RequestError(f"a limit of {limit} texts leaves nothing to read; give 1 or more.")
    found = [given if isinstance(given, Conversations) else load_conversations(given, "file of pairs") for given in pairs]
    return [data if limit is None else conversations(data.name, data.source, data.conversations[:limit]) for data in found]


def _check(sets: Sequence[Conversations], prefixes: Sequence[Prefix], top: int) -> None:
    if not sets and not prefixes:
        raise RequestError("nothing to read: give pairs of prompt and response (--pairs FILE), or beginnings (--next PROMPT, --next-file FILE).")
    names = [data.name for data in sets]
    if len(set(names)) < len(names):
        raise RequestError(f"two sets of the same name among {', '.join(names)}. Give files of different names.")
    if empty := next((data for data in sets if not data.conversations), None):
        raise RequestError(f"{empty.source} holds no texts. Give at least one.")
    if any(not prefix.prompt.strip() for prefix in prefixes):
        raise RequestError("a prompt to go on from is empty. Give each at least one word.")
    if top < 1:
        raise RequestError(f"a table of the {top} most probable tokens is empty; give 1 or more.")
