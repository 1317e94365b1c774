"""Which files beside the weights belong to a model: what an output takes over as it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz", ".tflite"}
# The same weights once more, for another program: an output has none of them, since they are not edited. And what only training reads.
_OTHER_FORM = re.compile(r"(model|pytorch_model|tf_model|flax_model|rust_model|consolidated|adapter_model)\b.*|model[-_.].*|.*_states\.pt")
_OTHER_SUFFIXES = {".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".tflite"}
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args)([-_.].*)?")
_TRAINING_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".pkl"}  # code may have such names, too
# Voices, speakers, projections of a model come in formats of weights, too. What is larger than this share of the weights is taken for more of them.
_LARGEST_SHARE = 0.1
_PART = re.compile(r"-\d+-of-\d+")
_OF_THIS_PROGRAM = {"lox_merge.json", "lox_merge_asr.svg", "lox_merge_weights.json"}
_NOT_THE_MODEL = _OF_THIS_PROGRAM | {"mergekit_config.yml", "trainer_state.json", "adapter_config.json"}
# Where programs that watch a training write; their records hold settings and names of whoever trained.
_RECORDS = {"wandb", "mlruns", "lightning_logs"}


def side_files(files: Mapping[str, int], weights: Collection[str]) -> list[str]:
    """All but weights, these weights in another form, README, bookkeeping, and what its maker left. files: sizes; weights: names among them.

    Nothing that a model needs begins with a dot; keys and passwords (.env, .netrc, .git-credentials) do.
    """
    left = {*weights, *unknown_weights(files, weights)}
    # An index goes with the weights of its folder.
    folders = {str(PurePosixPath(name).parent) for name in left if "/" in name}
    names = []
    for name in files:
        path = PurePosixPath(name)
        index = name.endswith(".index.json") and str(path.parent) in folders
        if not (name in left or index or _is_other_form(path) or _is_left_over(path)):
            names.append(name)
    return names


def unknown_weights(files: Mapping[str, int], weights: Collection[str]) -> list[str]:
    """Files in a format of weights that are none of these weights by name, and together too large for anything else: parts of one file, or
    all in one folder."""
    together: dict[str, list[str]] = defaultdict(list)
    for name in files:
        path = PurePosixPath(name)
        if path.suffix in _WEIGHT_SUFFIXES and name not in weights and not _is_other_form(path) and not _is_left_over(path):
            together[_PART.sub("", name) if len(path.parts) == 1 else str(path.parent)].append(name)
    most = _LARGEST_SHARE * sum(files.get(name, 0) for name in weights)
    return [name for names in together.values() if sum(files[name] for name in names) > most for name in names]


def _is_other_form(path: PurePosixPath) -> bool:
    """These weights for another program, an index of them, or the state of a training, by its name."""
    training = path.suffix in _TRAINING_SUFFIXES and _TRAINING.fullmatch(path.name) is not None
    if path.suffix in _OTHER_SUFFIXES or training or path.name == "training_args.json":
        return True
    # In folders are parts of a model that have names of their own there.
    if len(path.parts) > 1:
        return path.name.endswith("_states.pt")
    return path.name.endswith(".index.json") or (path.suffix in _WEIGHT_SUFFIXES and _OTHER_FORM.fullmatch(path.name) is not None)


def _is_left_over(path: PurePosixPath) -> bool:
    """Bookkeeping, hidden, a log, or the record of a training."""
    if path.name in _NOT_THE_MODEL or path.name.upper().startswith("README") or any(part.startswith(".") for part in path.parts):
        return True
    return path.suffix == ".log" or path.name.startswith("events.out.tfevents") or not _RECORDS.isdisjoint(path.parts[:-1])
