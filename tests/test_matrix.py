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
from conftest import TINY, any_job, lines_of
from safetensors.torch import load_file

from vlkd_lab import stages, trainers
from vlkd_lab.features import Batch, Features
from vlkd_lab.losses import LOSSES, Objective
from vlkd_lab.methods import contrastive, tinyclip
from vlkd_lab.models import load_model, new_model, save_model
from vlkd_lab.runs import Run
from vlkd_lab.samples import write_shards
from vlkd_lab.trainers import Learner, Loop, Phase, open_job, take_step, train

METHODS = ["TinyCLIP", "Distil", "CLIP-KD", "ClipCid", "DimeFm", "Dlip", "Contrastive", "BlipTraining"]
STUDENT = {"TinyCLIP": "stage-1", "Contrastive": "teacher", "BlipTraining": "teacher"}  # the others: student


@pytest.fixture(scope="module")
def parameters_in(scenes, tiny_teacher, tiny_blip):
    "Of a job of any method that takes a second, in a folder"

    def of(folder, method, **changes):
        return any_job(method, folder, scenes, tiny_teacher, tiny_blip) | changes

    return of


@pytest.fixture
def parameters(parameters_in, tmp_path):
    "Of a job of any method, in a folder of the test's own"
    return lambda method, out="run", **changes: parameters_in(tmp_path / out, method, **changes)


@pytest.fixture(scope="module")
def finished(parameters_in, tmp_path_factory):
    "A finished run of a method with no setting changed, trained once and copied to where a test wants it"
    first = tmp_path_factory.mktemp("finished")

    def copied(method, given):
        if not (first / method).exists():
            run_of(method, parameters_in(first / method, method))
        copy = Path(shutil.copytree(first / method, given["out"]))
        config = json.loads((copy / "config.json").read_text())
        config["parameters"]["out"] = given["out"]
        (copy / "config.json").write_text(json.dumps(config))
        return Run(copy)

    return copied


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
def test_one_reader_process_gives_what_none_gives_and_three_give_a_run(method, parameters, finished):
    assert finished(method, parameters(method, "of-0")).config()["parameters"]["workers"] == 0
    for workers in (1, 3):
        run_of(method, parameters(method, f"of-{workers}", workers=workers))
    none, one, three = (lines_of(parameters(method, f"of-{workers}")["out"]) for workers in (0, 1, 3))
    assert one == none, "one reader reads in the same order wherever it runs"
    steps = [line["step"] for line in three if "total" in line]
    assert steps == [1, 2, 3] and three == none, "nor does it matter how many readers there are"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_trains_and_is_not_single_precision(method, precision, parameters, finished):
    assert finished(method, parameters(method, "fp32")).config()["parameters"]["precision"] == "fp32"
    run_of(method, parameters(method, precision, precision=precision))
    single, half = (numbers_of(parameters(method, kind)["out"]) for kind in ("fp32", precision))
    assert single != half, "a precision that changes no digit was not used"
    first = [next(line["total"] for line in lines if "total" in line) for lines in (single, half)]
    assert first[1] == pytest.approx(first[0], rel=0.05)
    weights = student_of(method, parameters(method, precision)).values()
    assert all(weight.dtype != torch.float16 and weight.isfinite().all() for weight in weights)


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


def two_give_what_one_gives(kinds, parameters, folder):
    "Jobs by name, as method and changes, log the same numbers from one process and from two"
    for count in (1, 2):
        jobs = [(method, whole_batches(folder, parameters, method, f"{name}-{count}", **changes)) for name, (method, changes) in kinds.items()]
        in_processes(count, jobs, folder)
    check_both(kinds, folder)


def check_both(names, folder, lines=3):
    "Runs of these names logged the same numbers from one process as from two"
    for name in names:
        one, two = (numbers_of(folder / f"{name}-{count}") for count in (1, 2))
        assert len(one) == len(two) > lines
        for alone, together in zip(one, two, strict=True):
            assert together == pytest.approx(alone, rel=2e-3, abs=2e-4), name


@pytest.fixture
def sigmoid_student(tiny_teacher, tmp_path):
    "A configuration with a bias of the logits, as SigLIP's has, which no loss of ours uses"
    config = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "sigmoid.json").write_text(json.dumps(config | dict(init_logit_bias=-10.0)))
    return str(tmp_path / "sigmoid.json")


@pytest.fixture
def other_teachers(tiny_teacher, tmp_path):
    "Folders of a SigLIP's kind, of timm with an attention pool, and of a CoCa, whose decoder no loss of ours uses"
    words = load_model(tiny_teacher, "cpu").tokenizer
    text = TINY["text_cfg"] | dict(vocab_size=300, hf_tokenizer_name="tiny")
    tower = dict(timm_model_name="test_vit3", timm_model_pretrained=False, timm_pool="map", timm_proj="none", image_size=160)
    pooled = TINY["vision_cfg"] | dict(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2, output_tokens=True)
    decoder = dict(width=32, heads=4, layers=1, context_length=24, vocab_size=300)
    configs = {
        "siglip": dict(embed_dim=96, vision_cfg=tower, text_cfg=text, custom_text=True, init_logit_bias=-10.0),
        "coca": TINY | dict(vision_cfg=pooled, text_cfg=text | dict(embed_cls=True, output_tokens=True), multimodal_cfg=decoder, custom_text=True),
    }
    folders = {}
    for name, config in configs.items():
        vlm = new_model(config, tokenizer=words, seed=5)
        for weight in vlm.model.parameters():
            weight.data.nan_to_num_(0, 0, 0).clamp_(-9, 9)  # open_clip leaves some of a CoCa's as they come
        folders[name] = str(save_model(vlm, tmp_path / name))
    return folders


def test_two_processes_give_what_one_gives(parameters, sigmoid_student, other_teachers, tmp_path):
    gated = dict(inheritance="auto", target_sparsity=0.4, losses="contrastive=1, affinity_mimicking=1")
    kinds = {
        "siglip": ("TinyCLIP", gated | dict(teacher=other_teachers["siglip"])),
        "coca": ("TinyCLIP", gated | dict(teacher=other_teachers["coca"], gate_towers="image")),
        "auto": ("TinyCLIP", dict(inheritance="auto", target_sparsity=0.4, losses="contrastive=1")),
        "cached": ("TinyCLIP", dict(micro_batch=4, losses="affinity_mimicking=1, contrastive=0.5")),
        "rows": ("TinyCLIP", dict(losses="feature_mimicking=1")),
        "bias": ("TinyCLIP", dict(inheritance="none", student=sigmoid_student)),
        "recipe": ("Distil", dict(student_share=0.3)),
        "clusters": ("ClipCid", {}),
        "unpaired": ("DimeFm", {}),
        "towers": ("DimeFm", dict(text_tower="student")),
        "contrast": ("Contrastive", dict(learning_rate=1e-3)),
    }
    two_give_what_one_gives(kinds, parameters, tmp_path)


def test_the_command_line_says_what_it_reads(parameters, capsys):
    given = parameters("TinyCLIP")
    trainers.main([given["out"], "method=TinyCLIP", *(f"{name}={value}" for name, value in given.items() if name != "out")])
    shown = capsys.readouterr().out
    assert "3 shards, 120 samples" in shown and "captions are longer than" in shown


def test_processes_that_fail_say_why(parameters, monkeypatch):
    given = parameters("TinyCLIP", processes=2)
    job = open_job("TinyCLIP", given)
    (Path(given["out"]) / "config.json").write_text('{"method": "TinyCLIP", "parameters": {"teacher": "nobody"}}')
    with pytest.raises(RuntimeError, match=r"failed with exit code 1: ValueError: no model 'nobody'"):
        train(job)


class Dropping(Learner):
    "A learner that drops features at random"

    def forward(self, image, text, draw=None):
        rows, words, scale = super().forward(image, text, draw)
        return torch.nn.functional.dropout(rows, 0.5), torch.nn.functional.dropout(words, 0.5), scale


def test_gradient_caching_drops_the_same_units_in_both_passes():
    learner = Dropping(new_model(TINY, seed=1).model.train())
    batch = Batch(torch.randn(6, 3, 32, 32), torch.randint(1, 400, (6, 24)))
    loss = LOSSES["contrastive"].function
    torch.manual_seed(3)
    parts = [Features(*learner(batch.image[k : k + 2], batch.text[k : k + 2])) for k in (0, 2, 4)]
    whole = Features(torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts]), parts[0].scale)
    weights = [weight for weight in learner.parameters() if weight.requires_grad]
    wanted = torch.autograd.grad(loss(whole, None), weights)
    torch.manual_seed(3)
    trainers.cached_backward(learner, batch, lambda features: loss(features, None), Accelerator(cpu=True), micro_batch=2)
    assert all(torch.allclose(weight.grad, gradient, atol=1e-5) for weight, gradient in zip(weights, wanted, strict=True))


def test_batch_norms_move_once_a_part_and_the_job_says_that_they_see_parts(parameters, tmp_path):
    resnet = dict(embed_dim=16, vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None), text_cfg=TINY["text_cfg"])
    network = new_model(resnet, seed=1).model.train()
    norm = network.visual.bn1
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(1, 400, (6, 24))
    expected = norm.running_mean.clone()
    with torch.no_grad():
        for k in (0, 3):
            expected = 0.9 * expected + 0.1 * network.visual.conv1(images[k : k + 3]).mean((0, 2, 3))
    contrastive = LOSSES["contrastive"].function
    trainers.cached_backward(
        Learner(network), Batch(images, tokens), lambda features: contrastive(features, None), Accelerator(cpu=True), micro_batch=3
    )
    assert torch.allclose(norm.running_mean, expected, atol=1e-6)
    (tmp_path / "resnet.json").write_text(json.dumps(resnet))
    cached = dict(inheritance="none", student=str(tmp_path / "resnet.json"), losses="affinity_mimicking=1", micro_batch=4)
    warnings = run_of("TinyCLIP", parameters("TinyCLIP", **cached)).status()["warnings"]
    assert any("batch norms see micro_batch=4" in warning for warning in warnings)


def reached_names(options, weights):
    "Which weights of a student with a bias are trained by some terms, and which changed in a step"
    student, teacher = (new_model(TINY | dict(init_logit_bias=-10.0), seed=seed) for seed in (1, 2))
    before = {name: weight.clone() for name, weight in student.model.named_parameters()}
    accelerator = Accelerator(cpu=True)
    loop = Loop(Run("nowhere"), Phase("stage-1", "distil", 3), Learner(student.model), Objective(weights), options, accelerator, teacher)
    batch = Batch(torch.randn(6, 3, 32, 32), student.tokenizer([f"text {k}" for k in range(6)]))
    take_step(loop, batch)
    accelerator.free_memory()
    changed = {name for name, weight in student.model.named_parameters() if not torch.equal(weight, before[name])}
    return {name for name, weight in student.model.named_parameters() if weight.requires_grad}, changed


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_what_the_loss_does_not_reach_is_left_as_it_is(micro_batch):
    options = contrastive.Contrastive(warmup=0, micro_batch=micro_batch, learning_rate=1e-2)
    object.__setattr__(options, "held", lambda scale: None)
    trained, changed = reached_names(options, {"affinity_mimicking": 1.0})
    assert "logit_bias" not in trained | changed and "logit_scale" in trained & changed
    assert any(name.startswith("visual.") for name in changed) and "text_projection" in changed
    trained, changed = reached_names(options, {"unimodal_distance": 1.0})
    assert trained >= changed and all(name.startswith("visual.") for name in trained), "images alone are compared: not a text weight decays"


def test_a_term_that_joins_in_mid_run_trains_what_it_reaches():
    student, teacher = (new_model(TINY, seed=seed) for seed in (1, 2))
    options = tinyclip.TinyCLIP(warmup=0, hold_scale=20.0)
    objective = Objective({"unimodal_distance": 1.0, "affinity_mimicking": 0.0})
    loop = Loop(Run("nowhere"), Phase("stage-1", "distil", 3), Learner(student.model), objective, options, Accelerator(cpu=True), teacher)
    batch = Batch(torch.randn(6, 3, 32, 32), student.tokenizer([f"text {k}" for k in range(6)]))
    take_step(loop, batch)
    before = student.model.text_projection.clone()
    take_step(loop, batch)
    assert torch.equal(student.model.text_projection, before)
    trainers.change(loop, {"weights": {"affinity_mimicking": 1.0}})
    take_step(loop, batch)
    assert not torch.equal(student.model.text_projection, before)


def test_a_step_asks_the_device_for_nothing(parameters, monkeypatch):
    job = open_job("TinyCLIP", parameters("TinyCLIP", steps=4, losses="affinity_mimicking=1, contrastive=1, feature_mimicking=1"))
    transfers, inside = [], []
    step = trainers.take_step

    def counted(loop, batch):
        inside.append(True)
        transfers.append(0)
        taken = step(loop, batch)
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
        patched.setattr(trainers.loop, "take_step", counted)
        patched.setattr(trainers.loop, "_one_step", _only_the_step)
        for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, counting(name))
        with pytest.raises(ValueError, match="enough"):
            train(job)
    assert transfers == [0, 0, 0, 0], "what is asked for is read when the next step has been launched"


def _only_the_step(job, stream, guard):
    trainers.loop.take_step(job, next(stream))
    job.step += 1
    if job.step == job.phase.steps:
        raise ValueError("enough")


def test_a_phase_lets_go_of_its_network_and_optimizer(parameters, monkeypatch):
    alive = []
    make = trainers.Loop.__post_init__

    def watched(loop):
        gc.collect()
        networks = [one for one in gc.get_objects() if isinstance(one, Learner)]
        optimizers = [one for one in gc.get_objects() if type(one) is torch.optim.AdamW]
        alive.append((len(networks), len(optimizers), sum(w.numel() for one in optimizers for s in one.state.values() for w in s.values())))
        make(loop)

    monkeypatch.setattr(trainers.Loop, "__post_init__", watched)
    job = open_job("TinyCLIP", parameters("TinyCLIP", stages=2, inheritance="auto", steps=4, compare_scratch=True))
    train(job)
    assert len(alive) == 5 and all(networks == 1 and optimizers == 0 for networks, optimizers, _ in alive), alive
    assert not job.accelerator._models and not job.accelerator._optimizers


CHANGED = [  # what a run may go on with
    dict(workers=2),
    dict(steps=5),
    dict(steps=5, workers=1, validate_every=2, checkpoint_seconds=0.0, keep_snapshots=2, keep_checkpoints=1, micro_batch=4, max_bad_share=0.5),
]


@pytest.mark.parametrize("changes", CHANGED, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_goes_on_with(method, changes, parameters, finished):
    given = parameters(method)
    run = finished(method, given)
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
    first = load_file(next((run.folder / "stage-1/student").glob("*model.safetensors")))
    job = open_job("TinyCLIP", given | dict(steps=6))
    assert job.plan == [("stage-1", 4), ("stage-2", 6), ("scratch-2", 10)]
    train(job)
    taken = {stage: [m["step"] for m in run.metrics() if "total" in m and m["stage"] == stage] for stage, _ in job.plan}
    assert taken == {"stage-1": [1, 2, 3, 4], "stage-2": [5, 6, 7, 8, 9, 10], "scratch-2": list(range(1, 11))}
    same = load_file(next((run.folder / "stage-1/student").glob("*model.safetensors")))
    assert all(torch.equal(first[name], same[name]) for name in first)
    (run.folder / "stage-2/distil/checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="cannot take more steps: stage-2 is finished and its checkpoint is gone"):
        open_job("TinyCLIP", given | dict(steps=9))


@pytest.mark.parametrize("method", ["TinyCLIP", "Distil", "ClipCid", "DimeFm", "Dlip"])
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
        open_job(method, given | moved | dict(data=f"{tmp_path}/there/train-000000.tar"))


def frozen(before, after, part):
    "Whether all weights of a part are as they were"
    return all(torch.equal(before[name], after[name]) for name in before if part(name))


@pytest.mark.parametrize("method", ["TinyCLIP", "Distil", "ClipCid", "DimeFm"])
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


STARTS = {  # method -> how a student that starts as another one is asked for
    "TinyCLIP": dict(inheritance="none"),
    "Distil": dict(inheritance="none"),
    "CLIP-KD": dict(inheritance="none"),
    "ClipCid": {},
    "DimeFm": dict(text_tower="teacher"),
    "Dlip": dict(student="", inheritance="none"),
    "Contrastive": dict(image_size=64, vocabulary=1024, context_length=32),
    "BlipTraining": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_student_is_the_start_of_any_job(method, parameters, tmp_path):
    "A run's folder stands for its last student, whatever method made it"
    kind = "Dlip" if method in ("Dlip", "BlipTraining") else "TinyCLIP"
    first = parameters(kind, "first", target_sparsity=0.5, inheritance="auto") if kind == "TinyCLIP" else parameters(kind, "first")
    run_of(kind, first)
    given = parameters(method, "second", start_from=first["out"], learning_rate=1e-9, weight_decay=0.0, **STARTS[method])
    run = run_of(method, given)
    begun, after = student_of(kind, first), student_of(method, given)
    shared = [name for name in begun if name in after and name.startswith(("visual.", "vision_model."))]
    assert len(shared) > 10 and all(torch.allclose(begun[name], after[name], atol=1e-6) for name in shared)
    assert run.config()["start_sha256"]
    shutil.copytree(first["out"], tmp_path / "elsewhere")
    open_job(method, given | dict(start_from=str(tmp_path / "elsewhere"), steps=4))
    with pytest.raises(FileNotFoundError, match="has no finished student yet"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text('{"method": "TinyCLIP"}')
        open_job(method, given | dict(start_from=str(tmp_path / "empty"), out=str(tmp_path / "no")))


def test_a_student_that_was_cut_can_be_cut_further(parameters, tiny_teacher):
    run_of("TinyCLIP", parameters("TinyCLIP", "first", inheritance="auto", target_sparsity=0.3, steps=4))
    first = parameters("TinyCLIP", "first")["out"]
    given = parameters("TinyCLIP", "second", inheritance="auto", target_sparsity=0.6, steps=4, start_from=first)
    run = run_of("TinyCLIP", given)
    plan = json.loads((run.folder / "stage-1" / "plan.json").read_text())
    assert plan["sparsity"] == pytest.approx(0.6, abs=0.06)
    assert stages.source_shapes(run, "stage-1") != stages.full_shapes(run), "gates begin with what the first run left"
    assert stages.stage_gates(run, 1) is not None


def other_eyes(tiny_teacher, folder):
    "A model with another picture size, other colours and another tokenizer than the tiny teacher's"
    config = TINY | dict(vision_cfg=TINY["vision_cfg"] | dict(image_size=48))
    return save_model(new_model(config, seed=5), folder)


@pytest.mark.parametrize("features", ["online", "stored"])
@pytest.mark.parametrize("method", ["TinyCLIP", "Distil", "ClipCid"])
def test_a_start_keeps_its_own_view_of_the_data(method, features, parameters, tiny_teacher, tmp_path):
    start = other_eyes(tiny_teacher, tmp_path / "other")
    given = parameters(method, start_from=str(start), teacher_features=features, **STARTS[method])
    job = open_job(method, given)
    batch = next(job.batches(0))
    assert batch.image.shape[-1] == 48 and batch.text.shape[1] == 24 and int(batch.text.max()) > 40_000
    assert (batch.teacher_image is None) == (features == "stored")
    assert job.probe.teacher_image.shape[-1] == 32 and job.probe.teacher_text is not None
    train(job)
    saved = json.loads((Path(given["out"]) / STUDENT.get(method, "student") / "student/open_clip_config.json").read_text())
    assert saved["preprocess_cfg"]["size"] == 48 and saved["model_cfg"]["text_cfg"].get("vocab_size", 49408) == 49408


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("TinyCLIP", dict(lock_image=True, inheritance="none"), "lock_image=True is not valid here: .* choose inheritance='manual'"),
        ("ClipCid", dict(lock_text=True), "lock_text=True is not valid here: .* begins at random"),
        ("Contrastive", dict(lock_image=True), "name a model as start_from"),
        ("TinyCLIP", dict(unlocked_text_layers=2), "unlocked_text_layers=2 is not valid with lock_text=False"),
        ("TinyCLIP", dict(lock_image=True, lock_text=True), "leave nothing to train"),
        ("DimeFm", dict(lock_image=True, inheritance="manual"), "lock_image=True and text_tower='teacher' leave nothing to train"),
        ("Dlip", dict(lock_image=True, inheritance="none"), "choose inheritance='layers'"),
        ("BlipTraining", dict(lock_text=True), "name a BLIP as start_from"),
        ("TinyCLIP", dict(start_from="data_samples/teacher", inheritance="none", student="ViT-B-32"), "leave student empty"),
        ("Contrastive", dict(start_from="data_samples/teacher", architecture="ViT-B-32"), "leave architecture empty"),
        ("ClipCid", dict(start_from="data_samples/teacher", inheritance="manual"), "choose inheritance='none'"),
        ("Distil", dict(start_from="data_samples/teacher", student="ViT-B-32"), "choose student=''"),
        ("Distil", dict(teacher="", losses="contrastive=1", inheritance="none"), "teacher='' needs a student"),
        ("Distil", dict(teacher=""), "no loss 'feature_mimicking'"),
        ("TinyCLIP", dict(start_from="data_samples/teacher", losses="affinity_mimicking=1", inheritance="auto"), "is no part of the teacher"),
    ],
    ids=str,
)
def test_locks_and_starts_that_make_no_sense_are_refused(method, changes, message, parameters):
    given = parameters(method, **changes)
    with pytest.raises(ValueError, match=message):
        open_job(method, given)
    assert not Path(given["out"]).exists()


SHIPPED = dict(teacher="data_samples/teacher", inheritance="manual")
RISES = {  # method -> what it takes to learn 48 pairs, in seconds
    "TinyCLIP": dict(SHIPPED, target_sparsity=0.5, steps=12),
    "Distil": dict(SHIPPED, steps=14),
    "CLIP-KD": dict(SHIPPED, steps=14),
    "ClipCid": dict(SHIPPED, clusters=6, removed_share=0.0, steps=12),
    "DimeFm": dict(SHIPPED, sentence_batch=24, steps=14),
    "Dlip": dict(teacher="data_samples/blip", student="", student_share=0.5, batch_size=12, steps=10),
    "Contrastive": dict(patch_size=8, steps=40),
    "BlipTraining": dict(sizes="image:2x64, text:2x64, fusion:1, decoder:1", tasks="retrieval", queue=0, soft_share=0.0, steps=110),
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


def test_contrastive_training_is_distillation_without_a_teacher(parameters, tiny_teacher):
    alone = dict(teacher="", losses="contrastive=1", inheritance="none", student=str(tiny_teacher))
    given = parameters("Distil", "alone", **alone)
    run = run_of("Distil", given)
    taught = run_of("Distil", parameters("Distil", "taught", inheritance="none", student=str(tiny_teacher), losses="contrastive=1"))
    totals = [[line["total"] for line in lines_of(one.folder) if "total" in line] for one in (run, taught)]
    assert len(totals[0]) == 3 and totals[0] == pytest.approx(totals[1], rel=1e-4), "what no term asks for changes nothing"
    assert run.config().get("teacher_sha256") is None and not (run.folder / "probe.safetensors").exists()
    went_on = open_job("Distil", parameters("Distil", "alone", **alone | dict(steps=5)))
    train(went_on)
    assert [line["step"] for line in run.metrics() if "total" in line] == [1, 2, 3, 4, 5]
