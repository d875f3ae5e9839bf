"""Plant faults in the library, one at a time, and say who notices: a page, a test, or nobody.

    python tests/faults.py            every file in tests/faults/
    python tests/faults.py losses     these files alone
    python tests/faults.py losses --pages-only     and no tests: what the pages alone notice

A file `tests/faults/NAME.toml` names modules, pages and tests, and lists faults: a piece of a module that stands there exactly once, and
what is written in its place. The project is copied, so nothing here is touched. For each fault the pages run as `test_notebooks` runs them;
what no page notices is left to the tests that the file names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it to Python 3.10

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))  # where pytest finds them too
FILES = sorted((ROOT / "tests" / "faults").glob("*.toml"))
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".cache", "_docs", "_proc", "runs", "__pycache__", "*.egg-info")
NOTICED = ("page", "test", "nothing")


@dataclass(frozen=True)
class Fault:
    """One change of the library that makes it wrong."""

    reason: str  # what is wrong then
    old: str  # stands exactly once in the modules
    new: str
    modules: tuple[str, ...]  # names below vlkd_lab, of a file or a package
    pages: tuple[str, ...]  # stems of notebooks, without numbers
    tests: tuple[str, ...]  # what pytest is given when no page notices; may be empty


def read_faults(path: Path) -> list[Fault]:
    """The faults of a file; each may name other modules, pages and tests than its file does."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    common = {name: content.get(name, []) for name in ("modules", "pages", "tests")}
    faults = []
    for entry in content["fault"]:
        places = {name: tuple(entry.get(name, names)) for name, names in common.items()}
        faults.append(Fault(entry["reason"], entry["old"], entry["new"], **places))
    return faults


def module_files(name: str, root: Path = ROOT) -> list[Path]:
    """The files of a module, which may be a package."""
    file = root / "vlkd_lab" / f"{name}.py"
    return [file] if file.exists() else sorted((root / "vlkd_lab" / name).rglob("*.py"))


def page_file(stem: str, root: Path = ROOT) -> Path:
    """The notebook of a stem, wherever it stands and whatever its number is."""
    from pages import listed_pages

    matches = [path for path in listed_pages(root) if re.sub(r"^\d+_", "", path.stem) == stem]
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} notebooks are called {stem}")
    return matches[0]


def planted(fault: Fault, root: Path = ROOT) -> dict[Path, str]:
    """The module and the page that a fault changes, and their texts with the fault in them."""
    files = [file for name in fault.modules for file in module_files(name, root)]
    counts = {file: file.read_text(encoding="utf-8").count(fault.old) for file in files}
    if sum(counts.values()) != 1:
        raise ValueError(f"{fault.old!r} stands {sum(counts.values())} times in {', '.join(fault.modules)}, not once")
    file = max(counts, key=counts.get)
    text = file.read_text(encoding="utf-8").replace(fault.old, fault.new)
    compile(text, str(file), "exec")
    page, notebook = exporting_page(fault.old, root, file.read_text(encoding="utf-8"))
    return {file: text, page: planted_page(notebook, fault)}


def exporting_page(text: str, root: Path, module: str) -> tuple[Path, dict]:
    """The notebook that exports a piece of code of a module: a page runs its own cells, and not the module that they became."""
    named = re.search(r"File to edit: .*?([\w.]+\.ipynb)", module)  # nbdev's first line; the same text may stand in several
    for page, code in exported_code(root).items():
        if text in code and (named is None or page.name == named[1]):
            return page, json.loads(page.read_text(encoding="utf-8"))
    raise ValueError(f"no notebook exports {text!r}")


@cache
def exported_code(root: Path) -> dict[Path, str]:
    """What each notebook of a project exports, as text; read before anything is planted."""
    from pages import listed_pages

    pages = sorted(listed_pages(root))
    notebooks = {page: json.loads(page.read_text(encoding="utf-8")) for page in pages}
    return {page: "\n\n".join(map(source, exported_cells(notebook))) for page, notebook in notebooks.items()}


def planted_page(notebook: dict, fault: Fault) -> str:
    """The notebook with the fault in its exported cells."""
    for cell in exported_cells(notebook):
        cell["source"] = source(cell).replace(fault.old, fault.new).splitlines(keepends=True)
    return json.dumps(notebook)


def exported_cells(notebook: dict) -> list[dict]:
    """The cells that become the library."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and re.match(r"#\|\s*exports?\b", source(cell))]


def source(cell: dict) -> str:
    """A cell's text."""
    return "".join(cell["source"])


def page_error(stem: str, root: Path) -> str:
    """What a page ends with when it runs in a copy of the project; empty when it runs through."""
    from test_notebooks import run_lesson

    with tempfile.TemporaryDirectory() as folder:
        try:
            run_lesson(page_file(stem, root), Path(folder), root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except Exception as error:  # a kernel that dies counts as much as a cell that fails
            return last_line(str(error))
    return ""


def test_error(tests: tuple[str, ...], root: Path) -> str:
    """The first test that fails in a copy of the project; empty when all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 1, 2):  # 2: a fault may break the import of a test file
        raise RuntimeError(f"pytest {' '.join(tests)}: {done.stdout[-500:]}{done.stderr[-500:]}")
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, flags=re.M)
    return failures[0] if failures else "a test file cannot be read" if done.returncode else ""


def last_line(text: str) -> str:
    """The line of code that failed, or else the last line that says something, without the colours of a terminal."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    arrows = [line.partition("> ")[2] for line in lines if re.match(r"-+> \d+ ", line)]
    return next((line for line in reversed(arrows or lines) if line), "it ended")


def who_notices(fault: Fault, root: Path) -> tuple[str, str]:
    """One of NOTICED, and what was noticed."""
    for stem in fault.pages:
        if error := page_error(stem, root):
            return "page", error
    if fault.tests and (error := test_error(fault.tests, root)):
        return "test", error
    return "nothing", ""


def check_sound(faults: list[Fault], root: Path) -> None:
    """Pages and tests must hold without a fault, or they would notice whatever is planted."""
    for stem in sorted({stem for fault in faults for stem in fault.pages}):
        if error := page_error(stem, root):
            raise RuntimeError(f"{stem} fails without any fault: {error}")
    for tests in sorted({fault.tests for fault in faults if fault.tests}):
        if error := test_error(tests, root):
            raise RuntimeError(f"a test fails without any fault: {error}")


def run_faults(path: Path, root: Path, pages_only: bool = False) -> Iterator[tuple[Fault, str, str]]:
    """Plant the faults of a file in a copy of the project, one after the other: (fault, one of NOTICED, what was noticed)."""
    faults = read_faults(path)
    if pages_only:
        faults = [replace(fault, tests=()) for fault in faults]
    check_sound(faults, root)
    for fault in faults:
        wrong = planted(fault, root)
        right = {file: file.read_text(encoding="utf-8") for file in wrong}
        write_all(wrong)
        try:
            notice, error = who_notices(fault, root)
        finally:
            write_all(right)
        yield fault, notice, error


def write_all(texts: dict[Path, str]) -> None:
    """Write files."""
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")


def main(words: list[str]) -> int:
    """Print a table; 1 when some fault is noticed by nothing."""
    from warm_kernel import offer_forks

    pages_only = "--pages-only" in words
    names = set(words) - {"--pages-only"}
    known = [path.stem for path in FILES]
    if names - set(known):
        raise SystemExit(f"no fault file is called {', '.join(sorted(names - set(known)))}; there are {', '.join(known)}")
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder, "project")
        shutil.copytree(ROOT, root, ignore=LEFT_OUT, symlinks=True)
        os.environ |= dict(PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
        offer_forks(Path(folder, "jupyter"))
        for path in FILES:
            if not names or path.stem in names:
                unnoticed += report(path, root, pages_only)
    return int(unnoticed > 0)


def report(path: Path, root: Path, pages_only: bool) -> int:
    """Print a line for each fault of a file, and their sums; the number that nothing notices."""
    counts = dict.fromkeys(NOTICED, 0)
    for fault, notice, error in run_faults(path, root, pages_only):
        counts[notice] += 1
        print(f"{path.stem:12} {notice:8} {fault.reason}" + (f"   [{error[:100]}]" if error else ""), flush=True)
    total, unnoticed = sum(counts.values()), counts["nothing"]
    shares = ", ".join(f"{count} by {notice}" for notice, count in counts.items())
    print(f"{path.stem:12} {total - unnoticed} of {total} noticed ({1 - unnoticed / total:.0%}): {shares}\n", flush=True)
    return unnoticed


if __name__ == "__main__":
    sys.exit(main(re.findall(r"[^,\s]+", " ".join(sys.argv[1:]))))
