"The table of runs: what it reads, how often, what is hostile or broken; and the real page: sort, tick, fork, start."

import json
import re
import shutil
import time

import jupyter_page
import pytest
import torch
from test_lab import lab, page, pytestmark, until  # noqa: F401 the fixtures of the browser tests

from vlkd_lab.runs import Curves, Run, RunWriter, begin, keep_checkpoint, save_checkpoint
from vlkd_lab.trainers import fork
from vlkd_lab.widgets import (
    RunRows,
    RunsBoard,
    StaticBoard,
    differing,
    fork_tree,
    row_state,
    run_folders,
    runs_frame,
)

HOSTILE = "<img src=x onerror='window.hacked=2'> \u202e \"quoted\""
browser, pytestmark = pytestmark, []


def by_hand(folder, rate=0.001, steps=8, kept=(), planned=8, **more):
    "A run whose loss falls and whose score rises, with checkpoints that were kept"
    with RunWriter(folder) as run:
        parameters = {"learning_rate": rate, "steps": planned, "seed": 0, "batch_size": 4}
        begin(run, {"method": "Distil", "parameters": parameters, "stages": {"student": "student", "scratch": "baseline"}} | more)
        run.set_status(plan=[["student", planned]])
        for step in range(1, steps + 1):
            run.log({"stage": "student", "step": step, "total": 100 * rate / step, "seconds": 0.1, "samples": 4 * step})
            if step % 2 == 0:
                scores = dict(image_to_text_r1=step * rate, text_to_image_r1=step * rate)
                run.log({"event": "validation", "stage": "student", "step": step, **scores})
            if step in kept:
                save_checkpoint(run, "student/distil", {"step": step, "learner": {"w": torch.zeros(3)}})
                keep_checkpoint(run, "student/distil", step, most=3)
    return Run(folder)


def test_two_hundred_runs_are_looked_at_in_less_than_a_second(tmp_path):
    by_hand(tmp_path / "runs" / "0", steps=300)
    for number in range(1, 200):
        shutil.copytree(tmp_path / "runs" / "0", tmp_path / "runs" / f"group-{number % 5}" / str(number))
    rows = RunRows(tmp_path / "runs")
    assert len(rows.look()) == 200 and rows.read == 200
    start = time.perf_counter()
    assert rows.look() == set() and rows.read == 200
    took = time.perf_counter() - start
    print(f"a second look at 200 runs takes {took * 1000:.0f} ms")
    assert took < 1
    with RunWriter(tmp_path / "runs" / "0") as run:
        run.log({"stage": "student", "step": 301, "total": 1.0, "samples": 9999})
    assert rows.look() == {"0"} and rows.read == 201 and rows.rows["0"].samples == 9999


def test_a_run_that_cannot_be_read_says_so_and_spoils_no_other(tmp_path):
    for name in ("good", "lines", "odd", "status"):
        by_hand(tmp_path / name)
    for name, text in {"half": '{"method": "Dis', "list": "[1, 2]", "bytes": "\udcff"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "lines" / "metrics.jsonl").write_text("{not JSON\n")
    (tmp_path / "status" / "status.json").write_text("{")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"origin": "somewhere", "parameters": [1]}))
    (tmp_path / "a file").write_text("")
    (tmp_path / ".draft").mkdir()
    (tmp_path / ".draft" / "config.json").write_text("{}")
    rows = RunRows(tmp_path)
    rows.look()
    broken = {key for key, row in rows.rows.items() if row.problem}
    assert broken == {"half", "list", "bytes", "lines", "odd", "status"} and rows.rows["good"].problem == ""
    static = StaticBoard(list(rows.rows.values())).html()
    assert static.count("it cannot be read") == 6
    assert list(runs_frame(tmp_path)["problem"] == "").count(True) == 1
    (tmp_path / "half" / "config.json").write_text('{"method": "Distil"}')
    assert rows.look() == {"half"} and not rows.rows["half"].problem


def test_names_and_captions_are_escaped_wherever_they_stand(tmp_path):
    by_hand(tmp_path / HOSTILE.replace("/", "-"), kept=(4,), id="<b>1</b>")
    child = fork(tmp_path / HOSTILE, tmp_path / "child", at="student/distil/4")
    config = child.config()
    config["parameters"]["seed"] = "<script>alert(1)</script>"
    config["method"] = "<i>method</i>"
    (child.folder / "config.json").write_text(json.dumps(config))
    rows = RunRows(tmp_path)
    rows.look()
    html = StaticBoard(list(rows.rows.values())).html()
    assert not re.search(r"<(img|script|i|b>1)", html) and "\u202e" not in html and "&lt;script&gt;" in html
    sent = json.dumps([row_state(row, ["seed"]) for row in rows.rows.values()])
    assert "\u202e" not in sent and "\\\\u202e" in sent


def test_a_baselines_lines_are_not_the_students(tmp_path):
    run = by_hand(tmp_path / "run")
    with RunWriter(run.folder) as writer:
        writer.log({"stage": "scratch", "step": 1, "total": 99.0, "samples": 10**9, "seconds": 99.0})
        writer.log({"event": "validation", "stage": "scratch", "step": 1, "image_to_text_r1": 1.0, "text_to_image_r1": 1.0})
    rows = RunRows(tmp_path)
    rows.look()
    row = rows.rows["run"]
    assert row.samples == 32 and max(row.losses) < 1 and row.best == pytest.approx(0.008) and row.seconds == pytest.approx(0.8)


def test_the_tree_follows_runs_that_were_renamed_or_deleted(tmp_path):
    by_hand(tmp_path / "first", kept=(2, 4))
    fork(tmp_path / "first", tmp_path / "b", at="student/distil/4")
    fork(tmp_path / "first", tmp_path / "a", at="student/distil/2", controls={"learning_rate_factor": 2.0})
    fork(tmp_path / "a", tmp_path / "c")

    def drawn():
        rows = RunRows(tmp_path)
        rows.look()
        return [(line.prefix, line.name) for line in fork_tree(list(rows.rows.values()))]

    under = [("├─ ", "a"), ("│  └─ ", "c"), ("└─ ", "b")]
    assert drawn() == [("", "first"), *under], "by the step at which they begin"
    (tmp_path / "first").rename(tmp_path / "renamed")
    assert drawn() == [("", "renamed"), *under], "it is known by its id"
    shutil.rmtree(tmp_path / "renamed")
    assert drawn() == [("", "first (deleted)"), *under]


def test_requests_that_are_not_valid_are_said_and_end_nothing(tmp_path):
    by_hand(tmp_path / "first", kept=(4,))
    board = RunsBoard(tmp_path, live=True)
    wrong = [{"points": "gone"}, {"fork": {"key": "first", "at": "x"}}, {"fork": {"key": "first", "sliders": "x"}}, {"start": "gone"}]
    for request in wrong:
        board.panel._hear({"requested": request})
        board.update()
        assert board.panel.said[0] == "error", request
    board.panel._hear({"requested": {"unknown": 1}})
    board.panel._hear({"requested": {"ticked": ["first", "gone"]}})
    board.update()
    assert list(board.several) == ["first"] and board.panel.ticked == ["first"]
    shutil.rmtree(tmp_path / "first")
    board._looked = 0.0
    board.update()
    assert not board.panel.rows and not board.panel.ticked
    board.update()
    board.close()
    assert list(run_folders(tmp_path / "first")) == [] and differing([]) == [] and Curves(Run(tmp_path / "first")).read() == 0


@browser[0]
@browser[1]
def test_a_person_sorts_ticks_and_forks(page, lab):  # noqa: F811
    "In a real JupyterLab: by click and by keyboard; what is done is in the folder, and is there after a reload"
    folder = lab[-1] / "board"
    for number, name in enumerate(("slow", "fast", HOSTILE.replace("/", "-"))):
        by_hand(folder / "runs" / name, rate=0.001 * (3 - number), kept=(2, 4))
    cells = ["from vlkd_lab.widgets import runs_board", f"board = runs_board({str(folder / 'runs')!r})\nboard"]
    jupyter_page.write_notebook(folder / "look.ipynb", cells, "warm")
    look = page.browser_page
    page.open("board/look.ipynb")
    assert page.run_cell(0) and page.run_cell(1), page.output_text(1)
    table = page.output(1).locator(".vlkd-runs")

    def names():
        return [text.strip() for text in table.locator("tbody th").all_inner_texts()]

    until(lambda: len(names()) == 3)
    assert table.locator("tbody polyline").count() == 6
    table.locator('button[data-name="sort best"]').click()
    assert names()[0] == "slow" and table.locator('th[aria-sort="descending"]').count() == 1
    look.keyboard.press("Enter")  # the title has the focus still
    assert names()[-1] == "slow" and "img src=x" in names()[0]
    table.locator("input[type=search]").fill("fast")
    assert names() == ["fast"]
    table.locator("input[type=search]").fill("")
    for name in ("slow", "fast"):
        table.locator(f'input[data-name="tick {name}"]').check()
    until(lambda: page.output(1).locator(".vlkd-plot").count() == 1)
    table.locator('button[data-name="run fast"]').click()
    at = table.locator('select[data-name="at"]')
    until(lambda: at.count() == 1)
    at.select_option("student/distil/2")
    table.locator('select[data-name="sliders"]').select_option("then")
    table.locator('button[data-name="fork"]').focus()
    look.keyboard.press("Enter")
    child = Run(folder / "runs" / "fast-fork-1")
    until(lambda: child.config())
    origin = child.config()["origin"]
    assert (origin["name"], origin["step"], origin["sliders"]) == ("fast", 2, "then")
    until(lambda: "fast-fork-1" in names() and "vlkd_lab.trainers" in table.locator(".vlkd-said code").inner_text())
    assert table.locator(".vlkd-tree li").count() == 2 and table.locator('button[data-name="start"]').count() == 1
    page.save()
    page.reload()
    until(lambda: len(names()) == 4 and names()[-1] == "slow")
    assert table.locator("input[type=checkbox]:checked").count() == 2 and table.locator(".vlkd-tree li").count() == 2
    width, shown = page.output(1).locator(".jp-OutputArea-output").last.evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert width <= shown + 1 and look.evaluate("window.hacked") is None
    assert not [error for error in page.console_errors if "vlkd" in error or "anywidget" in error]
