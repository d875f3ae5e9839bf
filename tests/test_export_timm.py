"""A student's image tower opens in timm, alone and at its own size, with the student's features; or the card says why not."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file, save_file
from test_export import apart, shaken
from test_teachers import timm as of_timm

from vlkd_lab.export import check_timm, export_student, export_timm, pad_towers, timm_tower, write_timm
from vlkd_lab.export import timm as timm_page
from vlkd_lab.hub_names import siglip_tower
from vlkd_lab.models import load_model, new_model, save_model
from vlkd_lab.models.pictures import preprocessing

VISION = TINY["vision_cfg"]
PLAIN = {
    "plain": {},
    "quick_gelu": dict(quick_gelu=True),
    "tanh": dict(vision_cfg=dict(act_kwargs=dict(approximate="tanh"))),
    "other_epsilon": dict(vision_cfg=dict(norm_kwargs=dict(eps=1e-6))),
    "layer_scale": dict(vision_cfg=dict(ls_init_value=0.3)),
    "no_first_norm": dict(vision_cfg=dict(no_ln_pre=True)),
    "average": dict(vision_cfg=dict(pool_type="avg")),
    "average_then_norm": dict(vision_cfg=dict(pool_type="avg", final_ln_after_pool=True)),
    "not_square": dict(vision_cfg=dict(image_size=[32, 64])),
    "own_sizes": dict(vision_cfg=dict(width=48, layers=3, head_width=16, mlp_ratio=1.7)),
    "custom_text": dict(custom_text=True),
}
OF_TIMM = {
    "siglip_of_own_sizes": dict(embed_dim=48, vision_cfg=siglip_tower((48, 2, 3, 70), 32, 8, tanh=True)),
    "siglip_of_exact_gelu": dict(embed_dim=48, vision_cfg=siglip_tower((48, 2, 3, 96), 32, 8, tanh=False)),
    "token": of_timm("test_vit", "token", None, 160),
    "registers": of_timm("test_vit2", "avg", "linear", 160),
    "other_pool": of_timm("test_vit", "avg", "linear", 160),
    "convnext": of_timm("test_convnext", "avg", "linear", 64),
    "resnet": of_timm("resnet10t", "", "linear", 64),
    "resnet_with_its_own_head": of_timm("resnet10t", "avg", None, 64),
}


@pytest.fixture(scope="module")
def like(tiny_teacher):
    return load_model(tiny_teacher, "cpu")


def student_of(like, changes, towers=None, seed=3):
    "A student of a configuration, none of whose norms and biases is trivial"
    config = like.config["model_cfg"]
    parts = {name: value for name, value in changes.items() if name not in ("vision_cfg", "text_cfg")}
    vision = changes.get("vision_cfg", {})
    if "timm_model_name" not in vision:
        vision = config["vision_cfg"] | vision
    vlm = new_model(config | parts | dict(vision_cfg=vision), tokenizer=like.tokenizer, towers=towers, seed=seed)
    return shaken(vlm, seed, by=0.03)


def pictures_for(vlm, count=2):
    return torch.randn(count, 3, *vlm.image_shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def rows_of(vlm, pictures):
    return vlm.encode_image(pictures)


OPENED = """
import sys, timm, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
for folder in map(Path, sys.argv[1:]):
    model = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    again = timm.create_model(f"local-dir:{folder}/timm").eval()
    timm.models.load_checkpoint(again, str(folder / "timm/model.safetensors"))
    pictures = load_file(folder / "pictures.safetensors")["pictures"]
    with torch.no_grad():
        found = {"image": torch.nn.functional.normalize(model(pictures), dim=-1), "again": torch.nn.functional.normalize(again(pictures), dim=-1)}
    save_file(found, folder / "found.safetensors")
print("vlkd_lab" in sys.modules or "open_clip" in sys.modules)
"""


def opened_by_timm_alone(students, home):
    "Export students by name, open all in a process that has timm and nothing of this lab; how far each is away"
    folders = {}
    for name, vlm in students.items():
        save_model(vlm, home / f"{name}-student")
        folders[name] = export_student(home / f"{name}-student", home / name, onnx=False, transformers=False, timm=True)
        assert "cannot open its image tower" not in (folders[name] / "README.md").read_text(), name
        save_file({"pictures": pictures_for(vlm)}, folders[name] / "pictures.safetensors")
    command = [sys.executable, "-c", OPENED, *map(str, folders.values())]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=home).stdout
    assert printed.strip() == "False"
    found = {}
    for name, vlm in students.items():
        rows = rows_of(vlm, pictures_for(vlm))
        theirs = load_file(folders[name] / "found.safetensors")
        found[name] = max(float((theirs[way] - rows).abs().max()) for way in ("image", "again"))
    return found, folders


@pytest.fixture(scope="module")
def opened(like, tmp_path_factory):
    "Every kind, opened by timm alone: its students, how far each was away, its folder"
    students = {name: student_of(like, changes) for name, changes in (PLAIN | OF_TIMM).items()}
    found, folders = opened_by_timm_alone(students, tmp_path_factory.mktemp("opened"))
    return students, found, folders


@pytest.mark.parametrize("name", PLAIN | OF_TIMM)
def test_timm_alone_gives_the_students_features_at_its_own_size(name, opened):
    students, found, folders = opened
    assert found[name] < 5e-6
    about = json.loads((folders[name] / "timm/config.json").read_text())
    assert {"architecture", "num_classes", "num_features", "pretrained_cfg", "model_args"} <= set(about)
    view = about["pretrained_cfg"]
    assert view["input_size"] == [3, *students[name].image_shape] and view["interpolation"] == "bicubic"
    assert view["mean"] == list(students[name].config["preprocess_cfg"]["mean"])
    weights = load_file(folders[name] / "timm/model.safetensors")
    tower = sum(weight.numel() for weight in students[name].model.visual.parameters())
    added = {"head.bias", "head.fc.bias", "fc.bias", "patch_embed.proj.bias"}  # zeros where open_clip has none
    counted = sum(weight.numel() for key, weight in weights.items() if not re.search("running|num_batches", key))
    extra = sum(weights[key].numel() for key in added & set(weights))
    assert tower <= counted <= tower + extra, "no weight more than the student's own"


def test_what_lies_before_the_projection_and_another_number_of_classes(opened):
    students, _, folders = opened
    for name, projection in (("own_sizes", "proj"), ("convnext", "head.proj.weight")):
        vlm = students[name]
        trunk = timm.create_model(f"local-dir:{folders[name]}/timm", pretrained=True, num_classes=0).eval()
        weight = vlm.model.visual.state_dict()[projection]
        with torch.no_grad():
            rows = trunk(pictures_for(vlm)) @ (weight if projection == "proj" else weight.T)
        assert (torch.nn.functional.normalize(rows, dim=-1) - rows_of(vlm, pictures_for(vlm))).abs().max() < 5e-6
        assert timm.create_model(f"local-dir:{folders[name]}/timm", num_classes=7)(pictures_for(vlm)).shape == (2, 7)


def test_quick_gelu_is_another_builder_and_sizes_are_arguments(opened):
    students, _, folders = opened
    about = {name: json.loads((folders[name] / "timm/config.json").read_text()) for name in ("plain", "quick_gelu", "own_sizes")}
    assert about["plain"]["architecture"] == "vit_base_patch32_clip_224"
    assert about["quick_gelu"]["architecture"] == "vit_base_patch32_clip_quickgelu_224"
    shape = students["own_sizes"].shapes["image"]
    sizes = about["own_sizes"]["model_args"]
    assert (sizes["embed_dim"], sizes["depth"], sizes["num_heads"]) == (48, 3, 3) and int(48 * sizes["mlp_ratio"]) == shape.neurons[0] == 81


def test_a_card_opens_the_tower_as_it_stands(opened, monkeypatch):
    students, _, folders = opened
    folder, vlm = folders["own_sizes"], students["own_sizes"]
    Image.effect_noise((90, 70), 60).convert("RGB").save(folder / "image.png")
    Image.open(folder / "image.png").save(folder / "image.jpg", quality=95)
    card = (folder / "README.md").read_text()
    assert "`vit_base_patch32_clip_224`, at its own size, in `timm/`" in card.replace("\\_", "_")
    code = next(block for block in re.findall(r"```python\n(.*?)```", card, re.S) if "import timm" in block)
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    rows = rows_of(vlm, vlm.preprocess(Image.open(folder / "image.jpg"))[None])
    assert (names["image"] - rows).abs().max() < 1e-5, "the same pixels and the same features"


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_every_way_of_resizing_is_timms_or_said(mode, like, tmp_path):
    vlm = student_of(like, {})
    view = vlm.config["preprocess_cfg"] | dict(resize_mode=mode, mean=[0.5] * 3, std=[0.25] * 3)
    vlm = replace(vlm, preprocess=preprocessing(view), config=vlm.config | dict(preprocess_cfg=view))
    found = write_timm(vlm, vlm, tmp_path / mode)
    if mode == "longest":
        assert found.architecture or "pixels are" in found.problem
    else:
        assert found.apart["pixels"] < 1e-5 and found.apart["image"] < 5e-6


UNEVEN = {
    "3, 2 heads, and in timm": dict(heads=(3, 2), neurons=(64, 64)),
    "64, 40 neurons, and in timm": dict(heads=(3, 3), neurons=(64, 40)),
    "which timm's heads must fill": dict(heads=(2, 2), neurons=(64, 64)),
}


def test_uneven_layers_are_refused_with_the_reason_and_leave_padded(like, tmp_path):
    students = {}
    for number, (reason, kept) in enumerate(UNEVEN.items()):
        image = replace(like.shapes["image"], width=24, head_width=8, **kept)
        vlm = students[f"cut-{number}"] = student_of(like, {}, dict(image=image, text=like.shapes["text"]))
        with pytest.raises(ValueError, match=reason):
            timm_tower(vlm)
        alone = write_timm(vlm, vlm, tmp_path / "alone")
        assert reason in alone.problem and not alone.architecture and not (tmp_path / "alone").exists()
    found, folders = opened_by_timm_alone(students, tmp_path)
    assert len(found) == 3 and max(found.values()) < 5e-6
    assert all("padded to equal layers, in `timm/`" in (folder / "README.md").read_text() for folder in folders.values())


def test_a_tower_of_timm_that_was_cut_evenly_leaves_as_it_was_cut(like, tmp_path):
    whole = student_of(like, OF_TIMM["token"])
    image = whole.shapes["image"]
    size = image.head_width
    cut = replace(image, width=2 * size, heads=(2,) * image.layers, neurons=(50,) * image.layers)
    vlm = shaken(new_model(whole.config["model_cfg"], like=whole, towers=dict(image=cut, text=whole.shapes["text"])), by=0.03)
    found = write_timm(vlm, pad_towers(vlm), tmp_path / "cut")
    assert found.architecture == "test_vit" and not found.is_padded and found.apart["image"] < 5e-6
    assert json.loads((tmp_path / "cut/config.json").read_text())["model_args"]["embed_dim"] == 2 * size
    uneven = replace(cut, neurons=(50, *(30,) * (image.layers - 1)))
    vlm = shaken(new_model(whole.config["model_cfg"], like=whole, towers=dict(image=uneven, text=whole.shapes["text"])), by=0.03)
    found = write_timm(vlm, pad_towers(vlm), tmp_path / "uneven")
    assert found.is_padded and found.apart["image"] < 2e-5


REFUSED = {
    "ends in an attentional pool": dict(vision_cfg=dict(attentional_pool=True, attn_pooler_heads=2)),
    "no builder of timm has the epsilon 0.01": dict(vision_cfg=dict(norm_kwargs=dict(eps=0.01))),
    "it is open_clip's ResNet": dict(vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None)),
    "that a plain transformer of open_clip does not have": dict(vision_cfg=dict(qk_norm=True)),
    "open_clip's mlp.fc1.bias, which no head of timm is": of_timm("test_vit", "token", "mlp", 160),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_why_timm_cannot_have_it_stands_on_the_card_and_nothing_else_is_left(reason, like, tmp_path):
    save_model(student_of(like, REFUSED[reason]), tmp_path / "student")
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False, transformers=False, timm=True)
    card = (out / "README.md").read_text().replace("\\", "")
    line = next(line for line in card.splitlines() if line.startswith("`timm` cannot open its image tower"))
    assert reason in line and not (out / "timm").exists() and "import timm" not in card


def test_what_computes_otherwise_in_timm_is_not_left_there(like, tmp_path, monkeypatch):
    vlm = student_of(like, {})
    export_timm(vlm, tmp_path / "one")
    with pytest.raises(ValueError, match=r"features of images are \S+ away in timm, more than 0.0001"):
        check_timm(student_of(like, {}, seed=4), tmp_path / "one")
    monkeypatch.setattr(timm_page, "_activation", lambda module: "quick_gelu")
    found = write_timm(vlm, vlm, tmp_path / "two")
    assert "features of images are" in found.problem and not (tmp_path / "two").exists()


def test_a_foreign_builder_that_fails_is_a_reason(like, monkeypatch, tmp_path):
    def failing(*_, **__):
        raise TypeError("unexpected keyword 'embed_dim'\nand more")

    monkeypatch.setattr(timm, "create_model", failing)
    found = write_timm(student_of(like, {}), student_of(like, {}), tmp_path / "none")
    assert found.problem.endswith("in these sizes: unexpected keyword 'embed_dim'")


def test_without_the_flag_nothing_is_written_and_an_earlier_tower_goes(like, tiny_teacher, tmp_path):
    out = export_student(tiny_teacher, tmp_path / "away", onnx=False, timm=True)
    assert (out / "timm/model.safetensors").is_file() and apart(like.model, load_model(out, "cpu").model, like.tokenizer) < 2e-6
    out = export_student(tiny_teacher, tmp_path / "away", onnx=False)
    assert not (out / "timm").exists() and "timm" not in (out / "README.md").read_text()
