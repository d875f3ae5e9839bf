"A teacher's features on disk: the teacher's own, computed once, never another's"

import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors import safe_open
from safetensors.torch import save_file
from test_data import members, own_cache, tar  # noqa: F401

from vlkd_lab import stores as S
from vlkd_lab.data import (
    BadSample,
    PairStream,
    View,
    decode_sample,
    find_images,
    find_sentences,
    inspect_shards,
    load_pairs,
    raw_samples,
    write_index,
)
from vlkd_lab.engines import open_engine
from vlkd_lab.models import load_model, new_model


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_model(tiny_teacher, "cpu")


@pytest.fixture(scope="module")
def other(teacher):
    "Another teacher of the same shape and view"
    return new_model(TINY, like=teacher, seed=8)


@pytest.fixture
def shards(tmp_path):
    "Three shards of 5, 7 and 4 pairs; the second has two bad samples, one of them first"
    (tmp_path / "in").mkdir()
    tar(tmp_path / "in" / "a.tar", members(range(5)))
    bad = [("00000.jpg", b"no picture"), ("00000.txt", b"x")]
    alone = [("00007x.jpg", b"\xff\xd8\xff"), ("00007y.txt", b"x")]
    tar(tmp_path / "in" / "b.tar.gz", bad + members([5, 6, 7]) + alone + members(range(8, 12)))
    tar(tmp_path / "in" / "c.tar", [member for member in members(range(12, 16)) if not member[0].endswith("14.cls")])
    return tmp_path / "in"


def store_of(vlm, files, where=""):
    return S.FeatureStore(inspect_shards(files, progress=False), S.store_key(vlm), where)


def fill(store, vlm, *sides, **options):
    return S.fill(store, vlm, sides or S.SIDES, progress=False, **options)


def files(store):
    return {store.path(name, side) for name in store.shards for side in S.SIDES}


@torch.no_grad()
def straight(vlm, data):
    "Names, classes and rows of each side, a sample at a time"
    found = {"image": ([], [], []), "text": ([], [], [])}
    for shard in inspect_shards(data).usable:
        for sample, (side, (keys, labels, rows)) in product(raw_samples(shard.path), found.items()):
            try:
                image, caption, label = decode_sample(sample, sides=(side,))
            except BadSample:
                continue
            row = vlm.encode_image(vlm.preprocess(image)[None]) if side == "image" else vlm.encode_text(vlm.tokenizer([caption]))
            for column, value in zip((keys, labels, rows), (f"{shard.name}/{sample['__key__']}", label, row), strict=True):
                column.append(value)
    return {side: (tuple(keys), labels, torch.cat(rows)) for side, (keys, labels, rows) in found.items()}


@pytest.mark.parametrize("batch_size", [3, 256])
def test_rows_are_the_teachers_own_and_bad_samples_leave_no_gap(teacher, shards, batch_size):
    modes = []
    watch = teacher.model.visual.register_forward_pre_hook(lambda model, given: modes.append(model.training))
    teacher.model.train()
    store = store_of(teacher, sorted(shards.iterdir())[::-1])
    assert len(store.missing()) == 6 and fill(store, teacher, batch_size=batch_size) == 6 and not store.missing()
    watch.remove()
    assert modes and not any(modes) and teacher.model.training and not teacher.model.eval().training
    for side, (keys, labels, rows) in straight(teacher, shards).items():
        stored = S.load(store, side)
        assert stored.keys == keys and stored.rows.dtype == np.float16 and stored.rows.shape == (len(keys), 16)
        assert stored.labels.tolist() == [-1 if label is None else label for label in labels] and -1 in stored.labels
        assert np.abs(stored.rows - rows.numpy()).max() < 2**-11
        assert np.allclose(np.linalg.norm(stored.unit(), axis=1), 1, atol=1e-6)
    counts = {side: [len(S.shard_features(store, name, side).keys) for name in store.shards] for side in S.SIDES}
    assert counts == {"image": [5, 7, 4], "text": [5, 9, 4]}, "a caption without a picture is a sentence all the same"


def test_a_killed_job_goes_on_where_it_was(teacher, shards, monkeypatch):
    store, seen, encode = store_of(teacher, shards), [], S.encode_shard

    def killed(vlm, shard, *more):
        seen.append(shard.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return encode(vlm, shard, *more)

    monkeypatch.setattr(S, "encode_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(store, teacher)
    assert [name for name, _ in store.missing()] == ["b", "b", "c", "c"] and S.shard_features(store, "a", "image").keys
    assert fill(store_of(teacher, shards), teacher, "image") == 2 and store.missing() == [("b", "text"), ("c", "text")]
    assert fill(store, teacher) == 2 and fill(store, teacher) == 0 and seen == ["a", "b", "b", "c", "b", "c"]


def test_a_file_is_never_seen_half_written(teacher, shards, monkeypatch):
    store, save = store_of(teacher, shards), S.save_file
    fill(store, teacher, "text")
    before = {path: path.read_bytes() for path in files(store) if path.exists()}

    def full(arrays, path, metadata):
        save(arrays, path, metadata)
        assert not any(path == visible for visible in files(store)), "written beside"
        path.write_bytes(path.read_bytes()[:100])
        raise OSError("no space left")

    monkeypatch.setattr(S, "save_file", full)
    store.path("a", "text").unlink()
    with pytest.raises(OSError, match="no space"):
        fill(store, teacher)
    assert len(store.missing()) == 4 and not store.path("a", "text").exists()
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())
    for length in (0, 7, 200, len(before[store.path("b", "text")]) - 1):
        store.path("b", "text").write_bytes(before[store.path("b", "text")][:length])
        assert store.problem("b", "text") == "unreadable, or of another version"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_processes_share_the_shards(teacher, scenes, tmp_path, world_size):
    stores = [store_of(teacher, f"{scenes}/train-*.tar", tmp_path / "out") for _ in range(world_size)]
    written = [fill(store, teacher, "text", rank=rank, world_size=world_size) for rank, store in enumerate(stores)]
    assert sum(written) == 3 and max(written) - min(written) <= 1 and not stores[0].missing(["text"])


def test_only_what_is_of_this_shard_and_this_teacher_is_used(teacher, other, shards):
    store = store_of(teacher, shards)
    fill(store, teacher)
    plain, preprocess, tokenizer = S.store_key(teacher), teacher.preprocess, teacher.tokenizer
    changed = dict(
        weights=other,
        preprocess=replace(teacher, preprocess=lambda image: preprocess(image.rotate(2))),
        normalisation=replace(teacher, preprocess=lambda image: preprocess(image) + 0.02),
        tokenizer=replace(teacher, tokenizer=lambda texts: tokenizer([text.replace("cat", "cut") for text in texts])),
        context=replace(teacher, tokenizer=lambda texts: tokenizer(texts)[:, :-1]),
    )
    for what, vlm in changed.items():
        key = S.store_key(vlm)
        assert (key.weights != plain.weights, key.view != plain.view) == (what == "weights", what != "weights"), what
        theirs = S.FeatureStore(inspect_shards(shards), key)
        assert len(theirs.missing()) == 6 and not files(theirs) & files(store)
        theirs.path("a", "image").parent.mkdir(exist_ok=True)
        theirs.path("a", "image").write_bytes(store.path("a", "image").read_bytes())
        assert "of another teacher" in theirs.problem("a", "image")
        with pytest.raises(ValueError, match="a.image.safetensors: the image features of a are of another teacher.*start the job again"):
            S.shard_features(theirs, "a", "image")
    assert S.store_key(replace(teacher, preprocess=lambda image: preprocess(image))) == plain
    tar(shards / "a.tar", members([0, 1, 2, 3, 9]))
    after = store_of(teacher, shards)
    assert after.missing() == [("a", "image"), ("a", "text")] and "changed since" in after.problem("a", "text")
    assert fill(after, teacher) == 2 and S.load(after).keys[4] == "a/00009"


def test_a_folder_of_another_teacher_is_refused_by_both_names(teacher, other, shards, tmp_path):
    fill(store_of(teacher, shards, tmp_path / "out"), teacher, "text")
    assert not store_of(teacher, shards, tmp_path / "out").missing(["text"])
    mine, theirs = S.store_key(teacher), S.store_key(other)
    said = f"{mine.teacher}.*{mine.weights[:12]}.* not of {theirs.teacher} .{theirs.weights[:12]}.*another folder"
    with pytest.raises(ValueError, match=said):
        store_of(other, shards, tmp_path / "out")
    with pytest.raises(ValueError, match="holds features of the teacher"):
        S.FeatureStore(inspect_shards(shards), replace(mine, view="0" * 64), tmp_path / "out")


def test_shards_in_a_read_only_folder_have_their_features_in_the_cache(teacher, shards, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("lib_name = vlkd_lab\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(S.os, "access", lambda path, mode: path != shards)
    store = store_of(teacher, shards)
    assert fill(store, teacher, "text") == 3 and not store.missing(["text"]) and not (shards / "features").exists()
    assert all(tmp_path / ".cache" / "features" in path.parents for path in files(store))


@pytest.mark.parametrize("where", ["", "out"])
def test_an_index_has_its_shards_rows(teacher, shards, tmp_path, where):
    where = where and tmp_path / where
    store = store_of(teacher, shards, where)
    fill(store, teacher)
    report = {shard.name: shard for shard in inspect_shards(shards).shards}
    for name, keys in (("a", ["00003", "00001"]), ("b", ["00000", "00008", "00011"])):
        write_index(tmp_path / "chosen" / f"{name}.kept.json", report[name], keys)
    part, whole = store_of(teacher, tmp_path / "chosen", where), S.load(store)
    rows = [whole.keys.index(key) for key in ("a/00001", "a/00003", "b/00008", "b/00011")]
    assert not part.missing() and S.load(part).keys == tuple(whole.keys[row] for row in rows), "00000 is a bad sample"
    assert (S.load(part).rows == whole.rows[rows]).all() and (S.load(part).labels == whole.labels[rows]).all()
    memory = S.StoredTeacher(part, teacher.scale)
    assert memory._row(part, "b/00011", "text").tolist() == S.shard_features(store, "b", "text").rows[-1].tolist()
    with pytest.raises(ValueError, match="no text features of a/00002"):
        memory._row(part, "a/00002", "text")


def test_a_stored_teacher_answers_for_shuffled_batches_of_folders_with_the_same_names(teacher, tmp_path):
    for k, folder in enumerate("xyz"):
        (tmp_path / folder).mkdir()
        for shard in range(2):
            tar(tmp_path / folder / f"{shard}.tar", members(range(8 * k + 4 * shard, 8 * k + 4 * shard + 4)))
    report = inspect_shards([tmp_path / "z", tmp_path / "x", tmp_path / "y"])
    store = S.FeatureStore(report, S.store_key(teacher))
    assert fill(store, teacher) == 12 and len(files(store)) == 12
    memory = S.StoredTeacher(store, teacher.scale)
    for batch in islice(PairStream(report, View(teacher.preprocess, teacher.tokenizer), 6, seed=2).batches(), 5):
        with torch.no_grad():
            said, expected = memory.encode(batch), teacher.encode(batch)
        for side in S.SIDES:
            rows = getattr(said, side)
            assert torch.allclose(rows, getattr(expected, side), atol=2**-11) and torch.allclose(rows.norm(dim=1), torch.ones(6))
        assert said.scale == expected.scale and not said.scale.requires_grad
    for name in ("x/0/00099", "0/00000", "nowhere/1"):
        with pytest.raises(ValueError, match=f"no image features of {name}"):
            memory._row(store, name, "image")


def test_many_shards_pass_through_a_small_memory(teacher, shards):
    store = store_of(teacher, shards)
    fill(store, teacher)
    for name in "abcacb":
        kept = S.shard_features(store, name, "image", most=2)
        assert kept.keys == S.encode_shard(teacher, store.shards[name][0])["image"].keys and len(store._open) <= 2


def test_files_are_safetensors_and_nothing_else(teacher, shards, tmp_path):
    store = store_of(teacher, shards, tmp_path / "out")
    fill(store, teacher)
    assert {path for path in (tmp_path / "out").iterdir()} == files(store) | {tmp_path / "out" / "store.json"}
    for path in files(store):
        with safe_open(path, "np") as file:
            assert set(file.keys()) == {"keys", "labels", "rows", "captioned"}
        path.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
        assert "unreadable" in store.problem(*path.name.split(".")[:2])


def test_features_that_are_not_finite_name_their_sample(teacher, shards):
    broken = replace(teacher, preprocess=lambda image: teacher.preprocess(image) * float("nan"))
    with pytest.raises(ValueError, match="image features of a/00000 are not finite"):
        S.fill(store_of(broken, shards), broken, progress=False)


def test_the_command_line_fills_its_part(teacher, tiny_teacher, shards, monkeypatch, capfd):
    with monkeypatch.context() as second_of_two:
        second_of_two.setattr(sys, "argv", ["python -m", str(shards), str(tiny_teacher), "image"])
        second_of_two.setenv("RANK", "1")
        second_of_two.setenv("WORLD_SIZE", "2")
        runpy.run_module("vlkd_lab.stores", run_name="__main__", alter_sys=True)
    assert capfd.readouterr().out == "1 files written\n"
    store = store_of(teacher, shards)
    assert store.missing(["image"]) == [("a", "image"), ("c", "image")]
    assert S._main([str(shards), str(tiny_teacher)]) == 5 and not store.missing()


@pytest.mark.parametrize("engine", [dict(engine="local", workers=2), dict(engine="dask", workers=1)], ids=str)
def test_tasks_of_an_engine_write_what_one_process_writes(teacher, tiny_teacher, shards, tmp_path, engine):
    plain = store_of(teacher, shards, tmp_path / "plain")
    fill(plain, teacher)
    index = write_index(tmp_path / "kept" / "a.kept.json", inspect_shards(shards).shards[0], ["00001", "00003"])
    tasks = store_of(teacher, [index, shards / "b.tar.gz", shards / "c.tar"], tmp_path / "tasks")
    with open_engine(**engine) as opened:
        assert S.fill_by(opened, tasks, tiny_teacher, ["image"], progress=False) == 3
        assert S.fill_by(opened, tasks, tiny_teacher, progress=False) == 3 and not tasks.missing()
    for side in S.SIDES:
        for name in plain.shards:
            one, other = (S._read(store.path(name, side)) for store in (plain, tasks))
            assert one.keys == other.keys and np.array_equal(one.rows, other.rows)


@pytest.mark.parametrize("by_engine", [False, True])
def test_of_two_calls_that_compute_the_same_the_second_waits(teacher, tiny_teacher, shards, tmp_path, monkeypatch, capsys, by_engine):
    store = store_of(teacher, shards, tmp_path / "out")
    encode, threads, encoded = S.encode_shard, [], []

    def again():
        with open_engine("local") as engine:
            given = (engine, store_of(teacher, shards, tmp_path / "out"), tiny_teacher)
            encoded.append(S.fill_by(*given, progress=False) if by_engine else fill(store_of(teacher, shards, tmp_path / "out"), teacher))

    def encode_slowly(vlm, shard, *more):
        encoded.append(shard.name)
        if not threads:
            threads.append(threading.Thread(target=again))
            threads[0].start()
            time.sleep(0.5)
        return encode(vlm, shard, *more)

    monkeypatch.setattr(S, "encode_shard", encode_slowly)
    assert fill(store, teacher) == 2 * len(store.shards)
    threads[0].join()
    assert sorted(encoded[:-1]) == sorted(store.shards) and encoded[-1] == 0
    assert f"{tmp_path / 'out'} is at work already: process {os.getpid()}" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.lock"))


def test_a_folder_whose_teacher_has_changed_is_loaded_anew(tiny_teacher, teacher, shards, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(S, "load_model", lambda name, device: given.append(name) or load_model(name, device))
    with open_engine() as opened:
        assert S.fill_by(opened, store_of(teacher, shards, tmp_path / "one"), "teacher", ["image"], progress=False) == 3
        other = load_model(folder, "cpu")
        with torch.no_grad():
            other.model.logit_scale += 1
        save_file(other.model.state_dict(), folder / "open_clip_model.safetensors")
        store = store_of(load_model(folder, "cpu"), shards, tmp_path / "two")
        assert S.fill_by(opened, store, "teacher", ["image"], progress=False) == 3
    assert given == [folder, folder], "found from any working directory"


def test_the_command_line_takes_an_engine(tiny_teacher, teacher, shards):
    command = [sys.executable, "-m", "vlkd_lab.stores", str(shards), str(tiny_teacher), "image", "engine=local", "workers=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "3 files written\n", done.stderr
    assert not store_of(teacher, shards).missing(["image"])
    for wrong in ("engin=dask", "workers=many"):
        with pytest.raises(ValueError, match="an engine is told by engine=local or dask, workers=NUMBER"):
            S._main([str(shards), str(tiny_teacher), wrong])


@pytest.mark.parametrize("change", [dict(quick_gelu=True), dict(vision_cfg=TINY["vision_cfg"] | dict(head_width=16))])
def test_the_same_weights_in_another_network_are_another_teacher(teacher, change):
    one, two = (new_model(TINY | more, like=teacher, seed=1) for more in ({}, change))
    assert not torch.allclose(one.encode_image(torch.ones(1, 3, 32, 32)), two.encode_image(torch.ones(1, 3, 32, 32)), atol=1e-6)
    assert S.store_key(one) != S.store_key(two)


def test_a_store_is_not_filled_by_another_teacher(teacher, other, shards):
    with pytest.raises(ValueError, match="teacher"):
        fill(store_of(teacher, shards), other)


def test_of_two_teachers_at_an_empty_folder_the_second_is_refused(teacher, other, shards, tmp_path):
    mine, theirs = store_of(teacher, shards, tmp_path / "out"), store_of(other, shards, tmp_path / "out")
    fill(mine, teacher)
    with pytest.raises(ValueError, match="holds features of the teacher"):
        fill(theirs, other)


def test_a_shard_without_a_usable_sample_does_not_stop_the_others(teacher, shards):
    tar(shards / "bad.tar", [("1.jpg", b"no picture"), ("1.txt", b"x")])
    store = store_of(teacher, shards)
    fill(store, teacher)
    assert not store.missing() and len(S.load(store).keys) == 16


def test_a_huge_class_index_does_not_stop_the_others(teacher, shards):
    tar(shards / "c.tar", [(name, b"1099511627776" if name.endswith("cls") else value) for name, value in members([12])])
    assert fill(store_of(teacher, shards), teacher) == 6


@pytest.mark.parametrize("where", ["", "out"])
def test_an_index_of_an_index_has_the_shards_rows_too(teacher, shards, tmp_path, where):
    store = store_of(teacher, shards, where and tmp_path / where)
    fill(store, teacher)
    inner = write_index(tmp_path / "1" / "a.kept.json", inspect_shards(shards / "a.tar").shards[0], ["00001", "00003"])
    outer = write_index(tmp_path / "2" / "a.kept.json", inspect_shards(inner).shards[0], ["00003"])
    assert not store_of(teacher, outer, where and tmp_path / where).missing()


def test_an_index_under_another_name_has_the_shards_rows(teacher, shards, tmp_path):
    fill(store_of(teacher, shards, tmp_path / "out"), teacher)
    index = write_index(tmp_path / "chosen.kept.json", inspect_shards(shards / "a.tar").shards[0], ["00001"])
    assert not store_of(teacher, index, tmp_path / "out").missing()


def test_shards_whose_folders_have_the_same_name_are_all_kept(teacher, tmp_path):
    for k, folder in enumerate("xy"):
        (tmp_path / folder / "train").mkdir(parents=True)
        tar(tmp_path / folder / "train" / "0.tar", members([k]))
    store = store_of(teacher, [tmp_path / "x" / "train", tmp_path / "y" / "train"])
    fill(store, teacher)
    assert len(S.load(store).keys) == 2


def test_features_beside_shards_that_became_read_only_are_used(teacher, shards, monkeypatch):
    fill(store_of(teacher, shards), teacher)
    monkeypatch.setattr(S.os, "access", lambda path, mode: path != shards)
    assert not store_of(teacher, shards).missing()


def test_each_side_is_read_for_itself_and_pairs_are_known(teacher, tmp_path):
    alone = [("x.jpg", members([3])[0][1]), ("y.jpg", members([4])[0][1]), ("y.txt", b"\xff"), ("z.txt", b"alone")]
    tar(tmp_path / "a.tar", [*members(range(3)), *alone])
    store = store_of(teacher, tmp_path)
    fill(store, teacher)
    pairs = load_pairs(tmp_path)
    assert S.load(store).keys == (*pairs.keys, "a/x", "a/y") and S.load(store, "text").keys == (*pairs.keys, "a/z")
    assert S.load(store, captioned=True).keys == pairs.keys and len(S.load(store, captioned=True).rows) == 3


def test_text_files_and_folders_of_pictures_have_features(teacher, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("lib_name = vlkd_lab\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "said.txt").write_bytes(b"one red star\n\ncaf\xe9\n" + b"two blue houses\n" * 30)
    (tmp_path / "seen").mkdir()
    for name, content in members(range(4)):
        if name.endswith("jpg"):
            (tmp_path / "seen" / name).write_bytes(content)
    texts = store_of(teacher, find_sentences("said.txt"))
    images = store_of(teacher, find_images("seen"))
    fill(texts, teacher, "text"), fill(images, teacher, "image")
    with torch.no_grad():
        star = teacher.encode_text(teacher.tokenizer(["one red star"]))[0]
    assert np.abs(S.load(texts, "text").rows[0] - star.numpy()).max() < 2**-11
    assert S.load(texts, "text").keys[:2] == ("said-000000/000000001", "said-000000/000000004") and len(S.load(texts, "text").keys) == 31
    assert S.load(images).rows.shape == (4, 16) and not S.load(images).labels.tolist().count(0)
    (tmp_path / "said.txt").write_text("something else\n" * 32)
    changed = store_of(teacher, find_sentences("said.txt"))
    assert changed.missing(["text"]) and fill(changed, teacher, "text") == 2
    os.remove("seen/00002.jpg")
    (gone,) = inspect_shards([shard[0].path for shard in images.shards.values()]).damaged
    assert gone.problem.endswith("were changed since the part was made")


def test_numbered_crops_have_features_of_their_own(teacher, shards):
    store, sides = store_of(teacher, shards), S.crop_sides(0.4, 3)
    assert fill(store, teacher, *sides, "text") == 12 and store.missing(["image"])
    stream = PairStream(shards, View(teacher.preprocess, teacher.tokenizer), 8, crop_scale=0.4, crops=3)
    memory = S.StoredTeacher(store, teacher.scale, crop_scale=0.4)
    met = set()
    for batch in islice(stream.batches(), 9):
        with torch.no_grad():
            assert torch.allclose(memory.encode(batch).image, teacher.encode_image(batch.image), atol=2e-3)
        met |= set(zip(batch.keys, batch.crops, strict=True))
    assert len(met) == 48, "three epochs see every crop"
    with pytest.raises(ValueError, match="no side 'image-crop2-0'"):
        fill(store, teacher, "image-crop2-0")


def test_a_batch_that_is_no_pairs_takes_its_texts_from_another_store(teacher, other, shards, tmp_path):
    (tmp_path / "more").mkdir()
    tar(tmp_path / "more" / "d.tar", members(range(20, 29)))
    store, texts = store_of(teacher, shards), store_of(teacher, tmp_path / "more")
    fill(store, teacher, "image"), fill(texts, teacher, "text")
    image = next(PairStream(shards, View(teacher.preprocess, None), 8).batches())
    text = next(PairStream(tmp_path / "more", View(None, teacher.tokenizer), 5).batches())
    batch = replace(image, text=text.text, text_keys=text.keys)
    said = S.StoredTeacher(store, teacher.scale, texts=texts).encode(batch)
    with torch.no_grad():
        assert torch.allclose(said.image, teacher.encode_image(image.image), atol=2e-3) and len(said.text) == 5
        assert torch.allclose(said.text, teacher.encode_text(text.text), atol=2e-3)
    with pytest.raises(ValueError, match="no text features of a/|no text features of b|no text features of c"):
        S.StoredTeacher(store, teacher.scale, texts=texts).encode(replace(image, text=text.text))
    with pytest.raises(ValueError, match="not of"):
        fill(texts, other, "text")


@pytest.fixture
def captioned(tmp_path):
    "Two shards of six pictures with one to five captions"
    (tmp_path / "captioned").mkdir()
    for shard in range(2):
        content = []
        for n in range(6 * shard, 6 * shard + 6):
            texts = "\n".join(f"picture {n} seen as {k}" for k in range(n % 5 + 1))
            content += [(f"{n:05d}.jpg", members([n])[0][1]), (f"{n:05d}.txt", texts.encode())]
        tar(tmp_path / "captioned" / f"{shard}.tar", content)
    return tmp_path / "captioned"


@pytest.mark.parametrize("batch_size", [4, 256])
def test_every_caption_has_a_row_and_a_step_gets_the_one_that_was_drawn(teacher, captioned, batch_size):
    store = store_of(teacher, captioned)
    fill(store, teacher, batch_size=batch_size)
    pairs = load_pairs(captioned)
    expected = [(key, text) for key, texts in zip(pairs.keys, pairs.all_captions, strict=True) for text in texts]
    stored = S.load(store, "text")
    with torch.no_grad():
        rows = teacher.encode_text(teacher.tokenizer([text for _, text in expected]))
    assert stored.keys == tuple(key for key, _ in expected) and np.abs(stored.rows - rows.numpy()).max() < 2**-11
    assert S.load(store).keys == pairs.keys
    memory, met = S.StoredTeacher(store, teacher.scale), set()
    for batch in islice(PairStream(captioned, View(teacher.preprocess, teacher.tokenizer), 6, seed=2).batches(), 10):
        with torch.no_grad():
            assert torch.allclose(memory.encode(batch).text, teacher.encode_text(batch.text), atol=2**-10)
        met |= set(zip(batch.keys, batch.caption_numbers, strict=True))
    assert len(met) == len(expected), "five epochs see every caption"
    with pytest.raises(ValueError, match="no text features of 0/00002, caption 3"):
        memory._row(store, "0/00002", "text", 3)
    with torch.no_grad():
        first = next(pairs.batches(View(teacher.preprocess, teacher.tokenizer)))
        assert torch.allclose(memory.encode(first).text, teacher.encode_text(first.text), atol=2**-10)


def test_an_index_keeps_every_caption_of_its_samples(teacher, captioned, tmp_path):
    fill(store_of(teacher, captioned), teacher)
    shard = inspect_shards(captioned / "0.tar", progress=False).shards[0]
    part = store_of(teacher, write_index(tmp_path / "0.kept.json", shard, ["00003", "00001"]))
    assert S.load(part, "text").keys == ("0/00001",) * 2 + ("0/00003",) * 4 and len(S.load(part).keys) == 2


def test_sentences_of_shards_are_all_remembered(teacher, captioned, shards):
    images, texts = store_of(teacher, shards), store_of(teacher, captioned)
    fill(images, teacher, "image"), fill(texts, teacher, "text")
    image = next(PairStream(shards, View(teacher.preprocess, None), 8).batches())
    for text in islice(PairStream(captioned, View(None, teacher.tokenizer), 5, seed=1).batches(), 4):
        batch = replace(image, text=text.text, text_keys=text.keys, caption_numbers=text.caption_numbers)
        with torch.no_grad():
            said = S.StoredTeacher(images, teacher.scale, texts=texts).encode(batch).text
            assert torch.allclose(said, teacher.encode_text(text.text), atol=2e-3)
    assert not image.caption_numbers and any(text.caption_numbers)


def test_files_that_knew_one_caption_a_picture_are_computed_again(teacher, captioned, monkeypatch):
    monkeypatch.setattr(S, "_FORMAT", 2)
    store = store_of(teacher, captioned)
    fill(store, teacher)
    monkeypatch.undo()
    assert len(store.missing()) == 4 and store.problem("0", "text") == "unreadable, or of another version"
    assert fill(store_of(teacher, captioned), teacher) == 4


def test_names_are_those_of_all_rows_read_shard_by_shard(teacher, captioned, shards, tmp_path, monkeypatch):
    keep = write_index(tmp_path / "a.kept.json", inspect_shards(shards / "a.tar", progress=False).shards[0], ["00003", "00001"])
    for data, side in ((captioned, "text"), (captioned, "image"), ([keep, shards / "c.tar"], "image")):
        store = store_of(teacher, data)
        fill(store, teacher)
        for pairs in (False, True):
            whole, names = S.load(store, side, captioned=pairs), S.StoredKeys(store, side, pairs)
            assert tuple(names) == whole.keys and len(names) == len(whole.keys) and np.array_equal(names.labels(), whole.labels)
            assert [names[row] for row in range(len(names))][::-1] == [names[row] for row in range(len(names))[::-1]]
            assert [f"{shard}/{key}" for shard, keys in names.by_shard() for key in keys] == list(whole.keys)
    with pytest.raises(IndexError, match="row -1"):
        names[-1]
    store.path("c", "image").unlink()
    with pytest.raises(ValueError, match="the image features of c are missing"):
        S.StoredKeys(store).labels()
