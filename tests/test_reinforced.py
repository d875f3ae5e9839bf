"Rows in the shards: what teachers said of augmented pictures and of captions trains a student without them, and strangers' files do no harm."

import gzip
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_two_processes, lines_of, same_weights, tar
from PIL import Image
from torch.nn.functional import cross_entropy, normalize
from torchvision.transforms import autoaugment, functional

from vlkd_lab.data import (
    OPERATIONS,
    Augmentation,
    BadSample,
    PairStream,
    Reinforcement,
    View,
    augmented,
    copy_samples,
    inspect_reinforcement,
    inspect_shards,
    raw_samples,
    reinforcement_of,
    write_index,
)
from vlkd_lab.evaluation import compare, finish
from vlkd_lab.export import export_student, reinforce
from vlkd_lab.losses import affinity_mimicking, contrastive, gradient_share
from vlkd_lab.methods.reinforced import MobileClip
from vlkd_lab.models import load_model, new_model, save_model
from vlkd_lab.runs import Run
from vlkd_lab.sources import FIELDS, REINFORCED_FIELDS
from vlkd_lab.trainers import open_job, train
from vlkd_lab.widgets import attach

STEPS = [[[0, 0.0], [6, 0.27]], [[3, -20.3], [13, 0.0]], None, [[1, 0.09], [11, 178.5]]]  # of RandAugment


@pytest.fixture(scope="session")
def two_widths(tmp_path_factory, tiny_teacher):
    "Two teachers of width 16 and 24, with the tokenizer of the first"
    like = load_model(tiny_teacher)
    wide = new_model(like.config["model_cfg"] | dict(embed_dim=24), like=like, seed=8)
    wide.model.logit_scale.data.fill_(3.0)
    return str(tiny_teacher), str(save_model(wide, tmp_path_factory.mktemp("wide") / "wide"))


def augmentations_of(number, width, height):
    "Four of a picture, in the public sets' form"
    rng = np.random.default_rng(number)
    entries = []
    for steps in STEPS:
        tall, wide = (int(rng.integers(side // 2, side + 1)) for side in (height, width))
        top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
        entries.append([[top, left, tall, wide], steps])
    return entries


@torch.no_grad()
def rows_of(teachers, image, entries, texts):
    "What teachers say of a picture's augmentations and of its captions, joined"
    pictures, captions = [], []
    for teacher in teachers:
        size = teacher.image_shape[::-1]
        seen = []
        for box, steps in entries:
            one = augmented(image, Augmentation(tuple(box), tuple(map(tuple, steps or ()))), size)
            seen.append(teacher.preprocess(one))
        pictures.append(teacher.encode_image(torch.stack(seen)).float())
        captions.append(teacher.encode_text(teacher.tokenizer(list(texts))).float())
    return torch.cat(pictures, 1), torch.cat(captions, 1)


def npz(**arrays):
    np.savez_compressed(out := io.BytesIO(), **arrays)
    return out.getvalue()


def packed(content):
    torch.save(content, out := io.BytesIO())
    return gzip.compress(out.getvalue())


def reinforced(scenes, folder, names, in_bfloat16=False, spoil=lambda number, fields: fields):
    "The scenes' shards in the layout of the public sets, with rows of the named teachers"
    teachers = [load_model(name) for name in names]
    folder.mkdir()
    number = 0
    for path in sorted(Path(scenes).glob("train-*.tar")):
        members = []
        for sample in raw_samples(path):
            image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            text = sample["txt"].decode().splitlines()[0]
            written = [f"{text}, it seems", f"something like {text}"]
            entries = augmentations_of(number, *image.size)
            rows, words = rows_of(teachers, image, entries, [text, *written])
            fields = {
                "jpg": sample["jpg"],
                "txt": text.encode(),
                "url.txt": b"https://example.org/picture.jpg",
                "json": json.dumps({"uid": f"{number:032x}"}).encode(),
                "syn.json": json.dumps({"syn_text": written}).encode(),
                "paug.json": json.dumps({"param_aug": json.dumps(entries)}).encode(),
            }
            if in_bfloat16:
                fields["pth.gz"] = packed({"image_emb": rows.bfloat16(), "text_emb": words.bfloat16()})
            else:
                fields["npz"] = npz(image_emb=rows.numpy(), text_emb=words.numpy())
            fields = spoil(number, fields)
            members += [(f"{number:09d}.{name}", content) for name, content in fields.items()]
            number += 1
        tar(folder / path.name, members)
    return folder


@pytest.fixture(scope="session")
def public(scenes, two_widths, tmp_path_factory):
    "Shards with rows of two teachers, 40 wide"
    return reinforced(scenes, tmp_path_factory.mktemp("public") / "npz", two_widths)


@pytest.fixture
def parameters(scenes, public, two_widths, tmp_path):
    "Of a job that takes a second"

    def of(out="run", **changes):
        common = dict(data=str(public), val=f"{scenes}/val-000000.tar", device="cpu", out=str(tmp_path / out))
        common |= dict(steps=3, batch_size=8, warmup=1, validate_every=3, validate_pairs=16, probe_pairs=4)
        common |= dict(teacher_features="shards", compare_scratch=False, losses="affinity_mimicking=1")
        return common | dict(teacher="", student=two_widths[0], teacher_widths="16,24") | changes

    return of


def run_of(given, method="Distil"):
    train(open_job(method, given))
    return Run(given["out"])


def totals(folder, name="total"):
    return [line[name] for line in lines_of(folder) if name in line and "step" in line]


EVERY = FIELDS | set(REINFORCED_FIELDS)


def teacher_losses(student, teachers, batch, widths, scales):
    "The distillation of MobileCLIP, written out: each teacher's affinities at its scale, distributions averaged, both ways"
    s = student.encode(batch)
    of_images = s.scale * s.image @ s.text.T
    start, distributions = 0, [[], []]
    for width, scale in zip(widths, scales, strict=True):
        image = normalize(batch.image_rows[:, start : start + width].float(), dim=1)
        text = normalize(batch.text_rows[:, start : start + width].float(), dim=1)
        start += width
        distributions[0].append((scale * image @ text.T).softmax(1))
        distributions[1].append((scale * text @ image.T).softmax(1))
    targets = [sum(one) / len(one) for one in distributions]
    return (cross_entropy(of_images, targets[0]) + cross_entropy(of_images.T, targets[1])) / 2


# Augmentations


def test_augmentations_are_torchvisions_at_every_magnitude(scenes):
    image = Image.open(io.BytesIO(next(raw_samples(next(iter(sorted(Path(scenes).glob("train-*.tar"))))))["jpg"])).convert("RGB")
    image = image.resize((300, 260), Image.Resampling.BICUBIC)
    space = autoaugment.RandAugment()._augmentation_space(31, (224, 224))
    rng = np.random.default_rng(0)
    for number, (name, (magnitudes, signed)) in enumerate(space.items()):
        for value in magnitudes.reshape(-1)[:: 6 if magnitudes.ndim else 1].tolist():
            box = [int(rng.integers(0, 90)), int(rng.integers(0, 90)), int(rng.integers(40, 170)), int(rng.integers(40, 210))]
            other = int(rng.integers(14))
            second = list(space.values())[other][0].reshape(-1)[-1].item()  # at its strongest
            steps = [(number, -value if signed and rng.random() < 0.5 else value), (other, second)]
            seen = augmented(image, Augmentation(tuple(box), tuple(steps)), (224, 224))
            expected = functional.resized_crop(image, *box, [224, 224], functional.InterpolationMode.BICUBIC, antialias=True)
            for step, magnitude in steps:
                expected = autoaugment._apply_op(expected, OPERATIONS[step], magnitude, functional.InterpolationMode.NEAREST, None)
            assert (np.asarray(seen) == np.asarray(expected)).all(), (name, value)
    assert list(space) == list(OPERATIONS)


# A job


def test_a_student_learns_from_rows_alone_with_any_number_of_readers(parameters):
    for workers in (0, 2):
        given = parameters(f"readers-{workers}", workers=workers, steps=6, compare_scratch=True)
        run = run_of(given)
        assert run.status()["state"] == "waiting" and not (run.folder / "bad_samples.jsonl").exists()
        assert run.config()["reinforced"] == dict(augmentations=4, synthetic=2, teacher_widths=[16, 24], teacher_scales=[100, 100])
    one, two = (parameters(f"readers-{workers}")["out"] for workers in (0, 2))
    assert lines_of(one) == lines_of(two) and same_weights(one, two)
    assert {line["stage"] for line in lines_of(one) if "total" in line} == {"student", "scratch"}


def test_the_loss_is_that_of_mobileclip(parameters, two_widths):
    job = open_job("Distil", parameters(teacher_scales="70,60"))
    student = job.new_student()
    batch = next(job.batches(0))
    with torch.no_grad():
        expected = teacher_losses(student, two_widths, batch, (16, 24), (70, 60))
        answer = job.source.encode(batch)
        ours = sum(affinity_mimicking(student.encode(batch), one) for one in answer.members) / 2
    assert ours == pytest.approx(float(expected), rel=1e-5)
    train(job)
    assert totals(job.run.folder)[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_rows_of_a_batch_are_what_teachers_say_of_its_pictures_and_captions(parameters, two_widths):
    job = open_job("Distil", parameters(batch_size=24))
    captions, numbers, crops = set(), set(), set()
    for batch in islice(job.batches(0), 5):
        start = 0
        for name in two_widths:
            teacher = load_model(name)
            width = teacher.config["model_cfg"]["embed_dim"]
            with torch.no_grad():
                image = teacher.encode_image(batch.image)
                text = teacher.encode_text(teacher.tokenizer(list(batch.captions)))
            assert (batch.image_rows[:, start : start + width] - image).abs().max() < 1e-5, "of exactly these pixels"
            assert (batch.text_rows[:, start : start + width] - text).abs().max() < 1e-5, "of exactly this caption"
            start += width
        captions.update(batch.captions)
        numbers.update(batch.caption_numbers)
        crops.update(batch.crops)
    assert numbers == {0, 1, 2} and crops == {0, 1, 2, 3}
    assert 0.3 < sum("something like" in text or "it seems" in text for text in captions) / len(captions) < 0.7


@pytest.mark.parametrize("share, kinds", [(0.0, {0}), (1.0, {1, 2})])
def test_the_share_of_synthetic_captions(share, kinds, parameters):
    job = open_job("Distil", parameters(f"share-{share}", synthetic_share=share))
    assert {number for batch in islice(job.batches(0), 30) for number in batch.caption_numbers} == kinds


def test_augmentations_come_in_turn_and_draws_depend_on_nothing_but_the_seed(public, two_widths):
    teacher = load_model(two_widths[0])
    view = View(teacher.preprocess, teacher.tokenizer)
    common = dict(row_width=40, synthetic_share=0.5, shuffle=16)
    seen = {}
    for batch in islice(PairStream(public, view, 40, seed=3, **common).batches(), 12):  # four epochs of 120
        for key, crop in zip(batch.keys, batch.crops, strict=True):
            seen.setdefault(key, []).append(crop)
    assert len(seen) == 120 and all(sorted(crops) == [0, 1, 2, 3] for crops in seen.values())

    def rows(seed=3, start=0, steps=6, world=1, cache=256, workers=0):
        found = []
        for rank in range(world):
            stream = PairStream(public, view, 24 // world, seed=seed, rank=rank, world_size=world, cache_mb=cache, workers=workers, **common)
            for step, batch in enumerate(islice(stream.batches(start), steps), start):
                found += [(step, *one) for one in zip(batch.keys, batch.crops, batch.caption_numbers, strict=True)]
        return sorted(found)

    whole = rows()
    assert whole == rows(world=2) == rows(cache=0) == rows(workers=2)
    assert whole == sorted(rows(steps=2) + rows(start=2, steps=4))
    assert whole != rows(seed=4)


def test_bfloat16_in_a_packed_file_of_torch_trains(parameters, scenes, two_widths, tmp_path):
    folder = reinforced(scenes, tmp_path / "bf16", two_widths, in_bfloat16=True)
    half = totals(run_of(parameters("half", data=str(folder))).folder)
    whole = totals(run_of(parameters("whole")).folder)
    assert half != whole and half == pytest.approx(whole, rel=0.02)


def test_a_job_that_dies_goes_on_in_mid_epoch(parameters, ends_as_if_undisturbed):
    ends_as_if_undisturbed(lambda out: open_job("Distil", parameters(out=out, steps=6, batch_size=32, checkpoint_seconds=0.0)))


def test_two_processes_give_what_one_gives(parameters):
    whole = dict(steps=6, batch_size=40, shuffle=1)
    two = in_two_processes("Distil", parameters("two", **whole))
    one = run_of(parameters("one", **whole)).folder
    assert totals(two) == pytest.approx(totals(one), rel=2e-3)


def test_more_steps_other_readers_and_another_place_of_the_data(parameters, public, tmp_path):
    given = parameters("more")
    run = run_of(given)
    moved = shutil.copytree(public, tmp_path / "moved")
    run_of(given | dict(data=str(moved), steps=5, workers=1))
    assert [line["step"] for line in run.metrics() if "total" in line] == [1, 2, 3, 4, 5]
    for name, value in dict(synthetic_share=0.1, teacher_scales="50", teacher="data_samples/teacher").items():
        with pytest.raises(ValueError, match=name):
            open_job("Distil", given | {name: value})


@pytest.mark.parametrize("settings", [dict(micro_batch=3), dict(precision="bf16"), dict(losses="contrastive=0.5, relational=1, feature_mimicking=20")])
def test_gradient_caching_half_precision_and_other_losses(settings, parameters):
    run = run_of(parameters(**settings))
    assert len(totals(run.folder)) == 3
    if "micro_batch" in settings:
        assert totals(run.folder) == pytest.approx(totals(run_of(parameters("whole")).folder), rel=1e-4)


def test_a_student_of_another_size_and_start(parameters, two_widths, tmp_path):
    run = run_of(parameters("wide", student="", start_from=two_widths[1], compare_scratch=True))
    assert load_model(run.folder / "student/student").config["model_cfg"]["embed_dim"] == 24
    from_start, fresh = (load_model(run.folder / stage / "init").model.state_dict() for stage in ("student", "scratch"))
    start = load_model(two_widths[1]).model.state_dict()
    name = "visual.conv1.weight"
    assert torch.equal(from_start[name], start[name]) and not torch.equal(fresh[name], start[name])


# Teachers that are named, and what is shown


def test_a_named_teacher_is_inherited_from_and_shown_and_never_asked(parameters, two_widths, monkeypatch):
    teachers = f"{two_widths[0]}=3, {two_widths[1]}"
    named = dict(teacher=teachers, student="", inheritance="manual", teacher_widths="", losses="affinity_mimicking=1")
    job = open_job("Distil", parameters("named", **named))
    assert job.rows["teacher_widths"] == [16, 24] and job.source.weights == (0.75, 0.25)
    assert job.rows["teacher_scales"] == [pytest.approx(one.scale.item()) for one in job.teachers]
    asked = []
    for teacher in job.teachers:
        teacher.model.register_forward_pre_hook(lambda *_: asked.append(1))
    train(job)
    assert (job.run.folder / "probe.safetensors").exists() and not asked
    assert list(compare(job).index) == ["teacher", "teacher-2", "student"]
    assert job.run.config()["teacher_sha256"].count("=") == 2


def test_what_is_said_of_a_job_whose_teachers_are_not_there(parameters):
    job = open_job("Distil", parameters("shown", compare_scratch=True))
    assert "4 augmentations and 2 synthetic captions a picture, rows of teachers of width 16 + 24" in job.about_data
    assert "samples with teachers' rows 120" in job.about_data
    train(job)
    assert not (job.run.folder / "probe.safetensors").exists(), "there are no affinities of a teacher to draw"
    attach(job.run.folder)
    table = compare(job)
    assert list(table.index) == ["student", "scratch"] and "same_caption" not in table
    finish(job, table)
    card = (export_student(job.run.folder, job.run.folder.parent / "away", onnx=False) / "README.md").read_text()
    assert "what teachers said" in card and "width 16 + 24, logit scale 100, 100" in card and "| its teacher |" not in card


def test_tinyclip_inherits_from_a_teacher_and_learns_from_rows(parameters, scenes, two_widths, tmp_path):
    one = reinforced(scenes, tmp_path / "one", two_widths[:1])
    given = parameters("tiny", data=str(one), teacher=two_widths[0], student="", teacher_widths="", inheritance="auto")
    given |= dict(stages=1, steps=4, losses="affinity_mimicking=1, feature_mimicking=30")
    run = run_of(given, "TinyCLIP")
    assert {line["phase"] for line in run.metrics() if "total" in line} == {"gates", "distil"}
    of_both = given | dict(data=parameters()["data"], out=str(tmp_path / "two"))
    with pytest.raises(ValueError, match="learns from it, whose width is 16; leave it empty"):
        open_job("TinyCLIP", of_both | dict(teacher_widths="16,24"))
    set_of_two = of_both | dict(teacher=", ".join(two_widths))
    assert len(totals(run_of(set_of_two, "TinyCLIP").folder)) == 4


@pytest.mark.parametrize("method", ["ClipCid", "DimeFm", "Dlip"])
def test_other_methods_refuse_by_name(method, parameters, tmp_path):
    given = {name: value for name, value in parameters().items() if name in ("data", "val", "out", "teacher_features")}
    with pytest.raises(ValueError, match="teacher_features='shards' is not valid"):
        open_job(method, given)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(teacher_widths="24,16"), "parts as wide as 24, 16 have"),
        (dict(teacher_widths=""), "parts as wide as 40 have 1.41"),
        (dict(teacher_widths="16"), "the shards' rows are 40 wide"),
        (dict(teacher_widths="768,x"), "numbers above 0"),
        (dict(teacher_scales="1,2,3"), "one for all, or one for each of 2"),
        (dict(teacher_scales="-1"), "numbers above 0"),
        (dict(synthetic_share=1.5), "between 0 and 1"),
        (dict(crop_scale=0.5), "how each picture is cut"),
        (dict(inheritance="manual"), "choose inheritance='none'"),
        (dict(student=""), "teacher='' needs a student"),
        (dict(data="scenes:32"), "no teachers' rows"),
        (dict(teacher_features="online", teacher="data_samples/teacher"), "it is about rows in the shards"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(changes, message, parameters):
    given = parameters(**changes)
    with pytest.raises(ValueError, match=message):
        open_job("Distil", given)
    assert not Path(given["out"]).exists()


def test_shards_without_pictures_say_how_pictures_are_joined(parameters, public, tmp_path):
    path = sorted(public.glob("*.tar"))[0]
    members = []
    for sample in raw_samples(path, EVERY):
        key = sample["__key__"]
        members += [(f"{key}.{name}", sample[name]) for name in ("json", "syn.json", "paug.json", "npz")]
        members.append((f"{key}.url.txt", b"https://example.org/a.jpg"))
    (tmp_path / "bare").mkdir()
    tar(tmp_path / "bare/00000.tar", members)
    with pytest.raises(ValueError, match="addresses .* and no pictures: download .* img2dataset with resize_mode=no"):
        open_job("Distil", parameters(data=str(tmp_path / "bare")))


# MobileCLIP: two captions a picture in every step


def mobile_losses(student, names, batch, share, widths=(16, 24), scales=(100, 100)):
    "MobileCLIP's two batches, written out: (1 - λ) contrastive + λ distillation, on real and on synthetic captions"
    total = 0.0
    for first in (0, 1):
        part = batch.replace(text=batch.text[first::2], text_rows=batch.text_rows[first::2])
        s = student.encode(part)
        logits, right = s.scale * s.image @ s.text.T, torch.arange(len(part))
        clip = (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2
        total += (1 - share) * clip + share * teacher_losses(student, names, part, widths, scales)
    return float(total)


@pytest.mark.parametrize("share", [0.75, 1.0])
def test_mobileclip_sums_over_real_and_synthetic_captions(share, parameters, two_widths):
    losses = f"contrastive={1 - share}, affinity_mimicking={share}" if share < 1 else "affinity_mimicking=1"
    given = parameters(losses=losses) if share < 1 else parameters(losses=losses, micro_batch=3)
    job = open_job("MobileCLIP", given)
    batch = next(job.batches(0))
    assert (len(batch), len(batch.text), len(batch.captions)) == (8, 16, 16)
    assert set(batch.caption_numbers[0::2]) == {0} and set(batch.caption_numbers[1::2]) <= {1, 2}
    with torch.no_grad():
        expected = mobile_losses(job.new_student(), two_widths, batch, share)
    train(job)
    assert totals(job.run.folder)[0] == pytest.approx(expected, rel=1e-4)


def test_the_default_is_mobileclips_and_a_picture_goes_through_the_student_once(parameters, monkeypatch):
    given = parameters()
    del given["losses"]
    job = open_job("MobileCLIP", given)
    assert job.options.weights() == dict(contrastive=0.25, affinity_mimicking=0.75)
    assert isinstance(job.options, MobileClip) and job.options.both_captions
    assert (job.options.teacher_features, job.options.teacher) == ("shards", "")
    seen = []
    from vlkd_lab.trainers import learner

    encode = learner.encode_sides
    monkeypatch.setattr(learner, "encode_sides", lambda model, image, text: (seen.append((len(image), len(text))), encode(model, image, text))[1])
    train(job)
    assert seen.count((8, 16)) == 3, "8 pictures and 16 texts in each of three steps"


def test_two_captions_in_two_processes_with_readers_and_killed_in_between(parameters, ends_as_if_undisturbed):
    whole = dict(steps=6, batch_size=40, shuffle=1, losses="contrastive=0.25, affinity_mimicking=0.5, relational=0.5")
    two = in_two_processes("MobileCLIP", parameters("two", **whole))
    one = run_of(parameters("one", **whole), "MobileCLIP").folder
    read = run_of(parameters("read", workers=2, **whole), "MobileCLIP").folder
    assert totals(two) == pytest.approx(totals(one), rel=2e-3) and lines_of(read) == lines_of(one)
    ends_as_if_undisturbed(lambda out: open_job("MobileCLIP", parameters(out=out, steps=6, batch_size=32, checkpoint_seconds=0.0)))


def test_two_captions_with_projections_half_precision_and_a_baseline(parameters, two_widths):
    more = dict(losses="contrastive=0.5, relational=1, feature_mimicking=20, interactive_contrastive=1")
    run = run_of(parameters("more", compare_scratch=True, precision="bf16", **more), "MobileCLIP")
    lines = [line for line in run.metrics() if "total" in line]
    assert [line["stage"] for line in lines] == ["student"] * 3 + ["scratch"] * 3
    for line in lines[3:]:
        assert line["total"] == pytest.approx(line["contrastive"]) and line["contrastive"] > 3, "of two batches of 8"


def test_weights_change_in_mid_run_and_both_captions_still_count(parameters):
    job = open_job("MobileCLIP", parameters(steps=4))
    student = job.new_student()
    objective = job.objective(student)
    batch = next(job.batches(0))
    with torch.no_grad():
        answer, features = job.source.encode(batch), student.encode(batch)
        changed = objective.with_weights(contrastive=1.0, affinity_mimicking=0.0)(features, answer)
        halves = [replace(features, text=features.text[first::2]) for first in (0, 1)]
        assert float(changed.total) == pytest.approx(float(sum(contrastive(half) for half in halves)), rel=1e-6)
    shares = gradient_share(objective.with_weights(contrastive=0.5), features, answer)
    assert set(shares) == {"contrastive", "affinity_mimicking"} and sum(shares.values()) == pytest.approx(1)


def test_one_caption_is_what_distil_shows(parameters):
    same = dict(both_captions=False, synthetic_share=0.25)
    one = run_of(parameters("one", **same), "MobileCLIP")
    del same["both_captions"]
    assert totals(one.folder) == totals(run_of(parameters("distil", **same)).folder)


def test_two_captions_are_refused_where_there_are_none(parameters, scenes, two_widths, tmp_path):
    def bare(number, fields):
        with np.load(io.BytesIO(fields["npz"])) as stored:
            arrays = dict(image_emb=stored["image_emb"], text_emb=stored["text_emb"][:1])
        return {name: content for name, content in fields.items() if name != "syn.json"} | {"npz": npz(**arrays)}

    without = reinforced(scenes, tmp_path / "bare", two_widths, spoil=bare)
    online = dict(teacher=two_widths[0], student="", teacher_features="online", teacher_widths="")
    cases = [(dict(data=str(without)), "no synthetic captions"), (dict(synthetic_share=0.1), "shows both"), (online, "told apart")]
    for changes, message in cases:
        given = parameters("refused", **changes)
        with pytest.raises(ValueError, match=message):
            open_job("MobileCLIP", given)
        assert not Path(given["out"]).exists()


def test_a_picture_without_a_synthetic_caption_shows_the_given_one_twice(parameters, scenes, two_widths, tmp_path):
    def sometimes(number, fields):
        if number % 3 or number == 0:
            return fields
        with np.load(io.BytesIO(fields["npz"])) as stored:
            arrays = dict(image_emb=stored["image_emb"], text_emb=stored["text_emb"][:1])
        return fields | {"syn.json": b'{"syn_text": []}', "npz": npz(**arrays)}

    data = reinforced(scenes, tmp_path / "some", two_widths, spoil=sometimes)
    job = open_job("MobileCLIP", parameters(data=str(data), batch_size=24))
    numbers = {}
    for batch in islice(job.batches(0), 5):
        for key, pair in zip(batch.keys, zip(batch.caption_numbers[0::2], batch.caption_numbers[1::2], strict=True), strict=True):
            numbers[int(key[-9:])] = pair
    assert all((pair == (0, 0)) == (number % 3 == 0 and number > 0) for number, pair in numbers.items()) and len(numbers) == 120


# Strangers' files


class Program:
    "What unpickling this would do"

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


def with_rows(**changes):
    "A sample's fields, with some of the arrays in its npz changed"

    def changed(fields):
        with np.load(io.BytesIO(fields["npz"])) as stored:
            arrays = {name: stored[name] for name in stored.files}
        arrays |= {name: change(arrays[name]) for name, change in changes.items()}
        return fields | {"npz": npz(**{name: array for name, array in arrays.items() if array is not None})}

    return changed


def in_torch(content):
    "A sample whose rows are in a pth.gz of this content"

    def changed(fields):
        rest = {name: value for name, value in fields.items() if name != "npz"}
        return rest | {"pth.gz": content}

    return changed


def zipped(name, content, **settings):
    "An npz made by hand"
    with zipfile.ZipFile(out := io.BytesIO(), "w", **settings) as archive:
        archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def claimed(shape, content=b"", kind="<f4"):
    "An array in NumPy's format that says it has a shape"
    np.lib.format.write_array_header_1_0(out := io.BytesIO(), dict(descr=kind, fortran_order=False, shape=shape))
    return out.getvalue() + content


def repacked(change=lambda name, content: content, shape=(4, 40), **zipped):
    "A file of torch.save whose parts were changed, or packed in another way"
    torch.save({"image_emb": torch.ones(shape), "text_emb": torch.ones(3, shape[1])}, plain := io.BytesIO())
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(out := io.BytesIO(), "w", **zipped) as target:
        for one in source.infolist():
            target.writestr(one.filename, change(one.filename, source.read(one)))
    return gzip.compress(out.getvalue())


def packed_twice(shape):
    "A file of torch.save whose zip packs what is in it"
    return repacked(shape=shape, compression=zipfile.ZIP_DEFLATED)


def longer_than_its_storage():
    "A file of torch.save whose pickle says that a tensor has more numbers than lie in the file for it"
    return repacked(lambda name, content: content[:64] if name.endswith("data/0") else content)


def big_endian():
    "A file of torch.save that says that its bytes are the other way round"
    return repacked(lambda name, content: b"big" if name.endswith("byteorder") else content)


def paug(value):
    return lambda fields: fields | {"paug.json": value if isinstance(value, bytes) else json.dumps({"param_aug": value}).encode()}


FAULTS = {  # reason -> what is done to a sample
    "image_emb holds object": with_rows(image_emb=lambda rows: np.array([[Program()]], dtype=object)),
    "pth.gz is refused: it holds exec": in_torch(packed({"image_emb": Program()})),
    "pth.gz is refused: it holds numpy": in_torch(packed({"image_emb": np.zeros((4, 40)), "text_emb": np.zeros((3, 40))})),
    "npz unpacks to more than": with_rows(image_emb=lambda rows: np.zeros((500_000, 40), np.float32)),
    "pth.gz unpacks to more than": in_torch(gzip.compress(bytes(100_000_000))),
    "it is packed twice": in_torch(packed_twice((4, 40))),
    "no plain matrix|record size": in_torch(longer_than_its_storage()),
    "pth.gz cannot be unpacked": in_torch(b"no gzip"),
    "no file of torch.save": in_torch(gzip.compress(b"no zip")),
    "image_emb claims to be": lambda fields: fields | {"npz": zipped("image_emb", claimed((1 << 40, 40)))},
    "packed in a way that NumPy does not pack": lambda fields: fields | {"npz": zipped("image_emb", claimed((4, 40)), compression=zipfile.ZIP_LZMA)},
    "npz cannot be read": lambda fields: fields | {"npz": b"no zip"},
    "not floating-point numbers": with_rows(image_emb=lambda rows: rows.astype(np.int32)),
    "text_emb claims to be": with_rows(text_emb=lambda rows: rows[0]),
    "text_emb has rows of width 24": with_rows(text_emb=lambda rows: rows[:, :24]),
    "image_emb has rows of width 24, not of 40": with_rows(image_emb=lambda rows: rows[:, :24], text_emb=lambda rows: rows[:, :24]),
    "no text_emb": with_rows(text_emb=lambda rows: None),
    "text_emb has 2 rows for a caption and 2 synthetic ones": with_rows(text_emb=lambda rows: rows[:2]),
    "image_emb has 3 rows for 4 augmentations": with_rows(image_emb=lambda rows: rows[:3]),
    "image_emb has rows that are not finite": with_rows(image_emb=lambda rows: np.where(rows == rows[0, 0], np.nan, rows)),
    "text_emb has rows that are not finite": with_rows(text_emb=lambda rows: np.vstack([rows[:2], 0 * rows[2:]])),
    "no teachers' rows": lambda fields: {name: value for name, value in fields.items() if name != "npz"},
    "paug.json is no JSON": paug(b"{"),
    "paug.json lists no augmentations": paug([]),
    "augmentation 0 is no crop": paug([[[0, 0, 8.5, 8], None]] * 4),
    "augmentation 0 cuts nothing": paug([[[0, 0, 0, 8], None]] * 4),
    "augmentation 0 cuts up to 33": paug([[[0, 1, 32, 32], None]] * 4),
    "augmentation 0 has steps that": paug([[[0, 0, 8, 8], [[1, float("nan")], [0, 0.0]]]] * 4),
    "Posterize of RandAugment cannot have": paug([[[0, 0, 8, 8], [[10, 1000.0], [0, 0.0]]]] * 4),
    "param_aug is no JSON": paug("[" * 100_000),
    "param_aug is no JSON: JSON": paug("[\ud800]"),
    "of another byte order": in_torch(big_endian()),
    "syn_text in syn.json is no list of texts": lambda fields: fields | {"syn.json": b'{"syn_text": ["one", 2]}'},
    "text_emb has rows for 1 captions, and the picture has 0": lambda fields: {name: value for name, value in fields.items() if name != "txt"},
}


@pytest.fixture(scope="module")
def spoilt(scenes, two_widths, tmp_path_factory):
    "The same shards, in which every third sample has another fault"
    faults = list(FAULTS.values())

    def spoil(number, fields):
        return faults[number // 3](fields) if number % 3 == 1 and number // 3 < len(faults) else fields

    return reinforced(scenes, tmp_path_factory.mktemp("spoilt") / "npz", two_widths, spoil=spoil)


def test_every_fault_is_a_bad_sample_that_is_named_with_its_reason(spoilt, parameters):
    run = run_of(parameters(data=str(spoilt), batch_size=40, steps=6, max_bad_share=0.5, workers=1))
    lines = [json.loads(line) for line in (run.folder / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["sample"].partition("/")[2]: line["reason"] for line in lines}
    assert len(reasons) == len(FAULTS), sorted(reasons)
    for number, reason in enumerate(FAULTS):
        if reason.startswith("text_emb has rows for 1"):  # what has no caption is no pair in any job
            reason = "no caption"
        assert re.search(reason, reasons[f"{3 * number + 1:09d}"]), (reason, reasons[f"{3 * number + 1:09d}"])
    assert all(np.isfinite(totals(run.folder)))


def test_too_many_bad_samples_end_the_run(spoilt, parameters):
    with pytest.raises(ValueError, match=r"samples are bad, .* more than the 5.0% allowed"):
        run_of(parameters(data=str(spoilt), batch_size=40, steps=20))


def test_small_files_that_claim_to_be_large_take_no_memory(public):
    import resource

    fields = next(raw_samples(sorted(public.glob("*.tar"))[0], EVERY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    large = gzip.compress(bytes(2_000_000_000 // 8), compresslevel=1)
    bombs = [in_torch(large), FAULTS["image_emb claims to be"], FAULTS["npz unpacks to more than"]]
    after_making = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in bombs:
        with pytest.raises(BadSample):
            reinforcement_of(bomb(fields))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - after_making
    assert before and grown < 200_000, "kilobytes"


# Other layouts, and plain jobs on such shards


def test_a_caption_of_several_lines_is_one_and_dfndr_keeps_synthetic_rows_apart(public):
    fields = next(raw_samples(sorted(public.glob("*.tar"))[0], EVERY))
    heard = reinforcement_of(fields | {"txt": b"a star\nand a house"}, width=40)
    assert isinstance(heard, Reinforcement) and heard.captions[0] == "a star and a house" and (heard.given, heard.synthetic) == (1, 2)
    with np.load(io.BytesIO(fields["npz"])) as stored:
        image, text = stored["image_emb"], stored["text_emb"]
    apart = npz(image_emb=image.astype(np.float16), text_emb=text[:1], syn_text_dfn_emb=text[1:])
    renamed = {"syn_text_dfn": json.loads(fields["syn.json"])["syn_text"]}
    other = reinforcement_of(fields | {"npz": apart, "syn.json": json.dumps(renamed).encode()}, width=40)
    assert (other.text == text).all() and other.captions == reinforcement_of(fields).captions
    alone = npz(image_emb=image, text_emb=np.asfortranarray(text[:1]))
    heard = reinforcement_of({name: value for name, value in fields.items() if name != "syn.json"} | {"npz": alone})
    assert heard.synthetic == 0 and (heard.text == text[:1]).all()


def test_a_plain_job_on_such_shards_reads_nothing_of_them(public, scenes, parameters, two_widths):
    report = inspect_shards(public)
    assert report.total == 120 and report.ignored["samples with teachers' rows"] == 120 and report.ignored["url.txt"] == 120
    plain = dict(teacher=two_widths[0], student="", teacher_widths="", teacher_features="online")
    on_scenes = totals(run_of(parameters("scenes", data=f"{scenes}/train-{{000000..000002}}.tar", **plain)).folder)
    assert totals(run_of(parameters("shards", **plain)).folder) == on_scenes
    assert next(raw_samples(report.usable[0].path)).keys() & set(REINFORCED_FIELDS) == set()


def test_a_selection_as_an_index_or_as_shards_keeps_the_rows(public, tmp_path):
    path = sorted(public.glob("*.tar"))[0]
    keys = [sample["__key__"] for sample in raw_samples(path)][:5]
    assert copy_samples(tmp_path / "few.tar", path, keys) == 5
    index = write_index(tmp_path / "chosen/some.kept.json", inspect_shards(path).shards[0], keys)
    whole = {sample["__key__"]: sample["npz"] for sample in raw_samples(path, EVERY)}
    for selection in (tmp_path / "few.tar", index):
        held = inspect_reinforcement(inspect_shards(selection))
        assert (held.augmentations, held.synthetic, held.width) == (4, 2, 40)
        assert {sample["__key__"]: sample["npz"] for sample in raw_samples(selection, EVERY)} == {key: whole[key] for key in keys}


# Written from stores


@pytest.mark.parametrize("crops", [dict(), dict(crop_scale=0.5, augmentations=3)])
def test_what_is_written_from_stores_teaches_what_the_stores_teach(crops, parameters, scenes, two_widths, tmp_path):
    data = f"{scenes}/train-{{000000..000002}}.tar"
    teachers = [load_model(name) for name in two_widths]
    counts = reinforce(data, teachers, tmp_path / "written", features=str(tmp_path / "features"), progress=False, **crops)
    assert counts == dict(written=120, left_out=0, there=0)
    named = dict(teacher=", ".join(two_widths), teacher_widths="", student="", steps=6)
    stored = dict(named, data=data, teacher_features="stored", features=str(tmp_path / "features"), **crops)
    from_store = open_job("Distil", parameters("stored", **stored))
    from_shards = open_job("Distil", parameters("shards", data=str(tmp_path / "written"), synthetic_share=0.0, **named))
    for one, other in zip(islice(from_store.batches(0), 6), from_shards.batches(0), strict=False):
        assert [key.partition("/")[2] for key in one.keys] == [key.partition("/")[2] for key in other.keys]
        assert one.captions == other.captions
        assert not crops or one.crops == other.crops
        said, written = from_store.source.encode(one), from_shards.source.encode(other)
        for a, b in zip(said.members, written.members, strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.text, b.text) and a.scale == b.scale
    train(from_store)
    train(from_shards)
    losses = totals(from_store.run.folder), totals(from_shards.run.folder)
    if crops:  # boxes in whole pixels
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    else:
        assert losses[0] == losses[1]


def test_several_captions_are_written_and_a_killed_call_goes_on(parameters, scenes, two_widths, tmp_path):
    members = []
    for number, sample in enumerate(islice(raw_samples(next(iter(sorted(Path(scenes).glob("train-*.tar"))))), 6)):
        texts = [f"caption {k} of {number}" for k in range(3)]
        members += [(f"{number}.jpg", sample["jpg"]), (f"{number}.txt", "\n".join(texts).encode()), (f"{number}.cls", b"4")]
    for name in ("a", "b"):
        tar(tmp_path / f"{name}.tar", members)
    teachers = [load_model(name) for name in two_widths]
    given = dict(features=str(tmp_path / "features"), progress=False)
    first = reinforce(str(tmp_path / "?.tar"), teachers, tmp_path / "out", rank=1, world_size=2, **given)
    assert first == dict(written=6, left_out=0, there=0) and not (tmp_path / "out/a.tar").exists()
    again = reinforce(str(tmp_path / "?.tar"), teachers, tmp_path / "out", **given)
    assert again == dict(written=6, left_out=0, there=1)
    sample = next(raw_samples(tmp_path / "out/a.tar", EVERY))
    heard = reinforcement_of(sample, width=40)
    assert heard.captions == ("caption 0 of 0", "caption 1 of 0", "caption 2 of 0") and heard.given == 1 and sample["cls"] == b"4"
    with torch.no_grad():
        text = [one.encode_text(one.tokenizer(list(heard.captions))) for one in teachers]
    assert np.abs(heard.text - torch.cat(text, 1).numpy()).max() < 1e-3
    job = open_job("Distil", parameters(data=str(tmp_path / "out"), teacher_widths="", batch_size=4))
    assert job.rows["teacher_widths"] == [16, 24] and job.rows["teacher_scales"] == [pytest.approx(one.scale.item()) for one in teachers]
    with pytest.raises(ValueError, match="written with other .*teacher_widths"):
        reinforce(str(tmp_path / "?.tar"), teachers[:1], tmp_path / "out", **given)
