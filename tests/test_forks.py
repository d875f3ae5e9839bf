"A second run that begins in the middle of a first one: the same numbers, an untouched parent, bounded disk, and what is refused."

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import lines_of, tiny_job
from safetensors.torch import load_file

from vlkd_lab import runs, trainers
from vlkd_lab.export import find_origin, training_rows
from vlkd_lab.runs import Run, kept_checkpoints
from vlkd_lab.trainers import fork, fork_points, forks, open_job, start, start_apart, train
from vlkd_lab.widgets import BenchForks, rows

GATES = dict(stages=2, inheritance="auto", steps=6, compare_scratch=True, keep_checkpoints=1, target_sparsity=0.4)


@pytest.fixture
def given(scenes, tiny_teacher, tmp_path):
    return lambda method, out="run", **changes: tiny_job(scenes, tiny_teacher, tmp_path / out, method, **changes)


def run_of(method, parameters):
    train(open_job(method, parameters))
    return Run(parameters["out"])


def go_on(run):
    "Train a run as its config.json says"
    return run_of(run.config()["method"], run.config()["parameters"])


def by_stage(folder):
    "A run's lines, stage by stage: a stage that was trained in the first run stands elsewhere among them"
    lines = {}
    for line in lines_of(folder):
        lines.setdefault(line["stage"], []).append(line)
    return lines


def weights_of(folder):
    return {p.parent.parent.name: load_file(p) for p in Path(folder).glob("*/student/*model.safetensors")}


def assert_same(one, other):
    "The same numbers and the same students, to the last digit"
    assert by_stage(one.folder) == by_stage(other.folder)
    ours, theirs = weights_of(one.folder), weights_of(other.folder)
    assert ours.keys() == theirs.keys() and ours
    for stage, weights in ours.items():
        assert all(torch.equal(weights[name], theirs[stage][name]) for name in theirs[stage]), stage


def contents(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("links", [True, False])
def test_a_fork_of_gated_stages_gives_the_numbers_of_its_parent(given, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    parent = run_of("TinyCLIP", given("TinyCLIP", **GATES))
    before = contents(parent.folder)
    names = [point.name for point in fork_points(parent)]
    inside = ["stage-1/gates/1", "stage-1/distil/4", "stage-1", "stage-2/gates/7", "stage-2/distil/10"]
    assert names == [*inside, "stage-2", "newest"], "none of a baseline"
    for name in inside if links else inside[-2:]:
        child = fork(parent, tmp_path / name.replace("/", "-"), at=name)
        assert child.status() == {"state": "new"} and child.result() is None
        kept = {path.stem for path, _ in runs.kept_snapshots(child)}
        assert kept <= {path.stem for path, _ in runs.kept_snapshots(parent)}
        has_baseline = (child.folder / "scratch-2" / "done.json").exists()
        assert has_baseline == (name == "stage-2/distil/10"), "it depends on nothing that is still to come"
        assert_same(go_on(child), parent)
        assert contents(parent.folder) == before, name


OWN = {
    "Distil": dict(ema=0.5),
    "ClipCid": dict(clusters=4, removed_share=0.3, map_images=8),
    "DimeFm": dict(sentence_batch=12),
    "Contrastive": dict(image_size=32, vocabulary=300, context_length=24),
}


@pytest.mark.parametrize("method", OWN)
def test_a_fork_of_any_method_gives_the_numbers_of_its_parent(given, tmp_path, method):
    more = OWN[method]
    parent = run_of(method, given(method, steps=6, validate_every=2, **more))
    before = contents(parent.folder)
    for point in fork_points(parent)[:2]:
        child = fork(parent, tmp_path / f"fork-{point.step}", at=point.name)
        assert point.step in (2, 4) and [m["step"] for m in child.metrics() if "total" in m] == list(range(1, point.step + 1))
        assert_same(go_on(child), parent)
    assert contents(parent.folder) == before


def test_a_fork_in_the_midst_of_maps_gives_the_numbers_of_its_parent(given, tmp_path):
    own = dict(inheritance="mapped", map_share=0.7, student_share=0.4, keep_checkpoints=1)
    parent = run_of("Distil", given("Distil", steps=6, validate_every=2, **own))
    before = contents(parent.folder)
    names = [point.name for point in fork_points(parent)]
    assert names == ["student/map/2", "student/distil/5", "student", "newest"]
    for name in names[:2]:
        child = fork(parent, tmp_path / name.replace("/", "-"), at=name)
        assert (child.folder / "student" / "init").exists() == (name == "student/distil/5"), "it depends on nothing that is still to come"
        assert_same(go_on(child), parent)
    assert contents(parent.folder) == before


def test_a_finished_run_takes_more_steps_in_a_fork_as_it_would_itself(given, tmp_path):
    parent = run_of("Distil", given("Distil", compare_scratch=True))
    copy = Path(shutil.copytree(parent.folder, tmp_path / "copy"))
    itself = run_of("Distil", given("Distil", "copy", compare_scratch=True) | dict(steps=6)) if not _moved(copy) else None
    before = contents(parent.folder)
    longer = fork(parent, tmp_path / "longer", steps=6)
    assert_same(go_on(longer), itself)
    assert contents(parent.folder) == before and parent.config()["parameters"]["steps"] == 3
    assert longer.config()["origin"]["begun"] and longer.config()["origin"]["changes"] == {"steps": [3, 6]}
    assert_same(go_on(longer), itself)  # a second start hears of it no more


def _moved(folder):
    "Tell a copied run where it lies"
    config = json.loads((folder / "config.json").read_text())
    config["parameters"]["out"] = str(folder)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_at_work_is_forked_and_never_touched(given, tmp_path):
    parameters = given("Distil", steps=60, validate_every=30, checkpoint_seconds=0.0)
    training = start(open_job("Distil", parameters), beside=True)
    parent = training.job.run
    while sum("total" in line for line in parent.metrics()) < 8:
        time.sleep(0.01)
    children = [fork(parent, tmp_path / f"fork-{number}") for number in range(5)]
    parent.control(pause=True)
    while parent.status()["state"] != "paused":
        time.sleep(0.01)
    before = contents(parent.folder)
    children.append(fork(parent, tmp_path / "paused"))
    assert contents(parent.folder) == before and fork_points(parent)[-1].phase == "distil"
    parent.control(pause=False)
    training.join()
    begun = [child.config()["origin"]["step"] for child in children]
    assert begun == sorted(begun) and begun[0] >= 7 and begun[-1] < 60
    for child in (children[0], children[-1]):
        assert_same(go_on(child), parent)


def test_the_sliders_are_those_of_now_or_those_of_then(given, tmp_path):
    job = open_job("Distil", given("Distil", steps=6, losses="affinity_mimicking=1, contrastive=1"))
    step, taken = trainers.take_step, []

    def asks(loop, batch):
        taken.append(loop.step)
        if loop.step == 3:
            job.run.control(learning_rate_factor=0.5, weights={"contrastive": 0.25})
        return step(loop, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers.loop, "take_step", asks)
        train(job)
    at = "student/distil/2"
    now, then = fork(job.run, tmp_path / "now", at), fork(job.run, tmp_path / "then", at, sliders="then")
    assert now.requested() == {"learning_rate_factor": 0.5, "weights": {"contrastive": 0.25}} and then.requested() == {}
    other = fork(job.run, tmp_path / "other", at, controls={"weights": {"contrastive": 0}})
    assert other.requested() == {"learning_rate_factor": 0.5, "weights": {"contrastive": 0}}
    events = [[m for m in go_on(child).metrics() if m.get("event") == "control"] for child in (now, then, other)]
    assert [[event["step"] for event in one] for one in events] == [[2], [], [2]]
    undisturbed = run_of("Distil", given("Distil", "undisturbed", steps=6, losses="affinity_mimicking=1, contrastive=1"))
    assert_same(then, undisturbed)


def test_what_steers_is_heard_of_and_the_baseline_trained_anew(given, tmp_path):
    parent = run_of("Distil", given("Distil", steps=6, compare_scratch=True, learning_rate=1e-3, weight_decay=0.1))
    child = go_on(fork(parent, tmp_path / "fork", "student/distil/2", learning_rate=2e-3, weight_decay=0.5))
    ours, theirs = (by_stage(run.folder)["student"] for run in (child, parent))
    rates = [(a["learning_rate"], b["learning_rate"]) for a, b in zip(ours, theirs, strict=True) if "total" in a]
    assert all(a == b for a, b in rates[:2]) and all(a == pytest.approx(2 * b) for a, b in rates[2:])
    assert by_stage(child.folder)["scratch"] != by_stage(parent.folder)["scratch"]
    only_decay = go_on(fork(parent, tmp_path / "decay", "student/distil/2", weight_decay=0.5))
    assert by_stage(only_decay.folder)["student"] != theirs, "AdamW has the fork's decay, and not its checkpoint's"
    saved = torch.load(child.folder / "student/distil/checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [(group["peak"], group["weight_decay"]) for group in saved] == [(2e-3, 0.5), (2e-3, 0.0)]


def test_a_fork_of_a_fork_whose_parents_are_deleted_goes_on(given, tmp_path):
    parent = run_of("Distil", given("Distil", steps=9, keep_checkpoints=3))
    child = fork(parent, at="student/distil/3")
    assert child.folder == tmp_path / "run-fork-1" and fork(parent).folder.name == "run-fork-2"
    lines = by_stage(parent.folder)
    shutil.rmtree(parent.folder)
    go_on(child)
    grandchild = fork(child, tmp_path / "third", at="student/distil/6")
    shutil.rmtree(child.folder)
    assert by_stage(go_on(grandchild).folder) == lines
    assert grandchild.config()["origin"]["name"] == "run-fork-1" and len(grandchild.config()["id"]) == 32
    rows = dict(training_rows(find_origin(grandchild.folder)))
    assert rows["origin"].startswith("forked from run") and "step 6" in rows["origin"]


PROGRAM = """
import json, sys
from vlkd_lab.trainers import open_job, train
for given in json.loads(sys.argv[1]):
    train(open_job("Distil", given))
"""


@pytest.mark.parametrize("fsdp", [False, True])
def test_runs_of_two_processes_are_forked(given, tmp_path, fsdp):
    (tmp_path / "train.py").write_text(PROGRAM)

    def in_two(parameters):
        forked.run(str(tmp_path / "train.py"), json.dumps([parameters]), processes=2)

    in_two(given("Distil", steps=6, processes=2, fsdp=fsdp, ema=0.5))
    parent = Run(tmp_path / "run")
    assert [point.name for point in fork_points(parent)][:2] == ["student/distil/2", "student/distil/4"]
    child = fork(parent, tmp_path / "fork", at="student/distil/4")
    in_two(child.config()["parameters"])
    assert_same(child, parent)


def test_killed_in_the_middle_of_forking_nothing_looks_like_a_run(given, tmp_path, monkeypatch):
    parent = run_of("Distil", given("Distil", steps=6))
    parent = Run(shutil.move(parent.folder, tmp_path / "runs" / "parent")) if (tmp_path / "runs").mkdir() is None else parent
    moments = ["_take_stages", "_take_records", "_origin", "write_text"]
    for number, name in enumerate(moments):
        dies = multiprocessing.get_context("fork").Process(target=_dies_in, args=(parent.folder, tmp_path / f"runs/{number}", name))
        dies.start()
        dies.join()
        assert dies.exitcode == 9
    assert [run.folder.name for run in runs._runs_under(tmp_path / "runs")] == ["parent"]
    monkeypatch.setattr(forks, "_take_records", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        fork(parent, tmp_path / "runs" / "full")
    assert not [path for path in (tmp_path / "runs").iterdir() if "full" in path.name], "a failure leaves nothing"
    monkeypatch.undo()
    assert fork(parent, tmp_path / "runs" / "0").folder.name == "0"


def _dies_in(parent, out, name):
    setattr(forks, name, lambda *_: os._exit(9))
    fork(parent, out)


HOSTILE = ["<img src=x onerror=alert(1)>", "a b'c\"d", "ünïcode ‮ x", "--help", "per%cent {brace}"]


def test_a_run_may_have_any_name(given, tmp_path):
    parent = run_of("Distil", given("Distil"))
    for name in HOSTILE:
        child = fork(parent, tmp_path / name)
        assert child.folder.name == name and fork_points(child)[-1].step == 3
        assert forks.fork(child, at="newest").config()["origin"]["name"] == name


def test_the_disk_is_bounded_and_keeping_nothing_keeps_nothing(given, tmp_path):
    parent = run_of("Distil", given("Distil", steps=12, keep_checkpoints=3, compare_scratch=True))
    assert [about["step"] for _, about in kept_checkpoints(parent)] == [3, 6, 9]
    run_of("Distil", given("Distil", compare_scratch=True) | dict(steps=40, keep_checkpoints=3))
    steps = [about["step"] for _, about in kept_checkpoints(parent)]
    assert len(steps) == 3 and steps[-1] == 30, steps
    none = run_of("Distil", given("Distil", "none", steps=6, keep_checkpoints=0))
    assert not kept_checkpoints(none) and [p.name for p in fork_points(none)] == ["student", "newest"]
    files = [p for p in parent.folder.rglob("*.pt") if "kept" in p.parts]
    assert len(files) == 3, "none of the baseline"


def test_a_checkpoint_that_cannot_be_kept_ends_no_training(given, monkeypatch):
    monkeypatch.setattr(runs, "link_or_copy", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    run = run_of("Distil", given("Distil", steps=6))
    assert run.status()["state"] == "waiting" and not kept_checkpoints(run)
    assert any("could not be kept" in warning for warning in run.status()["warnings"])


def test_a_fork_is_started_in_a_process_of_its_own(given, tmp_path):
    parent = run_of("Distil", given("Distil", steps=6))
    child = fork(parent, tmp_path / "fork", at="student/distil/4")
    assert start_apart(child).wait(300) == 0, (child.folder / "output.log").read_text()[-2000:]
    assert_same(child, parent)


def test_a_bench_asks_a_job_at_work_for_a_checkpoint_and_forks_there(given):
    "The checkpoints in between are seldom: without the request the fork would begin at step 0"
    training = start(open_job("Distil", given("Distil", steps=400, validate_every=400, keep_checkpoints=0)), beside=True)
    parent = training.job.run
    try:
        while sum("total" in line for line in parent.metrics()) < 5:
            time.sleep(0.01)
        parent.control(learning_rate_factor=0.25)
        asked = BenchForks(parent)
        asked.ask()
        asked.ask()  # a second press while it waits is the same wish
        at = sum("total" in line for line in parent.metrics())
        deadline = time.monotonic() + 60
        while asked.waits and time.monotonic() < deadline:
            asked.look()
            time.sleep(0.01)
        origin = asked.child.config()["origin"]
        assert origin["step"] >= at > 0 and origin["controls"] == {"learning_rate_factor": 0.25} and not asked.problem
        assert sum("total" in line for line in asked.child.metrics()) == origin["step"]
        assert training.alive and parent.status()["state"] == "running" and len(list(parent.folder.parent.glob("run-fork-*"))) == 1
    finally:
        parent.control(stop=True)
        training.join()
    assert {row.state for row in asked.family.rows.values()} == {"running", "new"} and asked.look() is False
    asked._looked = 0
    assert asked.look() and {row.state for row in asked.family.rows.values()} == {"stopped", "new"}


def test_a_run_of_somebody_else_is_forked_at_its_newest_checkpoint(given, monkeypatch):
    parent = run_of("Distil", given("Distil", steps=4))
    monkeypatch.setattr(Run, "control", lambda *_, **__: (_ for _ in ()).throw(PermissionError("not yours")))
    monkeypatch.setattr(Run, "status", lambda self: {"state": "running"})
    monkeypatch.setattr(rows, "ANSWER_SECONDS", 0.0)
    asked = BenchForks(parent)
    asked.ask()
    time.sleep(0.01)
    assert asked.look() and "not answered" in asked.note and asked.child.config()["origin"]["step"] == 4
    assert asked.look() is False, "the family is not read again at once"


def test_a_family_is_found_whatever_else_lies_beside_it(given, tmp_path):
    parent = run_of("Distil", given("Distil", steps=4))
    child = fork(parent, at="newest")
    shutil.copytree(parent.folder, tmp_path / "half" / "run")
    (tmp_path / "half" / "config.json").write_text('{"method": "Dis')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for run in (parent, child):
        family = rows.Family(run)
        family.look()
        assert set(family.rows) == {"run", "run-fork-1"}, run
    read = family.read
    family.look()
    assert family.read == read
    config = json.loads((child.folder / "config.json").read_text())
    (child.folder / "config.json").write_text(json.dumps(config | {"origin": {"id": config["id"], "run": str(child.folder)}}))
    family.look()
    assert set(family.rows) == {"run-fork-1"}, "two that name each other have no end"
