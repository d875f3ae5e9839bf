from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from vlkd_lab.inheritance import Kept, Plan, even_spread, front_step, inherit, plan_manual
from vlkd_lab.models import model_config

GOLDEN = np.load(Path(__file__).parent / "golden" / "weight_inherit.npz")


def golden(prefix):
    return {n.removeprefix(f"{prefix}/"): torch.from_numpy(GOLDEN[n]) for n in GOLDEN.files if n.startswith(f"{prefix}/")}


@pytest.mark.parametrize("student", ["student_a", "student_b"])
def test_manual_inheritance_is_golden(student):
    teacher, expected = golden("teacher"), golden(student)
    before = {k: v.clone() for k, v in teacher.items()}
    plan = plan_manual(teacher, {n: t.shape for n, t in expected.items()}, head_width=8, layers=front_step)
    found = inherit(teacher, plan)
    assert found.keys() == expected.keys() - {"logit_scale"}
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert plan.layers == {
        t: tuple(GOLDEN[f"{student}_config/{w}_layer_index"].tolist()) for t, w in (("image", "vision"), ("text", "text"))
    }
    assert all(torch.equal(before[k], v) for k, v in teacher.items())
    found["visual.proj"].zero_()
    assert torch.equal(before["visual.proj"], teacher["visual.proj"]), "the student has memory of its own"
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("student", ["student_a", "student_b"])
def test_one_tower_alone_is_golden(student):
    for prefix in ("visual.", ""):
        own = lambda state, prefix=prefix: {  # noqa: E731
            n.removeprefix(prefix): t
            for n, t in state.items()
            if n.startswith(prefix) and (prefix or not n.startswith("visual.")) and n != "logit_scale"
        }
        teacher, expected = own(golden("teacher")), own(golden(student))
        found = inherit(teacher, plan_manual(teacher, {n: t.shape for n, t in expected.items()}, 8, layers=front_step))
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_depth_rules():
    assert front_step(12, 9) == tuple(range(9)) and front_step(12, 5) == (0, 2, 4, 6, 8) and front_step(6, 4) == (0, 1, 2, 3)
    for teacher in range(1, 15):
        for student in range(1, teacher + 1):
            layers = even_spread(teacher, student)
            assert len(set(layers)) == student and layers[0] == 0 and (student == 1 or layers[-1] == teacher - 1)
            gaps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
            assert not gaps or max(gaps) - min(gaps) <= 1
    for rule in (front_step, even_spread):
        for wrong in ((3, 4), (3, 0)):
            with pytest.raises(ValueError, match="1 to 3"):
                rule(*wrong)


def test_the_whole_teacher_is_inherited_by_its_own_shape():
    teacher = golden("teacher")
    found = inherit(teacher, plan_manual(teacher, {n: t.shape for n, t in teacher.items()}, 8))
    assert all(torch.equal(found[n], teacher[n]) for n in found)


def test_layers_may_be_named():
    teacher, student = golden("teacher"), golden("student_a")
    shapes = {n: t.shape for n, t in student.items()}
    plan = plan_manual(teacher, shapes, {"image": 8, "text": 8}, layers={"image": (5, 0, 2), "text": even_spread})
    assert plan.layers == {"image": (5, 0, 2), "text": (0, 5)}
    kept = inherit(teacher, plan)["visual.transformer.resblocks.0.mlp.c_fc.bias"]
    assert torch.equal(kept, teacher["visual.transformer.resblocks.5.mlp.c_fc.bias"][: len(kept)])
    with pytest.raises(ValueError, match="3 numbers between 0 and 5"):
        plan_manual(teacher, shapes, 8, layers={"image": (5, 0)})


def resnet(layers, width, seed):
    torch.manual_seed(seed)
    return open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg=dict(layers=layers, width=width, image_size=64, patch_size=None, head_width=16),
        text_cfg=dict(context_length=8, vocab_size=50, width=32, heads=4, layers=2),
    )


def test_a_modified_resnet_is_inherited_and_runs():
    teacher, student = resnet([3, 4, 2, 2], 16, 0), resnet([2, 2, 1, 2], 8, 1)
    state = teacher.state_dict()
    plan = plan_manual(state, {n: t.shape for n, t in student.state_dict().items()}, {"image": 16, "text": 8})
    found = inherit(state, plan)
    student.load_state_dict(student.state_dict() | found)
    assert torch.isfinite(student.eval().encode_image(torch.randn(1, 3, 64, 64))).all()
    assert plan.layers["image"][0] == (0, 2) and plan.layers["image"][1] == (0, 3)
    name = "visual.layer2.1.conv2.weight"
    assert torch.equal(found[name], state["visual.layer2.3.conv2.weight"][:16, :16])
    assert torch.equal(found["visual.layer1.0.bn1.running_var"], state["visual.layer1.0.bn1.running_var"][:8])
    assert found["visual.bn1.num_batches_tracked"] == state["visual.bn1.num_batches_tracked"]
    assert torch.equal(found["visual.attnpool.q_proj.weight"], state["visual.attnpool.q_proj.weight"][:256, :256])
    with pytest.raises(ValueError, match="block 0"):
        plan_manual(
            state,
            {n: t.shape for n, t in student.state_dict().items()},
            {"image": 16, "text": 8},
            layers={"image": [(1, 2), (0, 1), (0,), (0, 1)]},
        )


def shapes_of(**changes):
    shapes = {n: tuple(t.shape) for n, t in golden("student_a").items()}
    return shapes | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"visual.proj": (99, 12)}, "visual.proj.*cannot be larger"),
        ({"token_embedding.weight": (5, 8)}, "token_embedding.weight.*vocabulary"),
        ({"visual.conv1.weight": (16, 3, 2, 2)}, "visual.conv1.weight.*patch"),
        ({"visual.positional_embedding": (2, 16)}, "visual.positional_embedding.*positions"),
        ({"visual.transformer.resblocks.0.attn.in_proj_bias": (30,)}, "split a head"),
        ({"visual.strange": (3,)}, "visual.strange.*same kind"),
        ({"transformer.resblocks.9.ln_1.bias": (8,)}, "cannot be deeper"),
    ],
)
def test_what_cannot_be_inherited_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_manual(golden("teacher"), shapes_of(**changes), 8)


def test_a_plan_belongs_to_its_teacher():
    plan = plan_manual(golden("teacher"), shapes_of(), 8)
    with pytest.raises(ValueError, match="was made for a teacher"):
        inherit(golden("teacher") | {"visual.proj": torch.ones(3, 3)}, plan)
    with pytest.raises(ValueError, match="does not have"):
        inherit({}, plan)


def test_kept_ranges_hold_any_mask():
    for seed in range(20):
        mask = torch.rand(17, generator=torch.Generator().manual_seed(seed)) < seed / 19
        kept, values = Kept.where(mask), torch.arange(17)
        assert torch.equal(kept.take(values, 0), values[mask]) and kept.count == mask.sum()


def test_a_plan_can_be_read_and_drawn():
    plan = plan_manual(golden("teacher"), shapes_of(), 8)
    rows = plan.rows()
    assert rows[0] == dict(
        tower="image", block="visual.transformer.resblocks.0", source=0, blocks_of=6, width=(16, 24), heads=(2, 3), neurons=(64, 96)
    )
    assert "2 of 3" in str(plan) and "<td>2 of 3</td>" in plan._repr_html_()
    assert len(plan.plot().axes) == 6


def test_real_sizes_are_planned_without_weights():
    with torch.device("meta"):
        teacher, student = (open_clip.model.CLIP(**model_config(n)) for n in ("ViT-B-16", "TinyCLIP-ViT-39M-16-Text-19M"))
    plan = plan_manual(teacher.state_dict(), {n: t.shape for n, t in student.state_dict().items()}, 64)
    assert plan.layers["text"] == even_spread(12, 6) and len(plan.to_json()) < 60_000
