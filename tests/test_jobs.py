"""The job notebooks as a user runs them: through papermill."""

import json
import re
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from vlkd_lab.runs import Run

ROOT = Path(__file__).parent.parent


def outputs(notebook):
    "Everything that the executed notebook shows, as text"
    return "\n".join(
        "".join(o.get("text", "")) + json.dumps(o.get("data", {})) for c in notebook.cells if c.cell_type == "code" for o in c.outputs
    )


def execute(name, to, **parameters):
    return papermill.execute_notebook(ROOT / "nbs" / f"{name}.ipynb", to, parameters, cwd=str(to.parent), progress_bar=False)


@pytest.fixture
def given(scenes, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return dict(
        data=f"{scenes}/train-{{000000..000002}}.tar",
        val=f"{scenes}/val-000000.tar",
        teacher=str(tiny_teacher),
        stages=2,
        steps=4,
        batch_size=16,
        device="cpu",
        out=str(tmp_path / "run"),
    )


def test_the_tinyclip_job_tells_its_story(given, tmp_path):
    notebook = execute("train_tinyclip", tmp_path / "out.ipynb", **given)
    shown = outputs(notebook)
    for wanted in (
        "teacher",
        "stage-1",
        "stage-2",
        "scratch-2",
        "parameters, M",
        "MACs, M",
        "latency",
        "R@10",
        "zero-shot",
        "same caption",
    ):
        assert wanted in shown, wanted
    assert len(re.findall('"image/png"', shown)) >= 6, "pictures that need no kernel"
    assert "widget-view" not in shown and "widgets" not in notebook.metadata
    run = Run(tmp_path / "run")
    assert run.status()["state"] == "finished" and set(run.result()["models"]) == {"teacher", "stage-1", "stage-2", "scratch-2"}
    lines = len(run.metrics())
    execute("train_tinyclip", tmp_path / "again.ipynb", **given)
    assert len(run.metrics()) == lines, "a finished run is shown, not trained again"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(stagez=3), "did you mean 'stages'"),
        (dict(stages="three"), "stages must be int"),
        (dict(target_sparsity=7), "target_sparsity must be float"),
        (dict(inheritance="magic"), "one of 'auto', 'auto_uniform', 'manual', 'none'"),
    ],
)
def test_a_wrong_parameter_stops_the_job_in_one_line(given, tmp_path, wrong, message):
    with pytest.raises(PapermillExecutionError, match=re.escape(message)) as error:
        execute("train_tinyclip", tmp_path / "out.ipynb", **given | wrong)
    assert error.value.ename == "ValueError" and "\n" not in error.value.evalue and not (tmp_path / "run").exists()


def test_the_teacher_job_leaves_a_model(given, tmp_path):
    kept = {k: given[k] for k in ("data", "val", "steps", "batch_size", "device", "out")}
    notebook = execute("train_teacher", tmp_path / "out.ipynb", **kept, image_size=32, vocabulary=300, context_length=24)
    assert (tmp_path / "run/teacher/student/open_clip_config.json").exists() and "image_to_text_r1" in outputs(notebook)


def test_papermill_lists_the_parameters():
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(ROOT / "nbs/train_tinyclip.ipynb")]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    names = "stages target_sparsity inheritance teacher student data val steps batch_size learning_rate seed precision device workers"
    for name in [*names.split(), "compare_scratch", "out"]:
        assert re.search(rf"^\s+{name}: \w+ \(default .*\)", shown, re.M), name
