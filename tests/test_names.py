"Which files make a sample: names, doubles and places in strange shards; what the preflight counts is what is read"

import io
import json
import os
import tarfile
import unicodedata

import numpy as np
import pytest
from conftest import tar
from PIL import Image

from vlkd_lab import data as D
from vlkd_lab import sources as S
from vlkd_lab.data import archives


def picture(value=90):
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out := io.BytesIO(), "png")
    return out.getvalue()


def pair(key, text=b"a star", ending="jpg"):
    return [(f"{key}.{ending}", picture()), (f"{key}.txt", text)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


A, B, C = pair("a"), pair("b"), pair("c")
FORMS = {  # name -> members, keys of the good samples, keys of the bad ones, what is ignored
    "dots": ([*pair("a.b.c"), *pair("photo.v2"), *pair("1.5"), ("1.5.cls", b"3")], ["a.b.c", "photo.v2", "1.5"], [], {}),
    "dots in folders": ([*pair("v1.0/x"), *pair("v1.0/x.y")], ["v1.0/x", "v1.0/x.y"], [], {}),
    "other files of a sample": (
        [*A, ("a.seg.png", picture()), ("a.en.txt", b"x"), ("a.v2.json", b"{}"), *pair("a.v3")],
        ["a", "a.v3"], [], {"seg.png": 1, "en.txt": 1, "v2.json": 1},
    ),
    "a picture's name before the caption": ([("a.jpg", picture()), ("a.jpg.txt", b"x")], ["a"], [], {}),
    "apart": ([A[0], B[0], C[0], A[1], B[1], C[1]], ["a", "b", "c"], [], {}),
    "backwards": ([A[1], B[1], B[0], A[0]], ["a", "b"], [], {}),
    "a key returns with another member": ([*A, *B, ("a.cls", b"1")], ["a", "b"], [], {}),
    "a key returns whole": ([*A, *B, *A], ["a", "b"], [], {"second files of one name": 2}),
    "a key returns with another text": ([*A, *B, ("a.txt", b"a moon")], ["b"], ["a"], {"second files of one name": 1}),
    "one name twice in a row": ([A[0], *A], ["a"], [], {"second files of one name": 1}),
    "keys that differ in case": ([*A, *pair("A")], ["a", "A"], [], {}),
    "suffixes in capitals": ([("a.JPG", picture()), ("a.Txt", b"x")], ["a"], [], {}),
    "dot slash": ([*(("./" + name, content) for name, content in A), *(("/x//" + name, content) for name, content in B)],
                  ["a", "x/b"], [], {}),
    "hidden": (
        [("._a.jpg", b"x"), *A, (".b.txt", b"x"), ("__MACOSX/._a.jpg", b"x"), (".git/a.txt", b"x"), ("__meta__/c.txt", b"x")],
        ["a"], [], {"hidden files": 5},
    ),
    "names that begin with underscores": (pair("__init"), ["__init"], [], {}),
    "two pictures": ([*A, ("a.png", picture(9))], ["a"], [], {"png beside jpg": 1}),
    "other kinds": ([*A, ("a.npy", b"x"), ("a.pickle", b"x"), ("README", b"x"), ("c.npy", b"x")], ["a"], [],
                    {"npy": 2, "pickle": 1, "no suffix": 1}),
    "a format that is not read": ([*A, ("b.heic", b"\0\0\0\x18ftypheic"), B[1]], ["a"], ["b"],
                                  {"heic (a picture format that is not read)": 1}),
    "one side": ([*A, B[0], C[1]], ["a"], ["b", "c"], {}),
    "no UTF-8": ([(name.replace("a", "\udce9"), content) for name, content in A], ["\\xe9"], [], {}),
    "long names": (pair("n" * 180 + ".x"), ["n" * 180 + ".x"], [], {}),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_the_preflight_counts_what_is_read_and_says_what_is_not(tmp_path, form, ending):
    members, good, bad, ignored = FORMS[form]
    report = D.inspect_shards(tar(tmp_path / f"s{ending}", members))
    samples = list(D.raw_samples(tmp_path / f"s{ending}"))
    assert report.total == len(samples) == len(good) + len(bad) and not report.damaged
    assert report.ignored == ignored and all(kind in str(report) for kind in ignored)
    pairs = D.load_pairs(report)
    assert sorted(pairs.keys) == sorted(f"s/{key}" for key in good) and {name for name, _ in pairs.skipped} == {f"s/{key}" for key in bad}
    assert D.inspect_shards(report.shards[0].path).ignored == ignored, "from the cache"


def test_fields_come_together_wherever_they_lie(tmp_path):
    keys = [f"{k}.{k}" for k in range(30)]
    apart = [(f"{key}.{ending}", content) for ending in ("jpg", "txt", "cls") for k, key in enumerate(keys)
             for content in [{"jpg": picture(k), "txt": f"number {k}".encode(), "cls": str(k).encode()}[ending]]]  # fmt: skip
    for ending in (".tar", ".tar.gz"):
        for k, sample in enumerate(D.raw_samples(tar(tmp_path / f"apart{ending}", apart))):
            assert (sample["__key__"], sample["txt"], sample["cls"]) == (keys[k], f"number {k}".encode(), str(k).encode())
            assert D.decode_image(sample["jpg"]).getpixel((0, 0)) == (k, k, k)
    assert [sorted(sample) for sample in D.raw_samples(tmp_path / "apart.tar", {"cls"})][0] == ["__key__", "__url__", "cls"]


def test_only_one_sample_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_UNPACKED", 1000)
    path = tar(tmp_path / "a.tar.gz", [member for k in range(9) for member in pair(f"{k}")])
    file, problem = archives._unpacked(path)
    with file:
        assert file._rolled and not problem, "unpacked into a file, not into memory"
    assert len(list(D.raw_samples(path))) == 9


def test_links_and_folders_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for kind, name in ((tarfile.DIRTYPE, "x"), (tarfile.SYMTYPE, "x/a.jpg"), (tarfile.LNKTYPE, "x/b.jpg"), (tarfile.FIFOTYPE, "c.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        info = tarfile.TarInfo("x/a.txt")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    report = D.inspect_shards(tmp_path / "a.tar")
    assert report.total == 1 and report.ignored == {"links and special files": 3}
    assert [sorted(sample) for sample in D.raw_samples(tmp_path / "a.tar")] == [["__key__", "__url__", "txt"]]


def test_links_in_a_shard_are_what_they_name(tmp_path):
    files = [("x/a.jpg", picture(50)), ("x/a.txt", b"a star"), ("x/b.jpg", picture(60))]
    links = [("x/b.txt", tarfile.LNKTYPE, "x/a.txt"), ("c.jpg", tarfile.SYMTYPE, "./x/../x/b.jpg"), ("c.txt", tarfile.SYMTYPE, "late.txt"),
             ("d/d.jpg", tarfile.SYMTYPE, "../x/a.jpg"), ("d/d.txt", tarfile.SYMTYPE, "/etc/hostname")]  # fmt: skip
    path = tar(tmp_path / "a.tar", files)
    with tarfile.open(path, "a") as file:
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            file.addfile(info)
        info = tarfile.TarInfo("late.txt")
        info.size = 6
        file.addfile(info, io.BytesIO(b"a moon"))
    report = D.inspect_shards(path)
    pairs = D.load_pairs(report)
    assert [key.rpartition("/")[2] for key in pairs.keys] == ["a", "b", "c"] and pairs.captions == ("a star", "a star", "a moon")
    assert [image[0, 0, 0] for image in pairs.images] == [50, 60, 60], "links are followed inside the shard"
    assert report.ignored == {"links and special files": 1}
    assert dict(pairs.skipped) == {"a/d/d": "no caption", "a/late": "no image"}, "and nowhere else"


def test_sparse_members_are_counted(tmp_path):
    path = tar(tmp_path / "a.tar", A)
    with tarfile.open(path, "a") as file:
        info = tarfile.TarInfo("s.txt")
        info.type = tarfile.GNUTYPE_SPARSE
        file.addfile(info)
    assert D.inspect_shards(path).ignored == {"links and special files": 1}


@pytest.mark.parametrize("first, second", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_written_in_two_ways(tmp_path, first, second):
    one, other = (unicodedata.normalize(form, "café.1") for form in (first, second))
    path = tar(tmp_path / "a.tar", [(f"{one}.jpg", picture()), (f"{other}.txt", b"a star")])
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / f"{one}.jpg").write_bytes(picture())
    (folder / f"{other}.txt").write_text("a star")
    for where in (path, folder):
        pairs = D.load_pairs(where)
        assert pairs.captions == ("a star",) and pairs.keys[0].endswith("/café.1") and not pairs.skipped


def test_folders_that_are_links_are_entered_once(tmp_path):
    for place in ("set/own", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jpg").write_bytes(picture())
        (tmp_path / place / "a.txt").write_text(place)
    for name, target in {"linked": "elsewhere", "again": "elsewhere", "circle": "set", "above": ".", "set/own/up": "set"}.items():
        (tmp_path / "set" / name.removeprefix("set/")).symlink_to(tmp_path / target, target_is_directory=True)
    assert S.files_below(tmp_path / "set") == ["again/a.jpg", "again/a.txt", "own/a.jpg", "own/a.txt"]
    assert D.load_pairs(tmp_path / "set").captions == ("elsewhere", "set/own")


CLASSES = {b"3": 3, b" 3\r\n": 3, b"3.0\n": 3, b"\xef\xbb\xbf3": 3, b"": None, b"\n": None, b"-1": None, b"+0": 0}
NO_CLASSES = (b"3.5", b"1e3", b"12345678901", b"1 2", b"dog", b"\xff")


def test_a_class_is_an_index_or_nothing():
    fields = {"jpg": picture(), "txt": b"a star"}
    assert {said: D.decode_sample(fields | {"cls": said})[2] for said in CLASSES} == CLASSES
    in_json = {"3": 3, "3.0": 3, '"3"': 3, "null": None, "-1": None}
    assert {said: D.decode_sample(fields | {"json": b'{"cls": %s}' % said.encode()})[2] for said in in_json} == in_json
    wrong = [{"cls": said} for said in NO_CLASSES] + [{"json": b'{"cls": %s}' % said} for said in (b"3.7", b"true", b"NaN", b"[3]")]
    for further in wrong:
        with pytest.raises(D.BadSample, match="class is no integer"):
            D.decode_sample(fields | further)


def test_an_empty_picture_is_called_so():
    with pytest.raises(D.BadSample, match="^image is an empty file$"):
        D.decode_image(b"")


def test_a_shard_without_a_sample_says_what_it_holds(tmp_path):
    report = D.inspect_shards(tar(tmp_path / "a.tar", [("a.npy", b"x"), ("b.npy", b"x")]))
    assert report.damaged[0].problem == "empty: no image or caption in it; it has 2 npy, which is not read"


def test_a_wrong_count_is_counted_anew_as_the_message_says(tmp_path):
    path = tar(tmp_path / "00000.tar", [*A, *B])
    stats = tmp_path / "00000_stats.json"
    stats.write_text('{"successes": 7}')
    report = D.inspect_shards(path)
    assert "1 of 1 shards were counted by their _stats.json" in str(report) and not report.ignored
    with pytest.raises(ValueError, match=r"00000_stats.json is wrong; delete it and start anew"):
        D.load_pairs(report)
    stats.unlink()
    assert D.inspect_shards(path).total == len(D.load_pairs(path)) == 2
    os.utime(path, ns=(1, 1))
    report = D.inspect_shards(path)
    assert report.total == 2
    tar(path, [*A, *B, *C])
    with pytest.raises(ValueError, match="was changed since; start anew"):
        D.load_pairs(report)
    assert D.inspect_shards(path).total == 3


def test_a_report_of_an_older_form_in_the_cache_is_none(tmp_path):
    path = tar(tmp_path / "a.tar", A)
    D.inspect_shards(path)
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"further": 1}))
    assert D.inspect_shards(path).total == 1


def test_damaged_shards_are_left_out_by_name(tmp_path):
    for k in range(4):
        tar(tmp_path / f"s-{k}.tar", pair(f"{k}"))
    (tmp_path / "s-2.tar").write_bytes((tmp_path / "s-2.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"s-2.*data='…,!s-2.tar'") as error:
        D.check_split(D.inspect_shards(tmp_path))
    advice = str(error.value).split("data='…,")[1].rstrip("'")
    path = f"{tmp_path}/s-{{0..3}}.tar,!{tmp_path}/s-[2].tar"
    for where in (f"{tmp_path},{advice}", f"{tmp_path}/s-*.tar::{advice}", [tmp_path, advice], path):
        report = D.inspect_shards(where)
        D.check_split(report)
        assert report.total == 3
    with pytest.raises(ValueError, match="leaves nothing out"):
        D.find_shards([tmp_path, "!s-7.tar"])
    with pytest.raises(ValueError, match="leaves no shard"):
        D.find_shards([tmp_path, "!*"])
    with pytest.raises(ValueError, match="s-2.tar: unreadable after 1 samples.*leave it out"):
        list(D.raw_samples(tmp_path / "s-2.tar"))


def test_an_index_and_a_copy_keep_names_with_dots(tmp_path):
    members = [*pair("x.1"), *pair("x"), *pair("x.2", ending="tiff"), ("x.seg.png", picture())]
    [whole] = D.inspect_shards(tar(tmp_path / "a.tar", members)).shards
    D.write_index(tmp_path / "i" / "a.kept.json", whole, ["x.1", "x.2"])
    assert D.copy_samples(tmp_path / "c" / "a.tar", whole.path, {"x.1", "x.2"}) == 2
    for path in (tmp_path / "i" / "a.kept.json", tmp_path / "c" / "a.tar"):
        assert [sample["__key__"] for sample in D.raw_samples(path)] == ["x.1", "x.2"]


@pytest.mark.parametrize("name, split", [
    ("a.jpg", ("a", "jpg")), ("a.b.JPEG", ("a.b", "jpeg")), ("x/.a.jpg", ("", "")), ("a", ("a", "")), ("../x/a.txt", ("../x/a", "txt")),
    ("a.tar.gz", ("a.tar", "gz")), ("a.jpg.json", ("a", "json")), ("a.jpg.jpg", ("a.jpg", "jpg")), (".jpg", ("", "")), ("a.", ("a", "")),
])  # fmt: skip
def test_a_name_is_key_and_field(name, split):
    assert S.split_name(name) == split
