"""Run folders, checkpoints and teachers with one file that is not as it was written: used as before, or refused by the file's name."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from crashes import weights_in
from given import METHODS, Given, trained_a_little
from shared import lines_of
from tries import Try, Wrong

from vlkd_lab.models import load_model
from vlkd_lab.runs import Run, find_run, finished_students, kept_checkpoints, newest_snapshot, run_table
from vlkd_lab.trainers import Diverged, current_student, fork_points, load_student, open_job, train

ODD = (None, "x", "", -1, 0, 1.5, True, [], {}, [1, "a"], {"a": 1}, 2**70, "1e999", "NaN", "Infinity", "../..", "a\0b", "<b>")
FREE = ("lock", "balance.html")  # nobody reads them


def places_in(value: Any, at: tuple = ()) -> list[tuple]:
    """Where values stand in what a JSON holds."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inside for place in places_in(part, (*at, key)))]


def with_odd_value(content: bytes, chance: random.Random) -> bytes:
    """A JSON of which one value is of another type, or one key is not there."""
    told = json.loads(content)
    place = chance.choice(places_in(told)[1:] or [()])
    if not place:
        return json.dumps(chance.choice(ODD)).encode()
    part = told
    for key in place[:-1]:
        part = part[key]
    if isinstance(part, dict) and chance.random() < 0.3:
        del part[place[-1]]
    else:
        part[place[-1]] = chance.choice(ODD)
    return json.dumps(told).replace('"1e999"', "1e999").replace('"NaN"', "NaN").replace('"Infinity"', "Infinity").encode()


def damaged(path: Path, chance: random.Random, may_flip: bool) -> str:
    """Damage a file; in words, how."""
    content = path.read_bytes()
    ways = ["gone", "empty", "cut", "zeros", "noise", "folder", "longer", "text", *["flipped"] * may_flip, *["odd value"] * (2 * (path.suffix == ".json"))]
    way = chance.choice(ways)
    path.unlink()
    at = chance.randrange(len(content) or 1)
    if way == "folder":
        path.mkdir()
    elif way == "odd value":
        path.write_bytes(with_odd_value(content, chance))
    elif way != "gone":
        flipped = bytes([content[at] ^ (1 << chance.randrange(8))]) if content else b""
        forms = {"empty": b"", "cut": content[:at], "zeros": bytes(len(content)), "noise": chance.randbytes(len(content)), "text": b"no such thing\n",
                 "longer": content + content[:100] + b"\0", "flipped": content[:at] + flipped + content[at + 1 :]}  # fmt: skip
        path.write_bytes(forms[way])
    return way


def begun(given: Given, method: str) -> Path:
    """A run that was stopped in its third step."""
    out = given.folder / "begun" / method
    if not out.exists():
        draft = out.with_name(f"{method}-draft")
        shutil.rmtree(draft, ignore_errors=True)
        trained_a_little(open_job(method, given.job(method, draft, checkpoint_seconds=0.0)), 2)
        draft.rename(out)
    return out


def pick(folder: Path, chance: random.Random) -> Path:
    """One of the files that somebody reads."""
    return chance.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in FREE])


def try_begun(given: Given, method: str, seed: str, _: Path) -> None:
    """Go on with a run of which a file is damaged."""
    template = begun(given, method)
    chance, run = random.Random(seed), template.with_name("at-work")  # as deep: what lies elsewhere is named relatively
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(template, run)
    path = pick(run, chance)
    damaged(path, chance, may_flip=path.name == "checkpoint.pt" or path.suffix == ".json")
    train(open_job(method, given.job(method, run, checkpoint_seconds=0.0)))
    whole = given.whole(method)
    about = str(path.relative_to(run))
    if Run(run).status()["state"] != Run(whole).status()["state"]:
        raise Wrong("different", f"{about}: its state is {Run(run).status()['state']}")
    ends = {name: content for name, content in weights_in(whole).items() if "/init/" not in name}
    found = weights_in(run)
    if changed := [name for name, content in ends.items() if found.get(name) != content]:
        raise Wrong("different", f"{about}: other weights in {changed}")
    if path.name != "metrics.jsonl" and lines_of(run) != lines_of(whole):
        raise Wrong("different", f"{about}: other metrics")


def looks(run: Path) -> dict[str, Callable[[], object]]:
    """What people do with a run that is over."""
    return {
        "status": lambda: Run(run).status(),
        "metrics": lambda: Run(run).metrics(),
        "result": lambda: Run(run).result(),
        "table": lambda: run_table(run.parent),
        "found": lambda: find_run(str(run)),
        "student": lambda: load_student(run / finished_students(Run(run))[-1] / "student"),
        "current": lambda: current_student(Run(run)),
        "forks": lambda: fork_points(Run(run)),
        "kept": lambda: kept_checkpoints(Run(run)),
        "snapshot": lambda: newest_snapshot(Run(run)),
    }


def try_look(given: Given, method: str, seed: str, folder: Path) -> None:
    """Look at a finished run of which a file is damaged."""
    chance, run = random.Random(seed), folder / "run"
    shutil.copytree(given.whole(method), run)
    damaged(pick(run, chance), chance, may_flip=True)
    looks(run)[chance.choice(list(looks(run)))]()


def try_teacher(given: Given, seed: str, folder: Path) -> None:
    """Begin with a teacher, or open a model, of which a file is damaged."""
    chance, teacher = random.Random(seed), folder / "teacher"
    method = chance.choice(METHODS[:5])
    shutil.copytree(given.blip if method == "Dlip" else given.teacher, teacher)
    damaged(pick(teacher, chance), chance, may_flip=True)
    if method != "Dlip" and chance.random() < 0.3:
        load_model(teacher)
    else:
        job = open_job(method, given.job(method, folder / "run", teacher=str(teacher)))
        with suppress(Diverged):  # of weights that are huge, and numbers all the same
            trained_a_little(job, 1)


def named(given: Given, kind: str, method: str, seed: str) -> tuple[str, ...]:
    """What a clear error names: the file, its folder, or what is in it."""
    chance = random.Random(seed)
    if kind == "teacher":
        method = chance.choice(METHODS[:5])
        path = pick(given.blip if method == "Dlip" else given.teacher, chance)
        return (path.name, "teacher")
    path = pick(begun(given, method) if kind == "begun" else given.whole(method), chance)
    return (path.name, path.parent.name, path.stem)


def all_tries(given: Given, seed: int) -> Iterator[Try]:
    """Without end; what is wrong follows from a try's name."""
    chance = random.Random(f"folders {seed}")
    does = {"begun": try_begun, "look": try_look}
    for number in itertools.count():
        kind, method = ("begun", "look", "teacher")[number % 3], chance.choice(METHODS)
        source = f"seed {seed}: {kind}: {number}"
        do = partial(try_teacher, given, source) if kind == "teacher" else partial(does[kind], given, method, source)
        yield Try("folders", f"{source}: {method if kind != 'teacher' else ''}", do, named(given, kind, method, source))
