"""Every method with every setting that crosses methods: readers, precision, processes, locked towers, what is trained, what goes on."""

import gc
import json
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, lines_of
from safetensors.torch import load_file

from vlkd_lab import trainers
from vlkd_lab.features import Batch
from vlkd_lab.losses import Objective
from vlkd_lab.models import new_model
from vlkd_lab.runs import Run
from vlkd_lab.samples import write_shards
from vlkd_lab.trainers import Fit, Learner, Phase, open_job, take_step, train

METHODS = ["TinyCLIP", "ClipCid", "DimeFm", "Dlip", "Contrastive", "BlipTraining"]
STUDENT = {"TinyCLIP": "stage-1", "Contrastive": "teacher", "BlipTraining": "teacher"}  # the others: student


@pytest.fixture
def parameters(scenes, tiny_teacher, tiny_blip, tmp_path):
    "Of a job of any method that takes a second, in a folder of its own"

    def of(method, out="run", **changes):
        common = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", device="cpu")
        common |= dict(steps=3, batch_size=8, warmup=1, validate_every=3, validate_pairs=16, probe_pairs=4, out=str(tmp_path / out))
        towers = dict(teacher=str(tiny_teacher), compare_scratch=False)
        blip = dict(image_size=32, sizes="image:1x32, text:1x32, fusion:1, decoder:1", head_width=16, joint_width=8)
        own = {
            "TinyCLIP": dict(towers, stages=1, inheritance="manual"),
            "ClipCid": dict(towers, clusters=4, removed_share=0.3, map_images=8),
            "DimeFm": dict(towers, sentences=common["data"], sentence_batch=12),
            "Dlip": dict(teacher=str(tiny_blip), student="image:1x16, text:1x16", compare_scratch=False, queue=16),
            "Contrastive": dict(image_size=32, vocabulary=300, context_length=24),
            "BlipTraining": dict(blip, context_length=24, queue=16),
        }
        return common | own[method] | changes

    return of


def run_of(method, given):
    train(open_job(method, given))
    return Run(given["out"])


def student_of(method, given):
    "Weights of the student that a run left"
    folder = Path(given["out"]) / STUDENT.get(method, "student") / "student"
    return load_file(next(folder.glob("*model.safetensors")))


def numbers_of(folder):
    "Every number of a run's metrics, line by line"
    return [{name: value for name, value in line.items() if isinstance(value, float)} for line in lines_of(folder)]


@pytest.mark.parametrize("method", METHODS)
def test_one_reader_process_gives_what_none_gives_and_three_give_a_run(method, parameters):
    for workers in (0, 1, 3):
        run_of(method, parameters(method, f"of-{workers}", workers=workers))
    none, one, three = (lines_of(parameters(method, f"of-{workers}")["out"]) for workers in (0, 1, 3))
    assert one == none, "one reader reads in the same order wherever it runs"
    steps = [line["step"] for line in three if "total" in line]
    assert steps == [1, 2, 3] and three != none


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_trains_and_is_not_single_precision(method, precision, parameters):
    for kind in ("fp32", precision):
        run_of(method, parameters(method, kind, precision=kind))
    single, half = (numbers_of(parameters(method, kind)["out"]) for kind in ("fp32", precision))
    assert single != half, "a precision that changes no digit was not used"
    first = [next(line["total"] for line in lines if "total" in line) for lines in (single, half)]
    assert first[1] == pytest.approx(first[0], rel=0.05)
    assert all(value.dtype != torch.float16 and value.isfinite().all() for value in student_of(method, parameters(method, precision)).values())


TWO = """
import json, sys
from vlkd_lab.trainers import open_job, train
for method, given in json.loads(sys.argv[1]):
    train(open_job(method, given))
"""


def in_processes(count, jobs, folder):
    "Train jobs one after the other in one process, or in several"
    (folder / "jobs.py").write_text(TWO)
    forked.run(str(folder / "jobs.py"), json.dumps(jobs), processes=count)


def whole_batches(folder, parameters, method, out, **changes):
    "Parameters of a job whose every step sees all of its data, so that how they are split can change nothing"
    data = folder / "whole"
    if not data.exists():
        write_shards(data, 32, 3, split="train", per_shard=16, size=32)
        (folder / "said.txt").write_text("".join(f"sentence {k} about a {'red' if k % 2 else 'blue'} star\n" for k in range(32)))
    given = dict(data=f"{data}/train-{{000000..000001}}.tar", batch_size=32, **changes)
    more = {"ClipCid": dict(removed_share=0.0), "DimeFm": dict(sentences=str(folder / "said.txt"), sentence_batch=32)}
    return parameters(method, out, **given | more.get(method, {}))


@pytest.fixture
def sigmoid_student(tiny_teacher, tmp_path):
    "A configuration with a bias of the logits, as SigLIP's has, which no loss of ours uses"
    config = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "sigmoid.json").write_text(json.dumps(config | dict(init_logit_bias=-10.0)))
    return str(tmp_path / "sigmoid.json")


def test_two_processes_give_what_one_gives(parameters, sigmoid_student, tmp_path):
    kinds = {
        "auto": ("TinyCLIP", dict(inheritance="auto", target_sparsity=0.4, losses="contrastive=1")),
        "cached": ("TinyCLIP", dict(micro_batch=4, losses="affinity_mimicking=1, contrastive=0.5")),
        "rows": ("TinyCLIP", dict(losses="feature_mimicking=1")),
        "bias": ("TinyCLIP", dict(inheritance="none", student=sigmoid_student)),
        "clusters": ("ClipCid", {}),
        "unpaired": ("DimeFm", {}),
        "towers": ("DimeFm", dict(text_tower="student")),
        "contrast": ("Contrastive", dict(learning_rate=1e-3)),
    }
    for count in (1, 2):
        jobs = [
            (method, whole_batches(tmp_path, parameters, method, f"{name}-{count}", **changes)) for name, (method, changes) in kinds.items()
        ]
        in_processes(count, jobs, tmp_path)
    for name in kinds:
        one, two = (numbers_of(tmp_path / f"{name}-{count}") for count in (1, 2))
        assert len(one) == len(two) > 3
        for alone, together in zip(one, two, strict=True):
            assert together == pytest.approx(alone, rel=2e-3, abs=2e-4), name


def reached_names(options, weights):
    "Which weights of a student with a bias are trained by some terms, and which changed in a step"
    student, teacher = (new_model(TINY | dict(init_logit_bias=-10.0), seed=seed) for seed in (1, 2))
    before = {name: weight.clone() for name, weight in student.model.named_parameters()}
    accelerator = Accelerator(cpu=True)
    fit = Fit(Run("nowhere"), Phase("stage-1", "distil", 3), Learner(student.model), Objective(weights), options, accelerator, teacher)
    batch = Batch(torch.randn(6, 3, 32, 32), student.tokenizer([f"text {k}" for k in range(6)]))
    take_step(fit, batch)
    accelerator.free_memory()
    changed = {name for name, weight in student.model.named_parameters() if not torch.equal(weight, before[name])}
    return {name for name, weight in student.model.named_parameters() if weight.requires_grad}, changed


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_what_the_loss_does_not_reach_is_left_as_it_is(micro_batch):
    options = trainers.Contrastive(warmup=0, micro_batch=micro_batch, learning_rate=1e-2)
    object.__setattr__(options, "held", lambda scale: None)
    trained, changed = reached_names(options, {"affinity_mimicking": 1.0})
    assert "logit_bias" not in trained | changed and "logit_scale" in trained & changed
    assert any(name.startswith("visual.") for name in changed) and "text_projection" in changed
    trained, changed = reached_names(options, {"unimodal_distance": 1.0})
    assert trained >= changed and all(name.startswith("visual.") for name in trained), "images alone are compared: not a text weight decays"


def test_a_term_that_joins_in_mid_run_trains_what_it_reaches():
    student, teacher = (new_model(TINY, seed=seed) for seed in (1, 2))
    options = trainers.TinyCLIP(warmup=0, hold_scale=20.0)
    objective = Objective({"unimodal_distance": 1.0, "affinity_mimicking": 0.0})
    fit = Fit(Run("nowhere"), Phase("stage-1", "distil", 3), Learner(student.model), objective, options, Accelerator(cpu=True), teacher)
    batch = Batch(torch.randn(6, 3, 32, 32), student.tokenizer([f"text {k}" for k in range(6)]))
    take_step(fit, batch)
    before = student.model.text_projection.clone()
    take_step(fit, batch)
    assert torch.equal(student.model.text_projection, before)
    trainers.change(fit, {"weights": {"affinity_mimicking": 1.0}})
    take_step(fit, batch)
    assert not torch.equal(student.model.text_projection, before)


def test_a_step_asks_the_device_once(parameters, monkeypatch):
    job = open_job("TinyCLIP", parameters("TinyCLIP", steps=4, losses="affinity_mimicking=1, contrastive=1, feature_mimicking=1"))
    transfers, inside = [], []
    step = trainers.take_step

    def counted(fit, batch):
        inside.append(True)
        transfers.append(0)
        taken = step(fit, batch)
        inside.clear()
        return taken

    def counting(name):
        real = getattr(torch.Tensor, name)

        def count(tensor, *arguments):
            of_the_optimizer = "/torch/optim/" in sys._getframe(1).f_code.co_filename  # its step counts lie on the CPU
            if inside and not of_the_optimizer:
                transfers[-1] += 1
            return real(tensor, *arguments)

        return count

    with monkeypatch.context() as patched:
        patched.setattr(trainers, "take_step", counted)
        patched.setattr(trainers, "_one_step", _only_the_step)
        for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, counting(name))
        with pytest.raises(ValueError, match="enough"):
            train(job)
    assert transfers == [1, 1, 1, 1]


def _only_the_step(job, stream, guard):
    terms, *_ = trainers.take_step(job, next(stream))
    job.step += 1
    if job.step == job.phase.steps:
        raise ValueError("enough")
    return terms


def test_a_phase_lets_go_of_its_network_and_optimizer(parameters, monkeypatch):
    alive = []
    make = trainers.Fit.__post_init__

    def watched(fit):
        gc.collect()
        networks = [one for one in gc.get_objects() if isinstance(one, Learner)]
        optimizers = [one for one in gc.get_objects() if type(one) is torch.optim.AdamW]
        alive.append((len(networks), len(optimizers), sum(w.numel() for one in optimizers for s in one.state.values() for w in s.values())))
        make(fit)

    monkeypatch.setattr(trainers.Fit, "__post_init__", watched)
    job = open_job("TinyCLIP", parameters("TinyCLIP", stages=2, inheritance="auto", steps=4, compare_scratch=True))
    train(job)
    assert len(alive) == 5 and all(networks == 1 and optimizers == 0 for networks, optimizers, _ in alive), alive
    assert not job.accelerator._models and not job.accelerator._optimizers


CHANGED = [  # what a run may go on with
    dict(workers=2),
    dict(steps=5),
    dict(steps=5, workers=1, validate_every=2, checkpoint_seconds=0.0, keep_snapshots=2, micro_batch=4, max_bad_share=0.5),
]


@pytest.mark.parametrize("changes", CHANGED, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_goes_on_with(method, changes, parameters):
    given = parameters(method)
    run = run_of(method, given)
    before = student_of(method, given)
    run_of(method, given | changes)
    steps = changes.get("steps", 3)
    taken = [line["step"] for line in run.metrics() if "total" in line]
    assert taken == list(range(1, steps + 1)), "it goes on, and does not begin anew"
    after = student_of(method, given)
    assert any(not torch.equal(before[name], after[name]) for name in before) == (steps > 3)
    assert run.config()["parameters"]["steps"] == steps
    noted = run.config()["continued"][-1]["changes"]
    assert {name.partition(".")[2] for name in noted} == set(changes)
    with pytest.raises(ValueError, match="learning_rate: it has 0.001, asked for 0.5|learning_rate: it has 0.0008, asked for 0.5"):
        open_job(method, given | changes | dict(learning_rate=0.5))
    with pytest.raises(ValueError, match="parameters.steps may only grow"):
        open_job(method, given | dict(steps=2))


def test_more_steps_are_the_last_stages_and_the_baselines(parameters):
    given = parameters("TinyCLIP", stages=2, inheritance="auto", steps=4, compare_scratch=True)
    run = run_of("TinyCLIP", given)
    first = load_file(run.folder / "stage-1/student/open_clip_model.safetensors") if (run.folder / "stage-1/student/open_clip_model.safetensors").exists() else None
    assert [line["step"] for line in run.metrics() if "total" in line and line["stage"] == "scratch-2"] == list(range(1, 9))
    job = open_job("TinyCLIP", given | dict(steps=6))
    assert job.plan == [("stage-1", 4), ("stage-2", 6), ("scratch-2", 10)]
    train(job)
    taken = {stage: [m["step"] for m in run.metrics() if "total" in m and m["stage"] == stage] for stage in ("stage-1", "stage-2", "scratch-2")}
    assert taken == {"stage-1": [1, 2, 3, 4], "stage-2": [5, 6, 7, 8, 9, 10], "scratch-2": list(range(1, 11))}
    if first is not None:
        same = load_file(run.folder / "stage-1/student/open_clip_model.safetensors")
        assert all(torch.equal(first[name], same[name]) for name in first)
    (run.folder / "stage-2/distil/checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="cannot take more steps: stage-2 is finished and its checkpoint is gone"):
        open_job("TinyCLIP", given | dict(steps=9))


@pytest.mark.parametrize("method", ["TinyCLIP", "ClipCid", "DimeFm", "Dlip"])
def test_a_run_goes_on_where_its_data_and_teacher_moved(method, parameters, scenes, tmp_path):
    given = parameters(method, steps=2)
    run = run_of(method, given)
    for name, place in (("there", scenes), ("teacher", Path(given["teacher"]))):
        shutil.copytree(place, tmp_path / name, ignore=shutil.ignore_patterns("features"))
    moved = dict(data=f"{tmp_path}/there/train-{{000000..000002}}.tar", val=f"{tmp_path}/there/val-000000.tar")
    moved |= dict(teacher=str(tmp_path / "teacher"), steps=4)
    moved |= dict(sentences=moved["data"]) if method == "DimeFm" else {}
    run_of(method, given | moved)
    assert [line["step"] for line in run.metrics() if "total" in line] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="data.fingerprint"):
        open_job(method, given | moved | dict(data=f"{tmp_path}/there/train-000000.tar", sentences=moved.get("sentences", "")) if method == "DimeFm"
                 else given | moved | dict(data=f"{tmp_path}/there/train-000000.tar"))


def frozen(before, after, part):
    "Whether all weights of a part are as they were"
    return all(torch.equal(before[name], after[name]) for name in before if part(name))


@pytest.mark.parametrize("method", ["TinyCLIP", "ClipCid", "DimeFm"])
def test_a_locked_tower_stays_and_its_last_layers_need_not(method, parameters, tiny_teacher):
    image, text = (lambda name: name.startswith("visual.")), (lambda name: not name.startswith(("visual.", "logit_")))
    towers = dict(text_tower="student") if method == "DimeFm" else {}
    start = dict(inheritance="manual", student=str(tiny_teacher), **towers)
    for changes, image_stays, text_stays in ((dict(lock_image=True), True, False), (dict(lock_text=True), False, True)):
        given = parameters(method, "-".join(changes), **start | changes)
        run = run_of(method, given)
        stage = STUDENT.get(method, "student")
        before = load_file(run.folder / stage / "init/open_clip_model.safetensors")
        after = student_of(method, given)
        assert frozen(before, after, image) == image_stays and frozen(before, after, text) == text_stays
    given = parameters(method, "last", **start, lock_image=True, unlocked_image_layers=1)
    run = run_of(method, given)
    before, after = load_file(run.folder / stage / "init/open_clip_model.safetensors"), student_of(method, given)
    assert frozen(before, after, lambda name: "visual.transformer.resblocks.0." in name or name == "visual.conv1.weight")
    assert not frozen(before, after, lambda name: "visual.transformer.resblocks.1." in name)


def test_a_locked_blip_tower_stays(parameters):
    given = parameters("Dlip", lock_image=True, lock_text=True, unlocked_text_layers=1, student="image:2x32, text:2x32")
    run = run_of("Dlip", given)
    before, after = (load_file(next((run.folder / "student" / part).glob("*model.safetensors"))) for part in ("init", "student"))
    assert frozen(before, after, lambda name: name.startswith(("vision_model.", "vision_proj.")))
    assert frozen(before, after, lambda name: name.startswith("text_encoder.encoder.layer.0.") and "crossattention" not in name)
    assert not frozen(before, after, lambda name: name.startswith("text_encoder.encoder.layer.1."))


SHIPPED = dict(teacher="data_samples/teacher", inheritance="manual")
RISES = {  # method -> what it takes to learn 48 pairs, in seconds
    "TinyCLIP": dict(SHIPPED, target_sparsity=0.5, steps=12),
    "ClipCid": dict(SHIPPED, clusters=6, removed_share=0.0, steps=12),
    "DimeFm": dict(SHIPPED, sentence_batch=24, steps=14),
    "Dlip": dict(teacher="data_samples/blip", student="", student_share=0.5, batch_size=12, steps=10),
    "Contrastive": dict(patch_size=8, steps=40),
    "BlipTraining": dict(sizes="image:2x64, text:2x64, fusion:1, decoder:1", tasks="retrieval", queue=0, soft_share=0.0, steps=80),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_score_rises(method, parameters, tmp_path):
    write_shards(tmp_path / "few", 48, 0, split="few", per_shard=24, size=32)
    data = f"{tmp_path}/few/few-{{000000..000001}}.tar"
    given = parameters(method, batch_size=24, warmup=5, validate_pairs=48, validate_every=200, learning_rate=1e-3, data=data, val=data)
    given |= dict(sentences=data) if method == "DimeFm" else {}
    run = run_of(method, given | RISES[method])
    first, last = [line["image_to_text_r1"] for line in run.metrics() if line.get("event") == "validation"]
    assert last >= first + 0.1, (first, last)
