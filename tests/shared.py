"""What several test files share: a tiny model, tiny scenes, runs that are killed and go on."""

import functools
import io
import tarfile
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file

from vlkd_lab import trainers
from vlkd_lab.fusion import BlipShape, new_blip, save_blip, train_wordpiece
from vlkd_lab.models import new_model, save_model, train_tokenizer
from vlkd_lab.runs import MEASURED, Run
from vlkd_lab.samples import write_shards

TINY = dict(
    embed_dim=16,
    vision_cfg=dict(layers=2, width=32, head_width=8, patch_size=16, image_size=32),
    text_cfg=dict(context_length=24, width=32, heads=4, layers=2),
)


def make_scenes(folder):
    "3 × 40 training scenes and 48 validation scenes of 32 pixels in a folder"
    write_shards(folder, 120, 0, split="train", per_shard=40, size=32)
    write_shards(folder, 48, 0, split="val", per_shard=48, size=32)
    return folder


def make_teacher(folder):
    "The folder of a tiny untrained teacher with a tokenizer of its own"
    tokenizer = train_tokenizer(["a small red star left of a large blue house"] * 9, folder / "tokenizer", 300, 24)
    config = TINY | dict(text_cfg=TINY["text_cfg"] | dict(vocab_size=len(tokenizer.tokenizer), hf_tokenizer_name="tiny"))
    return save_model(new_model(config, tokenizer=tokenizer, seed=3), folder / "teacher")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    "See `make_scenes`"
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    "See `make_teacher`"
    return make_teacher(tmp_path_factory.mktemp("teacher"))


TINY_BLIP = BlipShape(2, 32, 4, 2, 32, 4, 2, 2, image_neurons=64, text_neurons=64, image_size=32, patch_size=8, joint_width=16)


def make_blip(folder):
    "The folder of a tiny untrained BLIP whose words are those of the scenes"
    said = ["a small red star left of a large blue house on the grass", "what colour is the star?", "how many shapes are there? two"]
    return save_blip(new_blip(TINY_BLIP, train_wordpiece(said * 9, folder / "words", 120, 32), seed=3), folder / "blip")


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory):
    "See `make_blip`"
    return make_blip(tmp_path_factory.mktemp("blip"))


def tar(path, members):
    "A tar of (name, content) members, compressed where its name says so"
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    "Two test processes share two cores"
    torch.set_num_threads(1)


def lines_of(folder):
    "A run's metrics without what a clock said"
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in Run(folder).metrics()]


def train_watched(job, watch):
    "Train a job, of which `watch` takes every step: given how it is taken otherwise, the loop and the batch"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers.loop, "take_step", functools.partial(watch, trainers.take_step))
        trainers.train(job)


@pytest.fixture
def killed_in_its_fourth_step(monkeypatch):
    "Train a job of six steps that dies in its fourth, and start it again; the steps that were begun"

    def train_twice(open_job, meanwhile=lambda: None):  # () -> the job; what is done between
        step, taken = trainers.take_step, []

        def dies(loop, batch):
            taken.append(loop.step)
            if len(taken) == 4:
                raise KeyboardInterrupt
            return step(loop, batch)

        monkeypatch.setattr(trainers.loop, "take_step", dies)
        job = open_job()
        with pytest.raises(KeyboardInterrupt):
            trainers.train(job)
        assert job.run.status()["state"] == "stopped"
        meanwhile()
        trainers.train(open_job())
        return taken

    return train_twice


@pytest.fixture
def ends_as_if_undisturbed(killed_in_its_fourth_step, tmp_path):
    "Train a job of six steps to the end, and once more with a death in its fourth: metrics and weights are the same"

    def check(open_job):  # run folder -> the job
        whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
        trainers.train(open_job(whole))
        assert killed_in_its_fourth_step(lambda: open_job(killed)) == [0, 1, 2, 3, 3, 4, 5]
        assert lines_of(killed) == lines_of(whole) and same_weights(killed, whole)

    return check


def in_two_processes(method, given):
    "Train six steps from the command line in two processes, and start the finished run once more; its run folder"
    out = given["out"]
    words = [f"{name}={value}" for name, value in (given | dict(processes=2)).items() if name != "out"]
    forked.run("-m", "vlkd_lab.trainers", out, f"method={method}", *words, processes=2)
    lines = lines_of(out)
    assert [line["step"] for line in lines if "total" in line] == list(range(1, 7))
    forked.run("-m", "vlkd_lab.trainers", out, processes=2)
    assert lines_of(out) == lines and Run(out).config()["method"] == method
    return Path(out)


def same_weights(one, other):
    "Whether two runs left the same student, bit for bit"
    a, b = (load_file(next(Path(folder, "student/student").glob("*model.safetensors"))) for folder in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


def any_job(method, out, scenes, tiny_teacher, tiny_blip):
    "Parameters of a job of any method that takes a second"
    common = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", device="cpu")
    common |= dict(steps=3, batch_size=8, warmup=1, validate_every=3, validate_pairs=16, probe_pairs=4, out=str(out))
    towers = dict(teacher=str(tiny_teacher), compare_scratch=False)
    blip = dict(image_size=32, sizes="image:1x32, text:1x32, fusion:1, decoder:1", head_width=16, joint_width=8)
    own = {
        "TinyCLIP": dict(towers, stages=1, inheritance="manual"),
        "Distil": dict(towers, inheritance="manual"),
        "CLIP-KD": dict(towers, inheritance="manual"),
        "CLIP-RD": dict(towers, inheritance="manual"),
        "SigLIP": dict(towers, inheritance="manual"),
        "ClipCid": dict(towers, clusters=4, removed_share=0.3, map_images=8),
        "DimeFm": dict(towers, sentences=common["data"], sentence_batch=12),
        "Dlip": dict(teacher=str(tiny_blip), student="image:1x16, text:1x16", compare_scratch=False, queue=16),
        "Contrastive": dict(image_size=32, vocabulary=300, context_length=24),
        "BlipTraining": dict(blip, context_length=24, queue=16),
    }
    return common | own[method]


def tiny_job(scenes, tiny_teacher, out, method, **changes):
    "Parameters of a job of a method with two towers that takes a second"
    data = f"{scenes}/train-{{000000..000002}}.tar"
    job = dict(data=data, val=f"{scenes}/val-000000.tar", device="cpu", out=str(out))
    job |= dict(steps=3, batch_size=8, warmup=1, validate_every=3, validate_pairs=16, probe_pairs=4)
    if method != "Contrastive":
        job |= dict(teacher=str(tiny_teacher), compare_scratch=False)
    if method == "DimeFm":
        job |= dict(sentences=data)
    return job | changes
