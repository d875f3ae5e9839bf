"In which type a teacher computes, and in which the losses multiply: what a job does with it, what a store knows of it, how far off it is."

import json
import shutil
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from conftest import lines_of, tiny_job
from safetensors.torch import load_file

from vlkd_lab import blip_losses, trainers
from vlkd_lab.features import Features, as_features
from vlkd_lab.losses import (
    LOSSES,
    AugmentedFeatures,
    ClusterTerms,
    affinity_mimicking,
    contrastive,
    products_in,
    row_products,
    tiles,
)
from vlkd_lab.models import in_precision, load_model
from vlkd_lab.runs import Run
from vlkd_lab.stores import store_key
from vlkd_lab.trainers import open_job, train

METHODS = ["TinyCLIP", "Distil", "ClipCid", "DimeFm", "Dlip"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def given(scenes, tiny_teacher, tiny_blip, tmp_path):
    "Parameters of a small job of a method, in a folder of the test's own; its features in one of their own too"

    def of(method="Distil", out="run", **changes):
        own = {
            "TinyCLIP": dict(stages=1, inheritance="manual"),
            "Distil": dict(inheritance="manual"),
            "ClipCid": dict(clusters=4, removed_share=0.0, map_images=8, inheritance="manual", losses="contrastive:1, instance_discrimination:1"),
            "DimeFm": dict(sentence_batch=12),
            "Dlip": dict(teacher=str(tiny_blip), student="image:1x16, text:1x16", queue=16, inheritance="layers"),
        }
        return tiny_job(scenes, tiny_teacher, tmp_path / out, method, **own[method] | changes)

    return of


def run_of(method, parameters):
    job = open_job(method, parameters)
    train(job)
    return job


def totals(folder):
    return [line["total"] for line in lines_of(folder) if "total" in line]


def assert_close(one, other, first=5e-3, later=3e-2):
    "Totals of two runs: those of the first step, and those that follow, which AdamW's first steps of full length drive apart"
    assert totals(one) != totals(other)
    assert totals(one)[0] == pytest.approx(totals(other)[0], rel=first)
    assert totals(one) == pytest.approx(totals(other), rel=later)


def students_first_weights(folder):
    return load_file(next(Path(folder).glob("*/init/*model.safetensors")))


@pytest.mark.parametrize("method", METHODS)
def test_a_job_is_taught_by_a_teacher_of_every_type(method, given):
    exact = run_of(method, given(method, "exact"))
    copied = students_first_weights(exact.run.folder)
    for precision, dtype in TYPES.items():
        job = run_of(method, given(method, precision, teacher_precision=precision))
        weights = [weight for weight in job.teacher.model.parameters() if weight.numel() > 1]
        assert {weight.dtype for weight in weights} == {dtype} and job.teacher.model.logit_scale.dtype == torch.float32
        assert job.run.config()["parameters"]["teacher_precision"] == precision
        assert job.run.config()["teacher_sha256"] == exact.run.config()["teacher_sha256"], "it is the same teacher"
        same = totals(job.run.folder) == totals(exact.run.folder)
        assert same == (precision == "fp32") and totals(job.run.folder) == pytest.approx(totals(exact.run.folder), rel=2e-2)
        first = students_first_weights(job.run.folder)
        assert all(torch.equal(first[name], weight) for name, weight in copied.items()), "it inherits the float32 weights"


def test_half_the_memory_and_the_scores_agree(given, tiny_teacher):
    exact, half = (run_of("Distil", given(out=name, teacher_precision=name, steps=6, validate_every=2)) for name in ("job", "bf16"))
    held = [sum(weight.nbytes for weight in job.teacher.model.parameters()) for job in (exact, half)]
    assert held[1] < 0.51 * held[0]
    for one, other in zip(lines_of(exact.run.folder), lines_of(half.run.folder), strict=True):
        for name, value in one.items():
            if name.endswith("_r1"):
                assert abs(other[name] - value) <= 2 / 16, "of sixteen pictures at most two"


@pytest.mark.parametrize("job_precision", ["fp32", "bf16"])
def test_a_teacher_of_its_own_type_does_not_hear_the_jobs(job_precision, given):
    asked = []
    for precision in ("job", "fp32", "bf16"):
        job = open_job("Distil", given(out=precision, teacher_precision=precision, precision=job_precision))
        batch = next(job.batches(0))
        with job.accelerator.autocast():
            asked.append(trainers.ask(job.source, batch).image)
    assert all(rows.dtype == torch.float32 for rows in asked)
    assert torch.equal(asked[0], asked[1]) == (job_precision == "fp32") and not torch.equal(asked[1], asked[2])
    for rows in asked[1:]:
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-6)
        assert (rows * asked[1]).sum(1).min() > 0.999


def test_a_blip_teacher_does_not_hear_it_either(given):
    first = {}
    for precision in ("job", "fp32", "bf16"):
        job = run_of("Dlip", given("Dlip", precision, teacher_precision=precision, precision="bf16"))
        first[precision] = totals(job.run.folder)[0]
    assert len(set(first.values())) == 3 and first["bf16"] == pytest.approx(first["fp32"], rel=1e-2)


@pytest.mark.parametrize("method", ["TinyCLIP", "Distil", "ClipCid", "DimeFm"])
def test_a_store_knows_which_type_filled_it(method, given, tmp_path):
    places = {}
    for precision in ("job", "fp32", "bf16"):
        stored = dict(teacher_features="stored", teacher_precision=precision, teacher=f"{given()['teacher']}")
        job = run_of(method, given(method, precision, **stored))
        places[precision] = job.store.path(next(iter(job.store.shards)), "image")
    assert places["job"] == places["fp32"] != places["bf16"], "a store that is there serves, and never another type's"
    rows = {name: load_file(place)["rows"].float() for name, place in places.items()}
    assert not torch.equal(rows["fp32"], rows["bf16"]) and (rows["fp32"] - rows["bf16"]).abs().max() < 0.02
    online = run_of(method, given(method, "online", teacher_features="online", teacher_precision="bf16"))
    assert totals(tmp_path / "bf16") == pytest.approx(totals(online.run.folder), rel=5e-3)
    named = dict(teacher_features="stored", features=str(tmp_path / "features"))
    run_of(method, given(method, "first", **named))
    with pytest.raises(ValueError, match="holds features of the teacher"):
        run_of(method, given(method, "second", **named, teacher_precision="bf16"))


def test_the_key_is_of_the_weights_as_they_are_held(tiny_teacher):
    keys = {name: store_key(in_precision(load_model(tiny_teacher, "cpu"), name)) for name in TYPES}
    assert store_key(load_model(tiny_teacher, "cpu")) == keys["fp32"]
    assert len({key.weights for key in keys.values()}) == len({key.name for key in keys.values()}) == 3
    assert len({key.view for key in keys.values()}) == 1


def test_every_teacher_of_a_set_has_the_type(given, tiny_teacher, tmp_path):
    twin = shutil.copytree(tiny_teacher, tmp_path / "twin")
    job = run_of("Distil", given(teacher=f"{tiny_teacher}, {twin}", teacher_precision="bf16"))
    assert [teacher.dtype for teacher in job.teachers] == [torch.bfloat16] * 2


def test_a_run_goes_on_with_its_teachers_type_and_no_other(given):
    run_of("Distil", given(teacher_precision="bf16", steps=2))
    with pytest.raises(ValueError, match='teacher_precision: it has "bf16", asked for "job"'):
        open_job("Distil", given(steps=4))
    run = run_of("Distil", given(teacher_precision="bf16", steps=4)).run
    assert len(totals(run.folder)) == 4


def test_a_teacher_that_cannot_compute_in_a_type_is_refused_by_name(given, tmp_path, tiny_teacher):
    large = load_model(tiny_teacher, "cpu")
    large.model.visual.conv1.weight.data.mul_(1e5)  # beyond what float16 holds
    large.save(tmp_path / "large")
    with pytest.raises(ValueError, match="teacher_precision='fp16' is not valid for .*large: .*not finite.*choose bf16"):
        open_job("Distil", given(teacher=str(tmp_path / "large"), teacher_precision="fp16"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="teacher_precision must be str, one of 'job', 'fp32', 'bf16', 'fp16'"):
        open_job("Distil", given(teacher_precision="int8"))
    with pytest.raises(ValueError, match="teacher_precision='bf16' is not valid with teacher=''"):
        open_job("Distil", given(teacher="", losses="contrastive=1", teacher_precision="bf16", student=str(tiny_teacher), inheritance="none"))


def unit_pairs(count, width, scale, seed, noise=1.5):
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(count, width, generator=random)
    text = image + noise * torch.randn(count, width, generator=random)
    return Features(F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor(scale))


def gradients(loss, student, *teacher):
    leaves = Features(*(part.clone().requires_grad_() for part in vars(student).values()))
    value = loss(leaves, *teacher)
    parts = (leaves.image, leaves.text, leaves.scale)
    return value.detach(), *torch.autograd.grad(value, parts, allow_unused=True, materialize_grads=True)


def biased(loss):
    "A loss that needs a bias of the logits, of features that get one"
    return lambda *models: loss(*(as_features(model.image, model.text, model.scale, torch.tensor(-10.0)) for model in models))


def functions():
    centers = F.normalize(torch.randn(10, 64, generator=torch.Generator().manual_seed(5)), dim=1)
    weights = {name: 1.0 for name, term in LOSSES.items() if term.centers}
    plain = {name: term for name, term in LOSSES.items() if not (term.centers or term.module or term.build)}
    named = {name: biased(term.function) if term.needs_bias else term.function for name, term in plain.items()}
    torch.manual_seed(0)
    named["augmented_features"] = AugmentedFeatures(64)
    named |= {term.name: term.function for term in ClusterTerms(centers).terms(weights)}
    named["affinity, tiles"] = lambda s, t: affinity_mimicking(s, t, tile=20)
    named["contrastive, tiles"] = lambda s, t: contrastive(s, tile=20)
    return named


@pytest.mark.parametrize("name", functions())
def test_products_of_bf16_are_close_and_those_of_fp32_are_as_ever(name):
    loss = functions()[name]
    student, teacher = unit_pairs(64, 64, 40.0, 0), unit_pairs(64, 64, 50.0, 1)
    plain = gradients(loss, student, teacher)
    with products_in("fp32"):
        same = gradients(loss, student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    with products_in("bf16"):
        rounded = gradients(loss, student, teacher)
    assert all(part.dtype == torch.float32 for part in rounded)
    assert (rounded[0] - plain[0]).abs() < 1e-2, "nats"
    bounds = (3e-2, 3e-2, 0.1)  # of the gradients; that of the scale is a sum that nearly cancels
    for got, wanted, most in zip(rounded[1:], plain[1:], bounds, strict=True):
        assert (got - wanted).norm() <= most * wanted.norm() + 1e-7
    has_products = name != "feature_mimicking"
    assert torch.equal(rounded[1], plain[1]) != has_products, "and they are rounded"


@pytest.mark.parametrize("tile", [7, 64])
@pytest.mark.parametrize("name", ["contrastive", "affinity"])
def test_tiles_of_bf16_are_the_whole_matrix_of_bf16(name, tile):
    losses = {"contrastive": lambda s, t, tile: contrastive(s, tile=tile), "affinity": lambda s, t, tile: affinity_mimicking(s, t, tile=tile)}
    student, teacher = unit_pairs(64, 64, 40.0, 0), unit_pairs(64, 64, 50.0, 1)
    with products_in("bf16"):
        plain, tiled = (gradients(lambda s, t, side=side: losses[name](s, t, side), student, teacher) for side in (0, tile))
    torch.testing.assert_close(tiled[0], plain[0], rtol=1e-5, atol=1e-6)
    assert (tiled[1] - plain[1]).norm() < 3e-4 * plain[1].norm(), "slopes are rounded in the same way"
    assert (tiled[2] - plain[2]).norm() < 1e-2 * plain[2].norm(), "images before they are scaled, or after"


def test_blips_contrast_has_the_type_too():
    student, momentum, ids = unit_pairs(12, 32, 10.0, 0), unit_pairs(12, 32, 10.0, 1), torch.arange(12)
    exact = blip_losses.queued_contrast(student, momentum, ids)
    with products_in("bf16"):
        rounded = blip_losses.queued_contrast(student, momentum, ids)
    assert not torch.equal(rounded, exact) and rounded.item() == pytest.approx(exact.item(), rel=1e-2)


def test_the_switch_of_a_gpu_is_used_for_each_product_and_afterwards_as_it_was(monkeypatch):
    student, teacher = unit_pairs(24, 16, 20.0, 0), unit_pairs(24, 16, 20.0, 1)
    switch, seen, multiply = torch.backends.cuda.matmul, [], torch.mm

    def watched(*factors, **settings):
        seen.append(switch.fp32_precision)
        return multiply(*factors, **settings)

    monkeypatch.setattr(torch, "mm", watched)
    before = switch.fp32_precision
    for tile in (0, 10):
        leaves = Features(*(part.clone().requires_grad_() for part in vars(student).values()))
        with products_in("tf32"):
            value = affinity_mimicking(leaves, teacher, tile=tile)
        torch.autograd.grad(value, (leaves.image, leaves.text))  # outside, and as it was begun
        assert len(seen) > 3 and set(seen) == {"tf32"} and switch.fp32_precision == before
        gradients(lambda s, t, tile=tile: affinity_mimicking(s, t, tile=tile), student, teacher)
        assert set(seen) <= {"tf32", before}
        seen.clear()

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "mm", fails)
    with pytest.raises(RuntimeError, match="out of memory"), products_in("tf32"):
        row_products(student.image, student.text)
    assert switch.fp32_precision == before and tiles._PRODUCT_TYPE.get() == "fp32"


def test_tensor_cores_are_asked_for_sums_in_float32(monkeypatch):
    "What a CPU does not compute: that the call is one that PyTorch has, with these words"
    assert {"dtype", "dtype_out"} <= set(torch.ops.aten.mm.overloads())
    rows = torch.randn(3, 4)
    try:
        product = tiles._multiply(rows.bfloat16(), rows.bfloat16().T, "bf16", out=torch.empty(3, 3))
        torch.testing.assert_close(product, rows.bfloat16().float() @ rows.bfloat16().float().T)
    except NotImplementedError as error:
        assert "aten::mm.dtype_out" in str(error) and "CPU" in str(error)


RANKS = """
import json, sys
import torch, torch.distributed as dist, torch.nn.functional as F
from vlkd_lab.features import Features
from vlkd_lab.losses import affinity_mimicking, contrastive, over_ranks, products_in, relational, vision_language_score

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world, told = dist.get_rank(), dist.get_world_size(), {}


def features(width, scale, seed):
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(64, width, generator=random)
    text = image + 1.5 * torch.randn(64, width, generator=random)
    return Features(F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor(scale))


def run(loss, rows):
    leaves = Features(*(part.clone().requires_grad_() for part in vars(student[rows]).values()))
    value = over_ranks(loss, leaves, teacher[rows]) if rows != slice(0, 64) else loss(leaves, teacher)
    value.backward()
    return value.item(), leaves.image.grad


student, teacher = features(32, 40.0, 0), features(48, 50.0, 1)
losses = dict(affinity=affinity_mimicking, relational=relational, contrastive=lambda s, t: contrastive(s),
    tiled=lambda s, t: affinity_mimicking(s, t, tile=20), tiled_contrast=lambda s, t: contrastive(s, tile=20),
    scores=lambda s, t: vision_language_score(s.image, t.image, t.text, 30.0, student_text=s.text))
own = slice(rank * 64 // world, (rank + 1) * 64 // world)
for name, loss in losses.items():
    exact, exact_slope = run(loss, slice(0, 64))
    with products_in("bf16"):
        value, slope = run(loss, own)
    off = (slope / world - exact_slope[own]).norm() / exact_slope[own].norm()
    told[name] = [value, exact, off.item()]
if rank == world - 1:
    open(sys.argv[1], "w").write(json.dumps(told))
dist.destroy_process_group()
"""


def test_products_of_bf16_over_two_processes(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    forked.run(str(tmp_path / "ranks.py"), str(tmp_path / "told.json"), processes=2)
    told = json.loads((tmp_path / "told.json").read_text())
    assert len(told) == 6
    for name, (value, exact, off) in told.items():
        assert value == pytest.approx(exact, rel=2e-2) and value != exact, name
        assert 1e-5 < off < 3e-2, name


@pytest.mark.parametrize("method", ["TinyCLIP", "Distil", "ClipCid", "DimeFm", "Dlip"])
def test_a_job_multiplies_in_bf16(method, given):
    exact = run_of(method, given(method, "exact")).run
    run = run_of(method, given(method, loss_precision="bf16")).run
    assert_close(run.folder, exact.folder)
    assert run.config()["parameters"]["loss_precision"] == "bf16"
    with pytest.raises(ValueError, match='loss_precision: it has "bf16", asked for "fp32"'):
        open_job(method, given(method, steps=5))


def test_large_batches_of_a_job_multiply_in_bf16_too(given, monkeypatch):
    monkeypatch.setattr(tiles, "TILED_ABOVE", 4)
    whole = run_of("Distil", given(out="whole", losses="affinity_mimicking=1")).run
    run = run_of("Distil", given(losses="affinity_mimicking=1", loss_precision="bf16", micro_batch=3)).run
    assert_close(run.folder, whole.folder)


def test_tf32_where_there_is_none_is_refused_before_anything_is_made(given, tmp_path):
    with pytest.raises(ValueError, match="loss_precision='tf32' is not valid on a CPU: TF32 is of NVIDIA.*choose fp32, or bf16"):
        open_job("Distil", given(loss_precision="tf32"))
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_goes_on_and_keeps_its_name(given):
    kind = trainers.METHODS["Distil"].parameters
    options = trainers.check_parameters(kind, given() | dict(out=""))
    assert trainers.out_folder(replace(options, teacher_precision="bf16")) != trainers.out_folder(options)
    assert trainers.out_folder(replace(options, loss_precision="bf16")) != trainers.out_folder(options)
    run = run_of("Distil", given(steps=2)).run
    config = run.config()
    for name in ("teacher_precision", "loss_precision"):
        del config["parameters"][name]
    (run.folder / "config.json").write_text(json.dumps(config))
    run_of("Distil", given(steps=4))
    assert len(totals(Run(run.folder).folder)) == 4
