"""The real thing: JupyterLab on the loopback address, a headless Chromium, the notebooks as a person runs them."""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import forked
import nbformat
import pytest
import torch
from conftest import IPYKERNEL6
from figures import gate_values, write_clusters, write_gates, write_probe, write_run
from PIL import Image

from vlkd_lab.data import thumbnail
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.runs import Run, RunWriter, Snapshots, read_snapshot, write_snapshot
from vlkd_lab.trainers import train
from vlkd_lab.widgets import STATIC

ROOT = Path(__file__).parent.parent
HOSTILE = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'> \"quotes\" \u202eright to left"

jupyter_page = pytest.importorskip("jupyter_page", reason="no Playwright: pip install playwright; the browser tests did not run")
pytestmark = [
    pytest.mark.skipif(jupyter_page.find_chromium() is None, reason="no Chromium: apt-get install chromium; the browser tests did not run"),
    pytest.mark.timeout(900),
]


def until(condition, seconds=None, every=0.05, seen=None):
    "Wait for a condition to become true; the value it had. If it does not, the error says what `seen()` gave"
    deadline = time.monotonic() + (seconds or jupyter_page.PATIENCE)
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain; seen: {seen and seen()}"
        time.sleep(every)
    return value


def with_captions(source, target, caption):
    "A copy of a shard in which every caption is this one with a number"
    with tarfile.open(target, "w") as out, tarfile.open(source) as good:
        for number, member in enumerate(good.getmembers()):
            content = good.extractfile(member).read()
            if member.name.endswith(".txt"):
                content = f"{number} {caption}".encode()
            if member.name.endswith(".json"):
                content = json.dumps({**json.loads(content), "caption": caption}).encode()
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab and a page of it for all tests, and the folder in which each has a project"
    root = tmp_path_factory.mktemp("lab")
    with jupyter_page.JupyterServer(root, {"OMP_NUM_THREADS": "1"}) as server, jupyter_page.open_page(server) as page:
        yield server, page, root


@pytest.fixture
def page(lab):
    "The page, with nothing open; what a test opens is closed at its end, and its kernels are ended"
    server, page, _ = lab
    page.console_errors.clear()
    yield page
    page.close_all()
    server.end_kernels()


@pytest.fixture
def project(lab, scenes, tiny_teacher, request):
    "A project folder with tiny data, whose validation captions are hostile; parameters of a job that takes a minute"
    folder = lab[-1] / re.sub(r"\W", "_", request.node.name)
    (folder / "nbs").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", folder)
    for name in ("data_samples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "val").mkdir()
    with_captions(next(scenes.glob("val-*.tar")), folder / "val" / "val-000000.tar", HOSTILE)
    given = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=str(folder / "val/val-000000.tar"), teacher=str(tiny_teacher))
    return folder, given | dict(stages=2, steps=1500, batch_size=16, device="cpu", out=str(folder / "run"), compare_scratch=False)


SHOWS_OFTEN = "from vlkd_lab import runs\nruns.SNAPSHOT_SHARE = 0.2  # of the time, and not 0.01: the next picture need not be waited for"


def notebook(name, project, kernel="warm", **parameters):
    "A notebook of the project in its folder, with other parameters; cells by their first words"
    page = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    cell = next(c for c in page.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = "\n".join([SHOWS_OFTEN, cell.source, *(f"{name} = {value!r}" for name, value in parameters.items())])
    page.metadata.kernelspec = dict(name=kernel, display_name=kernel, language="python")
    for c in page.cells:
        c.pop("outputs", None)
        if c.cell_type == "code":
            c.outputs, c.execution_count = [], None
    nbformat.write(page, project / "nbs" / f"{name}.ipynb")
    return {c.source.split("\n")[-1]: number for number, c in enumerate(page.cells) if c.cell_type == "code"}, len(page.cells)


def run_until(page, cells, last):
    "Run the cells from the top until the one that ends with this line"
    for line, number in cells.items():
        assert page.run_cell(number), page.output_text(number)[-2000:]
        if line == last:
            return number
    raise AssertionError(f"no cell ends with {last!r}: {list(cells)}")


def frames(page):
    return page.browser_page.locator(".vlkd-matrix canvas").evaluate_all("all => all.map(c => +c.dataset.frame)")


def points_drawn(page):
    "How many points each plot of the page shows"
    return page.browser_page.locator(".vlkd-plot").evaluate_all("all => all.map(e => +(e.dataset.points ?? 0))")


def head(page, name):
    return page.browser_page.locator(f'.vlkd-head [data-name="{name}"] b').first.inner_text()


def press(page, name):
    page.browser_page.locator(f'button[data-name="{name}"]').first.click()


def stop(page):
    "Stop asks once, in its place"
    press(page, "stop")
    press(page, "stop-yes")


def unfold_terms(page):
    "Show the terms that do not count yet"
    page.browser_page.locator('button[data-name="more"]').first.click()
    until(lambda: page.browser_page.locator('button[data-name="more"]').first.get_attribute("aria-expanded") == "true")


def messages_to_kernels(page):
    "What widgets send to kernels of notebooks that are opened from now on, as it goes out"
    sent = []

    def listen(socket):
        socket.on("framesent", lambda frame: b"comm_msg" in (frame if isinstance(frame, bytes) else frame.encode()) and sent.append(frame))

    page.browser_page.on("websocket", listen)
    return sent


def steps(run):
    return sum("total" in m for m in run.metrics())


def controls(run):
    return [m for m in run.metrics() if m.get("event") == "control"]


def talks_little(page, sent):
    "Each message to a kernel makes JupyterLab work: one for each snapshot, and one now and then that says that somebody looks"
    asked, shown, began = len(sent), frames(page)[1], time.monotonic()
    until(lambda: frames(page)[1] > shown + 3)
    seconds = time.monotonic() - began
    snapshots = frames(page)[1] - shown
    assert snapshots - 1 <= len(sent) - asked <= snapshots + 2 + seconds, (snapshots, seconds)


@pytest.mark.parametrize("kernel", ["warm", "warm6"])
def test_a_bench_comes_alive_and_its_controls_act(page, project, kernel):
    if kernel == "warm6" and not IPYKERNEL6.exists():
        pytest.skip(f"no ipykernel 6 in {IPYKERNEL6}: make test installs it")
    folder, given = project
    cells, _ = notebook("train_tinyclip", folder, kernel, **given)
    run = Run(given["out"])
    sent = messages_to_kernels(page)
    page.open(f"{folder.name}/nbs/train_tinyclip.ipynb")
    assert page.kernel_eval("import ipykernel; print(ipykernel.version_info[0] == 6)").strip() == str(kernel == "warm6")
    bench = run_until(page, cells, "bench")
    assert head(page, "state") == "new" and not (run.folder / "snapshots" / "newest.safetensors").exists()
    assert page.run_cell(cells["training"]) and "working" in page.output_text(cells["training"])
    until(lambda: frames(page)[1:2] and frames(page)[1] > 1)
    first, before = frames(page)[1], page.browser_page.locator(".vlkd-matrix canvas").nth(1).evaluate("c => c.toDataURL()")
    until(lambda: frames(page)[1] > first + 2)
    assert page.browser_page.locator(".vlkd-matrix canvas").nth(1).evaluate("c => c.toDataURL()") != before, "the picture changed"
    assert len(frames(page)) == 9, "three affinities, and six canvases of gates"
    talks_little(page, sent)
    until(lambda: points_drawn(page)[:1] and points_drawn(page)[0] > 4)
    fits_and_shows_captions_as_text(page)
    trying = cells["retrieve(current_student(job.run), job.val, queries=4)"]
    assert page.run_cell(trying) and page.output(trying).locator("img").count() >= 4, "the kernel is free"
    done = cells["when_trained(training, bench)"]
    assert page.run_cell(done) is False and "still training" in page.output_text(done)
    sliders_reach_the_trainer(page, run)
    pause_resume(page, run)
    page.reload()
    assert page.run_cell(bench)
    until(lambda: frames(page)[1:2] and frames(page)[1] > 1)
    first = frames(page)[1]
    until(lambda: frames(page)[1] > first)
    stop(page)
    until(lambda: run.status()["state"] == "stopped")
    until(lambda: head(page, "state") == "stopped")
    assert page.run_cell(done) and page.output(done).locator("img").count() == 1, "evaluation is possible, the still is a picture"
    assert page.browser_page.evaluate("window.hacked") is None
    assert not [e for e in page.console_errors if "vlkd" in e or "anywidget" in e]
    page.save()
    kept = nbformat.read(folder / "nbs" / "train_tinyclip.ipynb", 4).cells[bench].outputs[-1].data
    assert "image/png" in kept and "application/vnd.jupyter.widget-view+json" in kept, "a saved notebook has the picture"


def fits_and_shows_captions_as_text(page):
    "No sideways scrolling at 1280 pixels; arrow keys walk the matrix; a caption is text"
    output = page.browser_page.locator(".jp-OutputArea-output:has(.vlkd-panel)")
    width, shown = output.evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert width <= shown + 1
    canvas = page.browser_page.locator(".vlkd-matrix canvas").first
    canvas.focus()
    page.browser_page.keyboard.press("ArrowRight")
    said = page.browser_page.locator(".vlkd-matrix output").first.inner_text()
    assert "<script>window.hacked=1</script>" in said and "image 0" in said and canvas.get_attribute("aria-label")
    assert page.browser_page.locator(".vlkd-panel input:not([aria-label])").count() == 0


def sliders_reach_the_trainer(page, run):
    "A key on a slider is an event in the metrics; some take less than a second, also where the machine is busy"
    slider, waited = page.browser_page.locator('input[type=range][data-name="target_sparsity"]').first, []
    for wanted in (0.74, 0.73, 0.72, 0.71, 0.70, 0.69, 0.68, 0.67):
        slider.focus()
        start = time.monotonic()
        page.browser_page.keyboard.press("ArrowLeft")
        until(lambda wanted=wanted: any(abs(e.get("target_sparsity", 9) - wanted) < 1e-6 for e in controls(run)), every=0.01)
        waited.append(time.monotonic() - start)
        if waited[-1] < 1.0:
            break
    assert waited[-1] < 1.0, waited
    unfold_terms(page)
    reset = page.browser_page.locator('.vlkd-slider:has(input[data-name="target_sparsity"]) button').first
    until(reset.is_visible)
    reset.click()
    until(lambda: [e["target_sparsity"] for e in controls(run) if "target_sparsity" in e][-1] == run.config()["parameters"]["target_sparsity"])
    exact = page.browser_page.locator('input[type=number][data-name="weights.contrastive"]').first
    exact.fill("0.5")
    exact.press("Enter")
    until(lambda: any(e.get("weights") == {"contrastive": 0.5} for e in controls(run)))
    until(lambda: "contrastive" in run.metrics()[-1] or "contrastive" in run.metrics()[-2])
    press(page, "gradient_share")
    until(lambda: any(m.get("event") == "gradient_share" for m in run.metrics()))


def pause_resume(page, run):
    press(page, "pause")
    until(lambda: run.status()["state"] == "paused")
    count = steps(run)
    until(lambda: head(page, "state") == "paused")
    time.sleep(0.5)
    assert steps(run) == count
    press(page, "pause")
    until(lambda: steps(run) > count)


LOOK_AT_PLOT = """plot => {
    const share = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number)
        .map(byte => byte / 255).map(s => s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4);
    const light = (text) => share(text).reduce((sum, s, k) => sum + s * [0.2126, 0.7152, 0.0722][k], 0.05);
    let node = plot, paper = 'rgba(0, 0, 0, 0)';
    while (paper.endsWith(' 0)')) { paper = getComputedStyle(node).backgroundColor; node = node.parentElement; }
    const words = [...plot.querySelectorAll('.vlkd-tick, .vlkd-axis')].map(text => light(getComputedStyle(text).fill));
    const canvas = plot.querySelector('canvas'), bytes = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let drawn = 0;
    for (let k = 3; k < bytes.length; k += 4) drawn += bytes[k] > 128;
    const contrasts = words.map(l => Math.max(l, light(paper)) / Math.min(l, light(paper)));
    return {paper: light(paper), contrast: Math.min(...contrasts), words: words.length, drawn}; }"""
OPENED_BYTES = 300_000  # at most, beside the scripts and styles once


def test_curves_outlive_a_reload_and_take_the_colours_of_the_page(page, project):
    "A bench of a run that is over: what it sends, what is there after a reload and a change of theme, and what keys and pointer do"
    folder, _ = project
    write_gates(run := write_run(folder / "run"), **write_probe(run))
    cells = ["from vlkd_lab.widgets import attach, overlay", f"attach({str(run.folder)!r})", f"overlay([{str(run.folder)!r}])"]
    jupyter_page.write_notebook(folder / "look.ipynb", cells, "warm")
    look, received = page.browser_page, []

    def listen(socket):
        socket.on("framereceived", lambda frame: received.append(len(frame)))

    look.on("websocket", listen)
    page.open(f"{folder.name}/look.ipynb")
    assert page.run_cell(0)
    received.clear()
    assert page.run_cell(1)
    plot = page.output(1).locator(".vlkd-plot")
    until(lambda: points_drawn(page)[:1] and points_drawn(page)[0] > 400)
    until(lambda: len(frames(page)) == 9 and min(frames(page)) > 0)
    time.sleep(0.5)
    once = sum(path.stat().st_size for path in STATIC.iterdir())
    print(f"a bench opens with {sum(received):,} bytes; the scripts and styles, each once, are {once:,}")
    assert sum(received) - once < OPENED_BYTES
    assert page.run_cell(2)
    until(lambda: len(points_drawn(page)) == 2)
    before = plot.evaluate(LOOK_AT_PLOT)
    assert before["contrast"] >= 4.5 and before["drawn"] > 3000 and before["words"] > 20

    plot.locator('button[data-name="feature mimicking"]').click()  # hidden, and still so after a reload
    shown = until(lambda: points_drawn(page)[0] < 500 and points_drawn(page)[0])
    chosen = f"from vlkd_lab.widgets import LossCurves\nprint(attach({str(run.folder)!r}).widgets.part(LossCurves).widget.chosen)"
    until(lambda: "feature mimicking" in page.kernel_eval(chosen))  # the kernel has heard of it
    page.save()
    page.reload()

    def is_as_before():  # and no cell was run again
        points = points_drawn(page)
        return points[:1] == [shown] and points[1:] and points[1] > 250

    until(is_as_before, seen=lambda: (shown, points_drawn(page)))
    after = plot.evaluate(LOOK_AT_PLOT)
    assert abs(after["drawn"] / before["drawn"] - 1) < 0.2 and plot.locator('button[aria-pressed="false"]').count() == 1

    drawing = plot.locator(".vlkd-drawing")
    drawing.focus()
    look.keyboard.press("End")
    look.keyboard.press("ArrowLeft")
    said = plot.locator(".vlkd-unseen").inner_text()
    assert said.startswith("step 119: ") and "affinity mimicking" in said and drawing.get_attribute("aria-label")

    def drag():
        box = drawing.bounding_box()
        look.mouse.move(box["x"] + 120, box["y"] + 100)
        look.mouse.down()
        look.mouse.move(box["x"] + 180, box["y"] + 105, steps=3)
        look.mouse.up()
        return plot.get_attribute("data-zoomed") == "true"

    until(drag)  # what is drawn late above it may move it
    drawing.dblclick(position={"x": 150, "y": 100})
    until(lambda: plot.get_attribute("data-zoomed") == "false")

    switch = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
    look.evaluate(switch, "JupyterLab Dark")
    dark = until(lambda: (now := plot.evaluate(LOOK_AT_PLOT))["paper"] < 0.1 and now["contrast"] >= 4.5 and now)
    assert abs(dark["drawn"] / after["drawn"] - 1) < 0.2
    look.evaluate(switch, "JupyterLab Light")
    until(lambda: (now := plot.evaluate(LOOK_AT_PLOT))["paper"] > 0.9 and now["contrast"] >= 4.5)
    assert not [e for e in page.console_errors if "vlkd" in e or "anywidget" in e]


def gated_run(folder):
    "A run in its gate phase, with hostile captions, pictures, and where the heads of both models look; what takes a snapshot of it"
    student = write_probe(run := write_run(folder))
    heads = {"image": torch.rand(12, 3, 4, 4), "text": torch.rand(12, 2, 2, 16)}
    maps = {f"heads_{tower}": (shares / shares.sum(-1, keepdim=True)).half() for tower, shares in heads.items()}
    taught = {name: torch.tensor(array) for name, array in read_snapshot(folder / "probe.safetensors")[0].items()}
    write_snapshot(folder / "probe.safetensors", taught | {f"teacher_{name}": map_ for name, map_ in maps.items()}, {})
    picture = thumbnail(Image.new("RGB", (32, 32), "crimson"))
    captions = [f"{k} {HOSTILE}" for k in range(12)]
    (folder / "probe.json").write_text(json.dumps({"captions": captions, "pictures": [picture] * 12, "tokens": [["<start>", HOSTILE]] * 12}))
    maps["heads_rows"] = torch.arange(12)

    def snapshot(openness, step, cosine=None):
        changed = student if cosine is None else student | {"student": cosine}
        arrays = gate_values(openness) | changed | {f"student_{name}": map_ for name, map_ in maps.items()}
        Snapshots(run).take(lambda: arrays, stage="stage-1", phase="gates", step=step)

    snapshot(5.0, 30)
    return run, snapshot


SHRUNK = """network => ({
    frame: +network.dataset.frame, heads: network.querySelectorAll('.vlkd-head .vlkd-kept').length,
    room: [...network.querySelectorAll('.vlkd-kept')].reduce((sum, bar) => sum + bar.getAttribute('width') * bar.getAttribute('height'), 0),
    numbers: [...network.querySelectorAll('.vlkd-numbers td:nth-child(2)')].map(cell => parseFloat(cell.textContent))})"""


def test_the_network_shrinks_and_heads_and_cells_open(page, project):
    "Gates that close shrink what is drawn; a head shows two maps, a cell its pair, which follows the training; all stays after a reload"
    folder, _ = project
    run, snapshot = gated_run(folder / "run")
    jupyter_page.write_notebook(folder / "look.ipynb", ["from vlkd_lab.widgets import attach", f"attach({str(run.folder)!r})"], "warm")
    page.open(f"{folder.name}/look.ipynb")
    assert page.run_cell(0) and page.run_cell(1)
    look = page.browser_page
    network, pair = (page.output(1).locator(f".vlkd-{name}") for name in ("network", "pair"))

    def drawn():
        return network.evaluate(SHRUNK) if network.count() else {"room": 0}

    before = until(lambda: (now := drawn())["room"] and now)
    assert before["heads"] == 3 * 4 + 2 * 2 and before["numbers"][0] > 0
    snapshot(-3.0, 60)
    until(lambda: (now := drawn())["room"] < 0.7 * before["room"] and now["numbers"][0] < before["numbers"][0])

    head = network.locator(".vlkd-head").nth(1)
    network.locator('.vlkd-head[tabindex="0"]').first.focus()
    look.keyboard.press("ArrowRight")
    look.keyboard.press("Enter")
    until(lambda: network.locator(".vlkd-heats canvas").count() == 2)
    assert head.get_attribute("aria-label").startswith("image tower, layer 0, head 1: keep probability 0.")
    assert head.get_attribute("aria-pressed") == "true" and "overlap of teacher and student 1.00" in network.inner_text()
    canvas = page.output(1).locator(".vlkd-matrix canvas").first
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        look.keyboard.press(key)
    until(lambda: pair.locator("tbody tr").count() == 2)
    assert f"2 {HOSTILE[:30]}" in pair.inner_text() and pair.locator("img").count() >= 2
    snapshot(-3.0, 61, cosine=torch.full((12, 12), 0.123))
    until(lambda: pair.locator("tbody tr").nth(1).locator("td").first.inner_text() == "0.123")

    page.save()
    page.reload()
    until(lambda: network.locator(".vlkd-heats canvas").count() == 2 and pair.locator("tbody tr").count() == 2)
    assert pair.locator("tbody tr").nth(1).locator("td").first.inner_text() == "0.123" and head.get_attribute("aria-pressed") == "true"
    network.locator('.vlkd-pairs button[data-name="pair-3"]').click()
    until(lambda: network.locator('.vlkd-pairs button[aria-pressed="true"]').get_attribute("data-name") == "pair-3")
    network.locator('.vlkd-head[aria-label^="text tower"]').first.click()
    until(lambda: network.locator(".vlkd-tokens").count() == 2)
    assert HOSTILE.split(" ")[0] in network.locator(".vlkd-tokens").first.inner_text()
    look.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
    for width in (600, 900):
        look.set_viewport_size({"width": width, "height": 900})
        until(lambda: all(part.evaluate("e => e.scrollWidth <= e.clientWidth + 1") for part in (network, pair)), 10)
    look.set_viewport_size({"width": 1280, "height": 900})
    look.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
    assert look.evaluate("window.hacked") is None
    assert not [e for e in page.console_errors if "vlkd" in e or "anywidget" in e]


def test_a_bench_fits_a_narrow_page_and_stays_as_it_was_left(page, project):
    "600 pixels without sideways scroll, the bar on top while one scrolls, a part that stays folded, a panel of its own"
    folder, _ = project
    write_gates(run := write_run(folder / "run"), **write_probe(run))
    cells = ["from vlkd_lab.widgets import attach", f"attach({str(run.folder)!r})"]
    jupyter_page.write_notebook(folder / "look.ipynb", cells, "warm")
    look = page.browser_page
    before = look.viewport_size
    try:
        page.open(f"{folder.name}/look.ipynb")
        look.evaluate("jupyterapp.shell.collapseLeft()")
        assert page.run_cell(0) and page.run_cell(1)
        until(lambda: len(frames(page)) == 9 and min(frames(page)) > 0)
        output = page.output(1)
        wanted = 600
        for _ in range(3):  # the page around the bench takes some of the width
            shown = output.evaluate("e => e.clientWidth")
            look.set_viewport_size({"width": look.viewport_size["width"] + wanted - shown, "height": 800})
            time.sleep(0.4)
        assert abs(output.evaluate("e => e.clientWidth") - wanted) < 4
        until(lambda: output.evaluate("e => [...e.querySelectorAll('*')].every(part => part.scrollWidth <= part.clientWidth + 1 || !part.matches('.jp-OutputArea-output, .widget-box'))"))
        right = output.evaluate("e => e.getBoundingClientRect().right")
        inside = output.evaluate("e => Math.max(...[...e.querySelectorAll('canvas, button, input')].map(part => part.getBoundingClientRect().right))")
        assert inside <= right + 1, "nothing is drawn beside the output"

        last = output.locator(".vlkd-matrix canvas").last
        last.evaluate("canvas => canvas.scrollIntoView({block: 'end'})")
        bar = output.locator(".vlkd-top")
        until(lambda: bar.evaluate("bar => bar.getBoundingClientRect().top >= 0 && bar.getBoundingClientRect().bottom < innerHeight"))

        fold = output.locator('button[data-name="fold"]')
        named = fold.first.inner_text()
        fold.first.click()
        until(lambda: fold.first.get_attribute("aria-expanded") == "false" and not output.locator(".vlkd-plot").first.is_visible())
        page.save()
        page.reload()
        until(lambda: output.locator('button[data-name="fold"]').count() >= 3)
        first = output.locator('button[data-name="fold"]').first
        until(lambda: first.get_attribute("aria-expanded") == "false" and first.inner_text() == named)
        first.click()
        until(lambda: output.locator(".vlkd-plot").first.is_visible())

        panels = look.locator(".vlkd-top").count()
        output.locator('button[data-name="panel"]').click()
        until(lambda: look.locator(".vlkd-top").count() == panels + 1)  # the same bench in a panel of JupyterLab
        assert look.locator('.jp-LinkedOutputView button[data-name="panel"]').count() == 0 or not look.locator('.jp-LinkedOutputView button[data-name="panel"]').is_visible()
    finally:
        look.set_viewport_size(before)


def test_a_second_notebook_watches_a_papermill_job(page, project):
    folder, given = project
    notebook("train_tinyclip", folder)
    command = [forked.python(), "-m", "papermill", str(folder / "nbs/train_tinyclip.ipynb"), str(folder / "out.ipynb"), "-k", "warm"]
    command += [part for name, value in given.items() for part in ("-p", name, str(value))]
    job = subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run = Run(given["out"])
    cells, _ = notebook("watch_run", folder, run_folder=given["out"])
    try:
        page.open(f"{folder.name}/nbs/watch_run.ipynb")
        until(lambda: run.status()["state"] == "running" and steps(run) > 1)
        run_until(page, cells, "overlay(folders)")
        until(lambda: frames(page)[1:2] and frames(page)[1] > 1)
        first = frames(page)[1]
        until(lambda: frames(page)[1] > first)
        pause_resume(page, run)
        stop(page)
        until(lambda: run.status()["state"] == "stopped")
        until(lambda: head(page, "state") == "stopped")
        assert page.output(cells["overlay(folders)"]).locator(".vlkd-plot").count() == 1
        page.browser_page.goto("about:blank")
        time.sleep(0.5)
        assert job.wait(jupyter_page.PATIENCE) != 0, "a job that was stopped is no success"
    finally:
        job.kill()


def test_an_error_in_training_shows_in_the_bench(page, project):
    folder, given = project
    cells, _ = notebook("train_tinyclip", folder, **given | dict(learning_rate=1e9, inheritance="none", stages=1, steps=60))
    page.open(f"{folder.name}/nbs/train_tinyclip.ipynb")
    run_until(page, cells, "training")
    alert = page.browser_page.locator('.vlkd-messages [role="alert"]')
    alert.wait_for()
    assert "Diverged" in alert.inner_text() and Run(given["out"]).status()["traceback"].startswith("Traceback")
    traceback = page.browser_page.locator(".vlkd-messages pre")
    page.browser_page.locator(".vlkd-messages summary").evaluate("summary => summary.click()")  # whole, also while the page draws anew
    until(lambda: "Traceback" in traceback.inner_text())
    assert page.run_cell(cells["when_trained(training, bench)"]) is False and "Diverged" in page.output_text(cells["when_trained(training, bench)"])
    before = traceback.element_handle()
    page.kernel_eval("bench.leave_picture()")  # as at the end of a run: the page draws the panel anew; what was unfolded stays so
    until(lambda: not before.evaluate("pre => pre.isConnected") and traceback.is_visible())


def test_explorers_answer_clicks_and_sliders(page, project):
    folder, given = project
    job = open_tinyclip(TinyCLIP(**given | dict(steps=20, validate_every=20, gate_share=0.6)))
    train(job)
    opened = {
        "explore_affinity": (dict(run_folder=given["out"], pairs=24), "AffinityExplorer(affinities, val[rows])"),
        "explore_gates": (dict(run_folder=given["out"]), "explorer"),
        "explore_clusters": (dict(val=given["val"], teacher=given["teacher"], clusters=3, pairs=24), "show(ClusterMap(state))"),
    }
    found = {name: notebook(name, folder, **parameters)[0] for name, (parameters, _) in opened.items()}
    look = page.browser_page
    for name, (_, last) in opened.items():
        page.open(f"{folder.name}/nbs/{name}.ipynb")
        cell = page.output(run_until(page, found[name], last))
        if name == "explore_affinity":
            cell.locator("canvas").first.click(position={"x": 100, "y": 100})
            cell.locator("table").wait_for()
            assert "<script>window.hacked=1</script>" in cell.inner_text() and cell.locator("img").count() == 1
            cell.locator('button[data-name="order"]').nth(2).click()
            until(lambda cell=cell: "Click a cell" in cell.inner_text())
        if name == "explore_gates":
            before = cell.inner_text()
            cell.locator('input[type=range][data-name="snapshot"]').focus()
            look.keyboard.press("Home")
            until(lambda cell=cell, before=before: "stage-1, step 0" in cell.inner_text() != before)
            cell.locator('input[type=range][data-name="target"]').focus()
            look.keyboard.press("Home")
            until(lambda cell=cell: "target 0.00" in cell.inner_text())
        if name == "explore_clusters":
            until(lambda cell=cell: "UMAP 1 (seed 0)" in cell.inner_text())
            plot = cell.locator(".vlkd-drawing")
            plot.focus()
            for _ in range(6):
                look.keyboard.press("ArrowRight")  # from point to point
            assert "cluster" in cell.locator(".vlkd-plot .vlkd-unseen").inner_text()
            ring = plot.locator("circle").evaluate("c => [+c.getAttribute('cx'), +c.getAttribute('cy')]")
            plot.click(position={"x": ring[0], "y": ring[1]})
            cell.locator("img").wait_for()
            assert "<script>window.hacked=1</script>" in cell.inner_text()
    assert look.evaluate("window.hacked") is None


def test_run_all_stops_politely_where_the_end_is_needed(page, project):
    folder, given = project
    cells, _ = notebook("train_tinyclip", folder, **given)
    run, done = Run(given["out"]), cells["when_trained(training, bench)"]
    page.open(f"{folder.name}/nbs/train_tinyclip.ipynb")
    page.browser_page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    until(lambda: "still training" in page.output_text(done))
    trying = page.output(cells["retrieve(current_student(job.run), job.val, queries=4)"])
    assert trying.locator("img").count() >= 4, "the student was there to be tried"
    assert not any(page.output_text(number) for line, number in cells.items() if number > done)
    until(lambda: page.output(done).locator(".vlkd-matrix canvas").count() == 9)  # Run All ends with the bench in view
    bench = page.output(cells["bench"])
    until(lambda: "shown below" in bench.inner_text() and bench.locator(".vlkd-panel").count() == 0)  # and it is the only one
    rest = page.output(done).locator(".vlkd-rest")
    button = rest.locator("button")
    until(lambda: "% done, time left" in rest.inner_text() and button.is_disabled())
    stop(page)
    until(lambda: run.status()["state"] == "stopped")
    until(lambda: "evaluate below" in rest.inner_text() and button.is_enabled())
    page.cell(0).locator(".jp-InputArea, .jp-Cell-inputWrapper").first.click()  # another cell is active: the button runs those below itself
    button.click()
    until(lambda: "scratch" in page.output_text(cells["scores"]) or "stage-1" in page.output_text(cells["scores"]))
    assert page.output(done).locator("img").count() == 1 and rest.count() == 0, "what waited is a picture now"
    assert page.output(done).locator(".vlkd-panel").count() == 0
    until(lambda: bench.locator(".vlkd-matrix canvas").count() == 9 and "shown below" not in bench.inner_text())  # the live one is back


def test_a_bench_in_a_panel_of_its_own_stays_there(page, project):
    folder, given = project
    cells, _ = notebook("train_tinyclip", folder, **given)
    done = cells["when_trained(training, bench)"]
    page.open(f"{folder.name}/nbs/train_tinyclip.ipynb")
    bench = run_until(page, cells, "training") and page.output(cells["bench"])
    bench.locator("button[data-name=panel]").click()
    own = page.browser_page.locator(".jp-LinkedOutputView .vlkd-top")
    page.browser_page.get_by_role("button", name="Run Once").click()  # JupyterLab asks, since nobody has trusted the notebook
    until(lambda: own.count() == 1)
    assert page.run_cell(done) is False
    page.output(done).locator(".vlkd-rest").wait_for()
    assert page.output(done).locator(".vlkd-matrix canvas").count() == 0, "only the line and the button are here"
    assert own.count() == 1, "what was put aside is where it was put"
    stop(page)


def test_clusters_are_alive_and_a_threshold_is_chosen_by_slider(page, project):
    folder, given = project
    kept = {name: given[name] for name in ("data", "val", "teacher", "batch_size", "out")}
    wanted = dict(clusters=6, removed_share=0.3, steps=1500, compare_scratch=False, device="cpu", map_images=24)
    cells, _ = notebook("train_clip_cid", folder, **kept | wanted)
    looking, _ = notebook("explore_balance", folder, data=given["data"], teacher=given["teacher"])
    run = Run(given["out"])
    page.open(f"{folder.name}/nbs/train_clip_cid.ipynb")
    bench = run_until(page, cells, "training") and page.output(cells["bench"])
    map_of = bench.locator(".vlkd-plot").nth(1)
    map_of.wait_for()
    said = until(lambda: next((line for line in map_of.inner_text().split("\n") if "have the teacher's centre; purity" in line), ""))
    until(lambda: "purity" in map_of.inner_text() and said not in map_of.inner_text())  # a later step
    assert int(map_of.get_attribute("data-points")) >= 24
    slider = bench.locator('input[type=number][data-name="weights.cluster_distribution"]')
    slider.fill("0.5")
    slider.press("Enter")
    until(lambda: any(e.get("weights") == {"cluster_distribution": 0.5} for e in controls(run)))
    stop(page)
    until(lambda: run.status()["state"] == "stopped")
    page.open(f"{folder.name}/nbs/explore_balance.ipynb")
    output = page.output(run_until(page, looking, "explorer"))
    until(lambda: head(page, "removed") == "43.3%" and output.locator("img").count() > 4)
    output.locator('input[type=range][data-name="threshold"]').focus()
    page.browser_page.keyboard.press("Home")
    until(lambda: head(page, "threshold") == "0.010" and head(page, "removed") != "43.3%")
    assert page.browser_page.evaluate("window.hacked") is None


def test_a_click_shows_an_images_nearest_sentences_before_and_now(page, project):
    folder, given = project
    kept = {name: given[name] for name in ("data", "val", "teacher", "batch_size", "out")}
    (folder / "said.txt").write_text("".join(f"{k} {HOSTILE}\n" for k in range(60)), encoding="utf-8")
    wanted = dict(sentences=str(folder / "said.txt"), sentence_batch=20, steps=1500, compare_scratch=False, device="cpu", probe_pairs=12)
    cells, _ = notebook("train_dime_fm", folder, **kept | wanted)
    run = Run(given["out"])
    page.open(f"{folder.name}/nbs/train_dime_fm.ipynb")
    bench = run_until(page, cells, "training") and page.output(cells["bench"])
    table = bench.locator("table:has(th:text('student, step 0'))")
    table.wait_for()
    own = table.locator("tr").nth(1).inner_text()
    canvas = bench.locator(".vlkd-matrix canvas").nth(1)
    until(lambda: frames(page)[1] > 2)
    canvas.click(position={"x": 60, "y": 110})
    until(lambda: table.locator("tr").nth(1).inner_text() != own)
    said = table.inner_text()
    assert "<script>window.hacked=1</script>" in said and table.locator("img").count() == 1 and table.locator("b").count() >= 4
    later = until(lambda: next((text for text in [table.locator("th").last.inner_text()] if "step 0" not in text), ""))
    until(lambda: table.locator("th").last.inner_text() != later)  # it goes on with the training
    assert not any("contrastive" in text for text in bench.locator("label").all_inner_texts()), "no slider for a term that needs pairs"
    stop(page)
    until(lambda: run.status()["state"] == "stopped")
    assert page.browser_page.evaluate("window.hacked") is None


def test_a_chosen_word_shows_where_teacher_and_student_look(page, project, tiny_blip):
    folder, given = project
    kept = {name: given[name] for name in ("data", "val", "out")} | dict(teacher=str(tiny_blip), batch_size=8, steps=3000)
    kept |= dict(student="image:1x16, text:1x16", validate_pairs=12, compare_scratch=False, device="cpu")
    cells, _ = notebook("train_dlip", folder, **kept)
    run = Run(given["out"])
    page.open(f"{folder.name}/nbs/train_dlip.ipynb")
    bench = run_until(page, cells, "training") and page.output(cells["bench"])
    cross = bench.locator(".vlkd-cross")
    cross.locator("canvas").first.wait_for()
    titles = cross.locator("figcaption").all_inner_texts()
    assert len(titles) == 4 and "teacher" in titles[0] and "student" in titles[1], "reading and writing, both models"
    until(lambda: int(cross.get_attribute("data-frame")) > 2)
    said = cross.locator(".vlkd-overlap").inner_text()
    cross.locator('button[data-name="word-3"]').click()
    word = cross.locator('button[data-name="word-3"]').inner_text()
    until(lambda: cross.locator(".vlkd-overlap").inner_text().startswith(f"“{word}”"))
    until(lambda: cross.locator('button[data-name="word-3"]').get_attribute("aria-pressed") == "true")
    assert "overlap" in said and "overlap" in cross.locator(".vlkd-overlap").inner_text()
    cross.locator('button[data-name="image-2"]').click()
    until(lambda: cross.locator('button[data-name="image-2"]').get_attribute("aria-pressed") == "true")
    frame = int(cross.get_attribute("data-frame"))
    until(lambda: int(cross.get_attribute("data-frame")) > frame + 2)  # it goes on with the training
    assert bench.locator('input[aria-label="decoder cross attention"]').count() == 1, "a slider for every term of a BLIP"
    stop(page)
    until(lambda: run.status()["state"] == "stopped")
    assert page.browser_page.evaluate("window.hacked") is None


def test_a_time_line_grows_with_its_run_and_outlives_a_reload(page, project):
    folder, given = project
    path = folder / "nbs" / "film.ipynb"
    cells = [
        f"from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip\nfrom vlkd_lab.trainers import start\njob = open_tinyclip(TinyCLIP(**{given | dict(probe_pairs=12, keep_snapshots=30)!r}))\ntraining = start(job)",
        "from vlkd_lab.widgets import timeline\nview = timeline(job.run.folder)\nview",
    ]
    jupyter_page.write_notebook(path, cells, "warm")
    run = Run(given["out"])
    page.open(f"{folder.name}/nbs/film.ipynb")
    assert page.run_cell(0), page.output_text(0)
    until(lambda: len(list(run.folder.glob("snapshots/kept/*"))) > 2)
    assert page.run_cell(1), page.output_text(1)
    player = page.output(1).locator(".vlkd-player")
    player.wait_for()

    def shown(name):
        return int(page.output(1).locator(".vlkd-player").get_attribute(f"data-{name}") or 0)

    first = until(lambda: shown("count") > 2 and shown("count"))
    until(lambda: shown("count") > first + 2 and shown("here") >= shown("count") - 2)  # new moments come, and their frames
    until(lambda: shown("index") == shown("count") - 1)  # it goes on with the run
    sent = json.loads(page.kernel_eval("import json; print(json.dumps([len(json.dumps(view.panel.about)), len(json.dumps(view.panel.curves))]))"))
    assert max(sent) < 60_000, "what is sent again and again is small"
    slider = player.locator(".vlkd-bar input")
    slider.focus()
    page.browser_page.keyboard.press("Home")
    page.browser_page.keyboard.press("ArrowRight")
    until(lambda: shown("index") == 1)
    page.save()
    page.reload()
    page.output(1).locator(".vlkd-player").wait_for()
    until(lambda: shown("index") == 1 and shown("here") >= 3)
    assert page.browser_page.evaluate("window.hacked") is None
    run.control(stop=True)
    until(lambda: run.status()["state"] == "stopped")
    until(lambda: "stopped" in page.output(1).locator(".vlkd-notes").inner_text())
    assert not [e for e in page.console_errors if "vlkd" in e or "anywidget" in e]


def test_a_bench_forks_a_run_at_work_and_starts_the_fork_when_it_is_over(page, project):
    "Fork from here: at the step of the moment, with the sliders as they are; the training goes on, a reload keeps it, one button starts it"
    folder, given = project
    cells, _ = notebook("train_tinyclip", folder, **given)
    run, look = Run(given["out"]), page.browser_page
    page.open(f"{folder.name}/nbs/train_tinyclip.ipynb")
    bench = run_until(page, cells, "bench")
    button = look.locator('button[data-name="fork"]').first
    assert button.is_disabled(), "there is no step to begin at"
    assert page.run_cell(cells["training"])
    until(lambda: steps(run) > 3 and button.is_enabled())
    unfold_terms(page)
    exact = look.locator('input[type=number][data-name="weights.contrastive"]').first
    exact.fill("0.5")
    exact.press("Enter")
    until(lambda: any(e.get("weights") == {"contrastive": 0.5} for e in controls(run)))
    before = steps(run)
    button.focus()
    look.keyboard.press("Enter")
    forks = page.output(bench).locator(".vlkd-forks")
    until(lambda: forks.locator(".vlkd-made b").count() == 1)
    child = Run(run.folder.with_name(forks.locator(".vlkd-made b").inner_text()))
    origin = child.config()["origin"]
    assert child.folder.name == "run-fork-1" and origin["step"] >= before and origin["controls"]["weights"]["contrastive"] == 0.5
    assert child.folder.name in forks.locator("pre").first.inner_text().split() and "attach(" in forks.locator("pre").nth(1).inner_text()
    begin = forks.locator('button[data-name="start-fork"]')
    assert begin.is_disabled() and "when this run has ended" in begin.get_attribute("title")
    assert run.status()["state"] == "running"
    until(lambda: steps(run) > origin["step"])  # the training goes on

    def tree():
        return [line.strip() for line in forks.locator("li").all_inner_texts()]

    until(lambda: len(tree()) == 2 and "this run" in tree()[0] and "run-fork-1" in tree()[1] and f"step {origin['step']}" in tree()[1])
    page.reload()
    assert page.run_cell(bench)
    until(lambda: forks.locator(".vlkd-made b").count() == 1)
    stop(page)
    until(lambda: run.status()["state"] == "stopped" and begin.is_enabled())
    begin.click()
    try:
        until(lambda: child.status()["state"] == "running" and steps(child) > origin["step"], 300)
        until(lambda: any("run-fork-1" in line and "running" in line for line in tree()) and not begin.count())
    finally:
        child.control(stop=True)
    until(lambda: child.status()["state"] == "stopped")
    assert not [e for e in page.console_errors if "vlkd" in e or "anywidget" in e]


def test_a_map_shows_pictures_under_the_pointer_and_inside_a_lasso(page, project):
    "Thirty clusters: twenty in colour; pictures come when they are shown, by keys, mouse and finger, and captions are text"
    folder, _ = project
    run = Run(folder / "run")
    with RunWriter(run.folder) as writer:
        (run.folder / "config.json").write_text(json.dumps({"method": "ClipCid", "objective": {"affinity_mimicking": 1.0}, "parameters": {}}))
        writer.log({"stage": "student", "step": 7, "affinity_mimicking": 1.0, "total": 1.0})
    write_clusters(run, clusters=30)
    about = json.loads((run.folder / "clusters.json").read_text())
    colours = [thumbnail(Image.new("RGB", (16, 16), (2 * k, 90, 200 - 2 * k))) for k in range(90)]
    about |= {"captions": [f"{k} {HOSTILE}" for k in range(90)], "pictures": colours}
    (run.folder / "clusters.json").write_text(json.dumps(about))
    jupyter_page.write_notebook(folder / "look.ipynb", ["from vlkd_lab.widgets import attach", f"attach({str(run.folder)!r})"], "warm")
    look, received = page.browser_page, []
    look.on("websocket", lambda socket: socket.on("framereceived", lambda frame: received.append(frame if isinstance(frame, bytes) else frame.encode())))
    page.open(f"{folder.name}/look.ipynb")
    assert page.run_cell(0) and page.run_cell(1)
    plot = page.output(1).locator(".vlkd-plot:has(button[data-name=lasso])")
    until(lambda: plot.count() == 1 and int(plot.get_attribute("data-points")) > 90)
    time.sleep(0.5)
    whole = b"".join(received)
    assert not any(colour.encode() in whole for colour in colours), "a bench opens without the pictures of its map"
    shades = "c => new Set(Array.from(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).filter(p => p >>> 24 === 255)).size"
    assert plot.locator("canvas").first.evaluate(shades) > 20, "more than grey"

    drawing, card, strip = plot.locator(".vlkd-drawing"), plot.locator(".vlkd-card"), plot.locator(".vlkd-strip")
    drawing.focus()
    look.keyboard.press("ArrowRight")
    until(lambda: card.locator("img").count() == 1 and card.is_visible())
    assert "<script>window.hacked=1</script>" in card.inner_text() and card.locator("img").get_attribute("src") in colours
    look.keyboard.press("Home")
    ring = drawing.locator("circle").last.evaluate("c => [+c.getAttribute('cx'), +c.getAttribute('cy')]")
    look.mouse.move(0, 0)
    drawing.hover(position={"x": ring[0], "y": ring[1]})
    until(lambda: card.locator("img").count() == 1)

    def around(move):
        "Around the left half of the map, as far as its panel goes"
        box = drawing.bounding_box()
        places = [(80, 20), (280, 20), (280, box["height"] - 60), (80, box["height"] - 60), (80, 24)]
        for number, (x, y) in enumerate(places):
            move(number, box["x"] + x, box["y"] + y)

    def with_mouse(number, x, y):
        look.mouse.move(x, y, steps=3)
        if number == 0:
            look.mouse.down()

    plot.locator('button[data-name="lasso"]').click()
    around(with_mouse)
    look.mouse.up()
    until(lambda: strip.is_visible() and strip.locator("img").count() == strip.locator(".vlkd-strip-pictures button").count() > 5)
    count = strip.locator("img").count()
    said = strip.locator("[role=status]").inner_text()
    assert said.startswith(f"{count} images in ") and " clusters: " in said
    page.save()
    page.reload()
    until(lambda: strip.count() == 1 and strip.is_visible() and strip.locator("img").count() == count)  # what was drawn around stays
    strip.locator("button").nth(1).focus()
    until(lambda: card.is_visible())
    look.keyboard.press("Escape")
    until(lambda: not strip.is_visible())

    touch = look.context.new_cdp_session(look)

    def with_finger(number, x, y):
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove" if number else "touchStart", "touchPoints": [{"x": x, "y": y}]})

    plot.locator('button[data-name="lasso"]').click()
    around(with_finger)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    until(lambda: strip.is_visible() and strip.locator("img").count() == count)
    drawing.focus()
    look.keyboard.press("Escape")
    until(lambda: not strip.is_visible() and plot.locator('button[data-name="lasso"]').get_attribute("aria-pressed") == "false")
    assert look.evaluate("window.hacked") is None
    assert not [e for e in page.console_errors if "vlkd" in e or "anywidget" in e]
