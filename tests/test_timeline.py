"""A run as a time line: what its moments show, the page without a kernel in a real Chromium, and what is left out."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_job
from PIL import Image

from vlkd_lab.data import thumbnail
from vlkd_lab.gates import OpenGates, open_gates
from vlkd_lab.models import TowerShape
from vlkd_lab.runs import Run, RunWriter, Snapshots, kept_snapshots, read_snapshot, write_snapshot
from vlkd_lab.stages import source_shapes
from vlkd_lab.trainers import open_job, train
from vlkd_lab.widgets import TimeLine, TimelineView, moments, on_grid, timeline, timeline_page, write_timeline
from vlkd_lab.widgets.moments import MOST_SIDE, timeline_scene

NBS = Path(__file__).parent.parent / "nbs"
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'> \"quotes\" \u202eright to left"


def write_moments(folder, pairs=8, moments=6, sentences=0, **more):
    "A run of a teacher and a student that comes nearer to it, with hostile captions"
    rng = np.random.default_rng(0)
    teacher = rng.uniform(-0.3, 0.9, (pairs, sentences or pairs)).astype(np.float32)
    with RunWriter(folder) as writer:
        config = {"method": "Distil", "stages": {"student": "student", "scratch": "baseline"}, "parameters": {}}
        (folder / "config.json").write_text(json.dumps(config))
        picture = thumbnail(Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8).repeat(1, 0)))
        probe = {"captions": [f"{k} {HOSTILE}" for k in range(pairs)], "pictures": [picture] * pairs, "keys": list(range(pairs))}
        if sentences:
            probe["sentences"] = [f"sentence {k} {HOSTILE}" for k in range(sentences)]
        (folder / "probe.json").write_text(json.dumps(probe))
        write_snapshot(folder / "probe.safetensors", {"teacher": torch.tensor(teacher), "teacher_scale": torch.tensor([20.0])}, {})
        start = rng.uniform(-0.3, 0.9, teacher.shape).astype(np.float32)
        for k in range(moments):
            step = 10 * k
            if k:
                writer.log(*[{"stage": "student", "step": step - 9 + i, "total": 3 / (step + i + 1), "base": 2.0} for i in range(10)])
                writer.log({"event": "validation", "stage": "student", "step": step, "image_to_text_r1": k / moments, "text_to_image_r1": 0.2})
            student = start + (teacher - start) * k / max(moments - 1, 1)
            arrays = {"student": torch.tensor(student).half(), "student_scale": torch.tensor([10.0]), **more}
            labels = dict(stage="student", phase="distil", step=step)
            Snapshots(writer).take(lambda arrays=arrays: arrays, keep=f"student-distil-{step:08d}", **labels)
    return Run(folder)


def looked_at(run, **settings):
    line = TimeLine(Run(run.folder), **settings)
    line.look()
    return line


# What a moment shows

PARTS = {
    "TinyCLIP": {"student", "gates/image/heads", "gates/image/neurons", "gates/image/hidden"},
    "ClipCid": {"student", "clusters/student", "clusters/nearest"},
    "DimeFm": {"student"},
    "Dlip": {"student", "cross/fusion/student", "cross/decoder/student"},
}
HEADINGS = {
    "TinyCLIP": {"Curves", "Affinities", "Nearest", "Gates:"},
    "ClipCid": {"Curves", "Affinities", "Nearest", "Images"},
    "DimeFm": {"Curves", "Affinities", "Nearest"},
    "Dlip": {"Curves", "Affinities", "Nearest", "Where"},
}


@pytest.fixture(scope="module")
def trained(scenes, tiny_teacher, tiny_blip, tmp_path_factory):
    "A run of each of the four methods, six steps long"
    more = {
        "TinyCLIP": dict(stages=1, steps=6),
        "ClipCid": dict(clusters=4, map_images=20),
        "DimeFm": dict(sentence_batch=16),
        "Dlip": dict(teacher=str(tiny_blip), student="image:1x16, text:1x16", queue=16),
    }
    runs = {}
    for method, changes in more.items():
        out = tmp_path_factory.mktemp(method) / "run"
        train(open_job(method, tiny_job(scenes, tiny_teacher, out, method, **dict(steps=6) | changes)))
        runs[method] = Run(out)
    return runs


@pytest.mark.parametrize("method", PARTS)
def test_each_method_has_its_parts_and_a_page_that_shows_them(method, trained, browser, tmp_path):
    line = looked_at(trained[method])
    assert not line.problems and len(line.moments) == 7 + (method == "TinyCLIP"), "every step of a short phase, and its start"
    named = {array["name"] for packed in line.moments.values() for array in packed.arrays}
    assert PARTS[method] <= named
    page = open_file(browser, write_timeline(trained[method].folder, tmp_path / "run.html"))
    shown = page.locator(".vlkd-player section:visible h4").all_inner_texts()
    assert {heading.split()[0] for heading in shown} == HEADINGS[method]
    assert not page.errors and not page.requests


def test_the_time_line_of_the_guide_opens(browser):
    page = open_file(browser, NBS / "images" / "timeline.html")
    page.locator(".vlkd-player canvas").first.wait_for()
    assert not page.errors and not page.requests


OVER_ALL_POINTS = """canvas => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const said = canvas.nextElementSibling, seen = new Set();
    for (let y = 4; y < height; y += 6)
        for (let x = 4; x < width; x += 6) {
            canvas.dispatchEvent(new MouseEvent("mousemove", { clientX: left + x, clientY: top + y }));
            const tile = said.querySelector(".vlkd-tile");
            if (tile) seen.add(tile.style.backgroundPosition + " " + said.textContent.slice(0, 30));
        }
    return [...seen];
}"""


def test_an_image_of_the_map_shows_its_picture_under_the_pointer(trained, browser, tmp_path):
    run = trained["ClipCid"]
    sheet = timeline_scene(looked_at(run))["clusters"]["pictures"]
    assert sheet["known"] == list(range(16)) and sheet["columns"] == 4
    page = open_file(browser, write_timeline(run.folder, tmp_path / "run.html"))
    canvas = page.locator(".vlkd-map")
    canvas.scroll_into_view_if_needed()
    seen = canvas.evaluate(OVER_ALL_POINTS)
    captions = {text.split(" ", 2)[2][1:16]: text for text in seen}
    assert len(seen) > 5 and len(captions) > 3, "each point its own tile and words"
    places = {tuple(round(-float(word[:-2]) / 48) for word in text.split(" ")[:2]) for text in seen}
    assert places <= {(k % 4, k // 4) for k in range(16)} and len(places) > 5
    assert not page.errors and not page.requests, "the pictures are in the file"
    canvas.dispatch_event("mouseleave")
    assert page.locator(".vlkd-tile").count() == 0


def test_a_frame_is_the_arrays_within_half_a_level(trained):
    for method, run in trained.items():
        line = looked_at(run)
        files = dict(zip(line.moments, [path for path, _ in kept_snapshots(run)], strict=True))
        for name, path in files.items():
            arrays, labels = read_snapshot(path)
            shown = line.moments[name].unpacked()
            assert np.abs(shown["student"] - arrays["student"][:64, :128].astype(np.float32)).max() <= 1 / 65534 + 1e-7
            if labels["phase"] == "gates":
                for (tower, kind), rows in open_gates(arrays, source_shapes(run, labels["stage"])).rows().items():
                    wrong = np.abs(shown[f"gates/{tower}/{kind}"] - rows)
                    assert np.nanmax(wrong) <= 0.5 / 254 + 1e-6 and (np.isnan(wrong) == np.isnan(rows)).all()
            if method == "ClipCid":
                assert shown["clusters/nearest"].ravel().tolist() == arrays["clusters_assignment"].tolist()
                places = line.clusters.plane.project(arrays["clusters_student"].astype(np.float32))
                assert np.abs(shown["clusters/student"] - places).max() <= np.ptp(places) / 65534 + 1e-5
            if method == "Dlip":
                maps = arrays["student_cross_fusion"][:6, :24].astype(np.float32)
                side = round(maps.shape[-1] ** 0.5)
                coarse = on_grid(maps.reshape(*maps.shape[:2], side, side), min(side, MOST_SIDE)).reshape(-1, min(side, MOST_SIDE) ** 2)
                assert np.abs(shown["cross/fusion/student"] - coarse).max() <= coarse.max() * 0.5 / 254 + 1e-6


def test_gates_are_counted_without_what_fills_a_shorter_layer(tmp_path, monkeypatch):
    "The rows of a stage whose layers have kept different numbers of heads"
    keep = np.array([1.0, 0.5, 0.25, 0.25])
    gates = OpenGates({"image": TowerShape(8, 2, (3, 1), (9, 9))}, {("image", "heads"): keep})
    monkeypatch.setattr(moments, "open_gates", lambda *_: gates)
    monkeypatch.setattr(moments, "source_shapes", lambda *_: {})
    packed = moments.Packed()
    moments.pack_gates(packed, {"gates/image/heads": keep}, Run(tmp_path), "stage-2")
    assert packed.numbers["gates/image/heads"] == [2.0, 4], "expected to stay, and how many there are"


def test_a_moment_that_was_written_anew_is_read_again(tmp_path):
    "As by a run that was continued from an earlier checkpoint"
    run = write_moments(tmp_path / "run", pairs=3, moments=4)
    line = looked_at(run)
    before = {name: packed.unpacked()["student"] for name, packed in line.moments.items()}
    path, labels = kept_snapshots(run)[1]
    arrays = {name: torch.tensor(array) * 0.5 for name, array in read_snapshot(path)[0].items()}
    time.sleep(0.02)
    write_snapshot(path, arrays, labels | {"time": time.time()})
    assert line.look() and len(line.moments) == 4
    changed = [name for name, packed in line.moments.items() if not any(np.array_equal(packed.unpacked()["student"], old) for old in before.values())]
    assert len(changed) == 1 and line.labels[changed[0]]["step"] == labels["step"]


def test_arrays_of_a_method_from_outside_are_shown_under_the_known_names(tmp_path):
    attention = torch.full((8, 3, 16), 1 / 16)
    run = write_moments(tmp_path / "run", mine=torch.zeros(9), student_cross_fusion=attention)
    line = looked_at(run)
    assert [array["name"] for array in line.moments[next(iter(line.moments))].arrays] == ["student", "cross/fusion/student"]
    wrong = write_moments(tmp_path / "wrong", clusters_student=torch.zeros(4), student_cross_fusion=torch.zeros(3))
    line = looked_at(wrong)
    assert len(line.moments) == 6 and list(line.problems) == ["attention"] and "attention left out" in timeline_page(line)


def test_a_broken_file_is_left_out_and_named_and_a_baseline_is_not_shown(tmp_path):
    run = write_moments(tmp_path / "run")
    kept = run.folder / "snapshots" / "kept"
    (kept / "student-distil-00000020.safetensors").write_bytes(b"half")
    (kept / f"{'<img>'}.safetensors").write_bytes(b"\x00" * 64)
    write_snapshot(kept / "bare.safetensors", {"student": torch.eye(2)}, {})  # without stage and time
    baseline = dict(stage="scratch", phase="contrast", step=3)
    Snapshots(run).take(lambda: {"student": torch.eye(8), "student_scale": torch.ones(1)}, keep="scratch-3", **baseline)
    line = looked_at(run)
    assert [labels["step"] for name, labels in line.labels.items() if name in line.moments] == [0, 10, 30, 40, 50]
    assert set(line.problems) == {"student-distil-00000020.safetensors", "<img>.safetensors", "bare.safetensors"}
    page = timeline_page(line)
    assert "<img>" not in page and str(run.folder) not in page


def test_a_run_without_moments_says_what_to_do(tmp_path, scenes, tiny_teacher):
    given = tiny_job(scenes, tiny_teacher, tmp_path / "run", "Distil", keep_snapshots=0)
    train(open_job("Distil", given))
    assert not (tmp_path / "run" / "snapshots" / "kept").exists()
    with pytest.raises(ValueError, match="keep_snapshots was 0; train with keep_snapshots=24"):
        write_timeline(tmp_path / "run", tmp_path / "none.html")
    shown = timeline(tmp_path / "run", live=False).static()._repr_mimebundle_()
    assert list(shown) == ["text/plain"] and "train with keep_snapshots=24" in shown["text/plain"], "no error: a job goes on"
    assert not (tmp_path / "none.html").exists()


def test_many_moments_are_thinned_evenly_and_one_that_went_stays_away(tmp_path):
    run = write_moments(tmp_path / "run", pairs=2, moments=23)
    assert [line["step"] for line in looked_at(run, most=6).labels.values()] == [0, 40, 80, 120, 160, 200, 220]
    line = looked_at(run, most=23)
    line.most = 6
    assert line.look() and [line.labels[name]["step"] for name in line.moments] == [0, 40, 80, 120, 160, 200, 220]


def test_a_page_of_64_pairs_and_many_moments_has_less_than_a_megabyte(tmp_path):
    run = write_moments(tmp_path / "run", pairs=64, moments=90)
    path = write_timeline(run.folder, tmp_path / "run.html")
    assert 400_000 < path.stat().st_size < 1_000_000 and not list(tmp_path.glob(".run*"))
    wide = write_moments(tmp_path / "wide", pairs=200, sentences=400, moments=60)
    assert write_timeline(wide.folder, tmp_path / "wide.html").stat().st_size < 1_200_000, "its first 64 pairs, and fewer moments"


def test_the_time_line_of_the_guide_has_todays_player(tmp_path):
    "It was drawn when somebody ran the script; what it embeds must be what a time line embeds now"
    today = write_timeline(write_moments(tmp_path / "run", pairs=2, moments=2).folder, tmp_path / "run.html")
    stored = NBS / "images" / "timeline.html"
    for begin, end in (('<script type="module">', "</script>"), ("<style>", "</style>")):
        parts = [page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0] for page in (stored, today)]
        assert parts[1] and parts[0] == parts[1], f"{begin} is of another day: python tools/screenshots.py film draws {stored.name} anew"


def test_recordings_are_small_play_once_and_are_told_in_words():
    "Those of the five, and the bench's; a page that shows one says what is to be seen"
    pages = "".join((NBS / name).read_text(encoding="utf-8") for name in ("guides/bench.ipynb", "index.ipynb"))
    for name in ("bench", "network", "pair", "forks", "timeline", "sent_page"):
        path = NBS / "images" / f"{name}.webp"
        with Image.open(path) as film:
            milliseconds = 0
            for number in range(film.n_frames):
                film.seek(number)
                film.load()
                milliseconds += film.info["duration"]
            assert film.n_frames > 8 and film.info["loop"] == 1 and 19_000 < milliseconds < 21_000, name
        assert path.stat().st_size <= 600_000, name
        (words,) = re.findall(r"!\[([^\]]{40,})\]\((?:\.\./)?images/" + path.name, pages)
        assert words


# The page in a browser

jupyter_page = pytest.importorskip("jupyter_page", reason="no Playwright: pip install playwright; the browser tests did not run")


@pytest.fixture(scope="module")
def browser():
    if jupyter_page.find_chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium; the browser tests did not run")
    with jupyter_page.open_browser() as opened:
        yield opened


def open_file(browser, path, width=1280, scheme="light"):
    "A page of a file; what it asks of a network is stopped and counted"
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.requests, page.errors = [], []
    page.route(re.compile("^(?!file:|data:)"), lambda route: (page.requests.append(route.request.url), route.abort()))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(Path(path).resolve().as_uri())
    return page


def index(page):
    return int(page.locator(".vlkd-player").get_attribute("data-index"))


@pytest.fixture
def page(browser, tmp_path):
    run = write_moments(tmp_path / "run")
    shown = open_file(browser, write_timeline(run.folder, tmp_path / "run.html"))
    shown.run = run
    yield shown
    assert not shown.errors and not shown.requests, "nothing is asked of a network"
    assert shown.evaluate("window.hacked") is None
    shown.context.close()


def until(page, condition):
    "Wait for a condition of the page; its policy lets Playwright's own waiting evaluate nothing"
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"waited in vain: {condition}"
        time.sleep(0.03)


def at(page, place):
    "Wait until a moment is shown"
    until(page, f"+document.querySelector('.vlkd-player').dataset.index === {place}")


def test_a_slider_is_dragged_and_keys_go_through_the_run(page):
    assert index(page) == 5 and page.locator(".vlkd-where").inner_text() == "student · distil · step 50 (6 of 6)"
    box = page.locator(".vlkd-bar input").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 6, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 - 20, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    assert index(page) in (2, 3)
    for key, place in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 5), ("ArrowRight", 5)):
        page.keyboard.press(key)
        at(page, place)
    words = page.locator(".vlkd-bar input").get_attribute("aria-valuetext")
    assert words == page.locator(".vlkd-where").inner_text() == "student · distil · step 50 (6 of 6)"
    page.locator(".vlkd-marks button").first.click()
    at(page, 0)


def test_it_plays_to_the_end_and_pauses(page):
    page.locator("select[aria-label=speed]").select_option("½×")
    play = page.locator(".vlkd-play")
    play.click()
    assert play.get_attribute("aria-label") == "pause", "from the beginning, as it stood at the end"
    page.locator("select[aria-label=speed]").select_option("4×")
    at(page, 5)
    until(page, "document.querySelector('.vlkd-play').getAttribute('aria-label') === 'play'")
    page.locator("select[aria-label=speed]").select_option("½×")
    play.click()
    at(page, 1)
    play.click()
    page.wait_for_timeout(700)
    assert index(page) in (1, 2) and play.get_attribute("aria-label") == "play"
    page.locator(".vlkd-bar input").focus()
    page.keyboard.press(" ")
    at(page, 3)


def test_what_is_under_the_pointer_is_what_the_snapshot_holds(page):
    for place, (path, _) in enumerate(kept_snapshots(page.run)):
        page.locator(".vlkd-bar input").fill(str(place))
        at(page, place)
        student = page.locator(".vlkd-matrices figure").nth(1)
        box = student.locator("canvas").bounding_box()
        student.locator("canvas").hover(position={"x": (2 + 0.5) * box["width"] / 8, "y": (5 + 0.5) * box["height"] / 8})
        until(page, "document.querySelectorAll('.vlkd-matrices output')[1].textContent.includes(': ')")
        said = student.locator("output").inner_text()
        value = float(said.rpartition(": ")[2].replace("−", "-"))
        assert said.startswith("image 5 “5 </script>") and "text 2" in said
        assert value == pytest.approx(float(read_snapshot(path)[0]["student"][5, 2]), abs=6e-4)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("measure, of", [("image_to_text", lambda x: softmax(x)), ("text_to_image", lambda x: softmax(x.T).T)])
def test_probabilities_are_those_of_the_arrays(page, measure, of):
    page.locator("select[aria-label^=measure]").select_option(measure)
    scale = {"teacher": 20.0, "student": 10.0}
    arrays = {"student": read_snapshot(kept_snapshots(page.run)[-1][0])[0]["student"], "teacher": read_snapshot(page.run.folder / "probe.safetensors")[0]["teacher"]}
    wanted = {name: of(scale[name] * array.astype(np.float64)) for name, array in arrays.items()}
    wanted["student − teacher"] = wanted["student"] - wanted["teacher"]
    for figure, (row, column) in zip(page.locator(".vlkd-matrices figure").all(), ((3, 4), (7, 0), (1, 6)), strict=True):
        name = figure.locator("figcaption").inner_text()
        box = figure.locator("canvas").bounding_box()
        figure.locator("canvas").hover(position={"x": (column + 0.5) * box["width"] / 8, "y": (row + 0.5) * box["height"] / 8})
        page.wait_for_timeout(60)
        said = figure.locator("output").inner_text().rpartition(": ")[2].replace("−", "-")
        assert float(said) == pytest.approx(wanted[name][row, column], rel=6e-3, abs=2e-4), name


def test_nearest_captions_are_those_of_the_arrays_and_follow_a_click(page):
    page.locator(".vlkd-thumbs button").nth(3).click()
    until(page, "document.querySelectorAll('.vlkd-thumbs button')[3].getAttribute('aria-pressed') === 'true'")
    lists = page.locator(".vlkd-nearest ol")
    teacher = read_snapshot(page.run.folder / "probe.safetensors")[0]["teacher"]
    students = [read_snapshot(path)[0]["student"] for path, _ in kept_snapshots(page.run)]
    for place, scores in ((0, teacher), (1, students[-1]), (2, students[0])):
        wanted = np.argsort(-scores[3].astype(np.float32), kind="stable")[:4]
        texts = lists.nth(place).locator("li").all_inner_texts()
        assert [int(text.split()[0]) for text in texts] == wanted.tolist()
    assert lists.nth(1).locator("b").count() == 4, "the student has come to the teacher's"
    assert "<script>window.hacked=1</script>" in lists.nth(0).inner_text() and "\\u202e" in lists.nth(0).inner_text()
    student = page.locator(".vlkd-matrices canvas").nth(1)
    box = student.bounding_box()
    student.click(position={"x": 9, "y": 6.5 * box["height"] / 8})
    until(page, "document.querySelectorAll('.vlkd-thumbs button')[6].getAttribute('aria-pressed') === 'true'")


def test_the_curves_have_a_cursor_that_is_dragged(page):
    drawing = page.locator(".vlkd-curves svg").first
    box = drawing.bounding_box()
    page.mouse.move(box["x"] + 0.41 * box["width"], box["y"] + 20)
    page.mouse.down()
    at(page, 2)
    page.mouse.move(box["x"] + 0.79 * box["width"], box["y"] + 20, steps=3)
    at(page, 4)
    page.mouse.up()
    place = float(drawing.locator(".vlkd-cursor").get_attribute("x1"))
    assert place == pytest.approx(80) and page.locator(".vlkd-curves span").all_inner_texts()[:2] == ["loss", "R@1"]
    assert page.locator(".vlkd-curves b").nth(1).inner_text() == f"{(4 / 6 + 0.2) / 2:.3f}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_narrow_window_and_words_stand_out(browser, trained, tmp_path, scheme):
    for method, run in trained.items():
        shown = open_file(browser, write_timeline(run.folder, tmp_path / f"{method}.html"), width=600, scheme=scheme)
        assert shown.evaluate("document.documentElement.scrollWidth") <= 600
        ink, paper = shown.evaluate("(s => [s.getPropertyValue('--vlkd-ink'), s.getPropertyValue('--vlkd-paper')])(document.querySelector('.vlkd-player').style)")
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (light[1] - light[0] > 500) if scheme == "light" else (light[0] - light[1] > 500)
        shown.context.close()


# In a notebook


def test_only_new_moments_are_sent_and_pictures_once(tmp_path):
    run = write_moments(tmp_path / "run", moments=4)
    view = TimelineView(run.folder, live=True)
    sent = []
    view.panel.send = lambda content, buffers: sent.append((content["frames"], buffers))
    names = [moment["name"] for moment in view.panel.about["moments"]]
    view.answer({"frames": names})
    changes = []
    view.panel.observe(lambda change: changes.append(change["name"]), ["about", "scene", "curves", "fixed"])
    arrays = {"student": torch.eye(8), "student_scale": torch.ones(1)}
    Snapshots(run).take(lambda: arrays, keep="student-distil-00000099", stage="student", phase="distil", step=99)
    view._looked_at -= 2
    view.update()
    new = [moment["name"] for moment in view.panel.about["moments"]][4:]
    view.answer({"frames": new})
    assert changes == ["about"] and len(new) == 1 and [len(frames) for frames, _ in sent] == [4, 1]
    assert sum(len(json.dumps(getattr(view.panel, name))) for name in ("about", "curves")) < 3000
    view._looked_at -= 2
    view.update()
    assert changes == ["about"], "nothing new, nothing sent"
    view.close()
