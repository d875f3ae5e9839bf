"""A quiet environment for the tests, forks to start from, and the order in which test processes get what to do.

What several test files share is in `shared`, which only a process that runs tests imports: the one that hands them out begins the sooner.
"""

import gc
import os
import re
import shutil
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # UMAP of fifty points is done before its functions would be compiled

import psutil
import pytest
from warm_kernel import offer_forks, start_server
from xdist.scheduler import LoadScopeScheduling

IPYKERNEL6 = Path(__file__).parent.parent / ".cache" / "ipykernel6"  # `make test` puts it there, beside the newest in the environment
MEMORY = Path("/dev/shm")
ROOM = 8 << 30  # bytes: more than the files of a run ever take
SHARED = {"TINY", "TINY_BLIP", "tar", "lines_of", "same_weights", "in_two_processes", "tiny_job", "any_job", "train_watched"}


def folder_in_memory():
    "Where a file is made thirty times as fast as on a disk on which others were just removed; None where that is too small or not wanted"
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK):
        return None
    disk = os.statvfs(MEMORY)
    is_large = disk.f_bavail * disk.f_frsize > ROOM and psutil.virtual_memory().available > 2 * ROOM
    return str(MEMORY) if is_large and not disk.f_flag & os.ST_NOEXEC else None


def pytest_configure(config):
    "Forked programs, and kernels named warm and, with ipykernel 6, warm6, for all test processes, as long as this one lives"
    if not hasattr(config, "workerinput"):
        tempfile.tempdir = folder_in_memory() or tempfile.gettempdir()  # where pytest makes the tests' folders, too
        config.warm_kernel = Path(tempfile.mkdtemp(prefix="warm-kernel-"))
        left = config.warm_kernel / "left"  # by programs that forget their temporary folders
        left.mkdir()
        os.environ["TMPDIR"] = str(left)
        owner = offer_forks(config.warm_kernel, IPYKERNEL6, floors=True)
        if config.getoption("dist", "no") != "no":  # most tests are to run, and some will ask: it imports while test processes do
            threading.Thread(target=start_server, args=[config.warm_kernel, owner], daemon=True).start()
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        gc.disable()  # until the tests are collected: imports leave no garbage, and to look for it took a third of their time
        sys.modules["rfc3987_syntax"] = None  # at its import it compiles grammars for a second, of addresses that nobody checks here
        config.pluginmanager.import_plugin("shared")


def __getattr__(name):
    "What test files import from here and `shared` has"
    if name not in SHARED:  # pytest asks for names of its own
        raise AttributeError(name)
    return getattr(import_module("shared"), name)


def pytest_unconfigure(config):
    if hasattr(config, "warm_kernel"):
        shutil.rmtree(config.warm_kernel, ignore_errors=True)


def pytest_collection_finish():
    "What the tests begin with is not searched for garbage"
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_teardown():
    "What imports leave is not searched for garbage again: every phase of a job collects, which took most of a small job's time"
    if len(gc.get_objects()) > 50_000:
        gc.collect()
        gc.freeze()


# `make test` gives whole files to test processes, since the tests of a file share what they have trained, but these test by test.
# The longest files go first; the files that are given test by test go last, the longest pages of them first, so that no process waits
# for another at the end.
TEST_BY_TEST = ["test_jobs", "test_notebooks", "test_guides", "test_guards"]
LONGEST = """test_lab test_machines test_matrix test_reading test_site test_curation test_corpus_files test_dime_fm test_sharding test_export
    test_forks test_trainers test_stores test_viewers test_teachers test_dlip test_steps test_precision test_timeline test_reinforced
    test_figures test_running test_captions test_run_choice test_clip_cid test_teacher_sets test_transfer test_methods test_board test_models""".split()
LONGEST_PAGES = "tasks trials explorers transfer stores corpus project methods_dlip methods_dime_fm methods_distil methods_tinyclip balancing".split()


class ByFile(LoadScopeScheduling):
    "Hands out whole files, but some test by test"

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return nodeid if Path(file).stem in TEST_BY_TEST else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    "The order in which tests are handed out"
    items.sort(key=lambda item: place_of(item.path.stem, item.name))


def place_of(file, test):
    "Where a test stands in that order"
    if file in TEST_BY_TEST:
        page = re.search(r"\[\d+_(\w+)\]", test)
        is_long = file == "test_notebooks" and page is not None and page[1] in LONGEST_PAGES
        return 2, TEST_BY_TEST.index(file), LONGEST_PAGES.index(page[1]) if is_long else len(LONGEST_PAGES)
    return (0, LONGEST.index(file)) if file in LONGEST else (1,)
