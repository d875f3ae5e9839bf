"""Engines: the same answers whoever computes them, whatever dies on the way."""

import os
import signal
import sys
from pathlib import Path

import cloudpickle
import pytest

from vlkd_lab.engines import open_engine, worker_number

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


def test_processes_of_this_machine_have_numbers_also_where_dask_is_imported(monkeypatch):
    import distributed

    assert distributed.__name__ in sys.modules and worker_number() == 0
    monkeypatch.setattr("multiprocessing.process.BaseProcess.name", "LokyProcess-3")
    assert worker_number() == 2
