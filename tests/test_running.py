"""How a student runs and what is saved of it: compiled, in another layout, with less memory, averaged."""

import hashlib
import json

import pytest
import torch
from conftest import TINY, lines_of, tiny_job
from safetensors.torch import load_file

from vlkd_lab import trainers
from vlkd_lab.models import load_model
from vlkd_lab.runs import Run, RunStopped
from vlkd_lab.trainers import current_student, open_job, train

RESNET = dict(embed_dim=16, vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None), text_cfg=TINY["text_cfg"])


@pytest.fixture
def given(scenes, tiny_teacher, tmp_path):
    "Parameters of a small job of a method, in a folder of the test's own"

    def of(out="run", method="Distil", **changes):
        common = dict(inheritance="manual") if method in ("Distil", "TinyCLIP") else {}
        return tiny_job(scenes, tiny_teacher, tmp_path / out, method, **common | changes)

    return of


@pytest.fixture
def resnet(tiny_teacher, tmp_path):
    "The configuration of a student whose image tower is convolutional, with the teacher's words"
    config = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "resnet.json").write_text(json.dumps(RESNET | dict(text_cfg=config["text_cfg"])))
    return dict(student=str(tmp_path / "resnet.json"), inheritance="none")


def run_of(given, method="Distil"):
    job = open_job(method, given)
    train(job)
    return job.run


def student_of(run, stage="student"):
    return load_file(next((run.folder / stage / "student").glob("*model.safetensors")))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], rtol=0, atol=2e-3) for name in one)


def totals(run):
    return [line["total"] for line in run.metrics() if "total" in line]


@pytest.mark.parametrize("changes", [{}, dict(micro_batch=3), dict(precision="bf16")], ids=str)
def test_activations_that_are_made_again_change_nothing(changes, given):
    plain, again = run_of(given("plain", **changes)), run_of(given("again", **changes, checkpoint_activations=True))
    assert lines_of(plain.folder) == lines_of(again.folder) and same(student_of(plain), student_of(again))


def test_gates_are_learned_as_if_nothing_were_made_again(given):
    gated = dict(method="TinyCLIP", inheritance="auto", stages=2, steps=4)
    runs = []
    for out, changes in (("plain", {}), ("again", dict(checkpoint_activations=True))):
        runs.append(run_of(given(out, **gated, **changes), "TinyCLIP"))
    assert lines_of(runs[0].folder) == lines_of(runs[1].folder)
    assert same(student_of(runs[0], "stage-2"), student_of(runs[1], "stage-2"))


CANNOT = [("Distil", "forget"), ("TinyCLIP", "forget"), ("DimeFm", "forget"), ("ClipCid", "forget"), ("Contrastive", "forget")]
CANNOT += [("Dlip", "forget"), ("Dlip", "compile"), ("BlipTraining", "forget"), ("BlipTraining", "compile")]


@pytest.mark.parametrize("method, way", CANNOT)
def test_what_a_network_cannot_do_is_said_before_anything_is_made(method, way, scenes, tiny_teacher, tiny_blip, resnet, tmp_path):
    changes = dict(student=resnet["student"], checkpoint_activations=True)
    message = "checkpoint_activations=True is not valid for this image tower, a ModifiedResNet.*micro_batch"
    if method in ("Dlip", "BlipTraining"):
        name = "checkpoint_activations" if way == "forget" else "compile"
        changes = {name: True, "compile_backend": "eager"}
        message = f"{name}=True is not valid .*a BlipNetwork.*choose {name}=False"
    if method in ("Distil", "TinyCLIP"):
        changes["inheritance"] = "none"
    given = tiny_job(scenes, tiny_teacher, tmp_path / "run", method, **changes)
    if method == "Contrastive":
        (tmp_path / "clips_words.json").write_text(json.dumps(RESNET))
        given["architecture"] = str(tmp_path / "clips_words.json")
        del given["student"]
    if method == "Dlip":
        given["teacher"] = str(tiny_blip)
    if method == "BlipTraining":
        del given["teacher"], given["compare_scratch"]
        given["start_from"] = str(tiny_blip)
    with pytest.raises(ValueError, match=message):
        open_job(method, given)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_convolutional_student_in_the_other_layout_learns_the_same(given, resnet):
    plain, other = run_of(given("plain", **resnet)), run_of(given("other", **resnet, channels_last=True))
    assert totals(other) == pytest.approx(totals(plain), rel=1e-4) and close(student_of(plain), student_of(other))
    assert load_model(other.folder / "student/student", "cpu").model.visual.conv1.weight.is_contiguous()


def test_the_layout_is_there_while_it_trains(given, resnet, monkeypatch):
    step, layouts = trainers.take_step, []

    def watched(loop, batch):
        weight = loop.learner.model.visual.conv2.weight
        layouts.append(weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous())
        return step(loop, batch)

    monkeypatch.setattr(trainers.loop, "take_step", watched)
    run_of(given(**resnet, channels_last=True))
    assert layouts == [True] * 3


def test_compiled_towers_learn_the_same_and_leave_no_trace(given, monkeypatch):
    plain = run_of(given("plain", steps=4))
    step, is_compiled = trainers.take_step, []

    def watched(loop, batch):
        model = loop.learner.model
        is_compiled.append(model.visual._compiled_call_impl is not None and model.transformer._compiled_call_impl is not None)
        return step(loop, batch)

    monkeypatch.setattr(trainers.loop, "take_step", watched)
    compiled = run_of(given("compiled", steps=4, compile=True, compile_backend="eager", checkpoint_seconds=0.0))
    assert is_compiled == [True] * 4 and totals(compiled) == pytest.approx(totals(plain), rel=1e-4)
    assert close(student_of(plain), student_of(compiled))
    state = torch.load(compiled.folder / "student/distil/checkpoint.pt", weights_only=True)
    assert not any("_orig_mod" in name for name in (*state["learner"], *student_of(compiled)))
    more = run_of(given("compiled", steps=6))  # and goes on without
    assert [line["step"] for line in more.metrics() if "total" in line] == [1, 2, 3, 4, 5, 6]


def test_what_cannot_compile_is_said_before_anything_is_made(given, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="compile_backend='gcc' is not valid: there are "):
        open_job("Distil", given(compile=True, compile_backend="gcc"))

    def fails(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(ValueError, match="inductor cannot compile on this machine .*No working C.*install a C.*choose compile=False"):
        open_job("Distil", given(compile=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ema", [1.0, -0.1, "much"])
def test_a_decay_that_makes_no_sense_is_refused(ema, given):
    with pytest.raises(ValueError, match="ema must be float, from 0, below 1"):
        open_job("Distil", given(ema=ema))


def watch_weights(monkeypatch):
    "The student's weights before the first step of each phase and after every step"
    step, weights = trainers.take_step, {}

    def watched(loop, batch):
        copies = weights.setdefault(loop.phase.folder, [])
        assert (loop.average is None) == (loop.phase.name == "gates" or not loop.options.ema)
        if not copies:
            copies.append({name: tensor.clone() for name, tensor in loop.learner.model.state_dict().items()})
        taken = step(loop, batch)
        copies.append({name: tensor.clone() for name, tensor in loop.learner.model.state_dict().items()})
        return taken

    monkeypatch.setattr(trainers.loop, "take_step", watched)
    return weights


def averaged(copies, decay):
    average = copies[0]
    for weights in copies[1:]:
        average = {name: decay * tensor + (1 - decay) * weights[name] for name, tensor in average.items()}
    return average


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_the_average_is_what_is_saved_and_validated_and_the_weights_go_on(micro_batch, given, monkeypatch):
    plain = run_of(given("plain", steps=5, validate_every=1, learning_rate=0.01, micro_batch=micro_batch))
    weights = watch_weights(monkeypatch)
    settings = dict(steps=5, validate_every=1, learning_rate=0.01, micro_batch=micro_batch, ema=0.8)
    job = open_job("Distil", given("average", **settings))
    looked_at = []
    job.validation = lambda student, _: looked_at.append(student.model.text_projection.detach().clone()) or {}
    train(job)
    assert totals(job.run) == totals(plain), "the student that learns is not another one"
    copies = weights["student/distil"]
    expected = averaged(copies, 0.8)
    student = load_model(job.run.folder / "student/student", "cpu")
    for name, tensor in student.model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert not same(student_of(plain), student_of(job.run))
    state = torch.load(job.run.folder / "student/distil/checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["learner"][f"model.{name}"], tensor) for name, tensor in copies[-1].items()), "raw weights in the checkpoint"
    assert len(looked_at) == 6, "once before training, and after every step"
    for step, weight in enumerate(looked_at):
        assert torch.allclose(weight, averaged(copies[: step + 1], 0.8)["text_projection"], atol=1e-6)


def test_a_run_with_an_average_ends_as_if_undisturbed(given, ends_as_if_undisturbed):
    ends_as_if_undisturbed(lambda out: open_job("Distil", given(steps=6, checkpoint_seconds=0.0, ema=0.7, validate_every=1) | dict(out=out)))


def test_more_steps_go_on_with_weights_and_average(given):
    longer = run_of(given("longer", steps=6, ema=0.6, warmup=0, learning_rate=0.01))
    run_of(given("grown", steps=4, ema=0.6, warmup=0, learning_rate=0.01))
    grown = run_of(given("grown", steps=6, ema=0.6, warmup=0, learning_rate=0.01))
    again = run_of(given("grown", steps=6, ema=0.6, warmup=0, learning_rate=0.01))
    assert totals(grown)[:4] != [] and len(totals(grown)) == 6 and lines_of(again.folder) == lines_of(grown.folder)
    assert not same(student_of(longer), student_of(grown)), "its rate was on its way to zero at four steps"
    with pytest.raises(ValueError, match="ema: it has 0.6, asked for 0.5"):
        open_job("Distil", given("grown", steps=6, ema=0.5, warmup=0, learning_rate=0.01))


def test_the_student_in_mid_run_is_the_average(given, monkeypatch):
    weights = watch_weights(monkeypatch)
    job = open_job("Distil", given(steps=6, ema=0.5, learning_rate=0.01))
    batches = job.batches

    def stopping(step):
        for k, batch in enumerate(batches(step), start=step):
            if k == 3:
                job.run.control(stop=True)
            yield batch

    job.batches = stopping
    with pytest.raises(RunStopped):
        train(job)
    expected = averaged(weights["student/distil"], 0.5)
    student = current_student(Run(job.run.folder)).model.state_dict()
    assert all(torch.allclose(student[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_stages_with_gates_hand_on_the_average(given, monkeypatch):
    weights = watch_weights(monkeypatch)
    run = run_of(given(method="TinyCLIP", inheritance="auto", stages=2, steps=6, ema=0.9, learning_rate=0.01), "TinyCLIP")
    handed_on, next_start = student_of(run, "stage-1"), weights["stage-2/gates"][0]
    assert all(torch.equal(next_start[name], tensor) for name, tensor in handed_on.items())
    expected = averaged(weights["stage-1/distil"], 0.9)
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in handed_on.items())
    assert any(not torch.equal(tensor, weights["stage-1/distil"][-1][name]) for name, tensor in handed_on.items())


@pytest.mark.parametrize("method", ["ClipCid", "DimeFm", "Contrastive"])
def test_every_method_takes_all_of_it(method, given):
    own = dict(ClipCid=dict(clusters=4, removed_share=0.3, map_images=8), DimeFm=dict(sentence_batch=12))
    small = dict(image_size=32, vocabulary=300, context_length=24) if method == "Contrastive" else own[method]
    fast = dict(ema=0.5, channels_last=True, checkpoint_activations=True, compile=True, compile_backend="eager")
    run = run_of(given(method=method, **small, **fast), method)
    assert len(totals(run)) == 3 and run.status()["state"] == "waiting"


def test_a_run_folder_keeps_its_name_and_a_decay_gives_it_another(given):
    kind = trainers.METHODS["Distil"].parameters
    none, fast, averaged_run = (
        trainers.check_parameters(kind, given(**changes) | dict(out=""))
        for changes in ({}, dict(checkpoint_activations=True, channels_last=True, compile_backend="eager"), dict(ema=0.9))
    )
    later = {own for name in trainers.LATER for owner, _, own in [name.rpartition(".")] if owner in ("", type(none).__name__)}
    former = {name: value for name, value in vars(none).items() if name not in (*trainers.FREE, *later)}
    former["teacher_features"] = "beside"  # as the word was when folders got their names
    digest = hashlib.sha256(json.dumps(former, sort_keys=True).encode()).hexdigest()[:8]
    assert trainers.out_folder(none).name == f"distil-{digest}" == trainers.out_folder(fast).name
    assert trainers.out_folder(averaged_run) != trainers.out_folder(none)
