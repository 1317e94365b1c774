"""What the maker of a model left in its folder, beside what belongs to the model."""

from __future__ import annotations

import shutil
from pathlib import Path

from lox_merge import Recipe, harden
from lox_merge.checkpoint.checkpoint import open_checkpoint

LEFT_OVER = [
    *(".env", ".netrc", ".git-credentials", ".gitignore", ".hidden/a.json", "code/.env", "wandb/debug.txt", "mlruns/0/meta.yaml"),
    *("lightning_logs/version_0/hparams.yaml", "train.log", "events.out.tfevents.17.host"),
]
OF_THE_MODEL = ["LICENSE", "code/layers.py", "additional_chat_templates/tool.jinja", "events.json", "wandb.txt"]


def test_what_is_left_of_the_training_is_not_copied(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    aligned = shutil.copytree(made[1], tmp_path / "aligned")
    for name in (*LEFT_OVER, *OF_THE_MODEL):
        (aligned / name).parent.mkdir(parents=True, exist_ok=True)
        (aligned / name).write_text("x")
    side = open_checkpoint(aligned, "aligned").side_files()
    assert set(OF_THE_MODEL) <= set(side) and not set(LEFT_OVER) & set(side)
    harden(made[0], aligned, tmp_path / "out", recipe=Recipe(rank=1))
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(OF_THE_MODEL) <= written and not set(LEFT_OVER) & written
