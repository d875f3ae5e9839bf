"""What the bench shows of a run that distils a BLIP: where it looks, and its terms by module. The page is played by hand."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlkd_lab import widgets
from vlkd_lab.blip_terms import MODULES, blip_terms
from vlkd_lab.data import thumbnail
from vlkd_lab.methods import all_losses
from vlkd_lab.runs import Run, RunWriter, Snapshots, write_snapshot
from vlkd_lab.widgets import (
    TABLE_KINDS,
    CrossAttention,
    CrossMaps,
    CrossView,
    LossCurves,
    ProbeMatrices,
    RunView,
    Watched,
    attention,
    compared_kind,
    cross_maps,
    cross_picture,
    curves_json,
    module_curves,
    module_table,
    modules_of,
    on_grid,
    overlap,
    picture,
    run_sliders,
    run_values,
    term_curves,
    validation_scores_of,
)

HOSTILE = "<img src=x onerror=alert(1)> $x_ \u202eevil"
WORDS = [["[ENC]", "a", HOSTILE, "star", "[SEP]"], ["[ENC]", "two", "[SEP]"]]
TERMS = [term.name for term in blip_terms()]


def shares(grid, seed, images=2, tokens=5):
    "Random maps (N, L, g²) whose rows add up to less than 1; nothing behind a text's end"
    found = torch.rand(images, tokens, grid**2, generator=torch.Generator().manual_seed(seed))
    found = 0.8 * found / found.sum(-1, keepdim=True)
    found[1, 3:] = 0
    return found.half()


def snapshot(run, step, modules=("fusion", "decoder"), grid=2, **more):
    arrays = {f"student_cross_{module}": shares(grid, step + k) for k, module in enumerate(modules)} | more
    Snapshots(run).take(lambda: arrays, keep=f"student-distil-{step:08d}", stage="student", phase="distil", step=step)


def begin(writer, modules=("fusion", "decoder"), grid=4):
    "Configuration and probe of a run"
    config = {"method": "Dlip", "terms": TERMS, "objective": {name: float(name != "similarities") for name in TERMS}, "tasks": []}
    (writer.folder / "config.json").write_text(json.dumps(config | {"parameters": {"batch_size": 10, "teacher": "t"}}))
    write_snapshot(writer.folder / "probe.safetensors", {f"teacher_cross_{m}": shares(grid, 9 + k) for k, m in enumerate(modules)}, {})
    pictures = [thumbnail(Image.new("RGB", (8, 8), colour)) for colour in ("#c02020", "#2020c0")]
    probe = {"captions": [HOSTILE, "two"], "keys": ["a", "b"], "labels": None, "pictures": pictures, "words": WORDS}
    (writer.folder / "probe.json").write_text(json.dumps(probe))


def log(writer, steps=30, stage="student", **values):
    for step in range(1, steps + 1):
        writer.log({"stage": stage, "phase": "distil", "step": step, **dict.fromkeys(TERMS, 1.0), **values, "total": 1.0, "seconds": 0.5})


@pytest.fixture
def run(tmp_path):
    "A run at work whose probe has two images, and a snapshot"
    with RunWriter(tmp_path / "run") as writer:
        begin(writer)
        writer.set_status(plan=[["student", 60]], stage="student", phase="distil")
        log(writer)
        snapshot(writer, 30)
        yield writer


def looked_at(run):
    watched = Watched(Run(run.folder))
    watched.look()
    return watched


def drawn_by_page(view):
    "The page says that it has drawn everything"
    view.panel._hear({"drawn": view.panel.number})


def slow_on_grid(maps, side):
    "Each patch cut into side × side pieces, one of its grid's cells at a time"
    own, found = len(maps), np.zeros((side, side))
    for y in range(own * side):
        for x in range(own * side):
            found[y // own, x // own] += maps[y // side, x // side] / side**2
    return found


@pytest.mark.parametrize("own, side", [(4, 4), (4, 2), (5, 3), (7, 5), (3, 1)])
def test_shares_on_a_coarser_grid_are_divided_by_area(own, side):
    maps = np.random.default_rng(0).random((own, own))
    assert np.allclose(on_grid(maps, side), slow_on_grid(maps, side))
    assert np.allclose(on_grid(np.stack([maps, 2 * maps]), side)[1], 2 * slow_on_grid(maps, side))


def test_overlap_of_two_models():
    one, other = np.zeros((2, 2)), np.zeros((2, 2))
    one[0, 0], other[0, 0], other[1, 1] = 0.3, 0.6, 0.2
    assert overlap(one, other) == pytest.approx(0.75) and overlap(one, 5 * one) == pytest.approx(1)
    fine = np.kron(other, np.full((2, 2), 0.25))
    assert overlap(fine, other) == pytest.approx(1) == overlap(other, fine), "the finer map is brought to the coarser grid"
    assert np.isnan(overlap(np.zeros((2, 2)), one)), "a token behind the end"
    assert overlap(np.stack([one, other]), np.stack([one, one])).tolist() == pytest.approx([1, 0.75])


def test_maps_of_a_probe_end_with_the_text(run):
    maps = cross_maps(looked_at(run), 1)
    shapes = {module: {model: rows.shape for model, rows in models.items()} for module, models in maps.items()}
    assert shapes == dict.fromkeys(("fusion", "decoder"), {"teacher": (3, 4, 4), "student": (3, 2, 2)})
    expected = shares(4, 10)[1, 2].float().reshape(4, 4).numpy()
    assert np.array_equal(maps["decoder"]["teacher"][2], expected), "rows of patches"
    assert cross_maps(looked_at(run), 2) == {}


def test_the_chosen_word_is_sent_a_byte_a_patch(run):
    view = CrossView(looked_at(run))
    view._hear({"requested": {"image": 1}})
    view._hear({"requested": {"word": 2}})
    assert (view.image, view.word, view.words) == (1, 2, ["[ENC]", "two", "[SEP]"]) and len(view.frame) == 2 * (16 + 4)
    maps = cross_maps(view.watched, 1)
    teacher, student = (maps["fusion"][model][2] for model in ("teacher", "student"))
    high = max(3.0, 16 * teacher.max(), 4 * student.max())  # densities in units of an even spread: one scale for both
    sent = np.frombuffer(view.frame, dtype=np.uint8)[:20] / 254
    assert np.allclose(sent[:16] * high / 16, teacher.ravel(), atol=high / 16 / 254)
    assert np.allclose(sent[16:] * high / 4, student.ravel(), atol=high / 4 / 254)
    assert [panel["title"] for panel in view.panels][:2] == ["reading (fusion): teacher", "reading (fusion): student"]
    assert view.panels[0]["total"] == pytest.approx(0.8, abs=1e-2) and view.panels[0]["high"] == pytest.approx(high / 16)
    assert f"fusion {overlap(teacher, student):.2f}" in view.said
    json.dumps(view.panels)


def test_an_image_begins_with_the_word_that_looks_hardest_and_other_snapshots_keep_the_word(run):
    maps = shares(4, 1)
    maps[0, 3, 5] = 0.9
    maps[0, [0, 4], 5] = 0.95  # the marks of beginning and end are no words
    write_snapshot(run.folder / "probe.safetensors", {"teacher_cross_fusion": maps}, {})
    view = CrossView(looked_at(run))
    assert view.word == 3
    view._hear({"requested": {"word": 1}})
    view.show()
    assert view.word == 1 and [panel["title"] for panel in view.panels][-1] == "writing (decoder): student" and len(view.panels) == 3


@pytest.mark.parametrize("wish, image, word", [({"word": 99}, 0, 4), ({"word": -5}, 0, 0), ({"image": 99}, 1, 1), ({"image": -1}, 0, 2)])
def test_a_wish_beyond_the_end_is_the_last(run, wish, image, word):
    view = CrossView(looked_at(run))
    view._hear({"requested": wish})
    assert view.image == image and (view.word == word or "image" in wish)


def test_a_wish_that_is_no_number_is_said_on_the_page(run):
    view = CrossView(looked_at(run))
    view._hear({"requested": {"word": HOSTILE}})
    assert "ValueError" in view.said and "\u202e" not in view.said


def test_words_and_pictures_from_strangers(run):
    probe = json.loads((run.folder / "probe.json").read_text())
    probe["pictures"][1] = "https://example.org/seen.png"
    (run.folder / "probe.json").write_text(json.dumps(probe))
    view = CrossView(looked_at(run))
    said = json.dumps([view.words, view.captions, view.said], ensure_ascii=False)
    assert "\u202e" not in said and "\\\\u202e" in said, "shown, not obeyed"
    assert view.pictures[0].startswith("data:image/") and view.pictures[1] == "", "no page is fetched"
    assert cross_picture(view.watched, 1)[:4] == b"\x89PNG"
    page = (widgets.STATIC / "cross.js").read_text()
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page


def test_a_bench_is_owed_one_frame_of_maps(run, monkeypatch):
    monkeypatch.setattr(widgets.controls, "UPDATE_SECONDS", 1e9)  # a slow machine gives no update up
    view = RunView(run.folder, live=True)
    cross, affinities = view.widgets.part(CrossMaps).widget, view.widgets.part(ProbeMatrices).widget
    sent = cross.number
    assert view.box.children[-1].children[1] is cross and not affinities.children, "no joint space, no affinities"
    assert len(view.box.children) == 3, "and no title of theirs"
    for step in range(31, 41):
        snapshot(run, step)
        view.update()
    assert cross.number == sent, "nothing is queued while the first frame is not drawn"
    drawn_by_page(view)
    view.update()
    newest = cross_maps(view.watched, 0)["fusion"]["student"][cross.word]
    got = np.frombuffer(cross.frame, dtype=np.uint8)[16:20] / 254 * cross.panels[1]["high"]
    assert cross.number == sent + 1 and view.watched.labels["step"] == 40 and np.allclose(got, newest.ravel(), atol=0.01)
    view.close()


def test_what_a_page_holds_does_not_grow(run):
    from ipywidgets.widgets.widget import _instances

    view = RunView(run.folder, live=True)
    pictures, held = view.widgets.part(CrossMaps).widget.pictures, len(_instances)
    for step in range(31, 52):
        run.log({"stage": "student", "step": step, **dict.fromkeys(TERMS, 0.5), "total": 1.0, "seconds": 0.5})
        snapshot(run, step)
        drawn_by_page(view)
        view.always, view._drawn = True, -1e9
        view.update()
    assert len(_instances) == held and view.widgets.part(CrossMaps).widget.pictures is pictures, "pictures travel once"
    figure = view.widgets.part(LossCurves).widget
    assert figure.names[-1] == "weighted terms" and "0.5" in {note["text"] for note in figure.value["notes"]}
    view.close()


def test_a_bench_that_was_there_before_its_run_gets_the_maps_and_the_table(tmp_path):
    view = RunView(tmp_path / "run", live=True)
    assert len(view.box.children) == 3, "panel, curves and affinities"
    with RunWriter(tmp_path / "run") as writer:
        begin(writer, modules=("decoder",))
        log(writer)
        snapshot(writer, 30, modules=("decoder",), student=torch.eye(2).half(), student_scale=torch.ones(1))
        view._drawn = -1e9
        view.update()
    cross, affinities, curves = (view.widgets.part(kind).widget for kind in (CrossMaps, ProbeMatrices, LossCurves))
    assert [panel["title"] for panel in cross.panels] == ["writing (decoder): teacher", "writing (decoder): student"]
    assert [section.children[1] for section in view.box.children[1:]] == [curves, affinities, cross]
    assert len(affinities.children[0].children) == 3, "this one has a joint space"
    table = curves.value["panels"][2]
    assert table["x"]["ticks"][0] == "base" and table["y"]["reversed"]
    view.close()


def test_a_still_has_the_maps(run):
    height = lambda: Image.open(io.BytesIO(RunView(run.folder, live=False).static().png)).height  # noqa: E731
    maps = Image.open(io.BytesIO(cross_picture(looked_at(run))))
    assert maps.width == 830 and len(maps.convert("RGB").getcolors(100_000)) > 20
    assert height() == curves_json(looked_at(run))["layout"]["height"] + maps.height
    (run.folder / "probe.json").unlink()
    assert height() == curves_json(looked_at(run))["layout"]["height"]


def test_brighter_is_where_a_model_looks_and_an_even_spread_is_dim():
    pixels, maps = np.ones((40, 40, 3)), np.zeros((2, 2))
    maps[1, 0] = 0.9
    looks = attention._laid_over(pixels, maps, attention._densest([maps])).sum(axis=2)
    assert looks[20:, :20].min() > looks[:20].max() and looks[20:, :20].min() > looks[:, 20:].max(), "row 1, column 0"
    even = [attention._laid_over(pixels, np.full((g, g), 1 / g**2), 4.0) for g in (2, 5)]
    assert np.allclose(*even), "whatever the grid"


def test_long_texts_are_broken_into_strips(run):
    many = [[f"word{k}" for k in range(30)], ["one"]]
    probe = json.loads((run.folder / "probe.json").read_text()) | {"words": many}
    (run.folder / "probe.json").write_text(json.dumps(probe))
    write_snapshot(run.folder / "probe.safetensors", {"teacher_cross_fusion": torch.full((2, 30, 16), 1 / 16).half()}, {})
    watched = looked_at(run)
    watched.arrays = {}
    parts = attention._strips(watched, 0, ["fusion"], 830)
    assert [len(part[2]) for part in parts] == [10, 10, 10] and all(part[4].shape[1] <= 808 for part in parts)
    assert Image.open(io.BytesIO(cross_picture(watched))).width == 830


def test_a_picture_of_one_image_with_its_numbers(run):
    shown = CrossAttention(run.folder, image=0)
    maps = cross_maps(looked_at(run), 0)
    assert shown.overlaps["decoder"] == pytest.approx(overlap(*maps["decoder"].values()).tolist())
    assert shown._repr_png_() == shown.png and "\u202e" not in repr(shown) and f"star {shown.overlaps['fusion'][3]:.2f}" in repr(shown)
    assert list(CrossAttention(run.folder, modules=["decoder"]).overlaps) == ["decoder"]
    among = "fusion, decoder"
    for wrong, said in ((dict(image=2), "images 0 to 1"), (dict(modules=["text"]), among), (dict(modules=[]), among)):
        with pytest.raises(ValueError, match=said):
            CrossAttention(run.folder, **wrong)
    with pytest.raises(ValueError, match="no cross-attention"):
        CrossAttention(run.folder.parent / "none")


def test_every_term_has_a_place_in_the_table():
    places = {(all_losses()[name].module, compared_kind(name)) for name in TERMS}
    assert all(module in MODULES and kind in TABLE_KINDS for module, kind in places)
    assert len(places) == len(TERMS) - 1, "only the decoder's two base losses share a cell"


def test_curves_are_sums_by_module_with_the_weights_of_their_steps(run):
    run.log({"event": "control", "stage": "student", "step": 10, "weights": {"image_attention": 5.0, "similarities": 2.0}})
    log(run, stage="scratch", similarities=float("nan"))
    curves = module_curves(looked_at(run))
    members = {module: [name for name in TERMS if all_losses()[name].module == module] for module in MODULES}
    assert np.allclose(curves["image"][1][:10], len(members["image"])) and np.allclose(curves["image"][1][10:], len(members["image"]) + 4)
    joint = curves["image–text"][1]
    assert np.allclose(joint[:10], 1) and np.allclose(joint[10:], 3), "similarities had no weight at first"
    assert np.allclose(curves["decoder (baseline)"][1], len(members["decoder"]))
    drawn = curves_json(looked_at(run))
    assert [line["name"] for line in drawn["data"]][:5] == ["image", "text", "image–text", "fusion", "decoder"]
    assert {line["line"]["dash"] for line in drawn["data"] if line["name"].endswith("(baseline)")} == {"dot"}


def test_what_is_no_number_of_nats_has_a_panel_of_its_own_and_each_module_one_name(run):
    run.log({"event": "control", "stage": "student", "step": 10, "weights": {"image_features": 5.0}})
    watched = looked_at(run)
    drawn = curves_json(watched)
    panels = {panel: drawn["layout"][f"yaxis{panel}"]["title"]["text"] for panel in (1, 4)}
    assert panels == {1: "by module, nats", 4: "by module, 1 − cos"} and drawn["layout"]["yaxis4"]["type"] == "log"
    features = [line for line in drawn["data"] if line.get("xaxis") == "x4"]
    values = {line["name"]: list(line["y"]) for line in features}
    assert values["image"][:10] == [1.0] * 10 and set(values["image"][10:]) == {5.0} and "image–text" not in values
    named = [line["name"] for line in drawn["data"] if line.get("showlegend", True)]
    assert len(named) == len(set(named)), "a name stands once, and hides its lines in both panels"
    nats = module_curves(watched, among=[name for name in TERMS if all_losses()[name].unit == "nats"])
    both = {line["name"]: line["y"] for line in drawn["data"] if line.get("xaxis", "x") == "x"}
    assert np.allclose(both["image"], nats["image"][1])


def test_the_table_says_values_shares_and_what_is_off(run):
    run.log({"event": "control", "stage": "student", "step": 10, "weights": {"fusion_logits": 3.0}})
    run.log({"event": "gradient_share", "stage": "student", "step": 30, "shares": {"language_modelling": 0.25, "answering": 0.5}})
    watched = looked_at(run)
    values, pulls = module_table(watched)
    place = lambda module, kind: (list(MODULES).index(module), TABLE_KINDS.index(kind))  # noqa: E731
    assert values[place("fusion", "logits")] == pytest.approx(3) and values[place("decoder", "base")] == pytest.approx(2)
    assert values[place("both", "similarities")] == 0 and np.isnan(values[place("image", "logits")]), "off, and no such term"
    assert pulls[place("decoder", "base")] == pytest.approx(0.75) and np.isfinite(pulls).sum() == 1
    drawn = curves_json(watched)
    cells = {(note["y"], note["x"]): note["text"] for note in drawn["layout"]["annotations"] if note["yref"] == "y3"}
    assert cells[place("decoder", "base")] == "2<br>75%" and cells[place("both", "similarities")] == "off" and len(cells) == len(TERMS) - 1
    assert picture(drawn)[:4] == b"\x89PNG"


def test_the_table_is_valid_plotly(run):
    import plotly.graph_objects as go

    figure = go.Figure(curves_json(looked_at(run)))
    assert figure.data[-1].z.shape == (len(MODULES), len(TABLE_KINDS)) and figure.layout.width <= 850
    assert curves_json(Watched(Run(run.folder.parent / "none")))["data"] == []


def test_validation_of_whatever_was_validated(run):
    scores = validation_scores_of({"caption_loss": 2.0, "answer_accuracy": 0.5})
    assert scores == pytest.approx({"right answers": 0.5, "caption's words": np.exp(-2)})
    assert validation_scores_of({"image_to_text_r1": 0.2, "text_to_image_r1": 0.4}) == pytest.approx({"R@1": 0.3})
    run.log({"event": "validation", "stage": "student", "step": 30, "answer_accuracy": 0.5})
    run.log({"event": "validation", "stage": "scratch", "step": 30, "answer_accuracy": 0.25})
    lines = [line for line in curves_json(looked_at(run))["data"] if line["name"] == "right answers"]
    assert [list(line["y"]) for line in lines] == [[0.5], [0.25]] and [line["line"]["dash"] for line in lines] == ["solid", "dot"]


def test_sliders_stand_by_module(run):
    specs = run_sliders(looked_at(run))
    groups = [spec.get("group", "") for spec in specs]
    for more in (True, None):
        some = [group for group, spec in zip(groups, specs, strict=True) if spec.get("more") == more]
        assert some == sorted(some, key=["", *widgets.MODULE_NAMES.values()].index)
    assert set(groups) == {"", *widgets.MODULE_NAMES.values()}
    assert {spec["name"] for spec in specs} == {"learning_rate_factor", *(f"weights.{name}" for name in TERMS)}
    assert run_values(looked_at(run))["weights.similarities"] == 0


def test_a_blip_that_is_trained_without_a_teacher_begins_with_weights_of_1(tmp_path):
    with RunWriter(tmp_path) as writer:
        (tmp_path / "config.json").write_text(json.dumps({"terms": ["image_text_matching", "answering"], "parameters": {}}))
        writer.log({"stage": "teacher", "step": 1, "image_text_matching": 0.5, "answering": 2.0, "total": 2.5})
    watched = looked_at(writer)
    assert {name: list(values) for name, (_, values) in module_curves(watched).items()} == {"fusion": [0.5], "decoder": [2.0]}
    assert watched.current["weights"] == {"image_text_matching": 1.0, "answering": 1.0}


def test_a_run_of_two_towers_has_neither_modules_nor_their_sliders(tmp_path):
    with RunWriter(tmp_path) as writer:
        config = {"objective": {"affinity_mimicking": 1.0}, "parameters": {"teacher": "t"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        writer.log({"stage": "student", "step": 1, "affinity_mimicking": 0.5, "total": 0.5})
    watched = looked_at(writer)
    named = {spec["name"].removeprefix("weights.") for spec in run_sliders(watched)}
    assert named == {"learning_rate_factor", *(name for name, term in all_losses().items() if not term.module)}
    assert not any("group" in spec for spec in run_sliders(watched)) and modules_of(watched) == {}
    assert list(term_curves(watched)) == ["affinity mimicking"] == [line["name"] for line in curves_json(watched)["data"]]
