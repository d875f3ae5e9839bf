"""The way in: random networks written in the official and in the Hugging Face layout give the features of the code they come from."""

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
from collections import OrderedDict
from pathlib import Path

import forked
import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from vlkd_lab import published
from vlkd_lab.features import Batch
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.models import (
    TINYCLIP_CONFIGS,
    TowerShape,
    count_cost,
    load_model,
    model_config,
    pictures,
    preprocessing,
    save_model,
    shape_cost,
    train_tokenizer,
)
from vlkd_lab.published import (
    RELEASES,
    config_of,
    find_releases,
    from_official,
    own_tokenizer,
    read_checkpoint,
    read_preprocessing,
    read_weights,
)
from vlkd_lab.runs import Run
from vlkd_lab.trainers import check_parameters, find_model, train

GOLDEN = np.load(Path(__file__).parent / "golden" / "published.npz")
SIZES = json.loads((Path(__file__).parent / "golden" / "tinyclip_configs.json").read_text())
CASES = ("vit", "resnet", "auto")
AUTO = {
    "image": TowerShape(21, 8, (1, 4, 0), (88, 27, 121)),
    "text": TowerShape(13, 8, (1, 0, 2), (64, 34, 14)),
}


def official_state(case):
    "The state dict of one case by the names that the authors' code gave it"
    names = json.loads(str(GOLDEN[f"{case}/layout"]))
    pieces = np.split(GOLDEN[f"{case}/weights"], np.cumsum([math.prod(shape) for _, shape, _ in names])[:-1])
    dtypes = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}
    return {name: torch.tensor(piece).reshape(shape).to(dtypes[dtype]) for (name, shape, dtype), piece in zip(names, pieces, strict=True)}


def official_features(case, loader=""):
    return [torch.tensor(GOLDEN[f"{case}/{loader}{tower}_features"]) for tower in ("image", "text")]


def features_of(vlm, case):
    with torch.no_grad():
        said = vlm.encode(Batch(torch.tensor(GOLDEN[f"{case}/image"]).float(), torch.tensor(GOLDEN[f"{case}/text"]).long()))
    return [said.image, said.text]


def furthest(ones, others):
    return max((a - b).abs().max().item() for a, b in zip(ones, others, strict=True))


@pytest.fixture
def home(tmp_path):
    "A folder with a tokenizer of 300 entries, into which official files are written beside their configurations"
    train_tokenizer(["a small red star left of a large blue house"] * 9, tmp_path, 300)

    def write(case, state=None, **beside):
        torch.save({"state_dict": official_state(case) if state is None else state, **beside}, tmp_path / f"{case}.pt")
        (tmp_path / f"{case}.json").write_text(str(GOLDEN[f"{case}/config"]))
        return tmp_path / f"{case}.pt"

    write.folder = tmp_path
    return write


# the official layout


@pytest.mark.parametrize("case", CASES)
def test_an_official_file_gives_the_features_of_the_authors_code(case, home):
    vlm = load_model(home(case), "cpu")
    assert furthest(features_of(vlm, case), official_features(case)) < 2e-6
    assert math.isclose(vlm.scale.item(), GOLDEN[f"{case}/scale"], rel_tol=1e-6)
    assert not vlm.model.training and all(p.dtype == torch.float32 for p in vlm.model.parameters())


def second_name(name):
    "The one that the authors' code gives a tower after pruning it"
    return re.sub(r"^_(image|text)_encoder(\.module)?", r"\1_encoder_without_ddp", name)


WRAPPINGS = {"bare": lambda name: name.replace(".module.", "."), "whole": lambda name: f"module.{name}", "second": second_name}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_of_any_kind_come_off(wrapping, home):
    state = {WRAPPINGS[wrapping](name): tensor for name, tensor in official_state("vit").items()}
    assert furthest(features_of(load_model(home("vit", state), "cpu"), "vit"), official_features("vit")) < 2e-6


def test_what_the_authors_training_saves_beside_the_weights_does_no_harm(home):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    state = OrderedDict(official_state("vit")) | {"_text_encoder.module.attn_mask": torch.zeros(10, 10)}
    file = home("vit", state, args=argparse.Namespace(lr=1e-3, name="x", logs=None), epoch=3, name="x", optimizer=[optimizer.state_dict()])
    assert furthest(features_of(load_model(file, "cpu"), "vit"), official_features("vit")) < 2e-6


def test_towers_cut_by_gates_keep_their_unequal_shapes(home):
    state = official_state("auto")
    vlm = load_model(home("auto", state | {second_name(name): tensor for name, tensor in state.items()}), "cpu")
    assert vlm.config["towers"] == AUTO and vlm.config["model_cfg"]["vision_cfg"]["width"] == 32
    assert furthest(features_of(vlm, "auto"), official_features("auto", "loader_")) < 1e-5, "their loader multiplies by gates of 0.999994"
    assert shape_cost(vlm.config["model_cfg"], AUTO).parameters == count_cost(vlm).parameters
    again = load_model(save_model(vlm, home.folder / "again"), "cpu")
    assert furthest(features_of(again, "auto"), features_of(vlm, "auto")) == 0 and again.config["towers"] == AUTO


def test_a_layer_that_lost_everything_is_no_layer(home):
    state = {n: t for n, t in official_state("vit").items() if "visual.transformer.resblocks.0." not in n}
    config = json.loads(str(GOLDEN["vit/config"])) | dict(mask_image=True, mask_text=True)
    file = home("vit", state)
    file.with_suffix(".json").write_text(json.dumps(config))
    vlm, whole = load_model(file, "cpu"), load_model(home("vit"), "cpu")
    whole.model.visual.transformer.resblocks = whole.model.visual.transformer.resblocks[1:]
    assert len(vlm.model.visual.transformer.resblocks) == 1 and vlm.config["towers"] is None, "one layer of full size is plain again"
    assert vlm.config["model_cfg"]["vision_cfg"]["layers"] == 1
    assert furthest(features_of(vlm, "vit"), features_of(whole, "vit")) == 0
    assert furthest(features_of(vlm, "vit"), official_features("vit")) > 0.01


def test_a_layer_without_neurons_adds_nothing_after_its_attention(home):
    state = {n: t for n, t in official_state("auto").items() if not re.search(r"visual.*resblocks\.1\.(mlp|ln_2)", n)}
    vlm, whole = load_model(home("auto", state), "cpu"), load_model(home("auto"), "cpu")
    for weight in whole.model.visual.transformer.resblocks[1].mlp.c_proj.parameters():
        weight.data.zero_()
    assert vlm.config["towers"]["image"].neurons == (88, 0, 121)
    assert furthest(features_of(vlm, "auto"), features_of(whole, "auto")) < 1e-6


def test_gates_are_left_out_where_they_did_their_work_and_refused_where_not(home):
    gates = "_image_encoder.module.l0_module."
    open_ones = {f"{gates}hidden_loga": torch.full((24,), 4.6), f"{gates}lambda_1": torch.tensor(-3.0)}
    assert furthest(features_of(load_model(home("vit", official_state("vit") | open_ones), "cpu"), "vit"), official_features("vit")) < 2e-6
    closed = open_ones | {f"{gates}heads_loga": torch.tensor([[4.6, -4.6, 4.6]] * 2)}
    with pytest.raises(ValueError, match="image tower is not cut yet: 2 closed gates"):
        load_model(home("vit", official_state("vit") | closed), "cpu")
    assert load_model(home("auto", official_state("auto") | {"_image_encoder.l0_module.hidden_loga": torch.tensor([-4.6] * 32)}), "cpu")


def test_two_names_that_disagree_are_refused():
    name = "_image_encoder.module.visual.proj"
    with pytest.raises(ValueError, match="two networks"):
        from_official(official_state("vit") | {"image_encoder_without_ddp.visual.proj": official_state("vit")[name] + 1})


@pytest.mark.parametrize("name", SIZES["models"])
def test_sizes_read_off_published_weights_are_the_published_sizes(name):
    with torch.device("meta"):
        state = open_clip.model.CLIP(**TINYCLIP_CONFIGS[name]).state_dict()
    assert config_of(state) == TINYCLIP_CONFIGS[name]


def test_a_file_without_a_configuration_has_heads_of_64_and_gelu(tmp_path):
    vision = dict(image_size=32, layers=1, width=128, patch_size=16, mlp_ratio=2.5)
    config = dict(embed_dim=24, vision_cfg=vision, text_cfg=dict(width=64, heads=1, layers=2))
    torch.manual_seed(0)
    wanted, image = open_clip.model.CLIP(**config).eval(), torch.randn(1, 3, 32, 32)
    state = {f"_image_encoder.{n}" if n.startswith("visual") else f"_text_encoder.{n}": t.half() for n, t in wanted.state_dict().items()}
    state["_logit_scale.logit_scale"] = state.pop("_text_encoder.logit_scale")
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "mine.safetensors")
    vlm = load_model(tmp_path / "mine.safetensors", "cpu")
    wanted.load_state_dict(wanted.half().float().state_dict())
    assert torch.allclose(vlm.model.encode_image(image), wanted.encode_image(image), atol=1e-5)
    assert vlm.config["towers"] is None and vlm.config["preprocess_cfg"]["size"] == 32 and vlm.tokenizer(["a cat"]).shape == (1, 77)


def test_plain_names_need_a_configuration_and_its_activation_counts(home):
    plain = from_official({n: t.float() for n, t in official_state("vit").items()})
    file = home("vit", plain)
    config = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="activation.*vit.json"):
        load_model(file, "cpu")
    for quick in (False, True):
        file.with_suffix(".json").write_text(json.dumps({"model_cfg": config | dict(quick_gelu=quick)}))
        assert (furthest(features_of(load_model(file, "cpu"), "vit"), official_features("vit")) < 2e-6) is not quick


def test_weights_that_do_not_fit_are_named(home):
    file = home("vit")
    config = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps(config | dict(embed_dim=14)))
    with pytest.raises(ValueError, match=r"vit.pt do not fit.*text_projection is \(16, 12\) and should be \(16, 14\)"):
        load_model(file, "cpu")
    with pytest.raises(ValueError, match="logit_scale is missing"):
        load_model(home("vit", {n: t for n, t in official_state("vit").items() if "logit_scale" not in n}), "cpu")
    with pytest.raises(ValueError, match="visual.more is unknown"):
        load_model(home("vit", official_state("vit") | {"_image_encoder.visual.more": torch.zeros(2)}), "cpu")


def test_pictures_are_prepared_as_the_authors_do(home):
    pixels = load_model(home("vit"), "cpu").preprocess(Image.fromarray(GOLDEN["picture"]))
    assert pixels.shape == (3, 16, 16)
    settings = load_model(home("vit"), "cpu").config["preprocess_cfg"] | dict(size=32)
    assert np.allclose(preprocessing(settings)(Image.fromarray(GOLDEN["picture"])).numpy(), GOLDEN["pixels"], atol=1e-5)


# no pickle is run


class Intruder:
    "Makes a folder when it is unpickled"

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["args", "state_dict", "alone", "legacy"])
def test_a_pickle_that_would_act_does_not(place, tmp_path):
    mark, file = tmp_path / "was here", tmp_path / "evil.pt"
    beside = dict(args=Intruder(mark), state_dict={"logit_scale": torch.zeros(())})
    held = dict(args=beside, state_dict=dict(state_dict=dict(logit_scale=Intruder(mark))))
    torch.save(held.get(place, Intruder(mark)), file, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(ValueError, match=r"calls for (posix|nt)\.mkdir") as error:
        load_model(file, "cpu")
    assert not mark.exists() and "Nothing in it was run" in str(error.value)


def test_a_hub_folders_pickle_does_not_act_either(hugging, tmp_path):
    folder = hugging()
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Intruder(tmp_path / "was here")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="mkdir"):
        load_model(folder, "cpu")
    assert not (tmp_path / "was here").exists()


def test_the_command_of_the_refusal_converts_a_trusted_file(home):
    file = home("vit", extra=Path("somewhere"))
    with pytest.raises(ValueError, match="calls for pathlib") as error:
        load_model(file, "cpu")
    command = next(line.strip() for line in str(error.value).splitlines() if line.strip().startswith("python"))
    subprocess.run(command.replace("python", forked.python(), 1), shell=True, check=True)
    assert furthest(features_of(load_model(file.with_suffix(".safetensors"), "cpu"), "vit"), official_features("vit")) < 2e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript archive")
def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pt")
    for name in ("text", "list", "script"):
        with pytest.raises(ValueError, match=f"{name}.pt"):
            read_weights(tmp_path / f"{name}.pt")
    torch.save({"_image_encoder.visual.proj": torch.zeros(2, 2)}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="not the weights of a CLIP.*text_projection"):
        load_model(tmp_path / "half.pt", "cpu")


# the Hugging Face layout

TEXT = dict(hidden_size=24, intermediate_size=100, num_hidden_layers=2, num_attention_heads=3, hidden_act="gelu", eos_token_id=2)
IMAGE = dict(hidden_size=32, intermediate_size=70, num_hidden_layers=3, num_attention_heads=4, hidden_act="gelu", patch_size=8)
IMAGE |= dict(image_size=32)
PICTURES = dict(
    crop_size=32,
    do_center_crop=True,
    do_normalize=True,
    do_resize=True,
    feature_extractor_type="CLIPFeatureExtractor",
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
    resample=3,
    size=32,
)
CAPTIONS = ["a photo of a cat", "A  Photo of THE dog's 12 toys!!", "naïve café, 3:15pm", "long " * 90]


@pytest.fixture(scope="session")
def clip_words():
    "transformers' CLIP tokenizer, from the words that open_clip brings along"
    simple, names = open_clip.tokenizer.SimpleTokenizer(), {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    merges = [pair for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    return CLIPTokenizer(vocab={names.get(word, word): number for word, number in simple.encoder.items()}, merges=merges)


@pytest.fixture
def hugging(tmp_path, clip_words):
    "Writes a random model as the hub has them: a folder with config.json, weights, preprocessor and tokenizer.json"

    def write(text=None, image=None, name="hugging", pickled=False, words=True):
        torch.manual_seed(4)
        config = CLIPConfig(projection_dim=20, text_config=TEXT | (text or {}), vision_config=IMAGE | (image or {}))
        write.model = CLIPModel(config).eval()
        for weight in write.model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        folder = tmp_path / name
        write.model.save_pretrained(folder)
        if words:
            clip_words.save_pretrained(folder)
            (folder / "tokenizer_config.json").unlink()
        (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES))
        if pickled:
            state = write.model.state_dict() | {f"{t}_model.embeddings.position_ids": torch.arange(9)[None] for t in ("text", "vision")}
            torch.save(state, folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        return folder

    return write


def their_features(model, picture, tokens, **more):
    with torch.no_grad():
        found = model.get_image_features(pixel_values=picture), model.get_text_features(input_ids=tokens, **more)
    return [torch.nn.functional.normalize(getattr(f, "pooler_output", f), dim=-1) for f in found]  # older transformers give them bare


def our_features(vlm, picture, tokens):
    with torch.no_grad():
        return [vlm.encode_image(picture), vlm.encode_text(tokens)]


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("eos", [2, 49407])
def test_a_hub_folder_gives_the_features_of_transformers(act, pickled, eos, hugging, clip_words):
    folder, picture = hugging(dict(hidden_act=act, eos_token_id=eos), dict(hidden_act=act), pickled=pickled), torch.randn(4, 3, 32, 32)
    vlm = load_model(folder, "cpu")
    theirs = clip_words(CAPTIONS, truncation=True, max_length=77, padding=True, return_tensors="pt")  # padded with the end token
    wanted = their_features(hugging.model, picture, theirs["input_ids"], attention_mask=theirs["attention_mask"])
    assert furthest(our_features(vlm, picture, vlm.tokenizer(CAPTIONS)), wanted) < 2e-6
    assert theirs["input_ids"].shape[1] == 77, "the longest caption fills the context, so both can read these tokens"
    assert furthest(our_features(vlm, picture, theirs["input_ids"]), wanted) < 2e-6
    assert vlm.config["model_cfg"].get("quick_gelu", False) is (act == "quick_gelu") and vlm.config["towers"] is None
    assert math.isclose(vlm.scale.item(), hugging.model.logit_scale.exp().item(), rel_tol=1e-6)
    assert not hasattr(vlm.tokenizer, "save_pretrained"), "CLIP's words are open_clip's own tokenizer"


def test_norms_and_approximations_of_each_tower_are_those_of_transformers(hugging):
    folder = hugging(dict(layer_norm_eps=0.3), dict(layer_norm_eps=0.01, hidden_act="gelu_pytorch_tanh"))
    vlm, picture = load_model(folder, "cpu"), torch.randn(2, 3, 32, 32)
    tokens = vlm.tokenizer(CAPTIONS[:2])
    assert furthest(our_features(vlm, picture, tokens), their_features(hugging.model, picture, tokens)) < 2e-6
    assert vlm.config["model_cfg"]["vision_cfg"]["act_kwargs"] == dict(approximate="tanh") and "act_kwargs" not in vlm.config["model_cfg"]["text_cfg"]
    assert vlm.config["model_cfg"]["text_cfg"]["norm_kwargs"] == dict(eps=0.3)


@pytest.mark.parametrize("name", [r.architecture for r in RELEASES.values() if r.hub])
def test_a_hub_configuration_of_published_sizes_is_the_labs(name, tmp_path):
    sizes = SIZES["models"][name]
    said = dict(model_type="clip", architectures=["CLIPModel"], projection_dim=sizes["embed_dim"], text_config_dict=None)
    for part in ("vision", "text"):
        width, layers, heads = (sizes[part][k] for k in ("width", "layers", "heads"))
        said[f"{part}_config"] = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads)
        said[f"{part}_config"] |= dict(hidden_act="gelu")
    said["text_config"]["eos_token_id"], said["vision_config"]["patch_size"] = 2, sizes["vision"]["patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert model_config(tmp_path) == TINYCLIP_CONFIGS[name]


def test_an_end_token_that_is_not_the_largest_is_found(hugging, tmp_path):
    words = train_tokenizer(["a small red star left of a large blue house"] * 9, tmp_path / "words", 300, 16)
    end = words.tokenizer.eos_token_id
    folder = hugging(dict(vocab_size=310, eos_token_id=end, max_position_embeddings=16), words=False)
    words.tokenizer.save_pretrained(folder)
    vlm = load_model(folder, "cpu")
    tokens = vlm.tokenizer(["a red star", "a large house on the left"])
    tokens[:, 2] = 305  # an added word above the end token
    picture = torch.randn(2, 3, 32, 32)
    assert furthest(our_features(vlm, picture, tokens), their_features(hugging.model, picture, tokens)) < 2e-6
    assert vlm.config["model_cfg"]["text_cfg"]["eos_id"] == end and torch.equal(words(["a red star"]), vlm.tokenizer(["a red star"]))
    again = load_model(save_model(vlm, tmp_path / "again"), "cpu")
    assert furthest(our_features(again, picture, tokens), our_features(vlm, picture, tokens)) == 0


def test_what_open_clip_cannot_say_is_refused(hugging):
    refused = {
        "same in both towers": (dict(hidden_act="quick_gelu"), {}),
        "gelu_pytorch_tanh or quick_gelu": (dict(hidden_act="relu"), dict(hidden_act="relu")),
        "three channels": ({}, dict(num_channels=4)),
    }
    for number, (message, changes) in enumerate(refused.items()):
        folder = hugging(*changes, name=f"refused-{number}")
        with pytest.raises(ValueError, match=message):
            load_model(folder, "cpu")


def test_a_folder_whose_parts_disagree_is_refused(hugging):
    folder = hugging()
    said = json.loads((folder / "config.json").read_text())
    said["vision_config"]["hidden_size"] = 40
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"hugging do not fit.*is \(32,.* and should be \(40,"):
        load_model(folder, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        load_model(folder, "cpu")
    (folder / "config.json").write_text(json.dumps(dict(model_type="blip", vision_config={})))
    with pytest.raises(FileNotFoundError, match="CLIPModel or SiglipModel"):
        load_model(folder, "cpu")


def test_from_hub_to_open_clip_and_back_nothing_changes(hugging, tmp_path):
    folder, picture = hugging(dict(hidden_act="quick_gelu"), dict(hidden_act="quick_gelu")), torch.randn(2, 3, 32, 32)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES | dict(resample=2, image_mean=[0.5, 0.4, 0.3])))
    vlm = load_model(folder, "cpu")
    out = save_model(vlm, tmp_path / "out")
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{out}")
    words = open_clip.get_tokenizer(f"local-dir:{out}")
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(picture, normalize=True), vlm.encode_image(picture))
        assert torch.equal(model.encode_text(words(CAPTIONS), normalize=True), vlm.encode_text(vlm.tokenizer(CAPTIONS)))
    photo = Image.fromarray(GOLDEN["picture"])
    theirs = CLIPImageProcessorPil.from_pretrained(folder)(photo, return_tensors="np").pixel_values[0]
    assert np.allclose(vlm.preprocess(photo).numpy()[:, :-1], theirs[:, 1:], atol=1e-5), "of 7 rows too many 4 go above here, 3 there"
    assert torch.equal(prepare(photo), vlm.preprocess(photo)) and load_model(out, "cpu").same_view(vlm)


@pytest.mark.parametrize("case", ["vit", "resnet"])
def test_an_official_network_opens_in_open_clip_alone(case, home):
    out = save_model(load_model(home(case), "cpu"), home.folder / "out")
    model = open_clip.create_model(f"local-dir:{out}", require_pretrained=True).eval()
    with torch.no_grad():
        image = model.encode_image(torch.tensor(GOLDEN[f"{case}/image"]).float(), normalize=True)
        text = model.encode_text(torch.tensor(GOLDEN[f"{case}/text"]).long(), normalize=True)
    assert furthest([image, text], official_features(case)) < 2e-6


PREPARED = {
    "old": PICTURES,
    "new": PICTURES | dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=True, rescale_factor=1 / 255),
    "bilinear": PICTURES | dict(resample=2),
    "squashed": PICTURES | dict(size={"height": 32, "width": 32}, do_center_crop=False),
    "bare": PICTURES | dict(do_normalize=False),
    "silent": {},
}


@pytest.mark.parametrize("way", PREPARED)
def test_pixels_are_those_of_transformers(way, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPARED[way]))
    prepare = preprocessing(pictures._plain(read_preprocessing(tmp_path, 32)))
    noise = np.random.default_rng(0).integers(0, 256, (60, 101, 3), dtype=np.uint8)
    sizes = {} if PREPARED[way] else dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    kinds = (CLIPImageProcessorPil, CLIPImageProcessor)
    noise = Image.fromarray(noise)
    exact, default = (np.array(kind.from_pretrained(tmp_path, **sizes)(noise, return_tensors="np").pixel_values[0]) for kind in kinds)
    assert np.allclose(prepare(noise).numpy(), exact, atol=1e-5)
    assert np.abs(prepare(noise).numpy() - default).max() < 6 / 255 / 0.26, "torchvision's resizing rounds otherwise"


REFUSED = {
    "become squares of 32": dict(size=64),
    "squares": dict(crop_size=30),
    "divided by 255": dict(rescale_factor=1 / 127.5),
    "bilinear": dict(resample=1),
    "of 32 pixels": dict(do_center_crop=False),
    "otherwise": dict(do_resize=False),
}


@pytest.mark.parametrize("message", REFUSED)
def test_another_preparation_is_refused(message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PICTURES | REFUSED[message]))
    with pytest.raises(ValueError, match=message):
        read_preprocessing(tmp_path, 32)


def test_newer_processors_say_it_in_another_file(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_processor=PICTURES | dict(image_mean=[0.5] * 3))))
    assert read_preprocessing(tmp_path, 32)["mean"] == [0.5] * 3


def test_words_of_another_vocabulary_are_not_taken_for_clips(tmp_path, clip_words):
    clip_words.save_pretrained(tmp_path)
    assert own_tokenizer(tmp_path, 49408) is None and own_tokenizer(tmp_path, 49410) == tmp_path
    file = tmp_path / "tokenizer.json"
    said = json.loads(file.read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    file.write_text(json.dumps(said))
    assert own_tokenizer(tmp_path, 49408) == tmp_path


# SigLIP

SIGLIP_TEXT = dict(hidden_size=24, intermediate_size=100, num_hidden_layers=2, num_attention_heads=3, projection_size=32)
SIGLIP_TEXT |= dict(vocab_size=310, max_position_embeddings=16, bos_token_id=1, eos_token_id=2)
SIGLIP_IMAGE = dict(hidden_size=32, intermediate_size=70, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)


@pytest.fixture
def siglip(tmp_path):
    "A function: a random SiglipModel in a folder of the hub's layout, which it keeps as `siglip.model`"

    def write(text=None, image=None, name="siglip", dtype=torch.float32, words=True, **saved):
        config = SiglipConfig(text_config=SIGLIP_TEXT | (text or {}), vision_config=SIGLIP_IMAGE | (image or {}))
        torch.manual_seed(0)
        model = SiglipModel(config).eval()
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        folder = tmp_path / name
        model.to(dtype).save_pretrained(folder, **saved)
        write.model = model.float()
        if words:
            train_tokenizer(["a small red star left of a large blue house"] * 9, folder, 300, 16)
        size = config.vision_config.image_size
        SiglipImageProcessorPil(size=dict(height=size, width=size)).save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_siglip_of_any_size_gives_the_features_of_transformers(act, dtype, siglip, tmp_path):
    folder = siglip(dict(hidden_act=act), dict(hidden_act=act), dtype=dtype, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file() and not (folder / "model.safetensors").exists()
    vlm, picture = load_model(folder, "cpu"), torch.randn(3, 3, 32, 32)
    tokens = vlm.tokenizer(CAPTIONS)
    wanted = their_features(siglip.model, picture, tokens)
    assert tokens.shape == (4, 16) and furthest(our_features(vlm, picture, tokens), wanted) < 2e-6
    logits = siglip.model(pixel_values=picture, input_ids=tokens).logits_per_image
    ours = our_features(vlm, picture, tokens)
    assert torch.allclose(vlm.scale * ours[0] @ ours[1].T + vlm.model.logit_bias, logits, atol=1e-4)
    photo = Image.fromarray(GOLDEN["picture"])
    pixels = SiglipImageProcessorPil.from_pretrained(folder)(photo, return_tensors="pt").pixel_values[0]
    assert torch.allclose(vlm.preprocess(photo), pixels, atol=1e-5)
    assert type(vlm.model).__name__ == "CustomTextCLIP" and vlm.config["towers"] is None
    again = load_model(save_model(vlm, tmp_path / "again"), "cpu")
    assert furthest(our_features(again, picture, tokens), ours) == 0 and again.same_view(vlm)
    assert again.config == vlm.config and not (tmp_path / "again" / "open_clip_config.json").exists(), "no name of timm's says its sizes"


def test_published_sizes_have_the_names_of_open_clips_own_configurations(tmp_path):
    layouts = {"ViT-B-16-SigLIP": (768, 12, 12, 3072, 16, 224), "ViT-B-32-SigLIP2-256": (768, 12, 12, 3072, 32, 256),
               "ViT-L-16-SigLIP-384": (1024, 24, 16, 4096, 16, 384), "ViT-SO400M-14-SigLIP-384": (1152, 27, 16, 4304, 14, 384),
               "ViT-SO400M-16-SigLIP2-512": (1152, 27, 16, 4304, 16, 512)}  # fmt: skip
    for name, (width, layers, heads, neurons, patch, size) in layouts.items():
        sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=neurons)
        SiglipConfig(text_config=sizes, vision_config=sizes | dict(patch_size=patch, image_size=size)).save_pretrained(tmp_path)
        ours, theirs = model_config(tmp_path), open_clip.get_model_config(name)
        assert ours["vision_cfg"]["timm_model_name"] == theirs["vision_cfg"]["timm_model_name"]
        assert {k: ours["vision_cfg"][k] for k in theirs["vision_cfg"]} == theirs["vision_cfg"] and "width" not in ours["vision_cfg"]
        text = {k: v for k, v in theirs["text_cfg"].items() if k not in ("hf_tokenizer_name", "tokenizer_kwargs", "vocab_size", "mlp_ratio")}
        assert {k: ours["text_cfg"][k] for k in text} == text, name
        neurons_of = int(ours["text_cfg"]["width"] * ours["text_cfg"].get("mlp_ratio", 4))
        assert neurons_of == neurons and ours["embed_dim"] == theirs["embed_dim"]


def test_what_of_siglips_does_not_fit_is_refused(siglip, tmp_path):
    refused = {
        "hidden_act must be gelu or gelu_pytorch_tanh, not gelu_pytorch_tanh and relu": (dict(hidden_act="relu"), {}),
        "must end in a pool": ({}, dict(vision_use_head=False)),
        "layer_norm_eps of images must be 1e-06, not 1e-05": ({}, dict(layer_norm_eps=1e-5)),
        "images have 32 features .* and texts 40": (dict(projection_size=40), {}),
        "three channels": ({}, dict(num_channels=4)),
    }
    for number, (message, changes) in enumerate(refused.items()):
        with pytest.raises(ValueError, match=message):
            load_model(siglip(*changes, name=f"refused-{number}"), "cpu")
    folder = siglip(words=False)
    with pytest.raises(ValueError, match="holds no tokenizer, such as tokenizer.json"):
        load_model(folder, "cpu")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | dict(model_type="siglip2")))
    with pytest.raises(ValueError, match=r"patches of a number that varies \(NaFlex\)"):
        load_model(folder, "cpu")


def test_a_siglips_tokenizer_that_needs_a_package_names_it(siglip):
    folder = siglip()
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | dict(tokenizer_class="SiglipTokenizer")))
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    if importlib.util.find_spec("sentencepiece") is None:
        with pytest.raises(ImportError, match="cannot be opened: .*SentencePiece.*fast form"):
            load_model(folder, "cpu")


def test_a_siglips_pickle_does_not_act(siglip, tmp_path):
    folder = siglip()
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Intruder(tmp_path / "was here")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="mkdir"):
        load_model(folder, "cpu")
    assert not (tmp_path / "was here").exists()


def test_a_siglip_of_the_hub_is_fetched_with_its_words(hub, siglip):
    siglip(name="hub/some/siglip")
    vlm = load_model("hf-hub:some/siglip", "cpu")
    assert vlm.image_size == 32 and vlm.name == "hf-hub:some/siglip" and "some/siglip/spiece.model" in hub
    picture = torch.randn(1, 3, 32, 32)
    tokens = vlm.tokenizer(["a cat"])
    assert furthest(our_features(vlm, picture, tokens), their_features(siglip.model, picture, tokens)) < 2e-6


# names

UNCUT = {k: v for k, v in json.loads(str(GOLDEN["auto/config"])).items() if "mask" not in k}


def test_every_published_model_has_its_names():
    data = {"YFCC15M": "YFCC-15M", "LAION400M": "LAION-400M", "LAIONYFCC400M": "LAION+YFCC-400M"}
    table = {(row["config"], row["data"], row["in1k_top1"]) for row in SIZES["published_results"]}
    assert {(r.architecture, data[r.data], r.top1) for r in RELEASES.values()} == table
    for release in RELEASES.values():
        for name in (release.name, f"{release.architecture}/{release.data}", f"wkcn/{release.name}", f"hf-hub:wkcn/{release.name}"):
            assert find_releases(name) == [release]
            assert model_config(name) == TINYCLIP_CONFIGS[release.architecture]
    assert sum(bool(r.hub) for r in RELEASES.values()) == 4 and not find_releases("ViT-B-32")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub whose cache holds what stands in a folder of ours, and no network; the names that were asked for"
    asked = []

    def cached(repository, name, **_):
        asked.append(f"{repository}/{name}")
        file = tmp_path / "hub" / repository / name
        if not file.is_file():
            raise LocalEntryNotFoundError(f"{name} is not there")
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    return asked


SMALLEST = "TinyCLIP-ViT-8M-16-Text-3M"


@pytest.mark.parametrize("name", [SMALLEST, f"wkcn/{SMALLEST}-YFCC15M", f"hf-hub:wkcn/{SMALLEST}-YFCC15M"])
def test_a_published_name_gives_the_published_weights(name, hub, hugging):
    hugging(name=f"hub/wkcn/{SMALLEST}-YFCC15M")
    picture, vlm = torch.randn(1, 3, 32, 32), load_model(name, "cpu")
    tokens = vlm.tokenizer(["a cat"])
    assert furthest(our_features(vlm, picture, tokens), their_features(hugging.model, picture, tokens)) < 2e-6 and vlm.name == name
    assert not any("pytorch_model.bin" in file or "open_clip" in file for file in hub), "nothing large is fetched in vain"


def test_a_repository_of_somebody_else_in_either_layout(hub, hugging):
    hugging(name="hub/some/clip", pickled=True)
    assert load_model("hf-hub:some/clip", "cpu").image_size == 32 and "some/clip/pytorch_model.bin" in hub
    both = hugging(name="hub/some/both")
    (both / "open_clip_config.json").write_text("{}")
    assert not published.repository_is_transformers("some/both") and published.transformers_kind(both) == "", "open_clip's own business"
    with pytest.raises(ValueError, match="no model 'some/clip'"):
        load_model("some/clip", "cpu")


def test_an_official_file_by_name_lies_where_downloads_lie(hub, home, tmp_path, monkeypatch):
    release, folder = RELEASES["TinyCLIP-auto-ViT-22M-32-Text-10M-LAION400M"], tmp_path / "torch" / "checkpoints"
    monkeypatch.setitem(TINYCLIP_CONFIGS, release.architecture, UNCUT)
    with pytest.raises(FileNotFoundError, match=f"put {release.url} at .*{release.name}.pt"):
        load_model(release.architecture, "cpu")
    train_tokenizer(["a small red star"] * 9, folder, 300)
    home("auto").rename(folder / f"{release.name}.pt")
    for name in (release.architecture, folder / f"{release.name}.pt"):
        vlm = load_model(name, "cpu")
        assert furthest(features_of(vlm, "auto"), official_features("auto")) < 2e-6 and vlm.config["towers"] == AUTO
    assert "mask_image" not in vlm.config["model_cfg"]


def test_a_release_that_no_gates_cut_must_have_its_sizes(hub, home, tmp_path, monkeypatch):
    release, folder = RELEASES["TinyCLIP-ResNet-19M-Text-19M-LAION400M"], tmp_path / "torch" / "checkpoints"
    monkeypatch.setitem(TINYCLIP_CONFIGS, release.architecture, UNCUT)
    train_tokenizer(["a small red star"] * 9, folder, 300)
    home("auto").rename(folder / f"{release.name}.pt")
    with pytest.raises(ValueError, match="do not fit its configuration"):
        load_model(release.name, "cpu")


def test_without_a_network_a_name_says_what_to_do(hub):
    with pytest.raises(FileNotFoundError, match="hf download wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M --local-dir"):
        load_model("TinyCLIP-ViT-39M-16-Text-19M", "cpu")
    with pytest.raises(ValueError, match="TinyCLIP-auto-ViT-63M-32-Text-31M-LAION400M or TinyCLIP-auto-ViT-63M-32-Text-31M-LAIONYFCC400M"):
        load_model("TinyCLIP-auto-ViT-63M-32-Text-31M", "cpu")


def test_a_download_that_fails_leaves_nothing_behind(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(FileNotFoundError, match="in reach"):
        load_model("TinyCLIP-ResNet-30M-Text-29M", "cpu")
    assert not list((tmp_path / "torch" / "checkpoints").iterdir())


# jobs


def test_a_folder_of_the_hub_is_a_configuration_and_a_teacher(hugging, scenes, tmp_path):
    folder = hugging(dict(num_attention_heads=3), dict(hidden_size=32, num_attention_heads=4))
    assert model_config(folder) == find_model(folder).config["model_cfg"] == read_checkpoint(folder).config
    given = dict(
        data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", teacher=str(folder), inheritance="manual", stages=1,
        target_sparsity=0.5, steps=2, batch_size=8, validate_pairs=16, device="cpu", out=str(tmp_path / "run"), compare_scratch=False,
    )  # fmt: skip
    train(open_tinyclip(check_parameters(TinyCLIP, given)))
    assert [line["step"] for line in Run(given["out"]).metrics() if "total" in line] == [1, 2]
    assert load_model(tmp_path / "run" / "stage-1" / "student", "cpu").same_view(load_model(folder, "cpu"))


def test_a_siglip_of_the_hub_teaches_and_is_cut(siglip, scenes, tmp_path):
    given = dict(
        data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", teacher=str(siglip()), inheritance="auto", stages=1,
        target_sparsity=0.5, steps=2, batch_size=8, validate_pairs=16, device="cpu", out=str(tmp_path / "run"), compare_scratch=False,
    )  # fmt: skip
    train(open_tinyclip(check_parameters(TinyCLIP, given)))
    student, teacher = (load_model(folder, "cpu") for folder in (tmp_path / "run" / "stage-1" / "student", tmp_path / "siglip"))
    assert student.same_view(teacher) and student.config["towers"]["image"].layout == "timm_pooled"
    assert count_cost(student).parameters < count_cost(teacher).parameters


def test_a_network_cut_by_the_authors_gates_is_a_teacher_too(home):
    teacher = find_model(home("auto"))
    assert furthest(features_of(teacher, "auto"), official_features("auto")) < 2e-6
