"""What a job needs ends: room on the disk, open files, memory, locks, a steady clock. It says so, and goes on when there is enough again."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

from crashes import files_in, in_child, weights_in
from given import METHODS, Given
from shared import lines_of
from tries import Try, Wrong

from vlkd_lab import project
from vlkd_lab.runs import Run
from vlkd_lab.trainers import open_job, train

SAID = {  # in a clear error, of which every part has a word in it
    "disk": ("no room is left", "No space left"),
    "files": ("Too many open files",),
    "memory": ("memory",),
}


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of a size, where a process may mount one."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    place = Path(f"/tmp/campaign-mount-{os.getpid()}")
    try:
        with small_disk(place, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        place.rmdir()


def size_of(run: Path) -> int:
    """Bytes of a run's files, each counted once."""
    stats = {path.stat().st_ino: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    return sum(stats.values())


def train_limited(method: str, job: dict, kind: int, limit: int) -> int:
    """Train with a limit of this process; 1 where an error says it, 0 where it was enough."""
    resource.setrlimit(kind, (limit, limit))
    return train_told(method, job, "files" if kind == resource.RLIMIT_NOFILE else "memory")


def train_told(method: str, job: dict, what: str) -> int:
    """Train; 1 where an error says what was missing, 0 where nothing was."""
    try:
        train(open_job(method, job))
    except BaseException as error:
        text = f"{error} {error.__cause__ or ''}"
        if any(word in text for word in SAID[what]) or isinstance(error, MemoryError):
            return 1
        traceback.print_exc()
        raise
    return 0


def check_as_whole(given: Given, method: str, run: Path, what: str) -> None:
    """Wrong, unless a run ended as one that was left alone."""
    whole = given.whole(method)
    for name, found in {"metrics": lines_of, "weights": weights_in}.items():
        if found(run) != found(whole):
            raise Wrong("different", f"{what}: other {name}")
    if Run(run).status()["state"] != Run(whole).status()["state"]:
        raise Wrong("different", f"{what}: its state is {Run(run).status()['state']}")
    if more := files_in(run) - files_in(whole):
        raise Wrong("different", f"{what}: left behind {sorted(more)[:5]}")


def check_told(status: int, told: int, run: Path, folder: Path, what: str) -> None:
    """Wrong, unless an error said what was missing, and the run's status too."""
    log = folder.with_suffix(".log")
    if status and ": memory," not in what:  # without memory a library may end as the OOM killer ends it
        raise Wrong("unclear", f"{what}: it ended with {status}; {log.read_text()[-700:] if log.exists() else ''}")
    state = Run(run).status()["state"] if (run / "status.json").exists() else "new"
    if told and state not in ("failed", "new", "running"):
        raise Wrong("different", f"{what}: its state is {state}")


def try_disk(given: Given, method: str, share: float, folder: Path) -> None:
    """A disk that has room for a share of a run, and then for all of it."""
    disk = folder / "disk"
    kilobytes = 16 + int(1.3 * share * size_of(given.whole(method)) / 1024)
    job = given.job(method, disk / "run", checkpoint_seconds=0.0)
    with small_disk(disk, kilobytes):
        status, told = in_child(partial(train_told, method, job, "disk"))
        check_told(status, told, disk / "run", folder, f"{kilobytes} kB of disk")
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        train(open_job(method, job))
        check_as_whole(given, method, disk / "run", f"{kilobytes} kB of disk")


def try_limit(given: Given, method: str, kind: int, share: float, folder: Path) -> None:
    """Few open files, or little memory, and then enough."""
    now = len(os.listdir("/proc/self/fd"))
    limit = now + int(share * 40) if kind == resource.RLIMIT_NOFILE else resource.getrlimit(kind)[0] - int((1 - share / 8) * (3 << 30))
    job = given.job(method, folder / "run", checkpoint_seconds=0.0)
    status, told = in_child(partial(train_limited, method, job, kind, limit))
    word = "open files" if kind == resource.RLIMIT_NOFILE else "memory"
    check_told(status, told, folder / "run", folder, f"limit: {word}, {limit}")
    train(open_job(method, job))
    check_as_whole(given, method, folder / "run", f"limit {kind} was {limit}")


def jumping(chance: random.Random) -> Callable[[], float]:
    """A clock that is put forward and back."""
    clock, off = time.time, [0.0]

    def now() -> float:
        if chance.random() < 0.05:
            off[0] = chance.choice([-1e8, -3600.0, -1.0, 0.0, 1.0, 3600.0, 1e8])
        return clock() + off[0]

    return now


def without_locks(*_: object) -> None:
    """As a network folder answers that has none."""
    raise OSError(errno.ENOLCK, "No locks available")


def try_odd(given: Given, method: str, oddity: AbstractContextManager, what: str, folder: Path) -> None:
    """A job under an odd clock, or on a disk without locks, ends as elsewhere."""
    with oddity:
        train(open_job(method, given.job(method, folder / "run", checkpoint_seconds=0.0)))
    check_as_whole(given, method, folder / "run", what)


def all_tries(given: Given, seed: int) -> Iterator[Try]:
    """Without end; without the right to mount there are no small disks."""
    chance = random.Random(f"resources {seed}")
    kinds = ["files", "memory", "clock", "locks", *["disk"] * (3 * can_mount())]
    for number in itertools.count():
        kind, method, share = chance.choice(kinds), chance.choice(METHODS), chance.random()
        name = f"seed {seed}: {kind}, {method}, {share:.4f} ({number})"
        doing = {
            "disk": partial(try_disk, given, method, share),
            "files": partial(try_limit, given, method, resource.RLIMIT_NOFILE, share),
            "memory": partial(try_limit, given, method, resource.RLIMIT_DATA, share),
            "clock": partial(try_odd, given, method, patch.object(time, "time", jumping(random.Random(name))), "a clock that jumps"),
            "locks": partial(try_odd, given, method, patch.object(project.fcntl, "flock", without_locks), "no locks"),
        }
        yield Try("resources", name, doing[kind], SAID.get(kind, ("cannot happen",)))
