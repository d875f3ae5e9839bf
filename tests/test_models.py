import json
from pathlib import Path

import open_clip
import pytest
import torch

from vlkd_lab.features import Batch
from vlkd_lab.models import (
    TINYCLIP_CONFIGS,
    TowerShape,
    count_cost,
    head_widths,
    load_model,
    model_config,
    new_model,
    plain_config,
    resize_towers,
    save_model,
    tower_shapes,
    train_tokenizer,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tinyclip_configs.json").read_text())["models"]
SMALL = dict(
    embed_dim=16,
    vision_cfg=dict(layers=3, width=32, head_width=8, patch_size=8, image_size=16),
    text_cfg=dict(context_length=10, vocab_size=49408, width=24, heads=3, layers=2),
)
RAGGED = {"image": TowerShape(20, 8, (1, 0, 4), (30, 70, 0)), "text": TowerShape(24, 8, (2, 3), (96, 11))}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_architectures_have_the_published_parameters(name):
    wanted, config = GOLDEN[name]["parameters"], model_config(name)
    with torch.device("meta"):
        model = open_clip.model.CLIP(**config)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model) == wanted["total"]
    assert count(model.visual) == wanted["image_tower"]
    assert model.token_embedding.weight.numel() == wanted["token_embedding"]
    assert count(model.transformer) == wanted["text_transformer_blocks"]
    assert sum(b.numel() for b in model.visual.buffers()) == wanted["image_tower_buffers"]
    assert set(TINYCLIP_CONFIGS) == set(GOLDEN)


def test_unknown_names_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="TinyCLIP-ViT-8M-16-Text-3M"):
        model_config("TinyClip-8M")
    with pytest.raises(ValueError, match="laion2b_s34b_b79k"):
        load_model("ViT-B-32/laion3b")
    with pytest.raises(ValueError, match="no model 'nothing'"):
        load_model("nothing")
    with pytest.raises(FileNotFoundError, match="open_clip_config.json"):
        load_model(tmp_path)


def test_configurations_come_from_names_files_and_folders(tmp_path):
    assert model_config("ViT-B-32")["embed_dim"] == 512
    (tmp_path / "mine.json").write_text(json.dumps(SMALL))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    assert model_config(tmp_path / "mine.json") == model_config(tmp_path) == model_config(f"local-dir:{tmp_path}") == SMALL
    model_config(SMALL)["vision_cfg"]["layers"] = 99
    assert SMALL["vision_cfg"]["layers"] == 3, "a configuration is a copy"


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_plain_model_opens_in_open_clip(tmp_path, quick_gelu):
    vlm = new_model(SMALL | dict(quick_gelu=quick_gelu), seed=5)
    save_model(vlm, tmp_path / "m")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'm'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'm'}")(["a red star"])
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval().encode_image(image), vlm.model.eval().encode_image(image))
    assert torch.equal(model.encode_text(tokens), vlm.model.encode_text(vlm.tokenizer(["a red star"])))
    again = load_model(tmp_path / "m", "cpu")
    assert torch.equal(again.encode_image(image), vlm.encode_image(image)) and again.same_view(vlm)


def test_a_ragged_model_opens_with_its_own_loader(tmp_path):
    vlm = new_model(SMALL, towers=RAGGED)
    vlm.model.eval()
    save_model(vlm, tmp_path / "m")
    assert not (tmp_path / "m" / "open_clip_config.json").exists()
    again, batch = load_model(tmp_path / "m", "cpu"), Batch(torch.randn(2, 3, 16, 16), vlm.tokenizer(["a", "two words"]))
    assert torch.equal(again.encode(batch).logits(), vlm.encode(batch).logits())
    assert tower_shapes(again.model.state_dict(), head_widths(SMALL)) == RAGGED and again.config["towers"] == RAGGED
    vlm.encode(batch).logits().sum().backward()
    assert all(p.grad is not None for p in vlm.model.parameters() if p.numel())


def test_resizing_to_the_same_shape_takes_the_same_weights():
    dense = new_model(SMALL, seed=1).model.eval()
    shapes = tower_shapes(dense.state_dict(), head_widths(SMALL))
    same = resize_towers(dense, shapes).eval()
    same.load_state_dict(dense.state_dict())
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(same.encode_image(image), dense.encode_image(image))


def test_fresh_slim_weights_have_open_clips_spread():
    torch.manual_seed(0)
    config = SMALL | dict(text_cfg=SMALL["text_cfg"] | dict(width=96, heads=12), vision_cfg=SMALL["vision_cfg"] | dict(width=96))
    dense = new_model(config).model
    slim = resize_towers(dense, tower_shapes(dense.state_dict(), {"image": 8, "text": 8}))
    for name, tensor in slim.state_dict().items():
        if tensor.numel() > 500:
            assert tensor.std().item() == pytest.approx(dense.state_dict()[name].std().item(), rel=0.2), name


@pytest.mark.parametrize("neurons", [1, 7, 33, 96, 101, 255])
def test_plain_configurations_give_exact_neurons(neurons):
    for heads in range(1, 9):
        shape = TowerShape(heads * 8, 8, (heads,) * 2, (neurons,) * 2)
        config = plain_config(SMALL, {"image": shape, "text": shape})
        with torch.device("meta"):
            model = open_clip.model.CLIP(**config)
        assert tower_shapes(model.state_dict(), head_widths(config)) == {"image": shape, "text": shape}


def test_shapes_need_transformers():
    config = dict(embed_dim=16, vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None), text_cfg=SMALL["text_cfg"])
    resnet = new_model(config)
    with pytest.raises(ValueError, match="image tower"):
        tower_shapes(resnet.model.state_dict(), {"image": 64, "text": 8})


def test_the_teachers_view_is_kept(tiny_teacher):
    teacher = load_model(tiny_teacher, "cpu")
    own = new_model(SMALL)
    assert not own.same_view(teacher)
    like = new_model(SMALL, like=teacher)
    assert like.same_view(teacher) and like.tokenizer is teacher.tokenizer
    assert like.model.token_embedding.num_embeddings == len(teacher.tokenizer.tokenizer)


def test_seeds_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = (new_model(SMALL, seed=k) for k in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(a.model.visual.proj, b.model.visual.proj) and not torch.equal(a.model.visual.proj, c.model.visual.proj)


def test_tokenizer_ends_and_pads(tmp_path):
    tokenizer = train_tokenizer(["a red star above a house"] * 5, tmp_path, 300, context_length=8)
    tokens = tokenizer(["a red star", "a red star above a house and much more than fits into eight tokens", ""])
    assert tokens.shape == (3, 8) and (tokens.max(dim=1).values == tokens.max()).all(), "every caption keeps its end"
    assert tokens[0, -1] == 0 and tokens.argmax(dim=1)[2] == 1
    assert tokenizer(["A RED star"]).tolist() == tokenizer(["a red star"]).tolist()
    with pytest.raises(ValueError, match="259"):
        train_tokenizer(["a"], tmp_path, 100)


def block_macs(shape, tokens):
    "Multiply-accumulates of a tower's blocks, by hand"
    total = 0
    for heads, neurons in zip(shape.heads, shape.neurons, strict=True):
        inner = heads * shape.head_width
        total += tokens * shape.width * (4 * inner + 2 * neurons) + 2 * tokens**2 * inner
    return total


def test_macs_follow_the_shape():
    full, slim = new_model(SMALL), new_model(SMALL, towers=RAGGED)
    by_hand = 4 * 20 * 3 * 64 + block_macs(RAGGED["image"], 5) + 20 * 16 + block_macs(RAGGED["text"], 10) + 24 * 16
    assert count_cost(slim).macs == by_hand < count_cost(full).macs
    cost = count_cost(full)
    assert cost.parameters == cost.image_parameters + cost.text_parameters + 1


def test_a_hub_id_is_loaded_through_open_clip(tmp_path, monkeypatch):
    vlm = new_model(SMALL, seed=2)
    vlm.model.eval()
    save_model(vlm, tmp_path / "hub")
    asked = []

    def from_hub(model_id, filename=None, **_):
        asked.append(model_id)
        return str(tmp_path / "hub" / (filename or "open_clip_model.safetensors"))

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", from_hub)
    again, image = load_model("hf-hub:some/model", "cpu"), torch.randn(1, 3, 16, 16)
    assert set(asked) == {"some/model"} and torch.equal(again.encode_image(image), vlm.encode_image(image))
