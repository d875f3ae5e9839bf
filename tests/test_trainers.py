import io
import json
import math
import os
import random
import tarfile
import time
import weakref
from dataclasses import replace

import forked
import open_clip
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from vlkd_lab.evaluation import compare, finish, job_models
from vlkd_lab.features import Batch
from vlkd_lab.gates import sparsity
from vlkd_lab.losses import LOSSES, Objective, Term
from vlkd_lab.methods.contrastive import Contrastive, open_contrastive
from vlkd_lab.methods.tinyclip import GatedLearner, Target, TinyCLIP, learn_gates, open_tinyclip, run_stage
from vlkd_lab.models import TowerShape, load_model, tower_shapes
from vlkd_lab.runs import (
    MEASURED,
    Run,
    RunStopped,
    RunWriter,
    kept_snapshots,
    newest_snapshot,
    read_snapshot,
    watch,
)
from vlkd_lab.stages import stage_gates, stage_plan
from vlkd_lab.trainers import (
    Diverged,
    FitParameters,
    Learner,
    Phase,
    StillTraining,
    at_work,
    cached_backward,
    check_parameters,
    current_student,
    find_data,
    find_start,
    fit,
    jobs,
    main,
    make_accelerator,
    manual_shapes,
    notebook_parameters,
    open_job,
    out_folder,
    plain_backward,
    probe_features,
    start,
    train,
)


@pytest.fixture
def tiny(scenes, tiny_teacher, tmp_path):
    "Parameters of a job that takes seconds"
    return dict(
        data=f"{scenes}/train-{{000000..000002}}.tar",
        val=f"{scenes}/val-000000.tar",
        teacher=str(tiny_teacher),
        stages=2,
        target_sparsity=0.5,
        steps=6,
        batch_size=16,
        warmup=2,
        validate_every=3,
        validate_pairs=40,
        device="cpu",
        out=str(tmp_path / "run"),
        learning_rate=1e-3,
    )


def job_of(tiny, **changes):
    return open_tinyclip(check_parameters(TinyCLIP, tiny | changes))


def lines_of(folder):
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in Run(folder).metrics()]


def weights_of(folder):
    return {p.relative_to(folder): load_file(p) for p in sorted(folder.glob("*/student/*.safetensors"))}


WRONG = {
    "stagez": (3, "did you mean 'stages'"),
    "stages": (0, "from 1 to 20"),
    "steps": ("many", "must be int"),
    "target_sparsity": (1.5, "from 0 to 0.97"),
    "inheritance": ("automatic", "'auto_uniform'"),
    "precision": ("int8", "'bf16'"),
    "device": ("tpu", "'cuda'"),
    "compare_scratch": (1, "must be bool"),
    "learning_rate": (-1.0, "above 0"),
    "batch_size": (True, "must be int"),
    "shuffle": (2**63, "must be int of 64 bits, at least 1"),
    "cache_gb": (1e300, "must be a finite float of 32 bits"),
    "cache_dir": ("s3://bucket/cache", "a folder of this machine"),
    "features": (f"{__file__}/store", "a folder of this machine"),
    "gate_kinds": ("hidden,eyes", "attention_block"),
    "gate_towers": ("image,sound", "image, text, or both"),
    "losses": ("affinity=1", "affinity_mimicking"),
}


WEIGHTS = ["contrastive=nan", "contrastive=inf", "contrastive=-1", "contrastive=1, contrastive=2", "contrastive=0", ""]


@pytest.mark.parametrize("losses", WEIGHTS, ids=lambda losses: losses or "none")
def test_weights_that_make_no_sense_leave_no_folder_behind(losses, tiny, tmp_path):
    with pytest.raises(ValueError, match="losses=.* is not valid"):
        job_of(tiny, losses=losses)
    assert not (tmp_path / "run").exists(), "a folder would stand in the way of the corrected command"


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "clip_norm"])
def test_no_number_is_infinite(name, tiny, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be a finite float"):
        job_of(tiny, **{name: math.inf})
    assert not (tmp_path / "run").exists()


FORGOTTEN = {
    "folder": (["method=TinyCLIP", "steps=3"], "no run folder"),
    "option": (["--steps", "3"], "no run folder"),
    "parameter first": (["steps=3"], "no run folder"),
    "equals sign": (["run", "steps", "3"], "'steps' is not valid: write NAME=VALUE"),
    "name": (["run", "=3"], "'=3' is not valid"),
}


@pytest.mark.parametrize("case", FORGOTTEN)
def test_a_command_that_forgets_something_starts_nothing(case, tmp_path, monkeypatch):
    words, message = FORGOTTEN[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["teacher", "lr=0.1"])
def test_a_run_folder_may_be_called_as_one_likes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="steps must be int"):  # and so the folder's name was taken
        main([folder, "steps=many"])


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["run", "--help"]], ids=" ".join)
def test_who_asks_for_help_gets_a_line_and_no_training(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(words)
    assert capsys.readouterr().out.strip() == main.__doc__ and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_is_named_with_what_is_valid(name, tiny, tmp_path):
    value, valid = WRONG[name]
    with pytest.raises(ValueError, match=name) as error:
        job_of(tiny, **{name: value})
    assert valid in str(error.value) and not (tmp_path / "run").exists(), "nothing may be written"


@pytest.mark.parametrize("place", ["s3://bucket/run", __file__, f"{__file__}/run"], ids=["url", "file", "below a file"])
def test_what_cannot_be_a_run_folder_is_said(place, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="out=.* is not valid: out must be str, a folder of this machine"):
        open_job("TinyCLIP", tiny | dict(out=place))
    with pytest.raises(ValueError, match="is no run folder" if "://" in place else "out=.* is not valid"):
        main([place, "method=TinyCLIP"])
    assert not list(tmp_path.iterdir())


def test_a_home_folder_is_the_users_and_a_file_of_weights_is_a_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert out_folder(TinyCLIP(out="~/run")) == tmp_path / "run"
    weights = find_start(TinyCLIP(start_from=tiny["teacher"])).model.state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError) as error:
        find_start(TinyCLIP(start_from=str(tmp_path / "weights.pt")))
    assert "Not a directory" not in str(error.value)


@pytest.mark.parametrize("gpus", [1, 4])
def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    class NextStep(Exception):
        "The accelerator is made"

    def reached(*_, **__):
        raise NextStep

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(jobs, "Accelerator", reached)
    message = "processes=4 is not valid here: each takes a GPU of its own, and this machine has 1;"
    with pytest.raises(ValueError if gpus == 1 else NextStep, match=message if gpus == 1 else None):
        make_accelerator(TinyCLIP(processes=4))
    with pytest.raises(NextStep):
        make_accelerator(TinyCLIP(processes=4, device="cpu"))


def test_missing_data_teacher_and_gpu_stop_before_anything(tiny, tmp_path):
    for name, value in {"data": f"{tmp_path}/no-{{000..002}}.tar", "val": f"{tmp_path}/none.tar", "teacher": "nobody"}.items():
        with pytest.raises((ValueError, FileNotFoundError)):
            job_of(tiny, **{name: value})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            job_of(tiny, device="cuda")
    with pytest.raises(ValueError, match="workers"):
        job_of(tiny, workers=4)
    for wrong in ("scenes:few", "scenes:9,copies:1", "scenes:9,tail:-1", "scenes:9,rain:0.1"):
        with pytest.raises(ValueError, match="scenes:N"):
            find_data(wrong)
    assert not (tmp_path / "run").exists()


def test_notebook_parameters_pass_over_what_is_no_literal():
    given = {"stages": 2, "In": [""], "Out": {}, "_i": "x", "os": os, "fit": fit}
    assert notebook_parameters(TinyCLIP, given) == TinyCLIP(stages=2)
    assert check_parameters(TinyCLIP, {"compare_scratch": "false"}).compare_scratch is False
    assert out_folder(TinyCLIP(stages=2)) != out_folder(TinyCLIP())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("micro", [1, 5, 7, 12])
def test_gradient_caching_gives_the_whole_batchs_gradient(tiny, gated, micro):
    job = job_of(tiny)
    learner = Learner(job.teacher.model.double())
    if gated:
        from vlkd_lab.gates import Gates

        learner = GatedLearner(learner.model, Gates(job.shapes, job.costs, start=0.3).double(), Target(end=0.9))
    batch, accelerator = next(job.batches(0)), Accelerator(cpu=True)
    batch = Batch(batch.image[:12].double(), batch.text[:12])
    found = []
    for backward in (plain_backward, lambda *a, **k: cached_backward(*a, **k, micro_batch=micro)):
        learner.zero_grad()
        value = backward(
            learner,
            batch,
            lambda f: Objective({"contrastive": 1.0})(f, f.detach()).total,
            accelerator,
            draw=4 if gated else None,
            penalty=learner.penalty(0),
        )
        found.append((value, [p.grad.clone() for p in learner.parameters() if p.grad is not None]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6) and len(found[0][1]) == len(found[1][1])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).norm() <= 2e-5 * max(a.norm(), 1e-6)


@pytest.mark.parametrize("inheritance", ["auto", "auto_uniform", "manual", "none"])
def test_every_inheritance_reaches_its_target_and_opens_elsewhere(tiny, inheritance):
    job = job_of(tiny, inheritance=inheritance)
    train(job)
    last = "stage-1" if inheritance == "none" else "stage-2"
    student = load_model(job.run.folder / last / "student", "cpu")
    shapes = tower_shapes(student.model.state_dict(), {t: s.head_width for t, s in job.shapes.items()})
    removed = sparsity(shapes, job.costs)
    assert 0.5 - 1e-9 <= removed < 0.75 if inheritance.startswith("auto") else 0.3 < removed < 0.75
    scratch = load_model(job.run.folder / last.replace("stage", "scratch") / "student", "cpu")
    assert {k: v.shape for k, v in scratch.model.state_dict().items()} == {k: v.shape for k, v in student.model.state_dict().items()}
    steps = {stage: sum(line["stage"] == stage for line in job.run.metrics() if "total" in line) for stage, _ in job.plan}
    assert steps[last.replace("stage", "scratch")] == sum(steps.values()) / 2, "the baseline takes the steps of all stages"
    if inheritance != "auto":
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{job.run.folder / last / 'student'}")
        image = torch.randn(2, 3, 32, 32)
        assert torch.allclose(model.eval().encode_image(image, normalize=True), student.encode_image(image), atol=1e-6)
    plan = stage_plan(job.run, 1)
    assert (plan is None) == (inheritance == "none") and (stage_gates(job.run, 1) is None) == (not inheritance.startswith("auto"))
    lines = [m for m in job.run.metrics() if "total" in m]
    line = [m["step"] for m in lines if m["stage"].startswith("stage")]
    assert line == list(range(1, 13)), "one line a step, gates included"
    assert {m["phase"] for m in lines} == {"distil", "contrast"} | ({"gates"} if inheritance.startswith("auto") else set())


def test_the_gate_phase_ends_where_it_should(tiny):
    job = job_of(tiny, steps=44, gate_share=0.9, stages=1, compare_scratch=False)
    with job.run:
        weights, plan, shapes = learn_gates(job, 1, load_model(tiny["teacher"], "cpu"))
    gate_lines = [m for m in job.run.metrics() if "expected_sparsity" in m]
    assert gate_lines[0]["expected_sparsity"] < 0.1 < gate_lines[-1]["expected_sparsity"]
    assert gate_lines[-1]["target_sparsity"] == 0.5
    assert sparsity(shapes, job.costs) >= 0.5 and weights["visual.conv1.weight"].shape[0] == shapes["image"].width
    assert plan is not None and job.teacher.model.visual.conv1.weight.shape[0] == 32, "the teacher is not touched"


def test_a_named_student_is_inherited_by_hand(tiny):
    config = json.loads((load_model(tiny["teacher"], "cpu").config["model_cfg"]).__repr__().replace("'", '"'))
    config["vision_cfg"] |= dict(layers=1, width=24)
    config["text_cfg"] |= dict(layers=1)
    path = os.path.join(os.path.dirname(tiny["out"]), "student.json")
    with open(path, "w") as file:
        json.dump(config, file)
    job = job_of(tiny, inheritance="manual", student=path, compare_scratch=False)
    with job.run:
        student = run_stage(job, 1)
    assert student.model.visual.conv1.weight.shape[0] == 24 and len(student.model.transformer.resblocks) == 1
    assert max(m["step"] for m in job.run.metrics()) == 12, "one stage takes the steps of both"


def test_a_student_of_another_width_needs_another_objective(tiny, tmp_path):
    config = load_model(tiny["teacher"], "cpu").config["model_cfg"] | dict(embed_dim=8)
    (tmp_path / "narrow.json").write_text(json.dumps(config))
    named = dict(inheritance="manual", student=str(tmp_path / "narrow.json"))
    with pytest.raises(ValueError, match="feature_mimicking needs equal joint widths, student 8, teacher 16"):
        job_of(tiny, **named)
    assert job_of(tiny, **named, losses="affinity_mimicking=1").options.student


def start_process(tiny):
    words = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in tiny.items() if k != "out"]
    return forked.start("-m", "vlkd_lab.trainers", tiny["out"], *words)


def ended_well(process):
    process.join(600)
    return process.exitcode == 0


def test_killed_at_any_moment_it_ends_as_if_undisturbed(tiny, tmp_path):
    undisturbed, killed = (tiny | dict(out=str(tmp_path / name), checkpoint_seconds=0.0) for name in ("a", "b"))
    assert ended_well(start_process(undisturbed))
    random.seed(5)
    deaths = 0
    for lines in (2, 5, 9, 14, 19):  # killed soon after the metrics have this many lines
        process = start_process(killed)
        while process.is_alive() and len(Run(killed["out"]).metrics()) < lines:
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        if process.is_alive():
            process.kill()
            deaths += 1
        process.join()
        assert Run(killed["out"]).status()["state"] in ("lost", "waiting")
    assert ended_well(start_process(killed))
    assert deaths >= 3 and lines_of(killed["out"]) == lines_of(undisturbed["out"])
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert len(a) == 3 and a.keys() == b.keys()
    for path in a:
        assert all(torch.equal(a[path][k], b[path][k]) for k in a[path]), path


def test_two_processes_train_one_run(tiny):
    job = job_of(tiny, processes=2, stages=1)
    train(job)
    assert [m["step"] for m in job.run.metrics() if "total" in m and m["stage"] == "stage-1"] == list(range(1, 7))
    student = load_model(job.run.folder / "stage-1" / "student", "cpu")
    assert sparsity(tower_shapes(student.model.state_dict(), {t: s.head_width for t, s in job.shapes.items()}), job.costs) >= 0.5
    with pytest.raises(ValueError, match="multiple"):
        job_of(tiny, processes=2, batch_size=17)


def test_another_run_is_not_overwritten(tiny):
    job_of(tiny)
    job_of(tiny)
    with pytest.raises(ValueError, match=r"parameters.seed: it has 0, asked for 1"):
        job_of(tiny, seed=1)


def toy_fit(tmp_path, tiny, **changes):
    "A short contrastive fit and its run"
    job = job_of(tiny, keep_snapshots=0, **changes)
    given = dict(learner=Learner(job.teacher.model), objective=Objective({"contrastive": 1.0}), batches=job.batches, options=job.options)
    return job.run, lambda: fit(job.run, Phase("stage-1", "contrast", 6), **given, accelerator=job.accelerator, probe=job.probe)


def test_stop_keeps_what_was_done(tiny, tmp_path):
    run, go = toy_fit(tmp_path, tiny)
    run.control(stop=True)
    with pytest.raises(RunStopped), run:
        go()
    assert run.status()["state"] == "stopped" and (run.folder / "stage-1/contrast/checkpoint.pt").exists()
    run.control(stop=False)
    with run:
        go()
    assert [m["step"] for m in run.metrics()] == list(range(1, 7))


def test_values_change_in_mid_run_and_leave_an_event(tiny, tmp_path):
    run, go = toy_fit(tmp_path, tiny)
    run.control(learning_rate_factor=0.0, weights={"contrastive": 2.0})
    with run:
        go()
    events = [m for m in run.metrics() if m.get("event") == "control"]
    steps = [m for m in run.metrics() if "total" in m]
    assert len(events) == 1 and events[0]["weights"] == {"contrastive": 2.0}
    assert all(m["learning_rate"] == 0 and m["total"] == pytest.approx(2 * m["contrastive"], rel=1e-5) for m in steps)


def controls_of(run):
    return [{k: v for k, v in m.items() if k not in ("event", "stage", "phase")} for m in run.metrics() if m.get("event") == "control"]


def test_what_would_break_the_next_step_is_refused_and_training_goes_on(tiny, tmp_path):
    run, go = toy_fit(tmp_path, tiny)
    run.control(weights={"contrastive": 0.0}, learning_rate_factor=0.5)
    with run:
        go()
    assert "every weight is zero" in run.status()["refused"] and controls_of(run) == []
    assert len([m for m in run.metrics() if "total" in m]) == 6


def test_nonsense_written_into_the_control_file_stops_nothing(tiny, tmp_path):
    run, go = toy_fit(tmp_path, tiny)
    run.folder.mkdir(exist_ok=True)
    (run.folder / "control.json").write_text('{"learning_rate_factor": "fast"}')
    with run:
        go()
    assert "learning_rate_factor" in run.status()["refused"] and len([m for m in run.metrics() if "total" in m]) == 6


def test_a_run_with_changes_resumes_with_them(tiny, tmp_path):
    job = job_of(tiny, stages=1, checkpoint_seconds=0.0)
    job.run.control(learning_rate_factor=0.5, weights={"contrastive": 0.25})
    fits = []

    def stop_in_the_middle(step):
        for k, batch in enumerate(job.stream.batches(step), start=step):
            fits.append(k)
            if len(fits) == 4:
                job.run.control(stop=True)
            yield batch

    stopping = replace(job)
    stopping.batches = stop_in_the_middle
    with pytest.raises(RunStopped):
        train(stopping)
    before = len(job.run.metrics())
    (job.run.folder / "control.json").unlink()
    train(job_of(tiny, stages=1, checkpoint_seconds=0.0))
    lines = job.run.metrics()
    changed = {"step": 0, "learning_rate_factor": 0.5, "weights": {"contrastive": 0.25}}
    assert controls_of(job.run) == [changed], "one event, not one a phase"
    own = [m for m in lines if "total" in m and m["stage"] == "stage-1"]
    assert len(own) == 6 and before < len(lines) and all("contrastive" in m for m in own)
    phase = Phase("stage-1", "gates", 2, 0, 6)
    assert own[0]["learning_rate"] == pytest.approx(0.5 * job.options.learning_rate * phase.learning_rate_factor(0, 2))
    assert own[5]["learning_rate"] == pytest.approx(0.5 * job.options.learning_rate * phase.learning_rate_factor(5, 2))
    scratch = [m for m in lines if "total" in m and m["stage"] == "scratch-1"]
    assert scratch and all(m["total"] == pytest.approx(m["contrastive"]) for m in scratch), "the baseline is not changed"


def test_the_target_can_change_in_mid_run(tiny):
    job = job_of(tiny, target_sparsity=0.6)
    job.run.control(target_sparsity=0.3)
    train(job)
    reached = [json.loads((job.run.folder / f"stage-{k}" / "plan.json").read_text())["sparsity"] for k in (1, 2)]
    assert 0.15 <= reached[0] < 0.25 and 0.3 <= reached[1] < 0.4
    for stage, share in (("stage-1", 0.15), ("stage-2", 0.3)):
        asked = [m["target_sparsity"] for m in job.run.metrics() if m["stage"] == stage and "target_sparsity" in m and "event" not in m]
        assert max(asked) == pytest.approx(share)
    assert controls_of(job.run) == [{"step": 0, "target_sparsity": 0.3}]


def test_pausing_holds_and_says_so(tiny):
    training = start(job_of(tiny, steps=300, stages=1, compare_scratch=False), beside=True)
    run = training.job.run
    assert current_student(run).model.logit_scale.isfinite(), "the next cell finds a student"
    wait_for(lambda: len(run.metrics()) > 5)
    run.control(pause=True)
    wait_for(lambda: run.status()["state"] == "paused")
    count = len(run.metrics())
    time.sleep(0.3)
    assert len(run.metrics()) == count and start(training.job) is training, "a job at work is not started twice"
    with pytest.raises(StillTraining, match="paused"):
        training.done()
    student = current_student(run)
    assert student.model.logit_scale.isfinite() and run.status()["state"] == "paused"
    run.control(pause=False)
    wait_for(lambda: len(run.metrics()) > count)
    assert run.status()["state"] == "running"
    run.control(stop=True)
    assert training.join() == "stopped"


def test_nothing_prints_from_a_thread(tiny, capfd):
    job = job_of(tiny, stages=1)
    capfd.readouterr()
    assert start(job, beside=True).join() == "waiting"
    assert capfd.readouterr() == ("", "")


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_student_can_be_had_at_any_time(tiny):
    job = job_of(tiny, stages=1, checkpoint_seconds=0.0, steps=8, gate_share=0.5, gate_learning_rate=3.0)
    with pytest.raises(FileNotFoundError, match="not begun"):
        current_student(job.run)
    seen = {}

    def looking(step):
        for k, batch in enumerate(job.stream.batches(step), start=step):
            if k in (2, 6):
                seen[k] = load_now(job.run)
            yield batch

    looking_job = replace(job)
    looking_job.batches = looking
    train(looking_job)
    images = [sum(p.numel() for p in vlm.model.parameters()) for vlm in (seen[2], seen[6], current_student(job.run))]
    whole = sum(p.numel() for p in job.teacher.model.parameters())
    assert images[1] < whole and images[2] == images[1], "cut, and then of the same size to the end"
    assert images[0] < whole, "what is left while gates are learned is what they would leave now"
    for given, stage in (({}, "stage-1"), (dict(stage="scratch-1"), "scratch-1")):
        finished = load_model(job.run.folder / stage / "student", "cpu").model.state_dict()
        assert all(torch.equal(finished[k], v) for k, v in current_student(job.run, **given).model.state_dict().items()), stage


def load_now(run):
    "The student as of the last checkpoint, without asking the running job (this thread is the job)"
    from unittest import mock

    with mock.patch("vlkd_lab.trainers.students._request_checkpoint"):
        return current_student(Run(run.folder))


def test_watching_changes_nothing_that_is_trained(tiny, tmp_path):
    def weights(out, **more):
        job = job_of(tiny | dict(out=str(tmp_path / out)) | more, stages=1, compare_scratch=False)
        if out == "watched":
            job.run.control(gradient_share=True)
            watch(job.run)
        train(job)
        return load_file(job.run.folder / "stage-1" / "student" / "vlkd_lab_model.safetensors")

    alone, watched = weights("alone", keep_snapshots=0), weights("watched")
    assert all(torch.equal(alone[k], watched[k]) for k in alone)
    assert any(m.get("event") == "gradient_share" for m in Run(tmp_path / "watched").metrics())
    assert kept_snapshots(Run(tmp_path / "alone")) == [] and len(kept_snapshots(Run(tmp_path / "watched"))) > 4


def test_the_probe_lies_in_the_folder(tiny):
    job = job_of(tiny, stages=1, compare_scratch=False, probe_pairs=10)
    train(job)
    probe = json.loads((job.run.folder / "probe.json").read_text())
    assert len(probe["captions"]) == 10 and probe["labels"] == sorted(probe["labels"])
    assert probe["pictures"][0].startswith("data:image/jpeg")
    arrays, _ = read_snapshot(job.run.folder / "probe.safetensors")
    newest = newest_snapshot(job.run)[0]
    assert arrays["teacher"].shape == newest["student"].shape == (10, 10)
    learner = Learner(load_model(job.run.folder / "stage-1" / "student", "cpu").model.train())
    seen = probe_features(learner, job.probe)
    assert learner.model.training, "a look leaves no trace"
    assert torch.allclose(torch.tensor(newest["student"]).float(), seen.image @ seen.text.T, atol=2e-3)


def test_a_failed_training_lets_go_of_its_tensors(tiny):
    held = []

    def one_step():
        tensor = torch.zeros(1000, 1000)
        held.append(weakref.ref(tensor))
        raise ArithmeticError("too <b>large</b>")

    def fail(job):
        with at_work(job):
            one_step()

    training = start(job_of(tiny), fail, beside=True)
    with pytest.raises(RuntimeError, match="too <b>large</b>"):
        training.join()
    status = training.job.run.status()
    assert held[0]() is None and status["state"] == "failed" and "ArithmeticError" in status["traceback"] and status["freed_bytes"] >= 0
    with pytest.raises(ArithmeticError) as kept:  # as a notebook keeps the last exception
        start(job_of(tiny), fail, beside=False)
    assert kept.tb is not None and held[1]() is None


def test_a_stopped_job_can_be_evaluated(tiny):
    job = job_of(tiny, stages=2, steps=80, compare_scratch=False)
    training = start(job, beside=True)
    wait_for(lambda: any(m["stage"] == "stage-1" and m.get("phase") == "distil" and "total" in m for m in job.run.metrics()))
    job.run.control(stop=True)
    assert training.join() == "stopped"
    models = job_models(job)
    assert list(models) == ["teacher", "stage-1"]
    table = compare(job)
    result = finish(job, table)
    assert "stopped before its end" in result["warnings"][-1] and job.run.result() is None and table.loc["stage-1", "steps"] > 20
    assert start(job, beside=True).join() == "waiting", "started again, it goes on to its end"
    assert list(job_models(job)) == ["teacher", "stage-1", "stage-2"]
    finish(job, compare(job))
    assert job.run.status()["state"] == "finished"


def test_an_unknown_control_is_refused(tiny, tmp_path):
    run, _ = toy_fit(tmp_path, tiny)
    with pytest.raises(ValueError, match="learning_rate_factor"):
        run.control(learning_rate=3)


def test_divergence_is_loud(tiny):
    job = job_of(tiny, learning_rate=1e9, warmup=0, inheritance="none", clip_norm=1e30, compare_scratch=False)
    with pytest.raises(Diverged, match="learning_rate"):
        train(job)
    status = Run(tiny["out"]).status()
    assert status["state"] == "failed" and any("diverged" in warning for warning in status["warnings"])
    assert not math.isfinite(float(job.run.metrics()[-1]["total"]))


def test_a_term_that_is_not_finite_is_named(tiny, monkeypatch):
    monkeypatch.setitem(LOSSES, "lost", Term("lost", lambda student, teacher: student.image.sum() * math.nan, formula="nan"))
    with pytest.raises(Diverged, match="not finite: lost; try a smaller learning_rate"):
        train(job_of(tiny, losses="contrastive:1, lost:0.5", inheritance="none", compare_scratch=False))


def test_terms_that_need_clusters_are_neither_taken_nor_offered(tiny):
    with pytest.raises(ValueError, match="has no loss 'cluster_classification' for two towers; there are affinity_mimicking, "):
        job_of(tiny, losses="cluster_classification:1")
    assert {"relational"} < set(job_of(tiny).run.config()["terms"]) and "cluster_distribution" not in job_of(tiny).run.config()["terms"]


def test_snapshots_are_taken_only_for_a_watcher(tiny, tmp_path):
    run, go = toy_fit(tmp_path, tiny)
    with run:
        go()
    assert newest_snapshot(run) is None
    run, go = toy_fit(tmp_path, tiny | dict(out=str(tmp_path / "watched")))
    watch(run)
    with run:
        go()
    arrays, labels = newest_snapshot(run)
    assert arrays["student"].shape == (40, 40) and labels["stage"] == "stage-1"


def damage(source, target, every):
    "A copy of a shard in which every so-many-th image is cut short"
    with tarfile.open(target, "w") as out, tarfile.open(source) as good:
        for member in good.getmembers():
            content = good.extractfile(member).read()
            if member.name.endswith(".jpg") and int(member.name[:8]) % every == 3:
                content = content[:60]
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


def test_bad_samples_are_named_in_the_run(tiny, tmp_path, scenes):
    damage(scenes / "train-000000.tar", tmp_path / "bad-000000.tar", every=100)
    job = job_of(tiny, data=str(tmp_path / "bad-000000.tar"), max_bad_share=0.5, stages=1, compare_scratch=False)
    train(job)
    named = [json.loads(line) for line in (job.run.folder / "bad_samples.jsonl").read_text().splitlines()]
    assert len(named) == 1 and "00000003" in named[0]["sample"] and named[0]["reason"]


def test_too_many_bad_samples_fail_the_run(tiny, tmp_path, scenes):
    damage(scenes / "train-000000.tar", tmp_path / "bad-000000.tar", every=5)
    job = job_of(tiny, data=str(tmp_path / "bad-000000.tar"), steps=20, stages=1, compare_scratch=False)
    with pytest.raises(ValueError, match=r"samples are bad.*more than the 5.0% allowed"):
        train(job)
    assert Run(tiny["out"]).status()["state"] == "failed" and (job.run.folder / "bad_samples.jsonl").exists()


def test_a_teacher_is_trained_from_nothing(tiny, tmp_path):
    given = {k: tiny[k] for k in ("data", "val", "steps", "batch_size", "device", "validate_every", "validate_pairs")}
    options = check_parameters(Contrastive, given | dict(out=str(tmp_path / "t"), image_size=32, vocabulary=300, context_length=16))
    job = open_contrastive(options)
    train(job)
    teacher = load_model(job.run.folder / "teacher" / "student")
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 't/teacher/student'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 't/teacher/student'}")(["a red star"])
    assert torch.allclose(
        again.eval().encode_text(tokens, normalize=True), teacher.encode_text(teacher.tokenizer(["a red star"])), atol=1e-6
    )
    assert check_parameters(FitParameters, {}).steps == FitParameters().steps


def test_manual_shapes_never_grow():
    full = {"image": TowerShape(64, 8, (8,) * 4, (256,) * 4), "text": TowerShape(32, 8, (4,) * 3, (128,) * 3)}
    source = full
    for target in (0.25, 0.5, 0.75, 0.9):
        smaller = manual_shapes(source, full, target)
        assert all(smaller[t].width <= source[t].width and smaller[t].layers <= source[t].layers for t in full)
        source = smaller


def test_a_run_folder_may_be_watched_by_a_second_reader(tiny):
    job = job_of(tiny)
    with RunWriter(job.run.folder):
        assert Run(job.run.folder).status()["state"] == "running"


def test_tinyclip_can_learn_from_stored_features(tiny, tmp_path):
    lines = []
    for how in ("online", "stored"):
        given = dict(teacher_features=how, features=str(tmp_path / "store"), out=str(tmp_path / how), inheritance="manual", stages=1)
        train(job_of(tiny, compare_scratch=False, learning_rate=1e-4, **given))
        lines.append([line["total"] for line in lines_of(tmp_path / how) if "total" in line])
    assert len(lines[0]) == 6 and lines[0] == pytest.approx(lines[1], rel=5e-3)
    assert (tmp_path / "store" / "store.json").exists()
    with pytest.raises(ValueError, match="teacher_features='online'"):
        job_of(tiny, teacher_features="stored", crop_scale=0.5, out=str(tmp_path / "cropped"))


def test_a_layer_without_heads_is_no_part_of_a_plain_network():
    shape = TowerShape(32, 8, (4, 0), (64, 64))
    with pytest.raises(ValueError, match="a layer of the image tower has no heads"):
        manual_shapes({"image": shape}, {"image": TowerShape(32, 8, (4, 4), (64, 64))}, 0.5)
