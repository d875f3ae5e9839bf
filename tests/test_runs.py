import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from vlkd_lab.runs import (
    Run,
    RunStopped,
    RunWriter,
    begin,
    load_checkpoint,
    newest_snapshot,
    read_json,
    rewind,
    save_checkpoint,
    take_snapshot,
    to_json,
    wants_snapshot,
    watch,
    write_whole,
)


def test_a_new_folder_reads_as_new(tmp_path):
    run = Run(tmp_path / "none")
    assert run.status()["state"] == "new" and run.metrics() == [] and run.config() == {} and run.result() is None
    assert not run.folder.exists(), "looking must not write"


def test_states_from_start_to_finish(tmp_path):
    with RunWriter(tmp_path) as run:
        assert run.status()["state"] == "running" and run.status()["process"] == os.getpid()
    assert run.status()["state"] == "waiting"
    write_whole(tmp_path / "result.json", "{}")
    with RunWriter(tmp_path):
        pass
    assert Run(tmp_path).status()["state"] == "finished"


@pytest.mark.parametrize(
    "error, state", [(ValueError("bad <b>"), "failed"), (RunStopped("asked"), "stopped"), (KeyboardInterrupt(), "stopped")]
)
def test_an_error_is_noted_and_raised(tmp_path, error, state):
    with pytest.raises(type(error)), RunWriter(tmp_path):
        raise error
    status = Run(tmp_path).status()
    assert status["state"] == state
    assert state == "stopped" or status["error"] == "ValueError: bad <b>"


def test_two_writers_are_refused(tmp_path):
    with RunWriter(tmp_path), pytest.raises(RuntimeError, match=str(os.getpid())):
        with RunWriter(tmp_path):
            pass


def test_a_killed_writer_is_lost_and_its_half_line_unread(tmp_path):
    code = f"""
import os, signal
from vlkd_lab.runs import RunWriter
with RunWriter({str(tmp_path)!r}) as run:
    run.log({{"step": 1}})
    (run.folder / "metrics.jsonl").open("a").write('{{"step": 2')
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    run = Run(tmp_path)
    assert run.status()["state"] == "lost" and run.metrics() == [{"step": 1}]
    with RunWriter(tmp_path) as again:
        rewind(again, 1)
        again.log({"step": 2})
    assert [m["step"] for m in run.metrics()] == [1, 2]


def test_numbers_that_json_lacks_survive(tmp_path):
    with RunWriter(tmp_path) as run:
        run.log({"a": math.nan, "b": math.inf, "c": (1, torch.tensor([2.0]))})
    line = run.metrics()[0]
    assert math.isnan(float(line["a"])) and float(line["b"]) == math.inf and line["c"] == [1, [2.0]]
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert to_json({1: tmp_path})["1"] == str(tmp_path)


def test_checkpoints_rewind_the_metrics_and_hold_no_pickle(tmp_path):
    with RunWriter(tmp_path) as run:
        run.log({"step": 1})
        save_checkpoint(run, "stage-1/distil", {"step": 1, "state": {"w": torch.ones(2)}})
        run.log({"step": 2})
    state = load_checkpoint(run, "stage-1/distil", cut=False)
    assert len(run.metrics()) == 2 and torch.equal(state["state"]["w"], torch.ones(2))
    load_checkpoint(run, "stage-1/distil")
    assert run.metrics() == [{"step": 1}] and load_checkpoint(run, "stage-2") is None

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("pickled code ran",))

    torch.save({"evil": Evil()}, tmp_path / "stage-1" / "distil" / "checkpoint.pt")
    with pytest.raises(Exception, match="(?i)weights.?only|unsupported"):
        load_checkpoint(run, "stage-1/distil")


def test_begin_names_every_difference(tmp_path):
    run = Run(tmp_path)
    assert not begin(run, {"steps": 1, "versions": {"torch": "1"}})
    assert begin(run, {"steps": 1, "versions": {"torch": "2"}}, free=("versions",))
    with pytest.raises(ValueError, match="steps: it has 1, asked for 2"):
        begin(run, {"steps": 2, "versions": {}}, free=("versions",))
    assert run.config()["steps"] == 1


def test_control_accumulates(tmp_path):
    run = Run(tmp_path)
    run.control(pause=True)
    run.control(learning_rate_factor=0.5, pause=False)
    assert Run(tmp_path).asked() == {"pause": False, "learning_rate_factor": 0.5}


def test_warnings_are_kept_once(tmp_path):
    with RunWriter(tmp_path) as run:
        run.warn("chance")
        run.warn("chance")
    assert run.status()["warnings"] == ["chance"]


def test_snapshots_only_while_watched(tmp_path):
    run = Run(tmp_path)
    assert not wants_snapshot(run) and newest_snapshot(run) is None
    watch(run)
    assert wants_snapshot(run)
    take_snapshot(run, {"a": torch.eye(3).T}, step=4)
    tensors, labels = newest_snapshot(run)
    assert torch.equal(tensors["a"], torch.eye(3)) and labels == {"step": 4} and not wants_snapshot(run)
    os.utime(tmp_path / "snapshots" / "watching", (0, 0))
    os.utime(tmp_path / "snapshots" / "newest.safetensors", (0, 0))
    assert not wants_snapshot(run)


def _rewrite(path, times):
    for k in range(times):
        write_whole(path, json.dumps({"k": k, "filler": "x" * 20_000}))


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "status.json"
    _rewrite(path, 1)
    writer = multiprocessing.get_context("fork").Process(target=_rewrite, args=(path, 400))
    writer.start()
    reads = 0
    while writer.is_alive():
        assert len(read_json(path)["filler"]) == 20_000
        reads += 1
        time.sleep(0)
    writer.join()
    assert reads > 3 and read_json(path)["k"] == 399
