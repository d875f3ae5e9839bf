"Shards: found, checked, split, shuffled, resumed; bad samples named and counted"

import io
import json
import os
import pickle
import random
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import tar
from PIL import Image
from torchvision import transforms as T

from vlkd_lab import data as D
from vlkd_lab.data import archives
from vlkd_lab.data import stream as stream_room

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def transform(size):
    steps = [T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(size), T.ToTensor(), T.Normalize(MEAN, STD)]
    return T.Compose(steps)


def codes(captions):
    return torch.tensor([[ord(letter) % 256 for letter in caption.ljust(24)[:24]] for caption in captions])


VIEW = D.View(transform(16), codes)


def picture(seed, size=(20, 20), kind="jpeg", mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(out := io.BytesIO(), kind)
    return out.getvalue()


def pair(n):
    return [(f"{n:05d}.jpg", picture(n)), (f"{n:05d}.txt", f"picture {n}".encode()), (f"{n:05d}.cls", str(n % 3).encode())]


def members(numbers):
    return [member for n in numbers for member in pair(n)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "Five shards of unequal size, 70 samples"
    folder, start = tmp_path_factory.mktemp("shards"), 0
    for number, size in enumerate((10, 14, 20, 8, 18)):
        tar(folder / f"part-{number:05d}.tar{'.gz' * (number == 3)}", members(range(start, start + size)))
        start += size
    return folder


@pytest.fixture(scope="module")
def report(shards):
    return D.inspect_shards(shards, cache=False, progress=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def keys(stream, count, start=0):
    return [batch.keys for batch in islice(stream.batches(start), count)]


def assert_same(a, b):
    assert (a.keys, a.captions, a.labels, a.skipped) == (b.keys, b.captions, b.labels, b.skipped)
    assert torch.equal(a.image, b.image) and torch.equal(a.text, b.text)


# finding


def test_all_ways_of_naming_shards(shards):
    plain = [shards / f"part-{n:05d}.tar" for n in range(3)]
    assert D.find_shards(f"{shards}/part-{{00000..00002}}.tar") == plain
    assert D.find_shards(f"{shards}/part-0000{{0,1,2}}.tar") == plain
    assert D.find_shards(plain) == D.find_shards([str(p) for p in plain]) == plain
    assert D.find_shards("::".join(map(str, plain))) == D.find_shards(",".join(map(str, plain))) == plain
    assert D.find_shards(plain[0]) == plain[:1]
    assert len(D.find_shards(shards)) == 5 and len(D.find_shards(f"{shards}/*.gz")) == 1


def test_paths_start_at_the_root(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("lib_name = vlkd_lab\n")
    (tmp_path / "nbs").mkdir()
    tar(tmp_path / "a.tar", members([0]))
    monkeypatch.chdir(tmp_path / "nbs")
    assert D.project_root() == tmp_path and D.find_shards("a.tar") == [tmp_path / "a.tar"]


def test_missing_shards_are_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"part-\{00000..00009\}.tar: 6 of 10 not found \(part-00003.tar, part-00005") as error:
        D.find_shards(f"{shards}/part-{{00000..00009}}.tar")
    assert "part-00003.tar.gz" in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere.*nearest that does is"):
        D.find_shards(tmp_path / "nowhere" / "a.tar")
    with pytest.raises(FileNotFoundError, match="no shard"):
        D.find_shards(tmp_path)
    (tmp_path / "a.zip").touch()
    cases = [("", "no shards"), ([], "no shards"), (tmp_path / "a.zip", "shards end in"), ("{a", "braces")]
    for wrong, words in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            D.find_shards(wrong)
    with pytest.raises(ValueError, match="more than once"):
        D.find_shards([shards / "part-00000.tar", shards])


# preflight


def test_count_and_report(report):
    assert [shard.count for shard in report.shards] == [10, 14, 20, 8, 18] and report.total == 70 and not report.damaged
    entry = json.loads(json.dumps(report.to_json()))
    assert entry["total"] == 70 and entry["fingerprint"] == report.fingerprint and "70 samples" in str(report)


def test_fingerprint(shards, report, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    assert D.inspect_shards(copy).fingerprint == report.fingerprint
    size = (copy / "part-00002.tar").stat().st_size
    changed = {
        "other pictures": [(name, picture(99) if name.endswith("jpg") else content) for name, content in members(range(24, 44))],
        "another order": [*members(range(25, 44)), *members([24])],
        "another first member": [("99924.jpg", picture(24)), *members(range(24, 44))[1:]],
        "another size": members(range(24, 40)),
    }
    for what, content in changed.items():
        tar(copy / "part-00002.tar", content)
        assert (copy / "part-00002.tar").stat().st_size == size or what == "another size"
        assert D.inspect_shards(copy).fingerprint != report.fingerprint, what
    assert D.inspect_shards(copy / "part-00000.tar").fingerprint != report.fingerprint


@pytest.mark.parametrize("size", [0, 1, 100, 2048, 10_240, 51_200, 10_485_760, 400_000_000])
def test_a_digest_reads_one_per_cent_over_the_whole_file(tmp_path, size):
    path = tmp_path / "a"
    with open(path, "wb") as file:
        file.truncate(size)
    read = []
    original = archives._read_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "_read_at", lambda file, start, length: read.append((start, length)) or original(file, start, length))
        before = D.content_digest(path)
    assert sum(length for _, length in read) <= max(size / 100, 4)
    starts = [start for start, _ in read]
    if size >= 10_485_760:
        assert len(read) == 64 and max(b - a for a, b in zip(starts, starts[1:], strict=False)) <= size // 63
        assert starts[-1] > size * 0.98
    for start, length in (read[0], read[-1]):
        if start < size:
            with open(path, "r+b") as file:
                file.seek(min(start + length, size) - 1)
                file.write(b"x")
            assert D.content_digest(path) != before
    if size:
        os.truncate(path, size - 1)
        assert D.content_digest(path) != before


def test_cache_follows_the_file(tmp_path):
    path = tar(tmp_path / "a.tar", members(range(3)))
    assert D.inspect_shards(path).total == D.inspect_shards(path).total == 3
    tar(path, members(range(30)))
    assert D.inspect_shards(path).total == 30
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{broken")
    assert D.inspect_shards(path).total == 30


def test_stats_of_img2dataset(tmp_path):
    path = tar(tmp_path / "00000.tar", members(range(3)))
    stats = tmp_path / "00000_stats.json"
    stats.write_text('{"successes": 7}')
    os.utime(path, ns=(1, 1))
    wrong = D.inspect_shards(path, cache=False)
    assert wrong.shards[0].counted_by == "stats" and wrong.total == 7
    with pytest.raises(ValueError, match="holds 3 samples, but the preflight counted 7"):
        keys(D.PairStream(wrong, VIEW, 2), 9)
    os.utime(stats, ns=(0, 0))
    assert D.inspect_shards(path, cache=False).total == 3


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_damage_is_found(tmp_path, ending):
    whole = tar(tmp_path / f"whole.{ending}", members(range(20))).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2 // 512 * 512 + 100] ^= 255
    cases = {"half": whole[: len(whole) // 2], "nothing": b"", "text": b"no tar"} | ({"flipped": flipped} if ending == "tar.gz" else {})
    for name, content in cases.items():
        (tmp_path / f"{name}.{ending}").write_bytes(content)
    tar(tmp_path / f"empty.{ending}", [])
    report = D.inspect_shards(tmp_path, cache=False)
    assert {shard.name for shard in report.damaged} == {*cases, "empty"} and report.total == 20
    with pytest.raises(ValueError, match="shards are damaged.*empty.*leave it out.*data='…,!empty.tar"):
        D.check_split(report)
    D.check_split(report, allow_damaged=True)
    assert {key.split("/")[0] for row in keys(D.PairStream(report, VIEW, 5), 4) for key in row} == {"whole"}


def test_tar_cut_between_members(tmp_path):
    path = tar(tmp_path / "a.tar", members(range(4)))
    with tarfile.open(path) as file:
        last = file.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset])
    assert "end mark" in D.count_samples(path)[1]


@pytest.mark.parametrize("count", [3, 60])
def test_a_hole_of_zeros_is_not_taken_for_the_end(count, tmp_path):
    "In the last record, of which counting does not look at every byte, reading finds it"
    path = tar(tmp_path / "a.tar", members(range(count)))
    with tarfile.open(path) as file:
        start = file.getmembers()[4 if count == 60 else -1].offset
    content = bytearray(path.read_bytes())
    content[start : start + 512] = bytes(512)
    path.write_bytes(content)
    found, problem = D.count_samples(path)
    assert found <= count and ("more behind it" in problem) == (count == 60)
    with pytest.raises(ValueError, match="after sample .*more behind it; repair what is damaged, or leave it out"):
        list(D.raw_samples(path))


def test_arithmetic_of_the_split(report):
    D.check_split(report, workers=5)
    D.check_split(report, workers=0, world_size=5, batch_size=14)
    with pytest.raises(ValueError, match="5 shards cannot feed 3 workers × 2 processes = 6 readers; use at most 2 workers"):
        D.check_split(report, workers=3, world_size=2)
    with pytest.raises(ValueError, match="use at most 5 processes"):
        D.check_split(report, world_size=6)
    with pytest.raises(ValueError, match="70 samples are fewer than batch_size 36 × 2 processes = 72.*at most 35"):
        D.check_split(report, world_size=2, batch_size=36)


def test_shards_of_one_name_in_two_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        tar(tmp_path / name / "00000.tar", members(range(3)))
    stream = D.PairStream([tmp_path / "a", tmp_path / "b"], VIEW, 6)
    assert {key.rsplit("/", 1)[0] for key in keys(stream, 1)[0]} == {"a/00000", "b/00000"}


# order


def test_every_sample_once_an_epoch_and_epochs_differ(report):
    names = [name for row in keys(D.PairStream(report, VIEW, 10), 14) for name in row]
    assert sorted(names[:70]) == sorted(names[70:]) and len(set(names[:70])) == 70
    assert names[:70] != names[70:]


def test_seed_decides(report):
    runs = [keys(D.PairStream(report, VIEW, 10, seed=seed), 9) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    random.seed(5)
    torch.manual_seed(5)
    assert keys(D.PairStream(report, VIEW, 10, seed=1), 9) == runs[0]


def test_both_levels_of_the_shuffle_change_with_the_epoch(shards):
    order = D.SampleOrder([5] * 6, shuffle=1, lanes=1)
    plans = [tuple(order.at(np.arange(epoch * 30, epoch * 30 + 30))[1]) for epoch in range(8)]
    assert len(set(plans)) > 4
    one_shard = [name for row in keys(D.PairStream(shards / "part-00002.tar", VIEW, 10), 4) for name in row]
    first, second = one_shard[:20], one_shard[20:]
    assert sorted(first) == sorted(second) and first != second and first != sorted(first)


def test_crops_change_with_epoch_and_sample(tmp_path):
    alike = [(f"{n}.{end}", value) for n in range(6) for end, value in (("jpg", picture(0)), ("txt", b"x"))]
    stream = D.PairStream(tar(tmp_path / "a.tar", alike), VIEW, 6, crop_scale=0.5)
    images = torch.cat([batch.image for batch in islice(stream.batches(), 2)])
    assert len({image.numpy().tobytes() for image in images}) == 12
    plain = torch.cat([batch.image for batch in islice(replace(stream, crop_scale=1.0).batches(), 2)])
    assert len({image.numpy().tobytes() for image in plain}) == 1


def test_listing_order_does_not_matter(report):
    reverse = D.DataReport(report.shards[::-1])
    assert reverse.fingerprint == report.fingerprint and keys(D.PairStream(reverse, VIEW, 10), 8) == keys(D.PairStream(report, VIEW, 10), 8)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same(report, workers):
    assert keys(D.PairStream(report, VIEW, 10, workers=workers), 8) == keys(D.PairStream(report, VIEW, 10), 8)


def test_readers_share_the_samples_of_an_epoch(report):
    "Two ranks of two workers see the rows of one process, each its own, and no sample again before all were seen"
    streams = [D.PairStream(report, VIEW, 2, rank=rank, world_size=2, workers=2, seed=4) for rank in range(2)]
    steps = [sorted(one + other) for one, other in zip(*(keys(stream, 60) for stream in streams), strict=True)]
    assert steps == [sorted(row) for row in keys(D.PairStream(report, VIEW, 4, seed=4), 60)]
    seen = Counter(name for row in steps for name in row)
    assert len(seen) == 70 and max(seen.values()) - min(seen.values()) <= 1


COUNTS = [[10, 14, 20, 8, 18], [5] * 7, [100, 1, 0, 1], [1], [3, 2]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("shuffle,lanes", [(2048, 8), (12, 3), (1, 1), (0, 4), (7, 2)])
def test_every_sample_stands_once_in_an_epoch(counts, shuffle, lanes):
    order, total = D.SampleOrder(counts, 3, shuffle, lanes), sum(counts)
    every = [(shard, number) for shard, count in enumerate(counts) for number in range(count)]
    epochs, shards, numbers = order.at(np.arange(4 * total))
    for epoch in range(4):
        places = list(zip(shards[epochs == epoch].tolist(), numbers[epochs == epoch].tolist(), strict=True))
        assert sorted(places) == every
    at_random = np.random.default_rng(0).permutation(4 * total)
    for whole, apart in zip(order.at(np.arange(4 * total)), order.at(at_random), strict=True):
        assert np.array_equal(whole[at_random], apart), "any position alone"


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("size,world_size", [(1, 1), (6, 1), (3, 2), (2, 3), (1, 6)])
def test_the_rows_of_a_step_are_dealt_out_to_the_ranks(counts, size, world_size):
    order = D.SampleOrder(counts, lanes=4)
    for step in (0, 1, 17):
        rows = np.concatenate([order.of_rank(step, size, rank, world_size) for rank in range(world_size)])
        assert sorted(rows.tolist()) == list(range(step * size * world_size, (step + 1) * size * world_size))


def test_ranks_read_from_shards_of_their_own():
    "Eight ranks and eight lanes of 1,000 samples: each rank reads its own eighth of the epoch"
    order = D.SampleOrder([500] * 16, shuffle=800)
    shards = [set() for _ in range(8)]
    for rank in range(8):
        for step in range(8000 // 64):
            shards[rank] |= set(order.at(order.of_rank(step, 8, rank, 8))[1].tolist())
    assert [len(own) for own in shards] == [2] * 8 and len(set.union(*shards)) == 16


def test_a_window_bounds_how_far_a_sample_travels():
    order = D.SampleOrder([100], shuffle=10, lanes=1)
    numbers = order.at(np.arange(100))[2]
    assert all(sorted(numbers[k : k + 10]) == list(range(k, k + 10)) for k in range(0, 100, 10))
    assert (numbers != np.arange(100)).sum() > 60
    for shuffle in (0, 1):
        assert np.array_equal(replace(order, shuffle=shuffle).at(np.arange(100))[2], np.arange(100))


# resume


@pytest.mark.parametrize("workers,rank,world,cache,crop", [(0, 0, 1, 256, 1.0), (0, 1, 2, 0, 0.5), (2, 0, 1, 256, 0.5), (2, 1, 2, 0, 1.0)])
def test_resume_from_anywhere(report, workers, rank, world, cache, crop):
    options = dict(workers=workers, rank=rank, world_size=world, cache_mb=cache, crop_scale=crop, seed=7, shuffle=12)
    stream = D.PairStream(report, VIEW, 9, **options)
    whole = list(islice(stream.batches(), 26))
    for start in range(26) if not workers else (1, 2, 13, 24):
        fresh = D.PairStream(report, VIEW, 9, **options)
        for a, b in zip(whole[start : start + 2], fresh.batches(start), strict=False):
            assert_same(a, b)


def test_resume_skips_without_decoding(report, monkeypatch):
    stream = D.PairStream(report, VIEW, 10)
    decoded = []
    original = D.decode_sample
    monkeypatch.setattr(stream_room, "decode_sample", lambda *a: decoded.append(1) or original(*a))
    next(stream.batches(9))
    assert len(decoded) == 10
    read = []
    read_sample = archives._OpenTar.__getitem__
    reading = lambda shard, number: read.append(number) or read_sample(shard, number)  # noqa: E731
    monkeypatch.setattr(archives._OpenTar, "__getitem__", reading)
    next(D.PairStream(report, VIEW, 10, cache_mb=0).batches(700))
    assert len(read) == 10


def test_memory_changes_nothing(report):
    for crop in (1.0, 0.5):
        with_memory, without = (D.PairStream(report, VIEW, 10, crop_scale=crop, cache_mb=mb) for mb in (256, 0))
        for a, b in zip(islice(with_memory.batches(), 20), without.batches(), strict=False):
            assert_same(a, b)
        for a, b in zip(islice(with_memory.batches(3), 5), without.batches(3), strict=False):
            assert_same(a, b)


def test_memory_saves_reading_and_keeps_its_budget(report, monkeypatch):
    stream = D.PairStream(report, VIEW, 10)
    keys(stream, 16)
    monkeypatch.setattr(archives._OpenTar, "__getitem__", lambda *place: pytest.fail("read again"))
    monkeypatch.setattr(stream_room, "decode_sample", lambda *a: pytest.fail("decoded again"))
    keys(stream, 16)
    monkeypatch.undo()
    stream = D.PairStream(report, VIEW, 10)
    stream._own.cache.free = budget = 30_000
    keys(stream, 30)
    items = list(stream._own.cache.items.values())
    held = sum(picture.nbytes for item in items if item.decoded for picture in item.decoded[0])
    held += sum(item.size for item in items)
    assert 0 < len(items) < 70 and held == budget - stream._own.cache.free <= budget


def test_stream_leaves_global_random_numbers_alone(report):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    keys(D.PairStream(report, VIEW, 10, workers=2), 2)
    keys(D.PairStream(report, VIEW, 10, crop_scale=0.5), 2)
    assert torch.equal(torch.rand(3), expected)


def test_stream_survives_pickling(report):
    stream = D.PairStream(report, VIEW, 10)
    assert keys(pickle.loads(pickle.dumps(replace(stream))), 3) == keys(stream, 3)


WRONG = [dict(rank=1), dict(crop_scale=0), dict(workers=-1), dict(batch_size=0), dict(batch_size=71), dict(workers=6)]


@pytest.mark.parametrize("option", WRONG)
def test_wrong_options_stop_at_once(report, option):
    with pytest.raises(ValueError, match="valid: |cannot feed|are fewer than"):
        D.PairStream(**(dict(report=report, student=VIEW, batch_size=4) | option))


# bad samples

BAD = {
    "truncated": ([("K.jpg", picture(0)[:500]), ("K.txt", b"x")], "image cannot be (decoded|opened)"),
    "garbage": ([("K.jpg", b"not an image"), ("K.txt", b"x")], "no JPEG, PNG or WebP"),
    "heic": ([("K.jpg", b"\0\0\0\x18ftypheic" + bytes(30)), ("K.txt", b"x")], "image is HEIC, which is not read"),
    "huge": ([("K.png", picture(0, (300, 400), "png")), ("K.txt", b"x")], "300 × 400 pixels is larger than max_pixels = 100,000"),
    "narrow": ([("K.png", picture(0, (300, 2), "png")), ("K.txt", b"x")], "narrower"),
    "no_image": ([("K.txt", b"x")], "no image"),
    "no_caption": ([("K.jpg", picture(0))], "no caption"),
    "latin1": ([("K.jpg", picture(0)), ("K.txt", b"caf\xe9")], "not UTF-8 at byte 3"),
    "blank": ([("K.jpg", picture(0)), ("K.txt", b" \0\n")], "caption is empty"),
    "class": ([("K.jpg", picture(0)), ("K.txt", b"x"), ("K.cls", b"cat")], "class is no integer"),
    "json": ([("K.jpg", picture(0)), ("K.json", b'{"caption": 5}')], "no caption: caption in the JSON is no text"),
    "deep_json": ([("K.jpg", picture(0)), ("K.json", b"[" * 100_000)], "no caption"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    folder, numbers = tmp_path_factory.mktemp("spoilt"), iter(range(60))
    for shard in range(2):
        content = members(islice(numbers, 10))
        for name in list(BAD)[shard::2]:
            content += [(member.replace("K", name), value) for member, value in BAD[name][0]] + members(islice(numbers, 3))
        tar(folder / f"{shard}.tar", content)
    return folder


def test_every_kind_of_bad_sample_is_named(spoilt):
    stream = D.PairStream(spoilt, VIEW, 12, max_pixels=100_000)
    batches = list(islice(stream.batches(), 9))
    reasons = {name.split("/")[1]: reason for batch in batches for name, reason in batch.skipped}
    assert reasons.keys() == BAD.keys()
    for name, (_, words) in BAD.items():
        assert re.search(words, reasons[name]), (name, reasons[name])
    assert all(len(batch) == 12 for batch in batches)
    of_one_epoch = [batch for step, batch in enumerate(batches) if step != 68 // 12]
    assert all(len(set(batch.keys)) == 12 for batch in of_one_epoch), "where an epoch ends a sample may come again"
    good = {f"{n:05d}" for n in range(56)}
    assert {key.split("/")[1] for batch in batches for key in batch.keys} == good


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_among_bad_samples(spoilt, workers):
    stream = D.PairStream(spoilt, VIEW, 8, max_pixels=100_000, workers=workers)
    whole = list(islice(stream.batches(), 12))
    for start in range(0, 12, 1 + 4 * (workers > 0)):
        for a, b in zip(whole[start : start + 3], replace(stream).batches(start), strict=False):
            assert_same(a, b)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_small_batch_among_many_bad_samples_is_filled_with_good_ones(tmp_path, batch_size):
    content = members(range(20))
    bad = [(f"bad{n:03d}.txt", b"words") for n in range(6)]
    stream = D.PairStream(tar(tmp_path / "a.tar", [*bad, *content]), VIEW, batch_size, shuffle=60)
    batches = list(islice(stream.batches(), 40))
    assert all(len(batch) == batch_size and not any("bad" in key for key in batch.keys) for batch in batches)
    assert any(len(set(batch.keys)) < batch_size for batch in batches), "here and there a pair stands twice"
    assert {key for batch in batches for key in batch.keys} == {f"a/{n:05d}" for n in range(20)}
    assert_same(batches[30], next(replace(stream).batches(30)))


@pytest.mark.parametrize("said, words", [
    (b'{"captions": [["a", "b"]]}', "no caption: captions in the JSON is no text, and no list of texts"),
    (b'{"caption": {"en": "a"}}', "no caption: caption in the JSON is no text, and no list of texts"),
    (b'{"caption": null, "captions": []}', "no caption"),
])  # fmt: skip
def test_captions_of_another_form_are_not_called_missing(said, words):
    with pytest.raises(D.BadSample) as error:
        D.decode_sample({"jpg": picture(0), "json": said})
    assert str(error.value) == words


def test_hopeless_data_stops(tmp_path):
    path = tar(tmp_path / "a.tar", [(f"{n}.txt", b"words") for n in range(20)])
    with pytest.raises(ValueError, match="cannot be filled.*no image"):
        keys(D.PairStream(path, VIEW, 4), 1)
    for read in (lambda: list(D.read_once(path, VIEW, 4)), lambda: D.load_pairs(path)):
        with pytest.raises(ValueError, match="no usable sample.*no image"):
            read()


def test_guard(spoilt):
    guard = D.BadSampleGuard(max_share=0.1, minimum=60, known=["0/huge", "1/huge"])
    written = []
    for batch in islice(D.PairStream(spoilt, VIEW, 10, max_pixels=100_000).batches(), 6):
        guard.check()
        written += guard.see(batch)
    assert len(written) >= 8 and not any("huge" in entry["sample"] for entry in written)
    with pytest.raises(ValueError, match=rf"{guard.bad} of 60 samples are bad.*more than the 10.0%.*/"):
        guard.check()
    D.BadSampleGuard(max_share=0).check()


def test_captions_are_cleaned_and_kept_as_text():
    fields = dict(jpg=picture(0))
    read = lambda text: D.decode_sample(fields | {"txt": text})[1]  # noqa: E731
    assert read(b"<script>alert(1)</script>\0 a\tdog") == "<script>alert(1)</script> a dog"
    assert read("a \u202egod\u202c, caf\u00e9 \U0001f436".encode()) == "a god , caf\u00e9 \U0001f436"
    assert len(read(b"x" * 10_000)) == 2000
    lone = json.dumps({"caption": "a \ud800 b", "cls": 4}).encode()
    assert D.decode_sample(fields | {"json": lone})[1:] == ("a b", 4)


@pytest.mark.parametrize(
    "fields,expected",
    [
        (dict(txt="\ufeffa dog".encode()), ["a dog"]),
        (dict(txt="a dog\ufeff runs\n\ufeffa cat".encode()), ["a dog runs", "a cat"]),  # joined files
        (dict(txt=b"one\r\n\r\n  two \rthree\n\n"), ["one", "two", "three"]),
        (dict(txt="one\u2028still one\x0b.\ntwo".encode()), ["one still one .", "two"]),
        (dict(txt=b"one\ntwo\none\n one "), ["one", "two"]),
        (dict(txt=b"caf\xe9", json=b'{"captions": ["one", "two"]}'), ["one", "two"]),
        (dict(txt=b"one", json=b'{"captions": [" ", 3, null]}'), ["one"]),
        (dict(txt=b" \n", json=b'{"caption": "one"}'), ["one"]),
        (dict(txt=b"one", json=b'{"caption": "another", "captions": {}}'), ["one"]),
        (dict(json=b'{"caption": ["one", "", "two", "one"]}'), ["one", "two"]),
        (dict(json=b'{"captions": "one"}'), ["one"]),
        (dict(json=b'\xef\xbb\xbf{"captions": ["\\ufeffone", "two"]}'), ["one", "two"]),
        (dict(json=b'["no", "object"]'), "no caption"),
        (dict(json=b'{"captions": []}'), "no caption"),
        (dict(txt=b"", json=b'{"captions": 3}'), "caption is empty"),
        (dict(txt="\ufeff\n".encode()), "caption is empty"),
        (dict(txt="a dog".encode("utf-16"), json=b'{"caption": "one"}'), "caption is not UTF-8 at byte 0"),
    ],
)
def test_captions_are_the_first_source_that_has_any(fields, expected):
    if isinstance(expected, str):
        assert D.captions_of(fields) == []
        with pytest.raises(D.BadSample, match=f"^{expected}$"):
            D.decode_sample(dict(jpg=picture(0)) | fields)
    else:
        assert D.captions_of(fields) == expected
        assert D.decode_sample(dict(jpg=picture(0)) | fields)[1] == expected[0]


def captioned(n, most=5):
    "A picture with 1 to `most` captions, by turns as lines and as JSON"
    texts = [f"picture {n}, caption {k}" for k in range(n % most + 1)]
    lines = [(f"{n:05d}.txt", "\n".join(texts).encode())]
    listed = [(f"{n:05d}.json", json.dumps({"captions": texts}).encode()), (f"{n:05d}.txt", b"another")]
    return [(f"{n:05d}.jpg", picture(n)), *(listed if n % 2 else lines)]


@pytest.fixture(scope="module")
def captioned_report(tmp_path_factory):
    "Three shards of twenty pictures with one to five captions"
    folder = tmp_path_factory.mktemp("captioned")
    for shard in range(3):
        tar(folder / f"{shard}.tar", [member for n in range(20 * shard, 20 * shard + 20) for member in captioned(n)])
    return D.inspect_shards(folder, cache=False, progress=False)


def drawn(report, batches=36, start=0, **options):
    "key -> what was drawn of it, time after time"
    numbers = {}
    for batch in islice(D.PairStream(report, VIEW, 5, seed=3, shuffle=8, **options).batches(start), batches):
        assert len(batch.captions) == len(batch.caption_numbers) == 5
        assert all(text.endswith(f"caption {k}") for text, k in zip(batch.captions, batch.caption_numbers, strict=True))
        assert torch.equal(batch.text, codes(batch.captions))
        for key, number in zip(batch.keys, batch.caption_numbers, strict=True):
            numbers.setdefault(key, []).append(number)
    return numbers


def test_a_caption_is_drawn_by_seed_epoch_and_place(captioned_report):
    whole = drawn(captioned_report, 12 * 10)  # ten epochs
    assert len(whole) == 60
    for key, numbers in whole.items():
        count = int(key.split("/")[1]) % 5 + 1
        for start in range(0, 10 - count + 1, count):
            assert sorted(numbers[start : start + count]) == list(range(count)), "each once in as many epochs as there are"
    orders = {tuple(numbers[:5]) for key, numbers in whole.items() if int(key.split("/")[1]) % 5 == 4}
    assert len(orders) > 8, "samples have orders of their own"
    assert any(numbers[:5] != numbers[5:] for key, numbers in whole.items() if int(key.split("/")[1]) % 5 == 4), "so have rounds"
    for options in (dict(workers=3), dict(cache_mb=0), dict(crop_scale=0.5)):
        other = drawn(captioned_report, 36, **options)
        assert all(whole[key][: len(numbers)] == numbers for key, numbers in other.items()), options
    ranks = [drawn(captioned_report, 4, rank=rank, world_size=3) for rank in range(3)]
    epoch = {key: numbers for rank in ranks for key, numbers in rank.items()}
    assert epoch == {key: numbers[:1] for key, numbers in whole.items()}, "and for any number of processes"
    again = [batch.captions for batch in islice(D.PairStream(captioned_report, VIEW, 5, seed=3).batches(), 30)]
    resumed = [batch.captions for batch in islice(D.PairStream(captioned_report, VIEW, 5, seed=3).batches(17), 13)]
    assert resumed == again[17:]
    assert again != [batch.captions for batch in islice(D.PairStream(captioned_report, VIEW, 5, seed=4).batches(), 30)]


@pytest.mark.parametrize("budget,decoded_items", [(1_000_000, 60), (95_000, None)])
def test_captions_in_memory_count_in_its_budget(captioned_report, monkeypatch, budget, decoded_items):
    stream, without = (D.PairStream(captioned_report, VIEW, 5, cache_mb=mb) for mb in (256, 0))
    stream._own.cache.free = budget
    keys(stream, 60)
    items = list(stream._own.cache.items.values())
    decoded = [item for item in items if item.decoded]
    held = sum(item.size for item in items) + sum(picture.nbytes for item in decoded for picture in item.decoded[0])
    held += sum(len(text) for item in decoded for text in item.decoded[1][1:])
    assert held == budget - stream._own.cache.free <= budget and max(len(item.decoded[1]) for item in decoded) == 5
    if decoded_items:
        assert len(decoded) == decoded_items
        monkeypatch.setattr(archives._OpenTar, "__getitem__", lambda *place: pytest.fail("read again"))
    texts = [batch.captions for batch in islice(stream.batches(), 24)]
    monkeypatch.undo()
    assert texts == [batch.captions for batch in islice(without.batches(), 24)]


def test_pairs_keep_all_captions_and_show_the_first(captioned_report):
    pairs = D.load_pairs(captioned_report)
    assert [len(texts) for texts in pairs.all_captions] == [n % 5 + 1 for n in range(60)]
    assert pairs.captions == tuple(texts[0] for texts in pairs.all_captions)
    assert pairs[[7, 3]].all_captions == (pairs.all_captions[7], pairs.all_captions[3])
    assert pairs[5:9][1:].all_captions == pairs.all_captions[6:9]
    batch = next(pairs.batches(VIEW))
    assert batch.captions == pairs.captions and torch.equal(batch.text, codes(pairs.captions))
    rows = [text for batch in D.read_once(captioned_report, D.View(None, codes), 7, every_caption=True) for text in batch.captions]
    assert rows == [text for texts in pairs.all_captions for text in texts]
    one = D.Pairs(pairs.images[:2], ("a", "b"), (None, None), ("x", "y"))
    assert one.all_captions == (("a",), ("b",)) and replace(one, captions=("c", "d")).all_captions == (("c",), ("d",))
    with pytest.raises(ValueError, match="do not begin with their captions"):
        replace(pairs, captions=pairs.captions[::-1])


def test_every_caption_survives_a_selection(captioned_report, tmp_path):
    [shard, *_] = captioned_report.shards
    kept = [sample["__key__"] for sample in D.raw_samples(shard.path)][4::5]
    D.copy_samples(tmp_path / "copy" / "0.tar", shard.path, set(kept))
    D.write_index(tmp_path / "index" / "0.kept.json", shard, kept)
    for folder in ("copy", "index"):
        assert [len(texts) for texts in D.load_pairs(tmp_path / folder).all_captions] == [5] * 4


@pytest.mark.parametrize("kind,mode", [("png", "RGBA"), ("png", "L"), ("png", "P"), ("png", "LA"), ("webp", "RGB"), ("jpeg", "CMYK")])
def test_other_modes_become_rgb(kind, mode):
    assert D.decode_image(picture(0, kind=kind, mode=mode)).mode == "RGB"


def test_nothing_is_unpickled(tmp_path):
    mark = tmp_path / "owned"
    bomb = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    content = [(f"{n}.{end}", bomb) for n in range(4) for end in ("pyd", "pickle", "pth", "pt")]
    content += [(f"{n}.{end}", value) for n in range(4) for end, value in (("jpg", picture(n)), ("txt", b"x"))]
    path = tar(tmp_path / "a.tar", sorted(content))
    assert len(keys(D.PairStream(path, VIEW, 4), 3)) == 3 and not mark.exists()
    assert all(set(fields) == {"__key__", "__url__", "jpg", "txt"} for fields in D.raw_samples(path))


# views


@pytest.mark.parametrize("size", [16, 20, 33])
def test_fast_preprocess_equals_the_original(size):
    fast, original = D.FastPreprocess(transform(size)), transform(size)
    images = [Image.open(io.BytesIO(picture(n, wh))) for n, wh in enumerate([(20, 20), (33, 50), (100, 40)])]
    assert fast.exact
    assert torch.allclose(fast(images), torch.stack([original(image) for image in images]), atol=1e-5)
    opaque = D.FastPreprocess(lambda image: original(image))
    assert opaque.exact and torch.allclose(opaque(images), fast(images), atol=1e-5)


def test_what_is_not_affine_is_called_as_it_is(report):
    odd = lambda image: transform(16)(image) ** 2  # noqa: E731
    assert not D.FastPreprocess(odd).exact
    stream = D.PairStream(report, D.View(odd, codes), 10)
    for batch in islice(stream.batches(), 9):  # into the second epoch, from memory
        first = D.load_pairs(report)
        expected = torch.stack([odd(first.pil(first.keys.index(key))) for key in batch.keys])
        assert torch.equal(batch.image, expected)


def test_open_clip_transform_is_fast():
    open_clip = pytest.importorskip("open_clip")
    assert D.FastPreprocess(open_clip.image_transform(32, is_train=False)).exact
    assert not D.FastPreprocess(open_clip.image_transform(32, is_train=True)).exact


def test_teacher_view(report):
    teacher = D.View(transform(24), lambda captions: codes(captions) + 1)
    batch = next(D.PairStream(report, VIEW, 6, teacher=teacher, crop_scale=0.5).batches())
    assert batch.teacher_image.shape == (6, 3, 24, 24) and torch.equal(batch.teacher_text, batch.text + 1)
    small = torch.nn.functional.interpolate(batch.teacher_image, 16, mode="area")
    assert torch.corrcoef(torch.stack([small.flatten(), batch.image.flatten()]))[0, 1] > 0.8  # the same box
    for same in (None, VIEW, D.View(None, None), D.View(transform(16), codes)):
        batch = next(D.PairStream(report, VIEW, 6, teacher=same).batches())
        assert batch.teacher_image is None and batch.teacher_text is None


def test_evaluation_reads_once_in_order(report, spoilt):
    pairs = D.load_pairs(report)
    assert len(pairs) == 70 and pairs.labels[:4] == (0, 1, 2, 0) and list(pairs.keys) == sorted(pairs.keys)
    for way in (D.read_once(report, VIEW, 32), pairs.batches(VIEW, 32)):
        batches = list(way)
        assert [len(batch) for batch in batches] == [32, 32, 6]
        assert torch.equal(torch.cat([batch.image for batch in batches])[69], D.FastPreprocess(VIEW.preprocess)([pairs.pil(69)])[0])
        assert tuple(key for batch in batches for key in batch.keys) == pairs.keys
    assert len(pairs[3:5]) == 2 and pairs[[4, 1]].captions == ("picture 4", "picture 1")
    assert len(D.load_pairs(report, limit=13)) == 13
    batches = list(D.read_once(spoilt, VIEW, 10, max_pixels=100_000))
    assert sum(len(batch.skipped) for batch in batches) == len(BAD) and sum(map(len, batches)) == 56


def test_gallery_draws_any_caption(report):
    batch = next(D.PairStream(report, VIEW, 4).batches())
    batch = replace(batch, captions=("<script>$\\frac{$", "$x", "", "word " * 400))
    figure = D.show_batch(batch)
    figure.canvas.draw()
    assert "<script>$\\frac{$" in figure.axes[0].get_title()


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_an_index_stands_for_its_shard_wherever_a_shard_can(tmp_path, ending):
    tar(tmp_path / f"a{ending}", members(range(30)))
    [whole] = D.inspect_shards(tmp_path / f"a{ending}").shards
    every = [sample["__key__"] for sample in D.raw_samples(whole.path)]
    index = D.write_index(tmp_path / "kept" / "a.kept.json", whole, every[3::2])
    assert D.copy_samples(tmp_path / "copy" / "a.tar", whole.path, set(every[3::2])) == 14
    by_index, by_copy = (D.inspect_shards(where) for where in (tmp_path / "kept", tmp_path / "copy"))
    assert by_index.total == by_copy.total == 14 and by_index.shards[0].name == "a" and str(by_index.shards[0].path).endswith(".kept.json")
    a, b = (D.PairStream(report, D.View(transform(8), codes), 4, seed=1) for report in (by_index, by_copy))
    for one, other in zip(islice(a.batches(), 6), islice(b.batches(), 6), strict=True):
        assert one.keys == other.keys and torch.equal(one.image, other.image) and one.captions == other.captions
    assert_same(next(a.batches(5)), list(islice(a.batches(), 6))[5])
    assert json.loads(index.read_text())["shard"] == f"../a{ending}", "both can be moved together"


def test_an_index_of_another_shard_is_reported(tmp_path):
    tar(tmp_path / "a.tar", members(range(9)))
    [whole] = D.inspect_shards(tmp_path / "a.tar").shards
    key = next(D.raw_samples(whole.path))["__key__"]
    for name, shard in {"changed": replace(whole, digest="0" * 64), "gone": replace(whole, path=tmp_path / "b.tar")}.items():
        D.write_index(tmp_path / "i" / f"{name}.kept.json", shard, [key])
    (tmp_path / "i" / "broken.kept.json").write_text('{"shard": 3')
    report = D.inspect_shards(tmp_path / "i")
    assert {s.name: s.problem.split("(")[0].split(str(tmp_path))[0].strip() for s in report.damaged} == {
        "broken": "no index of a shard",
        "changed": "its shard",
        "gone": "its shard",
    }
    assert not report.usable


def test_label_sets_come_with_the_pairs(tmp_path):
    extra = [("00000.json", b'{"labels": {"size": 1, "shape": null}}'), ("00001.json", b'{"labels": {"size": 0, "shape": 2}}')]
    tar(tmp_path / "a.tar", sorted([*members(range(2)), *extra]))
    pairs = D.load_pairs(tmp_path / "a.tar")
    assert pairs.sets == {"size": (1, 0), "shape": (None, 2)} and pairs[[1]].sets == {"size": (0,), "shape": (2,)}
