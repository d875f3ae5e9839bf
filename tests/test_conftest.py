"""Tests of a file share what they have trained, so they go to one test process; the long go first."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import conftest
import psutil
import pytest
from pages import listed_pages


@pytest.mark.parametrize("number", range(8))
def test_a_file_goes_to_one_process(number, tmp_path_factory):
    shared = tmp_path_factory.getbasetemp()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    note = (shared.parent if worker else shared) / "who-had-test-conftest"
    if not note.exists():
        note.write_text(worker)
    assert note.read_text() == worker


def test_a_test_that_passed_leaves_no_folder(tmp_path_factory):
    "A test run that passes a test in this one's manner"
    assert os.environ["TMPDIR"].startswith(tempfile.gettempdir()) and Path(os.environ["TMPDIR"]).parent.name.startswith("warm-kernel-")
    place = tmp_path_factory.mktemp("inner")
    (place / "test_inner.py").write_text("def test_a(tmp_path):\n    (tmp_path / 'large').write_text('x')\n\ndef test_b(tmp_path):\n    assert False\n")
    settings = Path(__file__).parent.parent / "pyproject.toml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(settings), "--basetemp", str(place / "temporary")]
    done = subprocess.run([*command, "--rootdir", str(place), str(place / "test_inner.py")], capture_output=True, text=True, cwd=place)
    assert "1 failed, 1 passed" in done.stdout
    assert [folder.name for folder in (place / "temporary").iterdir() if folder.is_dir() and not folder.is_symlink()] == ["test_b0"]


@pytest.mark.parametrize("changes, is_there", [
    ({}, True),
    (dict(f_bavail=7 << 30), False),
    (dict(available=15 << 30), False),
    (dict(f_flag=os.ST_NOEXEC), False),
    (dict(TMPDIR="/somewhere"), False),
])
def test_files_are_made_in_memory_where_there_is_room(changes, is_there, tmp_path, monkeypatch):
    machine = SimpleNamespace(**dict(f_bavail=9 << 30, f_frsize=1, f_flag=0, available=17 << 30) | changes)
    monkeypatch.setattr(os, "statvfs", lambda _: machine)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(conftest, "MEMORY", tmp_path)
    monkeypatch.delenv("TMPDIR", raising=False)
    if "TMPDIR" in changes:
        monkeypatch.setenv("TMPDIR", changes["TMPDIR"])
    assert conftest.folder_in_memory() == (str(tmp_path) if is_there else None)


def test_what_is_handed_out_first_and_last_is_there():
    folder = Path(__file__).parent
    files = {path.stem for path in folder.glob("test_*.py")}
    assert {*conftest.LONGEST, *conftest.TEST_BY_TEST} <= files and not {*conftest.LONGEST} & {*conftest.TEST_BY_TEST}
    pages = {path.stem.partition("_")[2] for path in listed_pages(folder.parent, "library/")}
    assert set(conftest.LONGEST_PAGES) <= pages


def test_whole_files_go_before_single_tests_and_the_long_before_the_short():
    wanted = ["test_lab::test_a", "test_models::test_a", "test_names::test_a", "test_jobs::test_a", "test_notebooks::test_a[042_tasks]",
              "test_notebooks::test_a[043_trials]", "test_notebooks::test_a[001_features]", "test_notebooks::test_b", "test_guards::test_a"]
    assert sorted(reversed(wanted[:6]), key=lambda name: conftest.place_of(*name.split("::"))) == wanted[:6]
    assert sorted([*wanted[6:], *wanted[:6]], key=lambda name: conftest.place_of(*name.split("::"))) == wanted


def test_what_hands_out_the_tests_imports_none_of_the_heavy_libraries():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import conftest; print('torch' in sys.modules or 'vlkd_lab' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError):
        conftest.no_such_name  # noqa: B018
