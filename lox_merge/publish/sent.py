"""The end of a job whose workers sent its shards to the Hub: one commit that names them, with everything else of the output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lox_merge.jobs.atomic import json_bytes, write_atomically
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.store import WEIGHTS_NOTE
from lox_merge.publish.access import check_can_push
from lox_merge.publish.card import CardSettings
from lox_merge.publish.hub_store import HubStore
from lox_merge.publish.output import open_output
from lox_merge.publish.push import PushPlan, PushResult, assemble, push
from lox_merge.publish.readme import existing_card, write_card
from lox_merge.publish.upload import Item, UploadsGoneError


def publish_sent(folder: Path, store: HubStore, *, public: bool, revision: str | None = None, settings: CardSettings) -> tuple[PushPlan, PushResult]:
    """Commits what workers sent, as `push` commits what is in a folder, and notes beside the manifest where the weights are.

    Called again it goes on, and changes nothing where all is there. Raises what `plan_push` and `push` raise; for shards that the Hub
    lost since, PublishError: the same job makes those again.
    """
    output = open_output(folder, weights_on_hub=True)
    target = check_can_push(store.repo, public=public, revision=revision)
    held = [Item(entry["file"], entry["size"], entry["sha256"], None) for entry in output.manifest["output"]["shards"]]
    plan = assemble(target, output, settings, held)
    if existing_card(output) is None:
        write_card(output, plan.card)
    journal = Journal(output.folder)
    try:
        with journal.locked():
            result = push(plan)
            note = store.identity | {"commit": result.commit, "weights": "on the Hub, in this commit; everything else is here too"}
            write_atomically(output.folder / WEIGHTS_NOTE, json_bytes(note), journal.folder)
            journal.end()
    except UploadsGoneError as error:
        journal.forget(error.files)
        raise
    return plan, replace(result, created=not store.target.exists)
