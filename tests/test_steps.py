"""A step waits for nothing: numbers are read one step late, and processes hear of changes with them."""

import json
import math

import forked
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, lines_of, tiny_job

from vlkd_lab import trainers
from vlkd_lab.features import Batch
from vlkd_lab.losses import LOSSES, Objective, Term
from vlkd_lab.models import new_model
from vlkd_lab.runs import Run, RunStopped, RunWriter
from vlkd_lab.trainers import (
    Diverged,
    FitParameters,
    LateLine,
    LateNumbers,
    Learner,
    Phase,
    fit,
    open_job,
    train,
)
from vlkd_lab.waits import count_waits

TWO_TOWERS = {
    "TinyCLIP": dict(inheritance="manual", stages=1),
    "Distil": dict(inheritance="manual", losses="affinity_mimicking=1, contrastive=1, feature_mimicking=1, relational=1"),
    "ClipCid": dict(clusters=4, removed_share=0.3, map_images=8),
    "DimeFm": dict(sentence_batch=12),
    "Contrastive": dict(image_size=32, vocabulary=300, context_length=24),
}
SHAPE = dict(image_size=32, context_length=24, head_width=16, joint_width=8, queue=16)
BLIPS = {
    "BlipTraining": SHAPE | dict(sizes="image:1x32, text:1x32, fusion:1, decoder:1"),
    "Dlip": dict(student="image:1x16, text:1x16", queue=16),
}


@pytest.fixture
def given(scenes, tiny_teacher, tiny_blip, tmp_path):
    def parameters(method, **changes):
        teacher = tiny_blip if method in BLIPS else tiny_teacher
        job = tiny_job(scenes, teacher, tmp_path / "run", method, **(TWO_TOWERS | BLIPS)[method] | changes)
        if method == "BlipTraining":
            del job["teacher"], job["compare_scratch"]
        return job

    return parameters


CASES = [(method, changes) for method in TWO_TOWERS for changes in ({}, dict(micro_batch=3))]
CASES += [(method, dict(teacher_features="stored")) for method in TWO_TOWERS if method != "Contrastive"]
CASES += [("TinyCLIP", dict(inheritance="auto", gate_share=0.99, steps=6))]
CASES += [(method, changes) for method in BLIPS for changes in ({}, dict(micro_batch=3))]
CASES += [("BlipTraining", dict(tasks="captioning")), ("Dlip", dict(losses="decoder=1, answering=1"))]


@pytest.mark.parametrize(("method", "changes"), CASES, ids=str)
def test_a_step_waits_for_nothing_and_brings_its_numbers_once_and_late(method, changes, given, monkeypatch):
    step, settle, launched, settled = trainers.take_step, trainers.loop._settle, [], []

    def counted(loop, batch):
        with count_waits() as places:
            taken = step(loop, batch)
        launched.append(places)
        return taken

    def counting(loop):
        due = [line.before["step"] for line in loop.late]
        with count_waits() as places:
            settle(loop)
        if due:
            settled.append((due, len(launched), places.total()))

    monkeypatch.setattr(trainers.loop, "take_step", counted)
    monkeypatch.setattr(trainers.loop, "_settle", counting)
    job = open_job(method, given(method, **dict(steps=5, validate_every=100, keep_snapshots=0, keep_checkpoints=0) | changes))
    train(job)
    if "gate_share" in changes:  # five steps of gates, and one of the student that is cut out
        del launched[5:], settled[5:]
    assert len(launched) == 5 and [places.total() for places in launched[1:]] == [0] * 4, launched
    # the first step's numbers are read after the second has been launched, and so on; at the end none is left
    assert settled == [([1], 2, 1), ([2], 3, 1), ([3], 4, 1), ([4], 5, 1), ([5], 5, 1)]
    assert [line["step"] for line in job.run.metrics() if "total" in line][:5] == [1, 2, 3, 4, 5]


def toy_batches(start):
    while True:
        random = torch.Generator().manual_seed(start)
        yield Batch(torch.randn(4, 3, 32, 32, generator=random), torch.randint(0, 400, (4, 24), generator=random))
        start += 1


def toy_fit(folder, objective=None, batches=toy_batches, steps=6, validate=None, **options):
    "A contrastive fit of a few steps; its run"
    options = FitParameters(**dict(steps=steps, warmup=1, batch_size=4, keep_snapshots=0, keep_checkpoints=0, validate_every=2) | options)
    learner = Learner(new_model(TINY, seed=1).model)
    accelerator = Accelerator(cpu=True)
    with RunWriter(folder) as run:
        objective = objective or Objective({"contrastive": 1.0})
        fit(run, Phase("stage-1", "contrast", steps), learner, objective, batches, options, accelerator, validate=validate)
    return run


def entries(folder):
    return [(line.get("event", "step"), line["step"]) for line in lines_of(folder)]


def test_lines_stand_in_the_order_in_which_things_happened(tmp_path):
    run = Run(tmp_path / "run")

    def batches(start):
        for step, batch in enumerate(toy_batches(start), start):
            if step == 3:
                run.control(learning_rate_factor=0.5)
            yield batch

    toy_fit(tmp_path / "run", batches=batches, validate=lambda: {"score": 1.0})
    expected = [("validation", 0), ("step", 1), ("step", 2), ("validation", 2), ("step", 3), ("step", 4), ("validation", 4)]
    assert entries(run.folder) == [*expected, ("control", 4), ("step", 5), ("step", 6), ("validation", 6)]
    assert len({line["seconds"] for line in run.metrics() if "total" in line}) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, "stop"], ids=str)
def test_nothing_is_lost_when_a_fit_ends_before_its_end(error, tmp_path):
    whole = lines_of(toy_fit(tmp_path / "whole").folder)

    def batches(start):
        for step, batch in enumerate(toy_batches(start), start):
            if step == 3 and start == 0:
                if error != "stop":
                    raise error
                Run(tmp_path / "run").control(stop=True)
            yield batch

    with pytest.raises(RunStopped if error == "stop" else error):
        toy_fit(tmp_path / "run", batches=batches, checkpoint_seconds=1000.0)
    taken = 4 if error == "stop" else 3
    assert lines_of(tmp_path / "run") == whole[:taken], "every step that was taken has its line"
    Run(tmp_path / "run").control(stop=False)
    assert lines_of(toy_fit(tmp_path / "run").folder) == whole, "and continued it ends as if undisturbed"


def broken_from(step):
    "An objective that is no number from a step on"
    calls = []

    def loss(student, teacher):
        calls.append(0)
        value = LOSSES["contrastive"].function(student, teacher)
        return value * (math.nan if len(calls) > step + 1 else 1.0)  # one call more finds out what the loss reaches

    return Objective({}, Term("broken", loss, weight=1.0, needs_teacher=False))


@pytest.mark.parametrize("validate_every", [1, 3, 100])
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1000.0])
def test_divergence_names_its_step_and_writes_no_line_behind_it(validate_every, checkpoint_seconds, tmp_path):
    validated = []
    with pytest.raises(Diverged, match=r"became nan at step 3 \(stage-1/contrast\): not finite: broken"):
        settings = dict(validate_every=validate_every, checkpoint_seconds=checkpoint_seconds)
        toy_fit(tmp_path / "run", broken_from(2), validate=lambda: validated.append(1) or {}, **settings)
    steps = [line["step"] for line in Run(tmp_path / "run").metrics() if "total" in line]
    assert steps == [1, 2, 3] and len(validated) == (3 if validate_every == 1 else 1)
    state = torch.load(tmp_path / "run/stage-1/contrast/checkpoint.pt", weights_only=True)
    assert state["step"] == (2 if checkpoint_seconds == 0 else 0), "what is broken is no checkpoint"
    assert all(weight.isfinite().all() for weight in state["learner"].values())


def test_divergence_is_told_where_the_next_step_fails_of_it(tmp_path, monkeypatch):
    step = trainers.take_step

    def fails(loop, batch):
        if loop.step == 3:
            raise RuntimeError("probability tensor contains nan")
        return step(loop, batch)

    monkeypatch.setattr(trainers.loop, "take_step", fails)
    with pytest.raises(Diverged, match="at step 3") as raised:
        toy_fit(tmp_path / "run", broken_from(2), validate_every=100)
    assert isinstance(raised.value.__cause__, RuntimeError)


class Broken(LateNumbers):
    def _read(self):
        raise RuntimeError("the device is gone")


def test_a_device_that_cannot_be_asked_does_not_hide_why(tmp_path, monkeypatch):
    step = trainers.take_step

    def fails(loop, batch):
        if loop.step == 2:
            loop.late = [LateLine(loop.late[0].before, Broken({"total": 1.0}), {})]
            raise MemoryError("out of memory")
        return step(loop, batch)

    monkeypatch.setattr(trainers.loop, "take_step", fails)
    with pytest.raises(MemoryError):
        toy_fit(tmp_path / "run", validate_every=100)
    assert entries(tmp_path / "run") == [("step", 1)]


HEARD = """
import json, sys, time
from types import SimpleNamespace
import torch
import torch.distributed as dist
from accelerate import utils
from vlkd_lab import trainers
from vlkd_lab.runs import RunStopped

pickled, sent, rates, order = [], [], [], []
real = dist.broadcast
dist.broadcast = lambda tensor, *given, **settings: sent.append((len(rates), tensor.numel(), str(tensor.dtype))) or real(tensor, *given, **settings)
step = trainers.take_step


def watched(loop, batch):
    if loop.accelerator.is_main_process:
        if loop.step == 3:
            loop.run.control(learning_rate_factor=0.5, weights={"contrastive": 2.0})
        if loop.step == 8:
            loop.run.control(pause=True)
            order.append(("paused", loop.step))
        if loop.step == 15:
            loop.run.control(stop=True)
    taken = step(loop, batch)
    rates.append((loop.step, loop.factor, loop.objective.weights["contrastive"]))
    return taken


def goes_on(seconds):
    order.append(("waits", rates[-1][0]))
    if job.accelerator.is_main_process:
        job.run.control(pause=False)


trainers.loop.take_step = watched
trainers.loop.time = SimpleNamespace(sleep=goes_on, monotonic=time.monotonic, perf_counter=time.perf_counter)
job = trainers.open_job("Distil", json.loads(sys.argv[1]))  # before the first step the processes compare what they were given
dist.broadcast_object_list = dist.all_gather_object = dist.scatter_object_list = lambda *given, **settings: pickled.append(1)
ended = ""
try:
    trainers.train(job)
except RunStopped as error:
    ended = str(error)
rank = job.accelerator.process_index
told = dict(pickled=len(pickled), sent=sent, rates=rates, order=order, ended=ended)
open(sys.argv[2] + f"/rank-{rank}.json", "w").write(json.dumps(told))
"""


def test_two_processes_hear_of_changes_before_the_same_step_and_send_a_byte_a_step(given, tmp_path):
    (tmp_path / "job.py").write_text(HEARD)
    job = given("Distil", steps=40, losses="affinity_mimicking=1, contrastive=1", keep_snapshots=0, keep_checkpoints=0, validate_every=100)
    forked.run(str(tmp_path / "job.py"), json.dumps(job), str(tmp_path), processes=2)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["pickled"] == second["pickled"] == 0, "no collective of pickles"
    assert first["rates"] == second["rates"] and first["ended"] == second["ended"] == "stopped at step 17 of student/distil"
    assert [step for step, _, _ in first["rates"]] == list(range(17))
    changed = [step for step, factor, weight in first["rates"] if factor == 0.5 and weight == 2.0]
    assert changed == list(range(5, 17)), "two steps after the request"
    assert ("waits", 9) in map(tuple, first["order"]) and ("waits", 9) in map(tuple, second["order"]), "both wait before one step"
    quiet = [size for at, size, kind in first["sent"] if at in (1, 2, 6, 7, 11, 12, 13)]
    assert quiet == [1] * 7, "one byte a step while nothing changes"
    assert all(kind == "torch.uint8" for at, size, kind in first["sent"] if at in (1, 2, 6, 7))
    events = [line for line in Run(job["out"]).metrics() if line.get("event") == "control"]
    assert [(line["step"], line["learning_rate_factor"], line["weights"]) for line in events] == [(5, 0.5, {"contrastive": 2.0})]
    assert [line["step"] for line in Run(job["out"]).metrics() if "total" in line] == list(range(1, 18))
    assert not any("called" in line for line in Run(job["out"]).metrics())
