"""Pictures and recordings of the bench and the explorers for README and docs, from a real page: `make screenshots` (the tests' pages drive it).

    python tools/screenshots.py                 every part, with trainings: half an hour
    python tools/screenshots.py film recorded_timeline     these parts alone
    python tools/screenshots.py --in ~/lab recorded_bench     in a new folder, which is removed: its path can be read in some pictures

A recording is an animated WebP of at most 600 KB, which is played in 20 seconds. It plays once and ends with its last picture.
"""

import argparse
import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jupyter_page import JupyterServer, open_page, write_notebook
from PIL import Image
from test_lab import notebook, run_until, until
from warm_kernel import offer_forks

from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.runs import Run
from vlkd_lab.sent_pages import write_page
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


# ---- recordings

MOST_BYTES = 600_000  # of a recording
RECORDED_WIDTH = 900  # pixels
RECORDED_SECONDS = 20.0  # in which a recording is played, however long the training took
POINTER = """() => {
    const dot = document.body.appendChild(document.createElement('div'));
    dot.style.cssText = 'position:fixed;width:16px;height:16px;margin:-8px;border-radius:50%;border:2px solid #d55e00;background:#d55e0055;z-index:99999;pointer-events:none;left:-99px';
    addEventListener('pointermove', (event) => { dot.style.left = event.clientX + 'px'; dot.style.top = event.clientY + 'px'; }, true); }"""


class Recording:
    "Pictures of a part of a page, one after the other, each with the time for which it stands"

    def __init__(self, page, clip: Callable[[], dict]):  # what gives x, y, width and height, as they are now
        page.evaluate(POINTER)
        self.page = page
        self.clip = clip
        self.frames: list[tuple[Image.Image, int]] = []  # and milliseconds

    def look(self, seconds: float = 0.5) -> None:
        "The page as it is now, for so long"
        picture = Image.open(io.BytesIO(self.page.screenshot(clip=self.clip()))).convert("RGB")
        height = round(picture.height * RECORDED_WIDTH / picture.width)
        self.frames.append((picture.resize((RECORDED_WIDTH, height), Image.Resampling.LANCZOS), round(1000 * seconds)))

    def watch(self, seconds: float, every: float = 0.5) -> None:
        "The page while it moves"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.monotonic()
            self.look(every)
            time.sleep(max(0.0, every - (time.monotonic() - start)))

    def move_to(self, element, x: float = 0.5, y: float = 0.5, steps: int = 4) -> None:
        "The pointer to a place of an element, as shares of its size; a picture of every step"
        box = until(element.bounding_box)  # a table may be drawing its rows anew
        for step in range(1, steps + 1):
            self.page.mouse.move(box["x"] + box["width"] * x * step / steps, box["y"] + box["height"] * y * step / steps)
            self.look(0.12)

    def keep(self, name: str) -> None:
        "As an animated picture that plays once; as fine as it may be"
        pace = 1000 * RECORDED_SECONDS / sum(milliseconds for _, milliseconds in self.frames)
        durations = [round(pace * milliseconds) for _, milliseconds in self.frames]
        for width, quality in ((900, 75), (900, 60), (900, 45), (760, 60), (760, 45), (640, 45), (640, 25)):
            pictures = [_on_canvas(picture, width, self.height) for picture, _ in self.frames]
            written = io.BytesIO()
            pictures[0].save(written, "WEBP", save_all=True, append_images=pictures[1:], duration=durations, loop=1, quality=quality, method=5)
            if written.tell() <= MOST_BYTES:
                break
        (IMAGES / f"{name}.webp").write_bytes(written.getvalue())
        print(f"{name}: {len(pictures)} pictures, {sum(durations) / 1000:.0f} s, {width} pixels, quality {quality}, {written.tell():,} bytes")

    @property
    def height(self) -> int:
        "Of the highest picture"
        return max(picture.height for picture, _ in self.frames)


def _on_canvas(picture: Image.Image, width: int, height: int) -> Image.Image:
    "All pictures of a recording have one size: the page's own colour stands below one that is lower"
    canvas = Image.new("RGB", (RECORDED_WIDTH, height), picture.getpixel((0, picture.height - 1)))
    canvas.paste(picture)
    return canvas.resize((width, round(height * width / RECORDED_WIDTH)), Image.Resampling.LANCZOS)


def around(element, most: int = 1000) -> Callable[[], dict]:
    "The part of the window in which an element stands, no higher than so many pixels"

    def clip() -> dict:
        box = element.bounding_box()
        return {"x": box["x"], "y": max(box["y"], 0), "width": box["width"], "height": min(box["height"], most)}

    return clip


def window(page) -> Callable[[], dict]:
    "The whole window"
    return lambda: {"x": 0, "y": 0, **page.viewport_size}


def recorded_timeline(folder: Path, page, out: Path) -> None:
    "The time line of the guide is played, and a picture of it chosen"
    look = page.browser_page
    look.set_viewport_size({"width": 1000, "height": 900})
    look.goto((IMAGES / "timeline.html").as_uri())
    player = look.locator(".vlkd-player")
    player.wait_for()
    film = Recording(look, window(look))
    film.look(1.5)
    look.locator(".vlkd-bar input").focus()
    look.keyboard.press("Home")
    for _ in range(18):
        film.look(0.5)
        look.keyboard.press("ArrowRight")
        look.keyboard.press("ArrowRight")
        time.sleep(0.1)
    film.move_to(player.locator("canvas").nth(1), 0.4, 0.3)
    look.mouse.down()
    look.mouse.up()
    time.sleep(0.3)
    film.look(3)
    film.keep("timeline")


def recorded_bench(folder: Path, page, out: Path) -> None:
    "A training of TinyCLIP: the bench for the README, the network that shrinks, from a cell to its pair, a fork and the table of runs"
    out = folder / "runs" / "tinyclip"  # in the notebook "runs/tinyclip", as people write it
    small = dict(data="scenes:4000", batch_size=32, steps=200, stages=1, keep_checkpoints=2, compare_scratch=False, device="cpu")
    run, cells = Run(out), notebook("train_tinyclip", folder, **small, out=out.relative_to(folder).as_posix())[0]
    page.open("nbs/train_tinyclip.ipynb")
    look = page.browser_page
    look.evaluate("jupyterapp.shell.collapseLeft()")
    look.set_viewport_size({"width": 1100, "height": 1000})
    run_until(page, cells, "training")
    bench = look.locator(".jp-OutputArea-output:has(.vlkd-panel)").first
    network, pair = bench.locator(".vlkd-network"), bench.locator(".vlkd-pair")

    def steps() -> int:
        return max((m["step"] for m in run.metrics() if "total" in m), default=0)

    until(lambda: steps() > 3 and network.count(), 300)
    bench.evaluate("e => e.scrollIntoView()")
    film = Recording(look, window(look))
    film.watch(5)
    slider = bench.locator('input[type=range][data-name="learning_rate_factor"]')
    film.move_to(slider)
    slider.focus()
    for _ in range(4):
        look.keyboard.press("ArrowLeft")
        film.look(0.3)
    film.watch(6, every=0.6)
    film.keep("bench")

    network.evaluate("e => e.scrollIntoView({block: 'center'})")
    film = Recording(look, around(network, 800))
    until(lambda: network.locator(".vlkd-kept").count())
    while steps() < 90:  # the gates close, and their stage ends with a cut
        film.look(0.6)
        time.sleep(1.0)
    film.move_to(network.locator(".vlkd-head").nth(2))
    network.locator(".vlkd-head").nth(2).click()
    until(lambda: network.locator(".vlkd-heats canvas").count() == 2)  # teacher and student
    network.evaluate("e => e.scrollIntoView({block: 'center'})")
    film.watch(4, every=1)
    film.keep("network")

    canvas = bench.locator(".vlkd-matrix canvas").nth(1)
    film = Recording(look, window(look))
    for x, y in ((0.3, 0.6), (0.55, 0.25)):
        canvas.evaluate("e => e.scrollIntoView({block: 'center'})")
        film.look(1.5)
        film.move_to(canvas, x, y)
        look.mouse.down()
        look.mouse.up()
        until(lambda: pair.locator("tbody tr").count())
        pair.evaluate("e => e.scrollIntoView({block: 'end'})")
        film.watch(5, every=1)
    film.keep("pair")

    bench.evaluate("e => e.scrollIntoView()")
    button = bench.locator('button[data-name="fork"]')
    film = Recording(look, window(look))
    film.move_to(button)
    button.click()
    until(lambda: bench.locator(".vlkd-made b").count())
    film.watch(3, every=0.6)
    recorded_board(folder, page, film, run)


def recorded_board(folder: Path, page, film: Recording, run: Run) -> None:
    "The table of runs, with the fork at work"
    until(lambda: run.status()["state"] == "waiting", 600)
    child = Run(run.folder.with_name("tinyclip-fork-1"))
    film.look(1)
    page.browser_page.locator('button[data-name="start-fork"]').click()
    until(lambda: child.status()["state"] == "running", 120)
    film.watch(3, every=0.6)
    cells = ["from vlkd_lab.widgets import runs_board", f"runs_board({run.folder.parent.relative_to(folder).as_posix()!r})"]
    write_notebook(folder / "nbs" / "board.ipynb", cells, "warm")
    page.open("nbs/board.ipynb")
    page.run_cell(0)
    page.run_cell(1)
    table = page.output(1).locator(".vlkd-runs")
    until(lambda: table.locator("tbody tr").count() == 2)
    page.browser_page.evaluate(POINTER)
    for name in ("tinyclip", "tinyclip-fork-1"):
        film.move_to(table.locator(f'input[data-name="tick {name}"]'))
        table.locator(f'input[data-name="tick {name}"]').check()
        film.look(0.6)
    until(lambda: page.output(1).locator(".vlkd-plot").count())
    film.watch(6, every=0.75)
    film.keep("forks")
    child.control(stop=True)
    until(lambda: child.status()["state"] in ("stopped", "waiting", "finished"))


def recorded_page(folder: Path, page, out: Path) -> None:
    "A notebook that papermill has executed, sent as one page: somebody reads it, and plays its time line"
    executed = folder / "sent.ipynb"
    given = dict(data="scenes:4000", stages=1, steps=24, batch_size=32, compare_scratch=False, device="cpu", out="runs/tinyclip", probe_pairs=24)
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/train_tinyclip.ipynb"), str(executed), "-k", "warm", *words], cwd=folder, check=True)
    sent = write_page(executed, folder / "sent.html")
    look = page.browser_page
    look.set_viewport_size({"width": 1000, "height": 900})
    look.goto(sent.as_uri())
    film = Recording(look, window(look))
    film.look(1.5)
    height = look.evaluate("document.documentElement.scrollHeight")
    for step in range(1, 17):
        look.evaluate(f"scrollTo(0, {height} * {step} / 18)")
        time.sleep(0.15)
        film.look(0.9)
    look.emulate_media(color_scheme="dark")
    time.sleep(0.5)
    film.look(3)
    look.emulate_media(color_scheme="light")
    film.keep("sent_page")


def claims(*_) -> None:
    "The methods side by side, of the numbers that come with the project"
    stored = stored_results()
    drawn = io.BytesIO()
    plot_overall(overall(stored["trials"]), stored["teachers"]["teacher"]).savefig(drawn, dpi=140)
    keep(drawn.getvalue(), "claims")


PARTS = bench, explorers, clip_cid, dime_fm, dlip, film, recorded_timeline, recorded_bench, recorded_page, gates, claims

def pictures(parts: list[str], place: Path) -> None:
    "Take the pictures of some parts, in a project at a place that is new"
    folder = project(place)
    with tempfile.TemporaryDirectory() as temporary:
        offer_forks(Path(temporary))  # the kernel that the tests' notebooks name
        with JupyterServer(folder) as server, open_page(server) as page:
            for part in [globals()[name] for name in parts] or PARTS:
                part(folder, page, folder / "run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(part.__name__ for part in PARTS))
    parser.add_argument("--in", dest="place", type=Path, help="a folder that there is not yet")
    given = parser.parse_args()
    if unknown := set(given.parts) - {part.__name__ for part in PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    place = given.place or Path(tempfile.mkdtemp()) / "project"
    place.mkdir(parents=True)
    try:
        pictures(given.parts, place)
    finally:
        shutil.rmtree(place)
