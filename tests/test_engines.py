"""Engines: the same answers whoever computes them, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

from vlkd_lab import engines as E
from vlkd_lab.engines import open_engine

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # processes of an engine do not know this file


def squared(number):
    return number * number


def squared_but_one_dies(task):
    "The first process that comes to task 3 is killed; the next finds that somebody was"
    number, folder = task
    mark = Path(folder, "killed")
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    Path(folder, str(os.getpid())).touch()
    return number * number


def killed_again(task):
    os.kill(os.getpid(), signal.SIGKILL)


def process_of(number):
    return os.getpid()


def failing(number):
    raise ValueError(f"number {number} is no good")


@pytest.fixture(params=["local", "dask"])
def engine(request):
    with open_engine(request.param, workers=2) as opened:
        yield opened


def test_all_answers_come_and_a_killed_process_costs_nothing_but_its_tasks(engine, tmp_path):
    tasks = [(number, str(tmp_path)) for number in range(12)]
    assert dict(engine.each(squared_but_one_dies, tasks)) == {number: number * number for number in range(12)}
    assert (tmp_path / "killed").exists() and not (tmp_path / str(os.getpid())).exists()


def test_a_tasks_own_fault_is_raised(engine):
    with pytest.raises(ValueError, match="number 5 is no good"):
        list(engine.each(failing, [5]))


def test_tasks_whose_processes_always_die_are_named():
    with open_engine("local", workers=2) as engine:
        with pytest.raises(RuntimeError, match=r"the processes of 2 tasks died 3 times \(cell-8, cell-9\)"):
            list(engine.each(killed_again, ["cell-8", "cell-9"]))


def test_one_worker_is_this_process():
    with open_engine("local") as engine:
        assert dict(engine.each(lambda task: (task, os.getpid()), "ab")) == {0: ("a", os.getpid()), 1: ("b", os.getpid())}


def test_workers_of_a_scheduler_that_runs_already():
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:
        with open_engine("dask", address=cluster.scheduler_address) as engine:
            assert sorted(result for _, result in engine.each(squared, range(5))) == [0, 1, 4, 9, 16]
            workers = {worker.process.pid for worker in cluster.workers.values()}
            assert {pid for _, pid in engine.each(process_of, range(3))} == workers


@pytest.mark.timeout(90)
def test_the_only_worker_is_waited_for_when_it_begins_anew_however_long_its_imports_take(tmp_path):
    import dask

    with dask.config.set({"distributed.deploy.lost-worker-timeout": "100 ms"}):  # shorter than any start
        with open_engine("dask", workers=1) as engine:
            assert dict(engine.each(squared_but_one_dies, [(3, str(tmp_path))])) == {0: 9}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(engine="ray"), "engine='ray' is not valid: choose one of local, dask"),
        (dict(workers=0), "workers=0"),
        (dict(memory_mb=-1), "memory_mb=-1"),
        (dict(address="tcp://node:8786"), "choose engine='dask'"),
    ],
)
def test_what_is_not_valid_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said), open_engine(**wrong):
        pass


def test_without_dask_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r'pip install "vlkd_lab\[curation\]"'), open_engine("dask"):
        pass


class OddError(Exception):
    "It cannot be put together again from what it says"

    def __init__(self, path, number):
        super().__init__(f"{path} has no {number}")


def odd(number):
    raise OddError("a.npy", number)


def test_an_error_that_cannot_be_sent_is_told():
    with open_engine("local", workers=2) as engine:
        with pytest.raises(RuntimeError, match="OddError: a.npy has no 7"):
            list(engine.each(odd, [7, 7]))


def gpu_of(task):
    "The GPU that a process takes, of the machine's names that it is told"
    names, folder = task
    E._visible_gpus = lambda: names
    E.tempfile.gettempdir = lambda: folder
    gpu = E.own_gpu()
    Path(folder, f"process-{os.getpid()}").touch()
    deadline = time.monotonic() + 20
    while len(list(Path(folder).glob("process-*"))) < 2 and time.monotonic() < deadline:  # each worker has a task
        time.sleep(0.01)
    return os.getpid(), gpu


@pytest.mark.parametrize("names", [["a", "b"], ["a"], ["a", "b", "c"]])
def test_workers_of_a_machine_take_its_gpus_in_turn(engine, names, tmp_path):
    taken = dict(result for _, result in engine.each(gpu_of, [(names, str(tmp_path))] * 8))
    assert sorted(taken.values()) == ([0, 0] if len(names) == 1 else [0, 1])


CLAIMS = """
import sys, time
from vlkd_lab import engines
engines._visible_gpus = lambda: sys.argv[2].split(",")
engines.tempfile.gettempdir = lambda: sys.argv[1]
print(engines.own_gpu(), flush=True)
time.sleep(60)
"""


def test_a_gpu_is_taken_by_its_own_name_and_free_when_its_worker_is_killed(tmp_path):
    "Five workers, of which two see other GPUs of the same machine in another order"
    started = []

    def claim(names):
        process = subprocess.Popen([sys.executable, "-c", CLAIMS, str(tmp_path), names], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return int(process.stdout.readline())

    try:
        assert [claim(names) for names in ("a,b,c", "c,b", "a,b,c", "a,b,c", "b,a")] == [0, 0, 1, 0, 0]
        started[2].kill()  # that had b
        started[2].wait()
        assert claim("a,b,c") == 1
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_without_locks_chance_says_which_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(E, "_visible_gpus", lambda: list("abc"))
    monkeypatch.setattr(E, "try_lock", lambda handle: None)
    monkeypatch.setattr(E.tempfile, "gettempdir", lambda: str(tmp_path))
    assert [E._claimed_gpu.__wrapped__(process) for process in (3, 4, 5)] == [0, 1, 2]


def test_gpus_are_known_by_what_never_changes(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: SimpleNamespace(uuid=f"GPU-{7 - k}"))
    assert E._visible_gpus() == ["GPU-7", "GPU-6"]
