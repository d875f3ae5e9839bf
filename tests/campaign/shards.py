"""Shards with one thing wrong: whatever is not hit is delivered as it was, what is hit is delivered or named, or the shard is refused."""

from __future__ import annotations

import io
import itertools
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from given import Given
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor
from tries import Try, Wrong

from vlkd_lab.data import View, inspect_shards, read_once

COUNT = 12  # samples of a shard
Members = list[tuple[tarfile.TarInfo, bytes]]


def picture(kind: str, chance: random.Random) -> bytes:
    """A picture that is odd, broken, or none."""
    size = (chance.choice([1, 3, 32, 200]), chance.choice([1, 5, 32, 300]))
    plain = Image.fromarray(np.random.default_rng(chance.randrange(2**32)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    out = io.BytesIO()
    plain.save(out, "png" if kind != "jpeg cut" else "jpeg")
    content = out.getvalue()
    if kind in ("png cut", "jpeg cut"):
        return content[: chance.randrange(len(content))]
    if kind == "png flipped":
        return flipped(content, chance)
    if kind == "png huge":  # 60,000 × 60,000 in its header
        return content[:16] + (60000).to_bytes(4, "big") * 2 + content[24:]
    if kind == "webp huge":  # a canvas of 16,384 × 16,384
        canvas = b"VP8X" + (10).to_bytes(4, "little") + bytes([16, 0, 0, 0]) + (16383).to_bytes(3, "little") * 2
        return b"RIFF" + (len(canvas) + 4).to_bytes(4, "little") + b"WEBP" + canvas
    if kind in ("1", "L", "LA", "P", "RGBA", "I;16", "CMYK", "F"):
        form = "tiff" if kind in ("CMYK", "F") else "png"
        deep = Image.fromarray((np.asarray(plain.convert("L")).astype(np.uint16) * 257)) if kind == "I;16" else plain.convert(kind)
        deep.save(out := io.BytesIO(), form)
        return out.getvalue()
    return {"empty": b"", "text": b"no picture", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "zeros": bytes(5000), "gzip": b"\x1f\x8b\x08" + bytes(30)}[kind]


PICTURES = ("png cut", "jpeg cut", "png flipped", "png huge", "webp huge", "1", "L", "LA", "P", "RGBA", "I;16", "CMYK", "F",
            "empty", "text", "svg", "zeros", "gzip")  # fmt: skip
CAPTIONS = (b"", b" ", b"\n\n", b"\x00", b"\xff\xfe", b"\xef\xbb\xbfa star", "\u202ea star".encode(), b"a\nb\nc", b"x" * 2_000_000, b"\xed\xa0\x80",
            b"<script>alert(1)</script>", b"a" + b"\xcc\x81" * 5000, "漢字 🎈".encode("utf-16"), b"\r\n")  # fmt: skip
DEEP = b"[" * 200_000
JSONS = (b"", b"{", b"null", b"[]", b"1", b'"x"', b'{"captions": Infinity}', b'{"captions": [1e999]}', b'{"captions": {"a": 1}}', DEEP, b'{"a":' * 50_000,
         b'{"captions": ["a", 1, null, ["b"]]}', b'{"cls": 1e999}', b'{"cls": 99999999999999999999}', b'{"cls": -1}', b'{"caption": NaN}', b"\xff{}",
         b'{"captions": []}', b'{"captions": "\\ud800"}', b'{"a": 1, "a": 2}', b'{"' + b"k" * 1_000_000 + b'": 1}')  # fmt: skip
LABELS = (b"", b"-1", b"1e999", b"nan", b"99999999999999999999", b"x", b"1.5", "١".encode(), b"1\n2")
NAMES = ("../up.png", "/root.png", "a/b/c.png", ".png", ".", "x", "x.png.png", "x.y.z.png", "é.png", "a b.png", "\u202e.png", "\n.png", "x" * 300 + ".png",
         "__MACOSX/._a.png", "scene.TXT", "scene..png", "s\udcff.png", "-rf.png", "*.png", "con.png", "000000.json", "000001.png")  # fmt: skip
KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z")


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Some bytes of it changed."""
    out = bytearray(content)
    for _ in range(chance.choice([1, 1, 4, 64])):
        if out:
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def members_of(path: Path) -> Members:
    """The first samples of a shard."""
    with tarfile.open(path) as file:
        every = [(member, file.extractfile(member).read()) for member in file if member.isfile()]
    keys = sorted({member.name.split(".")[0] for member, _ in every})[:COUNT]
    return [(member, content) for member, content in every if member.name.split(".")[0] in keys]


def packed(members: Members) -> bytes:
    """A tar of them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as file:
        for member, content in members:
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"):
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
            else:
                member.size = 0
                file.addfile(member)
    return out.getvalue()


def with_content(members: Members, ending: str, content: bytes, chance: random.Random) -> tuple[Members, set[str]]:
    """One sample's file of an ending has another content, or is there beside its others; and whose."""
    key = chance.choice(sorted({member.name.split(".")[0] for member, _ in members}))
    name = f"{key}.{ending}"
    kept = [(member, old) for member, old in members if member.name != name]
    at = max(index for index, (member, _) in enumerate(kept) if member.name.split(".")[0] == key)
    return [*kept[: at + 1], (tarfile.TarInfo(name), content), *kept[at + 1 :]], {key}


def with_member(members: Members, name: str, kind: bytes, chance: random.Random) -> tuple[Members, set[str]]:
    """A member of another kind, or with an odd name, between two samples."""
    starts = [index for index, (member, _) in enumerate(members) if index == 0 or member.name.split(".")[0] != members[index - 1][0].name.split(".")[0]]
    at = chance.choice([*starts, len(members)])
    new = tarfile.TarInfo(name)
    new.type = kind
    new.linkname = chance.choice(["", "/etc/passwd", members[0][0].name, "nowhere"])
    return [*members[:at], (new, picture("L", chance)), *members[at:]], {name.split("/")[-1].split(".")[0]}


def mutations(chance: random.Random) -> tuple[str, Callable[[Members], tuple[Members, set[str]]]]:
    """What is wrong, in words, and what makes it."""
    endings = {"png": PICTURES, "txt": CAPTIONS, "json": JSONS, "cls": LABELS}
    ending = chance.choice([*endings, "name", "kind"])
    if ending == "name":
        name = chance.choice(NAMES)
        return f"a member {name!r}", partial(with_member, name=name, kind=tarfile.REGTYPE, chance=chance)
    if ending == "kind":
        kind, name = chance.choice(KINDS), chance.choice(["odd.png", "000000.txt", "odd.txt"])
        return f"a member {name} of kind {kind!r}", partial(with_member, name=name, kind=kind, chance=chance)
    number = chance.randrange(len(endings[ending]))
    found = endings[ending][number]
    content = picture(found, chance) if ending == "png" else found
    shown = found if ending == "png" else repr(content[:40])
    return f"{ending}: {shown}", partial(with_content, ending=ending, content=content, chance=chance)


def with_file_beside(folder: Path, chance: random.Random) -> str:
    """Another program's word about how many samples there are; and what it says."""
    name = chance.choice(["shard_stats.json", "sizes.json", "index.json"])
    value = chance.choice(["-1", "0", "1e999", "Infinity", "NaN", '"12"', "99999999999999999999", "11", "13", "null", "[]", "[" * 100_000, "{", "1.5"])
    inside = {"shard_stats.json": '{"successes": %s}', "sizes.json": '{"shard.tar": %s}', "index.json": '{"shardlist": [{"url": "shard.tar", "nsamples": %s}]}'}
    text = chance.choice([inside[name] % value, inside[name] % value, value])
    (folder / name).write_text(text)
    return f"{name}: {text[:60]}"


@cache
def view() -> View:
    """Pictures as they are, and no words: captions are kept as text anyway."""
    return View(Compose([Resize((32, 32)), ToTensor()]), lambda captions: torch.zeros(len(captions), 1, dtype=torch.long))


def seen_in(path: Path) -> tuple[dict[str, tuple], str, bool]:
    """What is delivered, by key; what is said besides; whether the shard is read."""
    report = inspect_shards(str(path), cache=False, progress=False)
    told = f"{report} " + " ".join(shard.problem for shard in report.damaged)
    delivered = {}
    for batch in read_once(report, view(), 8) if report.usable else ():
        for key, image, caption, label in zip(batch.keys, batch.image, batch.captions, batch.labels, strict=True):
            delivered[key.rpartition("/")[2]] = (image.numpy().tobytes(), caption, label)
        told += " ".join(f"{name}: {reason}" for name, reason in batch.skipped)
    return delivered, told, bool(report.usable)


@cache
def undisturbed(scenes: Path, folder: Path) -> tuple[Members, dict[str, tuple]]:
    """The samples, and what is delivered of them where nothing is wrong."""
    members = members_of(scenes / "train-000000.tar")
    path = folder / "whole.tar"
    path.write_bytes(packed(members))
    return members, seen_in(path)[0]


def try_shard(given: Given, name: str, folder: Path) -> None:
    """Make a shard with the fault that belongs to the name, and read it."""
    chance = random.Random(name)
    members, before = undisturbed(given.scenes, given.folder)
    path, hit = folder / "shard.tar", set(before)
    kind = name.split(":")[1].strip()
    if kind == "samples":
        changed, hit = mutations(chance)[1](members)
        path.write_bytes(packed(changed))
    elif kind == "bytes":
        content = broken(packed(members), chance)
        path.write_bytes(content)
        before = {key: found for key, found in before.items() if re.search(rf"{key}\.(jpg|png|webp|txt|json|cls)".encode(), content)}  # else nothing is left of it
    else:
        path.write_bytes(packed(members))
        with_file_beside(folder, chance)
        hit = set()
    delivered, told, is_read = seen_in(path)
    for key in before if is_read else ():
        if key in delivered and key not in hit and delivered[key] != before[key]:
            raise Wrong("different", f"{key} is {delivered[key][1:]}, was {before[key][1:]}; {told}")
        if key not in delivered and key not in told:
            raise Wrong("lost", f"{key}; {told}")
    if not is_read and "shard" not in told:
        raise Wrong("unclear", told)


def broken(content: bytes, chance: random.Random) -> bytes:
    """A tar that a disk or a transfer has damaged."""
    start = chance.randrange(len(content))
    size = chance.choice([1, 100, 512, 1024, 5000])
    middle = chance.choice([b"", bytes(size), b"\xff" * size, content[start : start + size] * 2, b"0" * size])
    cuts = [flipped(content, chance), content[:start], content[:start] + middle + content[start + size :], content + content, content[start:]]
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    at = chance.choice(headers)
    field = chance.choice([(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
    header = bytearray(content[at : at + 512])
    odd = chance.choice([b"\0", b"9", b"7", b"-", b"\x80", b"\xff", b" "]) * field[1]
    header[field[0] : sum(field)] = odd
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return chance.choice([*cuts, content[:at] + bytes(header) + content[at + 512 :]])


def all_tries(given: Given, seed: int) -> Iterator[Try]:
    """Without end; what is wrong follows from a try's name."""
    for number in itertools.count():
        kind = ("samples", "samples", "bytes", "bytes", "beside")[number % 5]
        name = f"seed {seed}: {kind}: {number}"
        if kind == "samples":
            name += f": {mutations(random.Random(name))[0]}"
        yield Try("shards", name, partial(try_shard, given, ":".join(name.split(":")[:3])), ("shard",))
