"DIME-FM as a job: two streams, two stores, towers of any family, and that a killed one ends as if undisturbed"

import gzip
import json
import re
from itertools import islice

import numpy as np
import open_clip
import pytest
import torch
from conftest import TINY, in_two_processes, lines_of, train_watched

from vlkd_lab import trainers
from vlkd_lab.data import escaped, find_images, inspect_shards, visible
from vlkd_lab.evaluation import compare, finish
from vlkd_lab.export import check_onnx, export_onnx
from vlkd_lab.features import Batch
from vlkd_lab.losses import LOSSES, Term
from vlkd_lab.methods.dime_fm import (
    DimeFm,
    ImageLearner,
    UnpairedLearner,
    dime_objective,
    open_dime_fm,
)
from vlkd_lab.models import image_tower, load_model, model_config, new_model, save_model
from vlkd_lab.runs import Run, kept_snapshots, read_snapshot
from vlkd_lab.samples import write_sentences
from vlkd_lab.stores import FeatureStore, fill, store_key
from vlkd_lab.trainers import check_parameters, make_accelerator, train
from vlkd_lab.widgets import NearestSentences, ProbeMatrices, RunView, SentenceTable, curves_json


@pytest.fixture
def tiny(scenes, tiny_teacher, tmp_path):
    "Parameters of a job that takes seconds"
    write_sentences(tmp_path / "said.txt", 250)
    given = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", teacher=str(tiny_teacher), device="cpu")
    given |= dict(steps=6, batch_size=16, sentence_batch=24, warmup=2, validate_every=3, validate_pairs=40)
    return given | dict(sentences=str(tmp_path / "said.txt"), out=str(tmp_path / "run"), compare_scratch=False, probe_pairs=8)


def job_of(tiny, **changes):
    return open_dime_fm(check_parameters(DimeFm, tiny | changes))


def test_the_streams_are_independent_of_each_other(tiny, tmp_path):
    job = job_of(tiny)
    batches = list(islice(job.unpaired(0), 12))
    assert all(len(batch) == 16 and len(batch.text_keys) == 24 and not batch.captions for batch in batches)
    for start in (1, 7):
        resumed = islice(job_of(tiny).unpaired(start), 3)
        assert [(b.keys, b.text_keys) for b in resumed] == [(b.keys, b.text_keys) for b in batches[start : start + 3]]
    more = list(islice(job_of(tiny, sentence_batch=5, out=str(tmp_path / "more")).unpaired(0), 12))
    assert [b.keys for b in more] == [b.keys for b in batches], "the number of sentences does not touch the images"
    other = list(islice(job_of(tiny, batch_size=8, out=str(tmp_path / "other")).unpaired(0), 12))
    assert [b.text_keys for b in other] == [b.text_keys for b in batches]
    seeded = list(islice(job_of(tiny, seed=1, out=str(tmp_path / "seed")).unpaired(0), 2))
    assert seeded[0].keys != batches[0].keys and seeded[0].text_keys != batches[0].text_keys


def test_a_step_is_the_formula_and_moves_the_image_tower_alone(tiny):
    job = job_of(tiny)
    student, before = job.new_student(), job.teacher.model.state_dict()
    batch = next(job.unpaired(0))
    with torch.no_grad():
        V, U = job.source.encode(batch).image, job.source.encode(batch).text
        I = student.encode_image(batch.image)  # noqa: E741
    divergence = lambda p, q: (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()  # noqa: E731
    expected = 0.7 * (divergence(100 * V @ U.T, 100 * I @ U.T) + divergence(100 * U @ V.T, 100 * U @ I.T))
    expected += 0.3 * 2 * divergence(100 / 3 * V @ V.T, 100 / 3 * I @ V.T)
    train(job)
    assert lines_of(tiny["out"])[1]["total"] == pytest.approx(float(expected), rel=1e-4)
    after = load_model(f"{tiny['out']}/student/student", "cpu").model.state_dict()
    kept = {name for name in after if name in before and after[name].shape == before[name].shape and torch.equal(after[name], before[name])}
    assert kept >= {name for name in after if not name.startswith("visual.")}, "text tower and scale are the teacher's, bit for bit"
    fresh = job.new_student().model.state_dict()
    assert not any(torch.equal(after[name], fresh[name]) for name in after if name.startswith("visual.") and "in_proj_weight" in name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(text_tower="student"),
        dict(teacher_features="online", crop_scale=0.5),
        dict(augmentations=3, crop_scale=0.5),
        dict(micro_batch=5),
    ],
    ids=str,
)
def test_killed_in_the_middle_it_ends_as_if_undisturbed(changes, tiny, ends_as_if_undisturbed):
    ends_as_if_undisturbed(lambda out: job_of(tiny | changes, checkpoint_seconds=0.0, out=out))


@pytest.mark.parametrize("text_tower", ["teacher", "student"])
def test_gradient_caching_gives_the_same_step_for_sides_of_any_length(tiny, text_tower, tmp_path):
    job = job_of(tiny, text_tower=text_tower)
    accelerator, learner = make_accelerator(job.options), ImageLearner if text_tower == "teacher" else UnpairedLearner
    batch = next(job.unpaired(0))
    teacher, objective = job.source.encode(batch), dime_objective(job.options)
    loss = lambda student: objective(student, teacher).total  # noqa: E731
    found = []
    for micro in (0, 1, 5, 16, 30):
        student = job.new_student()
        trained = learner(student.model)
        given = dict(learner=trained, batch=batch, loss=loss, accelerator=accelerator)
        total = trainers.cached_backward(**given, micro_batch=micro) if micro else trainers.plain_backward(**given)
        grads = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
        assert {name.startswith("visual.") for name in grads} == ({True} if text_tower == "teacher" else {True, False})
        found.append((total, grads))
    for total, grads in found[1:]:
        torch.testing.assert_close(total, found[0][0])
        assert set(grads) == set(found[0][1])
        for name, whole in found[0][1].items():
            assert (grads[name] - whole).abs().max() <= 1e-4 * max(whole.abs().max(), 1e-3), name


def test_stored_features_teach_as_the_teacher_does_also_through_numbered_crops(tiny, tmp_path):
    cropped = tiny | dict(augmentations=2, crop_scale=0.5)
    totals = []
    for k, given in enumerate((tiny, tiny | dict(teacher_features="online"), cropped, cropped | dict(teacher_features="online"))):
        train(job_of(given, out=str(tmp_path / str(k))))
        totals.append([line["total"] for line in lines_of(tmp_path / str(k)) if "total" in line])
    assert totals[0] == pytest.approx(totals[1], rel=1e-2) and totals[2] == pytest.approx(totals[3], rel=1e-2)
    assert totals[0] != pytest.approx(totals[2], rel=1e-3)


def test_students_of_other_families_open_elsewhere(tiny, tmp_path):
    (tmp_path / "wide.json").write_text(json.dumps(TINY | dict(embed_dim=24, text_cfg=TINY["text_cfg"] | dict(width=16, heads=2))))
    for name, changes in {
        "timm": dict(student="timm:resnet10t", image_size=64),
        "wide": dict(student=str(tmp_path / "wide.json")),
        "both": dict(student=str(tmp_path / "wide.json"), text_tower="student", image_size=48),
    }.items():
        job = job_of(tiny, out=str(tmp_path / name), steps=3, compare_scratch=name == "both", **changes)
        train(job)
        folder = tmp_path / name / "student" / "student"
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        own = load_model(folder, "cpu")
        picture = job.val.pil(0)
        seen = preprocess(picture)[None]
        assert seen.shape == (1, 3, *[changes.get("image_size", 32)] * 2) and torch.equal(seen[0], own.preprocess(picture))
        with torch.no_grad():
            assert torch.allclose(model.eval().encode_image(seen, normalize=True), own.encode_image(seen))
            assert own.encode_text(own.tokenizer(["a star"])).shape == (1, 16), "of the teacher's joint width"
        table = compare(job)
        assert table.loc["student", "kept"] != table.loc["student", "kept"] if name == "timm" else table.loc["student", "kept"] > 0
        assert ("scratch" in table.index) == (name == "both")
        finish(job, table)


def test_a_mobilenet_is_a_student_from_the_first_step_to_onnx(tiny, tmp_path):
    given = dict(student="timm:mobilenetv4_conv_small_035", image_size=48, micro_batch=4)
    job = job_of(tiny, **given)
    train(job)
    folder = job.run.folder / "student" / "student"
    own, picture = load_model(folder, "cpu"), job.val.pil(0)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    seen = preprocess(picture)[None]
    with torch.no_grad():
        assert torch.allclose(model.eval().encode_image(seen, normalize=True), own.encode_image(own.preprocess(picture)[None]))
    fresh = job.new_student().model.state_dict()
    moved = [name for name, tensor in own.model.state_dict().items() if not torch.equal(tensor, fresh[name])]
    assert len(moved) > 100 and all(name.startswith("visual.") for name in moved)
    assert "visual.trunk.classifier.weight" in moved, "its own classifier is the map to the joint width"
    finish(job, compare(job))
    export_onnx(own, tmp_path / "onnx")
    assert max(check_onnx(own, tmp_path / "onnx").values()) < 1e-4
    again = job_of(tiny, out=str(tmp_path / "again"), start_from=str(folder), **given)
    started = again.new_student().model.state_dict()
    assert torch.equal(started["visual.trunk.conv_stem.weight"], own.model.state_dict()["visual.trunk.conv_stem.weight"])


def test_a_tower_of_another_joint_width_gives_all_but_its_last_map(tiny, tmp_path):
    teacher = load_model(tiny["teacher"], "cpu")
    for name in ("mobilenetv4_conv_small_035", "resnet10t"):
        wide = model_config(teacher.config["model_cfg"]) | dict(embed_dim=24, vision_cfg=image_tower(f"timm:{name}"))
        source = new_model(wide, like=teacher, seed=8)
        save_model(source, tmp_path / name)
        student = job_of(tiny, student=f"timm:{name}", start_from=str(tmp_path / name), out=str(tmp_path / f"{name}-run")).new_student()
        state, given = student.model.visual.state_dict(), source.model.visual.state_dict()
        others = [key for key in state if not torch.equal(state[key], given[key])] if state.keys() == given.keys() else []
        assert others and all(len(state[key]) == 16 for key in others)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(student="timm:test_vit3"), r"student='timm:test_vit3' takes no pictures of 32 pixels \(.*\); .*: choose image_size=160"),
        (dict(student="timm:inception_v3", image_size=40), r"takes no pictures of 40 pixels \(.*\); it takes .*: choose image_size=96"),
        (dict(student="timm:mobilenetv3_small_050", micro_batch=1), r"cannot be trained on 1 picture .*: choose a larger batch_size"),
        (dict(student="timm:mobilenetv3_small_050", batch_size=3, micro_batch=2), r"cannot be trained on 1 picture of 32 pixels"),
        (dict(student="wide.json", text_tower="student", start_from="TEACHER"), r"start_from=.* has another image tower than the student"),
    ],
    ids=str,
)  # fmt: skip
def test_a_student_that_cannot_work_is_refused_before_anything_is_computed(changes, message, tiny, tmp_path, monkeypatch):
    (tmp_path / "wide.json").write_text(json.dumps(TINY | dict(vision_cfg=TINY["vision_cfg"] | dict(width=40))))
    places = {"TEACHER": tiny["teacher"], "wide.json": f"{tmp_path}/wide.json"}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    for module, name in (("stores", "fill"), ("trainers", "open_run"), ("corpus", "select_sentences")):
        monkeypatch.setattr(f"vlkd_lab.{module}.{name}", lambda *a, **k: pytest.fail("something was begun"))
    with pytest.raises(ValueError, match=message) as error:
        job_of(tiny, features=str(tmp_path / "store"), **changes)
    assert "\n" not in str(error.value)
    assert not Run(tiny["out"]).folder.exists() and not (tmp_path / "store").exists()


def test_a_trained_student_is_not_tried_again(tiny, monkeypatch):
    train(job_of(tiny, student="timm:test_resnet", steps=2))
    monkeypatch.setattr("vlkd_lab.methods.dime_fm.check_student", lambda *a: pytest.fail("tried again"))
    job_of(tiny, student="timm:test_resnet", steps=2)


def test_a_student_starts_where_it_is_told(tiny, tmp_path):
    job = job_of(tiny, inheritance="manual")
    plain = job.new_student(inherited=False).model.state_dict()
    assert not torch.equal(job.new_student().model.state_dict()["visual.conv1.weight"], plain["visual.conv1.weight"])
    other = new_model(TINY | dict(embed_dim=24), like=job.teacher, seed=77)
    save_model(other, tmp_path / "other")
    (tmp_path / "same.json").write_text(json.dumps(TINY))
    given = dict(student=str(tmp_path / "same.json"), start_from=str(tmp_path / "other"))
    started = job_of(tiny, out=str(tmp_path / "start"), **given).new_student().model.state_dict()
    assert torch.equal(started["visual.conv1.weight"], other.model.state_dict()["visual.conv1.weight"])
    assert started["visual.proj"].shape == (32, 16), "its map to the joint width is new"
    unnamed = job_of(tiny, out=str(tmp_path / "unnamed"), student="", start_from=str(tmp_path / "other")).new_student().model.state_dict()
    assert torch.equal(unnamed["visual.conv1.weight"], started["visual.conv1.weight"]), "without a name the student has its tower"
    (tmp_path / "narrow.json").write_text(json.dumps(TINY | dict(vision_cfg=TINY["vision_cfg"] | dict(width=16))))
    with pytest.raises(ValueError, match=r"start_from=.* has another image tower than the student: \d+ of \d+ weights do not fit"):
        job_of(tiny, out=str(tmp_path / "no"), student=str(tmp_path / "narrow.json"), start_from=str(tmp_path / "other"))


def test_a_folder_of_pictures_and_prompts_are_enough(tiny, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("lib_name = vlkd_lab\n")
    monkeypatch.chdir(tmp_path)
    job = job_of(tiny)
    (tmp_path / "seen").mkdir()
    for k in range(30):
        job.val.pil(k).save(tmp_path / "seen" / f"{k}.png")
    (tmp_path / "classes.txt").write_text("red <b>star</b>\nblue house\n")
    (tmp_path / "one.txt").write_text("one sentence\n")
    own = job_of(tiny, data="seen", sentences="one.txt", class_names="classes.txt", sentence_batch=9, out="loose", steps=2)
    train(own)
    assert own.report.total == 30 and own.sentence_report.total == 9 and inspect_shards(find_images("seen")).total == 30
    assert "a photo of a red <b>star</b>." in (tmp_path / "loose/prompts.txt").read_text()
    with pytest.raises(ValueError, match="compare_scratch=True trains on pairs, and the images of data='seen' have no captions"):
        job_of(tiny, data="seen", compare_scratch=True, out="refused")
    with pytest.raises(ValueError, match="one.txt holds 1 sentence; give more"):
        job_of(tiny, data="seen", sentences="one.txt", out="refused")
    assert not (tmp_path / "refused").exists()


def test_the_most_grounded_sentences_are_chosen_once(tiny, tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("star\nhouse\n")
    prompted = job_of(tiny, grounded=60, class_names=str(tmp_path / "names.txt"), out=str(tmp_path / "prompted"))
    assert prompted.sentence_report.total == 68, "prompts are not selected from, they join"
    job = job_of(tiny, grounded=60)
    assert job.sentence_report.total == 60 == len((tmp_path / "run/sentences.txt").read_text().splitlines())
    assert list(job.selection.sentences) == (tmp_path / "run/sentences.txt").read_text().splitlines()
    monkeypatch.setattr("vlkd_lab.corpus.select_sentences", lambda *a, **k: pytest.fail("selected again"))
    assert job_of(tiny, grounded=60).sentence_report.fingerprint == job.sentence_report.fingerprint


@pytest.mark.parametrize("construction", ["grounded", "captions"])
def test_sentences_are_selected_from_files_of_any_form(construction, tiny, scenes, tmp_path):
    lines = (tmp_path / "said.txt").read_text().splitlines()
    with gzip.open(tmp_path / "said.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"words": text}) + "\n" for text in [*lines[:200], "два красных круга на песке"])
    (tmp_path / "broken.txt.gz").write_bytes(b"\x1f\x8b no more")
    named = f"{tmp_path}/said.jsonl.gz,{tmp_path}/broken.txt.gz,{scenes}/val-000000.tar"
    chosen = dict(sentences=named, grounded=60, construction=construction, sentence_column="words", sentence_script="Latin", similar=0.9)
    job = job_of(tiny, out=str(tmp_path / "one"), **chosen)
    train(job)
    assert job.sentence_report.total == 60 and job.selection.construction == construction
    assert [name for name, _ in job.selection.damaged] == ["broken.txt.gz"] and set(job.selection.files.tolist()) == {0, 2}
    assert job.selection.counts["another script"] == 1 and job.truncation is None
    two = job_of(tiny, out=str(tmp_path / "two"), sentence_workers=2, **chosen)
    assert two.selection.sentences == job.selection.sentences, "whoever selects"
    job_of(tiny, out=str(tmp_path / "one"), **chosen)
    (tmp_path / "broken.txt.gz").write_bytes(b"\x1f\x8b no more at all")
    with pytest.raises(ValueError, match="sentences"):
        job_of(tiny, out=str(tmp_path / "one"), **chosen)


def test_prompts_alone_are_a_corpus(tiny, tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"thing {k}\n" for k in range(9)))
    job = job_of(tiny, construction="prompts", class_names=str(tmp_path / "names.txt"), steps=2)
    train(job)
    assert job.sentence_report.total == 36 and not (job.run.folder / "sentences.txt").exists()


def test_captions_of_shards_are_sentences(tiny, scenes):
    job = job_of(tiny, sentences=f"{scenes}/val-000000.tar")
    assert job.sentence_report.total == 48 and next(job.unpaired(0)).text_keys[0].startswith("val-000000/")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(losses="contrastive:1"), "contrastive needs pairs; without pairs there are vision_language_score"),
        (dict(losses="vision_score:1"), "no loss 'vision_score'"),
        (dict(text_tower="none"), "one of 'teacher', 'student'"),
        (dict(sentence_batch=500), "holds 250 sentences; give more"),
        (dict(sentence_batch=1), "at least 2"),
        (dict(student="timm:resnet10t", text_tower="student"), "has no text tower"),
        (dict(student="timm:resnet10x"), "timm has no model 'resnet10x'; near: "),
        (dict(student="ViT-B-33"), "no configuration 'ViT-B-33'"),
        (dict(crop_scale=0.5), "augmentations=4"),
        (dict(augmentations=2), "with crop_scale=1"),
        (dict(score_temperature=0.0), "above 0"),
        (dict(grounded=10), "a step takes sentence_batch=24"),
        (dict(construction="captions"), "needs to know how many sentences to keep: choose grounded above 0"),
        (dict(construction="prompts"), "trains on prompts alone: name class_names, and choose grounded=0"),
        (dict(construction="best"), "one of 'grounded', 'captions', 'prompts'"),
        (dict(similar=0.8), "similar=0.8 is for selected sentences: choose grounded above 0"),
        (dict(sentence_script="Latvian", grounded=30), "one of '', 'Latin'"),
        (dict(similar=0.1, grounded=30), "similar=0.1 is not valid"),
        (dict(inheritance="manual", image_size=48), "positions are inherited one by one"),
        (dict(processes=5, batch_size=20), "sentence_batch=24 cannot be split over 5 processes"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_stops_with_a_line(changes, message, tiny):
    with pytest.raises(ValueError, match=message) as error:
        job_of(tiny, **changes)
    assert "\n" not in str(error.value) and not Run(tiny["out"]).folder.exists()


def test_an_own_term_that_needs_no_pairs_trains(tiny, monkeypatch):
    own = Term("spread", lambda student, teacher: student.image.pow(4).mean(), unpaired=True)
    monkeypatch.setitem(LOSSES, "spread", own)
    job = job_of(tiny, losses="vision_language_score:0.7, spread:2")
    assert dime_objective(job.options).weights == {"vision_language_score": 0.7, "spread": 2.0}
    train(job)
    assert all("spread" in line for line in job.run.metrics() if line.get("stage") == "student" and "total" in line)


def test_another_teachers_store_is_refused(tiny, tiny_teacher, tmp_path):
    teacher = load_model(tiny_teacher)
    save_model(new_model(teacher.config["model_cfg"], like=teacher, seed=9), tmp_path / "other")
    other = load_model(tmp_path / "other")
    fill(FeatureStore(inspect_shards(tiny["data"]), store_key(other), tmp_path / "store"), other, progress=False)
    with pytest.raises(ValueError, match=r"holds features of the teacher .*other"):
        job_of(tiny, features=str(tmp_path / "store"))
    assert not Run(tiny["out"]).folder.exists(), "nothing is written"


def test_a_term_that_needs_pairs_is_refused_in_mid_run(tiny):
    job, refused = job_of(tiny), []

    def asks(step, loop, batch):
        found = step(loop, batch)
        if loop.step == 2:
            for wish in (dict(contrastive=1.0), dict(unimodal_distance=0.5)):
                try:
                    trainers.change(loop, {"weights": wish})
                except ValueError as error:
                    refused.append(str(error))
        return found

    train_watched(job, asks)
    assert refused == ["contrastive needs pairs: images and texts of this run do not belong together"]
    assert "unimodal_distance" in [line for line in job.run.metrics() if "total" in line][-1]
    assert job.run.config()["terms"] == ["vision_language_score", "pseudo_vision_language_score", "unimodal_distance"]


def test_options_reach_the_terms(tiny, tmp_path):
    found = {}
    for k, changes in enumerate(
        ({}, dict(score_scale=20.0), dict(score_temperature=2.0), dict(pseudo_temperature=2.0), dict(distance_temperature=2.0))
    ):
        losses = "vision_language_score:1, pseudo_vision_language_score:1, unimodal_distance:1"
        job = job_of(tiny, out=str(tmp_path / str(k)), losses=losses, **changes)
        batch, student = next(job.unpaired(0)), job.new_student()
        with torch.no_grad():
            seen = student.encode(Batch(batch.image, student.tokenizer(["a star"])))
            found[str(changes)] = {n: v.item() for n, v in dime_objective(job.options)(seen, job.source.encode(batch)).values.items()}
    plain = found["{}"]
    differs = [{name.split("_")[0] for name in plain if own[name] != plain[name]} for own in list(found.values())[1:]]
    assert differs == [{"vision", "pseudo", "unimodal"}, {"vision"}, {"pseudo"}, {"unimodal"}]


def test_the_probe_is_of_sentences_and_its_scores_are_snapshots(tiny):
    job = job_of(tiny, compare_scratch=True)
    train(job)
    probe = json.loads((job.run.folder / "probe.json").read_text())
    assert len(probe["sentences"]) == len(set(probe["sentences"])) == 16 and len(probe["captions"]) == 8
    taught = read_snapshot(job.run.folder / "probe.safetensors")[0]["teacher"]
    said = (job.run.folder.parent / "said.txt").read_text().splitlines()
    assert taught.shape == (8, 16) and set(probe["sentences"]) <= set(said)
    with torch.no_grad():
        texts = job.teacher.encode_text(job.teacher.tokenizer(probe["sentences"]))
        image = job.teacher.encode_image(job.teacher.preprocess(job.val.pil(job.probe_rows[3]))[None])
    assert torch.allclose(torch.from_numpy(taught[3]), (image @ texts.T)[0], atol=1e-4)
    shapes = {labels["stage"]: read_snapshot(path)[0]["student"].shape for path, labels in kept_snapshots(job.run)}
    assert shapes == {"student": (8, 16), "scratch": (8, 16)}


def test_the_bench_shows_scores_of_sentences_and_what_is_nearest(tiny, tmp_path):
    hostile = "<img src=x onerror=alert(1)> \u202e a red star"
    (tmp_path / "said.txt").write_text("".join(f"{hostile} {k}\n" for k in range(40)))
    job = job_of(tiny, sentence_batch=20)
    train(job)
    bench = RunView(job.run.folder, live=True)
    canvases, probe = bench.widgets.part(ProbeMatrices).views, bench.watched.probe
    assert {name: view.matrix.shape for name, view in canvases.items()} == dict.fromkeys(("teacher", "student", "difference"), (8, 16))
    assert canvases["student"].column_texts == [visible(text) for text in probe["sentences"]] and len(canvases["student"].row_texts) == 8
    names = [spec["name"] for spec in bench.panel.sliders]
    assert [name for name in names if name.startswith("weights.")] == [f"weights.{name}" for name in job.run.config()["terms"]]
    canvases["difference"]._hear({"chosen": [5, 3]})
    shown = bench.widgets.part(SentenceTable).widget.value
    order = np.argsort(-bench.watched.teacher["teacher"][5], kind="stable")
    assert escaped(probe["sentences"][order[0]]) in shown and "student, step 0" in shown
    assert "<img src=x" not in shown and "\u202e" not in shown
    assert escaped(probe["captions"][5])[:40] in shown and shown.count("<b>") >= 4
    assert bench.static().png and "<img src=x" not in NearestSentences(job.run.folder, images=8).html
    layout = curves_json(bench.watched)["layout"]
    titles = [layout[f"yaxis{k}"]["title"]["text"] for k in (3, 4, 5)]
    assert titles == ["learning rate", "gradient norm", "memory, GiB"] and "yaxis6" not in layout, "no budget, no panel of one"
    bench.close()
    with pytest.raises(ValueError, match="has no probe of sentences"):
        NearestSentences(tmp_path / "nowhere")


@pytest.mark.parametrize("changes", [dict(text_tower="student", micro_batch=5), dict(grounded=80, class_names="names.txt")], ids=str)
def test_the_command_line_starts_and_continues_it_in_two_processes(changes, tiny, tmp_path):
    (tmp_path / "names.txt").write_text("red star\nblue house\n")
    changes = changes | ({"class_names": str(tmp_path / "names.txt")} if "class_names" in changes else {})
    in_two_processes("DimeFm", tiny | changes)


def test_broken_lines_are_counted_and_named(tiny, tmp_path):
    (tmp_path / "said.txt").write_bytes((tmp_path / "said.txt").read_bytes() + b"caf\xe9\n" * 5)
    job = job_of(tiny, sentence_batch=200, steps=3)
    train(job)
    named = [json.loads(line) for line in (job.run.folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in named} == {f"line {k} is not UTF-8 at byte 3" for k in range(251, 256)}
    assert all(re.fullmatch(r"said-\d{6}/\d{9}", entry["sample"]) for entry in named)


AS_PUBLISHED = dict(crop_scale=0.08, flip=True, teacher_sees="whole", weight_decay=0.05, beta2=0.999, eps=1e-8, learning_rate_floor=4e-5)


@pytest.mark.parametrize("features", ["stored", "online"])
def test_the_published_training_teaches_crops_what_the_teacher_says_of_whole_pictures(features, tiny, ends_as_if_undisturbed):
    given = tiny | AS_PUBLISHED | dict(teacher_features=features, sentence_batch=16)
    job = job_of(given)
    student = job.new_student()
    batches = list(islice(job.unpaired(0), 30))
    batch, plain = batches[0], next(job_of(tiny | dict(out=f"{tiny['out']}-plain", sentence_batch=16)).unpaired(0))
    assert batch.keys == plain.keys and not torch.equal(batch.image, plain.image)
    with torch.no_grad():
        V, U = (trainers.ask(job.source, batch).image, trainers.ask(job.source, batch).text)
        assert torch.allclose(V, job.teacher.encode_image(plain.image), atol=2e-3), "of the whole picture, as it is"
        I = student.encode_image(batch.image)  # noqa: E741
    divergence = lambda p, q: (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()  # noqa: E731
    expected = 0.7 * (divergence(100 * V @ U.T, 100 * I @ U.T) + divergence(100 * U @ V.T, 100 * U @ I.T))
    expected += 0.3 * 2 * divergence(100 / 3 * V @ V.T, 100 / 3 * I @ V.T)
    ends_as_if_undisturbed(lambda out: job_of(given | dict(checkpoint_seconds=0.0, out=out)))
    train(job)
    lines = [line for line in lines_of(tiny["out"]) if "total" in line]
    assert lines[0]["total"] == pytest.approx(float(expected), rel=1e-3)
    cosine = lambda step: (1 + np.cos(np.pi * step / 6)) / 2  # noqa: E731
    rates = [min(1, (step + 1) / 2) * (4e-5 + (8e-4 - 4e-5) * cosine(step)) for step in range(6)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-5)


def test_adamws_numbers_reach_the_update(tiny, tmp_path):
    "The first two updates of AdamW by hand, from the gradients that the loop had"
    given = dict(steps=2, warmup=0, clip_norm=1e9, learning_rate_floor=8e-4, weight_decay=0.05, beta1=0.8, beta2=0.999, eps=1e-4)
    job = job_of(tiny | given)
    weights, gradients = [job.new_student().model.state_dict()["visual.proj"]], []

    def watched(step, loop, batch):
        found = step(loop, batch)
        proj = loop.learner.model.visual.proj
        gradients.append(proj.grad.clone()), weights.append(proj.detach().clone())
        return found

    train_watched(job, watched)
    weight, mean, square = weights[0].clone(), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        mean, square = 0.8 * mean + 0.2 * gradient, 0.999 * square + 0.001 * gradient**2
        weight = weight * (1 - 8e-4 * 0.05) - 8e-4 * (mean / (1 - 0.8**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-4)
        assert torch.allclose(weights[step], weight, atol=1e-7), step
    assert not torch.allclose(weights[2], weights[0], atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(flip=True), "flip=True is not valid with teacher_features='stored'.*teacher_sees='whole'"),
        (dict(flip=True, crop_scale=0.5, augmentations=2), "numbered crops are not mirrored"),
        (dict(crop_scale=0.5, augmentations=2, teacher_sees="whole"), "the teacher's features are of no crop"),
        (dict(learning_rate_floor=1e-3), "learning_rate_floor=0.001 is not valid: it must be at most learning_rate=0.0008"),
        (dict(beta2=1.0), "from 0, below 1"),
        (dict(teacher_sees="nothing"), "one of 'same', 'whole'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_training_that_contradicts_itself_is_refused(changes, message, tiny):
    with pytest.raises(ValueError, match=message) as error:
        job_of(tiny, **changes)
    assert "\n" not in str(error.value) and not Run(tiny["out"]).folder.exists()


def test_runs_from_before_these_parameters_are_found_and_go_on(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("lib_name = vlkd_lab\n")
    job = job_of(tiny | dict(out=""))
    train(job)
    config = json.loads((job.run.folder / "config.json").read_text())
    for name in ("beta1", "beta2", "eps", "learning_rate_floor", "flip", "teacher_sees"):
        assert name in trainers.LATER and trainers.LATER[name] == getattr(DimeFm(), name) == config["parameters"].pop(name)
    (job.run.folder / "config.json").write_text(json.dumps(config))
    assert job_of(tiny | dict(out="", steps=8)).run.folder != job.run.folder
    again = job_of(tiny | dict(out=str(job.run.folder), steps=8))
    train(again)
    assert len([line for line in again.run.metrics() if "total" in line]) == 8
