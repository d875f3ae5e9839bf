"""What views know and show, without a browser: the page is played by hand."""

import asyncio
import base64
import io
import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from vlkd_lab import widgets
from vlkd_lab.data import thumbnail
from vlkd_lab.methods import all_losses
from vlkd_lab.runs import Run, RunWriter, Snapshots, is_watched, write_snapshot
from vlkd_lab.widgets import (
    DIVERGING,
    LossCurves,
    MatrixView,
    Panel,
    ProbeMatrices,
    RunClusters,
    RunView,
    StaticFigure,
    StudentMap,
    Watched,
    attach,
    cluster_purity,
    clusters_json,
    curves_json,
    differences,
    duration,
    escaped,
    measured,
    overlay,
    overlay_json,
    palette,
    picture,
    probe_affinities,
    progress,
    run_messages,
    status_bar,
    symmetric_limit,
    term_curves,
    to_bytes,
    visible,
)

HOSTILE = "<script>alert(1)</script> \"'& \u202eevil \u2066x"


@pytest.fixture
def run(tmp_path):
    "A run in the middle of its second stage, with a probe of four pairs and a snapshot"
    with RunWriter(tmp_path / "run") as writer:
        config = {"objective": {"affinity_mimicking": 1.0, "feature_mimicking": 300.0}, "method": "TinyCLIP"}
        config["parameters"] = {"batch_size": 10, "target_sparsity": 0.75, "teacher": "t", "seed": 0}
        (writer.folder / "config.json").write_text(json.dumps(config))
        writer.set_status(plan=[["stage-1", 20], ["stage-2", 20], ["scratch-2", 40]], stage="stage-2", phase="distil", memory_bytes=2**30)
        for step in range(1, 31):
            stage = f"stage-{1 + (step > 20)}"
            line = {"affinity_mimicking": 2.0, "feature_mimicking": 0.01, "total": 5.0, "seconds": 0.5, "data_seconds": 0.1}
            writer.log({"stage": stage, "phase": "distil", "step": step, **line, "expected_sparsity": step / 60, "target_sparsity": 0.5})
        writer.log({"event": "control", "stage": "stage-1", "step": 10, "weights": {"feature_mimicking": 100.0}})
        writer.log({"event": "validation", "stage": "stage-1", "step": 20, "image_to_text_r1": 0.2, "text_to_image_r1": 0.4})
        writer.log({"event": "gradient_share", "stage": "stage-1", "step": 20, "shares": {"affinity_mimicking": 0.7}})
        write_snapshot(writer.folder / "probe.safetensors", {"teacher": torch.eye(4), "teacher_scale": torch.tensor([10.0])}, {})
        probe = {"captions": [HOSTILE, "b", "c", "d"], "keys": list("abcd"), "labels": [0, 1, None, 1], "pictures": [""] * 4}
        (writer.folder / "probe.json").write_text(json.dumps(probe))
        student = {"student": torch.eye(4).half() * 0.5, "student_scale": torch.tensor([10.0])}
        Snapshots(writer).take(lambda: student, stage="stage-2", phase="distil", step=30)
        yield writer


def shown(view):
    "What a bench shows below the titles of its parts"
    return [section.children[1] for section in view.box.children[1:]]


def test_text_from_strangers_shows_as_text():
    assert escaped(HOSTILE) == "&lt;script&gt;alert(1)&lt;/script&gt; &quot;&#x27;&amp; \\u202eevil \\u2066x"
    assert "\u202e" not in visible("a\u202eb\u200f\u061c") and visible("שלום é 漢") == "שלום é 漢"


def test_bytes_of_a_matrix():
    matrix = np.array([[-1.0, 0.0, 1.0], [np.nan, 5.0, -5.0]])
    assert list(to_bytes(matrix, -1, 1)) == [0, 127, 254, 255, 254, 0]
    assert list(to_bytes(np.zeros((1, 2)), 0, 0)) == [0, 0]


def test_palettes_rise_in_lightness_and_the_diverging_one_is_white_at_zero():
    colours = np.frombuffer(palette("Viridis"), dtype=np.uint8).reshape(256, 3)[:255].astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.01).all() and len(palette("Viridis")) == 768
    middle = np.frombuffer(palette(DIVERGING), dtype=np.uint8).reshape(256, 3)[127]
    assert (middle > 240).all()


@pytest.mark.parametrize("values, limit", [([0.0], 0.01), ([0.03, -0.07], 0.1), ([0.5], 0.5), ([3.0], 3.0), ([np.nan, 0.2], 0.2)])
def test_limits_of_a_difference_are_round(values, limit):
    assert symmetric_limit(np.array(values)) == limit


def test_an_update_is_over_when_it_was_drawn_or_given_up(monkeypatch):
    panel = Panel()
    assert panel.ready()
    panel.ask_whether_drawn()
    assert not panel.ready()
    panel._hear({"drawn": 1})
    assert panel.ready() and panel.seen
    panel.ask_whether_drawn()
    assert not panel.ready()
    monkeypatch.setattr(widgets.controls, "UPDATE_SECONDS", 0.0)
    assert panel.ready() and panel.number == 2


def test_a_failing_answer_is_said_on_the_page():
    panel = Panel()

    def fail(wishes):
        raise ValueError("no such " + HOSTILE)

    panel.on_choice.append(fail)
    panel._hear({"requested": {"order": "x"}})
    assert panel.messages[-1]["kind"] == "error" and "\\u202e" in panel.messages[-1]["text"]


def test_what_is_known_of_a_run(run):
    watched = Watched(Run(run.folder))
    assert watched.look() == {"curves", "snapshot"} and watched.look() == set()
    weights = {"affinity_mimicking": 1.0, "feature_mimicking": 100.0}
    assert watched.current == {"learning_rate_factor": 1.0, "target_sparsity": 0.75, "weights": weights}
    now = progress(watched)
    assert now["samples_per_second"] == 20 and now["data_share"] == pytest.approx(0.2)
    assert now["seconds_left"] == pytest.approx(50 * 0.5) and now["share"] == pytest.approx(30 / 80)
    assert dict(status_bar(watched)) == {
        "state": "running", "stage": "stage-2 · distil", "step": "30", "samples/s": "20", "data-loading time": "20%",
        "memory": "1.00 GiB", "training done": "38%", "time left": "25 s",
    }  # fmt: skip


def test_a_run_that_is_new_has_a_view_too(tmp_path):
    watched = Watched(Run(tmp_path / "none"))
    assert watched.look() == set() and dict(status_bar(watched))["state"] == "new"
    assert curves_json(watched)["data"] == [] and probe_affinities(watched) == {}
    assert "image/png" not in attach(tmp_path / "none", live=False).static()._repr_mimebundle_()


@pytest.mark.parametrize("seconds, said", [(float("nan"), "—"), (5.4, "5 s"), (65, "1 min 05 s"), (3 * 3600 + 62, "3 h 01 min")])
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_affinities_and_their_difference(run):
    watched = Watched(Run(run.folder))
    watched.look()
    shown = probe_affinities(watched)
    assert shown["teacher"][1:] == (0.0, 1.0) and shown["difference"][1:] == (-0.5, 0.5)
    assert np.allclose(shown["difference"][0], -0.5 * np.eye(4))
    rows = probe_affinities(watched, "image_to_text")["teacher"][0]
    expected = torch.softmax(10 * torch.eye(4), dim=1).numpy()
    assert np.allclose(rows, expected, atol=1e-6)
    assert np.allclose(measured(np.eye(3), 2.0, "text_to_image").sum(axis=0), 1)
    with pytest.raises(ValueError, match="cosine, image_to_text, text_to_image"):
        measured(np.eye(2), 1.0, "dot")


def test_every_step_counts_with_the_weight_it_had(run):
    watched = Watched(Run(run.folder))
    watched.look()
    steps, values = term_curves(watched)["feature mimicking"]
    assert np.allclose(values[:10], 3.0) and np.allclose(values[10:], 1.0) and list(steps) == list(range(1, 31))


def test_curves_are_valid_plotly_and_mark_what_was_changed(run):
    import plotly.graph_objects as go

    watched = Watched(Run(run.folder))
    watched.look()
    drawn = curves_json(watched)
    figure = go.Figure(drawn)
    assert {trace.name for trace in figure.data} >= {"affinity mimicking", "stage-1", "expected sparsity"}
    shares = [trace for trace in figure.data if trace.xaxis == "x5"]
    assert [trace.name for trace in shares] == ["affinity mimicking"] and shares[0].line.color == figure.data[0].line.color, "one colour a term"
    assert [note.hovertext for note in figure.layout.annotations if note.text == "▼"] == ["step 10: feature_mimicking = 100"]
    assert all(drawn["layout"][f"{a}axis{k}"]["title"]["text"] for a in "xy" for k in (1, 2, 3, 4, 5))
    assert drawn["layout"]["width"] <= 850, "fits what JupyterLab leaves of 1280 pixels"


def test_a_still_carries_its_own_picture(run):
    watched = Watched(Run(run.folder))
    watched.look()
    shown = StaticFigure(curves_json(watched))._repr_mimebundle_()
    image = Image.open(io.BytesIO(base64.b64decode(shown["image/png"])))
    assert image.size == (830, 474) and len(image.convert("RGB").getcolors(100_000)) > 12
    assert "application/vnd.plotly.v1+json" in shown
    assert picture(curves_json(watched))[:4] == b"\x89PNG"


def test_the_bench_shows_a_run_and_passes_wishes_on(run):
    view = RunView(run.folder, live=True)
    panel = view.widgets.panel
    assert not view.seen and dict(panel.head)["state"] == "running" and not panel.off
    assert panel.values["weights.feature_mimicking"] == 100.0 and panel.values["target_sparsity"] == 0.75
    assert {spec["name"] for spec in panel.sliders} >= {f"weights.{name}" for name, term in all_losses().items() if not term.module}
    panel._hear({"requested": {"weights.contrastive": 0.5}})
    panel._hear({"requested": {"pause": True}})
    assert Run(run.folder).requested() == {"weights": {"contrastive": 0.5}, "pause": True} and view.seen
    view.update()
    assert panel.values["weights.contrastive"] == 0.5 and panel.buttons[0]["label"] == "Resume"
    panel._hear({"requested": {"target_sparsity": 5}})
    view.update()
    assert "0 to 0.97" in panel.messages[-1]["text"]
    assert "\u202e" not in view.widgets.part(ProbeMatrices).views["teacher"].row_texts[0]
    panel._hear({"requested": {"measure": "image_to_text"}})
    panel._hear({"drawn": panel.number})
    view.update()
    assert view.widgets.part(ProbeMatrices).views["student"].measure == "P(text | image)"
    view.close()


def test_nobody_watches_a_bench_that_no_page_shows(run, monkeypatch):
    async def story():
        view = RunView(run.folder, live=True)
        os.utime(run.folder / "snapshots" / "watching", (0, 0))
        view._touched = -1e9
        monkeypatch.setattr(widgets.bench, "LOOK_SECONDS", 0.01)
        view.keep()
        await asyncio.sleep(0.1)
        alone = is_watched(Run(run.folder))
        view.widgets.panel._hear({"seen": True})
        await asyncio.sleep(0.2)
        seen = is_watched(Run(run.folder))
        numbers = [matrix.number for matrix in view.widgets.part(ProbeMatrices).views.values()]
        await asyncio.sleep(0.2)
        assert numbers == [matrix.number for matrix in view.widgets.part(ProbeMatrices).views.values()], "nothing new, nothing sent"
        view.close()
        return alone, seen

    assert asyncio.run(story()) == (False, True)


def test_a_page_that_draws_slowly_is_owed_one_frame(run, monkeypatch):
    view = RunView(run.folder, live=True)
    sent = view.widgets.part(ProbeMatrices).views["student"].number
    for k in range(20):
        student = {"student": torch.eye(4) * k / 20, "student_scale": torch.ones(1)}
        Snapshots(run).take(lambda student=student: student, stage="stage-2", phase="distil", step=k)
        view.update()
    assert view.widgets.part(ProbeMatrices).views["student"].number == sent, "nothing is queued while the first frame is not drawn"
    view.panel._hear({"drawn": view.panel.number})
    view.update()
    assert view.widgets.part(ProbeMatrices).views["student"].number == sent + 1 and view.widgets.part(ProbeMatrices).views["student"].matrix[0, 0] == pytest.approx(0.95)
    view.close()


def test_a_view_that_fails_says_so_and_goes_on(run, monkeypatch):
    async def story():
        view = RunView(run.folder, live=True)
        monkeypatch.setattr(widgets.bench, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(view.watched, "look", lambda: 1 / 0)
        view.always = True
        view.keep()
        await asyncio.sleep(0.1)
        view.close()
        return [message["text"] for message in view.panel.messages]

    said = asyncio.run(story())
    assert "ZeroDivisionError" in said[-1] and len(said) == 1, "said once"


def test_wishes_may_come_on_any_thread(run):
    view = RunView(run.folder, live=True)
    wishes = [{"weights.contrastive": 0.25}, {"target_sparsity": 0.5}, {"learning_rate_factor": 2.0}, {"gradient_share": True}]
    threads = [threading.Thread(target=view.widgets.panel._hear, args=({"requested": wish},)) for wish in wishes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = Run(run.folder).requested()
    assert asked == {"weights": {"contrastive": 0.25}, "target_sparsity": 0.5, "learning_rate_factor": 2.0, "gradient_share": True}
    view.close()


def test_an_error_is_said_with_its_traceback_and_what_was_freed(tmp_path):
    with pytest.raises(ValueError), RunWriter(tmp_path) as writer:
        raise ValueError(HOSTILE)
    writer.set_status(freed_bytes=3 * 2**20)
    watched = Watched(Run(tmp_path))
    watched.look()
    said = run_messages(watched, refused="weights: no")
    assert said[0]["kind"] == "error" and "\u202e" not in said[0]["text"] and "3 MiB" in said[0]["text"] and "Traceback" in said[0]["more"]
    assert said[-1] == {"kind": "warning", "text": "weights: no", "more": ""}


def test_a_job_whose_process_is_gone_is_said_to_be(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "running"}')
    watched = Watched(Run(tmp_path))
    watched.look()
    assert "process is gone" in run_messages(watched)[0]["text"] and dict(status_bar(watched))["state"] == "lost"


def test_attach_gives_the_same_bench_again(run):
    async def story():
        first = attach(run.folder)
        assert first is not attach(run.folder, live=True)
        live = attach(run.folder, live=True)
        assert live is attach(run.folder, live=True) and not first.live
        live.close()
        assert attach(run.folder, live=True) is not live
        attach(run.folder, live=True).close()

    asyncio.run(story())


def test_what_a_page_holds_does_not_grow(run):
    from ipywidgets import Widget
    from ipywidgets.widgets.widget import _instances

    view = RunView(run.folder, live=True)
    held = len(_instances)
    for k in range(50):
        run.log({"stage": "stage-2", "phase": "distil", "step": 31 + k, "affinity_mimicking": 1.0, "total": 1.0, "seconds": 1.0})
        view.always, view._drawn = True, -1e9
        view.update()
    assert len(_instances) == held and issubclass(MatrixView, Widget)
    curves = view.widgets.part(LossCurves).widget
    assert all(len(curves.points(name)[0]) <= 301 for name in curves.names)
    view.close()


def test_what_a_page_is_given_when_it_opens_late_is_what_is_shown_now(run):
    "A page that is loaded again asks for the state: it must be the present one, and no larger than what it draws"
    view = RunView(run.folder, live=True)
    curves = view.widgets.part(LossCurves).widget
    for step in range(31, 1500):
        run.log({"stage": "stage-2", "phase": "distil", "step": step, "affinity_mimicking": 1.0, "total": 1.0, "seconds": 1.0})
    view.always, view._drawn = True, -1e9
    view.update()
    state = curves.get_state()
    arrays = [np.frombuffer(part, np.float32) for part in state["value"]["arrays"]]
    assert max(array[-1] for array in arrays) > 1490 and max(map(len, arrays)) <= 301
    assert sum(map(len, state["value"]["arrays"])) < 30_000, "bytes of numbers"
    curves.set_state({"chosen": {"smoothing": 0.5, "hidden": ["affinity mimicking"]}})  # as a page sends it
    assert curves.get_state()["chosen"]["hidden"] == ["affinity mimicking"], "also for the page that comes next"
    view.close()


def test_several_runs_are_laid_over_each_other(run, tmp_path):
    with RunWriter(tmp_path / "other") as other:
        (other.folder / "config.json").write_text(json.dumps({"parameters": {"batch_size": 20, "target_sparsity": 0.75, "name": HOSTILE}}))
        other.log({"stage": "stage-1", "step": 1, "total": 3.0})
    view = overlay([run.folder, other.folder], live=False)
    table = differences(view.runs)
    assert list(table.loc["batch_size"]) == ["10", "20"] and "target_sparsity" not in table.index
    assert "changed: weights" in table.index
    html = view.static()._repr_mimebundle_()["text/html"]
    assert "<script>" not in html and "data:image/png" in html
    assert {trace["name"] for trace in overlay_json(view.runs)["data"]} == {"run", "other"}
    with pytest.raises(ValueError, match="one run folder or more"):
        overlay([])


def test_looking_writes_nothing_into_a_run_that_is_not_there(tmp_path):
    view = RunView(tmp_path / "none", live=True)
    view.update()
    assert not (tmp_path / "none").exists()
    view.close()


MARKUP = "<img src=x onerror=alert(1)>"


def unit_rows(rows, seed):
    return torch.nn.functional.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=1)


def write_clusters(run, count=3):
    "Six images of a run whose teacher has `count` clusters, two images in each of the first three"
    arrays = dict(centers=unit_rows(count, 0), teacher=unit_rows(6, 1).half(), sizes=torch.arange(count) + 10)
    arrays["assignment"] = torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    write_snapshot(run.folder / "clusters.safetensors", arrays, {})
    said = {"captions": [MARKUP, HOSTILE, *"cdef"], "keys": list("abcdef"), "labels": [0, 1, None, 1, 0, 0]}
    pictures = [thumbnail(Image.new("RGB", (8, 8), (40 * k, 0, 0))) for k in range(6)]
    (run.folder / "clusters.json").write_text(json.dumps(said | {"pictures": pictures}))
    config = Run(run.folder).config() | {"method": "ClipCid"}
    (run.folder / "config.json").write_text(json.dumps(config))


def clusters_snapshot(run, found, step, keep=""):
    arrays = {"clusters_student": unit_rows(6, 2 + step).half(), "clusters_assignment": torch.tensor(found, dtype=torch.int32)}
    arrays |= {"student": torch.eye(4).half(), "student_scale": torch.tensor([10.0])}
    Snapshots(run).take(lambda: arrays, keep=keep, stage="student", phase="distil", step=step)


def looked_at(run):
    watched = Watched(Run(run.folder))
    watched.look()
    return watched


def test_agreement_purity_and_moved_images_of_a_run_with_clusters(run):
    write_clusters(run)
    clusters_snapshot(run, [1, 1, 0, 0, 2, 0], step=1)  # one image stays; two pairs go together
    watched = looked_at(run)
    drawn = clusters_json(watched)
    stayed, moved, centres, teacher, student = drawn["data"]
    plane, features = RunClusters(run).plane, watched.arrays["clusters_student"].astype(np.float32)
    assert np.allclose(np.stack([moved["x"], moved["y"]], axis=1), plane.project(features[[0, 1, 2, 3, 5]]), atol=1e-5)
    assert len(stayed["x"]) == 1 and moved["marker"]["symbol"] == "x" and stayed["marker"]["symbol"] == "circle"
    assert moved["marker"]["color"] == [widgets.LINE_COLOURS[k] for k in (1, 1, 0, 0, 0)] and len(centres["x"]) == 3
    assert list(teacher["y"]) == [2, 2, 2] and list(student["y"]) == [3, 2, 1]
    said = drawn["layout"]["annotations"][0]["text"]
    assert "step 1: 17% of the images" in said and "purity 83%" in said, "1 of 6, and 5 of 6"
    assert cluster_purity(np.array([7, 7, 7]), np.array([4, 4, 0])) == pytest.approx(2 / 3)
    words = " ".join(moved["hovertext"])
    assert "&lt;img src=x" in words and "<img" not in words and "<script>" not in words and "\u202e" not in words
    assert moved["hovertext"][0].endswith("class 0<br>student: cluster 1<br>teacher: cluster 0")


def test_of_many_clusters_the_chosen_one_is_lit_also_in_the_picture(run):
    write_clusters(run, count=300)
    clusters_snapshot(run, [0, 0, 1, 1, 2, 2], step=1)
    drawn = clusters_json(looked_at(run))
    stayed, moved, centres, *_ = drawn["data"]
    assert set(stayed["marker"]["color"]) == {widgets.GREY}
    view = RunView(run.folder, live=True)
    figure = view.widgets.part(StudentMap).widget
    figure._hear({"chosen": [0, 2]})
    assert figure.drawn["data"][0]["marker"]["color"][2:4] == [widgets.CATEGORIES[0]] * 2, "its cluster, and no other"
    assert figure.drawn["data"][0]["marker"]["color"].count(widgets.GREY) == 4
    view.close()
    assert len(moved["x"]) == 0 and len(centres["x"]) == 200 and centres["hovertext"][0] == "cluster 299: 309 training images"
    assert Image.open(io.BytesIO(picture(drawn))).size == (830, 330)


def test_the_map_of_a_bench_is_updated_in_place(run):
    from ipywidgets.widgets.widget import _instances

    write_clusters(run)
    clusters_snapshot(run, [1, 1, 0, 0, 2, 0], step=1)
    view = RunView(run.folder, live=True)
    figure, held = view.widgets.part(StudentMap).widget, len(_instances)
    assert shown(view)[2:] == [figure]
    panels = [panel["y"]["title"] for panel in view.widgets.part(LossCurves).widget.value["panels"]]
    assert panels[2:] == ["weighted, MSE", "sparsity", "gradient share"]
    clusters_snapshot(run, [0, 0, 1, 1, 2, 0], step=2)
    recalls = {"image_to_text_r1": 0.2, "text_to_image_r1": 0.4}
    run.log({"event": "validation", "stage": "student", "step": 30, **recalls, "cluster_agreement": 0.75, "cluster_purity": 0.8})
    view.always, view._drawn = True, -1e9
    view.update()
    moved = figure.value["traces"][1]
    assert view.widgets.part(StudentMap).widget is figure and len(_instances) == held
    assert len(figure.points("centre of the teacher")[0]) == 5 and len(moved["which"]) == len(moved["words"]) == 1
    assert "step 2: 83%" in figure.value["notes"][0]["text"] and list(figure.points("by the student")[1]) == [3, 2, 1]
    curves = view.widgets.part(LossCurves).widget
    assert list(curves.points("cluster agreement")[1]) == [0.75]
    assert [panel["y"]["title"] for panel in curves.value["panels"]][3:] == ["sparsity", "gradient share", "cluster agreement"]
    view.close()


def test_a_still_has_the_map_and_a_run_without_clusters_has_none(run):
    height = lambda: Image.open(io.BytesIO(RunView(run.folder, live=False).static().png)).height  # noqa: E731
    view, without = RunView(run.folder, live=True), height()
    assert len(view.box.children) == 3 and clusters_json(view.watched) == {}
    with pytest.raises(KeyError):
        view.widgets.part(StudentMap)
    view.close()
    write_clusters(run)
    assert height() == without, "before its first snapshot"
    clusters_snapshot(run, [0, 0, 1, 1, 2, 0], step=2)
    assert height() == without + 330
