"""Every notebook that exports a module is executed from the top, in a kernel of its own: a lesson that fails fails here."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
REFUSAL = re.compile(r"^ *except [^\n]*:\s*print\(", flags=re.M)
LESSONS = sorted((ROOT / "nbs" / "library").glob("*.ipynb"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_the_lessons_hold(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_lesson(path, tmp_path)


def run_lesson(path: Path, folder: Path, root: Path = ROOT, **process) -> None:
    "Run a notebook of a project in an empty folder; raises what its cells raise. `process`: how the kernel is started, as Popen has it"
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if "#| eval: false" in cell.source:
            cell.cell_type, cell.metadata = "raw", {}
            cell.pop("outputs", None), cell.pop("execution_count", None)
    before = [printed_lines(cell) for cell in notebook.cells]
    shutil.copy(root / "settings.ini", folder)
    for name in ("data_samples", "tests"):
        (folder / name).symlink_to(root / name)
    place = folder / "nbs" / "library"
    place.mkdir(parents=True)
    client = NotebookClient(notebook, timeout=900, kernel_name="warm", startup_timeout=300, shutdown_kernel="immediate", resources={"metadata": {"path": str(place)}})
    client.execute(**process)
    check_refusals(notebook, before)


def printed_lines(cell) -> int:
    "Lines that a cell has printed, by its outputs"
    texts = [output["text"] for output in cell.get("outputs", ()) if output["output_type"] == "stream" and output["name"] == "stdout"]
    return len("".join(texts).splitlines())


def check_refusals(notebook, before: list[int]) -> None:
    "A cell that shows an error by printing it prints as many lines as the page shows: what is no longer refused is noticed"
    for cell, lines in zip(notebook.cells, before, strict=True):
        if cell.cell_type == "code" and REFUSAL.search(cell.source) and printed_lines(cell) != lines:
            raise AssertionError(f"the page shows {lines} printed lines, and it printed {printed_lines(cell)}: {cell.source}")


@pytest.mark.parametrize("stored, source", [(2, "print(1)"), (1, "assert True")])
def test_a_refusal_that_does_not_come_is_noticed(stored, source):
    refusal = f"try: {source}\nexcept ValueError as error: print(error)"
    output = nbformat.v4.new_output("stream", name="stdout", text="1\n")
    cell = nbformat.v4.new_code_cell(refusal, outputs=[output] if "print" in source else [])
    with pytest.raises(AssertionError, match=f"shows {stored} printed lines"):
        check_refusals(nbformat.v4.new_notebook(cells=[cell]), [stored])
    check_refusals(nbformat.v4.new_notebook(cells=[cell]), [printed_lines(cell)])
