"""What `make test-versions` would run, and what it says of a version that is not to be had."""

import subprocess
import sys
from pathlib import Path

import pytest
from versions import ROOT, find_python, install, main, plan, settings


def test_without_words_both_ends_of_torch_run_on_two_pythons():
    python, torch = settings()
    wanted = {(p, t) for p in (python, "3.12") for t in (torch, "newest")}
    assert {(v.python, v.torch) for v in plan([])} == wanted and f"torch>={torch} " in (ROOT / "settings.ini").read_text()
    assert [v.requirement for v in plan(["3.12:2.11.0", "3.11:oldest", "3.10:newest"])] == ["torch==2.11.0", f"torch=={torch}.*", "torch"]


@pytest.mark.parametrize("word", ["3.12", "2.11.0", "3.12:", "3.12:2", "3.12:latest", "3:2.11.0"])
def test_a_word_that_is_no_version_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        main([word])
    assert "write PYTHON:TORCH" in capsys.readouterr().err


def test_a_python_that_is_not_here_is_said_and_is_no_success(capsys):
    assert find_python("9.9") is None and find_python("%d.%d" % sys.version_info[:2])
    assert main(["9.9:oldest"]) == 1
    assert "Python 9.9" in (told := capsys.readouterr().out) and "no such Python here" in told and "0 of 1 ran" in told


@pytest.mark.parametrize("outcomes, code", [([True, None], 0), ([True, False], 1), ([None], 1)])
def test_the_exit_code_tells_of_failures_and_of_nothing_that_ran(outcomes, code, monkeypatch, capsys):
    rest = iter(outcomes)
    monkeypatch.setattr("versions.find_python", lambda version: Path(sys.executable))
    monkeypatch.setattr("versions.run", lambda version, python, tests: (f"{version.torch} with {tests}", next(rest)))
    assert main(["3.12:2.11.0", "3.10:newest"][: len(outcomes)] + ["--tests", "tests/test_losses.py -x"]) == code
    assert "2.11.0 with ['tests/test_losses.py', '-x']" in capsys.readouterr().out


def test_pips_reason_is_told(monkeypatch):
    "Without the network: pip is told to look nowhere"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "No matching distribution found for no-such-thing" in install(Path(sys.executable), "no-such-thing")


def test_the_makefile_hands_versions_and_tests_over():
    done = subprocess.run(["make", "--dry-run", "test-versions", "VERSIONS=3.12:2.11.0", "TESTS=tests/test_losses.py"],
                          cwd=ROOT, capture_output=True, text=True)
    assert 'tools/versions.py --tests "tests/test_losses.py" 3.12:2.11.0' in done.stdout, done.stdout + done.stderr
