"""The standard benchmarks of lm-eval (EleutherAI), on the model that is in memory."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lox_merge.errors import LoxMergeError, RequestError

_BATCH_ON_CPU, _BATCH_ON_GPU = 16, 64


def check_lm_eval(tasks: Sequence[str]) -> None:
    """Raises RequestError where lm-eval is not installed or knows no such task, before a model is loaded."""
    if not tasks:
        raise RequestError("no lm-eval task is named, such as hellaswag.")
    _package()
    for task in filter(_is_file, tasks):
        _check_file(Path(task))
    named = [task for task in tasks if not _is_file(task)]
    unknown = [task for task in named if not _manager(bool(named)).match_tasks([task])]
    if unknown:
        raise RequestError(
            f"lm-eval knows no task {', '.join(unknown)}. `lm-eval ls tasks` lists those it knows; a task of your own is named by its .yaml file."
        )


def lm_eval_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int | None = None, limit: int | None = None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Task to metric ('acc', or 'exact_match (strict-match)' where a filter has a name) to value, as lm-eval defines them.

    tasks: lm-eval's names, or .yaml files. limit: only so many examples of each. seed: of the few-shot examples. Prompts are lm-eval's
    own, without a chat template. Raises RequestError where lm-eval is not installed or cannot run a task.
    """
    package = _package()
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    rows = batch_size or (_BATCH_ON_GPU if model.device.type == "cuda" else _BATCH_ON_CPU)
    training = model.training
    with _quiet():
        try:
            # Not its `simple_evaluate`: that goes on to ask git, pip and the compilers for their versions, takes seconds over it for
            # every model, and what git says outside a repository is seen in the terminal.
            loaded = _manager(not all(map(_is_file, tasks))).load(list(tasks))
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=seed)
            result = package.evaluate(
                lm=wrapper(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=rows),
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=0,  # its standard errors are not shown
                log_samples=False,
            )
        except (KeyError, ValueError, OSError) as error:
            raise RequestError(f"lm-eval cannot run {', '.join(tasks)}: {error}. `lm-eval ls tasks` lists the tasks it knows.") from error
        except LoxMergeError:
            raise
        except Exception as error:  # tasks are programs, templates and data sets of somebody else's
            raise LoxMergeError(
                f"lm-eval failed with {', '.join(tasks)}: {type(error).__name__}: {error}. Try the task with lm-eval itself, or leave it out."
            ) from error
        finally:
            model.train(training)
    return {task: _figures(metrics) for task, metrics in result["results"].items()}


class _AnyTags(yaml.SafeLoader):  # type: ignore[misc]
    """YAML whose tags (`!function module.name`) are left alone."""


_AnyTags.add_multi_constructor("!", lambda *_: None)


def _check_file(file: Path) -> None:
    try:
        found = _AnyTags(file.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise RequestError(f"the task {file.name} cannot be read: {error.strerror or error}. Give the .yaml file of an lm-eval task.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise RequestError(f"the task {file.name} is no YAML: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("task", found.get("group")), (str, list)):
        raise RequestError(f"{file.name} is no lm-eval task: it has no entry `task`, or `group`, with a name.")


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


@functools.cache
def _manager(with_defaults: bool) -> Any:
    """lm-eval's index of tasks. Reading the thousands it comes with takes seconds: once, and only where one is asked for."""
    return importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=with_defaults)


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    figures = {}
    for name, value in metrics.items():
        metric, _, filtered = name.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and filtered and not metric.endswith("_stderr"):
            figures[metric if filtered == "none" else f"{metric} ({filtered})"] = float(value)
    return figures


def _package() -> Any:
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise RequestError("the standard tasks need the package lm-eval: pip install 'lox-merge[lm-eval]'.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log says what is known here (a model in memory, the settings); its warnings of trouble with data stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
