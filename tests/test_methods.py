"""The registry of methods, and a method that comes in a package of its own."""

import importlib
import io
import json
import math

import forked
import pytest
from conftest import lines_of
from PIL import Image

from vlkd_lab.evaluation import compare
from vlkd_lab.export import export_student
from vlkd_lab.losses import LOSSES, Term, contrastive
from vlkd_lab.methods import METHODS, Method, Methods, all_losses, find_method, name_of
from vlkd_lab.methods.tinyclip import TinyCLIP
from vlkd_lab.runs import Run, role_of, stage_roles
from vlkd_lab.stages import full_shapes, source_shapes
from vlkd_lab.trainers import open_job, train
from vlkd_lab.widgets import RunPart, RunView, attach

STRANGER = '''
"Somebody's method: the teacher's affinities, sharpened; and the same student without a teacher"
from dataclasses import dataclass

from vlkd_lab.losses import Objective, Term, affinity_mimicking
from vlkd_lab.methods import Method, register
from vlkd_lab.models import new_model
from vlkd_lab.trainers import Distillation, Job, Phase, above, find_model, finish_fit, make_accelerator, open_run, parameter
from vlkd_lab.widgets import RunPart


@dataclass(frozen=True)
class Parameters(Distillation):
    losses: str = parameter("sharp_affinity=1", "terms and their weights")
    sharpness: float = parameter(2.0, "factor of the teacher's logits", **above(0))


def sharp_affinity(student, teacher, sharpness=2.0):
    return affinity_mimicking(student, type(teacher)(teacher.image, teacher.text, sharpness * teacher.scale))


class SharpJob(Job):
    baselines = ("plain",)

    @property
    def plan(self):
        return [("sharp", self.options.steps), ("plain", self.options.steps)]

    def work(self):
        for stage, steps in self.plan:
            if (self.run.folder / stage / "done.json").exists():
                continue
            student = new_model(self.teacher.config["model_cfg"], like=self.teacher, seed=self.options.seed)
            own = Term("sharp_affinity", lambda s, t: sharp_affinity(s, t, self.options.sharpness))
            objective = Objective({}, own) if stage == "sharp" else Objective({"contrastive": 1.0})
            teacher = self.source if stage == "sharp" else None
            finish_fit(self, Phase(stage, "distil", steps, fixed=stage == "plain"), student, objective, teacher)


class Sharpness(RunPart):
    def figure(self, watched):
        values = watched.curves.column("sharp", "sharp_affinity")
        line = {"type": "scatter", "x": list(range(len(values))), "y": list(values), "name": "sharp"}
        return {"data": [line], "layout": {"height": 300, "width": 830}} if len(values) else {}


def open_sharp(options):
    accelerator = make_accelerator(options)
    about = {"objective": options.weights(), "terms": options.terms()}
    return open_run(options, find_model(options.teacher, accelerator.device), accelerator, about, SharpJob)


SHARP = Method("Sharp-1", "Somebody (2026): affinities, sharpened", Parameters, open_sharp,
               losses={"sharp_affinity": Term("sharp_affinity", sharp_affinity, formula="affinity mimicking of 2 t")},
               views=(Sharpness,))
'''


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    "A folder with an installed package of somebody's that brings a method, and one that is broken"
    known = dict(all_losses())  # and with it the methods that are here already
    folder = tmp_path / "installed"
    for name, module in (("strangers_lab", STRANGER), ("broken_lab", "import nothing_of_that_name")):
        about = folder / f"{name}-1.0.dist-info"
        about.mkdir(parents=True)
        (folder / f"{name}.py").write_text(module)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[vlkd_lab.methods]\n{name} = {name}" + (":SHARP\n" if name == "strangers_lab" else "\n"))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(METHODS, "broken", {})
    importlib.invalidate_caches()
    yield folder
    METHODS._methods.pop("Sharp-1", None)
    LOSSES.clear()
    LOSSES.update(known)


class Failing(RunPart):
    def figure(self, watched):
        return {"data": [1 / 0]}


class Undrawable(RunPart):
    def figure(self, watched):
        return {"data": [{"type": "no such trace", "x": "?"}]}


def height_of(still):
    return Image.open(io.BytesIO(still.png)).height


@pytest.fixture
def installed(stranger):
    "The stranger's method, found in this process"
    METHODS._is_searched = False
    with pytest.warns(UserWarning, match="'broken_lab' .* could not be loaded: ModuleNotFoundError"):
        assert "Sharp-1" in METHODS and "TinyCLIP" in METHODS
    assert list(METHODS.broken) == ["broken_lab"]


@pytest.fixture
def parameters(scenes, tiny_teacher, tmp_path):
    given = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", teacher=str(tiny_teacher), device="cpu")
    return given | dict(steps=3, batch_size=8, warmup=1, validate_every=3, validate_pairs=16, probe_pairs=8, out=str(tmp_path / "run"))


def from_the_command_line(stranger, parameters, processes=1, **changes):
    "Train the stranger's method as `python -m vlkd_lab.trainers`, in which nothing of it is imported; the run"
    go = stranger.parent / "go.py"
    program = f"import sys; sys.path.insert(0, {str(stranger)!r}); sys.argv = ['trainers.py', *sys.argv[1:]]; import runpy; "
    go.write_text(program + "runpy.run_module('vlkd_lab.trainers', run_name='__main__', alter_sys=True)")
    given = parameters | dict(method="Sharp-1", processes=processes) | changes
    words = [f"{name}={value}" for name, value in given.items() if name != "out"]
    forked.run(str(go), parameters["out"], *words, processes=processes)
    return Run(parameters["out"])


def totals_of(run, stage):
    return [line["total"] for line in run.metrics() if "total" in line and line["stage"] == stage]


def test_a_method_of_another_package_is_trained_watched_scored_and_exported(stranger, parameters, tmp_path, monkeypatch, request):
    run = from_the_command_line(stranger, parameters, sharpness=3)
    assert run.config()["method"] == "Sharp-1" and run.config()["parameters"]["sharpness"] == 3.0
    assert stage_roles(run) == {"sharp": "student", "plain": "baseline"}
    totals = totals_of(run, "sharp")
    assert len(totals) == 3

    request.getfixturevalue("installed")
    before = lines_of(run.folder)
    job = open_job("Sharp-1", run.config()["parameters"])
    job.work()
    assert lines_of(run.folder) == before, "a finished run is not trained again"
    with_part = height_of(attach(run.folder).static())
    live = RunView(run.folder, live=True)
    (shown,) = [part for part in live.widgets.parts if type(part).__name__ == "Sharpness"]
    assert live.widgets.parts[shown].widget.points("sharp")[1].tolist() == pytest.approx(totals)
    live.close()
    for wrong in (Failing, Undrawable):
        monkeypatch.setattr("vlkd_lab.widgets.bench.method_parts", lambda watched, wrong=wrong: [wrong()])
        with pytest.warns(UserWarning, match=f"{wrong.__name__} could not be drawn"):
            assert with_part == height_of(attach(run.folder).static()) + 300, "the rest of the picture is there"
        with pytest.warns(UserWarning, match=f"{wrong.__name__} could not be drawn"):
            RunView(run.folder, live=True).close()
    monkeypatch.setattr("vlkd_lab.widgets.bench.method_parts", lambda watched: [])
    assert with_part == height_of(attach(run.folder).static()) + 300, "the picture has the method's part"
    table = compare(job)
    assert list(table.index) == ["teacher", "sharp", "plain"] and table.loc["sharp"].notna().any()
    card = (export_student(run.folder, tmp_path / "away", onnx=False) / "README.md").read_text()
    assert "affinities, sharpened" in card and "sharp" in card
    run.control(weights={"sharp_affinity": 0.5})
    with pytest.raises(ValueError, match="weights from 0 up of .*sharp_affinity"):
        run.control(weights={"sharpest": 0.5})
    with pytest.raises(ValueError, match="no method 'Sharp-2': there are .*Sharp-1.*; broken_lab could not be loaded"):
        find_method("Sharp-2")


COMMON = [
    dict(teacher_features="stored"),
    dict(precision="bf16", clip_norm=0.5),
    dict(workers=1, shuffle=16),
    dict(micro_batch=4, hold_scale=20.0),
    dict(crop_scale=0.5, augmentations=2, teacher_features="stored"),
    dict(lock_text=True, unlocked_text_layers=1, keep_snapshots=0, probe_pairs=0),
]


@pytest.mark.parametrize("changes", COMMON, ids=str)
def test_a_strangers_job_takes_what_every_job_takes_and_goes_on(installed, parameters, changes):
    run = Run(parameters["out"])
    train(open_job("Sharp-1", parameters | changes))
    train(open_job("Sharp-1", parameters | changes | dict(steps=5)))
    for stage in ("sharp", "plain"):
        assert len(totals_of(run, stage)) == 5 and all(math.isfinite(total) for total in totals_of(run, stage))
    with pytest.raises(ValueError, match="sharpness: it has 2.0, asked for 4.0"):
        open_job("Sharp-1", parameters | changes | dict(sharpness=4.0, steps=5))


def test_a_strangers_job_trains_in_two_processes(stranger, parameters):
    run = from_the_command_line(stranger, parameters, processes=2)
    assert len(totals_of(run, "sharp")) == len(totals_of(run, "plain")) == 3 and run.config()["method"] == "Sharp-1"


def test_a_strangers_job_ends_as_if_undisturbed(installed, parameters, killed_in_its_fourth_step, tmp_path):
    given = parameters | dict(steps=6, checkpoint_seconds=0.0)
    train(open_job("Sharp-1", given))
    killed = given | dict(out=str(tmp_path / "killed"))
    assert killed_in_its_fourth_step(lambda: open_job("Sharp-1", killed)) == [0, 1, 2, 3, 3, 4, 5, *range(6)]
    assert lines_of(killed["out"]) == lines_of(given["out"])


def test_an_older_description_of_a_package_hides_no_method(stranger, tmp_path, monkeypatch):
    "As a vlkd_lab.egg-info of an earlier version does, in a folder that comes first on the path"
    for folder, value in (("old", "nothing = nothing_of_that_name"), ("new", "strangers_lab = strangers_lab:SHARP")):
        about = tmp_path / folder / "twice-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: twice\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[vlkd_lab.twice]\n{value}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "new"))
    monkeypatch.syspath_prepend(str(tmp_path / "old"))
    here = Methods("vlkd_lab.twice")
    with pytest.warns(UserWarning, match="'nothing' .* could not be loaded"):
        assert list(here) == ["Sharp-1"]


def test_a_name_is_taken_once_and_a_loss_means_one_thing():
    here = Methods("vlkd_lab.nothing")
    here.add(Method("One", "", TinyCLIP, open_job))
    assert here.add(Method("One", "again", TinyCLIP, open_job)).citation == "again"
    with pytest.raises(ValueError, match="there is a method 'One' already"):
        here.add(Method("One", "", type(None), open_job))
    with pytest.raises(ValueError, match="there is a loss 'contrastive' already"):
        here.add(Method("Two", "", TinyCLIP, open_job, losses={"contrastive": Term("contrastive", contrastive, formula="another")}))
    with pytest.raises(ValueError, match="there is a loss 'contrastive' already"):
        same = LOSSES["contrastive"].formula
        here.add(Method("Two", "", TinyCLIP, open_job, losses={"contrastive": Term("contrastive", contrastive, formula=same)}))
    with pytest.raises(ValueError, match="has a view Method that draws nothing"):
        Method("Three", "", TinyCLIP, open_job, views=(Method,))
    with pytest.raises(ValueError, match="has a view RunPart that draws nothing"):
        Method("Three", "", TinyCLIP, open_job, views=(RunPart,))
    assert list(here) == ["One"] and len(here) == 1 and "Two" not in here


def test_names_in_run_folders_are_those_of_the_registry():
    assert {"TinyCLIP", "Distil", "ClipCid", "DimeFm", "Dlip", "Contrastive", "BlipTraining"} <= set(METHODS)
    for name, method in METHODS.items():
        assert name_of(method.parameters()) == name and method.citation
    assert set(METHODS["Dlip"].losses) <= set(all_losses())


def test_roles_of_a_folder_from_before_there_were_any(tmp_path):
    run = Run(tmp_path)
    assert [role_of(run, stage) for stage in ("stage-2", "scratch-3", "scratch", "student", "teacher")] == [
        "student", "baseline", "baseline", "student", "teacher"
    ]  # fmt: skip


def test_a_run_from_before_there_were_roles_goes_on(parameters, tmp_path):
    given = parameters | dict(stages=2, inheritance="auto", target_sparsity=0.6)
    run = Run(given["out"])
    train(open_job("TinyCLIP", given))
    config = run.config()
    roles = config.pop("stages")
    (run.folder / "config.json").write_text(json.dumps(config))
    assert roles == stage_roles(run) == {"stage-1": "student", "stage-2": "student", "scratch-2": "baseline"}
    for name in ("init", "student", "done.json"):  # as it is while the second stage learns its gates
        (run.folder / "stage-2" / name).rename(tmp_path / name)
    (run.folder / "scratch-2").rename(tmp_path / "scratch-2")
    left = json.loads((run.folder / "stage-1" / "plan.json").read_text())["towers"]["image"]["neurons"]
    assert list(source_shapes(run, "stage-2")["image"].neurons) == left != list(full_shapes(run)["image"].neurons)
    for name in ("init", "student", "done.json"):
        (tmp_path / name).rename(run.folder / "stage-2" / name)
    (tmp_path / "scratch-2").rename(run.folder / "scratch-2")
    train(open_job("TinyCLIP", given | dict(steps=5)))
    assert run.config()["stages"] == roles and len(totals_of(run, "stage-2")) == 5
