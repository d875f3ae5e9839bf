"""What is done for viewers ends no training: snapshots, probes, shares, trackers, requests; and what is no number is divergence."""

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
import torch
from conftest import lines_of, tiny_job

from vlkd_lab import runs, trainers
from vlkd_lab.runs import Run, RunWriter, for_viewers
from vlkd_lab.shown import ProgressLine
from vlkd_lab.trainers import Diverged, Learner, open_job, take_step, train
from vlkd_lab.widgets import attach

METHODS = ("TinyCLIP", "ClipCid", "DimeFm", "Dlip", "Distil", "Contrastive")


@pytest.fixture
def parameters(scenes, tiny_teacher, tiny_blip, tmp_path):
    "Of a job of any method that takes a second"

    def of(method, name, **changes):
        more = {
            "TinyCLIP": dict(stages=1, steps=6),
            "ClipCid": dict(clusters=4),
            "DimeFm": dict(sentence_batch=16),
            "Dlip": dict(teacher=str(tiny_blip), student="image:1x16, text:1x16", queue=16),
        }
        return tiny_job(scenes, tiny_teacher, tmp_path / name, method, **more.get(method, {}) | changes)

    return of


@pytest.fixture
def always_watched(monkeypatch):
    "Somebody watches, and a snapshot is due at every step"
    monkeypatch.setattr(runs, "SNAPSHOT_SECONDS", 0.0)
    monkeypatch.setattr(runs, "SNAPSHOT_SHARE", 1e9)
    monkeypatch.setattr(runs, "is_watched", lambda run: True)


@pytest.mark.parametrize("method", METHODS)
def test_a_learning_rate_of_a_thousand_is_divergence_in_every_method(method, parameters, always_watched):
    changes = dict(gate_learning_rate=1000.0) if method == "TinyCLIP" else {}
    given = parameters(method, "run", learning_rate=1000.0, keep_snapshots=100, **changes | dict(steps=30))
    with pytest.raises(Diverged, match="try a smaller learning_rate"):
        train(open_job(method, given))
    status = Run(given["out"]).status()
    assert status["state"] == "failed" and status["error"].startswith("Diverged: ")
    assert any(warning.startswith("training diverged: ") for warning in status["warnings"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench = attach(given["out"], live=False)
        assert bench.static()._repr_mimebundle_(), "and the bench shows it, every part"


@pytest.fixture
def broken_views(monkeypatch):
    "Every array of the views fails, as with a number that is not finite; so do probes and shares"

    def fails(*_, **__):
        raise ValueError("cannot convert float NaN to integer")

    monkeypatch.setattr(trainers.loop, "_arrays", fails)
    monkeypatch.setattr(trainers.jobs.data, "thumbnail", fails)
    monkeypatch.setattr(Learner, "shares", fails)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ClipCid"])
def test_views_that_fail_change_nothing_of_a_training(method, parameters, always_watched, monkeypatch, request):
    whole = parameters(method, "whole")
    train(open_job(method, whole))
    given = parameters(method, "broken")
    request.getfixturevalue("broken_views")
    job = open_job(method, given)
    job.run.control(gradient_share=True)
    train(job)
    told = Run(given["out"]).status()["warnings"]
    assert sum(warning.startswith("no snapshot could be taken: ValueError") for warning in told) == 1
    assert any(warning.startswith("the pairs that the views draw could not be prepared: ") for warning in told)
    lines = [line for line in lines_of(given["out"]) if line.get("event") != "gradient_share"]
    assert Run(given["out"]).status()["state"] == "waiting" and lines == lines_of(whole["out"])


@pytest.mark.parametrize("changes", [dict(ema=0.5), dict(micro_batch=4), dict(checkpoint_seconds=0.0)])
def test_weights_are_their_own_again_where_a_view_has_failed(changes, parameters, always_watched, monkeypatch):
    "A view runs with an average's weights, in evaluation: it fails in the middle of that"
    whole = parameters("Distil", "whole", **changes)
    train(open_job("Distil", whole))
    encode = trainers.learner.encode_sides
    counts = {"failed": 0}

    def fails_for_views(model, image, text):
        if not torch.is_grad_enabled() and not model.training and len(image) == 4:  # the probe
            counts["failed"] += 1
            raise RuntimeError("out of memory")
        return encode(model, image, text)

    monkeypatch.setattr(trainers.learner, "encode_sides", fails_for_views)
    given = parameters("Distil", "broken", **changes)
    train(open_job("Distil", given))
    assert counts["failed"] >= 3 and lines_of(given["out"]) == lines_of(whole["out"])


@pytest.mark.parametrize("method", ["TinyCLIP", "DimeFm"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_into_which_no_view_can_be_written_ends_nothing(method, processes, parameters, tmp_path):
    "As on a full disk: a file stands where snapshots and a tracker's records would go"
    pytest.importorskip("tensorboard")
    given = parameters(method, "run", report_to="tensorboard", processes=processes)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("snapshots", "trackers"):
        (folder / name).write_text("in the way")
    words = [f"{name}={value}" for name, value in given.items() if name != "out"]
    forked.run("-m", "vlkd_lab.trainers", str(folder), f"method={method}", *words, processes=processes)
    status = Run(folder).status()
    assert status["state"] == "waiting"
    for start in ("no snapshot could be taken: ", "tensorboard are told no more: "):
        assert sum(start in warning for warning in status["warnings"]) == 1, status["warnings"]


def test_two_processes_that_diverge_say_so(parameters, tmp_path):
    given = parameters("TinyCLIP", "run", learning_rate=1000.0, gate_learning_rate=1000.0, steps=30, processes=2)
    words = [f"{name}={value}" for name, value in given.items() if name != "out"]
    started = forked.start("-m", "vlkd_lab.trainers", given["out"], "method=TinyCLIP", *(w for w in words if "processes" not in w))
    started.join(300)
    alone = Run(given["out"]).status()["error"]
    both = parameters("TinyCLIP", "both", learning_rate=1000.0, gate_learning_rate=1000.0, steps=30, processes=2)
    job = open_job("TinyCLIP", both)
    with pytest.raises(RuntimeError, match="Diverged: .*try a smaller learning_rate"):
        train(job)
    assert alone.startswith("Diverged: ") and Run(both["out"]).status()["error"].startswith("Diverged: ")


def test_a_gradient_that_is_not_finite_is_divergence_but_not_in_fp16(parameters, monkeypatch):
    "A loss may be finite where its gradient is not; fp16 leaves such a step out by itself"
    step = take_step

    def overflows(loop, batch):
        terms, *features = step(loop, batch)
        if loop.step == 1:
            return trainers.LateNumbers(dict(terms) | {"gradient_norm": torch.tensor(torch.inf)}), *features
        return terms, *features

    monkeypatch.setattr(trainers.loop, "take_step", overflows)
    with pytest.raises(Diverged, match=r"the norm of the gradient became inf at step 2 \(student/distil\): try"):
        train(open_job("Distil", parameters("Distil", "run")))
    train(open_job("Distil", parameters("Distil", "half", precision="fp16")))


@pytest.mark.parametrize("when", [1, 3])
def test_a_weight_that_is_no_number_is_found_at_validation(when, parameters, monkeypatch):
    constrain = Learner.constrain
    count = {"steps": 0}

    def spoils(learner, log_scale):
        constrain(learner, log_scale)
        count["steps"] += 1
        if count["steps"] == when:
            with torch.no_grad():
                learner.model.visual.proj[0, 0] = torch.nan

    monkeypatch.setattr(Learner, "constrain", spoils)
    given = parameters("Distil", "run", validate_every=1, compare_scratch=False)
    with pytest.raises(Diverged, match=f"at step {when} .*visual.proj; try a smaller learning_rate"):
        train(open_job("Distil", given))
    events = [line["step"] for line in Run(given["out"]).metrics() if line.get("event") == "validation"]
    assert events == list(range(when)), "what was scored before stays"


@pytest.mark.parametrize("text", ["{", "[]", '{"checkpoint": "now"}', '{"stop": "please", "pause": 1}', "\udcff"])
def test_a_slip_of_the_hand_in_control_json_ends_nothing(text, parameters, monkeypatch):
    job = open_job("Distil", parameters("Distil", "run"))
    step = take_step

    def types(loop, batch):
        (loop.run.folder / "control.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        return step(loop, batch)

    monkeypatch.setattr(trainers.loop, "take_step", types)
    train(job)
    assert job.run.status()["state"] == "waiting" and len(job.run.metrics()) >= 3


def test_a_failure_is_told_once_and_never_raises(tmp_path):
    with RunWriter(tmp_path / "run") as run:
        for number in range(3):
            with for_viewers(run, "no picture"):
                raise OSError(f"disk {number}")
        with for_viewers(Run(run.folder), "of another process"):
            raise ValueError
        assert run.status()["warnings"] == ["no picture: OSError: disk 0"]
        text = (run.folder / "status.json").read_text()
        (run.folder / "status.json").write_text("{")
        with for_viewers(run, "no table"):
            raise ValueError
        (run.folder / "status.json").write_text(text)
    with pytest.raises(KeyboardInterrupt), for_viewers(run, "who stops it is obeyed"):
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "waiting" and os.path.exists(run.folder)


def test_a_page_that_has_gone_away_ends_no_progress(monkeypatch):
    def is_gone(*_, **__):
        raise RuntimeError("no page")

    monkeypatch.setattr("IPython.display.display", is_gone)
    line = ProgressLine()
    line.write("1/2")
    line.write("2/2")


def test_last_snapshots_that_cannot_be_written_end_nothing(parameters, monkeypatch):
    "On a GPU copies arrive late: some are written after the last step"

    def fails(snapshots, wait=False):
        if wait:
            raise OSError("no space left on device")

    monkeypatch.setattr(runs.Snapshots, "write_arrived", fails)
    job = open_job("Distil", parameters("Distil", "run"))
    train(job)
    assert "no snapshot could be taken: OSError: no space left on device" in job.run.status()["warnings"]


def test_warnings_of_several_threads_are_all_kept(tmp_path):
    with RunWriter(tmp_path / "run") as run:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(run.warn, map(str, range(64))))
        assert sorted(map(int, run.status()["warnings"])) == list(range(64))


def test_bars_and_pictures_are_made_in_one_place():
    "A bar of tqdm's own fills a job's notebook, and a figure of matplotlib's own has no words"
    made = {}
    for path in sorted(Path(runs.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        calls = [call for call in ("tqdm(", "plt.close(", "tqdm.auto") if call in text]
        if calls:
            made[path.name] = calls
    assert made == {"shown.py": ["tqdm(", "plt.close("]}
