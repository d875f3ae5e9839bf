"""What tries begin with: scenes of 32 pixels, tiny teachers, and a whole run of every method, all made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import shared

from vlkd_lab import trainers
from vlkd_lab.trainers import Job, open_job, train

METHODS = ("TinyCLIP", "Distil", "ClipCid", "DimeFm", "Dlip", "Contrastive")


@dataclass(frozen=True)
class Given:
    """Data and teachers, and where they lie."""

    folder: Path
    scenes: Path
    teacher: Path
    blip: Path

    def job(self, method: str, out: Path, **changes: object) -> dict:
        """Parameters of a job that takes a second."""
        return shared.any_job(method, out, self.scenes, self.teacher, self.blip) | changes

    def whole(self, method: str, **changes: object) -> Path:
        """The folder of an undisturbed run of such a job."""
        name = "-".join([method, *(f"{key}={value}" for key, value in changes.items())])
        out = self.folder / "whole" / name
        if not (out / "status.json").exists():
            train(open_job(method, self.job(method, out, **changes)))
        return out


def make_given(folder: Path) -> Given:
    """Made where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    given = Given(folder, folder / "scenes", folder / "tiny" / "teacher", folder / "words" / "blip")
    if not given.scenes.exists():
        shared.make_scenes(given.scenes)
    if not given.teacher.exists():
        shared.make_teacher(folder / "tiny")
    if not given.blip.exists():
        shared.make_blip(folder / "words")
    return given


def trained_a_little(job: Job, steps: int = 3) -> None:
    """Train so many steps, and stop as a person does."""
    take, taken = trainers.take_step, []

    def counted(loop, batch):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(loop.step)
        return take(loop, batch)

    with patch.object(trainers.loop, "take_step", counted):
        try:
            train(job)
        except KeyboardInterrupt:
            return
