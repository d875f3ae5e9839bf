"""Every notebook that exports a module is executed from the top, in a process of its own: a lesson that fails fails here.

A page that asks something of its kernel, such as a widget's or a task of the loop, runs in one, and so does the first page; for the others
an IPython shell stands in (`page_shell`), which starts in a tenth of the time.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import forked
import nbformat
import pytest
from nbclient import NotebookClient
from pages import listed_pages

ROOT = Path(__file__).parent.parent
SHELL = Path(__file__).parent / "page_shell.py"
SECONDS = 900  # for a cell
ASKS_A_KERNEL = re.compile(r"\b(get_ipython|ipywidgets|anywidget|asyncio|await)\b")
REFUSAL = re.compile(r"^ *except [^\n]*:\s*print\(", flags=re.M)
LESSONS = sorted(listed_pages(folder="library/"))


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
    run_in_kernel(notebook, place, **process) if needs_kernel(path.stem, notebook) else run_in_shell(path.stem, notebook, place)
    check_refusals(notebook, before)


def needs_kernel(name: str, notebook) -> bool:
    "Whether a page uses what only a kernel has; the first page is run as a person runs it in any case"
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return name == LESSONS[0].stem or ASKS_A_KERNEL.search(code) is not None


def run_in_kernel(notebook, place: Path, **process) -> None:
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="warm",
        startup_timeout=300,
        shutdown_kernel="immediate",
        resources={"metadata": {"path": str(place)}},
    )
    client.execute(**process)


def run_in_shell(name: str, notebook, place: Path, seconds: int = SECONDS) -> None:
    "Run in an IPython shell of a new process; a cell that hangs where Python cannot interrupt it ends with its process"
    with tempfile.TemporaryDirectory() as folder:
        page, printed = Path(folder, f"{name}.ipynb"), Path(folder, "printed")
        nbformat.write(notebook, page)
        process = forked.start(str(SHELL), str(page), str(seconds), output=str(printed), folder=str(place))
        process.join(2 * seconds)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{name} does not end")
        if process.exitcode:
            raise AssertionError(printed.read_text(encoding="utf-8") or f"{name} ended with exit code {process.exitcode}")
        notebook.update(nbformat.read(page, 4))


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


SHOWS = """
import sys
import matplotlib.pyplot as plt
from IPython.display import HTML, display
print("first"), print("aside", file=sys.stderr)
display(HTML("<b>bold</b>"), metadata={"width": 3})
plt.plot([1, 2])
import pandas as pd
frame = pd.DataFrame({"a": [1]})
frame
---
print("quiet"); _ + 3 if isinstance(_, int) else _;
---
from tqdm.auto import tqdm
type(tqdm).__name__, tqdm.__module__, __name__, type(get_ipython()).__mro__[-2].__name__, sys.path[0]
---
%pwd
---
class Broken:
    def _repr_html_(self): raise ValueError("no form")
Broken()
---
1 / 0
"""


def page_of(*sources, tags=()):
    cells = [nbformat.v4.new_code_cell(source.strip(), metadata={"tags": list(tags)}) for source in sources]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A page"), *cells])


def without_places(outputs):
    "Outputs as text, without what differs from process to process: numbers of objects and names of files"
    text = re.sub(r"0x\w+|\\u001b\[[\d;]*m", "", json.dumps(outputs, sort_keys=True))
    text = re.sub(r"[\w+/=]{300,}", lambda picture: f"{len(picture[0])} bytes, {hash(picture[0])}", text)
    return re.sub(" +", " ", text)


@pytest.mark.parametrize("sources, said", [
    (["x = 3", "y = 4\nassert x == y, 'not equal'"], r"failing.ipynb, cell 2 failed:\ny = 4\nassert x == y.*> 2 .*assert.*AssertionError.*not equal"),
    (["import time\nwhile True: time.sleep(1)"], r"cell 1 failed:.*time.sleep.*the cell took too long"),
    (["class Broken:\n    def _repr_html_(self): raise ValueError('no form')", "from IPython.display import display\ndisplay(Broken())"], "cell 2 failed.*no form"),
    (["import os\nos._exit(7)"], "failing ended with exit code 7"),
    (["import sys\nsys.exit(3)"], "cell 1 failed.*SystemExit.*3"),
])
def test_a_page_that_fails_hangs_or_dies_is_an_error_that_says_where(sources, said, tmp_path):
    with pytest.raises(AssertionError) as error:
        run_in_shell("failing", page_of(*sources), tmp_path, seconds=3)
    assert re.search(said, re.sub(r"\x1b\[[\d;]*m", "", str(error.value)), flags=re.S), error.value


def test_a_page_that_python_cannot_interrupt_is_ended(tmp_path):
    deaf = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(600)"
    with pytest.raises(TimeoutError, match="deaf does not end"):
        run_in_shell("deaf", page_of(deaf), tmp_path, seconds=1)


def test_pages_know_nothing_of_each_other(tmp_path):
    run_in_shell("first", page_of("import os, sys, torch\ntorch.seed_of_page = sys.x_of_page = os.environ['OF_PAGE'] = '1'\nleft = 3"), tmp_path)
    clean = "import os, sys, torch\nassert not hasattr(torch, 'seed_of_page') and not hasattr(sys, 'x_of_page')\nassert 'left' not in globals()"
    run_in_shell("second", page_of(clean, "assert 'OF_PAGE' not in os.environ"), tmp_path)


def test_what_needs_a_kernel_gets_one():
    pages = {path.stem: nbformat.read(path, 4) for path in LESSONS}
    in_kernels = {name for name, page in pages.items() if needs_kernel(name, page)}
    assert LESSONS[0].stem in in_kernels and 5 <= len(in_kernels) < len(pages) / 4
    assert {"widgets_canvas", "widgets_bench"} <= {name.partition("_")[2] for name in in_kernels}
