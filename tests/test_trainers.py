import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import open_clip
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from vlkd_lab.features import Batch
from vlkd_lab.gates import sparsity
from vlkd_lab.losses import Objective
from vlkd_lab.models import TowerShape, load_model, tower_shapes
from vlkd_lab.runs import Run, RunStopped, RunWriter, newest_snapshot, watch
from vlkd_lab.trainers import (
    Contrastive,
    Diverged,
    FitParameters,
    Learner,
    Phase,
    TinyCLIP,
    cached_backward,
    check_parameters,
    find_data,
    fit,
    learn_gates,
    manual_shapes,
    notebook_parameters,
    open_contrastive,
    open_tinyclip,
    out_folder,
    plain_backward,
    run_stage,
    stage_gates,
    stage_plan,
    train,
    train_contrastive,
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
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in Run(folder).metrics()]


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
    "gate_kinds": ("hidden,eyes", "attention_block"),
    "losses": ("affinity=1", "affinity_mimicking"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_is_named_with_what_is_valid(name, tiny, tmp_path):
    value, valid = WRONG[name]
    with pytest.raises(ValueError, match=name) as error:
        job_of(tiny, **{name: value})
    assert valid in str(error.value) and not (tmp_path / "run").exists(), "nothing may be written"


def test_missing_data_teacher_and_gpu_stop_before_anything(tiny, tmp_path):
    for name, value in {"data": f"{tmp_path}/no-{{000..002}}.tar", "val": f"{tmp_path}/none.tar", "teacher": "nobody"}.items():
        with pytest.raises((ValueError, FileNotFoundError)):
            job_of(tiny, **{name: value})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            job_of(tiny, device="cuda")
    with pytest.raises(ValueError, match="workers"):
        job_of(tiny, workers=4)
    with pytest.raises(ValueError, match="scenes:N"):
        find_data("scenes:few")
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
    gates = None
    if gated:
        from vlkd_lab.gates import Gates

        gates = Gates(job.shapes, job.costs, start=0.3).double()
    learner = Learner(job.teacher.model.double(), gates, 0.0, 0.9, ramp=0)
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
    if inheritance != "auto":
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{job.run.folder / last / 'student'}")
        image = torch.randn(2, 3, 32, 32)
        assert torch.allclose(model.eval().encode_image(image, normalize=True), student.encode_image(image), atol=1e-6)
    plan = stage_plan(job.run, 1)
    assert (plan is None) == (inheritance == "none") and (stage_gates(job, 1) is None) == (not inheritance.startswith("auto"))
    lines = [m for m in job.run.metrics() if "total" in m]
    line = [m["step"] for m in lines if m["stage"].startswith("stage")]
    assert line == list(range(1, 13)), "one line a step, gates included"
    assert {m["phase"] for m in lines} == {"distil", "contrast"} | ({"gates"} if inheritance.startswith("auto") else set())


def test_the_gate_phase_ends_where_it_should(tiny):
    job = job_of(tiny, steps=40, gate_share=0.9, stages=1, compare_scratch=False)
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


COMMAND = [sys.executable, "-m", "vlkd_lab.trainers"]


def start(tiny, **changes):
    given = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in (tiny | changes).items() if k != "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, tiny["out"], *given], env=environment, stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment_it_ends_as_if_undisturbed(tiny, tmp_path):
    undisturbed, killed = (tiny | dict(out=str(tmp_path / name), checkpoint_seconds=0.0) for name in ("a", "b"))
    process = start(undisturbed)
    assert process.wait(timeout=300) == 0, process.stderr.read()[-2000:]
    random.seed(5)
    deaths = 0
    for lines in (2, 5, 9, 14, 19):  # killed soon after the metrics have this many lines
        process = start(killed)
        while process.poll() is None and len(Run(killed["out"]).metrics()) < lines:
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            deaths += 1
        process.wait()
        assert Run(killed["out"]).status()["state"] in ("lost", "waiting")
    process = start(killed)
    assert process.wait(timeout=300) == 0, process.stderr.read()[-2000:]
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
    job = job_of(tiny, **changes)
    given = dict(learner=Learner(job.teacher.model), objective=Objective({"contrastive": 1.0}), batches=job.batches, options=job.options)
    return job.run, lambda: fit(job.run, Phase("stage-1", "contrast", 6), **given, accelerator=job.accelerator)


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


def test_an_unknown_control_is_refused(tiny, tmp_path):
    run, _ = toy_fit(tmp_path, tiny)
    with pytest.raises(ValueError, match="learning_rate_factor"):
        run.control(learning_rate=3)


def test_divergence_is_loud(tiny):
    job = job_of(tiny, learning_rate=1e30, warmup=0, inheritance="none", clip_norm=1e30, compare_scratch=False)
    with pytest.raises(Diverged, match="learning_rate"):
        train(job)
    status = Run(tiny["out"]).status()
    assert status["state"] == "failed" and "diverged" in status["warnings"][0]
    assert not math.isfinite(float(job.run.metrics()[-1]["total"]))


def test_snapshots_are_taken_only_for_a_watcher(tiny, tmp_path):
    run, go = toy_fit(tmp_path, tiny)
    with run:
        go()
    assert newest_snapshot(run) is None
    run, go = toy_fit(tmp_path, tiny | dict(out=str(tmp_path / "watched")))
    watch(run)
    with run:
        go()
    tensors, labels = newest_snapshot(run)
    assert tensors["student"].shape == (16, 16) and labels["stage"] == "stage-1"


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
    teacher = train_contrastive(open_contrastive(options))
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
