"""Somebody's own notebook beside the project's pages, whatever is in it, breaks nothing: it is left out, with a line that says so."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import left_out, listed_pages, only_listed_pages, unlisted_notebooks

ROOT = Path(__file__).parent.parent
OWN = {  # name below the project -> what is in it
    "nbs/Untitled.ipynb": json.dumps(dict(cells=[], metadata={}, nbformat=4, nbformat_minor=5)),
    "nbs/my notes.ipynb": None,  # a cell of code alone, without a title
    "nbs/library/empty.ipynb": "",
    "nbs/guides/half.ipynb": '{"cells": [',
    "nbs/mine/list.ipynb": "[]",
    "nbs/mine/index.ipynb": '{"nbformat": 3, "worksheets": []}',  # of the name of a page
}


@pytest.fixture
def project(tmp_path):
    "A copy of what the tools work on, with such notebooks in it, and one at its root"
    left = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "images")
    for name in ("nbs", "vlkd_lab", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left, symlinks=True)
    for name in ("settings.ini", "setup.py", "_quarto.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    cell = dict(cell_type="code", id="a", metadata={}, source=["from vlkd_lab.losses import contrastive\n", "1 / 0"], outputs=[], execution_count=None)
    note = json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5))
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(note if text is None else text)
    (tmp_path / "Untitled.ipynb").write_text("{")
    return tmp_path


def names_left_out(said):
    return set(re.findall(r"^left out: (.+), which _quarto.yml does not list$", said, flags=re.M))


def test_every_page_of_the_repository_is_listed():
    "So that a page of the project is not taken for somebody's own"
    done = subprocess.run(["git", "ls-files", "nbs/*.ipynb"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no repository here")
    assert {ROOT / name for name in done.stdout.splitlines()} <= set(listed_pages()) and all(page.exists() for page in listed_pages())


def test_they_are_named(project):
    assert {path.relative_to(project).as_posix() for path in unlisted_notebooks(project)} >= set(OWN)
    assert names_left_out("\n".join(left_out(project))) >= set(OWN)
    for hidden in (".ipynb_checkpoints/Untitled-checkpoint.ipynb", "_proc/index.ipynb"):
        (project / "nbs" / hidden).parent.mkdir(exist_ok=True)
        (project / "nbs" / hidden).write_text("{")
    assert not any("checkpoint" in line or "_proc" in line for line in left_out(project))


def test_the_library_is_exported_without_them(project):
    before = {path: path.read_text() for path in (project / "vlkd_lab").rglob("*.py")}
    done = subprocess.run([sys.executable, "tools/pages.py", "export"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert names_left_out(done.stdout) >= set(OWN)
    assert {path: path.read_text() for path in (project / "vlkd_lab").rglob("*.py")} == before


def test_floors_and_faults_pass_over_them(project):
    done = subprocess.run([sys.executable, "tools/floors.py"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0 and names_left_out(done.stdout) >= set(OWN), done.stderr
    assert "every number is that of its place" in done.stdout
    command = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import faults; from pathlib import Path; root = Path('.');"
    command += "print(faults.page_file('losses', root), len(faults.exported_code(root)))"
    done = subprocess.run([sys.executable, "-c", command], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(listed_pages())}" in done.stdout, done.stderr[-2000:]


def test_tests_are_collected_of_the_projects_pages_alone(project):
    shutil.copytree(ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "pyproject.toml", project)
    shutil.copytree(ROOT / "data_samples", project / "data_samples", symlinks=True)
    files = [f"tests/test_{name}.py" for name in ("guards", "guides", "notebooks", "site", "conftest")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-n", "0", *files]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    for name in OWN:
        assert f"[{Path(name).stem}]" not in done.stdout or Path(name).stem == "index"
    kept = "every_notebook_lies_in_its_room or sidebar_follows or share_a_number"
    done = subprocess.run([*command[:3], "-q", "-p", "no:cacheprovider", "-n", "0", "-k", kept, files[0]], cwd=project, capture_output=True, text=True)
    assert "3 passed" in done.stdout, done.stdout[-3000:]


def test_the_website_is_made_without_them(project, monkeypatch, capsys):
    import nbdev.serve
    from build_site import processed

    given = []

    def process(force, n_workers):
        given.extend(nbdev.serve.nbglob(project / "nbs", func=Path, file_glob="", file_re=""))
        return project / "nothing"

    monkeypatch.setattr("nbdev.serve.proc_nbs", process)
    assert processed(project) == {}
    seen = {Path(path).relative_to(project).as_posix() for path in given}
    assert {path.relative_to(project).as_posix() for path in listed_pages(project)} <= seen and not seen & set(OWN)
    assert names_left_out(capsys.readouterr().out) >= set(OWN)


def test_nbdev_is_as_it_was_afterwards(project):
    import nbdev.serve

    before = nbdev.serve.nbglob
    with pytest.raises(ZeroDivisionError), only_listed_pages(project):
        raise ZeroDivisionError
    assert nbdev.serve.nbglob is before
