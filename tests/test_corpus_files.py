"A corpus of many files of any form: the same answer from one process and from many, whoever dies; filters; damage; constructions"

import csv
import gzip
import json
import lzma
import os
import re
import signal
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import cloudpickle
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from conftest import tar
from test_corpus import corpus_lines, obvious, rows_of

from vlkd_lab import corpus as C
from vlkd_lab.curation import sentences as S
from vlkd_lab.curation.similar import SimilarTexts, text_similarity
from vlkd_lab.data import clean_caption, find_texts
from vlkd_lab.models import load_model
from vlkd_lab.sources import unreadable

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # processes of an engine do not know this file


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_model(tiny_teacher, "cpu")


@pytest.fixture(scope="module")
def images():
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    return rows / rows.norm(dim=1, keepdim=True)


def texts_of(lines):
    return [line.decode() for line in lines if line.strip() and not unreadable(line) and b"\n" not in line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Files of every form with copies across them, equal scores, an empty one, and damaged ones"
    folder = tmp_path / "files"
    folder.mkdir()
    lines = corpus_lines(160, 1)
    texts = texts_of(corpus_lines(90, 2))
    tied = ["a small red star left of a large blue house and a small red star left of a large blue house %d" % k for k in range(40)]
    (folder / "a.txt").write_bytes(b"\n".join(lines))
    records = [json.dumps({"url": "x", "TEXT": text}) for text in texts[:60] + tied] + ["no json", '{"TEXT": 7}', '{"TEXT": ["a red star", "a blue star"]}']
    (folder / "b.jsonl").write_text("\n".join(records))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("\n".join(records[30:80]).encode()))
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"\n".join(lines[20:90])))
    with (folder / "e.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key", "caption"), *enumerate(texts[40:90]), (1, "quoted,\nof two lines")])
    table = pyarrow.table({"caption": [*tied[::-1], *texts[10:50], None]})
    pyarrow.parquet.write_table(table, folder / "f.parquet", row_group_size=16)
    (folder / "g.txt").touch()
    tar(folder / "h.tar", [("key.txt", b"a red star on sand\na blue star on sand"), ("other.txt", tied[3].encode())])
    (folder / "i.txt.gz").write_bytes(b"\x1f\x8b no gzip")
    (folder / "j.txt").write_bytes("a red star".encode("utf-16"))
    (folder / "k.parquet").write_bytes(b"PAR1 no parquet")
    (folder / "l.txt.zst").write_bytes(zstandard.compress(b"\n".join(lines))[:-9])
    (folder / "m.jsonl").write_text('{"words": "a red star"}')
    monkeypatch.setattr(C, "cut_texts", partial(S.cut_texts, size=700))
    return folder


def same(one, other):
    "Whether two selections are equal in everything"
    assert rows_of(one) == rows_of(other) or (np.isnan(one.scores).all() and one.sentences == other.sentences)
    for name in ("counts", "dropped", "damaged", "sources", "wanted", "construction"):
        assert getattr(one, name) == getattr(other, name), name
    return np.array_equal(one.histogram, other.histogram) and str(one) == str(other)


def every_sentence(folder):
    "Lines by file, one reader after another, whole files"
    files = S.look_at_texts(folder)
    found = [[] for _ in files]
    for part in S.cut_texts(files, 1 << 30):
        try:
            for _, line, text, problem in S.READERS[part.file.kind](part):
                found[part.number].append((line, b"" if problem else text))
        except S.damages():
            pass
    return found


def select(where, teacher, images, count=60, **given):
    return C.select_sentences(where, teacher, images, count, **dict(progress=False, near=0.05, folder=where_parts(where)) | given)


def where_parts(where):
    "A folder beside the files, of parts"
    is_here = isinstance(where, str | Path) and "memory:" not in str(where)
    return (Path(where) if is_here else Path(tempfile.mkdtemp(), "files")).parent / "parts"


def test_all_forms_together_are_what_the_obvious_version_chooses(folder, teacher, images):
    found = select(folder, teacher, images)
    files = every_sentence(folder)
    expected = obvious([[text for _, text in lines] for lines in files], teacher, images, 60, 0.05, 2.0, (3, 40))
    assert [row[:3] for row in rows_of(found)] == [row[:3] for row in expected]
    places = [(file, files[file][line - 1][0]) for *_, file, line in expected]
    assert places == list(zip(found.files.tolist(), found.lines.tolist(), strict=True))
    assert len({file for file, _ in places}) >= 3 and sum(found.counts.values()) == 2 * found.counts["read"]
    assert [name for name, _ in found.damaged] == ["i.txt.gz", "j.txt", "k.parquet", "l.txt.zst", "m.jsonl"]
    assert "damaged: m.jsonl: has no column of a usual name; name the one of the sentences: words" in str(found)
    assert not list((folder.parent / "parts").iterdir()), "what is finished is cleared away"


def test_no_part_size_changes_what_is_chosen(folder, teacher, images, monkeypatch):
    one = select(folder, teacher, images)
    for size in (90, 5000, 1 << 30):
        monkeypatch.setattr(C, "cut_texts", partial(S.cut_texts, size=size))
        other = select(folder, teacher, images, block=size % 50 + 3)
        assert rows_of(one) == rows_of(other) and one.counts["read"] == other.counts["read"]


def test_a_crash_costs_the_part_in_work(folder, teacher, images, monkeypatch, tmp_path):
    one = select(folder, teacher, images)
    save, saved = C._save_part, []

    def failing(path, *given):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(path, *given)

    monkeypatch.setattr(C, "_save_part", failing)
    with pytest.raises(KeyboardInterrupt):
        select(folder, teacher, images)
    left = sorted(path.name for path in (folder.parent / "parts").glob("*/part*"))
    assert left == sorted(saved) and len(saved) == 4
    again = []
    monkeypatch.setattr(C, "_save_part", lambda path, *given: again.append(path.name) or save(path, *given))
    assert same(select(folder, teacher, images), one)
    assert again and not set(again) & set(saved)
    assert not list((folder.parent / "parts").iterdir())
    monkeypatch.setattr(C, "_save_part", failing)
    saved.clear()
    with pytest.raises(KeyboardInterrupt):
        select(folder, teacher, images)
    monkeypatch.setattr(C, "_save_part", save)
    (folder / "a.txt").write_bytes(b"a red star of another kind\n" + (folder / "a.txt").read_bytes())
    other = select(folder, teacher, images)
    assert same(other, select(folder, teacher, images, folder=tmp_path / "fresh")), "other files are begun anew"
    assert other.counts["read"] == one.counts["read"] + 1


def test_a_part_that_broke_off_is_read_again(folder, teacher, images, monkeypatch, tmp_path):
    one = select(folder, teacher, images)
    read, merged = S.READERS["table"], C._merged

    def stopped(*given):
        raise KeyboardInterrupt

    def broken(part):
        yield from list(read(part))[:5]
        raise OSError("the line went dead")

    monkeypatch.setitem(S.READERS, "table", broken)
    monkeypatch.setattr(C, "_merged", stopped)
    with pytest.raises(KeyboardInterrupt):
        select(folder, teacher, images)
    monkeypatch.setattr(C, "_merged", merged)
    monkeypatch.setitem(S.READERS, "table", read)
    assert same(select(folder, teacher, images), one)
    monkeypatch.setitem(S.READERS, "table", broken)
    short = select(folder, teacher, images)
    assert ("e.csv", "after line 6: the line went dead") in short.damaged


# Files


def read_all(path, size=1 << 30, column=""):
    parts = S.cut_texts(S.look_at_texts(path, column), size)
    return [row[1:] for part in parts for row in S.READERS[part.file.kind](part)]


def test_a_line_belongs_to_the_part_in_which_it_begins(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n" + b"x" * 50 + b"\ntwo\nlast")
    for size in range(1, 70):
        assert [text for _, text, _ in read_all(tmp_path / "a.txt", size)] == [b"one", b"", b"x" * 50, b"two", b"last"], size


def test_lines_are_counted_over_parts_that_end_in_blank_ones(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a red star\n\n\n\na blue star here\n\n\na house at night\n")
    for size in (1, 3, 12, 13, 14, 99):
        monkeypatch.setattr(C, "cut_texts", partial(S.cut_texts, size=size))
        found = C.select_sentences(tmp_path / "a.txt", count=3, construction="captions", progress=False)
        assert dict(zip(found.sentences, found.lines.tolist(), strict=True)) == {"a red star": 1, "a blue star here": 5, "a house at night": 8}


def test_an_endless_line_is_not_held(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a red star\n" + b"x" * (3 << 20) + b"\na blue star"))
    assert [(number, len(text)) for number, text, _ in read_all(tmp_path / "a.txt.gz")] == [(1, 10), (2, 1 << 20), (3, 11)]


def test_frames_of_zstandard_are_followed_to_the_last(tmp_path):
    frames = [zstandard.compress(f"line {k}\n".encode() * 2000) for k in range(3)]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert len(read_all(tmp_path / "a.txt.zst")) == 6000
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames)[:-1])
    with pytest.raises(EOFError, match="in the middle of a frame"):
        read_all(tmp_path / "a.txt.zst")


def test_text_that_is_none_costs_its_row(tmp_path):
    column = pyarrow.array([b"a red star", b"caf\xe9 star"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"TEXT": column, "n": [1, 2]}), tmp_path / "a.parquet")
    assert [text for _, text, _ in read_all(tmp_path / "a.parquet")] == [b"a red star", b"caf\xe9 star"]
    assert [problem for *_, problem in read_all(tmp_path / "a.parquet", column="n") if problem] == ["no text in 'n'"] * 2
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 star"}\n[1]\n{"text": {}}\n{"text": null}\n{"text": "fine"}')
    rows = read_all(tmp_path / "a.jsonl")
    assert unreadable(rows[0][1]) and [problem for *_, problem in rows] == ["", *["no text in 'text'"] * 3, ""]
    (tmp_path / "a.tsv").write_bytes(b"key\tcaption\n1\tcaf\xe9\n2\n3\ta star\n")
    assert read_all(tmp_path / "a.tsv") == [(2, b"caf\xe9", ""), (3, b"", "no text in 'caption'"), (4, b"a star", "")]
    found = C.select_sentences(tmp_path, count=3, construction="captions", words=(1, 9), progress=False)
    assert found.counts["read"] == 5 + 2 + 3 and found.counts["unreadable"] == 4 + 1 + 2 and found.dropped["unreadable"][-1].file == 1


def test_the_column_is_that_which_is_named_or_of_a_usual_name(tmp_path):
    (tmp_path / "a.csv").write_text("title;Caption\nno;yes\n")
    assert [text for _, text, _ in read_all(tmp_path / "a.csv")] == [b"yes"]
    assert [text for _, text, _ in read_all(tmp_path / "a.csv", column="title")] == [b"no"]
    with pytest.raises(ValueError, match="has no column 'alt'; its columns are title, Caption"):
        read_all(tmp_path / "a.csv", column="alt")


GOOD = [f"a small red star number {k} left of a blue house" for k in range(30)]
TABLE = "caption,url\n" + "\n".join(f"{text},u" for text in GOOD)
RECORDS = "\n".join(json.dumps({"caption": text}) for text in GOOD)


def parquet(values, cut=None):
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"caption": values}), file)
    return file.getvalue().to_pybytes()[:cut]


STRANGE = {  # name of a file, what is in it -> sentences, unreadable lines, how the damage is told
    "empty.txt": (b"", 0, 0, None),
    "blank.txt": (b"\n\n\n", 0, 0, None),
    "mark.txt": (b"\xef\xbb\xbf" + "\n".join(GOOD).encode(), 30, 0, None),
    "bad.txt": ("\n".join(GOOD).encode() + b"\n\xff\xfe is a bad line of text\n", 30, 1, None),
    "zeros.txt": (b"\0" * 1000, 0, 1, None),
    "other.txt": ("\n".join(GOOD).encode("utf-16"), 0, 0, "is UTF-16"),
    "cut.txt.gz": (gzip.compress("\n".join(GOOD * 300).encode())[:1800], 30, 0, "after line [0-9]{4}: Compressed file ended"),
    "junk.txt.gz": (gzip.compress(("\n".join(GOOD) + "\n").encode()) + b"junk", 30, 0, "after line 30: Not a gzipped file"),
    "none.txt.gz": (gzip.compress(b""), 0, 0, None),
    "cut.txt.xz": (lzma.compress("\n".join([*GOOD, ""]).encode())[:-20], 30, 0, "after line 30: Compressed file ended"),
    "cut.txt.zst": (zstandard.compress("\n".join([*GOOD, ""]).encode()) + zstandard.compress(b"a cut line of text")[:-3], 30, 0, "after line 30: the file ends"),
    "none.parquet": (parquet(pyarrow.array([], pyarrow.string())), 0, 0, None),
    "zero.parquet": (b"", 0, 0, "size is 0 bytes"),
    "cut.parquet": (parquet(GOOD, -30), 0, 0, "magic bytes not found"),
    "numbers.parquet": (parquet(list(range(7))), 0, 7, None),
    "holes.parquet": (parquet([None, *GOOD, None]), 30, 0, None),
    "mark.csv": (b"\xef\xbb\xbf" + TABLE.encode(), 30, 0, None),
    "empty.csv": (b"", 0, 0, None),
    "header.csv": (b"caption,url\n", 0, 0, None),
    "other.csv": (TABLE.replace("caption", "zzz", 1).encode(), 0, 0, "no column of a usual name; name the one of the sentences: zzz, url"),
    "long.csv": (("caption,url\n" + "x" * 200_000 + ",u\n" + TABLE.partition("\n")[2]).encode(), 30, 0, None),
    "short.csv": ((TABLE + "\n,,,,\nonly one\n").encode(), 30, 0, None),
    "some.jsonl": ((RECORDS + '\n{"url": "x"}\n[1]\nnull\n{"caption": 3').encode(), 30, 4, None),
    "other.jsonl": (RECORDS.replace("caption", "zzz").encode(), 0, 0, "no column of a usual name; name the one of the sentences: zzz"),
    "zero.tar": (b"", 0, 0, "empty file"),
    "junk.tar": (b"junk" * 300, 0, 0, "unreadable after 0 samples"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_files_give_what_is_in_them_and_their_damage_is_named(name, tmp_path):
    content, sentences, bad, damage = STRANGE[name]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).write_bytes(content)
    (tmp_path / "files" / "good.txt").write_text("a yellow moon over the sea\n")
    found = C.select_sentences(tmp_path / "files", count=100, construction="captions", progress=False, folder=tmp_path / "parts")
    assert sorted(found.sentences) == sorted([*GOOD[:sentences], "a yellow moon over the sea"])
    assert found.counts["unreadable"] == bad and len(found.damaged) == bool(damage)
    assert not damage or (found.damaged[0][0] == name and re.search(damage, found.damaged[0][1]))
    if not sentences:
        with pytest.raises(ValueError, match=name):
            C.select_sentences(tmp_path / "files" / name, count=9, construction="captions", progress=False, folder=tmp_path / "parts")


@pytest.mark.parametrize("package, name", [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_what_is_not_installed_is_named(package, name, tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"a star"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a star"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    with pytest.raises(ImportError, match=r'not installed: pip install "vlkd_lab\[curation\]"'):
        S.look_at_texts(tmp_path / name)


def test_minhash_that_is_not_installed_is_named_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ImportError, match=r'similar=0.8 needs datasketch: pip install "vlkd_lab\[curation\]"'):
        C.select_sentences("nowhere.txt", count=3, construction="captions", similar=0.8)


def test_a_corpus_behind_a_url(folder, teacher, images, tmp_path):
    import fsspec

    here = [path for path in find_texts(folder) if path.name[0] in "abcdefh"]
    memory = fsspec.filesystem("memory")
    for path in here:
        memory.pipe(f"/corpus/{path.name}", path.read_bytes())
    memory.pipe("/corpus/notes.md", b"no sentence")
    near = select(here, teacher, images)
    assert same(select("memory://corpus/", teacher, images), near)
    assert rows_of(select(["memory://corpus/*", "!notes.md"], teacher, images)) == rows_of(near)


# Filters and constructions


def test_a_script_is_asked_for(folder, tmp_path):
    lines = ["красная звезда на песке", "a red star on sand", "星 星 星 星", "1 2 3 4", "a звезда on the sand here"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    for script, expected in (("Latin", {lines[1]}), ("Cyrillic", {lines[0]}), ("Han", {lines[2]}), ("", set(lines))):
        found = C.select_sentences(tmp_path / "a.txt", count=9, construction="captions", script=script, progress=False)
        assert set(found.sentences) == expected and found.counts["another script"] == 5 - len(expected)
    assert found.dropped["another script"] == ()


def test_captions_are_drawn_by_what_they_say_alone(folder, tmp_path):
    found = select(folder, None, None, 30, construction="captions")
    texts = sorted({text for lines in every_sentence(folder) for text in sentences_of(lines)}, key=rank_of)
    assert list(found.sentences) == distinct(texts)[:30] and np.isnan(found.scores).all() and set(found.nearest.tolist()) == {-1}
    assert select(folder, None, None, 30, construction="captions", seed=1).sentences != found.sentences
    path = C.write_selection(found, tmp_path / "kept.txt")
    assert same(C.read_selection(path), found) and "NaN" not in path.with_suffix(".json").read_text()
    assert len(C.plot_selection(found).axes) == 1 and "scores" not in str(found)
    with pytest.raises(ValueError, match="these sentences are captions: no picture is nearest"):
        C.grounded(found, [])


def sentences_of(lines):
    texts = [clean_caption(text.decode()) for _, text in lines if not unreadable(text)]
    return [text for text in texts if 3 <= len(text.split()) <= 40]


def rank_of(text):
    return -C._Drawing(0).rank([text])[0][0]


def distinct(texts):
    first = {}
    for text in texts:
        first.setdefault(C.same_words(text), text)
    return list(first.values())


def test_similar_ones_go_in_the_order_of_the_candidates(folder, teacher, images):
    for construction in ("grounded", "captions"):
        loose = select(folder, teacher, images, 900, construction=construction, near=0)
        strict = select(folder, teacher, images, 900, construction=construction, near=0, similar=0.6)
        kept = []
        for text in loose.sentences:
            if all(text_similarity(text, other) < 0.6 for other in kept):
                kept.append(text)
        assert list(strict.sentences) == kept and strict.counts["similar words"] == len(loose.sentences) - len(kept) > 20
        assert strict.dropped["similar words"][0].why.startswith("most of the letters of: ")


def test_what_is_dropped_drops_nothing(tmp_path):
    chain = ["one two three four five six seven", "three four five six seven eight nine", "five six seven eight nine ten eleven"]
    assert text_similarity(chain[0], chain[1]) > 0.4 < text_similarity(chain[1], chain[2]) and text_similarity(chain[0], chain[2]) < 0.4
    (tmp_path / "a.txt").write_text("\n".join(chain))
    kept = set()
    for seed in range(20):
        given = dict(count=3, construction="captions", seed=seed, progress=False)
        first = C.select_sentences(tmp_path / "a.txt", **given).sentences[0]
        found = C.select_sentences(tmp_path / "a.txt", similar=0.4, **given).sentences
        assert found == (chain[1],) if first == chain[1] else set(found) == {chain[0], chain[2]}
        kept.add(len(found))
    assert kept == {1, 2}


def test_similar_texts_are_found_in_any_order():
    texts = sorted({clean_caption(text) for text in texts_of(corpus_lines(120, 5))})
    for order in (texts, texts[::-1]):
        kept = SimilarTexts(0.5)
        for row, text in enumerate(order):
            near = [other for other in range(row) if text_similarity(text, order[other]) >= 0.5]
            assert kept.twin(text) == (near[0] if near else None), text
            kept.keep(text, row)


def test_prompts_are_a_construction(tmp_path):
    (tmp_path / "classes.txt").write_text("star\nhouse\n")
    found = C.select_sentences(tmp_path / "classes.txt", construction="prompts")
    assert list(found.sentences) == C.class_prompts(["star", "house"]) and found.counts["kept"] == found.counts["read"] == 8
    (tmp_path / "templates.txt").write_text("a {} here\n")
    assert C.select_sentences(tmp_path / "classes.txt", construction="prompts").sentences == ("a star here", "a house here")
    few = C.select_sentences(tmp_path / "classes.txt", count=1, construction="prompts")
    assert few.sentences == ("a star here",) and few.counts["below the cut"] == 1
    assert same(C.read_selection(C.write_selection(few, tmp_path / "few.txt")), few)


def test_a_command_writes_what_a_job_takes(folder, tmp_path, tiny_teacher, scenes, capsys):
    found = C._main([str(tmp_path / "out.txt"), str(folder / "a.txt"), "--count", "9", "--similar", "0.8", "--words", "4", "9", "--script", "Latin"])
    assert len(found.sentences) == 9 and all(4 <= len(text.split()) <= 9 for text in found.sentences)
    assert C.read_lines(tmp_path / "out.txt") == found.sentences
    given = ["--construction", "grounded", "--count", "9", "--teacher", str(tiny_teacher), "--images", f"{scenes}/val-000000.tar"]
    grounded = C._main([str(tmp_path / "out.txt"), str(folder), *given])
    assert grounded.construction == "grounded" and len(grounded.damaged) == 5 and grounded.scores[0] >= grounded.scores[8] > -1
    with pytest.raises(ValueError, match="needs images"):
        C._main([str(tmp_path / "out.txt"), str(folder), *given[:6]])


def test_a_report_of_earlier_days_is_read(tmp_path, folder, teacher, images):
    path = C.write_selection(select(folder, teacher, images), tmp_path / "kept.txt")
    about = json.loads(path.with_suffix(".json").read_text())
    for name in ("construction", "damaged"):
        del about[name]
    for name in ("another script", "similar words"):
        del about["counts"][name], about["dropped"][name]
    path.with_suffix(".json").write_text(json.dumps(about))
    again = C.read_selection(path)
    assert again.construction == "grounded" and again.counts["similar words"] == 0 and len(C.plot_selection(again).axes) == 2


def test_no_block_changes_what_is_counted(tmp_path, teacher, images, monkeypatch):
    monkeypatch.setattr(S, "_SLOTS", 1)
    tied = ["a small red star left of a large blue house and a small red star left of a large blue house %d" % k for k in range(30)]
    (tmp_path / "a.txt").write_text("\n".join(tied[:12] + ["a house on sand", *tied] * 4))
    whole = select(tmp_path / "a.txt", teacher, images, 10, reserve=1, near=0)
    assert whole.counts["duplicates"] == 4 * len(set(whole.sentences) & set(tied)) + 3 * ("a house on sand" in whole.sentences)
    for block in (1, 7, 50):
        assert same(select(tmp_path / "a.txt", teacher, images, 10, reserve=1, near=0, block=block), whole)


def test_a_worker_takes_a_gpu_of_its_own(monkeypatch, tmp_path):
    asked = []

    def load(name, device):
        asked.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(C, "load_model", load)
    monkeypatch.setattr(C, "own_gpu", lambda: 2)
    work = C._Work(tmp_path, S.TextFilters(), 1, 1, "grounded", 0, teacher="any", device="cuda")
    with pytest.raises(KeyboardInterrupt):
        C._judge_here(work)
    assert asked == ["cuda:2"]


def test_a_selection_is_made_once_at_a_time(folder, tmp_path, monkeypatch):
    opened = C.open_engine
    captions = partial(select, folder, None, None, construction="captions", folder=tmp_path / "parts")

    def meanwhile(*given):
        with pytest.raises(RuntimeError, match="parts/[0-9a-f]{16} is at work already: process"):
            captions()
        captions(seed=3)  # which is another one
        return opened(*given)

    engines = iter([meanwhile])
    monkeypatch.setattr(C, "open_engine", lambda *given: next(engines, opened)(*given))
    captions()
    assert not list((tmp_path / "parts").iterdir())


# Processes


def killed_once(folder, function, part):
    "The first process that comes to the fourth part is killed in the middle of its work"
    mark = Path(folder, "killed")
    if part.number == 1 and part.start and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return function(part)


class Disturbed:
    "An engine whose tasks come in another order, and one of whose workers is killed"

    def __init__(self, engine, folder):
        self.engine = engine
        self.workers = engine.workers
        self.folder = folder

    def each(self, function, tasks, label=""):
        order = np.random.default_rng(3).permutation(len(tasks)).tolist()
        disturbed = partial(killed_once, str(self.folder), function)
        for number, result in self.engine.each(disturbed, [tasks[k] for k in order]):
            yield order[number], result


@pytest.mark.parametrize("engine", ["local", "dask"])
def test_engines_workers_orders_and_deaths_change_nothing(engine, folder, teacher, images, monkeypatch, tmp_path):
    one = select(folder, teacher, images, similar=0.8)
    opened = C.open_engine

    @contextmanager
    def disturbed(*given):
        with opened(*given) as engine:
            yield Disturbed(engine, tmp_path)

    monkeypatch.setattr(C, "open_engine", disturbed)
    assert same(select(folder, teacher, images, similar=0.8, engine=engine, workers=2), one)
    assert (tmp_path / "killed").exists()


def test_captions_are_drawn_by_many_processes_as_by_one(folder):
    one = select(folder, None, None, construction="captions", similar=0.7, script="Latin")
    assert same(select(folder, None, None, construction="captions", similar=0.7, script="Latin", workers=2), one)


def test_a_teacher_that_was_changed_in_memory_is_not_loaded_by_name(folder, tiny_teacher, images):
    changed = load_model(tiny_teacher, "cpu")
    torch.nn.init.normal_(changed.model.ln_final.weight)
    with pytest.raises(ValueError, match="has other weights there than in memory: save it with save_model"):
        select(folder, changed, images, workers=2)
    with pytest.raises(ValueError, match="load the teacher by its name, and it has none"):
        select(folder, replace(changed, name=""), images, workers=2)
