"""Pages that look at a run get the newest that suits, and a list to choose from, whatever else lies under runs/."""

import json
import os
import re
import time
from pathlib import Path

import papermill
import pytest
from conftest import tiny_job
from papermill.exceptions import PapermillExecutionError

from vlkd_lab.explorers import lacks_affinities, lacks_clusters, lacks_gates
from vlkd_lab.runs import Run, find_run, lacks_student, run_table
from vlkd_lab.trainers import open_job, train

NOTEBOOKS = Path(__file__).parent.parent / "nbs"
OLDEST_FIRST = ("TinyCLIP", "ClipCid", "DimeFm", "Contrastive", "captions", "begun", "broken")


@pytest.fixture(scope="module")
def several(scenes, tiny_teacher, tiny_blip, tmp_path_factory):
    "A folder with runs/ of several methods; the newest have nothing to show"
    folder = tmp_path_factory.mktemp("several")
    blip = dict(teacher=str(tiny_blip), student="image:1x16, text:1x16", queue=16, tasks="captioning")
    changes = {
        "TinyCLIP": dict(stages=1, steps=6, keep_snapshots=2),
        "ClipCid": dict(clusters=4, steps=4),
        "DimeFm": dict(sentence_batch=16),
        "captions": blip,
    }
    for name in OLDEST_FIRST[:5]:
        method = "Dlip" if name == "captions" else name
        train(open_job(method, tiny_job(scenes, tiny_teacher, folder / "runs" / name, method, **changes.get(name, {}))))
    for name, text in (("begun", '{"method": "TinyCLIP", "parameters": {"teacher": "a", "target_sparsity": 0.5}}'), ("broken", "{")):
        (folder / "runs" / name).mkdir()
        (folder / "runs" / name / "config.json").write_text(text)
    for age, name in enumerate(reversed(OLDEST_FIRST)):
        for file in (folder / "runs" / name).glob("*.json*"):
            os.utime(file, (time.time() - 60 * age,) * 2)
    return folder


def execute(name, folder, **parameters):
    out = folder / f"{name}.ipynb"
    notebook = papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb", out, parameters, kernel_name="warm", cwd=str(folder), progress_bar=False
    )
    return "\n".join("".join(o.get("text", "")) + json.dumps(o.get("data", {})) for c in notebook.cells for o in c.get("outputs", ()))


@pytest.mark.parametrize(
    "lacks, newest", [(None, "begun"), (lacks_gates, "TinyCLIP"), (lacks_clusters, "ClipCid"), (lacks_affinities, "DimeFm")]
)
def test_the_newest_that_suits_is_found(several, lacks, newest):
    runs = several / "runs"
    assert find_run("", runs, lacks).folder.name == newest
    table = run_table(runs, lacks)
    assert set(table.index) == {f"runs/{name}" for name in OLDEST_FIRST} and table.index[0] == f"runs/{newest}"
    assert "cannot be read" in table.loc["runs/broken", "lacks"] and table.loc["runs/TinyCLIP", "method"] == "TinyCLIP"


def test_each_run_says_what_it_lacks(several):
    def reasons(lacks):
        return {name: lacks(Run(several / "runs" / name)) for name in OLDEST_FIRST[:-1]}

    assert [name for name, reason in reasons(lacks_affinities).items() if not reason] == ["TinyCLIP", "ClipCid", "DimeFm"]
    assert "no teacher" in reasons(lacks_affinities)["Contrastive"] and "no space" in reasons(lacks_affinities)["captions"]
    assert reasons(lacks_affinities)["begun"] == reasons(lacks_student)["begun"] == "none of its students is finished"
    assert [name for name, reason in reasons(lacks_gates).items() if not reason] == ["TinyCLIP"]
    assert [name for name, reason in reasons(lacks_clusters).items() if not reason] == ["ClipCid"]


@pytest.mark.parametrize(
    "page, parameters, shown",
    [
        ("explore_gates", {}, "stage-1, step"),
        ("explore_affinity", dict(pairs=8, searched=16), "rank of this text"),
        ("explore_affinity", dict(pairs=8, searched=16, run_folder="runs/ClipCid"), "rank of this text"),
        ("explore_clusters", dict(run_folder="runs/ClipCid"), "agreement"),
        ("watch_run", dict(others="runs/TinyCLIP"), "TinyCLIP"),
        ("export_student", dict(onnx=False, out="exported"), "open_clip"),
    ],
)
def test_pages_pass_over_runs_that_do_not_suit(several, page, parameters, shown):
    text = execute(page, several, **parameters)
    assert shown in text
    for name in ("captions", "TinyCLIP") if page == "watch_run" else ("runs/captions", "runs/TinyCLIP", "lacks"):
        assert name in text, "the list to choose from"


@pytest.mark.parametrize(
    "page, name, message",
    [
        ("explore_gates", "DimeFm", "does not suit: it keeps no snapshot of gates: .*; there are TinyCLIP"),
        ("explore_affinity", "Contrastive", "does not suit: it has no teacher.*; there are DimeFm, ClipCid, TinyCLIP"),
        ("explore_clusters", "TinyCLIP", "does not suit: it holds no clusters: .*; there are ClipCid"),
        ("explore_gates", "typo", "is no run folder: it has no config.json; there are TinyCLIP"),
    ],
)
def test_a_named_run_that_does_not_suit_says_why_and_which_do(several, page, name, message):
    with pytest.raises(PapermillExecutionError) as error:
        execute(page, several, run_folder=f"runs/{name}")
    assert re.search(message, error.value.evalue)


@pytest.mark.parametrize("page", ["explore_gates", "explore_affinity"])
def test_where_none_suits_each_says_what_it_lacks(page, tmp_path):
    with pytest.raises(PapermillExecutionError, match="there is no run under .*runs yet: train_tinyclip.ipynb makes one"):
        execute(page, tmp_path)
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    (tmp_path / "runs" / "begun" / "config.json").write_text('{"parameters": {"teacher": "a"}}')
    with pytest.raises(PapermillExecutionError, match=r"no run under .*runs suits \(begun: (it keeps no|none of its)"):
        execute(page, tmp_path)
