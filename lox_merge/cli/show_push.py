"""What is published, or would be, as a table for people."""

from __future__ import annotations

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import size
from lox_merge.publish.push import PushPlan, PushResult


def print_push_plan(plan: PushPlan) -> None:
    """The dry run: where to, every file with its size, and the card."""
    target = plan.target
    state = "is there" if target.exists else "would be created"
    where = "a new pull request" if target.pull_request else f"branch {target.branch}"
    click.echo(f"{target.repo} ({'private' if target.private else 'public'}; {state}), {where}. Nothing was published.\n")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for item in plan.items:
        table.add_row(item.name, size(item.size), "is there" if item.name in plan.unchanged else "")
    for name in plan.removed:
        table.add_row(name, "", "removed")
    plain_console().print(table)
    sent = sum(item.size for item in plan.items if item.name not in plan.unchanged)
    click.echo(f"{size(sent)} to upload. The card ({plan.card_from}):\n")
    click.echo(plan.card.content, nl=False)


def print_push(result: PushResult, card_from: str) -> None:
    """What was published, and where it is."""
    if result.sent or result.removed:
        removed = f", {len(result.removed)} old file(s) removed" if result.removed else ""
        click.echo(
            f"{len(result.sent)} of {result.files} file(s), {size(sum(item.size for item in result.sent))}, in commit {result.commit[:12]}{removed}."
        )
    else:
        click.echo(f"Nothing to upload: all {result.files} files are there, in commit {result.commit[:12]}.")
    visibility = "private" if result.private else "public"
    tag = f", tag {result.tag}" if result.tag else ""
    click.echo(f"{result.repository} is {visibility}{' and new' if result.created else ''}; branch {result.branch}{tag}; card: {card_from}.")
    click.echo(result.url)
