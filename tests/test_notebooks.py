"""Every notebook that exports a module is executed from the top, in a kernel of its own: a lesson that fails fails here."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "nbs" / "library").glob("*.ipynb"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_the_lessons_hold(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if "#| eval: false" in cell.source:
            cell.cell_type, cell.metadata = "raw", {}
            cell.pop("outputs", None), cell.pop("execution_count", None)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for name in ("data_samples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    folder = tmp_path / "nbs" / "library"
    folder.mkdir(parents=True)
    NotebookClient(notebook, timeout=900, kernel_name="warm", resources={"metadata": {"path": str(folder)}}).execute()
