"""Run the tests in throw-away environments, with the oldest and the newest torch that settings.ini admits, on two Pythons.

    make test-versions                                                  all four
    make test-versions VERSIONS="3.12:2.11.0 3.10:newest" TESTS="tests/test_losses.py"

A version is PYTHON:TORCH; torch is `oldest`, `newest` or a number. What is not to be had here is said and passed over; the exit
code tells of failed tests, or that nothing ran. An environment takes about 6 GB and is removed before the next is made.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEWER_PYTHON = "3.12"  # beside the oldest that settings.ini admits


@dataclass(frozen=True)
class Version:
    "A Python and a torch; torchvision is the one that belongs to it"

    python: str  # such as 3.12
    torch: str  # newest, or a number such as 2.11 or 2.11.0

    @property
    def requirement(self) -> str:
        "What pip is asked for; 2.11 stands for its newest 2.11.x"
        if self.torch == "newest":
            return "torch"
        return f"torch=={self.torch}" + (".*" if self.torch.count(".") < 2 else "")


def settings() -> tuple[str, str]:
    "The oldest Python and the oldest torch that settings.ini admits"
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    torch = re.search(r"\btorch>=([\d.]+)", parser["DEFAULT"]["requirements"])
    return parser["DEFAULT"]["min_python"], torch[1]


def plan(words: Sequence[str]) -> list[Version]:
    "The versions that the words name; without words the oldest and the newest torch on the oldest and a newer Python"
    oldest_python, oldest_torch = settings()
    words = words or [f"{python}:{torch}" for python in (oldest_python, NEWER_PYTHON) for torch in ("oldest", "newest")]
    versions = []
    for word in words:
        if not re.fullmatch(r"\d+\.\d+:(oldest|newest|\d+\.\d+(\.\d+)?)", word):
            raise ValueError(f"{word!r} is no version: write PYTHON:TORCH, such as 3.12:2.11.0, {oldest_python}:oldest or 3.12:newest")
        python, torch = word.split(":")
        versions.append(Version(python, oldest_torch if torch == "oldest" else torch))
    return versions


def find_python(version: str) -> Path | None:
    "A Python of a version that runs: this one, one on the path, or one of pyenv's"
    pyenv = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}*/bin/python"))
    for candidate in (sys.executable, shutil.which(f"python{version}"), *pyenv):
        code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        told = candidate and subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if told and told.stdout.strip() == version:
            return Path(candidate)
    return None


def install(python: Path, *wanted: str) -> str:
    "Install into a Python's environment; the reason if that cannot be done, else nothing"
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True)
    if not done.returncode:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.lower().startswith("error:")]
    return " ".join(errors) or done.stderr[-300:]


def run(version: Version, python: Path, tests: Sequence[str]) -> tuple[str, bool | None]:
    "Make an environment, run the tests in it, remove it; what to say, and whether they passed (None: they did not run)"
    with tempfile.TemporaryDirectory(prefix="vlkd-versions-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = Path(folder) / "bin" / "python"
        install(inside, "--upgrade", "pip")
        if reason := install(inside, version.requirement, "torchvision"):
            return f"there is no such torch here: {reason}", None
        if reason := install(inside, "--editable", f"{ROOT}[dev]", version.requirement, "torchvision"):
            return f"the requirements cannot be met: {reason}", False
        code = "import torch, torchvision; print('torch', torch.__version__, 'torchvision', torchvision.__version__)"
        told = subprocess.run([inside, "-c", code], capture_output=True, text=True)
        if told.returncode:
            return f"torch and torchvision do not import: {told.stderr.splitlines()[-1]}", False
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{inside.parent}{os.pathsep}{os.environ['PATH']}"}
        command = [inside, "-m", "pytest", "-n", "2", "--no-loadscope-reorder", *tests]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as testing:
            last = ""
            for line in testing.stdout:
                print(line, end="", flush=True)
                last = line.strip(" =\n") or last
        return f"{told.stdout.strip()}: {last}", testing.returncode == 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="PYTHON:TORCH")
    parser.add_argument("--tests", default="tests", help="files or folders of tests, and other words for pytest")
    given = parser.parse_args(words)
    try:
        versions = plan(given.versions)
    except ValueError as error:
        parser.error(str(error))
    report, outcomes = [], []
    for version in versions:
        print(f"== Python {version.python}, {version.requirement}", flush=True)
        python = find_python(version.python)
        told, passed = run(version, python, given.tests.split()) if python else ("there is no such Python here", None)
        report.append(f"Python {version.python}, {version.requirement}: {told}")
        outcomes.append(passed)
        print(report[-1], flush=True)
    ran = [passed for passed in outcomes if passed is not None]
    print("\n".join(["== which ran", *report, f"{len(ran)} of {len(versions)} ran, {ran.count(False)} failed"]), flush=True)
    return 0 if ran and all(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
