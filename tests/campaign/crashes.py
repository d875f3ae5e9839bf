"""A job is killed at one of its writes, in the middle of the line where it writes itself, and started again: it ends as if undisturbed."""

from __future__ import annotations

import builtins
import io
import itertools
import os
import random
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from given import METHODS, Given
from shared import lines_of
from tries import Try, Wrong

from vlkd_lab.runs import Run
from vlkd_lab.trainers import open_job, train

KINDS = {  # in words -> what is changed
    "": {},
    "2 readers": dict(workers=2),
    "1 checkpoint": dict(checkpoint_seconds=1e6),
    "all checkpoints": dict(keep_checkpoints=9),
    "all snapshots": dict(keep_snapshots=9, validate_every=1),
    "bf16": dict(precision="bf16"),
}
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")


class Writes:
    """Counts what a process does to files below a folder, and dies at one of these moments."""

    def __init__(self, folder: Path, last: int | None = None) -> None:
        self.folder, self.last, self.count, self.owner = str(folder), last, 0, os.getpid()

    def next(self) -> bool:
        """Whether this moment is the last one."""
        self.count += 1
        return self.count == self.last

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, values: tuple) -> None:
        """An audit hook."""
        if os.getpid() != self.owner:
            return  # a reader's
        is_write = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write or event in CHANGES) and str(values[0]).startswith(self.folder) and self.next():
            self.die()

    def listen(self) -> None:
        """From now on, in this process."""
        sys.addaudithook(self.hear)
        plain = io.open

        def opened(file: Any, mode: str = "r", buffering: int = -1, *others: Any, **further: Any) -> Any:
            is_ours = isinstance(file, str | Path) and str(file).startswith(self.folder) and not set(mode).isdisjoint("wax+")
            if not is_ours or buffering == 0:
                return plain(file, mode, buffering, *others, **further)
            raw = Torn(str(file), mode.replace("b", "").replace("t", ""))
            raw.writes = self
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return binary
            words = dict(zip(("encoding", "errors", "newline"), others, strict=False)) | further
            return io.TextIOWrapper(binary, **{name: words.get(name) for name in ("encoding", "errors", "newline")}, line_buffering=buffering == 1)

        builtins.open = io.open = opened


class Torn(io.FileIO):
    """A file whose last write is half a write."""

    writes: Writes

    def write(self, content: Any) -> int | None:
        if os.getpid() == self.writes.owner and self.writes.next():
            super().write(bytes(content)[: len(content) // 2])
            self.writes.die()
        return super().write(content)


def in_child(do: Any) -> tuple[int, int]:
    """Do it in a fork; its exit status, and what it returned."""
    theirs, ours = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(ours, str(do()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(ours)
    told = b""
    while part := os.read(theirs, 100):
        told += part
    os.close(theirs)
    return os.waitpid(child, 0)[1], int(told or 0)


def train_watched(method: str, job: dict, last: int | None = None) -> int:
    """Train to the end or to the moment; how many moments there were."""
    writes = Writes(Path(job["out"]), last)
    writes.listen()
    train(open_job(method, job))
    return writes.count


def files_in(folder: Path) -> set[str]:
    """What lies in a run, hidden files and all."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def weights_in(folder: Path) -> dict[str, bytes]:
    """The models that a run left, as bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*_model.safetensors"))}


def try_crash(given: Given, method: str, changes: dict, share: float, folder: Path) -> None:
    """Kill a job at a share of its writes, start it again, and compare with one that was left alone."""
    whole = given.whole(method, **changes)
    job = given.job(method, folder / "run", checkpoint_seconds=0.0) | changes
    counted = given.folder / "moments" / whole.name
    if not counted.exists():
        status, moments = in_child(partial(train_watched, method, job | dict(out=str(folder / "counted"))))
        if status or not moments:
            raise Wrong("died", f"undisturbed, with {status}")
        counted.parent.mkdir(exist_ok=True)
        counted.write_text(str(moments))
    last = 1 + int(share * int(counted.read_text()))
    status, _ = in_child(partial(train_watched, method, job, last))
    if status not in (0, signal.SIGKILL):
        raise Wrong("different", f"killed at moment {last} it ended with {status}")
    train(open_job(method, job))
    run = folder / "run"
    if (state := Run(run).status()["state"]) != Run(whole).status()["state"]:
        raise Wrong("different", f"after moment {last} its state is {state}")
    if lines_of(run) != lines_of(whole):
        raise Wrong("different", f"after moment {last}: other metrics")
    if weights_in(run) != weights_in(whole):
        raise Wrong("different", f"after moment {last}: other weights")
    if more := files_in(run) - files_in(whole):
        raise Wrong("different", f"after moment {last}: left behind {sorted(more)[:5]}")
    if less := files_in(whole) - files_in(run):
        raise Wrong("different", f"after moment {last}: not there {sorted(less)[:5]}")


def all_tries(given: Given, seed: int) -> Iterator[Try]:
    """Without end."""
    chance = random.Random(f"crashes {seed}")
    for number in itertools.count():
        method, kind, share = chance.choice(METHODS), chance.choice(list(KINDS)), chance.random()
        name = f"{method} {kind or 'as it is'}, killed at {share:.6f} of its writes ({number})"
        yield Try("crashes", name, partial(try_crash, given, method, KINDS[kind], share), ("cannot happen",))
