"""Weights by tag, file, folder and hub: they compute with the activation and see pictures in the way that they were made with."""

import json
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import save_file

from vlkd_lab.models import load_model, new_model, save_model
from vlkd_lab.published import read_beside, read_weights

TEXT = dict(context_length=10, vocab_size=49408, width=24, heads=3, layers=2)
SMALL = dict(embed_dim=16, vision_cfg=dict(layers=2, width=32, head_width=8, patch_size=8, image_size=16), text_cfg=TEXT)
CLIPS = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD, interpolation="bicubic", resize_mode="shortest")
OTHER = dict(mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5), interpolation="bilinear", resize_mode="squash")


def shaken(config=SMALL, **changes):
    "A random model whose activation is not lost in the numbers"
    vlm = new_model(config | changes, seed=3)
    torch.manual_seed(0)
    for weight in vlm.model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    vlm.model.eval()
    return vlm


def features(model):
    torch.manual_seed(1)
    image = torch.randn(2, 3, 16, 16)
    text = torch.tensor([[49406, 320, 736, 2012, 49407, 0, 0, 0, 0, 0], [49406, 320, 1212, 49407, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        return torch.cat([model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)])


@pytest.fixture
def quick():
    return shaken(quick_gelu=True)


@pytest.fixture
def weights(quick, tmp_path):
    "The file of a QuickGELU network's weights, which does not say that it is one"
    (tmp_path / "bare").mkdir()
    torch.save(quick.model.state_dict(), tmp_path / "bare" / "weights.pt")
    return tmp_path / "bare" / "weights.pt"


@pytest.fixture
def tags(weights, monkeypatch):
    "An architecture of open_clip named small, with two tags that differ in activation, both of the same file"
    monkeypatch.setitem(_MODEL_CONFIGS, "small", SMALL)
    monkeypatch.setitem(_MODEL_CONFIGS, "small-quickgelu", SMALL | dict(quick_gelu=True))
    made = dict(file=str(weights), url="https://x/small-quick.pt", hf_hub="some/small.quick/", quick_gelu=True, **CLIPS)
    later = dict(file=str(weights), url="", hf_hub="some/small.later/", **CLIPS)
    monkeypatch.setitem(_PRETRAINED, "small", dict(openai=made, laion2b_s1=later))
    monkeypatch.setitem(_PRETRAINED, "small-quickgelu", dict(openai=made, old=later))
    return _PRETRAINED


def quietly(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(name, "cpu")


def test_the_activation_comes_from_the_tag(tags, quick, weights, tmp_path):
    truth = features(open_clip.create_model("small", pretrained=str(weights), force_quick_gelu=True).eval())
    gelu = features(open_clip.create_model("small", pretrained=str(weights)).eval())
    assert torch.equal(truth, features(quick.model)) and (truth - gelu).abs().max() > 1e-3
    wanted = {"small/openai": truth, "small/laion2b-s1": gelu, "small-quickgelu/openai": truth, "small-quickgelu/old": truth}
    for name, expected in wanted.items():
        vlm = quietly(name)
        assert torch.equal(features(vlm.model), expected), name
        assert vlm.config["model_cfg"].get("quick_gelu", False) == (expected is truth)
    save_model(quietly("small/openai"), tmp_path / "saved")
    model = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'saved'}")[0]
    assert torch.equal(features(model.eval()), truth) and torch.equal(features(load_model(tmp_path / "saved", "cpu").model), truth)


def test_every_quickgelu_tag_of_open_clip_is_known_as_one(monkeypatch):
    asked = {}

    def create(source, pretrained, quick_gelu, **_):
        asked[source, pretrained] = quick_gelu
        raise InterruptedError

    monkeypatch.setattr("open_clip.create_model", create)
    for name, tag in [pair for pair in open_clip.list_pretrained() if pair[0].startswith(("ViT-B", "ViT-L", "RN", "roberta"))]:
        with pytest.raises(InterruptedError):
            load_model(f"{name}/{tag}", "cpu")
        own = open_clip.get_model_config(name).get("quick_gelu", False)
        assert asked[name, tag] == (own or open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    assert asked["ViT-L-14", "openai"] and asked["ViT-B-16", "metaclip_400m"] and asked["ViT-L-14", "dfn2b"]
    assert not asked["ViT-B-32", "laion2b_s34b_b79k"] and not asked["ViT-L-14", "datacomp_xl_s13b_b90k"]


def test_a_file_by_its_architecture(tags, quick, weights, tmp_path):
    truth = features(quick.model)
    with pytest.warns(UserWarning, match="small-quickgelu/FILE"):
        unsaid = load_model(f"small/{weights}", "cpu")
    assert not torch.equal(features(unsaid.model), truth)
    assert torch.equal(features(quietly(f"small-quickgelu/{weights}").model), truth)
    named = weights.rename(weights.with_name("small-quick.pt"))
    assert torch.equal(features(quietly(f"small/{named}").model), truth), "as the tag's download is called"
    cache = tmp_path / "models--some--small.quick" / "snapshots" / "1"
    cache.mkdir(parents=True)
    cached = named.rename(cache / "open_clip_pytorch_model.bin")
    assert torch.equal(features(quietly(f"small/{cached}").model), truth), "where the tag's download lies"


def test_a_file_by_its_architecture_sees_as_its_tags_do(tags, weights):
    for cfg in tags["small"].values():
        cfg.update(OTHER | dict(quick_gelu=False))
    view = quietly(f"small/{weights}").config["preprocess_cfg"]
    assert {key: view[key] for key in OTHER} == {key: list(value) if isinstance(value, tuple) else value for key, value in OTHER.items()}
    tags["small"]["openai"].update(CLIPS)
    with pytest.warns(UserWarning, match="put a configuration beside it, as weights.json"):
        view = load_model(f"small/{weights}", "cpu").config["preprocess_cfg"]
    assert view["mean"] == list(CLIPS["mean"]) and view["resize_mode"] == "shortest"


def test_what_lies_beside_a_file_counts(tags, quick, weights):
    truth = features(quick.model)
    for cfg in tags["small"].values():
        cfg.update(resize_mode="longest")
    beside = {
        "weights.json": dict(model_cfg=SMALL | dict(quick_gelu=True), preprocess_cfg=OTHER | dict(size=16)),
        "open_clip_config.json": dict(model_cfg=SMALL | dict(quick_gelu=True), preprocess_cfg=OTHER),
    }
    for file, content in beside.items():
        (weights.parent / file).write_text(json.dumps(content))
        for name in (f"small/{weights}", str(weights)):
            vlm = quietly(name)
            view = vlm.config["preprocess_cfg"]
            assert torch.equal(features(vlm.model), truth) and (view["mean"], view["resize_mode"]) == ([0.5, 0.4, 0.3], "squash"), file
        (weights.parent / file).unlink()


def test_transformers_preprocessing_beside_a_file_counts(quick, weights):
    (weights.parent / "weights.json").write_text(json.dumps(SMALL | dict(quick_gelu=True)))
    said = dict(size=dict(height=16, width=16), resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5], do_center_crop=False)
    (weights.parent / "preprocessor_config.json").write_text(json.dumps(said))
    vlm = quietly(str(weights))
    view = vlm.config["preprocess_cfg"]
    assert torch.equal(features(vlm.model), features(quick.model))
    assert (view["mean"], view["interpolation"], view["resize_mode"], view["size"]) == ([0.1, 0.2, 0.3], "bilinear", "squash", 16)
    assert read_beside(weights)["preprocess_cfg"]["std"] == [0.5, 0.5, 0.5]


def test_a_folder_without_a_preprocess_cfg_takes_transformers(quick, tmp_path):
    save_model(quick, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "open_clip_config.json").read_text())
    (tmp_path / "m" / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config["model_cfg"])))
    assert load_model(tmp_path / "m", "cpu").config["preprocess_cfg"] == quick.config["preprocess_cfg"]
    said = dict(size=dict(height=16, width=16), image_mean=[0.5, 0.5, 0.5], image_std=[0.2, 0.2, 0.2], do_center_crop=False)
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(said))
    view = load_model(tmp_path / "m", "cpu").config["preprocess_cfg"]
    assert (view["mean"], view["std"], view["resize_mode"]) == ([0.5] * 3, [0.2] * 3, "squash")


def test_an_older_hub_repository_takes_what_its_tag_says(tags, quick, tmp_path, monkeypatch):
    save_model(quick, tmp_path / "hub")
    model_cfg = {name: value for name, value in quick.config["model_cfg"].items() if name != "quick_gelu"}
    tags["small"]["openai"].update(OTHER)

    def from_hub(model_id, filename=None, **_):
        return str(tmp_path / "hub" / (filename or "open_clip_model.safetensors"))

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", from_hub)
    for whole in (dict(model_cfg=model_cfg), dict(model_cfg=model_cfg, preprocess_cfg=dict(mean=[0.7, 0.7, 0.7]))):
        (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(whole))
        vlm = load_model("hf-hub:some/small.quick", "cpu")
        assert torch.equal(features(vlm.model), features(quick.model)) and vlm.config["model_cfg"]["quick_gelu"]
        assert vlm.config["preprocess_cfg"]["mean"] == [0.7, 0.7, 0.7] if "preprocess_cfg" in whole else list(OTHER["mean"])
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=model_cfg | dict(quick_gelu=False))))
    assert not torch.equal(features(load_model("hf-hub:some/small.quick", "cpu").model), features(quick.model)), "its own word counts"


# the forms that files come in


def parts_of(state, folder, name):
    "The weights in two safetensors files with an index"
    names = sorted(state)
    halves = {f"{name}-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for file, half in halves.items():
        save_file({n: state[n].contiguous() for n in half}, folder / file)
    places = {n: file for file, half in halves.items() for n in half}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=places)))


def test_weights_in_several_files_are_put_together(quick, tmp_path):
    folder = save_model(quick, tmp_path / "m")
    (folder / "open_clip_model.safetensors").unlink()
    parts_of(quick.model.state_dict(), folder, "open_clip_model")
    assert torch.equal(features(load_model(folder, "cpu").model), features(quick.model))
    index = folder / "open_clip_model.safetensors.index.json"
    assert torch.equal(features(load_model(index, "cpu").model), features(quick.model)), "by the index itself"
    (folder / "open_clip_model-00002-of-00002.safetensors").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="open_clip_model-00002-of-00002.safetensors is not beside it"):
        load_model(folder, "cpu")
    index.write_text(json.dumps(dict(weight_map={"logit_scale": "../away"})))
    with pytest.raises(FileNotFoundError, match=r"\.\./away is not beside it"):
        load_model(folder, "cpu")


WRAPPED = {
    "bare": lambda state: state,
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "half": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "bfloat16": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_what_training_and_compiling_put_before_names_comes_off(form, quick, weights):
    state = WRAPPED[form](quick.model.state_dict())
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    whole = dict(epoch=7, name="2026-run", state_dict=state, optimizer=optimizer.state_dict(), scaler=dict(scale=65536.0))
    torch.save(whole, weights)
    (weights.parent / "weights.json").write_text(json.dumps(SMALL | dict(quick_gelu=True)))
    vlm = quietly(str(weights))
    tolerance = dict(half=2e-3, bfloat16=2e-2).get(form, 0)
    assert (features(vlm.model) - features(quick.model)).abs().max() <= tolerance
    assert all(weight.dtype == torch.float32 for weight in vlm.model.parameters())


def test_what_does_not_fit_is_named(quick, weights):
    state = quick.model.state_dict()
    (weights.parent / "weights.json").write_text(json.dumps(SMALL))
    for change, message in {
        "lost": "visual.proj is missing",
        "more": "visual.attnpool.weight is unknown",
        "size": r"ln_final.weight is \(9,\) and should be \(24,\)",
    }.items():
        changed = dict(state)
        if change == "lost":
            changed.pop("visual.proj")
        changed |= dict(more={"visual.attnpool.weight": torch.ones(3)}, size={"ln_final.weight": torch.ones(9)}).get(change, {})
        torch.save(changed, weights)
        with pytest.raises(ValueError, match=f"weights.pt do not fit its configuration: {message}"):
            load_model(weights, "cpu")


def test_a_text_tower_of_its_own_by_names_of_either_time(tmp_path):
    vlm = shaken(custom_text=True, init_logit_bias=-5.0)
    folder = save_model(vlm, tmp_path / "m")
    old = {name.removeprefix("text."): tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    save_file(old, folder / "open_clip_model.safetensors")
    again = load_model(folder, "cpu")
    assert torch.equal(features(again.model), features(vlm.model)) and again.model.logit_bias == vlm.model.logit_bias


def test_a_folder_with_several_files_of_weights_says_which_name_counts(quick, tmp_path):
    folder = save_model(quick, tmp_path / "m")
    (folder / "open_clip_model.safetensors").rename(folder / "mine.safetensors")
    assert torch.equal(features(load_model(folder, "cpu").model), features(quick.model)), "the only one will do"
    torch.save(quick.model.state_dict(), folder / "other.pt")
    with pytest.raises(FileNotFoundError, match="one of its 2 files of weights must be called so"):
        load_model(folder, "cpu")
    assert set(read_weights(folder / "mine.safetensors")) == set(quick.model.state_dict())
    assert Path(folder / "other.pt").is_file()
