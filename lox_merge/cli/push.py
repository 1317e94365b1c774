"""`lox-merge push`: a finished output onto the Hub; and the same at the end of `lox-merge harden`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.options import cache_option, device_option, json_option
from lox_merge.cli.publishing import card_options, card_settings, license_options
from lox_merge.cli.start import import_torch

if TYPE_CHECKING:
    from lox_merge.jobs.plan import Plan
    from lox_merge.publish.hub_store import HubStore

public_option = click.option("--public", is_flag=True, help="Make a new repository public (default: private). Existing ones are never changed.")


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--public, --revision and --pull-request."""
    revision = click.option("--revision", metavar="BRANCH", help="Branch to publish to; made if it is not there.")
    pull_request = click.option("--pull-request", is_flag=True, help="Open a pull request instead of writing to the branch.")
    return public_option(revision(pull_request(command)))


@click.command("push", short_help="Publish a hardened model on the Hugging Face Hub.")
@click.argument("out")
@click.argument("repo")
@place_options
@card_options
@click.option("--recompute", is_flag=True, help="Make the weights again from the sources and compare, before publishing.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="With --recompute: N tensors drawn at random instead of all.")
@click.option("--dry-run", is_flag=True, help="Check everything, list files and sizes, show the card, publish nothing.")
@device_option
@cache_option
@json_option
def push_command(
    out: str,
    repo: str,
    public: bool,
    revision: str | None,
    pull_request: bool,
    recompute: bool,
    sample: int | None,
    dry_run: bool,
    device: str,
    json_file: str | None,
    **options: Any,
) -> None:
    """Publish the finished output OUT as the repository REPO (namespace/name).

    Checks the token and the repository, then every hash of OUT, writes the model card, and uploads in one commit: nobody sees half a
    model. The same command goes on after an interruption and uploads nothing twice. The token is that of HF_TOKEN or `hf auth login`.

    \b
    lox-merge push out me/model-lox --dry-run
    lox-merge push out me/model-lox --public --results asr.json --results robustness.json
    """
    import_torch()
    from lox_merge.cli.json_file import write_json
    from lox_merge.cli.progress import byte_progress
    from lox_merge.cli.show_push import print_push, print_push_plan
    from lox_merge.errors import RequestError
    from lox_merge.jobs.beforehand import resolve_device
    from lox_merge.publish.push import Verifying, plan_push, push

    if sample is not None and not recompute:
        raise RequestError("--sample says how many tensors --recompute makes again; add --recompute.")
    settings = card_settings(options)
    with byte_progress(None, "verifying") as progress:
        verifying = Verifying(recompute, sample, resolve_device(device), progress)
        plan = plan_push(out, repo, public=public, revision=revision, pull_request=pull_request, settings=settings, verifying=verifying)
    if dry_run:
        if json_file:
            write_json(json_file, plan.to_json())
        if json_file != "-":
            print_push_plan(plan)
        return
    result = push(plan)
    if json_file:
        write_json(json_file, result.to_json())
    if json_file != "-":
        print_push(result, plan.card_from)


def push_when_done(command: Callable[..., Any]) -> Callable[..., Any]:
    """--push REPO, --weights-on-hub, --public, --revision, --pull-request and the licence, for commands that end in a finished output."""
    option = click.option("--push", "push_to", metavar="REPO", help="Publish OUT as this repository of the Hub at the end (see lox-merge push).")
    elsewhere = click.option(
        "--weights-on-hub",
        is_flag=True,
        help="With --push and --executor ray: each worker downloads what its shard needs and uploads its shard. OUT gets all but weights.",
    )
    return option(elsewhere(place_options(license_options(command))))


class PushWhenDone:
    """Publishing at the end of another command. Construction checks everything that can be checked before the work.

    Raises RequestError for what publishing would refuse.
    """

    def __init__(
        self,
        plan: Plan,
        repo: str,
        *,
        public: bool,
        revision: str | None,
        pull_request: bool,
        overwrite: bool,
        licence: dict[str, str | None],
        base: str,
        aligned: str,
        cache_dir: Path | None,
    ) -> None:
        from lox_merge.publish.ahead import check_ahead

        self.out, self.repo = plan.out, repo
        self.place: dict[str, Any] = {"public": public, "revision": revision, "pull_request": pull_request}
        self.settings = card_settings({**licence, "base": base, "aligned": aligned, "cache_dir": cache_dir})
        self._target = check_ahead(plan, repo, **self.place, overwrite=overwrite, settings=self.settings)
        self._store: HubStore | None = None

    def store_weights(self, plan: Plan) -> None:
        """Has the plan's workers send their shards. Raises RequestError for models that are not on the Hub."""
        from lox_merge.jobs.store import check_can_travel
        from lox_merge.publish.hub_store import HubStore

        check_can_travel(plan)
        plan.store = self._store = HubStore.of(self._target)

    def publish(self, *, show: bool) -> dict[str, Any]:
        """Publishes the finished output; the value for --json."""
        from lox_merge.cli.show_push import print_push
        from lox_merge.publish.push import plan_push, push

        if self._store:
            from lox_merge.publish.sent import publish_sent

            plan, result = publish_sent(self.out, self._store, public=self.place["public"], revision=self.place["revision"], settings=self.settings)
        else:
            plan = plan_push(self.out, self.repo, **self.place, settings=self.settings)
            result = push(plan)
        if show:
            print_push(result, plan.card_from)
            if self._store:
                click.echo(f"{self.out} holds everything but the weights. Check the model: lox-merge verify {self.repo}@{result.commit}")
        return result.to_json()
