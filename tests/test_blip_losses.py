"""BLIP's losses and what its distillation compares, each against a slow version in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from vlkd_lab.blip_losses import (
    Queue,
    attention_divergence,
    cosine_distance,
    counted_mean,
    hard_negatives,
    language_modelling,
    layer_partners,
    layers_divergence,
    logit_divergence,
    matching,
    next_tokens,
    queued_contrast,
)
from vlkd_lab.features import Features

CHANCE = torch.Generator()


@pytest.fixture(autouse=True)
def same_chance():
    CHANCE.manual_seed(0)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=CHANCE, dtype=dtype)


def unit(*shape):
    return F.normalize(noise(*shape), dim=-1)


def shares(*shape, keep=None):
    "Rows that add up to 1; keep: (B, K) bool, which positions get any"
    scores = noise(*shape) * 2
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -math.inf)
    return scores.softmax(dim=-1)


def lengths(*counts):
    return torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]


def same_gradient(fast, slow, leaf):
    "Value and gradient of two functions of one tensor"
    results = []
    for function in (fast, slow):
        moved = leaf.detach().clone().requires_grad_()
        value = function(moved)
        value.backward()
        results.append((value.detach().double(), moved.grad))
    (a, da), (b, db) = results
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), (float(a), float(b))
    assert torch.allclose(da, db, rtol=1e-4, atol=1e-5) and da.abs().sum() > 0


# Queue


@pytest.mark.parametrize("length", [0, 1, 5, 7, 16])
def test_a_queue_holds_exactly_the_newest_pairs_after_any_batches(length):
    queue, kept, number = Queue(length, 3), [], 0
    for step in range(40):
        batch = int(torch.randint(0, 12, (), generator=CHANCE))
        if step == 20:
            state = {name: tensor.clone() for name, tensor in queue.state_dict().items()}
            queue = Queue(length, 3)
            queue.load_state_dict(state)
        names = torch.arange(number, number + batch)
        queue.add(names[:, None] + torch.tensor([0.0, 0.25, 0.5]), -names[:, None].float().expand(-1, 3), names)
        kept, number = [*kept, *names.tolist()][-length:] if length else [], number + batch
        image, text, held = queue.rows()
        assert sorted(held.tolist()) == kept and int(queue.seen) == number
        assert torch.equal(image[:, 1], held + 0.25) and torch.equal(text[:, 2], -held.float()), "the three stay together"


def test_a_queue_takes_any_precision_and_no_gradient():
    queue, rows = Queue(4, 2), torch.randn(3, 2, requires_grad=True)
    queue.add(rows.bfloat16(), rows.half(), torch.arange(3))
    assert queue.image.dtype == torch.float32 and not queue.rows()[0].requires_grad and queue.rows()[0].isfinite().all()
    with pytest.raises(ValueError, match="-1"):
        Queue(-1, 2)


# Contrast


def slow_contrast(image, text, slow_image, slow_text, scale, names, held, alpha):
    total = 0.0
    sides = ((image, slow_image, torch.cat([slow_text, held[1]])), (text, slow_text, torch.cat([slow_image, held[0]])))
    labels = [*names.tolist(), *held[2].tolist()]
    for mine, theirs, rows in sides:
        for i in range(len(mine)):
            scores = torch.stack([scale * (mine[i] * row).sum() for row in rows])
            beliefs = torch.stack([(scale.detach() * (theirs[i] * row).sum()).exp() for row in rows])
            right = torch.tensor([float(label == labels[i]) for label in labels], dtype=scores.dtype)
            target = alpha * beliefs / beliefs.sum() + (1 - alpha) * right / right.sum()
            total = total - (target * (scores - scores.exp().sum().log())).sum()
    return total / len(image) / 2


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("queued", [0, 1, 9], ids=lambda n: f"queue{n}")
def test_the_contrast_is_the_slow_one(alpha, queued):
    slow = Features(unit(5, 4), unit(5, 4), torch.tensor(4.0))
    names, held = torch.tensor([3, 1, 3, 2, 0]), (unit(queued, 4), unit(queued, 4), torch.arange(queued) % 5)
    text, scale = unit(5, 4), torch.tensor(3.0, dtype=torch.float64)
    image = unit(5, 4)
    same_gradient(
        lambda x: queued_contrast(Features(x, text, scale), slow, names, held, alpha),
        lambda x: slow_contrast(x, text, slow.image, slow.text, scale, names, held, alpha),
        image,
    )
    same_gradient(
        lambda s: queued_contrast(Features(image, text, s), slow, names, held, alpha),
        lambda s: slow_contrast(image, text, slow.image, slow.text, s, names, held, alpha),
        scale,
    )


def test_no_gradient_reaches_the_slow_copy_or_the_queue():
    leaves = [unit(3, 4).requires_grad_() for _ in range(5)]
    image, slow_image, slow_text, old_image, old_text = leaves
    held = (old_image, old_text, torch.arange(3))
    slow = Features(slow_image, slow_text, torch.tensor(2.0, requires_grad=True))
    queued_contrast(
        Features(image, unit(3, 4), torch.tensor(2.0)), slow, torch.arange(3), (held[0].detach(), held[1].detach(), held[2])
    ).backward()
    assert image.grad is not None and slow_image.grad is slow_text.grad is slow.scale.grad is None


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_is_a_share(alpha):
    some = Features(unit(2, 4), unit(2, 4), torch.tensor(2.0))
    with pytest.raises(ValueError, match="from 0 to 1"):
        queued_contrast(some, some, torch.arange(2), None, alpha)


# Hard negatives


def test_hard_negatives_are_drawn_as_often_as_they_are_similar():
    names, draws = torch.tensor([0, 1, 2, 1, 3]), 2000
    similarity = 1.5 * noise(5, 5)
    fine = names[:, None] != names
    texts, images = torch.zeros(5, 5), torch.zeros(5, 5)
    for seed in range(draws):
        text, image = hard_negatives(similarity, names, seed)
        texts[torch.arange(5), text] += 1
        images[torch.arange(5), image] += 1
    for counts, scores in ((texts, similarity), (images, similarity.T)):
        chances = scores.masked_fill(~fine, -math.inf).softmax(1)
        assert (counts[~fine] == 0).all(), "neither itself nor the same words"
        chi = ((counts - draws * chances) ** 2 / (draws * chances))[fine].sum()
        assert chi < 40, "about (18 − 5) degrees of freedom"
    assert not torch.allclose(texts / draws, images / draws, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_wrong_partners_are_wrong_however_sure_the_model_is(dtype, size):
    for batch in (2, 3, 7):
        for kinds in (1, 2, batch):
            names = torch.arange(batch) % kinds
            scores = (size * (2 * torch.eye(batch) - 1)).to(dtype)
            for seed in range(5):
                for drawn in hard_negatives(scores, names, seed):
                    assert (drawn != torch.arange(batch)).all()
                    if kinds > 1:
                        assert (names[drawn] != names).all()


def test_a_model_that_has_diverged_still_has_wrong_partners():
    text, image = hard_negatives(torch.full((4, 4), torch.nan), torch.arange(4), seed=0)
    assert all(partner != own for partners in (text.tolist(), image.tolist()) for own, partner in enumerate(partners))


def test_seeds_decide_and_the_global_generator_is_left_alone():
    scores, names = noise(6, 6), torch.arange(6)
    before = torch.get_rng_state()
    a, b = hard_negatives(scores, names, 5), hard_negatives(scores, names, 5)
    assert torch.equal(torch.stack(a), torch.stack(b)) and torch.equal(before, torch.get_rng_state())
    assert len({tuple(torch.stack(hard_negatives(scores, names, seed)).flatten().tolist()) for seed in range(10)}) > 5
    with pytest.raises(ValueError, match="at least 2"):
        hard_negatives(scores[:1, :1], names[:1], 0)


# Matching and words


def test_matching_is_the_slow_one():
    targets, logits = torch.tensor([1, 0, 0, 1]), noise(4, 2)
    same_gradient(
        lambda x: matching(x, targets),
        lambda x: -sum((x[i, t].exp() / x[i].exp().sum()).log() for i, t in enumerate(targets.tolist())) / 4,
        logits,
    )
    for wrong in ((noise(4, 3), targets), (noise(4), targets), (noise(3, 2), targets)):
        with pytest.raises(ValueError, match="matching takes"):
            matching(*wrong)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_language_modelling_is_the_slow_one(smoothing, prompt):
    tokens, mask = torch.randint(1, 11, (3, 6), generator=CHANCE), lengths(6, 4, 1)
    targets, logits = next_tokens(tokens, mask, prompt), noise(3, 6, 11)
    asked = [(b, i) for b in range(3) for i in range(5) if mask[b, i + 1] and i >= prompt]
    assert {(b, i) for b, i in (targets != -100).nonzero().tolist()} == set(asked)
    assert all(targets[b, i] == tokens[b, i + 1] for b, i in asked)

    def slowly(x):
        total = x.sum() * 0
        for b, i in asked:
            said = x[b, i] - x[b, i].exp().sum().log()
            total = total - (1 - smoothing) * said[tokens[b, i + 1]] - smoothing * said.mean()
        return total / max(len(asked), 1)

    if asked:
        same_gradient(lambda x: language_modelling(x, targets, smoothing), slowly, logits)
    else:
        moved = logits.requires_grad_()
        language_modelling(moved, targets, smoothing).backward()
        assert not moved.grad.any()
    with pytest.raises(ValueError, match="one target a position"):
        language_modelling(logits[:, :-1], targets)


# Rows and logits


@pytest.mark.parametrize("counts", [(4, 4), (4, 1), (1, 2)], ids=str)
def test_cosine_distance_is_the_slow_one(counts):
    mask, student, teacher = lengths(*counts, 4)[:2], noise(2, 4, 5), noise(2, 4, 5)
    places = mask.nonzero().tolist()
    same_gradient(
        lambda x: cosine_distance(x, teacher, mask),
        lambda x: (
            sum(1 - (x[b, i] @ teacher[b, i]) / (x[b, i] @ x[b, i]).sqrt() / (teacher[b, i] @ teacher[b, i]).sqrt() for b, i in places)
            / len(places)
        ),
        student,
    )
    with pytest.raises(ValueError, match="project"):
        cosine_distance(student, teacher[..., :3])
    with pytest.raises(ValueError, match="mask"):
        cosine_distance(student, teacher, mask[:, :3])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("counts", [None, (3, 1)], ids=["all", "some"])
def test_logit_divergence_is_the_slow_one(temperature, counts):
    mask, student, teacher = counts and lengths(*counts), noise(2, 3, 7), noise(2, 3, 7)
    places = (torch.ones(2, 3) if mask is None else mask).nonzero().tolist()

    def slowly(x):
        total = 0.0
        for b, i in places:
            p, q = ((y[b, i] / temperature).exp() / (y[b, i] / temperature).exp().sum() for y in (teacher, x))
            total = total + temperature**2 * sum(p[c] * (p[c] / q[c]).log() for c in range(7)) / len(places)
        return total

    same_gradient(lambda x: logit_divergence(x, teacher, mask, temperature), slowly, student)
    with pytest.raises(ValueError, match="same tokens"):
        logit_divergence(student, teacher[:, :2])


# Attention


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 12), (2, 4), (3, 4), (6, 4), (5, 12)], ids=str)
def test_layers_are_partners_by_depth(student, teacher):
    partners = layer_partners(student, teacher)
    assert len(partners) == student and partners[-1] == teacher - 1 and list(partners) == sorted(partners)
    assert all(
        abs((k + 1) / teacher - (i + 1) / student) <= max(0.5 / teacher, abs(1 / teacher - (i + 1) / student)) + 1e-9
        for i, k in enumerate(partners)
    )
    for wrong in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least one"):
            layer_partners(*wrong)


def overlap(own, side):
    "Which share of each of `own` stripes lies in each of `side` stripes of the same whole, one pair at a time"
    return [[max(0.0, min((i + 1) / side, (j + 1) / own) - max(i / side, j / own)) * own for j in range(own)] for i in range(side)]


def slow_grid(row, side, summed):
    "[CLS] and patches of one row on another grid: what falls into a cell is added, or averaged by area"
    own = math.isqrt(len(row) - 1)
    if own == side:
        return list(row)
    parts, made = overlap(own, side), [row[0]]
    for r in range(side):
        for c in range(side):
            weights = [(parts[r][i] * parts[c][j], 1 + own * i + j) for i in range(own) for j in range(own)]
            total = 1.0 if summed else sum(weight for weight, _ in weights)
            made.append(sum(weight * row[place] for weight, place in weights) / total)
    return made


def slow_attention(student, teacher, mask, image_queries, image_keys):
    rows = []
    for b in range(len(student)):
        mine = sum(student[b, h] for h in range(student.shape[1])) / student.shape[1]
        theirs = sum(teacher[b, h] for h in range(teacher.shape[1])) / teacher.shape[1]
        if image_keys:
            theirs = torch.stack([torch.stack(slow_grid(row, math.isqrt(mine.shape[1] - 1), True)) for row in theirs])
        if image_queries:
            theirs = torch.stack([torch.stack(slow_grid(row, math.isqrt(mine.shape[0] - 1), False)) for row in theirs.T]).T
        for q in range(len(mine)):
            if mask is None or mask[b, q]:
                rows.append(sum(p * (p / m).log() for p, m in zip(theirs[q], mine[q], strict=True) if p > 0))
    return sum(rows) / len(rows)


grids = pytest.mark.parametrize(
    ("own", "side"), [(2, 2), (4, 2), (2, 4), (3, 6), (4, 3), (5, 3), (3, 2), (2, 3), (3, 4)], ids=lambda n: str(n)
)


@grids
@pytest.mark.parametrize("kind", ["image", "across"])
def test_attention_is_compared_cell_by_cell(own, side, kind):
    "own: patches on a side of the teacher, side: of the student"
    if kind == "image":
        student, teacher, mask = shares(2, 2, 1 + side**2, 1 + side**2), shares(2, 3, 1 + own**2, 1 + own**2), None
    else:
        student, teacher, mask = shares(2, 3, 3, 1 + side**2), shares(2, 2, 3, 1 + own**2), lengths(3, 1)
    given = (mask, kind == "image", True)
    same_gradient(lambda x: attention_divergence(x, teacher, *given), lambda x: slow_attention(x, teacher, *given), student)


@grids
def test_a_grid_keeps_every_share_and_its_place(own, side):
    "All the attention in one corner stays there: no divergence is less than that of a student who looks into the same corner"
    teacher = torch.zeros(1, 1, 1, 1 + own**2)
    teacher[..., -1] = 1.0
    values = []
    for place in range(1 + side**2):
        student = torch.full((1, 1, 1, 1 + side**2), 1e-3)
        student[..., place] = 1 - 1e-3 * side**2
        values.append(float(attention_divergence(student, teacher, None, False, True)))
    assert values[0] > values[-1] + 1 and min(values) > values[-1] - 1e-6 > -2e-6
    even = torch.full((1, 1, 1, 1 + own**2), 1 / (1 + own**2))
    wanted = torch.cat([torch.full((1,), 1 / (1 + own**2)), torch.full((side**2,), own**2 / (1 + own**2) / side**2)]).expand(1, 1, 1, -1)
    assert attention_divergence(wanted, even, None, False, True).abs() < 1e-6


@pytest.mark.parametrize("heads", [(1, 4), (4, 1), (3, 2)], ids=str)
def test_attention_within_a_text_has_no_part_for_padding(heads):
    mask = lengths(4, 2)
    student, teacher = shares(2, heads[0], 4, 4, keep=mask), shares(2, heads[1], 4, 4, keep=mask)
    same_gradient(
        lambda x: attention_divergence(x, teacher, mask), lambda x: slow_attention(x, teacher, mask, False, False), student.clamp(min=1e-7)
    )
    longer = [F.pad(maps, (0, 3, 0, 3)) for maps in (student, teacher)]
    longer[1][:, :, 4:, 0] = 1.0
    wide = F.pad(mask, (0, 3))
    assert torch.allclose(attention_divergence(*longer, wide), attention_divergence(student, teacher, mask))


def test_layers_are_compared_with_their_partners_and_equal_ones_are_at_rest():
    mask = lengths(3, 2)
    mine, theirs = [shares(2, 2, 3, 3, keep=mask) for _ in range(2)], [shares(2, 3, 3, 3, keep=mask) for _ in range(5)]
    by_hand = sum(attention_divergence(a, theirs[k], mask) for a, k in zip(mine, layer_partners(2, 5), strict=True)) / 2
    assert torch.allclose(layers_divergence(mine, theirs, mask), by_hand) and by_hand > 0
    assert layers_divergence(mine, mine, mask).abs() < 1e-6
    with pytest.raises(ValueError, match="same tokens"):
        attention_divergence(shares(1, 1, 3, 3), shares(1, 1, 4, 4))
    with pytest.raises(ValueError, match="square"):
        attention_divergence(shares(1, 1, 3, 5), shares(1, 1, 3, 7), None, False, True)


# What all have in common


def test_means_are_over_what_counts():
    values, mask = noise(3, 4), lengths(4, 1, 2)
    assert torch.allclose(counted_mean(values, mask), values[mask].mean()) and torch.allclose(counted_mean(values), values.mean())
    with pytest.raises(ValueError, match="mask"):
        counted_mean(values, mask[0])


def all_losses(student, teacher, maps, teacher_maps, mask):
    targets = torch.randint(0, student.shape[-1], mask.shape, generator=CHANCE).masked_fill(~mask, -100)
    return {
        "words": language_modelling(student, targets),
        "matching": matching(student[:, 0, :2], torch.tensor([0, 1])),
        "rows": cosine_distance(student, teacher, mask),
        "logits": logit_divergence(student, teacher, mask, 2.0),
        "attention": attention_divergence(maps, teacher_maps, mask),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_losses_and_gradients_stay_finite(dtype, size):
    mask = lengths(3, 1)
    student, teacher = ((size * noise(2, 3, 6, dtype=torch.float32)).to(dtype).requires_grad_() for _ in range(2))
    maps, teacher_maps = (((size * noise(2, 2, 3, 3, dtype=torch.float32)).softmax(-1)).to(dtype).requires_grad_() for _ in range(2))
    for name, value in all_losses(student, teacher, maps, teacher_maps, mask).items():
        student.grad = maps.grad = None
        value.backward()
        assert value.isfinite() and value.dtype == torch.float32 and value > -1e-2, name
        moved = maps.grad if name == "attention" else student.grad
        assert moved.isfinite().all() and (moved.any() or size > 1), name
    assert teacher.grad is None and teacher_maps.grad is None, "no gradient to the teacher"
    rows = [F.normalize(noise(3, 4, dtype=torch.float32), dim=1).to(dtype).requires_grad_() for _ in range(4)]
    value = queued_contrast(Features(rows[0], rows[1], torch.tensor(size)), Features(rows[2], rows[3], torch.tensor(1.0)), torch.arange(3))
    value.backward()
    assert value.isfinite() and rows[0].grad.isfinite().all() and rows[2].grad is None


def test_where_nothing_counts_value_and_gradient_are_zero():
    none = torch.zeros(2, 3, dtype=torch.bool)
    student, maps = noise(2, 3, 6).requires_grad_(), shares(2, 2, 3, 3).requires_grad_()
    values = [cosine_distance(student, noise(2, 3, 6), none), logit_divergence(student, noise(2, 3, 6), none)]
    values += [language_modelling(student, torch.full((2, 3), -100)), attention_divergence(maps, shares(2, 2, 3, 3), none)]
    sum(values).backward()
    assert all(value == 0 for value in values) and not student.grad.any() and not maps.grad.any()
    empty = noise(0, 3, 6)
    assert cosine_distance(empty, empty) == 0 == logit_divergence(empty, empty) and counted_mean(torch.zeros(0)) == 0


@pytest.mark.parametrize("wild", [math.nan, math.inf, 1e30], ids=str)
def test_what_does_not_count_may_be_anything(wild):
    mask = lengths(3, 1)
    student, teacher = noise(2, 3, 6), noise(2, 3, 6)
    maps, teacher_maps = shares(2, 2, 3, 3), shares(2, 2, 3, 3)
    CHANCE.manual_seed(1)
    before = all_losses(student, teacher, maps, teacher_maps, mask)
    spoilt = [student.masked_fill(~mask[..., None], wild).requires_grad_(), teacher.masked_fill(~mask[..., None], wild)]
    spoilt += [maps.masked_fill(~mask[:, None, :, None], wild).requires_grad_(), teacher_maps.masked_fill(~mask[:, None, :, None], wild)]
    CHANCE.manual_seed(1)
    after = all_losses(*spoilt, mask)
    assert all(torch.allclose(after[name], before[name]) for name in before)
    sum(after.values()).backward()
    assert spoilt[0].grad.isfinite().all() and spoilt[2].grad.isfinite().all()


def test_shares_of_smoothing_and_temperatures_out_of_range_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        logit_divergence(noise(2, 3), noise(2, 3), temperature=0.0)
    with pytest.raises(ValueError, match="smoothing"):
        language_modelling(noise(1, 2, 3), torch.tensor([[1, 2]]), smoothing=1.5)


@pytest.mark.parametrize("floor", [1e-4, 0.05])
def test_a_floor_is_added_to_the_shares_among_all(floor):
    "BLIP's pre-training: a softmax over the whole row, and then the floor; what is no negative is left out at last"
    names, draws = torch.tensor([0, 1, 2, 1, 3]), 2000
    similarity = 2.5 * noise(5, 5)
    fine = names[:, None] != names
    texts, images = torch.zeros(5, 5), torch.zeros(5, 5)
    for seed in range(draws):
        text, image = hard_negatives(similarity, names, seed, floor)
        texts[torch.arange(5), text] += 1
        images[torch.arange(5), image] += 1
    for counts, scores in ((texts, similarity), (images, similarity.T)):
        chances = (scores.softmax(1) + floor) * fine
        chances = chances / chances.sum(1, keepdim=True)
        chi = ((counts - draws * chances) ** 2 / (draws * chances))[fine].sum()
        assert (counts[~fine] == 0).all() and chi < 45
