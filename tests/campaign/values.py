"""Odd values of every parameter of every method: each is refused by its name at opening, or the job trains."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

from given import METHODS, Given, trained_a_little
from tries import Try, Wrong, said

from vlkd_lab.methods import find_method
from vlkd_lab.trainers import Diverged, open_job

INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 7, 1000, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**100)
FLOATS = (-1e38, -1.0, -0.0, 0.0, 5e-324, 1e-30, 1e-9, 0.5, 0.999999, 1.0, 1.000001, 20.0, 1e3, 1e9, 1e30, 3e38, 1e39, 1e300, math.inf, math.nan)
OTHERS = (True, False, None, 1.5, "", "x", "7", "nan", (), [1], {"a": 1}, b"x")
PLACES = (
    ".", "..", "/", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/fd/0", "README.md", "nowhere", "~", "~nobody/x",
    "a\0b", "\ud800", "x" * 300, "x/" * 3000, "{1..99999999}.tar", "{a,b", "*", "**/*", "[", "scenes:0", "scenes:-1", "scenes:99999999999",
    "scenes:x", "scenes:10,copies:2", "http://127.0.0.1:9/x.tar", "file:///dev/zero", "s3://", "memory://x", "hf-hub:", "hf-hub:../x",
    "timm:", "timm:resnet99", "ViT-B-32", "ViT-B-32/none", "local-dir:/", "pipe:echo x", "@list", ",", ",,", "a,,b",
)  # fmt: skip
WORDS = ("", " ", "all", "none", "auto", "True", "0", "-1", "1e400", "1,2", "1;2", "a=1", "=", "=1", "a=", "a=nan", "a=-1", "a:1", ":", "a:b:c",
         "contrastive=1", "contrastive=1e39", "contrastive=0", "contrastive=1, contrastive=2", "\u202e", "é", "<b>", "${x}", "%s", "{}", "\n")  # fmt: skip

SLOW = ("nodes", "compile")  # one waits for other machines, one for a compiler
WRITTEN = ("out", "cache_dir", "features")  # folders that a job makes: not outside of the try's own


def mutated(text: str, chance: random.Random) -> str:
    """A valid text with a small fault in it."""
    place = chance.randrange(len(text) + 1)
    odd = chance.choice(["", ",", "=", " ", "0", "-", ".", "x", "é", "\0", text])
    return text[:place] + odd + text[place + chance.randrange(2) :]


def odd_value(kind: str, default: object, chance: random.Random) -> object:
    """Of a field's type mostly, and at a bound or beyond."""
    if chance.random() < 0.08:
        return chance.choice(OTHERS)
    if kind == "int":
        return chance.choice([*INTEGERS, int(10 ** chance.uniform(0, 19)), 2 * default, default + 1, -default])
    if kind == "float":
        return chance.choice([*FLOATS, 10 ** chance.uniform(-40, 40), 2 * default, -default])
    if kind == "bool":
        return chance.choice([not default, "yes", "TRUE", 1, 0, None])
    texts = [*PLACES, *WORDS, *(mutated(default, chance) for _ in range(12) if default)]
    return chance.choice(texts)


def try_value(given: Given, method: str, name: str, value: object, folder: Path) -> None:
    """Open a job with the value; where it opens, train a little."""
    changes = {"out": str(folder / "run")} | {name: value}
    job = open_job(method, given.job(method, folder / "run") | changes)
    try:
        trained_a_little(job)
    except Diverged:
        return  # there is no telling before
    except Exception as error:
        if name not in str(error) or not any("total" in line for line in job.run.metrics()):
            raise
        raise Wrong("late", said(error)) from error


def words_about(name: str, value: object) -> tuple[str, ...]:
    """What a clear error names: the parameter, or the text that was given for it."""
    return (name, name.replace("_", " "), *([repr(value), value if len(value) > 2 else name] if isinstance(value, str) and value else []))


def all_tries(given: Given, seed: int) -> Iterator[Try]:
    """Without end."""
    chance = random.Random(f"values {seed}")
    kinds = {method: find_method(method).parameters for method in METHODS}
    seen = set()
    while True:
        method = chance.choice(METHODS)
        field = chance.choice(fields(kinds[method]))
        kind = field.type if isinstance(field.type, str) else field.type.__name__
        value = odd_value(kind, field.default, chance)
        name = f"{method} {field.name}={value!r}"
        if field.name in WRITTEN and isinstance(value, str) and (value.startswith(("/", "~")) or ".." in value):
            continue
        if field.name in SLOW and value not in (field.default, False, 0, -1):
            continue
        if name not in seen:
            seen.add(name)
            yield Try("values", name, partial(try_value, given, method, field.name, value), words_about(field.name, value))
