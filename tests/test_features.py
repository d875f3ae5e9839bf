
import forked
import pytest
import torch
import torch.nn.functional as F

from vlkd_lab import features
from vlkd_lab.features import Batch, Features, gather, partner_ranks, recall


def random_features(pairs, width=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(pairs, width, generator=random, dtype=torch.float64), dim=1) for _ in range(2)]
    return Features(*rows, torch.tensor(7.0, dtype=torch.float64))


def test_logits_are_image_rows_against_text_columns():
    f = random_features(5)
    assert torch.isclose(f.logits()[1, 3], 7 * (f.image[1] @ f.text[3]))


def test_recall_equals_sorting():
    f = random_features(200)
    order = (f.image @ f.text.T).argsort(dim=1, descending=True)
    found = [(order[i, :5] == i).any().item() for i in range(200)]
    assert recall(f, ks=(5,))["image_to_text_r5"] == pytest.approx(sum(found) / 200)
    own = torch.eye(200, dtype=torch.bool)
    assert torch.equal(partner_ranks(f.image, f.text, own, chunk=7), partner_ranks(f.image, f.text, own))


def test_repeated_captions_are_one_caption():
    f = random_features(60)
    captions = [f"caption {i % 7}" for i in range(60)]
    f = Features(f.image, f.text[[i % 7 for i in range(60)]], f.scale)
    found, scores = recall(f, ks=(1, 2), captions=captions), f.image @ f.text[:7].T
    to_text = [scores[i].argsort(descending=True)[:2].tolist().index(i % 7) if i % 7 in scores[i].topk(2).indices else 9 for i in range(60)]
    assert found["image_to_text_r2"] == pytest.approx(sum(r < 2 for r in to_text) / 60)
    assert found["image_to_text_r1"] == pytest.approx(sum(r < 1 for r in to_text) / 60)
    assert found["text_to_image_r1"] == pytest.approx(sum(int(scores[:, j].argmax()) % 7 == j for j in range(7)) / 7)


def test_ties_are_not_rewarded():
    same = Features(torch.ones(50, 1), torch.ones(50, 1), torch.tensor(1.0))
    assert recall(same, ks=(1,)) == {"image_to_text_r1": 0.0, "text_to_image_r1": 0.0}


def test_batch_shares_or_separates_the_teachers_view():
    shared = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5))
    assert shared.for_teacher().image is shared.image
    own = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5), torch.ones(2, 3, 8, 8), torch.ones(2, 9))
    seen = own.for_teacher()
    assert seen.image.shape[-1] == 8 and seen.text.shape[-1] == 9 and seen.teacher_image is None
    assert own.to("meta").teacher_text.device.type == "meta"


def test_gather_is_the_identity_in_one_process():
    f = random_features(3)
    assert gather(f) is f


TWO_PROCESSES = """
import torch, torch.distributed as dist, torch.nn.functional as F
from vlkd_lab.features import Features, gather
from vlkd_lab.losses import affinity_mimicking, contrastive
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
def network():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"image": torch.nn.Linear(5, 4), "text": torch.nn.Linear(5, 4)}).double()
random = torch.Generator().manual_seed(1)
x, y, v, u = (torch.randn(6, 5, generator=random, dtype=torch.float64) for _ in range(4))
def run(rows, together):
    net, scale = network(), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    student = Features(F.normalize(net["image"](x[rows])), F.normalize(net["text"](y[rows])), scale)
    teacher = Features(F.normalize(v[rows]), F.normalize(u[rows]), torch.tensor(5.0, dtype=torch.float64))
    if together: student, teacher = gather(student), gather(teacher)
    loss = affinity_mimicking(student, teacher) + contrastive(student)
    loss.backward()
    return loss, torch.cat([p.grad.flatten() for p in net.parameters()] + [scale.grad.view(1)])
loss, gradient = run(slice(3 * rank, 3 * rank + 3), True)
dist.all_reduce(gradient); gradient /= world
whole, expected = run(slice(None), False)
assert torch.allclose(loss, whole, rtol=1e-12), (loss, whole)
assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-13), (gradient - expected).abs().max()
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    forked.run(str(script), processes=2)


@pytest.mark.parametrize("former, name", [("Pass", "LayerOutputs"), ("Slow", "MomentumOutputs")])
def test_a_class_is_found_under_its_former_name_with_a_warning(former, name):
    with pytest.warns(DeprecationWarning, match=name):
        assert getattr(features, former) is getattr(features, name)
    with pytest.raises(AttributeError, match="Passes"):
        _ = features.Passes
