"""BLIP's terms: each module and kind against a slow version, of models of unequal sizes; groups; what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from vlkd_lab.blip_losses import layer_partners
from vlkd_lab.blip_terms import (
    BLIP_LOSSES,
    GROUPS,
    MODULES,
    ModuleFeatures,
    base_terms,
    blip_terms,
    distillation_terms,
    module_logits,
    spread,
)
from vlkd_lab.features import Features, FusedFeatures, LayerOutputs, MomentumOutputs
from vlkd_lab.losses import Objective
from vlkd_lab.methods import all_losses, tinyclip

PASSES = {"image": ["image"], "text": ["text"], "fusion": ["pairs", "question"], "decoder": ["caption", "answer"]}
WIDTHS = {"image": (6, 10), "text": (8, 12)}
COUNTS = {"text": (4, 2, 3), "question": (5, 1), "caption": (4, 2, 3), "answer": (3, 2)}
TERMS = {term.name: term for term in blip_terms(WIDTHS, seed=3)}


def filled(lengths, longest):
    return torch.arange(longest)[None] < torch.tensor(lengths)[:, None]


def look(chance, image_width, text_width, heads, layers, grid, behind=0, decoder_layers=2, fusion_layers=1, dtype=torch.float64):
    "What a model of some size makes of three pictures, three captions and two questions; behind: positions of padding more"

    def noise(*shape):
        return torch.randn(*shape, generator=chance, dtype=dtype)

    def maps(queries, keys, depth, mask=None):
        scores = [2 * noise(len(queries), heads, queries.shape[1], keys) for _ in range(depth)]
        return tuple((s if mask is None else s.masked_fill(~mask[:, None, None], -math.inf)).softmax(-1) for s in scores)

    cells, masks = 1 + grid**2, {name: filled(counts, max(counts) + behind) for name, counts in COUNTS.items()}
    whole = torch.ones(3, cells, dtype=torch.bool)
    nine = masks["text"][torch.tensor([0, 1, 2, 1, 2, 0, 0, 1, 2])]
    passes = {"image": LayerOutputs(noise(3, cells, image_width), whole, maps(whole, cells, layers))}
    for name, mask in (("text", masks["text"]), ("pairs", nine), ("question", masks["question"])):
        cross = maps(mask, cells, fusion_layers) if name != "text" else ()
        passes[name] = LayerOutputs(noise(*mask.shape, text_width), mask, maps(mask, mask.shape[1], layers, mask), cross)
    passes["pairs"] = replace(passes["pairs"], logits=noise(9, 2), targets=torch.tensor([1] * 3 + [0] * 6))
    for name in ("caption", "answer"):
        mask = masks[name]
        asked = torch.cat([mask[:, 1:], torch.zeros(len(mask), 1, dtype=torch.bool)], dim=1)
        targets = torch.randint(0, 9, mask.shape, generator=torch.Generator().manual_seed(1)).masked_fill(~asked, -100)
        over = (cells, None) if name == "caption" else (masks["question"].shape[1], masks["question"])
        cross = maps(mask, over[0], decoder_layers, over[1])
        own = maps(mask, mask.shape[1], decoder_layers, mask)
        passes[name] = LayerOutputs(noise(*mask.shape, text_width), asked, own, cross, over[1], noise(*mask.shape, 9), targets)
    rows = [F.normalize(noise(3, 4), dim=1) for _ in range(4)]
    slow = MomentumOutputs(
        Features(rows[2], rows[3], torch.tensor(4.0)), torch.tensor([0, 1, 0]), (rows[2] + 0.1, rows[3] - 0.1, torch.tensor([7, 1, 8])), 0.4
    )
    return FusedFeatures(rows[0], rows[1], torch.tensor(5.0), passes, slow)


@pytest.fixture
def student():
    return look(torch.Generator().manual_seed(0), 6, 8, heads=2, layers=2, grid=2)


@pytest.fixture
def teacher():
    return look(torch.Generator().manual_seed(1), 10, 12, heads=3, layers=5, grid=4, decoder_layers=3, fusion_layers=4)


def leaf(features, names, field):
    "The same features with one field of some passes that wants gradients, and these tensors"
    made, leaves = dict(features.passes), []
    for name in names:
        value = getattr(made[name], field)
        values = value if isinstance(value, tuple) else (value,)
        wanting = tuple(tensor.detach().clone().requires_grad_() for tensor in values)
        made[name] = replace(made[name], **{field: wanting if isinstance(value, tuple) else wanting[0]})
        leaves += wanting
    return replace(features, passes=made), leaves


def compared(term, slowly, student, teacher, names, field):
    "Value and gradients of a term and of its slow version; none reaches the teacher"
    mine, leaves = leaf(student, names, field)
    theirs, others = leaf(teacher, names, field)
    results = []
    for function in (term, slowly):
        value = function(mine, theirs if function is term else theirs.detach())
        grads = torch.autograd.grad(value, leaves + (others if function is term else []), allow_unused=True)
        results.append((value.detach().double(), grads))
    (a, da), (b, db) = results
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), (float(a), float(b))
    assert all(grad is None for grad in da[len(leaves) :]), "no gradient to the teacher"
    for one, other in zip(da[: len(leaves)], db, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    assert any(grad.any() for grad in da[: len(leaves)])


# Features


@pytest.mark.parametrize("module", ["image", "text", "fusion", "decoder"])
def test_features_are_compared_row_by_row(module, student, teacher):
    term = TERMS[f"{module}_features"].function
    weight = term.project.weight.detach().double()
    assert tuple(weight.shape) == WIDTHS["image" if module == "image" else "text"][::-1]

    def slowly(mine, theirs):
        values = []
        for name in PASSES[module]:
            a, b = mine.passes[name], theirs.passes[name]
            for row in range(len(a.states)):
                for place in range(a.states.shape[1]) if module == "decoder" else [0]:
                    if module != "decoder" or a.targets[row, place] != -100:
                        x, y = weight @ a.states[row, place], b.states[row, place]
                        values.append(1 - x @ y / (x @ x).sqrt() / (y @ y).sqrt())
        return sum(values) / len(values)

    term.project.double()
    student64 = replace(student, passes=dict(student.passes))
    try:
        compared(lambda a, b: term.float()(a, b), slowly, student64, teacher, PASSES[module], "states")
    finally:
        term.float()


def test_maps_between_widths_learn_and_are_not_there_where_widths_are_equal(student, teacher):
    term = ModuleFeatures("text", (8, 12))
    term(student, teacher).backward()
    assert term.project.weight.grad.any()
    assert not list(ModuleFeatures("text", (8, 8)).parameters()) and not list(ModuleFeatures("text").parameters())
    a, b, c = (ModuleFeatures("text", (8, 12), seed).project.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(ValueError, match="project"):
        ModuleFeatures("text")(student, teacher)


# Logits


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("module", ["fusion", "decoder"])
def test_what_heads_say_is_compared_word_by_word(module, temperature, student, teacher):
    def slowly(mine, theirs):
        values = []
        for name in ("pairs",) if module == "fusion" else ("caption", "answer"):
            a, b = mine.passes[name], theirs.passes[name]
            places = [(row,) for row in range(9)] if module == "fusion" else (a.targets != -100).nonzero().tolist()
            for place in places:
                p, q = ((x.logits[tuple(place)] / temperature).exp() for x in (b, a))
                p, q = p / p.sum(), q / q.sum()
                values.append(temperature**2 * sum(p[c] * (p[c] / q[c]).log() for c in range(len(p))))
        return sum(values) / len(values)

    names = ("pairs",) if module == "fusion" else ("caption", "answer")
    compared(lambda a, b: module_logits(a, b, module, temperature), slowly, student, teacher, names, "logits")


# Attention


def slow_attention(mine, theirs, module, across):
    "Heads, layers, rows one by one; the teacher's 4×4 cells fall into the student's 2×2"
    blocks = [[0], *([1 + 4 * (2 * r + i) + 2 * c + j for i in (0, 1) for j in (0, 1)] for r in (0, 1) for c in (0, 1))]
    total, count = 0.0, 0
    for name in PASSES[module]:
        a, b = mine.passes[name], theirs.passes[name]
        own, other = (a.cross_attention, b.cross_attention) if across else (a.attention, b.attention)
        pictured = module == "image" or (across and a.cross_attention_mask is None)
        rows = (a.targets != -100 if module == "decoder" else a.mask).nonzero().tolist()
        for layer, partner in enumerate(layer_partners(len(own), len(other))):
            for row, place in rows:
                s, t = own[layer][row].mean(0)[place], other[partner][row].mean(0)
                t = sum(t[k] for k in blocks[place]) / len(blocks[place]) if module == "image" else t[place]
                t = torch.stack([t[list(cell)].sum() for cell in blocks]) if pictured else t
                total = total + sum(p * (p / q).log() for p, q in zip(t, s, strict=True) if p > 0) / len(own)
        count += len(rows)
    return total / count


@pytest.mark.parametrize(
    ("module", "across"), [*((m, False) for m in ("image", "text", "fusion", "decoder")), ("fusion", True), ("decoder", True)]
)
def test_where_layers_look_is_compared_row_by_row(module, across, student, teacher):
    name = f"{module}_cross_attention" if across else f"{module}_attention"
    field = "cross_attention" if across else "attention"
    function = TERMS[name].function
    compared(function, lambda a, b: slow_attention(a, b, module, across), student, teacher, PASSES[module], field)


def test_padding_of_any_length_changes_no_term():
    short, long = [], []
    for behind, into in ((0, short), (3, long)):
        for seed, sizes in ((0, (6, 8, 2, 2, 2)), (1, (10, 12, 3, 3, 3))):
            into.append(look(torch.Generator().manual_seed(seed), *sizes, behind=behind))

    def padded(features, longer):
        "The short one's numbers where something counts, the long one's behind"
        made = {}
        for name, run in features.passes.items():
            wide, length, keys = longer.passes[name], run.states.shape[1], run.cross_attention[0].shape[-1] if run.cross_attention else 0
            held = {f: getattr(wide, f).clone() for f in ("states", "logits") if getattr(wide, f) is not None}
            for field, value in held.items():
                value[:, :length] = getattr(run, field)[:, : value[:, :length].shape[1]]
            attention = [maps.clone() for maps in wide.attention]
            cross = [maps.clone() for maps in wide.cross_attention]
            for new, old in zip(attention, run.attention, strict=True):
                new[:, :, :length, :length] = old
            for new, old in zip(cross, run.cross_attention, strict=True):
                new[:, :, :length, :keys] = old
            targets = run.targets
            if targets is not None and targets.ndim == 2:
                targets = F.pad(targets, (0, wide.states.shape[1] - length), value=-100)
            made[name] = replace(wide, **held, attention=tuple(attention), cross_attention=tuple(cross), targets=targets)
        return replace(features, passes=made)

    other = [padded(a, b) for a, b in zip(short, long, strict=True)]
    assert other[0].passes["text"].states.shape[1] == short[0].passes["text"].states.shape[1] + 3
    for name, term in TERMS.items():
        assert torch.allclose(term.function(*short), term.function(*other), atol=1e-6), name


# Base losses


def test_base_losses_are_those_of_the_passes(student):
    caption, answer, pairs = (student.passes[name] for name in ("caption", "answer", "pairs"))
    for smoothing in (0.0, 0.1):
        for name, run in (("language_modelling", caption), ("answering", answer)):
            values = []
            for row, place in (run.targets != -100).nonzero().tolist():
                said = run.logits[row, place].log_softmax(0)
                values.append(-(1 - smoothing) * said[run.targets[row, place]] - smoothing * said.mean())
            found = {term.name: term for term in base_terms(smoothing)}[name].function(student, None)
            assert torch.allclose(found.double(), sum(values) / len(values), atol=1e-5), name
    matched = -sum(pairs.logits[row].log_softmax(0)[target] for row, target in enumerate(pairs.targets.tolist())) / 9
    assert torch.allclose(TERMS["image_text_matching"].function(student, None).double(), matched, atol=1e-5)
    slow, held = student.momentum.features, student.momentum.queue
    labels, total = torch.tensor([0, 1, 0, 7, 1, 8]), 0.0
    for mine, theirs, rows in ((student.image, slow.image, [*slow.text, *held[1]]), (student.text, slow.text, [*slow.image, *held[0]])):
        rows = torch.stack(rows)
        for row in range(3):
            right = (labels == labels[row]).double()
            target = 0.4 * (5 * rows @ theirs[row]).softmax(0) + 0.6 * right / right.sum()
            total = total - target @ (5 * rows @ mine[row]).log_softmax(0) / 6
    assert torch.allclose(TERMS["image_text_contrast"].function(student, None).double(), total, atol=1e-5)


def test_similarities_are_those_of_the_two_models(student, teacher):
    s, t = 5 * student.image @ student.text.T, 5 * teacher.image @ teacher.text.T
    value = sum((x.softmax(1) * (x.log_softmax(1) - y.log_softmax(1))).sum(1).mean() for x, y in ((t, s), (t.T, s.T))) / 2
    assert torch.allclose(TERMS["similarities"].function(student, teacher).double(), value, atol=1e-5)


# All of them


def test_every_term_is_at_rest_with_itself_and_teaches_a_student(student, teacher):
    same = Objective({}, *distillation_terms())(teacher, teacher.detach())
    assert all(value.abs() < 1e-5 for value in same.values.values())
    found = Objective({}, *blip_terms(WIDTHS))(student, teacher)
    assert len(found.values) == 4 + 4 + 1 + 2 + 4 + 2 and all(value.isfinite() and value > 1e-3 for value in found.values.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_terms_stay_finite_in_low_precision_and_with_extreme_logits(dtype):
    def lowered(features):
        cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
        made = {}
        for name, run in features.passes.items():
            logits = None if run.logits is None else cast(1e4 * run.logits.sign())
            maps = {field: tuple(map(cast, getattr(run, field))) for field in ("attention", "cross_attention")}
            made[name] = replace(run, states=cast(run.states), logits=logits, **maps)
        return replace(features, image=cast(features.image), text=cast(features.text), passes=made)

    sizes = ((0, (6, 8, 2, 2, 2)), (1, (10, 12, 3, 5, 4)))
    mine, theirs = (lowered(look(torch.Generator().manual_seed(seed), *given, dtype=torch.float32)) for seed, given in sizes)
    for name, term in TERMS.items():
        value = term.function(mine, theirs)
        assert value.isfinite() and value.dtype == torch.float32 and value > -0.02, name


def test_a_step_without_questions_or_words_adds_nothing(student, teacher):
    def without(features):
        return replace(features, passes={name: run for name, run in features.passes.items() if name not in ("question", "answer")})

    for name, term in TERMS.items():
        if name != "answering":
            assert term.function(without(student), without(teacher)).isfinite(), name
    with pytest.raises(ValueError, match="answer"):
        TERMS["answering"].function(without(student), None)
    silent = replace(student.passes["caption"], mask=torch.zeros(3, 4, dtype=torch.bool), targets=torch.full((3, 4), -100))
    quiet = [replace(f, passes={"caption": replace(silent, **{k: getattr(f.passes["caption"], k) for k in ("states", "attention", "cross_attention")})}) for f in (student, teacher)]  # fmt: skip  # noqa: E501
    for name in ("language_modelling", "decoder_features", "decoder_logits", "decoder_attention", "decoder_cross_attention"):
        assert TERMS[name].function(*quiet) == 0, name


# What is refused


@pytest.mark.parametrize("name", [name for name in TERMS if name != "similarities"])
def test_two_towers_are_refused_by_name(name, student, teacher):
    towers = Features(student.image, student.text, student.scale)
    with pytest.raises(ValueError, match="BLIP"):
        TERMS[name].function(towers, towers)


@pytest.mark.parametrize("name", [name for name in TERMS if name != "similarities"])
def test_passes_that_were_not_made_are_named(name, student, teacher):
    bare = replace(student, passes={}, momentum=None)
    with pytest.raises(ValueError, match="pass|pairs|caption|answer|momentum"):
        TERMS[name].function(bare, replace(teacher, passes={}))


@pytest.mark.parametrize("name", [name for name in TERMS if name.endswith("attention")])
def test_maps_that_were_not_kept_are_asked_for(name, student, teacher):
    blind = replace(student, passes={n: replace(run, attention=(), cross_attention=()) for n, run in student.passes.items()})
    with pytest.raises(ValueError, match="with maps"):
        TERMS[name].function(blind, teacher)


@pytest.mark.parametrize("name", [*TERMS, "distillation", "attention"])
def test_jobs_of_two_towers_refuse_blips_terms_before_any_work(name):
    with pytest.raises(ValueError, match=f"{name}.*two towers"):
        tinyclip.TinyCLIP(losses=f"{name}:1").weights()


# Names and groups


def test_groups_are_what_their_names_say():
    names = [term.name for term in blip_terms()]
    assert len(set(names)) == len(names) == 17 and set(names) == set(BLIP_LOSSES) and {*names, "contrastive"} < set(all_losses())
    assert set(GROUPS["base"]) | set(GROUPS["distillation"]) == set(names) and not set(GROUPS["base"]) & set(GROUPS["distillation"])
    for groups in (("features", "similarities", "logits", "attention"), tuple(MODULES)):
        told = [name for group in groups for name in GROUPS[group]]
        assert sorted(told) == sorted(GROUPS["distillation"]), "each term once"
    assert all(BLIP_LOSSES[name].module == module for module in MODULES for name in GROUPS[module]) and set(MODULES) == {*PASSES, "both"}
    assert {name for name in GROUPS["attention"] if "cross" in name} == {"fusion_cross_attention", "decoder_cross_attention"}
    assert not any(BLIP_LOSSES[name].needs_teacher for name in GROUPS["base"])
    assert all(BLIP_LOSSES[name].needs_teacher for name in GROUPS["distillation"])


def test_later_words_count_more():
    weights = spread([("distillation", 1.0), ("attention", 0.5), ("decoder_attention", 2.0), ("language_modelling", 3.0)])
    assert weights["image_features"] == 1 and weights["decoder_cross_attention"] == 0.5 and weights["decoder_attention"] == 2
    assert weights["language_modelling"] == 3 and "answering" not in weights and spread([]) == {}
    assert spread([("decoder_attention", 2.0), ("attention", 0.5)])["decoder_attention"] == 0.5
    assert spread([("similarities", 4.0)]) == {"similarities": 4.0} == spread([("both", 4.0)])


@pytest.mark.parametrize("name", ["decoders", "contrastive", "affinity_mimicking", "", "Base"])
def test_words_that_name_nothing_are_refused_with_what_there_is(name):
    with pytest.raises(ValueError, match="decoder_cross_attention"):
        spread([("base", 1.0), (name, 1.0)])
