"A student that is spread over processes (fsdp): it learns what one process teaches it, each holds its part, and a run goes on either way."

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from conftest import TINY, lines_of, tiny_job
from safetensors.torch import load_file

from vlkd_lab.models import load_model
from vlkd_lab.runs import Run
from vlkd_lab.trainers import current_student, open_job

PROGRAM = """
import json, os, sys
import torch
from vlkd_lab import trainers

torch.set_num_threads(1)
jobs, folder = json.loads(sys.argv[1]), sys.argv[2]
step, loops, dies = trainers.take_step, [], []


def watched(loop, batch):
    if dies and loop.step == dies[0]:
        raise InterruptedError("the machine is needed elsewhere")
    taken = step(loop, batch)
    loops[:] = [loop]
    if loop.step == 0:
        weigh(loop)
    return taken


def here(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def weigh(loop):
    "Bytes that this process holds of the student's weights, of their gradients and of AdamW's state"
    modules = {"learner": loop.learner} | ({"emptied": loop.shards.whole} if loop.shards else {})
    bytes_of = {name: sum(here(weight) for weight in module.parameters()) for name, module in modules.items()}
    bytes_of["gradients"] = sum(here(weight.grad) for weight in loop.learner.parameters() if weight.grad is not None)
    state = loop.optimizer.state_dict()["state"]
    bytes_of["adamw"] = sum(here(entry) for entries in state.values() for entry in entries.values() if entry.ndim)
    if loop.average is not None:
        bytes_of["average"] = sum(tensor.nbytes for tensor in loop.average.state.values())
    place = os.path.join(folder, f"{os.path.basename(loop.run.folder)}-{os.environ.get('RANK', '0')}.json")
    open(place, "w").write(json.dumps(bytes_of))


trainers.loop.take_step = watched
for method, given in jobs:
    dies[:] = [given.pop("dies")] if "dies" in given else []
    job = trainers.open_job(method, given)
    try:
        trainers.train(job)
    except InterruptedError:
        loops.clear()
"""


def train_in(processes, jobs, folder):
    "Train jobs one after the other, in one process or in several"
    (folder / "jobs.py").write_text(PROGRAM)
    forked.run(str(folder / "jobs.py"), json.dumps(jobs), str(folder), processes=processes)


def held(folder, rank=0):
    "What a process of a run held after its first step, in bytes"
    return json.loads(Path(folder.parent, f"{folder.name}-{rank}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def given(scenes, tiny_teacher, folder):
    "Parameters of a small job, by the name of its run"
    config = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"]
    (folder / "wide.json").write_text(json.dumps(config | dict(embed_dim=24)))

    def of(method, out, **changes):
        common = dict(steps=6, batch_size=16, warmup=2, validate_every=3, learning_rate=3e-3, checkpoint_seconds=600.0)
        return tiny_job(scenes, tiny_teacher, folder / out, method, **common | changes)

    return of


CASES = {
    "plain": ("Distil", dict(inheritance="manual")),
    "half": ("Distil", dict(precision="bf16", losses="affinity_mimicking=1")),
    "average": ("Distil", dict(ema=0.7, micro_batch=3)),
    "projected": ("Distil", dict(student="WIDE", losses="feature_mimicking=20, contrastive=1", checkpoint_activations=True)),
    "alone": ("Distil", dict(teacher="", student="TEACHER", losses="contrastive=1")),
    "locked": ("Distil", dict(student="TEACHER", inheritance="manual", lock_text=True)),
    "stages": ("TinyCLIP", dict(inheritance="manual", stages=2, steps=3, losses="affinity_mimicking=1", ema=0.5)),
    "held": ("TinyCLIP", dict(inheritance="none", student="WIDE", losses="affinity_mimicking=1", teacher_precision="bf16")),
}


@pytest.fixture(scope="module")
def trained(given, folder, tiny_teacher):
    "Each case in one process as ever, and in two that share the student"
    for processes in (1, 2):
        jobs = []
        for name, (method, changes) in CASES.items():
            places = {"WIDE": str(folder / "wide.json"), "TEACHER": str(tiny_teacher)}
            changes = {key: places.get(value, value) for key, value in changes.items()}
            jobs.append((method, given(method, f"{name}-{processes}", **changes, fsdp=processes == 2)))
        train_in(processes, [job for job in jobs if "precision" not in job[1]], folder)
        train_in(processes, [job for job in jobs if "precision" in job[1]], folder)  # which a process chooses once
    return folder


def last_student(run):
    return load_file(max(Path(run).glob("st*/student/*model.safetensors")))


def assert_same(one, other, rel=2e-3, most=2e-3):
    "Losses, scores and weights of two runs agree to rounding"
    lines = lines_of(one), lines_of(other)
    assert len(lines[0]) == len(lines[1]) > 3
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (pytest.approx(value, rel=rel, abs=1e-5) if isinstance(value, float) else value), (name, a, b)
    mine, others = last_student(one), last_student(other)
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        assert (value - others[name]).abs().max() < most, name


@pytest.mark.parametrize("name", CASES)
def test_two_processes_that_share_a_student_teach_it_what_one_does(name, trained):
    one, two = trained / f"{name}-1", trained / f"{name}-2"
    rough = dict(rel=5e-2, most=2e-2) if name == "half" else {}
    assert_same(one, two, **rough)
    assert Run(two).config()["parameters"]["fsdp"] is True
    assert load_model(max(two.glob("st*/student")), "cpu").model.logit_scale.ndim == 0


@pytest.mark.parametrize("name", ["plain", "average", "stages"])
def test_each_process_holds_about_half(name, trained):
    whole = held(trained / f"{name}-1")
    for rank in (0, 1):
        part = held(trained / f"{name}-2", rank)
        assert part.pop("emptied") == 0, "the student's own network gives its weights away"
        assert part.keys() == whole.keys() and len(part) >= 3
        for what, count in part.items():
            assert 0.45 * whole[what] < count < 0.55 * whole[what], (what, count, whole[what])


@pytest.mark.parametrize("name", ["plain", "average", "projected"])
def test_a_checkpoint_is_the_file_it_always_was(name, trained):
    one, two = (torch.load(trained / f"{name}-{k}/student/distil/checkpoint.pt", weights_only=True) for k in (1, 2))
    assert list(one) == list(two) and [*one["learner"]] == [*two["learner"]] and one.get("average", {}).keys() == two.get("average", {}).keys()
    for name, tensor in one["learner"].items():
        assert type(two["learner"][name]) is torch.Tensor and (tensor - two["learner"][name]).abs().max() < 2e-3
    shown = [[group["params"] for group in state["optimizer"]["param_groups"]] for state in (one, two)]
    assert shown[0] == shown[1] and one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for number, entries in one["optimizer"]["state"].items():
        for entry, value in entries.items():
            other = two["optimizer"]["state"][number][entry]
            assert type(other) is torch.Tensor and other.shape == value.shape
            assert (value - other).norm() <= 2e-2 * value.norm() + 1e-8, (number, entry)


def test_the_average_is_saved_and_the_weights_go_on(trained):
    two = trained / "average-2"
    state = torch.load(two / "student/distil/checkpoint.pt", weights_only=True)
    saved = last_student(two)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state["average"].items())
    assert any(not torch.equal(saved[name], state["learner"][f"model.{name}"]) for name in saved)
    snapshots = sorted((two / "snapshots/kept").glob("*.safetensors"))
    ours, theirs = (load_file(path) for path in (snapshots[-1], trained / "average-1/snapshots/kept" / snapshots[-1].name))
    assert (ours["student"].float() - theirs["student"].float()).abs().max() < 1e-2, "the views see the average"
    assert [path.stem[-8:] for path in snapshots] == ["00000000", "00000003", "00000006"], "when the student is validated"


def test_a_run_goes_on_with_and_without_it(given, trained, folder):
    whole = trained / "plain-1"
    kind = dict(inheritance="manual", checkpoint_seconds=0.0)
    averaged = dict(kind, ema=0.7, inheritance="none", micro_batch=3)
    train_in(2, [("Distil", given("Distil", name, **kind, fsdp=True, dies=3)) for name in ("shared", "shared-shared")], folder)
    train_in(1, [("Distil", given("Distil", "once", **averaged, dies=3)), ("Distil", given("Distil", "shared", **kind, fsdp=False))], folder)
    for name in ("shared-shared", "once"):
        assert len([line for line in lines_of(folder / name) if "total" in line]) == 3
    student = current_student(Run(folder / "shared-shared")).model
    checkpoint = torch.load(folder / "shared-shared/student/distil/checkpoint.pt", weights_only=True)
    assert torch.equal(student.text_projection, checkpoint["learner"]["model.text_projection"])
    jobs = [("shared-shared", kind), ("once", averaged)]
    train_in(2, [("Distil", given("Distil", name, **changes, fsdp=True)) for name, changes in jobs], folder)
    assert_same(whole, folder / "shared")
    assert_same(whole, folder / "shared-shared")
    assert_same(trained / "average-1", folder / "once")
    assert Run(folder / "shared").config()["continued"][-1]["changes"]["parameters.fsdp"] == [True, False]
    longer = shutil.copytree(folder / "shared", folder / "longer")
    config = json.loads((longer / "config.json").read_text())
    config["parameters"]["out"] = str(longer)
    (longer / "config.json").write_text(json.dumps(config))
    train_in(2, [("Distil", given("Distil", "longer", **kind, fsdp=True) | dict(steps=8))], folder)
    assert [line["step"] for line in lines_of(longer) if "total" in line] == list(range(1, 9))


@pytest.fixture
def refused(scenes, tiny_teacher, tmp_path):
    "A job that is refused before anything is made, and the sentence"

    def why(method="Distil", **changes):
        settings = dict(fsdp=True, processes=2, batch_size=16) | changes
        with pytest.raises(ValueError, match="fsdp=True is not valid") as error:
            open_job(method, tiny_job(scenes, tiny_teacher, tmp_path / "run", method, **settings))
        assert not (tmp_path / "run").exists()
        return str(error.value)

    return why


def test_what_cannot_be_shared_is_said_before_anything_is_made(refused, tmp_path, tiny_teacher):
    assert "there is one: choose processes=2 or start torchrun; or choose fsdp=False" in refused(processes=1)
    assert "inheritance='auto' learns gates" in refused("TinyCLIP", inheritance="auto")
    assert "inheritance='mapped' learns maps" in refused("Distil", inheritance="mapped")
    assert "precision='fp16'" in refused(precision="fp16") and "choose bf16" in refused(precision="fp16")
    assert "choose channels_last=False" in refused(channels_last=True)
    assert "choose compile=False" in refused(compile=True, compile_backend="eager")
    for method in ("ClipCid", "DimeFm", "Contrastive"):
        assert f"a {method} job keeps its student whole" in refused(method)
    config = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"]
    resnet = dict(embed_dim=16, vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None), text_cfg=config["text_cfg"])
    (tmp_path / "resnet.json").write_text(json.dumps(TINY | resnet))
    for method in ("Distil", "TinyCLIP"):
        given = dict(student=str(tmp_path / "resnet.json"), inheritance="none", losses="affinity_mimicking=1")
        assert "this image tower, a ModifiedResNet" in refused(method, **given)


def test_a_blip_is_kept_whole(scenes, tiny_blip, tmp_path):
    for method, own in (("Dlip", dict(teacher=str(tiny_blip), queue=16)), ("BlipTraining", {})):
        given = dict(data=f"{scenes}/train-000000.tar", val=f"{scenes}/val-000000.tar", device="cpu", out=str(tmp_path / "run"))
        with pytest.raises(ValueError, match=f"fsdp=True is not valid here: a {method} job keeps its student whole"):
            open_job(method, given | own | dict(fsdp=True, processes=2, batch_size=16))
