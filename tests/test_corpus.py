"The best sentences of a text against a slow obvious version, in any blocks and with any table; prompts; reports; hostile text"

import json
import random
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from vlkd_lab import corpus as C
from vlkd_lab.curation import sentences as S
from vlkd_lab.curation.similar import same_words
from vlkd_lab.data import clean_caption, escaped, project_root
from vlkd_lab.models import load_model
from vlkd_lab.sources import unreadable


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_model(tiny_teacher, "cpu")


@pytest.fixture(scope="module")
def images():
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    rows = torch.cat([rows, rows[:5], rows[7:8]])  # identical images: the first one counts
    return rows / rows.norm(dim=1, keepdim=True)


def corpus_lines(count, seed=0):
    "Sentences with copies, variants, sentences that only differ beyond the teacher's 24 tokens, and lines that are none"
    chance = random.Random(seed)
    words = "a the star house red blue tax rate court small über 中文 left of is was never 12 on sand".split()
    lines = [" ".join(chance.choices(words, k=chance.randint(1, 9))) for _ in range(count)]
    lines += [line.upper() + "!" for line in lines[: count // 9]] + [line + "  " for line in lines[: count // 5]]
    lines += ["a small red star left of a large blue house, " * 2 + chance.choice(words) + f" {k}" for k in range(count // 20)]
    bad = [b"", b" \t", b"caf\xe9 of the star", b"nul\0in the line", b"long " * 300, b"a <b>bold\x0b\xc2\x85star</b>"]
    lines = [line.encode() for line in lines] + bad
    chance.shuffle(lines)
    return lines


def obvious(files, teacher, images, count, near, reserve, words):
    "(sentence, score, image, file, line): every feature in memory, one sort, one comparison after another"
    first = {}
    for file, lines in enumerate(files):
        for number, line in enumerate(lines, start=1):
            text = "" if unreadable(line) else clean_caption(line.decode())
            if words[0] <= len(text.split()) <= words[1]:
                first.setdefault(text, (file, number))
    with torch.no_grad():
        features = C._encode(list(first), teacher).numpy().astype(np.float64)
    cosines = features @ images.half().numpy().astype(np.float64).T
    best, nearest = -cosines.max(axis=1).astype(np.float32), cosines.argmax(axis=1).tolist()
    found = sorted((best[row], *first[text], text, nearest[row], row) for row, text in enumerate(first))
    kept = []
    for candidate in found[: round(reserve * count)]:
        if len(kept) < count and not any(
            same_words(candidate[3]) == same_words(other[3])
            or ((features[candidate[5]] - features[other[5]]) ** 2).sum() < near**2 for other in kept
        ):  # fmt: skip
            kept.append(candidate)
    return [(text, -score, image, file, line) for score, file, line, text, image, _ in kept]


def rows_of(found):
    return list(zip(found.sentences, found.scores, found.nearest.tolist(), found.files.tolist(), found.lines.tolist(), strict=True))


def written(folder, *files):
    for k, lines in enumerate(files):
        (folder / f"{k}.txt").write_bytes(b"\n".join(lines))
    return [folder / f"{k}.txt" for k in range(len(files))]


def select(paths, teacher, images, count, **given):
    return C.select_sentences(paths, teacher, images, count, **dict(progress=False) | given)


@pytest.mark.parametrize("count, near, reserve, words, block, slots", [
    (30, 0.0, 2.0, (3, 40), 2048, 1 << 22), (30, 0.05, 2.0, (3, 40), 7, 1), (30, 0.3, 1.0, (3, 40), 64, 5), (1, 0.1, 3.0, (3, 40), 7, 1),
    (30, 0.3, 4.0, (1, 5), 33, 1), (9, 0.6, 30.0, (3, 40), 2048, 1), (900, 0.02, 2.0, (1, 100), 50, 1), (120, 0.1, 1.5, (4, 8), 19, 3),
])  # fmt: skip
def test_the_selection_is_that_of_the_obvious_version(tmp_path, teacher, images, monkeypatch, count, near, reserve, words, block, slots):
    files = corpus_lines(260, 1), corpus_lines(90, 2), [b"a star"]
    monkeypatch.setattr(S, "_SLOTS", slots)
    monkeypatch.setattr(C, "_IMAGES", 1 + block % 45)
    found = select(written(tmp_path, *files), teacher, images, count, near=near, reserve=reserve, words=words, block=block)
    expected = obvious(files, teacher, images, count, near, reserve, words)
    assert rows_of(found) == expected and len(expected) == found.counts["kept"] <= count
    assert found.cut == expected[-1][1] and found.counts["read"] == sum(len(line.split()) > 0 for lines in files for line in lines)
    assert sum(found.counts.values()) == 2 * found.counts["read"] and min(found.counts.values()) >= 0


def test_candidates_are_told_apart_in_any_blocks(teacher):
    texts = [f"sentence {k}" for k in range(300)]
    rows = torch.nn.functional.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    features = rows.repeat(5, 1).add(torch.randn(300, 8, generator=torch.Generator().manual_seed(3)), alpha=0.025).half()
    whole = C._distinct(texts, features, 200, 0.15)
    assert 60 < len(whole[0]) < 200 and {reason for reason, _ in whole[1].values()} == {"near-duplicates"}
    assert all(other in whole[0] and other < row for row, (_, other) in whole[1].items())
    assert all((features[row].double() - features[other].double()).norm() < 0.15 for row, (_, other) in whole[1].items())
    assert all(C._distinct(texts, features, 200, 0.15, side)[0] == whole[0] for side in (1, 3, 100))


def test_ties_keep_the_earlier_line_and_a_shuffle_changes_nothing_else(tmp_path, teacher, images):
    tied = [b"a small red star left of a large blue house and a small red star left of a large blue house %d" % k for k in range(40)]
    found = select(written(tmp_path, tied), teacher, images, 10, near=0, block=3)
    assert len(set(found.scores.tolist())) == 1 and found.lines.tolist() == list(range(1, 11))
    texts = [clean_caption(line.decode("utf-8", "ignore")) for line in corpus_lines(300, 3)]
    lines = [text.encode() for text in {same_words(text): text for text in texts if len(text) < 80}.values()]
    one = select(written(tmp_path, lines), teacher, images, 60)
    random.Random(1).shuffle(lines)
    other = select(written(tmp_path, lines), teacher, images, 60)
    assert select(tmp_path / "0.txt", teacher, images, 60, near=2, reserve=1).counts["near-duplicates"] == 59, "60 candidates"
    scores, times = np.unique(one.scores, return_counts=True)
    alone = {text for text, score in zip(one.sentences, one.scores, strict=True) if score in scores[times == 1] and score > one.cut}
    assert np.array_equal(one.scores, other.scores) and 40 < len(alone) < 60 and alone <= set(other.sentences)


def test_a_forgotten_twin_takes_no_other_sentences_place(tmp_path, teacher, images, monkeypatch):
    monkeypatch.setattr(S, "_SLOTS", 1)
    lines = [b"%d red stars" % (k % 20) for k in range(400)]
    found = select(written(tmp_path, lines), teacher, images, 19, near=0, reserve=1, block=9)
    assert rows_of(found) == obvious([lines], teacher, images, 19, 0, 1, (3, 40)) and len(found.sentences) == 19
    assert found.counts["duplicates"] + found.counts["below the cut"] == 381 and sorted(found.lines)[-1] <= 20


def test_the_report_says_what_became_of_every_line(tmp_path, teacher, images):
    lines = [b"one two three", b"", b"one two", b"One, two three!", b"one  two three ", b"four five six", b"\xff six seven", b"a " * 41]
    lines += [b"seven of nine"]
    found = select(written(tmp_path, lines), teacher, images, 2, near=0, reserve=3)
    counts = dict(found.counts)
    assert (counts["read"], counts["unreadable"], counts["too short or long"], counts["kept"]) == (8, 1, 2, 2)
    assert counts["duplicates"] + counts["below the cut"] == 3 and 1 <= counts["duplicates"] <= 2
    assert [gone.why for gone in found.dropped["too short or long"]] == ["2 words", "41 words"] and found.dropped["unreadable"][0].line == 7
    assert found.dropped["duplicates"][0] == C.Dropped("one two three", 0, 5, None, "an earlier line is the same")
    assert all(gone.score <= found.cut and gone.text not in found.sentences for gone in found.dropped["below the cut"])
    assert found.histogram.sum() == 4 and f"kept 2 of 8 sentences, scores {found.scores[0]:.3f} to {found.cut:.3f}" in str(found)
    few = select(written(tmp_path, lines), teacher, images, 50, near=2)
    assert few.counts["kept"] < 50 and "the text holds no more" in str(few) and "fewer than the 50" in str(few)
    assert "distance" not in str(few) and few.dropped["near-duplicates"][0].why.endswith(f"from: {few.sentences[0]}")


def test_what_is_held_stays_bounded(tmp_path, teacher, images, monkeypatch):
    held, offer = [], C._Candidates.offer

    def watched(self, texts, *columns):
        before = len(self.texts)
        offer(self, texts, *columns)
        held.append((before, len(self.texts), sum(len(part[0]) for part in self.parts)))

    monkeypatch.setattr(C._Candidates, "offer", watched)
    chance = random.Random(5)
    lines = [b"%d %d %d" % (chance.randrange(30), chance.randrange(30), chance.randrange(40)) for _ in range(30_000)]
    found = select(written(tmp_path, lines), teacher, images, 50, near=0)
    assert found.counts["kept"] == 50 and found.counts["duplicates"] > 0.99 * (30_000 - len(set(lines))) > 5_000
    assert len(held) >= 7 and max(after for _, after, _ in held) <= 200 and all(after == rows for _, after, rows in held)


def test_a_row_does_not_depend_on_its_company(teacher):
    texts = [line.decode("utf-8", "ignore") for line in corpus_lines(90, 4)][:101]
    with torch.no_grad():
        whole, passes = C._encode(texts, teacher), []
        C._encode(texts, replace(teacher, tokenizer=lambda part: passes.append(len(part)) or teacher.tokenizer(part)))
        assert torch.equal(torch.cat([C._encode([text], teacher) for text in texts[:20]]), whole[:20])
        assert len(set(passes)) == 1 and sum(passes) % len(texts), "the last pass is filled up"
        assert torch.allclose(whole.float(), teacher.encode_text(teacher.tokenizer(texts)), atol=1e-3)


def test_the_teacher_comes_back_as_it_was(tmp_path, teacher, images):
    teacher.model.train()
    teacher.model.visual.eval()
    before = [module.training for module in teacher.model.modules()]
    one = select(written(tmp_path, corpus_lines(30)), teacher, images, 5)
    with pytest.raises(ValueError, match="no sentence of 3 to 40 words among 1 .too short or long 1"):
        select(written(tmp_path, [b"word"]), teacher, images, 5)
    damaged = replace(teacher, model=deepcopy(teacher.model))
    torch.nn.init.constant_(damaged.model.ln_final.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        select(written(tmp_path, corpus_lines(30)), damaged, images, 5)
    assert all([module.training for module in model.modules()] == before for model in (teacher.model, damaged.model))
    teacher.model.eval()
    assert rows_of(select(written(tmp_path, corpus_lines(30)), teacher, images, 5)) == rows_of(one)


@pytest.mark.parametrize("wrong, said", [
    (dict(count=0), "count=0"), (dict(near=-0.1), "near=-0.1"), (dict(near=2.1), "from 0 to 2"), (dict(reserve=0.5), "reserve=0.5"),
    (dict(words=(5, 3)), "words="), (dict(words=(0, 3)), "words="), (dict(block=0), "block=0"), (dict(near=float("nan")), "near=nan"),
    (dict(images=torch.ones(3)), r"\(M, 16\)"), (dict(images=torch.eye(16)[:0]), r"\(0, 16\)"), (dict(images=torch.eye(15)), r"\(15, 15\)"),
    (dict(images=torch.eye(16) * torch.arange(16)), "row 0 has length 0"), (dict(images=torch.full((2, 16), np.nan)), "length nan"),
    (dict(construction="best"), "grounded, captions, prompts"), (dict(script="Latvian"), "Latin, Greek"), (dict(similar=0.1), "from 0.3 to 1"),
    (dict(engine="ray"), "local, dask"), (dict(workers=0), "workers=0"), (dict(vlm=None), "needs a teacher"), 
    (dict(source=[]), r"named by \[\]"), (dict(source=["0.txt", "0.txt"]), "more than once"), (dict(source="none"), "no file of sentences"),
    (dict(source="none.txt"), "1 of 1 not found"), (dict(source="empty.txt"), "is empty"), (dict(source="blank.txt"), "no sentence"),
    (dict(source="utf-16.txt"), "UTF-16, not UTF-8"), (dict(source="utf-32.txt"), "UTF-32, not"), (dict(source="packed.txt"), "packed.txt: Compressed file ended"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path, teacher, images, monkeypatch, wrong, said):
    written(tmp_path, [b"a red star"])
    (tmp_path / "none").mkdir()
    contents = {"empty": b"", "blank": b"\n \n", "utf-16": "a".encode("utf-16"), "utf-32": "a".encode("utf-32"), "packed": b"\x1f\x8b\x08"}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        C.select_sentences(**dict(source="0.txt", vlm=teacher, images=images, count=3, progress=False) | wrong)


def test_progress_is_silent_when_asked(tmp_path, teacher, images, capfd, monkeypatch):
    monkeypatch.setattr(C, "progress_bar", partial(C.progress_bar, delay=0))  # what takes less than two seconds has no bar
    path = written(tmp_path, corpus_lines(30))
    select(path, teacher, images, 5)
    assert capfd.readouterr() == ("", "")
    C.select_sentences(path[0], teacher, images, 5)
    assert "corpus: 100%" in capfd.readouterr().err


def test_written_sentences_are_one_a_line_and_the_report_lies_beside(tmp_path, teacher, images):
    found = select(written(tmp_path, corpus_lines(100)), teacher, images, 90)
    for _ in range(2):
        path = C.write_selection(found, tmp_path / "new" / "kept.txt")
        assert tuple(path.read_text(encoding="utf-8").splitlines()) == found.sentences == C.read_lines(path)
    about = json.loads((tmp_path / "new" / "kept.json").read_text())
    again = C.read_selection(path)
    assert str(again) == str(found) and again.dropped == found.dropped and (again.scores == found.scores).all()
    assert about["counts"] == found.counts and about["near"] == 0.05 and about["sources"] == ["0.txt"]
    assert about["scores"]["1"] == found.scores[0] and about["cut"] == found.scores[-1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["kept.json", "kept.safetensors", "kept.txt"]
    assert str(tmp_path) not in json.dumps(about)
    with pytest.raises(ValueError, match=".json"):
        C.write_selection(found, tmp_path / "kept.json")


def test_hostile_text_is_shown_as_text(tmp_path, teacher, images):
    bad = ["<script>alert(1)</script> a star", "a <img src=x onerror=alert(1)> star", "a house \u202eno wen", "'\" & <b>bold words"]
    lines = [text.encode() for text in bad] + [b"<i>", b"<i>\xff <u>broken", bad[0].replace("a star", "A STAR!").encode(), *corpus_lines(4)]
    found = select(written(tmp_path, lines), teacher, images, len(lines), near=0)
    pictures = [Image.new("RGB", (20, 30), (k, 0, 0)) for k in range(len(images))]
    page = C.grounded(found, pictures, count=500, each=500).data
    assert not any(mark in page for mark in ("<script", "<img src=x", "<b>", "<i>", "<u>", "\u202e")) and "&lt;i&gt;" in page
    assert all(escaped(clean_caption(text)) in page for text in bad) and page.count("<img alt") == len(found.sentences)
    with pytest.raises(ValueError, match="2 pictures"):
        C.grounded(found, pictures[:2])
    assert C.plot_selection(found).axes[1].get_xlabel() == f"of {found.counts['read']:,} sentences"


def test_prompts_and_lists(tmp_path):
    assert C.class_prompts(["cat", "{}", "cat"]) == [t.replace("{}", name) for name in ("cat", "{}") for t in C.TEMPLATES]
    assert C.class_prompts(["a{0}"], ["{x} {}", "{} or {}"]) == ["{x} a{0}", "a{0} or a{0}"]
    for wrong in (dict(names="cat"), dict(names=["cat"], templates=["a {", "{}"]), dict(names=["cat"], templates="a {}")):
        with pytest.raises(ValueError, match="names and templates|'a {'"):
            C.class_prompts(**wrong)
    (tmp_path / "bad.txt").write_bytes(b"fine\n\nno\xff\n")
    with pytest.raises(ValueError, match="bad.txt: line 3 is not UTF-8 at byte 2"):
        C.read_lines(tmp_path / "bad.txt")
    with pytest.raises(FileNotFoundError):
        C.read_lines(tmp_path / "none.txt")
    assert len(C.read_lines(project_root() / "data_samples" / "scenes" / "classes.txt")) > 3
