"""A job tells real trackers what its run folder says: TensorBoard's event files, an MLflow store, Weights & Biases offline."""

import json
import os
import shutil
import time

import forked
import numpy as np
import pytest
from conftest import lines_of

from vlkd_lab import trackers
from vlkd_lab.runs import Run
from vlkd_lab.trackers import Reporter, named_trackers
from vlkd_lab.trainers import FREE, loop, open_job, train

STEPS = 4


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "Where trackers that live elsewhere keep what they are told, in this environment and in processes started from it"
    folder = tmp_path_factory.mktemp("places")
    before = dict(os.environ)
    os.environ.update(MLFLOW_TRACKING_URI=f"file://{folder}/mlruns", WANDB_MODE="offline", WANDB_SILENT="true")
    os.environ.update(WANDB_DIR=str(folder), MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ALLOW_FILE_STORE="true")
    yield folder
    os.environ.clear()
    os.environ.update(before)


def options(scenes, teacher, out, **changes):
    data = dict(data=str(scenes / "train-000000.tar"), val=str(scenes / "val-000000.tar"), teacher=str(teacher), out=str(out))
    small = dict(device="cpu", steps=STEPS, batch_size=8, validate_pairs=16, validate_every=2, warmup=1, probe_pairs=8)
    return data | small | dict(keep_snapshots=STEPS, checkpoint_seconds=0.0) | changes


@pytest.fixture(scope="module")
def told(scenes, tiny_teacher, places, tmp_path_factory):
    "A run of two stages whose job told TensorBoard"
    out = tmp_path_factory.mktemp("runs") / "told"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trackers, "REPORT_SECONDS", 0.05)
        train(open_job("Distil", options(scenes, tiny_teacher, out, report_to="tensorboard")))
    return Run(out)


def events(folder):
    "Numbers and pictures in event files, by name"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    scalars = {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}
    return scalars, {name: read.Images(name) for name in read.Tags()["images"]}


def test_event_files_hold_what_the_metrics_say(told):
    scalars, images = events(told.folder / "trackers" / "tensorboard")
    for stage, before in (("student", 0), ("scratch", STEPS)):
        lines = [line for line in told.metrics() if line["stage"] == stage and "total" in line]
        assert [step for step, _ in scalars[f"{stage}/total"]] == [before + line["step"] for line in lines]
        assert np.allclose([value for _, value in scalars[f"{stage}/total"]], [line["total"] for line in lines])
        scores = [line for line in told.metrics() if line["stage"] == stage and line.get("event") == "validation"]
        of_tracker = scalars[f"{stage}/validation/image_to_text_r1"]
        assert of_tracker == [(before + line["step"], pytest.approx(line["image_to_text_r1"])) for line in scores]
    shown = [image for pictures in images.values() for image in pictures]
    assert shown and {(image.height, image.width) for image in shown} == {(32, 72)}, "8 × 8 cosines of student and teacher"


def test_what_is_told_changes_nothing(scenes, tiny_teacher, told, tmp_path):
    train(open_job("Distil", options(scenes, tiny_teacher, tmp_path / "quiet")))
    assert lines_of(tmp_path / "quiet") == lines_of(told.folder)
    assert not (tmp_path / "quiet" / "trackers.json").exists() and "report_to" in FREE


def test_a_run_that_goes_on_is_told_once(scenes, tiny_teacher, told):
    train(open_job("Distil", options(scenes, tiny_teacher, told.folder, report_to="tensorboard", steps=STEPS + 2)))
    scalars, _ = events(told.folder / "trackers" / "tensorboard")
    lines = [line for line in told.metrics() if "total" in line and line["stage"] == "student"]
    values = [value for _, value in scalars["student/total"]]
    assert len(values) == len(lines) == STEPS + 2
    assert np.allclose(values, [line["total"] for line in lines])


def test_a_run_of_elsewhere_is_told_from_the_command_line(told, tmp_path):
    copy = shutil.copytree(told.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("trackers*"))
    forked.run("-m", "vlkd_lab.trackers", str(copy), "tensorboard")
    scalars, images = events(copy / "trackers" / "tensorboard")
    told_live, _ = events(told.folder / "trackers" / "tensorboard")
    assert scalars == told_live and images


def test_mlflow_has_parameters_numbers_and_pictures(told, places):
    import mlflow

    assert trackers.tell([str(told.folder), "mlflow"]) == 0
    (run,) = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name(trackers.PROJECT).experiment_id])
    assert run.data.params["teacher"] == told.config()["parameters"]["teacher"] and run.info.run_name == told.folder.name
    lines = [line for line in told.metrics() if "total" in line and line["stage"] == "student"]
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "student/total")
    assert [one.value for one in sorted(history, key=lambda one: one.step)] == pytest.approx([line["total"] for line in lines])
    assert list((told.folder / "trackers").glob("*-affinities-*.png"))


def test_wandb_offline_keeps_a_record(told, places):
    reporter = Reporter(told, ["wandb"])
    assert reporter.report() == len([line for line in told.metrics() if trackers.tracked_values(line)])
    assert reporter.show(now=0.0)
    summary = dict(reporter.trackers["wandb"].tracker.summary)
    reporter.close()
    last = [line for line in told.metrics() if "total" in line][-1]
    assert summary[f"{last['stage']}/total"] == pytest.approx(last["total"])
    assert list((told.folder / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads((told.folder / "trackers.json").read_text())["wandb"]["id"]
    again = Reporter(told, ["wandb"])
    assert again.report() == 0, "what has been told is not told again"
    again.close()


def test_a_job_tells_several_at_once_while_it_trains(scenes, tiny_teacher, places, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setattr(trackers, "REPORT_SECONDS", 0.05)
    looks = []
    report, step = Reporter.report, loop.take_step
    monkeypatch.setattr(Reporter, "report", lambda reporter: looks.append(report(reporter)) or looks[-1])
    monkeypatch.setattr(loop, "take_step", lambda *given: time.sleep(0.8) or step(*given))
    given = options(scenes, tiny_teacher, tmp_path / "several", report_to="mlflow, wandb,tensorboard", compare_scratch=False)
    job = open_job("Distil", given)
    train(job)
    assert not any("told no more" in warning for warning in job.run.status()["warnings"])
    lines = [line for line in job.run.metrics() if trackers.tracked_values(line)]
    assert sum(looks) == len(lines) and sum(map(bool, looks)) > 1, "while it trains, and not only at its end"
    state = json.loads((job.run.folder / "trackers.json").read_text())
    assert {name: told["told"] for name, told in state.items()} == dict.fromkeys(state, {"student/": STEPS, "student/validation": STEPS})
    totals = mlflow.MlflowClient().get_metric_history(state["mlflow"]["id"], "student/total")
    assert [one.value for one in sorted(totals, key=lambda one: one.step)] == pytest.approx([one["total"] for one in lines if "total" in one])
    assert list((job.run.folder / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert list((job.run.folder / "trackers" / "tensorboard").glob("events*"))


@pytest.mark.parametrize("report_to", ["tensorbord", "tensorboard, nothing"])
def test_an_unknown_tracker_is_refused_before_anything_else(scenes, tiny_teacher, tmp_path, report_to):
    with pytest.raises(ValueError, match="valid: tensorboard, wandb, mlflow"):
        open_job("Distil", options(scenes, tiny_teacher, tmp_path / "run", report_to=report_to))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", "no_such_package_here")
    with pytest.raises(ValueError, match="pip install no_such_package_here"):
        named_trackers("wandb")


def test_a_server_that_cannot_be_reached_stops_nothing(scenes, tiny_teacher, tmp_path, monkeypatch):
    def refuses(*_):
        raise ConnectionError("no server")

    monkeypatch.setattr(trackers, "_start", refuses)
    job = open_job("Distil", options(scenes, tiny_teacher, tmp_path / "run", report_to="tensorboard", compare_scratch=False))
    train(job)
    assert (tmp_path / "run" / "student" / "done.json").exists()
    assert any("told no more: ConnectionError: no server" in warning for warning in job.run.status()["warnings"])
