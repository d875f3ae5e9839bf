"""Static figures beside pictures of them that a person has found right: `tests/figures.py` draws, compares and writes them."""

from unittest import mock

import figures
import numpy as np
import pytest
from figures import FIGURES, LIMIT, STORED, Drawing, differences, drawn, side_by_side, stored, worst_tile
from PIL import Image

from vlkd_lab.widgets import LINE_COLOURS, drawing


def compared(name, folder):
    "Fail with what differs, and leave the new picture and the comparison in a folder"
    new = drawn(name)
    if not (STORED / f"{name}.png").exists():
        pytest.fail(f"{name} has no stored picture: `make pictures` writes it, then look at it")
    if reasons := differences(stored(name), new):
        new.save(folder / f"{name}.png")
        side_by_side(stored(name), new).save(folder / f"{name}-compared.png")
        said = "\n  ".join(reasons)
        pytest.fail(f"{name} is drawn otherwise than it was:\n  {said}\nLook at {folder}/{name}-compared.png (before, now, difference).\n"
                    "If it is right now, `make pictures` stores it.", pytrace=False)  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_as_it_was(name, tmp_path):
    compared(name, tmp_path)


def test_stored_pictures_are_small_and_belong_to_figures():
    files = list(STORED.glob("*.png"))
    assert {file.stem for file in files} == set(FIGURES)
    assert sum(file.stat().st_size for file in files) < 600_000


@pytest.mark.parametrize("style", [{"font.family": "DejaVu Serif"}, {"lines.linewidth": 1.8, "axes.linewidth": 1.0}, {"text.hinting": "none"}],
                         ids=["letters", "line width", "hinting"])  # fmt: skip
@pytest.mark.parametrize("name", ["bench_curves", "matrices", "validation"])
def test_other_letters_and_thicker_lines_show_the_same(name, style):
    new = drawn(name, **style)
    assert not np.array_equal(new.pixels(), stored(name).pixels()), "the pixels are others"
    assert differences(stored(name), new) == []


def shifted(drawing, right, down):
    pixels = np.full_like(drawing.pixels(), 255)
    pixels[down:, right:] = drawing.pixels()[:-down, :-right]
    return Drawing(figures.png_bytes(Image.fromarray(pixels)), drawing.words)


@pytest.mark.parametrize("name", ["bench_curves", "matrices", "explored_moves"])
def test_two_pixels_to_the_right_show_the_same(name):
    assert differences(stored(name), shifted(stored(name), 2, 1)) == []


PLAIN = {name: getattr(drawing, name) for name in ("_draw_scatter", "_draw_line", "_draw_heatmap", "_style_axis")}


def swapped(page, panel, trace):
    PLAIN["_draw_scatter"](page, panel, {**trace, "x": trace["y"], "y": trace["x"]})


def transposed(page, panel, trace):
    PLAIN["_draw_heatmap"](page, panel, {**trace, "z": np.transpose(trace["z"])})


def rows_reversed(page, panel, trace):
    PLAIN["_draw_heatmap"](page, panel, {**trace, "z": np.asarray(trace["z"])[::-1]})


def linear(panel, name, axis):
    PLAIN["_style_axis"](panel, name, {**axis, "type": "linear"})


def colours_exchanged(panel, x, y, trace, label):
    others = {LINE_COLOURS[0]: LINE_COLOURS[1], LINE_COLOURS[1]: LINE_COLOURS[0]}
    line = trace["line"]
    PLAIN["_draw_line"](panel, x, y, {**trace, "line": {**line, "color": others.get(line["color"], line["color"])}}, label)


def a_curve_less(panel, x, y, trace, label):
    PLAIN["_draw_line"](panel, x, y if label != "feature mimicking" and label != "other" else y + np.nan, trace, label)


FAULTS = [
    ("_draw_scatter", swapped, "bench_curves"), ("_draw_scatter", swapped, "explored_clusters"), ("_draw_scatter", swapped, "explored_balance"),
    ("_draw_heatmap", transposed, "matrices"), ("_draw_heatmap", transposed, "bench_cosines"), ("_draw_heatmap", transposed, "bench_gates"),
    ("_draw_heatmap", rows_reversed, "bench_cosines"), ("_draw_heatmap", rows_reversed, "bench_gates"),
    ("_style_axis", linear, "bench_curves"), ("_style_axis", linear, "explored_balance"), ("_style_axis", linear, "several_runs"),
    ("_draw_line", colours_exchanged, "bench_curves"), ("_draw_line", colours_exchanged, "several_runs"),
    ("_draw_line", a_curve_less, "bench_curves"), ("_draw_line", a_curve_less, "several_runs"),
]  # fmt: skip


@pytest.mark.parametrize("what, fault, name", FAULTS, ids=[f"{fault.__name__}-{name}" for _, fault, name in FAULTS])
def test_a_fault_differs_by_more_than_its_words(what, fault, name):
    with mock.patch.object(drawing, what, fault):
        wrong = drawn(name)
    assert worst_tile(stored(name), wrong)[0] > LIMIT


def test_other_words_and_words_elsewhere_are_named():
    right = stored("tradeoff")
    renamed = Drawing(right.png, tuple(("Lehrer" if text == "teacher" else text, *box) for text, *box in right.words))
    assert differences(right, renamed) == ["words that are gone: 'teacher', 'teacher'", "words that are new: 'Lehrer', 'Lehrer'"]
    places = dict((text, box) for text, *box in right.words)
    exchanged = {"stage-1": "scratch-2", "scratch-2": "stage-1"}
    moved = Drawing(right.png, tuple((text, *places[exchanged.get(text, text)]) for text, *_ in right.words))
    assert any(reason.startswith("'stage-1' is ") for reason in differences(right, moved))


def test_another_size_is_named():
    png = figures.png_bytes(Image.new("RGB", (90, 40)))
    assert differences(stored("batch"), Drawing(png, ())) == ["it was 540 × 198 pixels and is 90 × 40"]


def test_a_failure_leaves_both_pictures_and_their_difference(tmp_path):
    with mock.patch.object(drawing, "_draw_heatmap", transposed), pytest.raises(pytest.fail.Exception) as failure:
        compared("matrices", tmp_path)
    assert "matrices-compared.png" in str(failure.value) and str(tmp_path) in str(failure.value) and "make pictures" in str(failure.value)
    now = stored("matrices").pixels()
    whole = Image.open(tmp_path / "matrices-compared.png")
    assert whole.size == (now.shape[1], 3 * now.shape[0]) and np.array_equal(np.asarray(whole)[: now.shape[0]], now)
    assert Image.open(tmp_path / "matrices.png").text["words"]
    pixels = [np.full((4, 4, 3), 255, np.uint8) for _ in range(2)]
    pixels[0][0, 0] = pixels[1][3, 3] = 0
    pictures = [Drawing(figures.png_bytes(Image.fromarray(each)), ()) for each in pixels]
    difference = np.asarray(side_by_side(*pictures))[8:]
    assert difference[0, 0].tolist() == [255, 0, 0] and difference[3, 3].tolist() == [0, 0, 255] and difference[1, 1].tolist() == [255] * 3


def test_pictures_are_written_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "STORED", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {"batch": FIGURES["batch"]})
    (tmp_path / "gone.png").write_bytes(b"")
    figures.main([])
    assert [path.name for path in tmp_path.iterdir()] == ["batch.png"] and "it is new" in capsys.readouterr().out
    figures.main(["batch"])
    assert "it is new" not in capsys.readouterr().out
