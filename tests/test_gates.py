from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from vlkd_lab.gates import (
    GATE_KINDS,
    LOG_ALPHA_RANGE,
    Gates,
    TowerGates,
    budget,
    close_budget,
    closed_below,
    final_gates,
    gate_plot,
    gate_state,
    gated,
    kept_shapes,
    open_probability,
    sample_gates,
    sparsity,
    sparsity_penalty,
    target_at,
    uniform_gates,
    uniform_shapes,
)
from vlkd_lab.inheritance import inherit, plan_gates, plan_uniform
from vlkd_lab.layouts import LAYOUTS
from vlkd_lab.models import TowerShape, head_widths, resize_towers, tower_shapes

GOLDEN = np.load(Path(__file__).parent / "golden" / "l0_masks.npz")
SECTIONS = ("image", "text", "all_types", "no_hidden")
KIND = {"hidden": "hidden", "heads": "heads", "intermediate": "neurons", "mha": "attention_block", "ffn": "mlp_block"}
SMALL = dict(
    embed_dim=16,
    quick_gelu=False,
    vision_cfg=dict(layers=3, width=32, head_width=8, patch_size=8, image_size=16),
    text_cfg=dict(context_length=7, vocab_size=60, width=24, heads=3, layers=2),
)


def array(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def golden_types(section):
    return [str(t) for t in GOLDEN[f"{section}/types"]]


def golden_gates(*sections):
    "Gates of one or two towers that hold the golden log_alphas, in float64"
    shapes, kinds = {}, None
    for tower, section in zip(("image", "text"), sections, strict=False):
        size = {
            k: int(GOLDEN[f"{section}/config_{k}"])
            for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
        }
        layers, heads = size["num_hidden_layers"], size["num_attention_heads"]
        shapes[tower] = TowerShape(
            size["hidden_size"], size["hidden_size"] // heads, (heads,) * layers, (size["intermediate_size"],) * layers
        )
        kinds = [KIND[t] for t in golden_types(section)]
    gates = Gates(shapes, budget(shapes), kinds).double()
    with torch.no_grad():
        for tower, section in zip(shapes, sections, strict=True):
            for name in golden_types(section):
                gates.log_alpha[tower][KIND[name]].copy_(array(f"{section}/loga_{name}").flatten())
    return gates


def gradient(gates, tower, name, like):
    return gates.log_alpha[tower][KIND[name]].grad.view(like.shape)


def close(found, expected):
    assert torch.allclose(
        torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_probabilities_final_gates_and_samples_are_golden(section):
    for name in golden_types(section):
        log_alpha = array(f"{section}/loga_{name}").clone().requires_grad_()
        close(open_probability(log_alpha), array(f"{section}/score_{name}"))
        groups = log_alpha[:, None] if name in ("mha", "ffn") else log_alpha
        final = final_gates(groups).view(log_alpha.shape)
        close(final, array(f"{section}/eval_soft_{name}"))
        assert torch.equal(final > 0, array(f"{section}/eval_hard_{name}").bool()) and not final.requires_grad
        drawn = sample_gates(log_alpha, array(f"{section}/sample_u_{name}"))
        close(drawn, array(f"{section}/sample_z_{name}"))
        drawn.sum().backward()
        close(log_alpha.grad, array(f"{section}/sample_sum_z__grad_loga_{name}"))


def test_the_distribution_function_is_golden():
    log_alpha = array("probe/loga")
    close(torch.stack([closed_below(float(x), log_alpha) for x in GOLDEN["probe/x"]]), array("probe/cdf"))
    close(open_probability(log_alpha), array("probe/score"))
    close(log_alpha.clamp(*LOG_ALPHA_RANGE), array("probe/constrained_loga"))


@pytest.mark.parametrize("section", SECTIONS)
def test_expected_sparsity_and_penalty_are_golden(section):
    gates = golden_gates(section)
    assert gates.costs["image"].prunable == int(GOLDEN[f"{section}/prunable_model_size"])
    assert gates.costs["image"].head == int(GOLDEN[f"{section}/params_per_head"])
    close(gates.expected_parameters()["image"].detach(), array(f"{section}/expected_num_params"))
    gates.expected_sparsity().backward()
    close(gates.expected_sparsity().detach(), array(f"{section}/expected_sparsity"))
    for name in golden_types(section):
        expected = array(f"{section}/expected_sparsity__grad_loga_{name}")
        close(gradient(gates, "image", name, expected), expected)
    at = {
        k: GOLDEN[f"{section}/lag_{k}"]
        for k in ("pruned_steps", "start_sparsity", "target_sparsity", "warmup_steps", "lambda_1", "lambda_2")
    }
    for i in range(9):
        gates.zero_grad()
        target = target_at(at["pruned_steps"][i], at["start_sparsity"][i], at["target_sparsity"][i], at["warmup_steps"][i])
        close(target, array(f"{section}/lag_target_now")[i])
        with torch.no_grad():
            gates.lambda_1.fill_(float(at["lambda_1"][i]))
            gates.lambda_2.fill_(float(at["lambda_2"][i]))
        penalty = gates.penalty(float(target))
        penalty.backward()
        close(penalty.detach(), array(f"{section}/lag_loss")[i])
        close(gates.lambda_1.grad, array(f"{section}/lag_grad_lambda_1")[i])
        close(gates.lambda_2.grad, array(f"{section}/lag_grad_lambda_2")[i])
        for name in golden_types(section):
            expected = array(f"{section}/lag_grad_loga_{name}")[i]
            close(gradient(gates, "image", name, expected), expected)


def test_the_joint_budget_is_golden():
    gates = golden_gates("image", "text")
    close(gates.expected_sparsity().detach(), array("joint/expected_sparsity"))
    for i in range(9):
        gates.zero_grad()
        at = lambda name, i=i: float(GOLDEN[f"joint/{name}"][i])  # noqa: E731
        lambdas = [torch.tensor((at(f"lag_lambda_{k}_image") + at(f"lag_lambda_{k}_text")) / 2, dtype=torch.float64) for k in (1, 2)]
        penalty = sparsity_penalty(gates.expected_sparsity(), at("lag_target_now"), *lambdas)
        close(penalty.detach(), at("lag_loss"))


@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_left_after_the_cut_is_golden(section):
    gates = golden_gates(section)
    kept = kept_shapes(gates.shapes, gates.final())["image"]
    attention, mlps = (array(f"{section}/size_{block}") for block in ("mha", "ffn"))
    assert kept.width == int(GOLDEN[f"{section}/size_remain_hidden"])
    assert list(kept.heads) == (array(f"{section}/size_remain_heads") * attention).tolist()
    assert list(kept.neurons) == (array(f"{section}/size_remain_intermediate") * mlps).tolist()
    close(sparsity({"image": kept}, gates.costs), array(f"{section}/size_pruned_sparsity"))


def small_model(seed=0, ragged=False):
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**SMALL)
    if ragged:
        shapes = {"image": TowerShape(28, 8, (4, 0, 2), (50, 31, 0)), "text": TowerShape(24, 8, (1, 3), (96, 17))}
        model = resize_towers(model, shapes)
    for p in model.parameters():  # norms and biases that are not at their start
        p.data.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def random_gates(model, kinds, seed=0, spread=3.0):
    shapes = tower_shapes(model.state_dict(), head_widths(SMALL))
    gates = Gates(shapes, budget(tower_shapes(small_model().state_dict(), head_widths(SMALL))), kinds).double()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gates.log_alpha.parameters():
            p.copy_(spread * torch.randn(p.shape, generator=random, dtype=torch.float64) + 1)
    gates.clamp_()
    return gates


TEXT = torch.tensor([[58, 3, 9, 59, 0, 0, 0], [58, 59, 0, 0, 0, 0, 0], [58, 1, 2, 3, 4, 5, 59]])


def cut(model, gates, values):
    "The cut-out network"
    shapes = kept_shapes(gates.shapes, values)
    student = resize_towers(model, shapes).double().eval()
    state = model.state_dict()
    student.load_state_dict(inherit(gate_state(state, values, gates.shapes), plan_gates(state, gates.shapes, values)))
    return student


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "kinds", [("hidden", "heads", "neurons"), GATE_KINDS, ("heads", "neurons"), ("hidden",), ("mlp_block", "attention_block")]
)
@pytest.mark.parametrize("seed", range(3))
def test_gated_and_cut_out_are_the_same_network(kinds, ragged, seed):
    model = small_model(seed, ragged)
    gates = random_gates(model, kinds, seed)
    values, image = gates.final(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    student = cut(model, gates, values)
    with torch.no_grad(), gated(model, values, gates.shapes) as under_gates:
        image_rows, text_rows = under_gates.encode_image(image), under_gates.encode_text(TEXT)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(image_rows, student.encode_image(image), rtol=1e-9, atol=1e-11)
    assert torch.allclose(text_rows, student.encode_text(TEXT), rtol=1e-9, atol=1e-11)


def test_open_gates_change_nothing_and_nothing_leaks():
    model = small_model()
    gates = random_gates(model, ("hidden", "heads", "neurons"))
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before, state = model.encode_image(image), {k: v.clone() for k, v in model.state_dict().items()}
    ones = {
        t: TowerGates(torch.ones(s.width), tuple(torch.ones(h) for h in s.heads), tuple(torch.ones(n) for n in s.neurons))
        for t, s in gates.shapes.items()
    }
    with gated(model, ones, gates.shapes):
        assert torch.allclose(model.encode_image(image), before, rtol=1e-12)
    with pytest.raises(RuntimeError, match="on purpose"), gated(model, gates.final(), gates.shapes):
        assert not torch.allclose(model.encode_image(image), before)
        raise RuntimeError("on purpose")
    assert torch.equal(model.encode_image(image), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(m.eps == 1e-5 and not m._forward_pre_hooks for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_gradients_reach_weights_and_gates():
    model = small_model()
    gates = random_gates(model, GATE_KINDS, spread=0.3)
    with gated(model, gates.sample(torch.Generator().manual_seed(1)), gates.shapes):
        (model.encode_image(torch.randn(2, 3, 16, 16, dtype=torch.float64)).sum() + model.encode_text(TEXT).sum()).backward()
    for p in gates.log_alpha.parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "logit_scale")


def test_the_arguments_of_gate_state_stay_as_they_were():
    model = small_model()
    gates = random_gates(model, GATE_KINDS)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gate_state(state, gates.final(), gates.shapes)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_closed_budget_is_met_and_no_more(target, ragged):
    for seed in range(3):
        gates = random_gates(small_model(seed, ragged), ("hidden", "heads", "neurons"), seed, spread=2.0)
        values = close_budget(gates, target)
        reached = sparsity(kept_shapes(gates.shapes, values), gates.costs)
        whole = sparsity(gates.shapes, gates.costs)
        assert reached >= target - 1e-12 and reached <= max(target + 0.05, whole + 0.05)
        for tower, kinds in gates.groups().items():  # what is kept is what ranks highest
            for kind, groups in kinds.items():
                kept = getattr(values[tower], kind)
                for group, value in zip(groups, [kept] if kind == "hidden" else kept, strict=True):
                    if 0 < (value > 0).sum() < len(value):
                        assert group[value > 0].min() >= group[value == 0].max()


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_the_uniform_form_is_a_plain_open_clip_model(target):
    model = small_model()
    gates = random_gates(model, ("hidden", "heads", "neurons"), spread=2.0)
    shapes = uniform_shapes(gates, target)
    values = uniform_gates(gates, target)
    assert shapes == kept_shapes(gates.shapes, values) and all(s.plain for s in shapes.values())
    assert target <= sparsity(shapes, gates.costs) < target + 0.12
    plan_uniform(model.state_dict(), gates.shapes, values)
    with pytest.raises(ValueError, match="_block"):
        uniform_shapes(random_gates(model, GATE_KINDS), target)


def test_sparsity_counts_from_the_full_model_in_later_stages():
    model = small_model()
    gates = random_gates(model, ("hidden", "heads", "neurons"))
    student = cut(model, gates, close_budget(gates, 0.4))
    shapes = tower_shapes(student.state_dict(), head_widths(SMALL))
    again = Gates(shapes, gates.costs)
    again.clamp_()
    assert again.expected_sparsity().item() == pytest.approx(sparsity(shapes, gates.costs), abs=0.03) and again.expected_sparsity() > 0.38


def test_wrong_kinds_and_unknown_tensors_are_named():
    shapes = {"image": TowerShape(16, 8, (2,), (30,))}
    with pytest.raises(ValueError, match="attention_block"):
        Gates(shapes, budget(shapes), ("eyes",))
    with pytest.raises(ValueError, match="visual.layer1.0.conv1.weight"):
        gate_state({"visual.layer1.0.conv1.weight": torch.ones(1)}, {}, shapes)
    nothing = {"image": TowerGates(hidden=torch.zeros(16))}
    with pytest.raises(ValueError, match="nothing would be left"):
        kept_shapes(shapes, nothing)


def test_the_constraint_closes_gates_and_then_lets_go():
    shapes = {"image": TowerShape(32, 8, (4, 4), (64, 64)), "text": TowerShape(16, 8, (2,), (32,))}
    gates = Gates(shapes, budget(shapes))
    optimizer = torch.optim.AdamW(gates.parameter_groups(0.1, 0.1))
    for step in range(120):
        optimizer.zero_grad()
        gates.penalty(target_at(step, 0.0, 0.5, 40)).backward()
        optimizer.step()
        gates.clamp_()
    assert gates.expected_sparsity() >= 0.49 and gates.lambda_1 > 10
    assert gate_plot(gates).axes


def test_each_gate_scales_what_it_writes_and_nothing_else():
    model = small_model()
    shapes, state = tower_shapes(model.state_dict(), head_widths(SMALL)), model.state_dict()
    half = {"hidden": torch.full((32,), 0.5), "heads": (torch.full((4,), 0.5),) * 3, "neurons": (torch.full((128,), 0.5),) * 3,
            "attention_block": torch.full((3,), 0.5), "mlp_block": torch.full((3,), 0.5)}  # fmt: skip
    written = {
        "hidden": "conv1.weight class_embedding positional_embedding attn.out_proj.weight attn.out_proj.bias "
        "mlp.c_proj.weight mlp.c_proj.bias",
        "heads": "attn.in_proj_weight attn.in_proj_bias",
        "neurons": "mlp.c_proj.weight",
        "attention_block": "attn.out_proj.weight attn.out_proj.bias",
        "mlp_block": "mlp.c_proj.weight mlp.c_proj.bias",
    }
    for kind, names in written.items():
        under = gate_state(state, {"image": TowerGates(**{kind: half[kind]})}, shapes)
        for name, weight in state.items():
            expected = weight.clone()
            if name.startswith("visual.") and any(name.endswith(f".{n}") for n in names.split()):
                rows = slice(2 * len(weight) // 3, None) if kind == "heads" else slice(None)  # of q, k, v only the values
                expected[rows] *= 0.5
            assert torch.equal(under[name], expected), (kind, name)


def test_the_joint_multipliers_gradients_are_golden():
    gates = golden_gates("image", "text")
    for i in range(9):
        at = lambda name, i=i: float(GOLDEN[f"joint/lag_{name}"][i])  # noqa: E731
        target = target_at(*(at(n) for n in ("pruned_steps", "start_sparsity", "target_sparsity", "warmup_steps")))
        close(target, at("target_now"))
        keys = [(k, tower) for k in (1, 2) for tower in ("image", "text")]
        of = {(k, t): torch.tensor(at(f"lambda_{k}_{t}"), dtype=torch.float64, requires_grad=True) for k, t in keys}
        means = [(of[k, "image"] + of[k, "text"]) / 2 for k in (1, 2)]
        sparsity_penalty(gates.expected_sparsity(), target, *means).backward()
        for (k, tower), multiplier in of.items():
            close(multiplier.grad, at(f"grad_lambda_{k}_{tower}"))


def test_gates_stand_in_the_order_in_which_checkpoints_and_draws_have_them():
    shapes = {"image": TowerShape(16, 8, (2,), (32,)), "text": TowerShape(16, 8, (2,), (32,))}
    gates = Gates(shapes, budget(shapes), ("hidden", "heads", "neurons"))
    assert [name for name, _ in gates.named_parameters()] == [
        "lambda_1",
        "lambda_2",
        *(f"log_alpha.{tower}.{kind}" for tower in ("image", "text") for kind in ("heads", "hidden", "neurons")),
    ]
    drawn = gates.sample(torch.Generator().manual_seed(0))["image"].heads[0]
    noise = torch.rand(2, generator=torch.Generator().manual_seed(0))
    close(drawn, sample_gates(gates.log_alpha["image"]["heads"].detach(), noise).numpy())


def norm_over_kept(norm, x, z):
    "A LayerNorm over the channels whose gate is above zero; zero in the others"
    if z is None:
        return norm(x)
    kept = torch.where(z > 0)[0]
    some = x[..., kept]
    some = (some - some.mean(-1, keepdim=True)) / (some.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    out = torch.zeros_like(x)
    out[..., kept] = some * norm.weight[kept] + norm.bias[kept]
    return out


def slow_blocks(transformer, x, gates, mask):
    "Pre-norm blocks head by head, every gate written where the formula has it"
    z = 1.0 if gates.hidden is None else gates.hidden
    for i, block in enumerate(transformer.resblocks):
        y = norm_over_kept(block.ln_1, x, gates.hidden)
        heads = block.attn.num_heads
        q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
        outputs = []
        for head, (qh, kh, vh) in enumerate(zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)):
            affinity = qh @ kh.mT / qh.shape[-1] ** 0.5 + mask
            outputs.append(affinity.softmax(-1) @ vh * gates.heads[i][head])
        written = torch.cat(outputs, -1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        x = x + written * z * gates.attention_block[i]
        hidden = block.mlp.gelu(block.mlp.c_fc(norm_over_kept(block.ln_2, x, gates.hidden))) * gates.neurons[i]
        x = x + block.mlp.c_proj(hidden) * z * gates.mlp_block[i]
    return x


def slow_features(model, image, text, values):
    "Image and text features of a CLIP under gates, from the formula alone"
    visual, gates = model.visual, values["image"]
    x = visual.conv1(image).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = norm_over_kept(visual.ln_pre, x if gates.hidden is None else x * gates.hidden, gates.hidden)
    x = slow_blocks(visual.transformer, x, gates, 0.0)
    image_rows = norm_over_kept(visual.ln_post, x[:, 0], gates.hidden) @ visual.proj
    gates = values["text"]
    x = model.token_embedding(text) + model.positional_embedding
    causal = torch.full((text.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
    x = slow_blocks(model.transformer, x if gates.hidden is None else x * gates.hidden, gates, causal)
    x = norm_over_kept(model.ln_final, x, gates.hidden)
    return image_rows, x[range(len(text)), text.argmax(-1)] @ model.text_projection


@pytest.mark.parametrize("sort", ["soft", "final", "binary"])
@pytest.mark.parametrize("kinds", [GATE_KINDS, tuple(kind for kind in GATE_KINDS if kind != "hidden")])
def test_the_gated_forward_and_its_gradients_are_those_of_the_formula(kinds, sort):
    model = small_model(3)
    for name, weight in model.named_parameters():
        if "ln_" in name:  # so that it matters what multiplies a norm
            weight.data.add_(0.5 * torch.randn_like(weight))
    gates = random_gates(model, kinds, seed=5, spread=1.0)
    values = gates.sample(torch.Generator().manual_seed(2)) if sort == "soft" else gates.final()
    if sort == "binary":
        values = {t: TowerGates(*(as_binary(getattr(g, k)) for k in GATE_KINDS)) for t, g in values.items()}
    whole = {}
    for tower, shape in gates.shapes.items():  # the formula knows open gates as ones
        one = TowerGates(None, tuple(map(torch.ones, shape.heads)), tuple(map(torch.ones, shape.neurons)), *(torch.ones(shape.layers),) * 2)
        whole[tower] = TowerGates(*(getattr(one if getattr(values[tower], k) is None else values[tower], k) for k in GATE_KINDS))
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = slow_features(model, image, TEXT, whole)
    with gated(model, values, gates.shapes):
        found = (model.encode_image(image), model.encode_text(TEXT))
        for rows, slow in zip(found, expected, strict=True):
            assert torch.allclose(rows, slow, rtol=1e-9, atol=1e-11)
    if sort != "soft":
        return
    learned = [*gates.log_alpha.parameters(), *(p for n, p in model.named_parameters() if n != "logit_scale")]
    of_formula = torch.autograd.grad(sum((rows**2).sum() for rows in expected), learned, retain_graph=True)
    of_ours = torch.autograd.grad(sum((rows**2).sum() for rows in found), learned)
    for ours, slow in zip(of_ours, of_formula, strict=True):
        assert torch.allclose(ours, slow, rtol=1e-8, atol=1e-9 * float(slow.abs().max()) + 1e-12)


def as_binary(values):
    "Ones and zeros in the place of soft gates"
    if values is None or torch.is_tensor(values):
        return values if values is None else (values > 0).to(values)
    return tuple((layer > 0).to(layer) for layer in values)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS.values() if layout.starts], ids=lambda layout: layout.name)
def test_no_gate_multiplies_the_norm_that_begins_a_stream(layout):
    (norm,) = layout.starts
    assert norm in layout.norms, "it normalises over what is kept"
    for part in ("weight", "bias"):
        axes = layout.axes(f"{norm}.{part}", False)
        assert axes == ("hidden",) and f"{norm}.{part}" in layout.writes and layout.gates(f"{norm}.{part}", axes) == ()


def test_every_kind_of_tower_with_a_norm_before_its_blocks_says_so():
    starts = {name: layout.starts for name, layout in LAYOUTS.items() if "hidden" in layout.kinds}
    assert starts.pop("bert") == ("transformer.embeddings.LayerNorm",)
    assert starts.pop("open_clip") == starts.pop("open_clip_pooled") == ("ln_pre",)
    assert len(starts) == 5 and set(starts.values()) == {("trunk.norm_pre",)}
