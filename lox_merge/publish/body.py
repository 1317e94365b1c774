"""The text of a card: the manifest, the sources and the measured figures, put into the template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from lox_merge._version import __version__
from lox_merge.publish import evaluation
from lox_merge.publish.command import harden_command, shortest, verify_command
from lox_merge.publish.metadata import PAPER, pipeline_tag
from lox_merge.publish.output import FinishedOutput
from lox_merge.publish.picture import PICTURE
from lox_merge.publish.results import Measured
from lox_merge.publish.sources import SourceCard


def card_body(output: FinishedOutput, repo: str, sources: Mapping[str, SourceCard], measured: Measured, *, with_picture: bool) -> str:
    """Markdown from the title on. repo: a Hub id, or the name that stands for it."""
    import jinja2

    manifest = output.manifest
    recipe = manifest["job"]["recipe"]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("lox_merge.publish").joinpath("card.md.jinja").read_text(encoding="utf-8"))
    table = evaluation.markdown_table
    asr, attacks, utility = evaluation.asr_table(measured), evaluation.attack_table(measured), evaluation.utility_table(measured)
    rendered = template.render(
        title=repo.rpartition("/")[2],
        repo=repo,
        paper=PAPER,
        aligned=_named(sources["aligned"]),
        base=_named(sources["base"]),
        made_with=manifest["job"]["tool"]["version"],
        torch=manifest["job"]["tool"]["torch"],
        version=__version__,
        adapter=output.is_adapter,
        aligned_id=sources["aligned"].name,
        aligned_revision=f', revision="{sources["aligned"].commit}"' if sources["aligned"].commit else "",
        evaluated=bool(measured),
        picture=PICTURE if with_picture else None,
        asr=table(["model", "judge", "prompts", "ASR", "95 % interval", "n judged", "undecided"], asr) if asr else None,
        paired=evaluation.paired_lines(measured),
        attacks=table(["attack", "model", "steps", "judge", "ASR", "95 % interval", "n judged", "R_ft/R_align"], attacks) if attacks else None,
        protocol=evaluation.protocol_lines(measured),
        utility=table(["measure", "aligned (before)", "this model (after)"], utility) if utility else None,
        command=harden_command(manifest, output.name),
        rank=recipe["rank"],
        alpha=shortest(recipe["alpha"])
        + (" (other values where the options above say so)" if recipe["rank_pattern"] or recipe["alpha_pattern"] else ""),
        figures=table(["figure", "value"], _figures(manifest["summary"], recipe)),
        search=evaluation.search_lines(measured),
        sources=table(["role", "model", "commit", "licence"], [_source_row(sources[role]) for role in ("base", "aligned")]),
        limits=_limits(manifest["summary"], measured),
        verify=verify_command(manifest, repo),
        hashes=table(["file", "sha256"], [[name, f"`{sha256}`"] for name, sha256 in output.hashes.items()]),
        **_loading(output),
    )
    return re.sub(r"\n{3,}", "\n\n", rendered)


def _loading(output: FinishedOutput) -> dict[str, Any]:
    """How the model is loaded, as far as its own files tell."""
    config = output.config
    task = pipeline_tag(config, None)
    auto_class = {"text-generation": "AutoModelForCausalLM", "image-text-to-text": "AutoModelForImageTextToText"}.get(task or "")
    processor = output.has("preprocessor_config.json", "processor_config.json")
    tokenizer = output.has("tokenizer.json", "tokenizer.model", "vocab.json")
    template = output.has("chat_template.jinja") or bool(output.json("tokenizer_config.json").get("chat_template"))
    preprocessor = "AutoProcessor" if processor else "AutoTokenizer" if tokenizer else None
    return {
        "auto_class": auto_class or "AutoModel",
        "preprocessor": preprocessor,
        "chat": preprocessor == "AutoTokenizer" and template and task == "text-generation",
        "remote_code": ", trust_remote_code=True" if "auto_map" in config else "",
    }


def _named(source: SourceCard) -> str:
    return f"[{source.name}](https://huggingface.co/{source.name})" if source.on_hub else f"the local checkpoint `{source.name}`"


def _source_row(source: SourceCard) -> list[str]:
    return [source.role, _named(source), f"`{source.commit}`" if source.commit else "none (local)", str(source.licence or "not stated")]


def _figures(summary: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[list[str]]:
    def figure(value: float | None, form: str = ".3f") -> str:
        return "undefined" if value is None else format(value, form)

    return [
        ["tensors edited", f"{summary['edited_tensors']} ({summary['edited_matrices']} matrices); {summary['copied_tensors']} as in aligned"],
        ["mean R_align = ‖Proj_k(Δ)‖/‖Δ‖", figure(summary["mean_r_align"])],
        ["share of the edit that survived rounding", f"{figure(summary['realised_gain'])} ({recipe['rounding']})"],
        ["largest error of a computed subspace (sin of the angle)", figure(summary["largest_angle_bound"], ".1e")],
    ]


def _limits(summary: Mapping[str, Any], measured: Measured) -> list[str]:
    lines = [] if measured else ["Whether hardening helped this model is not known: nothing was measured."]
    lines += evaluation.control_lines(measured)
    if measured and not measured.attacks:
        lines.append("Its resistance to fine-tuning was not measured: the figures are of the model as it is.")
    if measured.smoke_tests_only:
        lines.append("All rates are by the keyword judge, a smoke test that looks for refusal phrases, not for harm.")
    gain = summary["realised_gain"]
    if gain is not None and gain < 0.95:
        lines.append(f"Rounding to the stored dtype kept only {gain:.2f} of the intended edit.")
    if summary["ambiguous_matrices"]:
        lines.append(f"In {summary['ambiguous_matrices']} of {summary['edited_matrices']} matrices the data do not determine the edited directions.")
    return lines
