import io
import json
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlkd_lab.data import find_shards, inspect_shards, load_pairs
from vlkd_lab.samples import (
    COLOURS,
    HEADLINE,
    KINDS,
    LABEL_SETS,
    SHIFTS,
    SIZES,
    cached_shards,
    caption,
    make_sample,
    make_scene,
    near_duplicate,
    questions,
    read_caption,
    render,
    show_scenes,
    write_sentences,
    write_shards,
    write_shipped,
)


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


def test_a_sample_depends_on_seed_and_index_alone():
    forward = [make_sample(i, duplicates=0.4) for i in range(30)]
    backward = [make_sample(i, duplicates=0.4) for i in reversed(range(30))][::-1]
    assert [s.caption for s in forward] == [s.caption for s in backward]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(forward, backward, strict=True))
    assert make_scene(3, 0) != make_scene(3, 1) and make_scene(3, "train/0") != make_scene(3, "val/0")


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_have_the_same_bytes_whoever_writes_them(tmp_path, workers):
    a = write_shards(tmp_path / "a", 25, 4, per_shard=10, size=32)
    b = write_shards(tmp_path / "b", 25, 4, per_shard=10, size=32, workers=workers)
    assert [p.name for p in b] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
    assert not [p for p in (tmp_path / "b").iterdir() if p.suffix not in (".tar", ".json", ".txt")]


def test_a_shard_is_in_img2datasets_layout(tmp_path):
    (path,) = write_shards(tmp_path, 12, per_shard=50, size=48)
    found = members(path)
    assert set(found) == {f"{i:08d}.{kind}" for i in range(12) for kind in ("jpg", "txt", "json")}
    about = json.loads(found["00000003.json"])
    scene = make_scene(3, "train/0")
    assert about["cls"] == about["labels"][HEADLINE] == list(COLOURS).index(scene.things[0].colour) and found[
        "00000003.txt"
    ].decode() == caption(scene)
    assert Image.open(io.BytesIO(found["00000003.jpg"])).size == (48, 48)
    assert json.loads((tmp_path / "train-000000_stats.json").read_text())["successes"] == 12
    assert inspect_shards(tmp_path).total == 12
    pairs = load_pairs(path)
    assert pairs.labels[3] == about["cls"] and (tmp_path / "classes.txt").read_text().split("\n")[about["cls"]] == scene.things[0].colour


def test_splits_never_meet():
    captions = {split: {make_sample(i, split=split).image.tobytes() for i in range(200)} for split in ("train", "val")}
    assert not captions["train"] & captions["val"]


def test_captions_are_true_and_various():
    texts = []
    for index in range(1500):
        scene = make_scene(index, "check")
        text = caption(scene)
        said = read_caption(text)
        texts.append(text)
        assert said["kinds"] and said["kinds"] <= {t.kind for t in scene.things}
        assert said["colours"] <= {t.colour for t in scene.things} and said["settings"] <= {scene.setting}
        assert said["textures"] <= {t.texture for t in scene.things}
        assert len(text.split()) <= 22 and text == text.lower()
        if scene.relation == "left" and "left of" in text and "to the left of" not in text:
            first, second = text.split(" left of ")
            inverse = any(f" {word}" in first for word in KINDS[scene.things[1].kind])
            assert not inverse or scene.things[1].kind in read_caption(first)["kinds"]
    assert len(set(texts)) > 1400 and len({word for text in texts for word in text.replace(",", "").split()}) < 220


def test_the_relation_is_where_the_pixels_are():
    for index in range(300):
        scene = make_scene(index)
        if scene.relation:
            a, b = scene.things[:2]
            where = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
            assert where[scene.relation]


def test_colours_can_be_seen():
    seen = 0
    for index in range(500):
        scene = make_scene(index)
        thing = scene.things[0]
        if thing.texture == "plain" and thing.kind in ("circle", "square", "heart", "hexagon", "drop") and len(scene.things) == 1:
            pixels = np.asarray(render(scene, 64), float)
            x, y = int(thing.x * 64), int(thing.y * 64)
            middle = pixels[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1)) / scene.light
            nearest = min(COLOURS, key=lambda c: ((np.array(COLOURS[c]) - middle) ** 2).sum())  # noqa: B023
            seen += 1
            assert nearest == thing.colour or scene.light > 1.1
    assert seen >= 4


def test_every_class_of_every_label_set_occurs():
    scenes = [make_scene(i, "labels") for i in range(2000)]
    assert len(LABEL_SETS) >= 7
    for name, labels in LABEL_SETS.items():
        found = [labels.label(s) for s in scenes]
        counts = [found.count(k) for k in range(len(labels.names))]
        assert min(counts) >= 20, name
        assert all("{}" in t for t in labels.templates)
    assert len(LABEL_SETS["kind"].names) >= 16


def test_a_long_tail_is_long():
    kinds = [make_scene(i, tail=1.5).things[0].kind for i in range(1500)]
    assert kinds.count("circle") > 15 * max(1, kinds.count("hexagon"))


def test_questions_have_true_answers():
    for index in range(300):
        scene = make_scene(index)
        for qa in questions(scene):
            words = read_caption(qa.question.replace("?", ""))
            if qa.type == "existence":
                assert (qa.answer == "yes") == (words["kinds"] <= {t.kind for t in scene.things})
            if qa.type == "colour":
                (kind,) = words["kinds"]
                assert [t.colour for t in scene.things if t.kind == kind] == [qa.answer]
            if qa.type == "count":
                assert qa.answer == ("one", "two", "three")[len(scene.things) - 1]


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifts_change_pictures_and_leave_the_truth(shift):
    plain, shifted = make_sample(7), make_sample(7, shift=shift)
    assert shifted.image.size == plain.image.size and shifted.image.mode == "RGB"
    assert np.abs(np.asarray(plain.image, float) - np.asarray(shifted.image, float)).mean() > 1
    assert shifted.caption == plain.caption and shifted.about["labels"] == plain.about["labels"]
    assert shifted.image.tobytes() == make_sample(7, shift=shift).image.tobytes()


def test_there_are_at_least_five_shifts_and_an_unknown_one_is_named(tmp_path):
    assert len(SHIFTS) >= 5
    with pytest.raises(ValueError, match="noise"):
        write_shards(tmp_path / "x", 4, shift="fog")
    with pytest.raises(ValueError, match="at least 16"):
        render(make_scene(0), 8)


def test_copies_are_the_same_pair_again_and_name_the_first(tmp_path):
    made = [make_sample(i, copies=0.4) for i in range(250)]
    firsts = {s.key: s for s in made if s.about["duplicate_of"] is None}
    assert 0.3 < 1 - len(firsts) / 250 < 0.5 and made[7].key == "00000007"
    for sample in made:
        first = firsts[sample.about["duplicate_of"] or sample.key]
        assert sample.image.tobytes() == first.image.tobytes() and sample.caption == first.caption and first.key <= sample.key
    assert {(s.image.tobytes(), s.caption) for s in firsts.values()} == {(s.image.tobytes(), s.caption) for s in made}
    assert make_sample(9).image.tobytes() == make_sample(9, copies=0.0).image.tobytes()
    folder = cached_shards(32, cache=tmp_path, copies=0.4)
    assert folder != cached_shards(32, cache=tmp_path) and len(find_shards(folder)) == 16


def test_near_duplicates_are_near_and_name_their_source():
    made = [make_sample(i, duplicates=0.4) for i in range(250)]
    copies = [(i, int(s.about["duplicate_of"])) for i, s in enumerate(made) if s.about["duplicate_of"]]
    assert 0.3 < len(copies) / 250 < 0.5 and all(source < i for i, source in copies)
    gap = lambda a, b: np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()  # noqa: E731
    scenes = [render(make_scene(i, "train/0")) for i in range(250)]
    near = np.mean([gap(made[i].image, scenes[source]) for i, source in copies])
    far = np.mean([gap(made[i].image, scenes[(source + 5) % 250]) for i, source in copies])
    assert near < 0.5 * far
    image = render(make_scene(1))
    assert near_duplicate(image, random.Random(1)).tobytes() == near_duplicate(image, random.Random(1)).tobytes()


def test_the_cache_is_whole_or_absent(tmp_path, monkeypatch):
    made = cached_shards(20, cache=tmp_path)
    assert inspect_shards(made).total == 20 and cached_shards(20, cache=tmp_path) == made

    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("vlkd_lab.samples._write_shard", broken)
    with pytest.raises(OSError, match="disk full"):
        cached_shards(21, cache=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [made.name]


def test_the_shipped_data_are_what_the_command_makes(tmp_path):
    from pathlib import Path

    shipped = Path(__file__).parent.parent / "data_samples"
    write_shipped(tmp_path)
    names = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    assert names <= {p.relative_to(shipped) for p in shipped.rglob("*") if p.is_file()}
    for name in names:
        if name.suffix == ".tar":
            a, b = members(tmp_path / name), members(shipped / name)
            assert a.keys() == b.keys() and all(a[k] == b[k] for k in a if not k.endswith("jpg")), name
            some = next(k for k in a if k.endswith("jpg"))  # another JPEG library may round differently
            pictures = [np.asarray(Image.open(io.BytesIO(m[some])), float) for m in (a, b)]
            assert np.abs(pictures[0] - pictures[1]).mean() < 3
        else:
            assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes(), name
    assert sum(p.stat().st_size for p in shipped.rglob("*")) < 30e6


def test_sentences_and_pictures(tmp_path):
    lines = write_sentences(tmp_path / "s.txt", 50).read_text().splitlines()
    assert len(lines) == 50 and all(read_caption(line)["kinds"] for line in lines)
    assert len(show_scenes([make_sample(i) for i in range(5)], columns=3).axes) == 6
    assert set(SIZES) == {"small", "large"}
