"""Before the first step: the run folder says what is being prepared and how far, and the bench's head shows it."""

import os
import socket

import psutil
import pytest
from conftest import tiny_job

from vlkd_lab import runs, stores
from vlkd_lab.runs import Run, RunWriter, preparing
from vlkd_lab.trainers import open_job, train
from vlkd_lab.widgets import attach


@pytest.fixture
def told(monkeypatch):
    "What status.json was told while something was prepared: (state, stage, phase)"
    lines = []
    set_status = RunWriter.set_status

    def note(run, **changes):
        set_status(run, **changes)
        if "stage" in changes and not run.status().get("plan"):
            status = run.status()
            lines.append((status["state"], status.get("stage"), status.get("phase")))

    monkeypatch.setattr(RunWriter, "set_status", note)
    return lines


@pytest.fixture
def job_of(scenes, tiny_teacher, tmp_path):
    def of(method, **changes):
        more = dict(clusters=4) if method == "ClipCid" else dict(sentence_batch=16, teacher_features="stored")
        parameters = dict(features=str(tmp_path / "features")) | more | changes
        return open_job(method, tiny_job(scenes, tiny_teacher, tmp_path / "run", method, **parameters))

    return of


@pytest.mark.parametrize("method, wanted", [("ClipCid", ["the teacher's features of 120 samples", "near pairs of images", "clusters of the teacher's features"]), ("DimeFm", ["the teacher's features of 120 samples"])])
def test_what_is_prepared_before_training_is_told_and_taken_back(method, wanted, job_of, told):
    job = job_of(method)
    if method == "ClipCid":
        assert job.store and job.linkage and job.clusters
    else:
        assert job.source
    stages = [stage for _, stage, _ in told if stage]
    assert list(dict.fromkeys(stages)) == wanted and told[0] == ("preparing", wanted[0], "0%")
    assert job.run.status()["state"] == "new" and job.run.status()["stage"] == ""
    told.clear()
    again = job_of(method)
    assert (again.store if method == "ClipCid" else again.source) and not told, "nothing had to be done"


def test_the_benchs_head_shows_it_and_how_far(job_of, monkeypatch):
    job = job_of("ClipCid")
    heads = []
    encode = stores.encode_shard

    def look(*words, **settings):
        heads.append(attach(job.run.folder, live=False).static().text)
        return encode(*words, **settings)

    monkeypatch.setattr(stores, "encode_shard", look)
    assert job.store
    assert len(heads) == 3 and heads[0].startswith("state: preparing, stage: the teacher's features of 120 samples · 0%")


def test_in_a_job_at_work_the_state_stays(job_of, monkeypatch):
    job = job_of("ClipCid", compare_scratch=False)
    seen = []
    encode = stores.encode_shard

    def look(*words, **settings):
        seen.append(job.run.status())
        return encode(*words, **settings)

    monkeypatch.setattr(stores, "encode_shard", look)
    train(job)
    assert {status["state"] for status in seen} == {"running"} and seen[0]["stage"].startswith("the teacher's features")
    assert job.run.status()["stage"] == "student" and job.run.status()["state"] == "waiting"


def test_who_died_while_preparing_is_lost_and_another_machine_is_believed(tmp_path, monkeypatch):
    run = RunWriter(tmp_path / "run")
    run.set_status(state="preparing", stage="clusters", process=os.getpid(), host=socket.gethostname())
    assert Run(run.folder).status()["state"] == "preparing"
    monkeypatch.setattr(psutil, "pid_exists", lambda number: False)
    assert Run(run.folder).status()["state"] == "lost"
    run.set_status(host="another")
    assert Run(run.folder).status()["state"] == "preparing"


def test_a_run_that_others_write_is_left_alone(tmp_path, monkeypatch):
    with RunWriter(tmp_path / "run") as held:
        held.set_status(process=os.getpid() + 1, stage="student")
        with preparing(RunWriter(held.folder), "clusters") as tell:
            tell(0.5)
            assert held.status()["stage"] == "student" and held.status()["state"] == "running"
    with preparing(Run(held.folder), "clusters") as tell:
        tell(0.5)
    assert held.status()["state"] == "waiting"

    def is_full(run, **changes):
        raise OSError("no space left on device")

    monkeypatch.setattr(runs.RunWriter, "set_status", is_full)
    with preparing(RunWriter(held.folder), "clusters") as tell:
        tell(0.5)
