"Text files and folders of pictures as parts: every sentence once, in its order, and nothing that is no text"

import gzip
import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from vlkd_lab import sources as S
from vlkd_lab.data import PairStream, View, find_images, find_sentences, inspect_shards, read_once


def keep_numbers(texts):
    return torch.tensor([[len(text)] for text in texts])


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("lib_name = vlkd_lab\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("per_part", [1, 7, 40, 0])
def test_every_sentence_once_in_its_order(here, end, per_part):
    chance = random.Random(per_part)
    lines = ["".join(chance.choice("aé漢🙂 ") for _ in range(chance.randrange(0, 30))) for _ in range(180)]
    lines = [line if line.strip() else "" for line in lines]
    (here / "said.txt").write_bytes(end.join(lines).encode())
    parts = S.text_parts(here / "said.txt", here / "cache", per_part)
    found = [(int(sample["__key__"]), sample["txt"].decode()) for part in parts for sample in S.part_samples(part)]
    assert found == [(number, line) for number, line in enumerate(lines, start=1) if line]
    counts = [S.read_part(part)["part"].count for part in parts]
    assert sum(counts) == len(found) and all(count == (per_part or 16) for count in counts[:-1])
    assert not any(map(S.part_problem, parts))


def test_a_file_without_a_last_line_feed_and_one_with_very_long_lines(here, monkeypatch):
    monkeypatch.setattr(S, "_LONGEST", 16)
    (here / "long.txt").write_text("short\n" + "x" * 100 + "\nlast")
    found = [sample["txt"].decode() for part in S.text_parts(here / "long.txt", here / "cache") for sample in S.part_samples(part)]
    assert found == ["short", "x" * 16, "last"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no sentence"),
        (b" \n\t\n\n", "holds no sentence: it has 5 bytes"),
        ("ein Stern\n".encode("utf-16"), "is UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16"),
        ("ein Stern\n".encode("utf-32"), "is UTF-32"),
        ("été\n".encode("latin-1") * 20, r"20 of 20 lines cannot be read \(line 1 is not UTF-8 at byte 0\)"),
        (b"fine\n" * 10 + b"a\0b\n", r"1 of 11 lines cannot be read \(line 11 holds a NUL byte at byte 1\)"),
        (bytes(range(256)) * 40, "lines cannot be read"),
        (gzip.compress(b"a star\n"), "is compressed: unpack it"),
    ],
    ids=["empty", "blank", "utf-16", "utf-32", "latin-1", "nul", "binary", "gzip"],
)
def test_what_is_no_text_is_refused_in_a_line(here, content, message):
    (here / "wrong.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        find_sentences("wrong.txt")
    assert "\n" not in str(error.value) and "wrong.txt" in str(error.value) and not list(here.rglob("*.lines.json"))


def test_a_few_broken_lines_are_bad_samples(here):
    (here / "said.txt").write_bytes(b"a star\n" * 50 + b"caf\xe9\n" + b"a\0b\n" + b"a house\n" * 50)
    report = inspect_shards(find_sentences("said.txt"))
    assert report.total == 102 and not report.damaged
    (batch,) = read_once(report, View(None, keep_numbers), 200)
    assert len(batch) == 100 and dict(batch.skipped) == {
        "said-000003/000000051": "line 51 is not UTF-8 at byte 3", "said-000003/000000052": "line 52 holds a NUL byte at byte 1",
    }  # fmt: skip


def test_parts_are_made_again_only_when_something_changed(here):
    (here / "said.txt").write_text("a star\n" * 500)
    before = find_sentences("said.txt")
    stamps = {path: path.stat().st_mtime_ns for path in before}
    assert find_sentences("said.txt") == before and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    fingerprint = inspect_shards(before).fingerprint
    os.utime("said.txt", ns=(1, 1))
    assert not inspect_shards(before).damaged, "touched, and the same all the same"
    assert inspect_shards(find_sentences("said.txt")).fingerprint == fingerprint
    (here / "said.txt").write_text("a star\n" * 499 + "a moon\n")
    assert "was changed since" in inspect_shards(before).damaged[-1].problem
    assert inspect_shards(find_sentences("said.txt")).fingerprint != fingerprint
    (here / "said.txt").write_text("a star\n" * 20)
    after = find_sentences("said.txt")
    assert len(after) == 2 and inspect_shards(after).total == 20 and len(list(before[0].parent.glob("*.lines.json"))) == 2
    os.remove("said.txt")
    assert "is gone" in inspect_shards(after).damaged[0].problem
    after[0].write_text("{}")
    assert inspect_shards(after).damaged and S.read_part(before[0], whole=False) == {}


def test_equal_names_in_two_folders_and_lists_of_files(here):
    for folder in "xy":
        (here / folder).mkdir()
        (here / folder / "said.txt").write_text(f"sentence of {folder}\n" * 3)
    report = inspect_shards(find_sentences("x/said.txt, y/said.txt"))
    assert report.total == 6 and len({shard.name for shard in report.shards}) == 2
    assert find_sentences("x") == find_sentences("x/*.txt") == find_sentences(["x/said.txt"])
    with pytest.raises(ValueError, match="named more than once"):
        find_sentences("x,x/said.txt")
    with pytest.raises(FileNotFoundError, match="not found"):
        find_sentences("z.txt")
    (here / "x" / "said.txt").rename(here / "x" / "said.md")
    with pytest.raises(FileNotFoundError, match="neither a shard nor a .txt file"):
        find_sentences("x")


@pytest.fixture
def pictures(here):
    chance = np.random.default_rng(0)
    for k in range(30):
        path = here / "seen" / ["", "a", "a/b"][k % 3] / f"{k:02d}{['.jpg', '.PNG', '.webp'][k % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)
    (here / "seen" / ".hidden.jpg").write_bytes(b"x")
    (here / "seen" / "notes.txt").write_text("x")
    return here / "seen"


def test_a_folder_of_pictures_is_read_whole_and_in_order(pictures):
    report = inspect_shards(find_images("seen"))
    keys = [sample["__key__"] for shard in report.shards for sample in S.part_samples(shard.path)]
    assert report.total == 30 and len(report.shards) == 2 and len(set(keys)) == 30 and keys == sorted(keys)
    stream = PairStream(report, View(lambda image: torch.zeros(3, 4, 4), None), 10)
    batches = [next(stream.batches(k)) for k in range(3)]
    assert sorted(key for batch in batches for key in batch.keys) == sorted(f"{s.name}/{x['__key__']}" for s in report.shards
                                                                           for x in S.part_samples(s.path))  # fmt: skip
    fingerprint = report.fingerprint
    Image.new("RGB", (9, 12)).save(pictures / "00.jpg")
    assert inspect_shards(report.shards[0].path).damaged[0].problem.endswith("were changed since the part was made")
    assert inspect_shards(find_images("seen")).fingerprint != fingerprint
    with pytest.raises(ValueError, match="holds no picture"):
        os.makedirs("none"), find_images("none")


def test_two_names_that_differ_in_their_ending_or_a_dot_are_two_samples(here):
    os.makedirs("seen")
    for name in ("x.jpg", "x.png", "x.y.jpg", "x_y.jpg"):
        Image.new("RGB", (8, 8)).save(f"seen/{name}")
    keys = [sample["__key__"] for sample in S.part_samples(find_images("seen")[0])]
    assert len(set(keys)) == 4 and not any("." in key for key in keys)


def test_a_picture_that_vanished_or_is_none_is_a_bad_sample(pictures):
    parts = find_images("seen")
    about = json.loads(parts[0].read_text())
    (pictures / about["files"][0][0]).write_bytes(b"no picture")
    os.remove(pictures / about["files"][1][0])
    samples = list(S.part_samples(parts[0]))
    assert len(samples) == about["count"] and "cannot be read" in samples[1]["__problem__"]
    report = inspect_shards(find_images("seen"))
    (batch,) = read_once(report, View(lambda image: torch.zeros(3, 4, 4), None), 99)
    assert len(batch) == 28 and batch.skipped[0][1].startswith("image is no JPEG, PNG or WebP file")


def test_several_readers_find_enough_parts(here):
    (here / "said.txt").write_text("".join(f"sentence {k}\n" for k in range(13_000)))
    report = inspect_shards(find_sentences("said.txt"))
    assert len(report.shards) == 64
    parts = [PairStream(report, View(None, keep_numbers), 700, rank=rank, world_size=16) for rank in range(16)]
    seen = [key for stream in parts for key in next(stream.batches()).keys]
    assert len(set(seen)) == len(seen)
