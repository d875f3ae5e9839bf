"""A try does something hostile in a process of its own, with bounded time and memory; what came of it has one of a few words."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

VERDICTS = {
    "right": "it ended as an undisturbed one does, or what was given can be used",
    "refused": "an error named the thing before anything was lost",
    "unclear": "an error that does not name the thing, or is not one of ours",
    "late": "the error came after training had begun",
    "lost": "a sample was neither delivered nor named",
    "different": "the end is another than an undisturbed one's",
    "hang": "it was not over in time",
    "memory": "it wanted more memory than there was",
    "died": "the process ended without a word",
}
WELL = ("right", "refused")
SECONDS = 90  # for a try, of which most take less than two
BYTES = 3 << 30  # of memory for a try, beyond what its parent has
LONGEST = 1200  # characters of an error that somebody is to read
OURS = (ValueError, OSError, RuntimeError, ImportError, KeyboardInterrupt)


class Wrong(Exception):
    """What a try itself finds wrong: one of VERDICTS, and what was seen."""

    def __init__(self, verdict: str, seen: object) -> None:
        super().__init__(f"{verdict}: {seen}")
        self.verdict, self.seen = verdict, str(seen)


@dataclass(frozen=True)
class Try:
    """Something to do in an empty folder; its name says all that is needed to do it again."""

    kind: str
    name: str
    do: Callable[[Path], None]  # raises Wrong, or what the library raises
    about: tuple[str, ...]  # a clear error has one of these in it


def said(error: BaseException) -> str:
    """An error as a person sees it."""
    return f"{type(error).__name__}: {error}"


def judged(one: Try, error: BaseException) -> tuple[str, str]:
    """The word for an error, and what it said."""
    if isinstance(error, Wrong):
        return error.verdict, error.seen
    text = said(error)
    if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", text):
        return "memory", text
    is_ours = isinstance(error, OURS) and not isinstance(error, NotImplementedError)
    where = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    is_ours &= "vlkd_lab" in (where or [""])[-1] or getattr(error, "filename", None) is not None
    if is_ours and len(text) <= LONGEST and any(word in text for word in one.about):
        return "refused", text
    return "unclear", f"{text}\n{''.join(traceback.format_tb(error.__traceback__)[-4:])}"


def _work(one: Try, folder: Path, answers: int) -> None:
    """In the child: do it, and write what came of it."""
    os.setsid()
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    limit = psutil.Process().memory_full_info().data + BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.chdir(folder)  # where relative places are
    try:
        one.do(folder)
        found = ("right", "")
    except BaseException as error:
        found = judged(one, error)
    os.write(answers, json.dumps(found).encode())


def attempt(one: Try, folder: Path, seconds: float = SECONDS) -> dict:
    """Do it in a fork of this process; a line for the report."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    answers, theirs = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if not child:
        try:
            _work(one, folder, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    said_bytes = b""
    while left := max(0.0, start + seconds - time.monotonic()):
        if not select.select([answers], [], [], left)[0]:
            break
        part = os.read(answers, 1 << 16)
        said_bytes += part
        if not part:
            break
    os.close(answers)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)  # it had not begun
    status = os.wait4(child, 0)[1]
    took = time.monotonic() - start
    ended = ("hang", f"after {seconds:.0f} s") if took >= seconds else ("died", f"wait status {status}")
    verdict, seen = json.loads(said_bytes) if said_bytes else ended
    return dict(kind=one.kind, name=one.name, verdict=verdict, seen=seen, seconds=round(took, 2))


def run_tries(tries: Iterator[Try], folder: Path, report: Path) -> Iterator[dict]:
    """Do those that the report does not have; every line as soon as it is there."""
    known = {}
    if report.exists():
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        known = {(line["kind"], line["name"]): line for line in lines}
    for one in tries:
        line = known.get((one.kind, one.name))
        if line is None:
            line = attempt(one, folder)
            with report.open("a") as file:
                file.write(json.dumps(line) + "\n")
        yield line
