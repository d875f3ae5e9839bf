"""Mapped inheritance: step 0, gradients, kinds of towers, two phases of a job, and the plain model that is left."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from conftest import TINY, lines_of, same_weights, tiny_job
from safetensors.torch import load_file
from test_matrix import check_both, in_processes

from vlkd_lab import trainers
from vlkd_lab.export import export_student
from vlkd_lab.gates import TowerGates, kept_shapes, swapped
from vlkd_lab.inheritance import Kept, inherit, plan_gates
from vlkd_lab.methods.distil import Distil, student_under_maps
from vlkd_lab.methods.mapping import SHARING, WeightMaps, map_tensors, mapping_steps, new_maps, stage_maps
from vlkd_lab.models import load_model, new_model, save_model
from vlkd_lab.runs import RunStopped, load_checkpoint
from vlkd_lab.samples import write_shards
from vlkd_lab.trainers import current_student, open_job, plan_copy, train

PLAIN = TINY | dict(vision_cfg=TINY["vision_cfg"] | dict(layers=4), text_cfg=TINY["text_cfg"] | dict(layers=3))
TIMM = dict(timm_pool="avg", timm_proj="linear", image_size=32)
WORDS = dict(context_length=12, vocab_size=49408, width=32, heads=4, layers=2)
KINDS = {  # image towers that have maps, and what their students may lose
    "vit": dict(TIMM, timm_model_name="test_vit", image_size=160),
    "pooled": dict(TIMM, timm_model_name="test_vit3", timm_pool="map", image_size=160),
    "eva": dict(TIMM, timm_model_name="eva02_tiny_patch14_224", image_size=224),
}


def shaken(vlm, seed=0):
    "A model with numbers in all its weights, as a trained one has them"
    generator = torch.Generator().manual_seed(seed)
    for weight in vlm.model.parameters():
        if weight.dim():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    vlm.model.eval()
    return vlm


def smaller(teacher, share=0.4):
    "A plain student of a teacher, as manual inheritance makes it"
    options = Distil(student_share=share, inheritance="mapped")
    return trainers.smaller_student(options, teacher, None, teacher.shapes)


def features(vlm, seed=1):
    size = vlm.image_size if isinstance(vlm.image_size, int) else vlm.image_size[0]
    picture = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(seed))
    text = vlm.tokenizer(["a red star", "two", "something blue"])
    with torch.no_grad():
        return vlm.model.encode_image(picture, normalize=True), vlm.model.encode_text(text, normalize=True)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_step_0_is_the_manual_student_and_every_map_moves(kind, sharing):
    config = PLAIN if kind == "plain" else dict(embed_dim=16, vision_cfg=KINDS[kind], text_cfg=WORDS)
    teacher = shaken(new_model(config, seed=3))
    student = smaller(teacher)
    before = features(student)
    state = {name: weight.clone() for name, weight in student.model.state_dict().items()}
    maps = new_maps(teacher, student, sharing)
    names = {name for name, _ in student.model.named_parameters()}
    made = maps()
    assert made.keys() == names - {"logit_scale"}
    assert all(torch.equal(made[name], state[name]) for name in made)
    assert sum(weight.numel() for weight in state.values()) < sum(weight.numel() for weight in teacher.model.state_dict().values())

    with torch.no_grad():
        for weight in maps.mixes.values():
            weight += 0.02
    student.model.requires_grad_(False)
    picture = torch.rand(3, 3, *teacher.image_shape)
    with swapped(student.model, maps()) as network:
        rows = network.encode_image(picture, normalize=True), network.encode_text(student.tokenizer(["a", "b b", "c"]), normalize=True)
    sum(row.square().mul(torch.randn(row.shape)).sum() for row in rows).backward()
    still = [name for name, weight in maps.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert not still, still
    assert all(torch.equal(weight, state[name]) for name, weight in student.model.state_dict().items()), "it has its own weights again"
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(before, features(student), strict=True))


def test_a_student_of_the_teachers_sizes_begins_as_the_teacher():
    teacher = shaken(new_model(PLAIN, seed=3))
    whole = new_model(PLAIN, like=teacher, seed=4)
    maps = new_maps(teacher, whole, "tied")
    for name, weight in maps.named_parameters():
        assert torch.equal(weight, torch.eye(len(weight))), name
    with torch.no_grad():
        whole.model.load_state_dict(whole.model.state_dict() | maps())
    whole.model.eval()
    assert all(torch.equal(one, other) for one, other in zip(features(teacher), features(whole), strict=True))


def test_a_width_that_something_else_reads_is_copied():
    text = TINY["text_cfg"] | dict(vocab_size=49408, embed_cls=True, output_tokens=True)
    pooled = TINY["vision_cfg"] | dict(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2, output_tokens=True)
    decoder = dict(width=32, heads=4, layers=1, context_length=24, vocab_size=49408)
    teacher = new_model(dict(embed_dim=16, vision_cfg=pooled, text_cfg=text, multimodal_cfg=decoder, custom_text=True), seed=3)
    for weight in teacher.model.parameters():
        weight.data.nan_to_num_(0, 0, 0).clamp_(-9, 9)  # open_clip leaves some of a CoCa's as they come
    assert "hidden" not in teacher.shapes["text"].gate_kinds, "a CoCa's decoder reads its text tower"
    maps = new_maps(teacher, smaller(teacher), "tied")
    assert "image/hidden" in maps.matrices and "text/hidden" not in maps.matrices and "text/0/neurons" in maps.matrices


def test_a_plan_of_gates_begins_the_maps_as_well():
    teacher = shaken(new_model(PLAIN, seed=3))
    shapes = teacher.shapes
    open_ = torch.arange(shapes["image"].width) % 2 == 0
    plan = plan_gates(teacher.model.state_dict(), shapes, {"image": TowerGates(hidden=open_.float())})
    assert kept_shapes(shapes, {"image": TowerGates(hidden=open_.float())})["image"].width == int(open_.sum())
    names = {name for name, _ in teacher.model.named_parameters()} - {"logit_scale"}
    maps = WeightMaps(teacher.model.state_dict(), map_tensors(teacher.model.state_dict(), plan, shapes, names))
    copied = inherit(teacher.model.state_dict(), plan)
    assert all(torch.equal(weight, copied[name]) for name, weight in maps().items())
    assert maps.matrices["image/hidden"][1, 2] == 1 and maps.matrices["image/hidden"].sum() == open_.sum()


@pytest.fixture
def given(scenes, tiny_teacher, tmp_path):
    "Parameters of a small job with mapped inheritance"

    def of(out="run", **changes):
        own = dict(inheritance="mapped", steps=6, map_share=0.5, student_share=0.4, checkpoint_seconds=0.0)
        return tiny_job(scenes, tiny_teacher, tmp_path / out, "Distil", **own | changes)

    return of


def run_of(given):
    job = open_job("Distil", given)
    train(job)
    return job.run


def phases(run):
    return [line["phase"] for line in run.metrics() if "total" in line]


CHANGES = {
    "tied": {},
    "tensor": dict(map_sharing="tensor"),
    "short": dict(map_share=0.2, map_learning_rate=0.01),
    "cached": dict(micro_batch=4),
    "half": dict(precision="bf16"),
    "rows": dict(losses="feature_mimicking=1", ema=0.5),
    "held": dict(hold_scale=20.0, teacher_precision="bf16"),
    "locked": dict(lock_image=True),
    "averaged": dict(channels_last=True, checkpoint_activations=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_job_learns_maps_and_then_the_student(name, given, tiny_teacher):
    run = run_of(given(**CHANGES[name]))
    count = 1 if name == "short" else 3
    assert phases(run) == ["map"] * count + ["distil"] * (6 - count)
    assert [line["step"] for line in run.metrics() if "total" in line] == [1, 2, 3, 4, 5, 6]
    rates = [line["learning_rate"] for line in run.metrics() if "total" in line and line["phase"] == "map"]
    assert max(rates) == pytest.approx(0.01 if name == "short" else 0.001, rel=0.35)
    teacher = load_model(tiny_teacher)
    manual = smaller(teacher).model.state_dict()
    begun = load_model(run.folder / "student" / "init").model.state_dict()
    maps = new_maps(teacher, smaller(teacher), CHANGES[name].get("map_sharing", "tied"))
    maps.load_state_dict(stage_maps(run))
    with torch.no_grad():
        made = maps()
    assert all(torch.allclose(weight, begun[key], atol=1e-6) for key, weight in made.items()), "the student begins as the maps make it"
    moved = {key for key in made if not torch.equal(begun[key], manual[key])}
    of_images = {key for key in made if key.startswith("visual.")}
    assert moved and (not moved & of_images if name == "locked" else moved & of_images)
    if name == "held":
        assert begun["logit_scale"].exp().item() == pytest.approx(20, rel=1e-4)
    else:
        assert begun["logit_scale"] == manual["logit_scale"], "the scale waits for the second phase"
    left = load_model(run.folder / "student" / "student").model.state_dict()
    assert any(not torch.equal(left[key], begun[key]) for key in begun)


@pytest.fixture
def staged(scenes, tiny_teacher, tmp_path):
    "Parameters of a small TinyCLIP job of two stages with mapped inheritance"

    def of(out="run", **changes):
        own = dict(inheritance="mapped", stages=2, steps=4, map_share=0.5, target_sparsity=0.6, checkpoint_seconds=0.0)
        return tiny_job(scenes, tiny_teacher, tmp_path / out, "TinyCLIP", **own | changes)

    return of


def test_every_stage_of_a_tinyclip_maps_what_the_one_before_left(staged, tiny_teacher):
    job = open_job("TinyCLIP", staged(map_sharing="tensor", map_learning_rate=0.01))
    train(job)
    stages = ("stage-1", "stage-2")
    lines = [(line["stage"], line["phase"], line["step"]) for line in job.run.metrics() if "total" in line]
    assert lines == [(stage, phase, 4 * k + n) for k, stage in enumerate(stages) for n, phase in enumerate(("map", "map", "distil", "distil"), 1)]
    sources = [load_model(tiny_teacher), load_model(job.run.folder / "stage-1" / "student")]
    for stage, source in zip(stages, sources, strict=True):
        begun = load_model(job.run.folder / stage / "init")
        maps = new_maps(source, begun, "tensor")
        manual = maps()
        maps.load_state_dict(stage_maps(job.run, stage))
        assert all(torch.allclose(weight, begun.model.state_dict()[name], atol=1e-6) for name, weight in maps().items()), stage
        assert any(not torch.allclose(weight, manual[name], atol=1e-4) for name, weight in maps().items()), stage


def test_an_interrupted_tinyclip_ends_as_if_undisturbed(staged, killed_in_its_fourth_step):
    for share, name in ((0.75, "in the maps"), (0.5, "in the second phase")):
        changes = dict(map_share=share, stages=1, steps=5, losses="affinity_mimicking=1")
        whole, killed = staged(f"whole {name}", **changes), staged(f"killed {name}", **changes)
        train(open_job("TinyCLIP", whole))
        killed_in_its_fourth_step(lambda killed=killed: open_job("TinyCLIP", killed))
        assert lines_of(killed["out"]) == lines_of(whole["out"]), name


@pytest.mark.parametrize("changes", [{}, dict(student="TEACHER", stages=1)], ids=str)
def test_a_tinyclip_in_mid_phase_shows_what_the_maps_make(changes, staged, tiny_teacher, monkeypatch):
    step = trainers.take_step

    def stops(loop, batch):
        if loop.phase.folder == last and loop.step == 1:
            raise RunStopped("enough")
        return step(loop, batch)

    last = "stage-1/map" if changes else "stage-2/map"
    monkeypatch.setattr(trainers.loop, "take_step", stops)
    named = {name: str(tiny_teacher) if value == "TEACHER" else value for name, value in changes.items()}
    job = open_job("TinyCLIP", staged(map_learning_rate=0.01, **named))
    with pytest.raises(RunStopped):
        train(job)
    state = load_checkpoint(job.run, last, cut=False)["learner"]
    before = trainers.part_of(state, "network.")
    after = current_student(job.run, stage=last.partition("/")[0]).model.state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert after["logit_scale"] == before["logit_scale"]


def test_a_tinyclip_with_towers_in_stages_is_refused_by_name(staged, tiny_teacher, tmp_path):
    tower = dict(TIMM, timm_model_name="test_convnext", image_size=64)
    config = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"]
    save_model(new_model(config | dict(vision_cfg=tower), like=load_model(tiny_teacher), seed=2), tmp_path / "stages")
    with pytest.raises(ValueError, match="inheritance='mapped' is not valid here: the image tower is a network of timm in stages"):
        open_job("TinyCLIP", staged(teacher=str(tmp_path / "stages")))
    with pytest.raises(ValueError, match="no map would move"):
        open_job("TinyCLIP", staged(lock_image=True, lock_text=True, unlocked_text_layers=1))


def test_interrupted_and_resumed_it_ends_as_if_undisturbed(given, killed_in_its_fourth_step, tmp_path):
    for share, name in ((0.8, "in the maps"), (0.5, "between the phases"), (0.2, "in the student")):
        changes = dict(map_share=share, losses="affinity_mimicking=1, feature_mimicking=1")
        whole = given(f"whole {name}", **changes)
        run_of(whole)
        killed = given(f"killed {name}", **changes)
        killed_in_its_fourth_step(lambda killed=killed: open_job("Distil", killed))
        assert lines_of(killed["out"]) == lines_of(whole["out"]), name
        assert same_weights(killed["out"], whole["out"]), name


def test_a_finished_run_takes_more_steps_and_its_maps_stay(given):
    run = run_of(given())
    before = stage_maps(run)
    run = run_of(given(steps=8))
    assert phases(run) == ["map"] * 3 + ["distil"] * 5, "their share is that of the first end"
    assert all(torch.equal(before[name], weight) for name, weight in stage_maps(run).items())


def test_two_processes_give_what_one_gives(given, staged, tmp_path):
    write_shards(tmp_path / "whole", 32, 3, split="train", per_shard=16, size=32)
    for count in (1, 2):
        whole = dict(data=f"{tmp_path}/whole/train-{{000000..000001}}.tar", batch_size=32)
        jobs = [("TinyCLIP", staged(f"stages-{count}", losses="affinity_mimicking=1", **whole))]
        for sharing in SHARING:
            both = dict(losses="affinity_mimicking=1, contrastive=1", map_sharing=sharing)
            jobs.append(("Distil", given(f"{sharing}-{count}", **both, **whole)))
        in_processes(count, jobs, tmp_path)
    check_both((*SHARING, "stages"), tmp_path, lines=5)


def test_the_student_in_mid_phase_is_what_the_maps_make(given, monkeypatch):
    step = trainers.take_step

    def stops(loop, batch):
        if loop.step == 2:
            raise RunStopped("enough")
        return step(loop, batch)

    monkeypatch.setattr(trainers.loop, "take_step", stops)
    job = open_job("Distil", given(keep_checkpoints=0))
    with pytest.raises(RunStopped):
        train(job)
    state = load_checkpoint(job.run, "student/map", cut=False)["learner"]
    student = current_student(job.run)
    manual = smaller(load_model(job.options.teacher)).model.state_dict()
    assert any(not torch.equal(weight, manual[name]) for name, weight in student.model.state_dict().items())
    assert student_under_maps(job.run, "student", "distil", state) is None
    again = student_under_maps(job.run, "student", "map", state)
    assert all(torch.equal(a, b) for a, b in zip(features(student), features(again), strict=True))


def test_the_student_is_a_plain_model_that_open_clip_opens(given, tmp_path):
    run = run_of(given())
    out = export_student(run.folder, tmp_path / "away", onnx=False)
    opened, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    student = load_model(run.folder / "student" / "student")
    student.model.eval()
    picture = torch.rand(2, 3, *student.image_shape)
    ids = student.tokenizer(["a red star", "two"])
    with torch.no_grad():
        assert type(opened) is open_clip.CLIP
        assert torch.allclose(opened.eval().encode_image(picture), student.model.encode_image(picture), atol=1e-6)
        assert torch.allclose(opened.encode_text(ids), student.model.encode_text(ids), atol=1e-6)
    weights = load_file(next((run.folder / "student/student").glob("*model.safetensors")))
    assert not [name for name in weights if "matrices" in name or "mixes" in name]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(map_sharing="all"), "one of 'tied', 'tensor'"),
        (dict(map_learning_rate=0.0), "map_learning_rate=0.0"),
        (dict(map_share=1.5), "map_share=1.5"),
        (dict(lock_image=True, lock_text=True, unlocked_text_layers=1), "no map would move"),
        (dict(start_from="data_samples/teacher"), "choose inheritance='none'"),
        (dict(teacher="", student="ViT-B-32", losses="contrastive=1"), "choose inheritance='none'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_training(changes, message, given):
    with pytest.raises(ValueError, match=message):
        open_job("Distil", given(**changes))


@pytest.mark.parametrize("name", ["RN50", "convnext"])
def test_towers_without_a_stream_of_one_width_are_refused_by_name(name, given, tiny_teacher, tmp_path):
    tower = dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None)
    if name == "convnext":
        tower = dict(TIMM, timm_model_name="test_convnext", image_size=64)
    config = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"]
    teacher = new_model(config | dict(vision_cfg=tower), like=load_model(tiny_teacher), seed=2)
    save_model(teacher, tmp_path / name)
    with pytest.raises(ValueError, match="inheritance='mapped' is not valid here: the image tower is a .*choose inheritance='manual'"):
        open_job("Distil", given(teacher=str(tmp_path / name)))
    assert not (tmp_path / "run").exists()


def test_layers_that_are_not_alike_are_refused():
    teacher = shaken(new_model(PLAIN, seed=3))
    student = smaller(teacher)
    plan = plan_copy(teacher, student)
    state = teacher.model.state_dict()
    names = {name for name, _ in student.model.named_parameters()}
    name = "visual.transformer.resblocks.0.mlp.c_fc.bias"
    others = tuple(copy for copy in plan.copies if copy.name != name)
    with pytest.raises(ValueError, match="not all layers of the student's image tower have a mlp.c_fc.bias of one size"):
        map_tensors(state, replace(plan, copies=others), teacher.shapes, names)
    short = tuple(replace(copy, kept=(Kept.leading(8, copy.kept[0].of),)) if copy.name == name else copy for copy in plan.copies)
    with pytest.raises(ValueError, match="of one size"):
        map_tensors(state, replace(plan, copies=short), teacher.shapes, names)
    unused = next(k for k in range(4) if not any(f"visual.transformer.resblocks.{k}." in copy.source for copy in plan.copies))
    lacking = {name: weight for name, weight in state.items() if name != f"visual.transformer.resblocks.{unused}.mlp.c_fc.bias"}
    with pytest.raises(ValueError, match=f"layer {unused} of the teacher's image tower has no mlp.c_fc.bias to be mixed"):
        map_tensors(lacking, plan, teacher.shapes, names)


def test_the_share_of_the_maps_leaves_a_step_for_each_phase():
    of = Distil
    assert mapping_steps(of(inheritance="mapped", map_share=0.2), 200) == 40
    assert mapping_steps(of(inheritance="mapped", map_share=0.0), 10) == 1
    assert mapping_steps(of(inheritance="mapped", map_share=1.0), 10) == 9
    assert mapping_steps(of(inheritance="manual", map_share=0.2), 200) == 0
