"Losses against golden numbers of the reference implementations, tiled against plain, and the objective"

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlkd_lab import losses
from vlkd_lab.features import BiasedFeatures, Ensemble, Features
from vlkd_lab.losses import (
    LOSSES,
    AugmentedFeatures,
    ClusterTerms,
    Objective,
    Projection,
    Term,
    affinity_mimicking,
    cluster_classification,
    cluster_distribution,
    contrastive,
    feature_mimicking,
    gradient_mimicking,
    gradient_share,
    instance_discrimination,
    interactive_contrastive,
    interactive_relational,
    objective_parameters,
    relational,
    sample_classes,
    sigmoid_contrastive,
    sigmoid_mimicking,
    tiles,
)
from vlkd_lab.methods.clip_kd import LearntScale
from vlkd_lab.waits import count_waits

torch.set_num_threads(1)  # these tensors are small
GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float64, torch.float32]
TILES = [0, 1, 2, 4, 5, 6, 100]  # 0 is the plain form; 4 and 5 do not divide the golden batch of 6


def golden(file, section=""):
    "The arrays of one section, names without it"
    with np.load(GOLDEN / file) as arrays:
        return {name.removeprefix(section): torch.from_numpy(arrays[name]) for name in arrays if name.startswith(section)}


def leaf(values, dtype):
    return values.to(dtype, copy=True).requires_grad_()


def features(arrays, model, dtype, unit=False):
    "Leaves and the Features made of them"
    leaves = {name: leaf(arrays[f"{model}_{name}"], dtype) for name in ("image", "text", "logit_scale")}
    rows = (F.normalize(leaves[name], dim=1) if unit else leaves[name] for name in ("image", "text"))
    return leaves, Features(*rows, leaves["logit_scale"])


def check_value(value, wanted, dtype):
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (1e-5, 0)
    torch.testing.assert_close(value.detach().double(), wanted, rtol=rtol, atol=atol)


def check_gradient(gradient, wanted, dtype):
    assert gradient.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)
    else:
        assert (gradient.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def check(arrays, name, value, leaves, dtype):
    "Value and every gradient that the archive has for the output `name`"
    check_value(value, arrays[name], dtype)
    value.backward()
    wanted = {key.removeprefix(f"{name}__grad_"): grad for key, grad in arrays.items() if key.startswith(f"{name}__grad_")}
    assert wanted
    for key, grad in wanted.items():
        check_gradient(leaves[key].grad, grad, dtype)
    for key in leaves.keys() - wanted.keys():
        assert leaves[key].grad is None or not leaves[key].grad.any(), key


def named(leaves, model="student"):
    return {f"{model}_{name}": value for name, value in leaves.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_affinity_mimicking_is_golden(tile, dtype):
    arrays = golden("affinity_mimicking.npz")
    for name in ("affinity_mean", "distillclip_distill"):
        leaves, student = features(arrays, "student", dtype)
        teacher_leaves, teacher = features(arrays, "teacher", dtype)
        check(arrays, name, affinity_mimicking(student, teacher, tile=tile), named(leaves), dtype)
        assert all(value.grad is None for value in teacher_leaves.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_contrastive_is_golden(tile, dtype):
    arrays = golden("affinity_mimicking.npz")
    for name in ("clip_loss", "distillclip_contrastive"):
        leaves, student = features(arrays, "student", dtype)
        check(arrays, name, contrastive(student, tile=tile), named(leaves), dtype)


def test_two_workers_average_to_the_whole_batch():
    arrays = golden("affinity_mimicking.npz")
    _, student = features(arrays, "student", torch.float64)
    _, teacher = features(arrays, "teacher", torch.float64)
    ranks = [arrays[f"affinity_{way}_rank{rank}of2"] for way in ("img2text", "text2img") for rank in (0, 1)]
    for tile in TILES:
        check_value(affinity_mimicking(student, teacher, tile=tile), torch.stack(ranks).mean(), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [0, 1, 4, 6])
@pytest.mark.parametrize("case", ["same_dim/", "projected/"])
def test_relational_is_clip_kds_crd(case, tile, dtype):
    arrays = golden("clip_kd.npz", case)
    leaves, student = features(arrays, "student", dtype, unit=True)
    teacher_leaves, teacher = features(arrays, "teacher", dtype)
    check(arrays, "ckd", relational(student, teacher, tile=tile), named(leaves), dtype)
    assert all(value.grad is None for value in teacher_leaves.values())
    leaves, student = features(arrays, "student", dtype, unit=True)
    check(arrays, "task", contrastive(student, tile=0), named(leaves), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("section", ["same_dim/", "same_dim_exp_scale/"])
def test_same_width_losses_are_clip_kds(section, dtype):
    arrays = golden("clip_kd.npz", "same_dim/")
    for name in ("icl", "fd"):
        leaves, student = features(arrays, "student", dtype, unit=True)
        teacher_leaves, teacher = features(arrays, "teacher", dtype)
        if name == "fd":
            check(arrays, "fd", feature_mimicking(student, teacher), named(leaves), dtype)
        else:
            wanted = golden("clip_kd.npz", section)
            scale = leaf(wanted["cross_logit_scale"], dtype)
            value = interactive_contrastive(student, teacher, scale)
            check(wanted, "icl", value, {**named(leaves), "cross_logit_scale": scale}, dtype)
        assert all(value.grad is None for value in teacher_leaves.values())


def projection_of(arrays, dtype):
    "CLIP-KD's projection with the archive's layers, and these by their names"
    project = Projection(7, 10).to(dtype)
    layers = {"visual_proj": project.image, "text_proj": project.text}
    for key, layer in layers.items():
        layer.load_state_dict({part: arrays[f"param/{key}.{part}"] for part in ("weight", "bias")})
    return project, layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["icl", "fd"])
def test_projected_losses_are_clip_kds(name, dtype):
    arrays = golden("clip_kd.npz", "projected/")
    project, layers = projection_of(arrays, dtype)
    leaves, student = features(arrays, "student", dtype)  # CLIP-KD projects features before they are normalised
    _, teacher = features(arrays, "teacher", dtype)
    parameters = {f"{key}.{part}": getattr(layer, part) for key, layer in layers.items() for part in ("weight", "bias")}
    if name == "fd":
        value, scale = feature_mimicking(project(student), teacher), {}
    else:
        scale = {"cross_logit_scale": leaf(arrays["cross_logit_scale"], dtype)}
        value = interactive_contrastive(project(student), teacher, scale["cross_logit_scale"])
    check(arrays, name, value, {**named(leaves), **parameters, **scale}, dtype)


def random_features(pairs, width, scale, seed, dtype=torch.float64, spread=1.0):
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(pairs, width, generator=random, dtype=torch.float64)
    text = image + spread * torch.randn(pairs, width, generator=random, dtype=torch.float64)
    parts = F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor(scale)
    return Features(*(leaf(part, dtype) for part in parts))


def value_and_gradients(loss, student):
    value = loss(student)
    return value.detach(), *torch.autograd.grad(value, (student.image, student.text, student.scale))


@pytest.mark.parametrize("scale", [1.0, 50.0, 100.0, 2000.0])
@pytest.mark.parametrize("tile", [1000, 150, 77])
def test_tiles_equal_the_plain_form(tile, scale):
    student = random_features(450, 24, scale, seed=0)
    teacher = random_features(450, 40, scale, seed=1)
    for loss in (
        lambda f, side: contrastive(f, tile=side),
        lambda f, side: affinity_mimicking(f, teacher, tile=side),
        lambda f, side: relational(f, teacher, tile=side),
    ):
        plain = value_and_gradients(lambda f, loss=loss: loss(f, 0), student)
        tiled = value_and_gradients(lambda f, loss=loss: loss(f, tile), student)
        for got, wanted in zip(tiled, plain, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * wanted.abs().max().item())


@pytest.mark.parametrize("scale", [1.0, 59.0, 100.0, 400.0])
def test_float32_tiles_are_as_exact_as_the_plain_form_at_any_scale(scale):
    "Both float32 forms against float64: the tiled error may not exceed a few times the plain one's"
    given = random_features(300, 12, scale, seed=2), random_features(300, 9, scale, seed=3)
    student, teacher = (Features(f.image.detach().float(), f.text.detach().float(), f.scale.detach().float()) for f in given)
    student = Features(*(leaf(part, torch.float32) for part in (student.image, student.text, student.scale)))
    exact = Features(*(leaf(part.detach(), torch.float64) for part in (student.image, student.text, student.scale)))
    exact_teacher = Features(teacher.image.double(), teacher.text.double(), teacher.scale.double())
    truth = value_and_gradients(lambda f: affinity_mimicking(f, exact_teacher, tile=0), exact)
    plain = value_and_gradients(lambda f: affinity_mimicking(f, teacher, tile=0), student)
    tiled = value_and_gradients(lambda f: affinity_mimicking(f, teacher, tile=64), student)
    for got, reference, wanted in zip(tiled, plain, truth, strict=True):
        size = wanted.abs().max()
        assert (got - wanted).abs().max() <= 5 * (reference - wanted).abs().max() + 1e-6 * size


@pytest.mark.parametrize("loss", [lambda s, t: contrastive(s), affinity_mimicking, relational])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_tiles_wait_for_nothing(loss, scale, monkeypatch):
    monkeypatch.setattr(tiles, "TILED_ABOVE", 64)
    monkeypatch.setattr(tiles, "TILE", 32)
    student, teacher = (random_features(150, 8, scale, seed, torch.float32) for seed in (0, 1))
    with count_waits() as places:
        loss(student, teacher).backward()
    assert not places, "neither the loss nor its gradient asks for a number"


def test_logits_too_wide_for_one_exponential():
    "Rows whose logits all lie far below the rest of their tile must not vanish (float32, range 600)"
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    student = Features(image, image.roll(1, 0), torch.tensor(300.0))
    student = Features(*(leaf(part, torch.float32) for part in (student.image, student.text, student.scale)))
    plain, tiled = (value_and_gradients(lambda f, t=t: contrastive(f, tile=t), student) for t in (0, 4))
    for got, wanted in zip(tiled, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [0, 1, 8])
def test_one_pair_has_nothing_to_learn(tile):
    student, teacher = random_features(1, 5, 10.0, seed=0), random_features(1, 7, 10.0, seed=1)
    for loss in (contrastive, lambda f, tile: affinity_mimicking(f, teacher, tile)):
        value, *gradients = value_and_gradients(lambda f, loss=loss: loss(f, tile=tile), student)
        assert abs(value) < 1e-12 and all(gradient.abs().max() < 1e-12 for gradient in gradients)


class Largest(TorchDispatchMode):
    "Entries of the largest tensor that any operation made"

    numel = 0

    def __torch_dispatch__(self, operation, types, given=(), options=None):
        out = operation(*given, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("loss", [lambda s, t: contrastive(s), affinity_mimicking, relational])
def test_memory_beyond_the_threshold_does_not_grow_with_the_square(loss, monkeypatch):
    assert tiles.TILE < tiles.TILED_ABOVE
    monkeypatch.setattr(tiles, "TILED_ABOVE", 256)
    monkeypatch.setattr(tiles, "TILE", 64)
    pairs = 300
    student, teacher = random_features(pairs, 8, 20.0, 0, torch.float32), random_features(pairs, 8, 20.0, 1, torch.float32)
    with Largest() as seen:
        loss(student, teacher).backward()
    assert 0 < seen.numel <= 64 * 64
    with Largest() as seen:
        contrastive(student, tile=0)
    assert seen.numel == pairs**2  # the measure does see the plain form's matrix


def test_small_batches_take_the_plain_form_and_frozen_students_cost_no_second_pass(monkeypatch):
    student, teacher = random_features(8, 5, 10.0, 0), random_features(8, 7, 10.0, 1)
    monkeypatch.setattr(tiles, "_second_pass", None)
    affinity_mimicking(student, teacher).backward()
    with torch.no_grad():
        affinity_mimicking(student, teacher, tile=4)
    with pytest.raises(ValueError, match="tile is -1; valid are"):
        contrastive(student, tile=-1)


@pytest.mark.parametrize("tile", [0, 16])
def test_half_precision_and_autocast_accumulate_in_float32(tile):
    student, teacher = random_features(48, 8, 100.0, 0, torch.bfloat16), random_features(48, 8, 100.0, 1, torch.bfloat16)
    wide = Features(*(leaf(part.detach(), torch.float32) for part in (student.image, student.text, student.scale)))
    wanted = value_and_gradients(lambda f: affinity_mimicking(f, teacher, tile=0), wide)
    got, inside = [], []
    for given, out in ((student, got), (wide, inside)):
        with torch.autocast("cpu", torch.bfloat16):
            value = affinity_mimicking(given, teacher, tile=tile)
        out.extend((value.detach(), *torch.autograd.grad(value, (given.image, given.text, given.scale))))
    assert got[0].dtype == torch.float32 and got[1].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=0)
    for half, full, reference in zip(got[1:], inside[1:], wanted[1:], strict=True):
        size = reference.abs().max().item()
        torch.testing.assert_close(full, reference, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(half.float(), reference, rtol=0, atol=1e-2 * size)


def test_wrong_sizes_are_errors_that_name_both():
    student, teacher = random_features(6, 4, 10.0, 0), random_features(6, 5, 10.0, 1)
    with pytest.raises(ValueError, match="student has 4 pairs, teacher has 6 pairs"):
        affinity_mimicking(student[:4], teacher)
    with pytest.raises(ValueError, match="student has 4 pairs, teacher has 6 pairs"):
        relational(teacher=teacher, student=student[:4])
    with pytest.raises(ValueError, match="student has 6 images but 5 texts"):
        contrastive(Features(student.image, student.text[:5], student.scale))
    with pytest.raises(ValueError, match="teacher has 6 images but 5 texts"):
        affinity_mimicking(student, Features(teacher.image, teacher.text[:5], teacher.scale))
    with pytest.raises(ValueError, match="no pairs"):
        contrastive(student[:0])
    with pytest.raises(ValueError, match=r"feature_mimicking.*\(4 and 5\).*Projection\(4, 5\)"):
        feature_mimicking(student, teacher)
    with pytest.raises(ValueError, match=r"interactive_contrastive.*\(4 and 5\).*Projection\(4, 5\)"):
        interactive_contrastive(student, teacher, 10.0)


def test_objective_sums_weighted_terms_and_skips_zeros():
    student, teacher = random_features(6, 4, 10.0, 0), random_features(6, 4, 12.0, 1)
    calls = []
    own = Term("own", lambda s, t: calls.append("own") or s.scale * 0 + 2.0, weight=0.25)
    objective = Objective({"affinity_mimicking": 1.0, "contrastive": 0.5, "relational": 0.0}, own)
    terms = objective(student, teacher)
    assert list(terms.values) == ["affinity_mimicking", "contrastive", "own"]
    wanted = affinity_mimicking(student, teacher) + 0.5 * contrastive(student) + 0.25 * 2.0
    torch.testing.assert_close(terms.total, wanted)
    assert terms.floats() == {"total": terms.total.item(), **{name: value.item() for name, value in terms.values.items()}}
    silent = objective.with_weights(own=0.0, relational=3.0, feature_mimicking=7.0)
    calls.clear()
    terms = silent(student, teacher)
    assert not calls and "own" not in terms.values
    assert silent.weights == {"affinity_mimicking": 1.0, "contrastive": 0.5, "relational": 3.0, "own": 0.0, "feature_mimicking": 7.0}
    assert objective.weights["own"] == 0.25
    torch.testing.assert_close(terms["relational"], relational(student, teacher))
    torch.testing.assert_close(
        LOSSES["interactive_contrastive"].function(student, teacher), interactive_contrastive(student, teacher, 12.0)
    )


def test_objective_refuses_what_it_cannot_do():
    own = Term("own", contrastive)
    for weights, terms, message in (
        ({"afinity": 1.0}, (), "no loss is called 'afinity'; valid names: affinity_mimicking, contrastive"),
        ({"contrastive": -1.0}, (), "weight of contrastive is -1.0"),
        ({"contrastive": math.nan}, (), "weight of contrastive is nan"),
        ({"contrastive": math.inf}, (), "weight of contrastive is inf"),
        ({"contrastive": 0.0}, (), "every weight is zero"),
        ({}, (), "every weight is zero"),
        ({}, (own, own), "in the way: own"),
        ({}, (Term("total", contrastive),), "in the way: total"),
    ):
        with pytest.raises(ValueError, match=message):
            Objective(weights, *terms)
    with pytest.raises(ValueError, match="no loss is called 'afinity'"):
        Objective({"contrastive": 1.0}).with_weights(afinity=1.0)


def test_a_loss_that_is_not_one_number_is_named():
    student, teacher = random_features(6, 4, 10.0, 0), random_features(6, 4, 12.0, 1)
    for value, said in ((student.image.sum(dim=1), r"a tensor of shape \(6,\)"), (1.0, "a float")):
        with pytest.raises(ValueError, match=f"the loss own gave {said}; it must give a tensor with one number"):
            Objective({}, Term("own", lambda s, t, value=value: value))(student, teacher)


def test_objective_projects_only_what_compares_rows_and_owns_its_parameters():
    student, teacher = random_features(6, 4, 10.0, 0), random_features(6, 5, 12.0, 1)
    project = Projection(4, 5).double()

    class Learnt(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, student, teacher):
            return interactive_contrastive(student, teacher, self.log_scale.exp())

    learnt = Learnt()
    objective = Objective({"contrastive": 1.0, "feature_mimicking": 2000.0}, Term("icl", learnt, needs_projection=True), project=project)
    terms = objective(student, teacher)
    torch.testing.assert_close(terms["contrastive"], contrastive(student))
    torch.testing.assert_close(terms["feature_mimicking"], feature_mimicking(project(student), teacher))
    torch.testing.assert_close(terms["icl"], interactive_contrastive(project(student), teacher, math.exp(2.0)), check_dtype=False)
    terms.total.backward()
    parameters = objective_parameters(objective.with_weights(contrastive=0.0))
    assert {id(p) for p in parameters} == {id(p) for p in (*project.parameters(), learnt.log_scale)}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_gradient_share_is_each_terms_part_of_the_pull():
    student, teacher = random_features(6, 4, 10.0, 0), random_features(6, 4, 12.0, 1)
    constant = Term("constant", lambda s, t: t.scale.detach() * 1.0)
    objective = Objective({"affinity_mimicking": 0.5, "contrastive": 2.0, "relational": 0.0}, constant)
    with torch.no_grad():  # as a view would call it
        shares = gradient_share(objective, student, teacher)
    norms = {}
    for name, value in (("affinity_mimicking", 0.5 * affinity_mimicking(student, teacher)), ("contrastive", 2 * contrastive(student))):
        norms[name] = torch.cat([g.flatten() for g in torch.autograd.grad(value, (student.image, student.text))]).norm().item()
    assert shares == pytest.approx({**{k: v / sum(norms.values()) for k, v in norms.items()}, "constant": 0.0}, rel=1e-6)
    assert student.image.grad is None
    assert gradient_share(Objective({"feature_mimicking": 1.0}), teacher, teacher) == {"feature_mimicking": 0.0}


def test_objective_prints_as_text_and_escaped_html():
    objective = Objective({"affinity_mimicking": 1.0, "contrastive": 0.0}, Term("a<b", contrastive, 2.5, formula="x < y & z"))
    text, page = repr(objective), objective._repr_html_()
    assert [line.split()[0] for line in text.splitlines()] == ["1", "0", "2.5"] and LOSSES["affinity_mimicking"].formula in text
    assert "a&lt;b" in page and "x &lt; y &amp; z" in page and "a<b" not in page


def clip_cid_rows(dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, 8, generator=random, dtype=torch.float64), dim=1).to(dtype) for n in (12, 12, 7)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_cluster_terms_against_their_formulas(dtype, margin):
    student, teacher, centers = clip_cid_rows(dtype)
    own = (teacher @ centers.T).argmax(1)
    leaves = [rows.clone().requires_grad_() for rows in (student, student)]
    value = cluster_classification(leaves[0], centers, own, 20.0, margin)
    angle = (leaves[1].double() @ centers.double().T).clamp(-1, 1).acos()
    asked = 20.0 * (angle + margin * F.one_hot(own, 7).double()).cos()
    wanted = -(asked - asked.logsumexp(1, keepdim=True))[torch.arange(12), own].mean()
    check_value(value, wanted.detach(), dtype)
    value.backward(), wanted.backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-3, atol=1e-5)
    p, q = ((s * rows.double() @ centers.double().T).softmax(1) for s, rows in ((9.0, teacher), (20.0, student)))
    check_value(cluster_distribution(student, teacher, centers, 20.0, 9.0), (p * (p / q).log()).sum(1).mean(), dtype)


def test_a_margin_makes_the_task_harder_and_never_wraps_around():
    centers = torch.eye(4)
    away = -centers[:1] * 0.999999
    losses_ = [cluster_classification(away, centers, torch.tensor([0]), 32.0, m).item() for m in (0.0, 0.1, 0.3, 1.0)]
    assert losses_ == sorted(losses_) and math.isfinite(losses_[-1])
    leaf_ = centers[:1].clone().requires_grad_()
    cluster_classification(leaf_, centers, torch.tensor([0]), 32.0, 0.3).backward()
    assert leaf_.grad.isfinite().all(), "a row that lies on its centre"


def test_sampled_classes_hold_the_batchs_own_and_repeat():
    for share, count in ((0.1, 100), (1.0, 1000), (0.0001, 3)):
        classes = sample_classes(torch.tensor([5, 5, 999, 0]), 1000, share, seed=4)
        assert len(classes) == count and {0, 5, 999} <= set(classes.tolist()) and torch.equal(classes, classes.unique())
    others = torch.stack([F.one_hot(sample_classes(torch.tensor([3]), 50, 0.5, seed=s), 50).sum(0) for s in range(400)]).float().mean(0)
    assert others[3] == 1 and ((others[torch.arange(50) != 3] - 24 / 49).abs() < 0.12).all(), "every other class equally often"
    with pytest.raises(ValueError, match="share=0"):
        sample_classes(torch.tensor([1]), 10, 0.0)


def test_cluster_terms_refuse_rows_of_another_width_and_hold_no_gradient():
    student, teacher, centers = clip_cid_rows(torch.float32)
    with pytest.raises(ValueError, match="Projection"):
        cluster_classification(student[:, :5], centers, torch.zeros(12, dtype=torch.long))
    holder = ClusterTerms(centers, share=0.5)
    terms = holder.terms({"cluster_classification": 1.0, "cluster_distribution": 2.0})
    objective = Objective({"contrastive": 0.0}, *terms)
    pair = [Features(rows.clone().requires_grad_(), rows, torch.tensor(10.0)) for rows in (student, teacher)]
    objective.draw(7)
    objective(*pair).total.backward()
    assert holder.draw == 7 and pair[0].image.grad is not None and pair[1].image.grad is None
    weighted = objective(*pair)
    assert weighted.total == weighted["cluster_classification"] + 2 * weighted["cluster_distribution"]
    with pytest.raises(ValueError, match="cluster terms need centres"):
        Objective({"cluster_distribution": 1.0})(*pair)
    with pytest.raises(ValueError, match="cluster_distribution cannot join an objective"):
        Objective({"contrastive": 1.0}).with_weights(cluster_distribution=1.0)


@pytest.mark.parametrize("tile", [0, 3, 100])
def test_instance_discrimination_is_two_contrastive_losses(tile):
    student, teacher, _ = clip_cid_rows(torch.float64)
    a, b = Features(student, teacher.flip(0), torch.tensor(3.0)), Features(teacher, student.roll(2, 0), torch.tensor(5.0))
    wanted = sum(contrastive(Features(x, y, torch.tensor(7.0).double()), 0) for x, y in ((a.image, b.image), (a.text, b.text))) / 2
    torch.testing.assert_close(instance_discrimination(a, b, 7.0, tile), wanted)
    assert LOSSES["instance_discrimination"].function(a, b) == instance_discrimination(a, b, 5.0), "the teacher's own scale"


SCORES = {"vl": losses.vision_language_score, "pvl": losses.pseudo_vision_language_score, "udist": losses.unimodal_distance}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prefix", ["", "alt_"])
@pytest.mark.parametrize("name", SCORES)
def test_dime_fm_is_golden(name, prefix, dtype):
    arrays = golden("dime_fm.npz")
    rows = {key: arrays[key].to(dtype) for key in ("student_image", "teacher_image", "teacher_text")}
    student = rows["student_image"].requires_grad_()
    texts = [rows["teacher_text"]] if name == "vl" else []
    given = dict(temperature=float(arrays[f"alt_t_{name}"])) if prefix else {}
    value = SCORES[name](student, rows["teacher_image"], *texts, **given)
    value.backward()
    wanted, slope = arrays[f"{prefix}{name}"], arrays[f"{prefix}{name}__grad_student_image"]
    if dtype == torch.float64:
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(student.grad, slope, rtol=1e-9, atol=1e-11)
    else:
        torch.testing.assert_close(value.detach().double(), wanted, rtol=3e-5, atol=0)
        assert (student.grad.double() - slope).abs().max() <= 1e-4 * slope.abs().max()


@pytest.mark.parametrize("total", ["total_no_flags", "total_pvl_flag", "total_both_flags", "alt_total"])
def test_dime_fms_objective_is_golden(total):
    arrays = golden("dime_fm.npz")
    alt = "alt_" if total == "alt_total" else ""
    weight = {name: float(arrays[f"{alt or 'default_'}w_{name}_loss"]) for name in SCORES}
    weight |= {"pvl": 0.0, "udist": 0.0} if total == "total_no_flags" else {"udist": 0.0} if total == "total_pvl_flag" else {}
    taus = [float(arrays[f"alt_t_{name}" if alt else f"default_t_{name}"]) for name in SCORES]
    terms = [replace(term, weight=w) for term, w in zip(losses.score_terms(100.0, taus), weight.values(), strict=True)]
    student = arrays["student_image"].requires_grad_()
    teacher = Features(arrays["teacher_image"], arrays["teacher_text"], torch.tensor(100.0))
    said = Objective({}, *terms)(Features(student, student[:0], torch.tensor(1.0)), teacher)
    said.total.backward()
    torch.testing.assert_close(said.total.detach(), arrays[total], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(student.grad, arrays[f"{total}__grad_student_image"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SCORES)
def test_dime_fm_in_half_precision_under_autocast_and_at_its_floor(name):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 8, generator=generator), torch.randn(4, 8, generator=generator)
    texts = [text] if name == "vl" else []
    with torch.autocast("cpu", torch.bfloat16):
        inside = SCORES[name](image + 0.1, image, *texts)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, SCORES[name](image + 0.1, image, *texts), rtol=1e-6, atol=0)
    assert SCORES[name](5 * image, image, *texts).abs() < 1e-5 < inside
    assert SCORES[name](image.half(), image.half(), *[t.half() for t in texts]).dtype == torch.float32
    student, teacher = image.clone().requires_grad_(), image.clone().requires_grad_()
    SCORES[name](student + 0.1, teacher, *texts).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_a_students_own_texts_count_and_may_be_of_another_width():
    generator = torch.Generator().manual_seed(1)
    image, text, own = (torch.randn(rows, width, generator=generator) for rows, width in ((6, 8), (4, 8), (6, 5)))
    texts = torch.randn(4, 5, generator=generator, requires_grad=True)
    value = losses.vision_language_score(own, image, text, student_text=texts)
    value.backward()
    assert texts.grad.abs().sum() > 0
    kept = losses.vision_language_score(image + 1, image, text)
    torch.testing.assert_close(losses.vision_language_score(image + 1, image, text, student_text=text), kept)
    with pytest.raises(ValueError, match="student_image is 5 wide, the texts 8"):
        losses.vision_language_score(own, image, text)
    with pytest.raises(ValueError, match="student_text has 3 rows, teacher_text 4"):
        losses.vision_language_score(own, image, text, student_text=texts[:3])


def test_one_sentence_is_no_error_and_none_is():
    image = torch.randn(5, 8)
    assert losses.vision_language_score(image, image.flip(0), torch.randn(1, 8)).isfinite()
    with pytest.raises(ValueError, match=r"teacher_text must be \(rows, width\) with at least one row"):
        losses.vision_language_score(image, image, torch.randn(0, 8))


def fused_by(arrays, dtype, multiplier):
    "CLIP-KD's AFD with the archive's layers, its scale given as the multiplier"
    augmented = AugmentedFeatures(8).to(dtype)
    for key, layer in {"visual_fusion_proj": augmented.image, "text_fusion_proj": augmented.text}.items():
        layer.load_state_dict({part: arrays[f"param/{key}.{part}"] for part in ("weight", "bias")})
    with torch.no_grad():
        augmented.log_scale.copy_(multiplier.log())
    return augmented


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("section", ["same_dim/", "same_dim_exp_scale/"])
def test_terms_across_the_models_are_clip_kds(section, dtype):
    arrays = golden("clip_kd.npz", "same_dim/")
    wanted = golden("clip_kd.npz", section)
    leaves, student = features(arrays, "student", dtype, unit=True)
    teacher_leaves, teacher = features(arrays, "teacher", dtype)
    scale = leaf(wanted["cross_logit_scale"], dtype)
    value = interactive_relational(student, teacher, scale)
    check(wanted, "cross_kd", value, {**named(leaves), "cross_logit_scale": scale}, dtype)

    leaves, student = features(arrays, "student", dtype, unit=True)
    augmented = fused_by(arrays, dtype, wanted["fusion_logit_scale"])
    value = augmented(student, teacher)
    check_value(value, wanted["afd"], dtype)
    value.backward()
    layers = {"visual_fusion_proj": augmented.image, "text_fusion_proj": augmented.text}
    for key, layer in layers.items():
        for part in ("weight", "bias"):
            check_gradient(getattr(layer, part).grad, wanted[f"afd__grad_{key}.{part}"], dtype)
    for side in ("image", "text"):
        check_gradient(leaves[side].grad, wanted[f"afd__grad_student_{side}"], dtype)
    of_multiplier = augmented.log_scale.grad / augmented.log_scale.exp()  # the archive's is of the multiplier itself
    check_gradient(of_multiplier.detach(), wanted["afd__grad_fusion_logit_scale"], dtype)
    assert all(value.grad is None for value in teacher_leaves.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_mimicking_is_the_papers_and_the_code_differs_by_its_temperature(dtype):
    arrays = golden("clip_kd.npz", "same_dim/")
    leaves, student = features(arrays, "student", dtype, unit=True)
    _, teacher = features(arrays, "teacher", dtype)
    check(arrays, "gd_temperature", gradient_mimicking(student, teacher), named(leaves), dtype)

    leaves, student = features(arrays, "student", dtype, unit=True)  # the official code takes the scale for a temperature
    flat = [replace(model, scale=1 / model.scale) for model in (student, teacher)]
    check(arrays, "gd", gradient_mimicking(*flat), named(leaves), dtype)


@pytest.mark.parametrize("name", ["gd", "cross_kd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_projected_terms_are_clip_kds_too(name, dtype):
    arrays = golden("clip_kd.npz", "projected/")
    project, layers = projection_of(arrays, dtype)
    leaves, student = features(arrays, "student", dtype)
    _, teacher = features(arrays, "teacher", dtype)
    parameters = {f"{key}.{part}": getattr(layer, part) for key, layer in layers.items() for part in ("weight", "bias")}
    near, further = project(student), {}
    if name == "gd":
        value = gradient_mimicking(replace(near, scale=1 / near.scale), replace(teacher, scale=1 / teacher.scale))
    else:
        further = {"cross_logit_scale": leaf(arrays["cross_logit_scale"], dtype)}
        value = interactive_relational(near, teacher, further["cross_logit_scale"])
    check(arrays, name, value, {**named(leaves), **parameters, **further}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["task", "ckd", "icl", "fd", "cross_kd"])
def test_an_objective_with_a_raw_projection_is_clip_kds(name, dtype):
    "Raw features in: projected as they are, and of unit length for every term without a projection; the scale learnt as it is"
    arrays = golden("clip_kd.npz", "projected/")
    project, layers = projection_of(arrays, dtype)
    project.raw = True
    leaves, student = features(arrays, "student", dtype)
    _, teacher = features(arrays, "teacher", dtype)
    across = {"icl": interactive_contrastive, "cross_kd": interactive_relational}
    terms = {"task": {"contrastive": 1.0}, "ckd": {"relational": 1.0}, "fd": {"feature_mimicking": 1.0}}
    own, further = (), {}
    if name in across:
        learnt = LearntScale(across[name], float(arrays["cross_logit_scale"]), exponential=False).to(dtype)
        with torch.no_grad():
            learnt.scale.copy_(torch.as_tensor(arrays["cross_logit_scale"]))
        own, further = (Term(name, learnt, needs_projection=True),), {"cross_logit_scale": learnt.scale}
    objective = Objective(terms.get(name, {}), *own, project=project)
    parameters = {}
    if name not in ("task", "ckd"):
        parameters = {f"{key}.{part}": getattr(layer, part) for key, layer in layers.items() for part in ("weight", "bias")}
    check(arrays, name, objective(student, teacher).total, {**named(leaves), **parameters, **further}, dtype)


def test_of_a_set_of_teachers_only_raw_projections_see_raw_rows():
    "The teacher of the same width is compared with unit rows, one behind a plain projection too"
    student = random_features(5, 6, 9.0, seed=1)
    long = replace(student, image=3 * student.image.detach(), text=0.5 * student.text.detach())
    teachers = [random_features(5, width, 9.0, seed=width) for width in (6, 8, 10)]
    plain, raw = Projection(6, 8).double(), Projection(6, 10, raw=True).double()
    objective = Objective({"feature_mimicking": 1.0, "contrastive": 1.0}, project=(None, plain, raw))
    values = objective(long, Ensemble(tuple(teachers), (0.5, 0.3, 0.2)))
    expected = 0.5 * feature_mimicking(student, teachers[0]) + 0.3 * feature_mimicking(plain(student), teachers[1])
    expected = expected + 0.2 * feature_mimicking(raw(long), teachers[2])
    torch.testing.assert_close(values["feature_mimicking"], expected)
    torch.testing.assert_close(values["contrastive"], contrastive(student))


def open_clips_sigmoid_loss(image, text, scale, bias):
    "open_clip's own SigLipLoss, the reference"
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(image, text, scale, bias)


@pytest.mark.parametrize("chunk", [None, 0, 1, 4, 7])
def test_the_sigmoid_loss_is_open_clips(chunk):
    student = random_features(13, 6, 9.0, seed=4)
    bias = torch.tensor(-8.0, dtype=torch.float64, requires_grad=True)
    parts = [student.image, student.text, student.scale, bias]
    wanted = open_clips_sigmoid_loss(*parts)
    value = sigmoid_contrastive(BiasedFeatures(*parts), chunk)
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=0)
    for ours, theirs in zip(torch.autograd.grad(value, parts), torch.autograd.grad(wanted, parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [sigmoid_contrastive, lambda s, c: sigmoid_mimicking(s, s.detach(), c)])
def test_a_chunk_bounds_the_memory_of_the_sigmoid_losses(loss):
    student = random_features(300, 6, 9.0, seed=4)
    student = BiasedFeatures(student.image, student.text, student.scale, torch.tensor(-8.0).double().requires_grad_())
    sizes = []
    for chunk in (10, 0):
        with Largest() as largest:
            loss(student, chunk).backward()
        sizes.append(largest.numel)
    assert sizes == [300 * 10, 300 * 300]
