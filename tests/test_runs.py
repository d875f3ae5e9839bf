import importlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from vlkd_lab.runs import (
    Curves,
    Run,
    RunStopped,
    RunWriter,
    Snapshots,
    begin,
    current_values,
    is_watched,
    kept_snapshots,
    load_checkpoint,
    newest_snapshot,
    read_json,
    rewind,
    save_checkpoint,
    thinned,
    to_json,
    watch,
    write_text,
)


def test_a_new_folder_reads_as_new(tmp_path):
    run = Run(tmp_path / "none")
    assert run.status()["state"] == "new" and run.metrics() == [] and run.config() == {} and run.result() is None
    assert not run.folder.exists(), "looking must not write"


def test_states_from_start_to_finish(tmp_path):
    with RunWriter(tmp_path) as run:
        assert run.status()["state"] == "running" and run.status()["process"] == os.getpid()
    assert run.status()["state"] == "waiting"
    write_text(tmp_path / "result.json", "{}")
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
    assert state == "stopped" or status["error"] == "ValueError: bad <b>" and "test_runs.py" in status["traceback"]


def test_two_writers_are_refused(tmp_path):
    with RunWriter(tmp_path), pytest.raises(RuntimeError, match=str(os.getpid())):
        with RunWriter(tmp_path):
            pass


def dies_at_work(folder):
    with RunWriter(folder) as run:
        run.log({"step": 1})
        (run.folder / "metrics.jsonl").open("a").write('{"step": 2')
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_is_lost_and_its_half_line_unread(tmp_path):
    killed = multiprocessing.get_context("fork").Process(target=dies_at_work, args=[tmp_path])
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
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
    assert Run(tmp_path).requested() == {"pause": False, "learning_rate_factor": 0.5}


def test_warnings_are_kept_once(tmp_path):
    with RunWriter(tmp_path) as run:
        run.warn("chance")
        run.warn("chance")
    assert run.status()["warnings"] == ["chance"]


def test_controls_are_checked_where_they_are_asked(tmp_path):
    run = Run(tmp_path)
    for wrong, valid in (
        (dict(stop="yes"), "True or False"),
        (dict(target_sparsity=1.0), "0 to 0.97"),
        (dict(target_sparsity=math.nan), "0 to 0.97"),
        (dict(learning_rate_factor=-1), "0 to 100"),
        (dict(weights={"contrastve": 1.0}), "affinity_mimicking"),
        (dict(weights={"contrastive": -1.0}), "from 0 up"),
        (dict(learning_rate=1.0), "learning_rate_factor"),
    ):
        with pytest.raises(ValueError, match=valid):
            run.control(**wrong)
    assert run.requested() == {}
    run.control(weights={"contrastive": 1.0})
    run.control(weights={"relational": 0.5})
    assert run.requested()["weights"] == {"contrastive": 1.0, "relational": 0.5}


def _ask(folder, name, times):
    for k in range(times):
        Run(folder).control(weights={name: float(k)})


def test_two_watchers_do_not_lose_each_others_wishes(tmp_path):
    context = multiprocessing.get_context("fork")
    askers = [context.Process(target=_ask, args=(tmp_path, name, 60)) for name in ("contrastive", "relational")]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert Run(tmp_path).requested()["weights"] == {"contrastive": 59.0, "relational": 59.0}


def test_a_look_does_not_keep_a_writer_out(tmp_path):
    stop = []

    def look():
        while not stop:
            Run(tmp_path).status()

    with RunWriter(tmp_path):
        pass
    write_text(tmp_path / "status.json", '{"state": "running"}')
    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(20):
            with RunWriter(tmp_path):
                pass
    finally:
        stop.append(True)
        for looker in lookers:
            looker.join()


def test_curves_read_on_and_start_over_after_a_rewind(tmp_path):
    curves = Curves(Run(tmp_path))
    assert curves.read() == 0
    with RunWriter(tmp_path) as run:
        run.log({"stage": "stage-1", "phase": "gates", "step": 1, "total": 2.0, "expected_sparsity": 0.1})
        run.log({"event": "validation", "stage": "stage-1", "step": 1, "image_to_text_r1": 0.5})
        with (tmp_path / "metrics.jsonl").open("a") as handle:
            handle.write('{"stage": "stage-1", "step": 2, "to')
        assert curves.read() == 2
        with (tmp_path / "metrics.jsonl").open("a") as handle:
            handle.write('tal": "nan"}\n')
        assert curves.read() == 1 and math.isnan(curves.column("stage-1", "total")[1])
        assert list(curves.column("stage-1", "step")) == [1, 2] and len(curves.column("stage-1", "expected_sparsity")) == 2
        rewind(run, 1)
        run.log({"stage": "stage-1", "step": 2, "total": 1.0})
        curves.read()
    assert list(curves.column("stage-1", "total")) == [2.0, 1.0] and curves.events == []


def test_long_curves_keep_their_shape_in_few_points():
    import numpy as np

    thin = thinned(np.concatenate([np.arange(1000.0), [np.nan]]), 10)
    assert len(thin) == 10 and (np.diff(thin) > 0).all() and len(thinned(np.arange(5.0), 10)) == 5


def test_what_is_in_effect_is_what_the_events_add_up_to():
    events = [
        {"event": "control", "weights": {"contrastive": 1.0, "relational": 2.0}},
        {"event": "validation"},
        {"event": "control", "weights": {"relational": 0.0}, "target_sparsity": 0.4},
    ]
    assert current_values(events) == {"weights": {"contrastive": 1.0, "relational": 0.0}, "target_sparsity": 0.4}
    assert current_values(events[1:2]) == {}


FORMER = [
    ("runs", "in_effect", "current_values"),
    ("features", "Pass", "LayerOutputs"),
    ("fusion", "write_about", "generate"),
    ("tasks", "describe", "caption_pairs"),
    ("tasks", "MAIN", "MAIN_SCORE"),
    ("evaluation", "STRENGTHS", "INVERSE_REGULARISATION"),
    ("trainers", "has_page", "is_interactive"),
    ("trainers", "Fit", "Loop"),
    ("trainers", "Streams", "Job"),
    ("trainers", "read_weights", "read_loss_weights"),
    ("methods.tinyclip", "make_student", "stage_student"),
    ("widgets", "COLOURS", "LINE_COLOURS"),
    ("widgets", "kind_of", "compared_kind"),
    ("widgets", "headline", "status_bar"),
    ("balance_explorer", "BalanceStill", "StaticBalance"),
]


@pytest.mark.parametrize("module, former, today", FORMER)
def test_former_names_are_found_with_a_warning(module, former, today):
    module = importlib.import_module(f"vlkd_lab.{module}")
    assert former not in vars(module)
    with pytest.warns(DeprecationWarning, match=f"^{former} is now {today}$"):
        assert getattr(module, former) is getattr(module, today)
    with pytest.raises(AttributeError, match=f"no attribute 'not_{former}'"):
        getattr(module, f"not_{former}")


def test_the_former_question_for_requests_is_answered(tmp_path):
    run = Run(tmp_path)
    run.control(pause=True)
    with pytest.warns(DeprecationWarning, match="now Run.requested"):
        assert run.asked() == run.requested() == {"pause": True}


def test_snapshots_only_while_watched(tmp_path):
    run = Run(tmp_path)
    snapshots = Snapshots(run)
    snapshots.offer(lambda: pytest.fail("nobody watches"))
    assert not is_watched(run) and newest_snapshot(run) is None
    watch(run)
    snapshots.offer(lambda: {"a": torch.eye(3).T}, step=4)
    arrays, labels = newest_snapshot(run)
    assert (arrays["a"] == torch.eye(3).numpy()).all() and labels["step"] == 4
    snapshots.offer(lambda: pytest.fail("the last one is fresh"))
    os.utime(tmp_path / "snapshots" / "watching", (0, 0))
    assert not is_watched(run)


def test_snapshots_take_a_small_share_of_the_time(tmp_path):
    snapshots = Snapshots(Run(tmp_path))
    start = time.monotonic()
    snapshots.take(lambda: time.sleep(0.05) or {"a": torch.zeros(1)})
    assert snapshots._next - start >= 0.05 * 50, "one that takes 50 ms is followed by seconds without one"


def test_kept_snapshots_stay_and_are_the_newest_too(tmp_path):
    snapshots = Snapshots(Run(tmp_path))
    for step in (3, 10, 20):
        snapshots.take(lambda step=step: {"a": torch.tensor([step])}, keep=f"stage-1-gates-{step:08d}", step=step)
    assert [labels["step"] for _, labels in kept_snapshots(Run(tmp_path))] == [3, 10, 20]
    assert newest_snapshot(Run(tmp_path))[0]["a"] == 20


def test_a_snapshot_does_not_follow_its_tensor(tmp_path):
    tensor, snapshots = torch.zeros(2), Snapshots(Run(tmp_path))
    newest = tmp_path / "snapshots" / "newest.safetensors"
    snapshots._pending.append(([newest], {"a": tensor.clone()}, lambda wait=False: wait, {"time": 0}))
    snapshots.take(lambda: {"a": tensor}, step=1)
    assert newest_snapshot(Run(tmp_path)) is None, "a copy on its way holds nothing up and is not written half"
    tensor += 1
    snapshots.write_arrived(wait=True)
    arrays, labels = newest_snapshot(Run(tmp_path))
    assert labels["step"] == 1 and (arrays["a"] == 0).all()


def _rewrite(path, times):
    for k in range(times):
        write_text(path, json.dumps({"k": k, "filler": "x" * 20_000}))


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
