"""Teachers of every kind: each teaches, is cut and copied where it can be, and says before training what works where it cannot."""

import json
import re
from functools import partial

import open_clip
import pytest
import torch
from conftest import TINY

from vlkd_lab.export import export_student
from vlkd_lab.models import load_model, new_model, save_model
from vlkd_lab.runs import Run
from vlkd_lab.trainers import TinyCLIP, check_parameters, open_tinyclip, train

RESNET = dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None)
TIMM = dict(timm_model_name="test_vit3", timm_model_pretrained=False, timm_pool="map", timm_proj="none", image_size=160)
SIGLIP_TEXT = dict(no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs=dict(eps=1e-6), act_kwargs=dict(approximate="tanh"))
COCA = dict(multimodal_cfg=dict(width=32, heads=4, layers=1, context_length=24, vocab_size=300), custom_text=True)


def kind(vision=None, text=None, **whole):
    "A tiny configuration with some settings of its own"
    return TINY | dict(vision_cfg=TINY["vision_cfg"] | (vision or {}), text_cfg=TINY["text_cfg"] | (text or {})) | whole


CAN_BE_CUT = {
    "plain": kind(),
    "quick_gelu": kind(quick_gelu=True),
    "layer_scale": kind(dict(ls_init_value=0.3), dict(ls_init_value=0.2)),
    "average": kind(dict(pool_type="avg", final_ln_after_pool=True), dict(no_causal_mask=True, pool_type="last")),
    "no_first_norm": kind(dict(no_ln_pre=True)),
    "patch_dropout": kind(dict(patch_dropout=0.5)),
    "norms": kind(dict(norm_kwargs=dict(eps=1e-3), act_kwargs=dict(approximate="tanh")), dict(norm_kwargs=dict(eps=1e-2))),
    "sines": kind(dict(pos_embed_type="sin_cos_2d")),
    "custom_block": kind(dict(block_type="custom")),
    "not_square": kind(dict(image_size=[32, 64])),
    "custom_text": kind(text=SIGLIP_TEXT, custom_text=True, init_logit_bias=-10),
    "scale_of_one_row": kind(nonscalar_logit_scale=True),
}
CANNOT_BE_CUT = {
    "resnet": kind() | dict(vision_cfg=RESNET),
    "norm_of_queries": kind(dict(qk_norm=True)),
    "scaled_heads": kind(dict(scale_heads=True, scale_attn=True, scale_fc=True, scale_attn_inner=True)),
    "attentional_pool": kind(dict(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)),
    "class_embedding": kind(text=dict(embed_cls=True), custom_text=True),
    "no_projection": kind(text=dict(proj_type="none", width=16, heads=2)),
    "coca": kind(dict(output_tokens=True), dict(embed_cls=True, output_tokens=True), **COCA),
    "timm": kind() | dict(vision_cfg=TIMM | dict(timm_model_name="test_convnext", timm_pool="avg", timm_proj="linear"), embed_dim=64),
    "siglip": kind(text=SIGLIP_TEXT, custom_text=True, init_logit_bias=-10) | dict(vision_cfg=TIMM, embed_dim=96),
}


@pytest.fixture(scope="session")
def words(tiny_teacher):
    "The tokenizer of the tiny teacher"
    return load_model(tiny_teacher, "cpu").tokenizer


@pytest.fixture(scope="session")
def folder_of(words, tmp_path_factory):
    "A function: the folder of an untrained teacher of a configuration, made once"
    home, made = tmp_path_factory.mktemp("teachers"), {}

    def folder(name, config):
        if name not in made:
            text = config["text_cfg"] | dict(vocab_size=300, hf_tokenizer_name="tiny")
            torch.manual_seed(0)
            vlm = new_model(config | dict(text_cfg=text), tokenizer=words, seed=4)
            for weight in vlm.model.parameters():
                weight.data += 0.02 * torch.randn_like(weight)
            made[name] = save_model(vlm, home / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "The file of a small student's configuration; its words and pictures will be the teacher's"
    file = tmp_path_factory.mktemp("student") / "small.json"
    file.write_text(json.dumps(kind(dict(layers=1), dict(layers=1))))
    return file


@pytest.fixture
def job(scenes, tmp_path):
    "A function: a job of a few steps with a teacher"

    def open_job(teacher, **changes):
        given = dict(
            data=f"{scenes}/train-000000.tar", val=f"{scenes}/val-000000.tar", teacher=str(teacher), stages=1, target_sparsity=0.5, steps=3,
            batch_size=8, warmup=1, validate_every=9, validate_pairs=8, probe_pairs=0, keep_snapshots=0, device="cpu",
            compare_scratch=False, checkpoint_seconds=1e6, out=str(tmp_path / "run"), shuffle=8,
        )  # fmt: skip
        return open_tinyclip(check_parameters(TinyCLIP, given | changes))

    return open_job


def followed(open_job, small, **changes):
    "The job with what its messages advise, and the messages"
    messages = []
    while True:
        try:
            return open_job(**changes), messages
        except ValueError as error:
            messages.append(str(error))
            assert len(messages) < 4, messages
            advice = dict(re.findall(r"(?:use|choose|and choose|or choose) (inheritance|losses)='([^']+)'", str(error)))
            changes |= advice | (dict(student=str(small)) if "student=NAME" in str(error) else {})


def features(model, tokenizer, shape, rows=2):
    "Unit rows of random pictures and two captions"
    picture = torch.randn(rows, 3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = model.encode_text(tokenizer(["a red star", "a small house"]), normalize=True)
        return model.encode_image(picture, normalize=True), text


def apart(ones, others):
    return max(float((a - b).abs().max()) for a, b in zip(ones, others, strict=True))


def opens_elsewhere(folder, out, onnx=False):
    "Export a student; open_clip alone computes the same"
    export_student(folder, out, onnx=onnx)
    vlm, (model, _, _) = load_model(folder, "cpu"), open_clip.create_model_and_transforms(f"local-dir:{out}")
    assert apart(features(vlm.model, vlm.tokenizer, vlm.image_shape), features(model.eval(), vlm.tokenizer, vlm.image_shape)) < 5e-6
    return vlm


@pytest.mark.parametrize("inheritance", ["auto", "auto_uniform", "manual", "none"])
@pytest.mark.parametrize("name", CAN_BE_CUT)
def test_plain_transformers_of_every_sort_are_cut_copied_and_exported(name, inheritance, folder_of, job, tmp_path):
    opened = job(folder_of(name, CAN_BE_CUT[name]), inheritance=inheritance)
    train(opened)
    assert Run(tmp_path / "run").status()["state"] != "failed"
    vlm = opens_elsewhere(tmp_path / "run" / "stage-1" / "student", tmp_path / "out")
    teacher = opened.teacher.config["model_cfg"]
    theirs = {part: set(teacher[part]) for part in ("vision_cfg", "text_cfg")}
    assert all(theirs[part] <= set(vlm.config["model_cfg"][part]) for part in theirs), "nothing that the teacher computes is lost"
    assert vlm.config["model_cfg"].get("quick_gelu") == teacher.get("quick_gelu")


@pytest.mark.parametrize("name", CANNOT_BE_CUT)
def test_what_cannot_be_cut_is_refused_before_training_and_the_advice_works(name, folder_of, job, small, tmp_path):
    teacher = folder_of(name, CANNOT_BE_CUT[name])
    for inheritance in ("auto", "auto_uniform", "manual", "none"):
        opened, messages = followed(partial(job, teacher), small, inheritance=inheritance)
        assert messages and opened.options.inheritance == "none" and not (tmp_path / "run" / "stage-1").exists()
    train(opened)
    opens_elsewhere(tmp_path / "run" / "stage-1" / "student", tmp_path / "out")
