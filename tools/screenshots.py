"""Pictures of the bench and the explorers for README and docs, from a real page: `make screenshots` (the tests' pages drive it)."""

import base64
import io
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from jupyter_page import JupyterServer, open_page
from PIL import Image
from test_lab import notebook, run_until, until
from warm_kernel import offer_forks

from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.runs import Run
from vlkd_lab.trainers import start
from vlkd_lab.verdicts import overall, plot_overall, stored_results
from vlkd_lab.widgets import write_timeline

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "nbs" / "images"


def save(element, name: str) -> None:
    "An element of the page as a small PNG; the page grows to hold it, since a bench's bar would lie over what is scrolled"
    page = element.page
    height = element.bounding_box()["height"]
    page.set_viewport_size({"width": page.viewport_size["width"], "height": max(int(height) + 300, 900)})
    time.sleep(1)
    element.scroll_into_view_if_needed()
    keep(element.screenshot(), name)


def keep(png: bytes, name: str) -> None:
    "A picture for the pages, small: the palette is moved to where the colours are, so that greys stay grey"
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    few = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(IMAGES / f"{name}.png", optimize=True)
    print(name, (IMAGES / f"{name}.png").stat().st_size)


def project(folder: Path) -> Path:
    "A project of its own, so that no run is disturbed"
    (folder / "nbs").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", folder)
    for name in ("data_samples", ".cache"):
        (ROOT / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    return folder


def bench(folder: Path, page, out: Path) -> None:
    "The bench in the second stage of a run, after a change in mid-run"
    run, cells = Run(out), notebook("train_tinyclip", folder, stages=2, steps=120, compare_scratch=False, out=str(out))[0]
    page.open("nbs/train_tinyclip.ipynb")
    page.browser_page.set_viewport_size({"width": 1280, "height": 1700})
    run_until(page, cells, "training")
    page.browser_page.locator('button[data-name="gradient_share"]').click()
    until(lambda: [m["step"] for m in run.metrics()[-1:]] > [60], 300)
    run.control(learning_rate_factor=0.7)
    until(lambda: [m["step"] for m in run.metrics()[-1:]] > [155], 600)
    time.sleep(2)
    save(page.browser_page.locator(".jp-OutputArea-output:has(.vlkd-panel)"), "bench")
    until(lambda: run.status()["state"] == "waiting", 600)


def explorers(folder: Path, page, out: Path) -> None:
    "A cell of the affinities chosen, and the map of clusters"
    cells = notebook("explore_affinity", folder, run_folder=str(out))[0]
    page.open("nbs/explore_affinity.ipynb")
    output = page.output(run_until(page, cells, "AffinityExplorer(affinities, val[rows])"))
    page.kernel_eval("from vlkd_lab.explorers import most_disputed")
    row, column = (int(k) for k in page.kernel_eval("print(*most_disputed(affinities))").split())
    canvas = output.locator("canvas").nth(1)
    width, height = canvas.bounding_box()["width"] - 75, canvas.bounding_box()["height"] - 20  # of the matrix itself
    canvas.click(position={"x": 17 + (column + 0.5) * width / 48, "y": 2 + (row + 0.5) * height / 48})
    output.locator("table").wait_for()
    save(output, "affinity")
    cells = notebook("explore_clusters", folder)[0]
    page.open("nbs/explore_clusters.ipynb")
    output = page.output(run_until(page, cells, "show(ClusterMap(state))"))
    until(lambda: "UMAP 1" in output.inner_text(), 180)
    output.locator('button[data-name="colour_by"]').nth(2).click()
    until(lambda: "wrong" in output.inner_text())
    time.sleep(1)
    save(output, "clusters")


def clip_cid(folder: Path, page, out: Path) -> None:
    "The bench of a CLIP-CID run with its map of clusters, and a threshold chosen by slider"
    out, data = folder / "cid", "scenes:4000,duplicates:0.6,tail:1"
    run, cells = Run(out), notebook("train_clip_cid", folder, data=data, steps=200, compare_scratch=False, out=str(out))[0]
    page.open("nbs/train_clip_cid.ipynb")
    page.browser_page.set_viewport_size({"width": 1280, "height": 1500})
    run_until(page, cells, "training")
    until(lambda: [m["step"] for m in run.metrics()[-1:]] > [150], 600)
    time.sleep(2)
    save(page.browser_page.locator(".jp-OutputArea-output:has(.vlkd-panel)"), "clip_cid")
    until(lambda: run.status()["state"] == "waiting", 600)
    cells = notebook("explore_balance", folder)[0]
    page.open("nbs/explore_balance.ipynb")
    output = page.output(run_until(page, cells, "explorer"))
    until(lambda: output.locator("img").count() > 8)
    time.sleep(1)
    save(output, "balance")


def begun(name: str, folder: Path, page, height: int, **parameters) -> Run:
    "The run of a job notebook, its bench shown and its training begun"
    out = folder / name
    cells = notebook(f"train_{name}", folder, compare_scratch=False, out=str(out), **parameters)[0]
    page.open(f"nbs/train_{name}.ipynb")
    page.browser_page.set_viewport_size({"width": 1280, "height": height})
    number = run_until(page, cells, "bench")
    run_until(page, {line: n for line, n in cells.items() if n > number}, "training")
    return Run(out)


def dime_fm(folder: Path, page, out: Path) -> None:
    "The bench of a DIME-FM run, with an image's nearest sentences"
    run = begun("dime_fm", folder, page, 1900, data="scenes:4000", steps=300)
    until(lambda: [m["step"] for m in run.metrics()[-1:]] > [200], 600)
    canvas = page.browser_page.locator(".vlkd-matrix canvas").first
    canvas.click(position={"x": 60, "y": 120})
    page.browser_page.locator(".jp-OutputArea-output:has(.vlkd-panel) table b").first.wait_for()
    time.sleep(2)
    save(page.browser_page.locator(".jp-OutputArea-output:has(.vlkd-panel)"), "dime_fm")
    until(lambda: run.status()["state"] == "waiting", 600)


def dlip(folder: Path, page, out: Path) -> None:
    "The bench of a DLIP run, a word chosen: where it looks, teacher and student"
    run = begun("dlip", folder, page, 2200, data="scenes:4000", steps=200)
    until(lambda: [m["step"] for m in run.metrics()[-1:]] > [60], 600)
    cross = page.browser_page.locator(".vlkd-cross").first
    cross.locator('button[data-name="image-2"]').click()
    cross.locator('button[data-name^="word-"]', has_text="drop").first.click()
    until(lambda: [m["step"] for m in run.metrics()[-1:]] > [150], 600)
    time.sleep(2)
    save(page.browser_page.locator(".jp-OutputArea-output:has(.vlkd-panel)"), "dlip")
    until(lambda: run.status()["state"] == "waiting", 600)


def film(folder: Path, page, *_) -> None:
    "The time line of a small TinyCLIP run, as a page of its own for the guide, and a picture of it"
    small = dict(data="scenes:4000", stages=2, steps=60, probe_pairs=24, keep_snapshots=8, compare_scratch=False, device="cpu")
    job = open_tinyclip(TinyCLIP(**small, out=str(folder / "tinyclip-example")))
    start(job, beside=False)
    print("timeline", write_timeline(job.run.folder, IMAGES / "timeline.html").stat().st_size)
    picture_of_the_film(page.browser_page.context.new_page())


def picture_of_the_film(player) -> None:
    "The page of the time line as it opens"
    player.set_viewport_size({"width": 900, "height": 640})
    player.goto((IMAGES / "timeline.html").as_uri())
    player.locator("canvas").first.wait_for()
    time.sleep(1)
    keep(player.screenshot(), "timeline")


def gates(*_) -> None:
    "The gates explorer's picture, as its page has it"
    cells = json.loads((ROOT / "nbs" / "explore_gates.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = "".join(str(cell.get("outputs", "")) for cell in cells)
    keep(base64.b64decode(re.search(r"data:image/png;base64,([\w+/=]+)", shown)[1]), "gates")


def claims(*_) -> None:
    "The methods side by side, of the numbers that come with the project"
    stored = stored_results()
    drawn = io.BytesIO()
    plot_overall(overall(stored["trials"]), stored["teachers"]["teacher"]).savefig(drawn, dpi=140)
    keep(drawn.getvalue(), "claims")


PARTS = bench, explorers, clip_cid, dime_fm, dlip, film, gates, claims

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        folder = project(Path(temporary) / "project")
        offer_forks(Path(temporary))  # the kernel that the tests' notebooks name
        with JupyterServer(folder) as server, open_page(server) as page:
            for part in PARTS if len(sys.argv) < 2 else [globals()[name] for name in sys.argv[1:]]:
                part(folder, page, folder / "run")
