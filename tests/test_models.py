import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from vlkd_lab.features import Batch
from vlkd_lab.models import (
    TINYCLIP_CONFIGS,
    TowerShape,
    check_student,
    count_cost,
    evaluating,
    head_widths,
    image_tower,
    image_towers,
    load_model,
    measure_latency,
    model_config,
    new_model,
    plain_config,
    resize_towers,
    save_model,
    shape_cost,
    state_digest,
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


def test_shapes_need_a_kind_that_is_known():
    tower = dict(timm_model_name="test_byobnet", timm_pool="avg", timm_proj="linear", image_size=64)
    other = new_model(dict(embed_dim=16, vision_cfg=tower, text_cfg=SMALL["text_cfg"]))
    with pytest.raises(ValueError, match="the image tower has no layers of a kind that is known: plain transformer of open_clip"):
        tower_shapes(other.model.state_dict(), {"image": 64, "text": 8})


def test_the_teachers_view_is_kept(tiny_teacher):
    teacher = load_model(tiny_teacher, "cpu")
    own = new_model(SMALL)
    assert not own.same_view(teacher)
    like = new_model(SMALL, like=teacher)
    assert like.same_view(teacher) and like.tokenizer is teacher.tokenizer
    assert like.model.token_embedding.num_embeddings == len(teacher.tokenizer.tokenizer)


def test_two_vocabularies_under_one_name_are_two_views(tmp_path):
    captions = {"a": ["a red star above a house"] * 20, "b": ["no boat on the lake"] * 20}
    models = {}
    for name, texts in captions.items():
        tokenizer = train_tokenizer(texts, tmp_path / name / "words", 280, context_length=16)
        save_model(new_model(SMALL, tokenizer=tokenizer), tmp_path / name / "student")
        models[name] = load_model(tmp_path / name / "student", "cpu")
    a, b = models.values()
    assert a.config["model_cfg"]["text_cfg"] == b.config["model_cfg"]["text_cfg"], "their settings are equal"
    assert not torch.equal(a.tokenizer(captions["a"][:1]), b.tokenizer(captions["a"][:1]))
    assert not a.same_view(b) and a.same_view(load_model(tmp_path / "a" / "student", "cpu"))


def test_a_folder_that_lost_its_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tokenizer = train_tokenizer(["a red star above a house"] * 5, tmp_path / "words", 280, context_length=16)
    folder = save_model(new_model(SMALL, tokenizer=tokenizer), tmp_path / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no tokenizer for {folder}.*tokenizer.json"):
        load_model(folder, "cpu")


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


def hooked_macs(network, image):
    "Multiply-accumulates of linear layers and convolutions, each counted when it is called"
    counts = []

    def linear(part, _, output):
        counts.append(output.numel() * part.in_features)

    def convolution(part, _, output):
        counts.append(output.numel() * part.weight[0].numel())

    hooks = [part.register_forward_hook(linear) for part in network.modules() if type(part) is nn.Linear]
    hooks += [part.register_forward_hook(convolution) for part in network.modules() if isinstance(part, nn.Conv2d)]
    with evaluating(network):
        network(image)
    for hook in hooks:
        hook.remove()
    return sum(counts)


TEXT_MACS = block_macs(TowerShape(24, 8, (3, 3), (96, 96)), 10) + 24 * 16  # of SMALL's text tower


def counted_image_macs(vlm):
    "What `count_cost` finds without the text tower"
    return count_cost(vlm).macs - TEXT_MACS


def vit_macs(patches, tokens):
    "A small ViT of open_clip without its last projection"
    return patches * 32 * 3 * 64 + block_macs(TowerShape(32, 8, (4,) * 3, (128,) * 3), tokens)


def test_the_shipped_teacher_costs_what_its_shape_says():
    vlm = load_model(Path(__file__).parents[1] / "data_samples" / "teacher", "cpu")
    config = vlm.config["model_cfg"]
    assert count_cost(vlm) == shape_cost(config, tower_shapes(vlm.model.state_dict(), head_widths(config)))
    assert count_cost(vlm).macs == 30_194_688


@pytest.mark.parametrize("sides", [(16, 16), (16, 40), (48, 16)], ids=str)
def test_pictures_of_any_sides_cost_their_patches(sides):
    vision = SMALL["vision_cfg"] | dict(image_size=list(sides))
    vlm = new_model(SMALL | dict(vision_cfg=vision))
    patches = sides[0] * sides[1] // 64
    assert counted_image_macs(vlm) == vit_macs(patches, patches + 1) + 32 * 16
    shapes = tower_shapes(vlm.model.state_dict(), head_widths(SMALL))
    assert shape_cost(vlm.config["model_cfg"], shapes) == count_cost(vlm)
    assert measure_latency({"it": vlm}, batch_size=2, repeats=1)["it"] > 0


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "step by step"])
def test_a_siglip_kind_costs_its_tower_its_pool_and_its_bias(fused):
    tower = dict(timm_model_name="test_vit3", timm_model_pretrained=False, timm_pool="map", timm_proj="none", image_size=160)
    text = SMALL["text_cfg"] | dict(no_causal_mask=True, proj_bias=True, pool_type="last")
    vlm = new_model(SMALL | dict(embed_dim=96, vision_cfg=tower, text_cfg=text, custom_text=True, init_logit_bias=-10.0))
    trunk, blocks = vlm.model.visual.trunk, len(vlm.model.visual.trunk.blocks)
    for part in trunk.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    tokens = trunk.pos_embed.shape[1]
    attention = blocks * 2 * tokens**2 * 96 + 2 * tokens * 96  # one learned query looks at all tokens
    text_macs = TEXT_MACS - 24 * 16 + 24 * 96
    cost = count_cost(vlm)
    assert cost.macs == hooked_macs(trunk, torch.zeros(1, 3, 160, 160)) + attention + text_macs
    assert cost.parameters == cost.image_parameters + cost.text_parameters + 2, "scale and bias belong to no tower"
    assert measure_latency({"it": vlm}, batch_size=2, repeats=1)["it"] > 0


def test_the_bias_of_the_logits_is_no_part_of_the_text_tower():
    config = SMALL | dict(init_logit_bias=-10.0)
    biased, plain = new_model(config), new_model(SMALL)
    cost, without = count_cost(biased), count_cost(plain)
    assert (cost.parameters, cost.text_parameters) == (without.parameters + 1, without.text_parameters)
    assert cost == shape_cost(config, tower_shapes(biased.model.state_dict(), head_widths(config)))


def test_a_resnet_costs_its_convolutions_and_its_attention_pool():
    vision = dict(layers=[1, 1, 1, 1], width=8, image_size=64, patch_size=None)
    vlm = new_model(SMALL | dict(vision_cfg=vision))
    tokens, width = 2 * 2 + 1, 8 * 32
    pool = tokens * width * (3 * width + 16) + 2 * tokens**2 * width
    assert counted_image_macs(vlm) == hooked_macs(vlm.model.visual, torch.zeros(1, 3, 64, 64)) + pool


def test_a_coca_costs_its_two_towers_and_has_a_decoder():
    vision = SMALL["vision_cfg"] | dict(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=6, output_tokens=True)
    decoder = SMALL["text_cfg"] | dict(layers=1, attn_pooler_heads=4)
    text = SMALL["text_cfg"] | dict(embed_cls=True, output_tokens=True)
    vlm = new_model(SMALL | dict(vision_cfg=vision, text_cfg=text, multimodal_cfg=decoder, custom_text=True))
    queries, tokens = 6, 5
    pool = 2 * queries * 16**2 + 2 * tokens * 32 * 16 + 2 * queries * tokens * 16
    with_class = block_macs(TowerShape(24, 8, (3, 3), (96, 96)), 11) + 24 * 16
    cost = count_cost(vlm)
    assert cost.macs == vit_macs(4, 5) + pool + 16 * 16 + with_class
    decoder_size = sum(p.numel() for p in vlm.model.text_decoder.parameters())
    assert decoder_size > 0 and cost.parameters == cost.image_parameters + cost.text_parameters + decoder_size + 1
    assert measure_latency({"it": vlm}, batch_size=2, repeats=1)["it"] > 0


def test_counting_changes_nothing():
    vlm = new_model(SMALL | dict(vision_cfg=image_tower("timm:test_resnet") | dict(image_size=32)))
    before, fast_path = state_digest(vlm.model), torch.backends.mha.get_fastpath_enabled()
    with torch.inference_mode():
        inside = count_cost(vlm)
    assert count_cost(vlm) == inside and inside.macs > TEXT_MACS
    measure_latency({"it": vlm}, batch_size=2, repeats=1)
    assert state_digest(vlm.model) == before, "no running statistics of a batch norm have moved"
    assert vlm.model.training and all(p.requires_grad and p.grad is None for p in vlm.model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() is fast_path


# towers of timm


TOWERS = {  # name: pixels, whether its own classifier is the map to the joint width
    "resnet10t": (32, False),
    "mobilenetv3_small_050": (32, True),
    "mobilenetv4_conv_small_050": (32, True),
    "efficientvit_b0": (32, True),
    "ghostnet_050": (32, True),
    "fastvit_t8": (64, False),
    "test_mambaout": (32, True),
    "test_vit3": (160, False),
    "test_convnext": (32, False),
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_timm_train_and_open_elsewhere(name, tmp_path):
    size, own_classifier = TOWERS[name]
    tower = image_tower(f"timm:{name}")
    assert (tower["timm_proj"] is None) == own_classifier
    vlm = new_model(SMALL | dict(vision_cfg=tower | dict(image_size=size)))
    check_student(vlm, name)
    image, target = torch.rand(3, 3, size, size), torch.nn.functional.normalize(torch.randn(3, 16), dim=1)
    optimizer = torch.optim.AdamW(vlm.model.visual.parameters(), lr=1e-3)
    gaps = []
    for _ in range(4):
        gap = (vlm.encode_image(image) - target).square().sum()
        optimizer.zero_grad()
        gap.backward()
        optimizer.step()
        gaps.append(gap.item())
    assert gaps[-1] < gaps[0] and all(p.grad is not None for p in vlm.model.visual.parameters())
    save_model(vlm, tmp_path)
    vlm.model.eval()
    again = load_model(tmp_path, "cpu")
    elsewhere = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[0].eval()
    with torch.no_grad():
        assert torch.equal(again.encode_image(image), vlm.encode_image(image))
        assert torch.equal(elsewhere.encode_image(image, normalize=True), vlm.encode_image(image))
    assert count_cost(vlm).image_parameters == sum(p.numel() for p in vlm.model.visual.parameters())


@pytest.mark.parametrize(
    "name, size, rows, message",
    [
        ("test_vit3", 32, 2, r"takes no pictures of 32 pixels \(Input height .*\); it takes 160 pixels: choose image_size=160"),
        ("test_coatnet", 32, 2, r"takes no pictures of 32 pixels \(.*\); it takes 160 pixels: choose image_size=160"),
        ("inception_v3", 32, 2, r"takes no pictures of 32 pixels \(.*\); it takes 96 or .* pixels: choose image_size=96"),
        ("mobilenetv3_small_050", 32, 1, r"cannot be trained on 1 picture of 32 pixels at once \(Expected more than 1 value"),
    ],
)
def test_a_tower_that_cannot_see_or_learn_says_what_would_work(name, size, rows, message):
    vlm = new_model(SMALL | dict(vision_cfg=image_tower(f"timm:{name}") | dict(image_size=size)))
    with pytest.raises(ValueError, match=message) as error:
        check_student(vlm, f"student='timm:{name}'", rows, "image_size")
    assert str(error.value).startswith(f"student='timm:{name}' ") and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="choose another image tower$|or another image tower$"):
        check_student(vlm, name, rows)


def test_a_tower_is_chosen_without_touching_the_global_generator():
    image_towers._timm_tower.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    image_tower("timm:test_resnet")
    assert torch.equal(torch.rand(1), expected)
    image_tower("timm:test_resnet")["image_size"] = 5
    assert image_tower("timm:test_resnet")["image_size"] == 224, "a configuration is a copy"


def test_a_network_of_timm_without_features_is_refused(monkeypatch):
    monkeypatch.setattr(image_towers, "_TIMM_HEADS", (dict(timm_pool="", timm_proj="linear"),))
    image_towers._timm_tower.cache_clear()
    with pytest.raises(ValueError, match="timm:mobilenetv3_small_050 cannot be an image tower: mat1 and mat2 .*; choose another"):
        image_tower("timm:mobilenetv3_small_050")


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
