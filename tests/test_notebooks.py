"""Every notebook that exports a module is executed from the top, in a kernel of its own: a lesson that fails fails here."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
LESSONS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if p.name[:2].isdigit())


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
    shutil.copy(root / "settings.ini", folder)
    for name in ("data_samples", "tests"):
        (folder / name).symlink_to(root / name)
    (folder / "nbs").mkdir()
    client = NotebookClient(notebook, timeout=900, kernel_name="warm", resources={"metadata": {"path": str(folder / "nbs")}})
    client.execute(**process)
