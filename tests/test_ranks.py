"Losses over ranks: real processes against one, for every registered loss; values, gradients, and the work counted"

import json
import math

import forked
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlkd_lab.blip_losses import queued_contrast
from vlkd_lab.features import Features, gather
from vlkd_lab.losses import LOSSES, affinity_mimicking, contrastive, over_ranks, tiles
from vlkd_lab.rank_rows import RankRows, rank_threads

RANKS = """
import json, sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vlkd_lab.features import Ensemble, Features, as_features
from vlkd_lab.losses import (AugmentedFeatures, ClusterTerms, Objective, Projection, Term, affinity_mimicking, contrastive, feature_mimicking, sigmoid_contrastive, sigmoid_mimicking,
    interactive_contrastive, over_ranks, relational, score_terms, vision_language_score)
from vlkd_lab.methods import all_losses
from vlkd_lab.rank_rows import all_ranks

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
B, M, D, W = 24, 32, 7, 9  # pairs, sentences, widths of student and teacher


def random_rows(count, width, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=random, dtype=torch.float64)


def slices(texts):
    each = [B // world, texts // world]
    return [slice(rank * n, (rank + 1) * n) for n in each]


class Towers(nn.Module):
    "A student of two layers and a scale, and what a loss brings along"

    def __init__(self, width, projection=False):
        super().__init__()
        torch.manual_seed(5)
        self.image, self.text = nn.Linear(5, width), nn.Linear(5, width)
        self.log_scale = nn.Parameter(torch.tensor(2.1))
        self.project = Projection(width, W) if projection else None
        self.double()

    def forward(self, image, text):
        rows = (F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1))
        return Features(*rows, self.log_scale.exp())


def teacher_of(rows, texts, width, seed=9):
    sides = (random_rows(B, width, seed)[rows], random_rows(M, width, seed + 1)[texts])
    return Features(*(F.normalize(side, dim=1) for side in sides), torch.tensor(11.0, dtype=torch.float64))


def run(loss_of, shared, width, teachers, count, projection, with_teacher=True):
    "Value, gradients of all weights as data-parallel training leaves them, and floating-point operations"
    rows, texts = slices(count) if shared else (slice(0, B), slice(0, count))
    model = Towers(width, projection)
    student = model(random_rows(B, 5, 0)[rows], random_rows(M, 5, 1)[texts])
    members = [teacher_of(rows, texts, teacher_width, seed) for teacher_width, seed in teachers]
    teacher = members[0] if len(members) == 1 else Ensemble(tuple(members), (0.7, 0.3))
    loss = loss_of(model)
    if not with_teacher:
        teacher = None
    with FlopCounterMode(display=False) as counter:
        if shared:
            value = over_ranks(loss, student, teacher)
        else:
            value = loss(student) if teacher is None else loss(student, teacher)
            value = getattr(value, "total", value)
        value.backward()
    gradient = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in model.parameters()])
    if shared:
        dist.all_reduce(gradient)
        gradient /= world
    return value.detach(), gradient, counter.get_total_flops()


centers = F.normalize(random_rows(10, W, 3), dim=1)
clusters = lambda share: ClusterTerms(centers, margin=0.2, share=share).terms({name: 1.0 for name, t in LOSSES.items() if t.centers})
LOSSES = all_losses()
functions = {name: term.function for name, term in LOSSES.items() if not (term.centers or term.module or term.build)}
bias = torch.tensor(-3.0, dtype=torch.float64)
biased = lambda loss: lambda *models: loss(*(as_features(f.image, f.text, f.scale, bias) for f in models))
functions |= {name: biased(term.function) for name, term in LOSSES.items() if term.needs_bias}
functions["sigmoid, chunk"] = biased(lambda s, t: sigmoid_contrastive(s, 3))
functions["answers, chunk"] = biased(lambda s, t: sigmoid_mimicking(s, t, 3))
torch.manual_seed(7)
functions["augmented_features"] = AugmentedFeatures(W).double()
functions |= {term.name: term.function for term in clusters(1.0)}
functions |= {f"{term.name}, sampled": term.function for term in clusters(0.6)}
functions |= {f"{term.name}, both towers": term.function for term in score_terms(own_text=True)}
functions |= {f"{name}, tile {tile}": (lambda s, t, loss=loss, tile=tile: loss(s, t, tile))
    for tile in (5, 100) for name, loss in (("affinity", affinity_mimicking), ("relational", relational))}
functions |= {f"contrastive, tile {tile}": (lambda s, t, tile=tile: contrastive(s, tile)) for tile in (5,)}
functions["scores as tensors"] = lambda s, t: vision_language_score(s.image, t.image, t.text, 30.0)
functions["sum"] = lambda s, t: contrastive(s) + 2 * affinity_mimicking(s, t)
cases = {}
for name, function in functions.items():
    cases[name] = dict(loss_of=(lambda model, function=function: function), width=W, teachers=[(W, 9)], count=B, projection=False)
for name, term in LOSSES.items():
    if term.unpaired:
        cases[f"{name}, unpaired"] = cases[name] | dict(count=M)


def alone(s, t):
    return (s.image @ s.image.T - t.image @ t.image.T).square().mean()


class Learnt(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher):
        return interactive_contrastive(student, teacher, self.scale.exp())


foreign = {"unaware": alone, "not a sum": lambda s, t: alone(s, t) * contrastive(s) + relational(s, t).exp(),
    "half": lambda s, t: contrastive(Features(s.image + 0.1, s.text, s.scale))}
for name, function in foreign.items():
    cases[name] = dict(loss_of=(lambda model, function=function: function), width=W, teachers=[(W, 9)], count=B, projection=False)
cases["without a teacher"] = cases["contrastive"] | dict(loss_of=lambda model: contrastive, with_teacher=False)
weights = {"affinity_mimicking": 1.0, "feature_mimicking": 20.0, "interactive_contrastive": 0.5, "instance_discrimination": 0.3}
cases["projection"] = dict(loss_of=lambda model: Objective(weights, project=model.project), width=D, teachers=[(W, 9)], count=B, projection=True)
cases["learnt scale"] = cases["contrastive"] | dict(loss_of=lambda model: Learnt(model.log_scale))
cases["set"] = cases["projection"] | dict(loss_of=lambda model: Objective(weights, project=(None, model.project)), teachers=[(D, 9), (W, 30)])

mine, ranks = torch.tensor([[1.0 + rank], [2.0 + 2 * rank]]), all_ranks()
assert ranks.highest(mine).tolist() == [[world], [2 * world]] and ranks.total(mine)[0].item() == sum(range(world + 1))
assert ranks.joined(mine)[ranks.rows(2)].equal(mine) and mine[0].item() == 1 + rank
told = {}
for name, case in cases.items():
    value, gradient, flops = run(shared=True, **case)
    whole, wanted, flops_of_one = run(shared=False, **case)
    assert gradient.abs().max() > 0, name
    off = (gradient - wanted).abs().max().item() / wanted.abs().max().item()
    told[name] = [value.item(), whole.item(), off, flops, flops_of_one]
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12 * wanted.abs().max().item()), (name, off)
try:
    rows = slice(0, 2 + rank)
    over_ranks(contrastive, Towers(W)(random_rows(B, 5, 0)[rows], random_rows(M, 5, 1)[rows]), None)
    raise AssertionError("uneven ranks went through")
except ValueError as error:
    assert f"ranks 0 to {world - 1} have 2, 3" in str(error), error
if rank == world - 1:
    open(sys.argv[1], "w").write(json.dumps(told))
dist.destroy_process_group()
"""

WHOLE = ("unaware", "not a sum", "half")  # what knows nothing of ranks, alone or beside ours


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    "How many processes there were, and what the last one found"
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    forked.run(str(folder / "ranks.py"), str(folder / "told.json"), processes=request.param)
    return request.param, json.loads((folder / "told.json").read_text())


def test_every_registered_loss_over_processes_is_that_of_one(ranks):
    _, told = ranks
    assert {name for name, term in LOSSES.items() if not term.module} <= told.keys()
    for name, (value, whole, off, _, _) in told.items():
        assert math.isclose(value, whole, rel_tol=1e-10, abs_tol=1e-13), name
        assert off < 1e-10, name


def test_a_process_computes_its_share_of_every_loss_of_ours(ranks):
    world, told = ranks
    for name, (_, _, _, flops, flops_of_one) in told.items():
        if name not in WHOLE:
            assert flops <= 1.15 / world * flops_of_one, name
            assert flops > 0 or name == "feature_mimicking", name
    assert told["unaware"][3] > 0.9 * told["unaware"][4], "the measure sees what is computed in whole"


def random_features(pairs, width=6, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(pairs, width, generator=random, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]
    return Features(*rows, torch.tensor(7.0, dtype=dtype))


def test_one_process_pays_nothing():
    student, teacher = random_features(5), random_features(5, seed=1)
    assert gather(student) is student
    assert over_ranks(affinity_mimicking, student, teacher).equal(affinity_mimicking(student, teacher))
    assert over_ranks(LOSSES["contrastive"].function, student, None).equal(contrastive(student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_over_ranks(dtype):
    student, teacher = random_features(12, dtype=dtype), random_features(12, seed=1, dtype=dtype)
    wanted = affinity_mimicking(student, teacher)

    def work(ranks):
        rows = ranks.rows(4)
        leaf = student.image[rows].clone().requires_grad_()
        own = Features(leaf, student.text[rows], student.scale)
        with torch.autocast("cpu", torch.bfloat16):
            value = over_ranks(affinity_mimicking, own, teacher[rows], ranks)
        value.backward()
        return value.detach(), leaf.grad

    for value, gradient in rank_threads(3, work):
        assert value.dtype == torch.float32 and gradient.dtype == dtype and gradient.abs().max() > 0
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1.0, 100.0, 2000.0])
def test_tiles_of_ranks_are_exact_at_any_scale(scale):
    student, teacher = random_features(12), random_features(12, width=9, seed=1)
    student = Features(student.image, student.text, torch.tensor(scale).double())
    for loss in (contrastive, lambda s, tile: affinity_mimicking(s, teacher, tile)):
        assert torch.isfinite(loss(student, tile=5))

    def work(ranks):
        rows = ranks.rows(4)
        return [over_ranks(lambda s, t, tile=tile: affinity_mimicking(s, t, tile), student[rows], teacher[rows], ranks) for tile in (0, 3)]

    for plain, tiled in rank_threads(3, work):
        torch.testing.assert_close(plain, affinity_mimicking(student, teacher), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(tiled, plain, rtol=1e-10, atol=1e-12)


def test_large_batches_of_ranks_are_tiled(monkeypatch):
    monkeypatch.setattr(tiles, "TILED_ABOVE", 8)
    monkeypatch.setattr(tiles, "TILE", 4)
    student, calls = random_features(12), []
    first = tiles._first_pass

    def seen(own, teacher, tile, *others):
        calls.append((len(own.image), len(own.text), tile))
        return first(own, teacher, tile, *others)

    monkeypatch.setattr(tiles, "_first_pass", seen)
    rank_threads(3, lambda ranks: over_ranks(contrastive, student[ranks.rows(4)], None, ranks))
    assert calls == [(4, 12, 4)] * 3


def test_who_looks_at_gathered_features_may_do_so_alone():
    "What was detached is computed in whole: the first rank alone shows the terms' shares of the gradient"
    student = random_features(8)

    def work(ranks):
        whole = gather(student[ranks.rows(4)], ranks)
        assert isinstance(whole.image, RankRows) and not isinstance(whole.detach().image, RankRows)
        return contrastive(whole.detach()).item() if ranks.number == 0 else None

    assert rank_threads(2, work) == [pytest.approx(contrastive(student).item()), None]


def test_a_rank_that_fails_ends_all():
    def work(ranks):
        if ranks.number == 2:
            raise RuntimeError("out of memory")
        return ranks.total(torch.ones(1))

    with pytest.raises(RuntimeError, match="out of memory"):
        rank_threads(3, work)


def test_blips_contrast_is_shared_as_well():
    student, momentum, queue = random_features(12), random_features(12, seed=1), random_features(5, seed=2)
    ids, rows_of_queue = torch.arange(12) % 7, (queue.image, queue.text, torch.arange(5) + 6)

    def gradient(rows, join):
        leaf = student.image[rows].clone().requires_grad_()
        value = queued_contrast(join(Features(leaf, student.text[rows], student.scale)), momentum, ids, rows_of_queue)
        value.backward()
        return value.detach(), leaf.grad

    whole, wanted = gradient(slice(None), gather)
    with FlopCounterMode(display=False) as counter:
        gradient(slice(None), gather)
    flops = []

    def work(ranks):
        def join(features):
            return gather(features, ranks)

        if ranks.number:
            return gradient(ranks.rows(3), join)
        with FlopCounterMode(display=False) as counter:
            result = gradient(ranks.rows(3), join)
        flops.append(counter.get_total_flops())
        return result

    values, gradients = zip(*rank_threads(4, work), strict=True)
    torch.testing.assert_close(values[2], whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(gradients) / 4, wanted, rtol=1e-4, atol=1e-7)
    assert 0 < flops[0] * 4 == counter.get_total_flops()
