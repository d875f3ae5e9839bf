"""Executed copies of the job notebooks, whose outputs the site shows: `make outputs` runs those that have changed, NAMES="train_dlip" chooses some.

A copy lies in tools/job_outputs/ as an ordinary notebook, small: pictures with few colours, no state of widgets, no progress bars. The site
takes an output for a cell whose source is still the same, and says on the page when and with what the notebook was run. `make docs` runs no job.
"""

import base64
import io
import json
import re
import sys
import tempfile
from datetime import date
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).parent.parent
COPIES = Path(__file__).parent / "job_outputs"
# what is run, and which parameters are not the notebook's own, so that it takes minutes and not an hour;
# train_method and export_student keep outputs of their own
JOBS = {
    "train_clip_cid": {"data": "scenes:4000,duplicates:0.6,tail:1", "steps": 200},
    "train_dime_fm": {"data": "scenes:4000", "steps": 200},
    "train_dlip": {"data": "scenes:4000", "steps": 100},
    "train_teacher": {"data": "scenes:4000", "steps": 150},
    "train_blip": {"data": "scenes:4000", "steps": 60, "warmup": 10},
    "train_tinyclip": {},
}
KEPT = ("text/html", "image/png", "text/plain")
MOST = 1_300_000  # bytes of a copy


def version(root: Path = ROOT) -> str:
    "The library's version, as settings.ini has it"
    return re.search(r"^version = (\S+)", (root / "settings.ini").read_text(encoding="utf-8"), re.M)[1]


def code_of(notebook: nbformat.NotebookNode) -> list[str]:
    "The sources of a notebook's cells that run, without what papermill has put in"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.source.strip() for cell in cells if "injected-parameters" not in cell.metadata.get("tags", ())]


def smaller(png: str) -> str:  # base64
    "A picture with few colours; one that has few stays as it is"
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    ground = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
    few = picture.quantize(128, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    written = io.BytesIO()
    few.save(written, "png", optimize=True)
    held = base64.b64encode(written.getvalue()).decode()
    return held if len(held) < len(png) else png


def small_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:  # None: nothing to see
    "An output without what only a kernel can use"
    if output.output_type == "stream":
        return output if output.name == "stdout" and output.text.strip() else None
    data = {kind: value for kind, value in output.get("data", {}).items() if kind in KEPT}
    if "text/html" in data:
        data.pop("image/png", None)
    if "image/png" in data:
        data["image/png"] = smaller(data["image/png"])
    is_progress = set(data) == {"text/plain"} and re.search(r"\d+%\|", data["text/plain"])
    if not data or is_progress:
        return None
    count = {"execution_count": None} if output.output_type == "execute_result" else {}
    return nbformat.v4.new_output(output.output_type, data=data, **count)


def small_copy(executed: nbformat.NotebookNode, run: dict) -> nbformat.NotebookNode:
    "An executed notebook as it is kept; `run` says how it was run"
    cells = []
    for cell in executed.cells:
        if "injected-parameters" in cell.metadata.get("tags", ()):
            continue
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
        if cell.cell_type == "code":
            cell.execution_count = None
            outputs = [small_output(output) for output in cell.outputs]
            cell.outputs = [output for output in outputs if output is not None]
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "run": run})


def kept_copy(name: str) -> nbformat.NotebookNode | None:  # None: there is none
    "The executed copy of a notebook"
    path = COPIES / f"{name}.ipynb"
    return nbformat.read(path, 4) if path.exists() else None


def is_current(name: str, root: Path = ROOT) -> bool:
    "Whether the executed copy is of the notebook's code as it is now"
    copy = kept_copy(name)
    return copy is not None and code_of(copy) == code_of(nbformat.read(root / "nbs" / f"{name}.ipynb", 4))


def execute(name: str, parameters: dict) -> Path:
    "Run a job notebook, and keep its copy"
    import papermill

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.ipynb")
        papermill.execute_notebook(
            ROOT / "nbs" / f"{name}.ipynb", out, parameters, kernel_name="python3", cwd=str(ROOT), progress_bar=False
        )
        return keep(name, nbformat.read(out, 4), parameters)


def keep(
    name: str,  # of the notebook
    executed: nbformat.NotebookNode,
    parameters: dict,  # other than the notebook's own
) -> Path:
    "Write the copy of an executed notebook; ValueError where it is too large, or names a path of this machine"
    run = {"version": version(), "date": date.today().isoformat(), "parameters": parameters}
    copy = small_copy(executed, run)
    text = json.dumps(copy, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    text = text.replace(f"{ROOT}/", "")  # paths seen from the project's root
    for path in (str(ROOT), str(Path.home()) + "/", tempfile.gettempdir() + "/"):
        if path in text:
            raise ValueError(f"the outputs of {name} name {path}: …{text[text.index(path) - 200 :][:300]}…")
    if len(text) > MOST:
        raise ValueError(f"the outputs of {name} take {len(text):,} characters, at most {MOST:,} are kept")
    COPIES.mkdir(exist_ok=True)
    path = COPIES / f"{name}.ipynb"
    path.write_text(text, encoding="utf-8")
    return path


def told(run: dict) -> str:  # Markdown
    "What a page says of the run that its outputs are of"
    changes = ", ".join(f"`{name}={value}`" for name, value in run["parameters"].items())
    parameters = f"{changes}, and else the parameters below" if changes else "the parameters below"
    return f"Outputs of a run on {run['date']} with vlkd_lab {run['version']}: {parameters}."


def add_outputs(name: str, notebook: nbformat.NotebookNode) -> str:  # Markdown; empty: it is no job
    "Give the cells of a job's page the outputs of its executed copy; what the page says about them"
    if name not in JOBS:
        return ""
    copy = kept_copy(name)
    if copy is None and any(cell.get("outputs") for cell in notebook.cells):
        return ""  # its own are kept in the notebook
    if copy is None:
        return f"Shown without outputs: `make outputs NAMES={name}` runs it, and the site shows them from then on."
    outputs = {cell.source.strip(): cell.outputs for cell in copy.cells if cell.cell_type == "code"}
    missing = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            known = outputs.get(cell.source.strip())
            missing += known is None
            cell.outputs = known or cell.outputs
    words = told(copy.metadata.run)
    if missing:
        plural = "s have" if missing > 1 else " has"
        words += f" {missing} cell{plural} changed since, and show{'' if missing > 1 else 's'} none."
    return words


def main(chosen: list[str]) -> None:
    "Run the jobs that are named, or those whose copies are of other code; SystemExit for a name that is none"
    unknown = set(chosen) - set(JOBS)
    if unknown:
        sys.exit(f"no job notebook is called {', '.join(sorted(unknown))}: there are {', '.join(JOBS)}")
    for name, parameters in JOBS.items():
        if name in chosen or (not chosen and not is_current(name)):
            print(f"{name} …", flush=True)
            path = execute(name, parameters)
            print(f"  {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
