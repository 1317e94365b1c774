"""What publishing would refuse, found out before the output is there: hours of work must not end at a closed door."""

from __future__ import annotations

from pathlib import Path

from lox_merge.jobs.adapter import licence_files
from lox_merge.jobs.plan import Plan
from lox_merge.publish.access import Target, check_can_push
from lox_merge.publish.card import Card, CardSettings, stated_language
from lox_merge.publish.failures import explained_push
from lox_merge.publish.metadata import TAGS, base_models, card_data, pipeline_tag
from lox_merge.publish.privacy import check_files
from lox_merge.publish.push import validate_card
from lox_merge.publish.readme import card_ahead
from lox_merge.publish.sources import read_source_cards


def check_ahead(
    plan: Plan,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    overwrite: bool = False,
    settings: CardSettings,
) -> Target:
    """Token, repository, licence, README.md, and the files that will be copied from aligned. Changes nothing. Where it will go.

    overwrite: what is in the output's folder goes. Raises RequestError for what `push` would refuse, PublishError where the Hub does
    not answer.
    """
    target = check_can_push(repo, public=public, revision=revision, pull_request=pull_request)
    card = None if overwrite else card_ahead(plan.out, repo, settings)
    remedy = "Correct README.md."
    if card is None:
        card = _card_of_plan(plan, settings)
        remedy = "It is what --license or the card of aligned says: correct that, or leave --push out and correct README.md (lox-merge card)."
    with explained_push(repo):
        validate_card(card, remedy)
    _check_copied(plan)
    return target


def _card_of_plan(plan: Plan, settings: CardSettings) -> Card:
    """The metadata that the card will have. Raises RequestError without a licence."""
    identities = {"base": plan.base.source.identity(), "aligned": plan.aligned.source.identity()}
    sources, licence = read_source_cards(identities, settings.sources, licence=settings.licence, cache_dir=settings.cache_dir)
    aligned, adapter = sources["aligned"].metadata or {}, plan.form == "adapter"
    metadata = card_data(
        licence=licence.metadata(),
        base_model=base_models([identities["aligned"]] if adapter else [identities["aligned"], identities["base"]]),
        relation="adapter" if adapter else "merge",
        library="peft" if adapter else "transformers",
        pipeline_tag=pipeline_tag({} if adapter else plan.aligned.config, aligned),
        language=stated_language(sources["aligned"]),
        tags=TAGS,
    )
    return Card(f"---\n{metadata.to_yaml()}\n---\n")


def _check_copied(plan: Plan) -> None:
    """Raises RequestError for what must not go out in the files that will be copied, and in the headers of the shards that mirror aligned's."""
    adapter = plan.form == "adapter"
    names = licence_files(plan.side_files) if adapter else plan.side_files
    plan.aligned.fetch(names)
    found: dict[str, bytes | Path] = {name: plan.aligned.source.path(name) for name in names}
    check_files(found | ({} if adapter else {shard.file: shard.header.raw for shard in plan.shards}), plan.out)
