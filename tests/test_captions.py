"Several captions a picture, from shards through scores, jobs, stores and export"

import io
import json
import math
import random
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lines_of, same_weights
from PIL import Image
from torchvision import transforms as T

from vlkd_lab import trainers
from vlkd_lab.data import captions_of, load_pairs, raw_samples
from vlkd_lab.evaluation import alarms, caption_counts, encode_pairs, retrieve, score
from vlkd_lab.explorers import confusions
from vlkd_lab.export import to_clip_benchmark
from vlkd_lab.features import Features, distinct_captions, recall
from vlkd_lab.methods.blip_training import read_texts
from vlkd_lab.methods.clip_cid import ClipCid, open_clip_cid
from vlkd_lab.methods.dime_fm import DimeFm, open_dime_fm
from vlkd_lab.methods.dlip import Dlip, open_dlip
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.models import VLM, load_model
from vlkd_lab.samples import caption, make_sample, make_scene
from vlkd_lab.tasks import references_of, rerank, score_tasks
from vlkd_lab.trainers import check_parameters, train, validation_features, validation_scores


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def scene_members(split, index):
    "A scene with one true caption in five phrasings, as Flickr8k's shards have them: all in the JSON, the first in the .txt"
    sample, scene = make_sample(index, 0, split, size=32), make_scene(index, f"{split}/0")
    texts = list(dict.fromkeys(caption(scene, variant=variant) for variant in range(12)))[:5]
    sample.image.save(image := io.BytesIO(), "png")
    yield f"{sample.key}.png", image.getvalue()
    yield f"{sample.key}.txt", texts[0].encode()
    yield f"{sample.key}.json", json.dumps(sample.about | {"captions": texts}).encode()


@pytest.fixture(scope="session")
def five(tmp_path_factory):
    "A folder with 3 × 16 training scenes and 24 validation scenes of 32 pixels with five captions each"
    folder = tmp_path_factory.mktemp("five")
    for shard in range(3):
        write_tar(
            folder / f"train-{shard:06d}.tar",
            [m for k in range(16) for m in scene_members("train", 16 * shard + k)],
        )
    write_tar(folder / "val-000000.tar", [m for k in range(24) for m in scene_members("val", k)])
    return folder


# scores


class Rigged(torch.nn.Module):
    "Looks at a picture's grey value and at a caption's numbers: number // 5 is the picture it is nearest to"

    def __init__(self, pictures):
        super().__init__()
        self.logit_scale, self.pictures = torch.nn.Parameter(torch.tensor(3.0)), pictures

    def encode_image(self, image, normalize=True):
        return torch.eye(self.pictures)[(image.mean(dim=(1, 2, 3)) * 255 / 5).round().long()]

    def encode_text(self, text, normalize=True):
        own, nearest = torch.eye(self.pictures)[text[:, 0]], torch.eye(self.pictures)[text[:, 1]]
        return F.normalize(torch.where(text[:, :1] == text[:, 1:2], own, 0.4 * own + 0.6 * nearest), dim=1)


def rigged(pictures):
    tokenizer = lambda texts: torch.tensor([[int(word) for word in text.split()[1:3]] for text in texts])  # noqa: E731
    network = Rigged(pictures)
    return VLM(network, T.ToTensor(), tokenizer, {"model_cfg": {"embed_dim": pictures}}, "rigged")


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    "Forty pictures of five captions, of which eleven are nearer to the next picture: true R@1 is 1 and .945"
    misleading, content = random.Random(0).sample(range(200), 11), []
    misleading = [n for n in misleading if n % 5] + [n + 1 for n in misleading if n % 5 == 0]
    assert len(set(misleading)) == 11
    for picture in range(40):
        Image.new("RGB", (16, 16), (5 * picture,) * 3).save(out := io.BytesIO(), "png")
        nearest = [(picture + (5 * picture + k in misleading)) % 40 for k in range(5)]
        lines = [f"picture {picture} {near} caption {k}" for k, near in enumerate(nearest)]
        content += [(f"{picture:03d}.png", out.getvalue()), (f"{picture:03d}.txt", "\n".join(lines).encode())]
    return write_tar(tmp_path_factory.mktemp("forty") / "0.tar", content)


def test_forty_pictures_of_five_captions_score_what_they_are_worth(forty):
    model, pairs = rigged(40), load_pairs(forty)
    scores, features, _ = score(model, pairs)
    assert scores["image_to_text_r1"] == 1.0 and scores["text_to_image_r1"] == pytest.approx(189 / 200)
    assert scores["text_to_image_r5"] == scores["image_to_text_r5"] == 1.0 and len(features.text) == 40
    assert validation_scores(model, pairs) == {
        name: scores[name] for name in ("image_to_text_r1", "text_to_image_r1")
    }
    assert (
        len(validation_features(model, pairs, every_caption=True).text) == 200
        and len(validation_features(model, pairs)) == 40
    )
    assert caption_counts(pairs) == (200, 5.0)
    assert retrieve(model, pairs, queries=40, best=1).data.count("✓") == 40


def test_recall_by_picture_is_what_two_loops_count():
    torch.manual_seed(0)
    texts = [
        tuple(f"{(3 * row + k) % 50} of {k % 2}" for k in range(row % 4 + 1)) for row in range(30)
    ]  # some are shared
    flat = [(text, row) for row, several in enumerate(texts) for text in several]
    by_text = {text: F.normalize(torch.randn(6, dtype=torch.double), dim=0) for text, _ in flat}
    rows = torch.stack([by_text[text] for text, _ in flat])
    images = F.normalize(torch.randn(30, 6, dtype=torch.double), dim=1)
    assert len(by_text) < len(flat)
    found = recall(Features(images, rows, torch.tensor(1.0)), ks=(1, 5), captions=texts)
    for k in (1, 5):
        hits = []
        for row, image in enumerate(images):
            best = sorted(by_text, key=lambda text: -float(image @ by_text[text]))[:k]  # noqa: B023
            hits.append(bool(set(best) & set(texts[row])))
        assert found[f"image_to_text_r{k}"] == pytest.approx(np.mean(hits))
        hits = []
        for text, vector in by_text.items():
            best = (images @ vector).topk(k).indices.tolist()
            hits.append(any(text in texts[row] for row in best))
        assert found[f"text_to_image_r{k}"] == pytest.approx(np.mean(hits))


def test_one_caption_a_picture_scores_as_ever():
    torch.manual_seed(1)
    rows = [F.normalize(torch.randn(50, 5), dim=1) for _ in range(2)]
    features, captions = Features(*rows, torch.tensor(1.0)), [f"caption {row % 40}" for row in range(50)]
    assert recall(features, captions=captions) == recall(features, captions=[(text,) for text in captions])
    assert recall(features) == recall(features, captions=[str(row) for row in range(50)])


def test_captions_that_do_not_fit_the_features_are_an_error():
    features = Features(torch.eye(3), torch.eye(3), torch.tensor(1.0))
    with pytest.raises(ValueError, match="3 pictures with 4 captions, but features of 3 images and 3 texts"):
        recall(features, captions=[("a",), ("b", "c"), ("d",)])
    with pytest.raises(ValueError, match="picture 1 has no caption"):
        recall(features, captions=[("a",), (), ("b", "c")])


@pytest.mark.parametrize("pictures,shared", [(20, 0), (20, 2)])
def test_chance_is_what_guessing_gives(pictures, shared):
    texts = [tuple(f"{0 if k < shared else row} {k}" for k in range(5)) for row in range(pictures)]
    captions, right = (
        distinct_captions(texts)[2].shape[1],
        distinct_captions(texts)[2].sum().item() / pictures,
    )
    torch.manual_seed(0)
    flat = [text for several in texts for text in several]
    guesses = []
    for _ in range(150):
        by_text = {text: F.normalize(torch.randn(16), dim=0) for text in flat}
        images = F.normalize(torch.randn(pictures, 16), dim=1)
        features = Features(images, torch.stack([by_text[text] for text in flat]), torch.tensor(1.0))
        guesses += recall(features, ks=(1,), captions=texts).values()
    assert np.mean(guesses) == pytest.approx(right / captions, rel=0.25)
    level = right / captions
    room = min(2 * level, 0.1)
    low, high = ({"image_to_text_r1": r1, "text_to_image_r1": r1} for r1 in (level + 0.9 * room, level + 1.1 * room))
    assert f"{right:.3g} are right" in alarms("m", low, captions, right=right)[0] and not alarms(
        "m", high, captions, right=right
    )


def test_confusions_take_any_caption_of_the_picture():
    corner = torch.eye(3)
    before, after = (Features(corner, corner[order], torch.tensor(1.0)) for order in ([1, 0, 2], [0, 1, 2]))
    one, several = ["a", "b", "c"], [("a", "b"), ("b", "x"), ("c",)]
    assert confusions(before, after, one) == {"mended": [(0, 1, 0), (1, 0, 1)], "made": []}
    assert confusions(before, after, several) == {"mended": [(1, 0, 1)], "made": []}, (
        "b is right for the first picture too"
    )


# tasks


def test_a_blip_is_scored_by_all_captions(five, tiny_blip):
    from vlkd_lab.fusion import load_blip

    blip, pairs = load_blip(tiny_blip), load_pairs(five / "val-000000.tar", limit=8)
    found, flat = (
        rerank(blip, pairs, candidates=4, progress=False),
        [text for texts in pairs.all_captions for text in texts],
    )
    assert (
        len(set(flat)) == 40 and found.cosines.shape == (8, 40) and found.right.sum(dim=1).tolist() == [5] * 8
    )
    with torch.no_grad():
        features = replace(encode_pairs(blip, pairs), text=blip.encode_text(blip.tokenizer(flat)))
    assert found.before == pytest.approx(recall(features, captions=pairs.all_captions))
    assert validation_scores(blip, pairs) == pytest.approx(
        {name: found.before[name] for name in ("image_to_text_r1", "text_to_image_r1")}
    )
    assert references_of(pairs) == [list(texts) for texts in pairs.all_captions]
    scores = score_tasks(blip, pairs, beams=1, questions=1, candidates=4, progress=False)
    assert scores["image_to_text_r5"] == found.after["image_to_text_r5"] and math.isfinite(scores["cider"])


def test_words_are_learnt_from_all_captions(five):
    shards = sorted(five.glob("train-*.tar"))
    texts = read_texts(shards)
    every = [text for shard in shards for sample in raw_samples(shard) for text in captions_of(sample)]
    assert len(every) == 240 and texts[:240] == every


# jobs


def options_of(five, tiny_teacher, out, **changes):
    "Parameters of a job that takes seconds"
    given = dict(
        data=f"{five}/train-{{000000..000002}}.tar",
        val=f"{five}/val-000000.tar",
        teacher=str(tiny_teacher),
        device="cpu",
    )
    given |= dict(
        steps=6,
        batch_size=16,
        warmup=2,
        validate_every=3,
        validate_pairs=24,
        compare_scratch=False,
        learning_rate=1e-4,
        checkpoint_seconds=0.0,
    )
    return given | dict(out=str(out)) | changes


def open_method(name, five, teachers, out, **changes):
    "A job of a method on five-caption shards"
    teacher = teachers["Dlip" if name == "Dlip" else "others"]
    given = options_of(five, teacher, out, **changes)
    if name == "TinyCLIP":
        return open_tinyclip(
            check_parameters(TinyCLIP, given | dict(stages=1, inheritance="manual", target_sparsity=0.5))
        )
    if name == "ClipCid":
        return open_clip_cid(
            check_parameters(ClipCid, given | dict(map_images=12, clusters=4, removed_share=0.2))
        )
    if name == "DimeFm":
        shards = dict(
            sentences=f"{five}/train-{{000000..000002}}.tar", sentence_batch=12, grounded=0, probe_pairs=6
        )
        return open_dime_fm(check_parameters(DimeFm, given | shards))
    given |= dict(batch_size=8, student="image:1x16, text:1x16", queue=21, probe_pairs=4)
    return open_dlip(check_parameters(Dlip, given))


@pytest.fixture
def teachers(tiny_teacher, tiny_blip):
    return {"others": tiny_teacher, "Dlip": tiny_blip}


@pytest.mark.parametrize(
    "name, workers", [("TinyCLIP", 0), ("TinyCLIP", 3), ("ClipCid", 0), ("ClipCid", 3), ("DimeFm", 3)]
)
def test_stored_features_teach_what_the_teacher_says_of_the_drawn_captions(
    name, workers, five, teachers, tmp_path
):
    totals = {}
    for how in ("online", "stored"):
        out = tmp_path / f"{how}-{workers}"
        train(
            open_method(
                name,
                five,
                teachers,
                out,
                teacher_features=how,
                workers=workers,
                features=str(tmp_path / "store"),
            )
        )
        totals[how] = [line["total"] for line in lines_of(out) if "total" in line]
    assert len(totals["stored"]) == 6 and totals["stored"] == pytest.approx(totals["online"], rel=5e-3)


@pytest.mark.parametrize("name, workers", [("TinyCLIP", 0), ("TinyCLIP", 3), ("Dlip", 3)])
def test_a_job_on_several_captions_ends_as_if_undisturbed(
    name, workers, five, teachers, tmp_path, killed_in_its_fourth_step
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = open_method(name, five, teachers, whole, workers=workers)
    numbers = {
        number for batch, _ in zip(job.batches(0), range(8), strict=False) for number in batch.caption_numbers
    }
    assert len(numbers) > 2, "not always the same one"
    train(job)
    assert killed_in_its_fourth_step(lambda: open_method(name, five, teachers, killed, workers=workers)) == [
        0,
        1,
        2,
        3,
        3,
        4,
        5,
    ]
    assert lines_of(killed) == lines_of(whole)
    events = [line for line in lines_of(whole) if line.get("event") == "validation"]
    assert events and 0 <= events[0]["image_to_text_r1"] <= 1
    if name == "Dlip":
        assert same_weights(killed, whole)


def test_validation_of_a_kept_text_tower_asks_every_caption_once(five, teachers, tmp_path):
    job = open_method("DimeFm", five, teachers, tmp_path / "run")
    train(job)
    [*_, last] = [line for line in lines_of(tmp_path / "run") if line.get("event") == "validation"]
    student = trainers.load_student(tmp_path / "run" / "student" / "student", "cpu")
    assert job.caption_features.shape[0] == 120
    expected = validation_scores(student, job.val)
    assert {name: last[name] for name in expected} == pytest.approx(expected, abs=1e-6)


# export


def test_clip_benchmark_reads_all_captions_and_finds_our_recall(forty, five, tiny_teacher, tmp_path):
    "Its own reader, collate and metric, called as its command does"
    pytest.importorskip("clip_benchmark")
    from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    for shards, model, count in (
        (forty, rigged(40), 40),
        (five / "val-000000.tar", load_model(tiny_teacher, "cpu"), 24),
    ):
        out = tmp_path / f"bench-{count}"
        assert to_clip_benchmark(shards, out, parts=1) == dict(written=count, left_out=0)
        dataset = build_wds_dataset("wds", model.preprocess, data_dir=str(out))
        loader = torch.utils.data.DataLoader(
            dataset.batched(8, collation_fn=image_captions_collate_fn), batch_size=None
        )
        theirs = evaluate(model.model, loader, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5])
        pairs = load_pairs(shards)
        ours = recall(encode_pairs(model, pairs, every_caption=True), ks=(1, 5), captions=pairs.all_captions)
        assert caption_counts(pairs) == (5 * count, 5.0), "no text stands twice, so both count the same"
        for k in (1, 5):
            assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(
                ours[f"image_to_text_r{k}"], abs=1e-6
            )
            assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(
                ours[f"text_to_image_r{k}"], abs=1e-6
            )
