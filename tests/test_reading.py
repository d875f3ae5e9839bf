"What is read: of any set of shards 2 % before a start, and the same at any place of an epoch, whoever reads"

import gc
import io
import json
import os
import random
import sys
import tarfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tar
from PIL import Image

from vlkd_lab import data as D
from vlkd_lab.data import archives, reports

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system counts what a process reads on Linux only")


def jpeg():
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(out := io.BytesIO(), "jpeg")
    return out.getvalue()


SMALL = jpeg()


def members(first, count, size, small=("txt", "json")):
    "Pictures with so many bytes of noise behind them, and small files"
    for number in range(first, first + count):
        yield f"{number:09d}.jpg", SMALL + random.Random(number).randbytes(size)
        for ending in small:
            content = json.dumps({"key": number, "status": "success"}) if ending == "json" else f"picture {number}"
            yield f"{number:09d}.{ending}", content.encode()


def write(folder, shards, count, size, ending="tar", stats=False, small=("txt", "json")):
    folder.mkdir(parents=True)
    for shard in range(shards):
        tar(folder / f"{shard:05d}.{ending}", list(members(shard * count, count, size, small)))
        if stats:
            (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": count, "successes": count}))
    return folder


def counted(act):
    "Bytes that this process, and children that have ended, read while something is done"
    before = int(Path("/proc/self/io").read_text().split()[1])
    result = act()
    return int(Path("/proc/self/io").read_text().split()[1]) - before - 120, result


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*.tar*"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archives._CATALOGUES.clear()
    reports._told_counts.cache_clear()


def grey(image):
    return torch.from_numpy(np.array(image.resize((8, 8)))[..., 0]).float()[None].expand(3, 8, 8) / 255


VIEW = D.View(grey, lambda texts: torch.tensor([[len(text)] for text in texts]))


# preflight

KINDS = {  # shards, samples, bytes, further options
    "large shards": (3, 300, 30_000, {}),
    "large shards with stats": (3, 300, 30_000, dict(stats=True)),
    "small shards": (120, 8, 5_000, {}),
    "small shards with stats": (120, 8, 5_000, dict(stats=True)),
    "tiny shards": (200, 1, 4_000, {}),
    "thumbnails": (20, 200, 800, {}),
    "compressed": (20, 20, 20_000, dict(ending="tar.gz")),
    "text": (10, 400, 0, dict(small=("txt",))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [True, False])
def test_a_preflight_reads_two_per_cent(tmp_path, kind, cache):
    shards, count, size, options = KINDS[kind]
    folder = write(tmp_path / "set", shards, count, size, **options)
    read, report = counted(lambda: D.inspect_shards(folder, cache=cache, progress=False))
    assert read <= 0.02 * size_of(folder)
    counting, total = counted(lambda: report.total)
    assert total == shards * count and not report.damaged
    headers = 512 * shards * (count * (1 + len(options.get("small", ("txt", "json")))) + 4)
    assert counting <= (50 if options.get("stats") else size_of(folder) * 1.02 if kind == "compressed" else headers)
    again, total = counted(lambda: D.inspect_shards(folder, progress=False).total)
    if cache:
        assert again <= 0.02 * size_of(folder) and total == report.total, "remembered"


@pytest.mark.parametrize("kind", ["sizes", "index"])
def test_counts_of_webdataset_are_believed_while_they_are_young(tmp_path, kind):
    folder = write(tmp_path / "set", 5, 4, 3000)
    names = [f"{shard:05d}.tar" for shard in range(5)]
    if kind == "sizes":
        file, content = folder / "sizes.json", dict.fromkeys(names, 4)
    else:
        entries = [{"url": f"s3://bucket/{name}", "nsamples": 4, "md5sum": "0"} for name in names]
        file, content = folder / "index.json", {"wids_version": 1, "shardlist": entries}
    file.write_text(json.dumps(content))
    read, report = counted(lambda: D.inspect_shards(folder, progress=False))
    assert {shard.counted_by for shard in report.shards} == {"sizes" if kind == "sizes" else "list"} and report.total == 20
    assert f"5 of 5 shards were counted by their {file.name}" in str(report)
    os.utime(folder / names[2], ns=(1 << 62, 1 << 62))
    report = D.inspect_shards(folder, progress=False)
    assert report.shards[2].counted_by == "headers" and report.total == 20
    text = file.read_text()
    for wrong in ("{", "[]", json.dumps({"shardlist": [{"url": 3}]}), json.dumps(dict.fromkeys(names, "many"))):
        file.write_text(wrong)
        assert D.inspect_shards(folder, cache=False, progress=False).total == 20
    file.write_text(text.replace("4", "3"))
    with pytest.raises(ValueError, match=f"holds 4 samples, but the preflight counted 3: .*{file.name} is wrong"):
        D.load_pairs(D.inspect_shards(folder, progress=False))


def test_forty_one_thousand_shards_cost_a_few_reads_each(tmp_path, monkeypatch):
    "Hard links of one shard: calls and bytes are counted, which do not depend on how busy the machine is"
    folder = tmp_path / "set"
    folder.mkdir()
    first = tar(folder / "00000.tar", list(members(0, 1, 5000, ())))
    (folder / "00000_stats.json").write_text('{"successes": 1}')
    for number in range(1, 41_000):
        os.link(first, folder / f"{number:05d}.tar")
        os.link(folder / "00000_stats.json", folder / f"{number:05d}_stats.json")
    calls, real = Counter(), archives._read_at
    monkeypatch.setattr(archives, "_read_at", lambda *place: calls.update(["read"]) or real(*place))
    monkeypatch.setattr(archives, "_read_headers", lambda *where: pytest.fail("a shard was walked"))
    started = time.process_time()
    read, report = counted(lambda: D.inspect_shards(folder, progress=False))
    assert report.total == 41_000 and calls["read"] <= 64 * 41_000
    assert read <= 0.02 * size_of(folder)
    assert time.process_time() - started < 60
    assert D.inspect_shards(folder, progress=False).fingerprint == report.fingerprint
    assert calls["read"] <= 64 * 41_000, "remembered"


def test_counting_is_lazy_parallel_and_remembered(tmp_path, monkeypatch):
    folder = write(tmp_path / "set", 40, 6, 2000)
    (folder / "00007.tar").write_bytes((folder / "00007.tar").read_bytes()[:5000])
    walked = []
    real = archives._read_headers
    monkeypatch.setattr(archives, "_read_headers", lambda *where: walked.append(os.getpid()) or real(*where))
    report = D.inspect_shards(folder, progress=False)
    assert "not counted yet" in repr(report) and not walked
    assert report.total == 39 * 6 and [shard.name for shard in report.damaged] == ["00007"] and len(walked) == 40
    assert D.inspect_shards(folder, progress=False).shards == report.shards and len(walked) == 40
    monkeypatch.setattr(reports, "_FEW", 10)
    for cache in (True, False):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"other-{cache}"))
        archives._CATALOGUES.clear()
        parallel = D.inspect_shards(folder, cache=cache, progress=False)
        assert parallel.shards == report.shards and parallel.fingerprint == report.fingerprint
        assert len(walked) == 40, "by other processes"
        assert len(list((tmp_path / f"other-{cache}").rglob("*.catalogue"))) == 40


def test_a_shard_that_changes_before_it_is_counted_is_looked_at_again(tmp_path):
    folder = write(tmp_path / "set", 1, 3, 2000)
    report = D.inspect_shards(folder, progress=False)
    tar(folder / "00000.tar", list(members(50, 30, 2000)))
    assert report.total == 30 and report.shards == D.inspect_shards(folder, cache=False, progress=False).shards


@pytest.mark.parametrize("damage", [b"", b"{", b"x" * 100])
def test_a_damaged_cache_is_none(tmp_path, damage):
    folder = write(tmp_path / "set", 4, 3, 2000)
    report = D.inspect_shards(folder, progress=False)
    names = [batch.keys for batch in islice(D.PairStream(report, VIEW, 4).batches(), 3)]
    for file in filter(Path.is_file, (tmp_path / "cache").rglob("*")):
        file.write_bytes(damage)
    archives._CATALOGUES.clear()
    again = D.inspect_shards(folder, progress=False)
    assert again.shards == report.shards
    assert [batch.keys for batch in islice(D.PairStream(again, VIEW, 4).batches(), 3)] == names


def test_a_digest_of_an_earlier_version_is_known_again(tmp_path):
    folder = write(tmp_path / "set", 2, 3, 2000)
    first, second = D.inspect_shards(folder, progress=False).shards
    former = archives._former_digest(first.path)
    assert D.same_content(first, first.digest) and D.same_content(first, former) and not D.same_content(second, former)
    index = D.write_index(tmp_path / "i" / "a.kept.json", first, ["000000001"])
    index.write_text(index.read_text().replace(first.digest, former))
    assert not D.inspect_shards(index).damaged


# headers


def strange_tar(path, form):
    "Long and odd names, extended headers and numbers"
    with tarfile.open(path, "w", format=form) as file:
        for number, name in enumerate(["a", "ü" * 60, "f/" * 40 + "n" * 30, "long" * 70, "d" * 99, "p" * 90 + "/" + "q" * 80]):
            for ending, content in (("jpg", os.urandom(700 + 512 * number)), ("txt", b"x" * (512 * (number % 2)))):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size, info.uid = len(content), 0 if number % 2 else 3_000_000
                file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_say_what_tarfile_says(tmp_path, form):
    path = tmp_path / "a.tar"
    try:
        strange_tar(path, form)
    except ValueError:
        path = write(tmp_path / "set", 1, 5, 900) / "00000.tar"
    with tarfile.open(path) as file:
        expected = {member.name: file.extractfile(member).read() for member in file}
    found = {}
    for sample in D.raw_samples(path):
        found |= {f"{sample['__key__']}.{name}": content for name, content in sample.items() if not name.startswith("__")}
    assert found == expected
    archives._CATALOGUES.clear()
    again = D.open_shard(path)  # by the catalogue of the cache folder
    assert [again[number] for number in range(len(again))] == list(D.raw_samples(path)) and not again.problem


@pytest.mark.parametrize("at", [0, 100, 124, 150, 156, 257, 300])
def test_a_damaged_header_ends_a_shard(tmp_path, at):
    path = write(tmp_path / "set", 1, 5, 900) / "00000.tar"
    with tarfile.open(path) as file:
        start = file.getmembers()[9].offset
    content = bytearray(path.read_bytes())
    content[start + at] ^= 0x15
    path.write_bytes(content)
    count, problem = D.count_samples(path)
    assert count == 3 and "cut short or damaged" in problem


# start anywhere

SETS = {
    "large": (16, 120, 12_000, {}),
    "small": (300, 6, 3_000, {}),
    "stats": (16, 120, 12_000, dict(stats=True)),
    "compressed": (40, 45, 6_000, dict(ending="tar.gz")),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {name: write(folder / name, *about[:3], **about[3]) for name, about in SETS.items()}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("workers,rank,world_size", [(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 1, 2), (0, 1, 2)])
def test_a_start_reads_the_same_at_any_place(sets, kind, workers, rank, world_size):
    report = D.inspect_shards(sets[kind], progress=False)
    options = dict(workers=workers, rank=rank, world_size=world_size, shuffle=256)
    steps = report.total // (16 * world_size)
    needed = []
    for share in (0, 0.5, 0.9, 7.3):
        archives._CATALOGUES.clear()

        def start(share=share):
            batches = D.PairStream(report, VIEW, 16, **options).batches(int(share * steps))
            assert len(next(batches)) == 16
            del batches
            gc.collect()  # ends the workers, whose reading counts from then on

        needed.append(counted(start)[0])
    assert max(needed) <= 2.5 * needed[0], needed
    if kind != "compressed":
        assert max(needed) <= 0.3 * size_of(sets[kind])


@pytest.mark.parametrize("changes", [[(2, 3, 4), (0, 2, 6)], [(0, 1, 12), (3, 4, 3), (1, 3, 4)], [(1, 6, 2), (2, 1, 12)]])
def test_the_rest_of_an_epoch_is_dealt_anew(sets, changes):
    "Workers, processes and rows of each, which go on after one another: every sample once an epoch"
    report = D.inspect_shards(sets["small"], progress=False)
    undisturbed = [set(batch.keys) for batch in islice(D.PairStream(report, VIEW, 12, shuffle=100).batches(), 150)]
    start, names = 0, []
    for number, (workers, world_size, size) in enumerate(changes):
        until = 150 * (number + 1) // len(changes)
        ranks = [D.PairStream(report, VIEW, size, workers=workers, rank=rank, world_size=world_size, shuffle=100) for rank in range(world_size)]
        parts = [list(islice(stream.batches(start), until - start)) for stream in ranks]
        for step, batches in enumerate(zip(*parts, strict=True), start=start):
            keys = [key for batch in batches for key in batch.keys]
            assert len(keys) == 12 and set(keys) == undisturbed[step]
            names += keys
        start = until
    assert len(names) == report.total == len(set(names))


@pytest.mark.parametrize("world_sizes", [(2, 3), (3, 1), (4, 2)])
def test_other_processes_with_batches_of_the_old_size_go_on_where_the_samples_end(sets, world_sizes):
    report = D.inspect_shards(sets["small"], progress=False)
    before, after = world_sizes
    size, first = 10, 18  # 18 steps are a whole number of steps of the others

    def names(world_size, start, steps):
        streams = [D.PairStream(report, VIEW, size, rank=rank, world_size=world_size) for rank in range(world_size)]
        return [key for stream in streams for batch in islice(stream.batches(start), steps) for key in batch.keys]

    resumed = first * before // after
    rest = report.total // (size * after) - resumed
    every = names(before, 0, first) + names(after, resumed, rest)
    assert len(every) == len(set(every)) == report.total // (size * after) * size * after


def test_each_of_several_processes_reads_its_own_shards(sets):
    "What the ranks of four open, of sixteen shards"
    report = D.inspect_shards(sets["large"], progress=False)
    shards = []
    for rank in range(4):
        stream = D.PairStream(report, VIEW, 24, rank=rank, world_size=4)
        shards.append({key.split("/")[0] for batch in islice(stream.batches(), report.total // 96) for key in batch.keys})
    assert [len(names) for names in shards] == [4] * 4 and len(set.union(*shards)) == 16


def test_a_damaged_shard_that_was_counted_beside_is_named_when_it_is_read(sets, tmp_path):
    folder = write(tmp_path / "set", 3, 8, 3000, stats=True)
    path = folder / "00001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(2048))
    os.utime(path, ns=(1, 1))
    report = D.inspect_shards(folder, progress=False)
    assert report.total == 24
    with pytest.raises(ValueError, match="00001 holds [0-7] samples, but the preflight counted 8.*unexpected end|00001 holds .*damaged"):
        list(islice(D.PairStream(report, VIEW, 6).batches(), 4))


def test_few_files_are_open_at_a_time(sets):
    report = D.inspect_shards(sets["small"], progress=False)
    stream = D.PairStream(report, VIEW, 16, cache_mb=0)
    for _ in islice(stream.batches(), 60):
        assert len(stream._own.cache._open) <= 64 + 16
    before = len(os.listdir("/proc/self/fd"))
    del stream
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < before


def test_compressed_shards_stay_unpacked_while_a_window_lies_in_them(sets, monkeypatch):
    report = D.inspect_shards(sets["compressed"], progress=False)
    assert report.total == 1800
    opened = []
    real = archives._unpacked
    monkeypatch.setattr(archives, "_unpacked", lambda path: opened.append(path.name) or real(path))
    stream = D.PairStream(report, VIEW, 18, cache_mb=0, shuffle=200)
    monkeypatch.setattr("vlkd_lab.data.stream._HELD", 0)
    for _ in islice(stream.batches(), 100):
        assert len(stream._own.cache._open) <= 12, "those of two windows"
    assert set(opened) == {shard.path.name for shard in report.shards} and len(opened) <= 80, "and not in every batch"
