"""Teachers of every kind: each teaches, is cut and copied where it can be, and says before training what works where it cannot."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import pytest
import timm as timm_library
import torch
from conftest import TINY
from open_clip.tokenizer import HFTokenizer
from transformers import BertConfig, CLIPConfig, CLIPModel

from vlkd_lab.data import load_pairs
from vlkd_lab.evaluation import compare
from vlkd_lab.explorers import GateHistory, _cut_html
from vlkd_lab.export import ONNX_FORMS, check_onnx, compare_onnx, export_onnx, export_student, pad_towers
from vlkd_lab.fusion import train_wordpiece
from vlkd_lab.gates import Gates, budget, close_budget, gate_state, gated, kept_shapes, prunable_weights
from vlkd_lab.inheritance import inherit, plan_gates
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.models import (
    TowerShape,
    copied_config,
    count_cost,
    load_model,
    measure_latency,
    new_model,
    save_model,
    shape_cost,
    text_part,
)
from vlkd_lab.runs import Run, read_snapshot
from vlkd_lab.stages import stage_plan
from vlkd_lab.trainers import FitParameters, check_parameters, copy_manually, lock_towers, open_job, train
from vlkd_lab.widgets import Watched
from vlkd_lab.widgets.gates import GateMatrices
from vlkd_lab.widgets.heads import NetworkDrawing
from vlkd_lab.widgets.network import drawn_towers, network_numbers, standing

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
def timm(name, pool, proj, size, **whole):
    "A configuration with an image tower of timm"
    tower = dict(timm_model_name=name, timm_model_pretrained=False, timm_pool=pool, timm_proj=proj, image_size=size)
    return kind(**dict(custom_text=True) | whole) | dict(vision_cfg=tower)


POOLED = dict(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
OF_OTHER_KINDS = {  # cut by their layouts
    "attentional_pool": kind(POOLED),
    "class_embedding": kind(text=dict(embed_cls=True), custom_text=True),
    "no_projection": kind(text=dict(proj_type="none", width=16, heads=2)),
    "coca": kind(dict(output_tokens=True), dict(embed_cls=True, output_tokens=True), **COCA),
    "coca_of_two_towers": kind(POOLED | dict(output_tokens=True), dict(embed_cls=True, output_tokens=True), **COCA),
    "siglip": kind(text=SIGLIP_TEXT, custom_text=True, init_logit_bias=-10) | dict(vision_cfg=TIMM, embed_dim=96),
    "timm_token": timm("test_vit", "token", None, 160),
    "timm_registers": timm("test_vit2", "avg", "linear", 160),
    "timm_mlp": timm("test_vit", "token", "mlp", 160),
    "eva": timm("eva02_tiny_patch14_224", "token", None, 224),
    "convnext": timm("test_convnext", "avg", "linear", 64, embed_dim=64),
    "fastvit": timm("fastvit_t8", "avg", None, 64),
    "timm_resnet": timm("resnet26", "avg", "linear", 64),
    "basic_blocks": timm("resnet10t", "avg", "linear", 64),
    "resnet": kind() | dict(vision_cfg=RESNET),
}
CANNOT_BE_CUT = {
    "norm_of_queries": kind(dict(qk_norm=True)),
    "scaled_heads": kind(dict(scale_heads=True, scale_attn=True, scale_fc=True, scale_attn_inner=True)),
    "inverted_blocks": timm("test_efficientnet", "avg", "linear", 64),
    "grouped_resnet": timm("resnext50_32x4d", "avg", "linear", 64),
}
ALL = CAN_BE_CUT | OF_OTHER_KINDS | CANNOT_BE_CUT
LARGE = {  # these are not trained in a test
    "perception_encoder": timm("vit_pe_core_tiny_patch16_384", "map", None, 384),
    "mobileclip_b": timm("vit_base_mci_224", "token", None, 224),
    "eva_with_inner_norms": timm("eva02_base_patch16_clip_224", "token", None, 224),
    "vitamin": timm("vitamin_small_224", "avg", "linear", 224),
    "dinov3": timm("vit_small_patch16_dinov3", "token", None, 256),
}


SHALLOW = {  # what timm's networks are built with here, to be quick
    "eva02_tiny_patch14_224": dict(depth=2),
    "fastvit_t8": dict(layers=(1, 2, 1, 1)),
    "resnet26": dict(layers=[1, 2, 1, 1]),
    **{config["vision_cfg"]["timm_model_name"]: dict(depth=2) for config in LARGE.values()},
}


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    "Networks of timm have few blocks; a function: with further options"
    whole, more = timm_library.create_model, {}
    monkeypatch.setattr(timm_library, "create_model", lambda name, *given, **options: whole(name, *given, **options | SHALLOW.get(name, {}) | more))
    return more.update


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
                weight.data = weight.data.nan_to_num(0, 0, 0).clamp(-9, 9) + 0.02 * torch.randn_like(weight)  # open_clip leaves some as they come
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


WAYS = [(name, way) for name in CAN_BE_CUT for way in ("auto", "manual")]
WAYS += [(name, way) for name in ("plain", "layer_scale", "custom_text", "sines") for way in ("auto_uniform", "none")]


@pytest.mark.parametrize(("name", "inheritance"), WAYS)
def test_plain_transformers_of_every_sort_are_cut_copied_and_exported(name, inheritance, folder_of, job, tmp_path):
    opened = job(folder_of(name, CAN_BE_CUT[name]), inheritance=inheritance)
    train(opened)
    assert Run(tmp_path / "run").status()["state"] != "failed"
    vlm = opens_elsewhere(tmp_path / "run" / "stage-1" / "student", tmp_path / "out")
    teacher = opened.teacher.config["model_cfg"]
    theirs = {part: set(teacher[part]) for part in ("vision_cfg", "text_cfg")}
    assert all(theirs[part] <= set(vlm.config["model_cfg"][part]) for part in theirs), "nothing that the teacher computes is lost"
    assert vlm.config["model_cfg"].get("quick_gelu") == teacher.get("quick_gelu")


@pytest.mark.parametrize("inheritance", ["auto", "manual"])
@pytest.mark.parametrize("name", OF_OTHER_KINDS)
def test_towers_of_other_kinds_are_cut_copied_and_exported(name, inheritance, folder_of, job, tmp_path):
    teacher = folder_of(name, OF_OTHER_KINDS[name])
    opened = job(teacher, inheritance=inheritance, losses="affinity_mimicking=1", batch_size=4, steps=2)
    train(opened)
    student = opens_elsewhere(tmp_path / "run" / "stage-1" / "student", tmp_path / "out")
    before = {tower: prunable_weights(shape) for tower, shape in opened.shapes.items()}
    after = {tower: prunable_weights(shape) for tower, shape in student.shapes.items()}
    assert sum(after.values()) < 0.7 * sum(before.values()) and all(after[tower] <= before[tower] for tower in before)
    assert shape_cost(opened.teacher.config["model_cfg"], student.shapes) == count_cost(student)
    rows = stage_plan(Run(tmp_path / "run"), 1).rows()
    for tower, shape in student.shapes.items():
        told = [row.get("neurons") or row["channels"] for row in rows if row["tower"] == tower]
        assert tuple(kept for kept, _ in told) == shape.neurons, "its plan is a table that says what is left of each layer"


@pytest.mark.parametrize("name", CANNOT_BE_CUT)
def test_what_cannot_be_cut_is_refused_before_training_and_the_advice_works(name, folder_of, job, small, tmp_path):
    teacher = folder_of(name, CANNOT_BE_CUT[name])
    for inheritance in ("auto", "auto_uniform", "manual", "none"):
        opened, messages = followed(partial(job, teacher), small, inheritance=inheritance)
        assert messages and opened.options.inheritance == "none" and not (tmp_path / "run" / "stage-1").exists()
    train(opened)
    opens_elsewhere(tmp_path / "run" / "stage-1" / "student", tmp_path / "out")


# every kind teaches a small student of another kind


def hugging_text(folder):
    "The configuration of a teacher whose text tower is a tiny BERT of transformers, and its tokenizer"
    said = ["a small red star left of a large blue house"] * 9
    words = train_wordpiece(said, folder, 120, 24).tokenizer
    BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32
    ).save_pretrained(folder)
    text = dict(hf_model_name=str(folder), hf_tokenizer_name=str(folder), hf_proj_type="linear", hf_pooler_type="mean_pooler")
    return TINY | dict(text_cfg=text | dict(context_length=24)), HFTokenizer(str(folder), context_length=24)


def clip_model(folder, words):
    "A tiny CLIPModel of transformers in several files, with a tokenizer of its own"
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_act="quick_gelu")
    text = sizes | dict(vocab_size=300, max_position_embeddings=24, eos_token_id=299)
    config = CLIPConfig(text_config=text, vision_config=sizes | dict(image_size=32, patch_size=16), projection_dim=16)
    CLIPModel(config).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    words.save_pretrained(str(folder))
    return folder


KINDS = ["plain", "quick_gelu", "layer_scale", "average", "not_square", "custom_text", "hugging_text", "clip_model"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_teaches_a_small_student_from_nothing(name, folder_of, words, job, small, tmp_path):
    if name == "hugging_text":
        config, tokenizer = hugging_text(tmp_path / "bert")
        teacher = save_model(new_model(config, tokenizer=tokenizer), tmp_path / "teacher")
    else:
        teacher = clip_model(tmp_path / "clip", words) if name == "clip_model" else folder_of(name, CAN_BE_CUT[name])
    opened = job(teacher, inheritance="none", student=str(small), losses="affinity_mimicking=1, contrastive=1")
    train(opened)
    vlm = opens_elsewhere(tmp_path / "run" / "stage-1" / "student", tmp_path / "out")
    assert vlm.image_shape == opened.teacher.image_shape and not vlm.config["model_cfg"].get("quick_gelu"), "its own activation"
    texts = ["a red star", "a small house"]
    assert torch.equal(vlm.tokenizer(texts), opened.teacher.tokenizer(texts))


def test_a_student_looks_for_the_end_of_a_caption_where_its_teachers_tokens_have_it(tmp_path):
    config, tokenizer = hugging_text(tmp_path)
    student = new_model(TINY, like=new_model(config, tokenizer=tokenizer)).model.eval()
    tokens = tokenizer(["a red star", "a small red house"])
    assert student.vocab_size == len(tokenizer.tokenizer) and (student.text_pool_type, student.text_eos_id) == ("eos", 3)
    with torch.no_grad():
        short, padded = (student.encode_text(rows, normalize=True) for rows in (tokens, tokens.where(tokens != 0, 7)))
    assert torch.allclose(short, padded), "what follows the end does not count"


# a copied student computes what its teacher computes


def test_a_named_student_that_copies_keeps_the_teachers_activation_and_one_from_nothing_its_own(folder_of, job, small, tmp_path):
    teacher = folder_of("quick_gelu", CAN_BE_CUT["quick_gelu"])
    for inheritance, expected in (("manual", True), ("none", False)):
        opened = job(teacher, inheritance=inheritance, student=str(small), steps=1, out=str(tmp_path / inheritance))
        train(opened)
        student = load_model(tmp_path / inheritance / "stage-1" / "student", "cpu")
        acts = {type(block.mlp.gelu).__name__ for tower in (student.model.visual, student.model) for block in tower.transformer.resblocks}
        assert acts == {"QuickGELU" if expected else "GELU"}
        assert student.config["model_cfg"].get("quick_gelu", False) is expected


@pytest.mark.parametrize("name", CAN_BE_CUT)
def test_a_whole_copy_is_the_teacher(name, folder_of):
    teacher = load_model(folder_of(name, CAN_BE_CUT[name]), "cpu")
    student = new_model(copied_config(TINY, teacher.config["model_cfg"]), like=teacher, seed=9)
    student.model.load_state_dict(copy_manually(teacher, student)[0])
    shape = teacher.image_shape
    assert apart(features(student.model.eval(), teacher.tokenizer, shape), features(teacher.model, teacher.tokenizer, shape)) < 1e-6
    assert torch.equal(student.scale, teacher.scale)


@pytest.mark.parametrize("name", ["layer_scale", "custom_text", "not_square", "norms", *OF_OTHER_KINDS, *LARGE])
def test_a_network_under_gates_is_the_one_that_is_cut_out(name, folder_of, tmp_path):
    if name in LARGE and not timm_library.is_model(LARGE[name]["vision_cfg"]["timm_model_name"]):
        pytest.skip(f"this timm ({timm_library.__version__}) has no such network")
    teacher = load_model(folder_of(name, (ALL | LARGE)[name]), "cpu")
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in teacher.model.parameters():  # as large as trained ones are: fresh ones hardly do anything
            weight.copy_(weight.sign() * weight.abs().clamp(max=1) + (0.3 if weight.dim() == 1 else 0.05) * torch.randn_like(weight))
    state, shapes = teacher.model.state_dict(), teacher.shapes
    gates = Gates(shapes, budget(shapes), kinds=("hidden", "heads", "neurons", "attention_block"))
    for log_alpha in gates.log_alpha.parameters():
        log_alpha.data = 3 * torch.randn_like(log_alpha)
    values = close_budget(gates, 0.5)
    student = new_model(teacher.config["model_cfg"], like=teacher, towers=kept_shapes(shapes, values))
    with torch.no_grad():
        student.model.load_state_dict(inherit(gate_state(state, values, shapes), plan_gates(state, shapes, values)))
        with gated(teacher.model, values, shapes):
            under_gates = features(teacher.model, teacher.tokenizer, teacher.image_shape)
    cut = features(student.model.eval(), teacher.tokenizer, teacher.image_shape)
    assert apart(under_gates, cut) < 2e-5 < 1e-3 < apart(features(teacher.model, teacher.tokenizer, teacher.image_shape), cut)
    cost = shape_cost(teacher.config["model_cfg"], kept_shapes(shapes, values))
    assert cost == count_cost(student)
    if name in ("siglip", "coca_of_two_towers", "convnext", "eva_with_inner_norms"):
        assert max(check_onnx(student, export_onnx(student, tmp_path), batch_sizes=(1, 3)).values()) < 1e-5


@pytest.mark.parametrize("width", [16, 15])  # that of the joint space, and one that would be padded to it
def test_a_pooled_tower_as_wide_as_its_pool_is_saved_and_padded(width, folder_of, tmp_path):
    teacher = load_model(folder_of("attentional_pool", OF_OTHER_KINDS["attentional_pool"]), "cpu")
    cut = replace(teacher.shapes["image"], width=width, heads=(2, 2), neurons=(64, 64))
    student = new_model(teacher.config["model_cfg"], like=teacher, towers={"image": cut}, seed=3)
    assert opens_elsewhere(save_model(student, tmp_path / "student"), tmp_path / "out").shapes["image"] == cut


def test_what_padding_would_change_is_noticed(folder_of, shallow):
    shallow(use_post_norm=True)  # norms behind attention and MLP, by the same names
    teacher = load_model(folder_of("post_norm", OF_OTHER_KINDS["eva"]), "cpu")
    full = teacher.shapes["image"]
    student = new_model(teacher.config["model_cfg"], like=teacher, towers={"image": replace(full, width=96, heads=(1, 2))})
    for weight in student.model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    with pytest.raises(ValueError, match="cannot be padded: features of the padded ones are .* away"):
        pad_towers(student)
    narrower = {"image": replace(full, neurons=(50, 60))}
    assert pad_towers(new_model(teacher.config["model_cfg"], like=teacher, towers=narrower)).config["towers"] is None


SHARE = dict(student_share=0.4, losses="affinity_mimicking=1")


@pytest.mark.parametrize("name", ["siglip", "convnext", "coca_of_two_towers"])
@pytest.mark.parametrize(("method", "changes"), [("Distil", SHARE), ("Distil", SHARE | dict(inheritance="manual")), ("DimeFm", {})])
def test_other_methods_make_a_smaller_student_of_a_teacher_of_another_kind(method, changes, name, folder_of, common, tmp_path):
    teacher = folder_of(name, OF_OTHER_KINDS[name])
    given = common | dict(teacher=str(teacher)) | changes
    job = open_job(method, given | (dict(sentences=common["data"], sentence_batch=12) if method == "DimeFm" else {}))
    train(job)
    student = opens_elsewhere(tmp_path / "run" / "student" / "student", tmp_path / "out")
    assert prunable_weights(student.shapes["image"]) < 0.8 * prunable_weights(job.teacher.shapes["image"])


@pytest.mark.parametrize("name", ["layer_scale", "not_square", "custom_text", "siglip", "coca"])
def test_both_exports_compute_what_the_model_computes(name, folder_of, scenes, tmp_path):
    calibration = load_pairs(scenes / "train-000000.tar", limit=12)
    folder = folder_of(name, ALL[name])
    vlm = opens_elsewhere(folder, tmp_path / "out", onnx=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("sigmoid()" in card and "bias" in card) == (getattr(vlm.model, "logit_bias", None) is not None) == ("softmax" not in card)
    assert "{} × {} pixels".format(*vlm.image_shape) in card and count_cost(vlm).macs > 0
    assert measure_latency({"one": vlm}, batch_size=2, repeats=1)["one"] > 0
    assert check_onnx(vlm, tmp_path / "out" / "onnx", batch_sizes=(3,))
    if name in ("siglip", "coca"):
        export_onnx(vlm, tmp_path / "onnx", forms="fp16, int8, int8_static", calibration=calibration)
        for form in compare_onnx(vlm, tmp_path / "onnx", tuple(ONNX_FORMS), calibration)[1:]:
            assert min(form.cosine.values()) > 0.97, form


def test_an_irregular_layer_scale_is_padded_to_the_same_function(folder_of):
    teacher = load_model(folder_of("layer_scale", CAN_BE_CUT["layer_scale"]), "cpu")
    cut = {"image": TowerShape(23, 8, (3, 1), (5, 90)), "text": TowerShape(19, 8, (0, 2), (40, 0))}
    student = new_model(teacher.config["model_cfg"], like=teacher, towers=cut)
    torch.manual_seed(3)
    for weight in student.model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    student.model.eval()
    padded = pad_towers(student)
    assert apart(features(student.model, teacher.tokenizer, (32, 32)), features(padded.model, teacher.tokenizer, (32, 32))) < 3e-6


# what is wrong is said before training


def test_a_student_that_cannot_be_is_refused_before_training(folder_of, job, tmp_path):
    teacher = folder_of("plain", CAN_BE_CUT["plain"])

    def refused(config, **changes):
        (tmp_path / "student.json").write_text(json.dumps(config))
        with pytest.raises(ValueError) as error:
            job(teacher, student=str(tmp_path / "student.json"), **dict(losses="affinity_mimicking=1") | changes)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    wide = kind(dict(width=64))
    assert "cannot be larger" in refused(wide, inheritance="manual")
    assert "heads of the image tower have 16 channels in the student and 8" in refused(kind(dict(head_width=16)), inheritance="manual")
    assert "choose inheritance='none'" in refused(kind() | dict(vision_cfg=RESNET), inheritance="manual")
    assert "choose another architecture" in refused(kind() | dict(vision_cfg=TIMM), inheritance="none")
    config, _ = hugging_text(tmp_path / "bert")
    assert "vocabulary of its own" in refused(config, inheritance="none")


def test_a_teacher_without_a_common_space_is_refused(folder_of, job):
    lost = OF_OTHER_KINDS["siglip"] | dict(embed_dim=64)
    with pytest.raises(ValueError, match="96 wide and those of captions 64"):
        job(folder_of("lost", lost), inheritance="none", student="ViT-B-32", losses="affinity_mimicking=1")


# what a student begins as, and what of it is locked


def dime(teacher, parameters_of, **changes):
    "An opened DIME-FM job of two steps that change nothing"
    given = parameters_of | dict(sentences=parameters_of["data"], sentence_batch=12, teacher=str(teacher))
    return open_job("DimeFm", given | dict(learning_rate=1e-12, weight_decay=0.0) | changes)


@pytest.fixture
def common(scenes, tmp_path):
    "What jobs of two steps are told"
    data = dict(data=f"{scenes}/train-000000.tar", val=f"{scenes}/val-000000.tar")
    places = dict(out=str(tmp_path / "run"), features=str(tmp_path / "store"), device="cpu")
    sizes = dict(steps=2, batch_size=8, validate_every=9, validate_pairs=8, probe_pairs=0)
    return data | places | sizes | dict(compare_scratch=False)


@pytest.mark.parametrize(("name", "asked"), [("coca", "student"), ("coca", "start_from"), ("plain", "start_from")])
def test_a_cocas_towers_serve_dime_fm_without_its_decoder(name, asked, folder_of, small, common, tmp_path):
    teacher, coca = (folder_of(one, ALL[one]) for one in (name, "coca"))
    job = dime(teacher, common, **{asked: str(small if asked == "student" else coca)})
    train(job)
    student = opens_elsewhere(tmp_path / "run" / "student" / "student", tmp_path / "out")
    images, texts = features(student.model, student.tokenizer, student.image_shape)
    with torch.no_grad():
        taught = job.teacher.encode_text(job.teacher.tokenizer(["a red star", "a small house"]))
    assert apart([texts], [taught]) < 1e-6
    if asked == "start_from":
        begun = load_model(coca, "cpu")
        assert apart([images], features(begun.model, begun.tokenizer, begun.image_shape)[:1]) < 1e-6
    assert not any(part.startswith("text_decoder") for part in student.model.state_dict())


@pytest.mark.parametrize(("teacher", "start"), [("plain", "quick_gelu"), ("quick_gelu", "norms")])
def test_an_image_tower_of_another_activation_is_refused_or_kept(teacher, start, folder_of, common, tmp_path):
    theirs, begun = (folder_of(name, CAN_BE_CUT[name]) for name in (teacher, start))
    with pytest.raises(ValueError, match="has one activation: choose text_tower='student'"):
        dime(theirs, common, start_from=str(begun))
    with pytest.raises(ValueError, match="computes with them otherwise .*: leave student empty"):
        dime(theirs, common, start_from=str(begun), student=str(begun))
    assert not (tmp_path / "run").exists() and not (tmp_path / "store").exists()
    train(dime(theirs, common, start_from=str(begun), text_tower="student"))
    student, begun = load_model(tmp_path / "run" / "student" / "student", "cpu"), load_model(begun, "cpu")
    images = (features(vlm.model, vlm.tokenizer, begun.image_shape)[:1] for vlm in (student, begun))
    assert apart(*images) < 1e-6


BEHIND = {
    "coca": ("proj",),
    "attentional_pool": ("attn_pool.query", "proj"),
    "siglip": ("trunk.attn_pool.latent",),
    "convnext": ("head.proj.weight",),
}


@pytest.mark.parametrize("name", BEHIND)
def test_one_unlocked_layer_is_a_layer_and_what_stands_behind_it(name, folder_of):
    model = load_model(folder_of(name, ALL[name]), "cpu").model
    lock_towers(model, FitParameters(lock_image=True, unlocked_image_layers=1, lock_text=True, unlocked_text_layers=1))
    image = {part for part, weight in model.visual.named_parameters() if weight.requires_grad}
    a_block = re.compile(r"((?:resblocks|trunk\.blocks|stages\.\d+\.blocks)\.\d+)\.")
    blocks = {block.group(1) for part in image if (block := a_block.search(part))}
    assert len(blocks) == 1 and image >= set(BEHIND[name]) and "class_embedding" not in image
    text = {part for part, weight in text_part(model).named_parameters() if weight.requires_grad and "resblocks" in part}
    assert {re.search(r"resblocks\.(\d+)", part).group(1) for part in text} == {"1"}


def test_a_resnet_is_locked_as_a_whole_or_refused_in_every_job(folder_of, common):
    resnet = folder_of("resnet", OF_OTHER_KINDS["resnet"])
    with pytest.raises(ValueError, match="not valid for a ResNet"):
        dime(folder_of("plain", CAN_BE_CUT["plain"]), common, start_from=str(resnet), lock_image=True, unlocked_image_layers=1)


def test_the_last_layer_of_a_text_tower_of_transformers_is_unlocked(tmp_path):
    config, tokenizer = hugging_text(tmp_path)
    model = new_model(config, tokenizer=tokenizer).model
    for layers, expected in ((1, {"1"}), (2, {"0", "1"}), (9, {"0", "1"})):
        lock_towers(model, FitParameters(lock_text=True, unlocked_text_layers=layers))
        trained = {name for name, weight in model.text.named_parameters() if weight.requires_grad}
        assert {name.split("layer.")[1][0] for name in trained if ".layer." in name} == expected
        assert "proj.weight" in trained and not any("embeddings" in name for name in trained)


@pytest.mark.parametrize("value, said", [(torch.nan, "the weights visual.proj are not finite"), (3e38, "features of a grey picture .* are not finite")])
@pytest.mark.parametrize("method", ["TinyCLIP", "Distil", "ClipCid", "DimeFm"])
def test_a_teacher_whose_features_are_not_finite_is_refused(method, value, said, folder_of, common, tmp_path):
    teacher = load_model(folder_of("plain", CAN_BE_CUT["plain"]), "cpu")
    with torch.no_grad():
        teacher.model.visual.proj.fill_(value)
    folder = save_model(teacher, tmp_path / "lost")
    with pytest.raises(ValueError, match=said):
        open_job(method, common | dict(teacher=str(folder)))
    assert not (tmp_path / "run").exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize("method", ["TinyCLIP", "Distil", "ClipCid", "DimeFm"])
def test_too_few_shards_for_processes_that_are_still_to_be_started_are_refused(method, folder_of, common, tmp_path):
    teacher = folder_of("plain", CAN_BE_CUT["plain"])
    with pytest.raises(ValueError, match="1 shards cannot feed .* 2 processes"):
        open_job(method, common | dict(teacher=str(teacher), processes=2))
    assert not (tmp_path / "run").exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors", "folder"])
def test_a_damaged_file_says_so_in_one_line(name, folder_of, tmp_path):
    folder = shutil.copytree(folder_of("plain", CAN_BE_CUT["plain"]), tmp_path / "copy")
    file = folder / ("open_clip_model.safetensors" if name == "folder" else name)
    file.write_bytes(b"hello, these are no weights")
    with pytest.raises(ValueError, match="is damaged, or no (PyTorch|safetensors) file") as error:
        load_model(folder if name == "folder" else file, "cpu")
    assert file.name in str(error.value) and "\n" not in str(error.value)


def test_a_tower_that_onnx_cannot_express_is_named_in_one_line(folder_of, tmp_path):
    resized = TIMM | dict(timm_model_name="test_vit", timm_pool="token", timm_proj="linear", image_size=64)
    folder = folder_of("resized", kind() | dict(vision_cfg=resized))
    with pytest.raises(ValueError, match="cannot be written: .*bicubic.*; choose onnx=False") as error:
        export_student(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    opens_elsewhere(folder, tmp_path / "out")


# and what is seen of it


@pytest.mark.parametrize("name", ["siglip", "convnext", "coca_of_two_towers"])
def test_gates_cuts_and_the_network_of_other_kinds_are_drawn(name, folder_of, job, tmp_path):
    opened = job(folder_of(name, OF_OTHER_KINDS[name]), losses="affinity_mimicking=1", batch_size=4, steps=4, keep_snapshots=4, probe_pairs=8)
    train(opened)
    run = Run(tmp_path / "run")
    history = GateHistory(run)
    assert history.matrices(0) and ("image attention heads" in history.matrices(0)) == (name != "convnext")
    row = history.cuts(0, [0.2, 0.5])
    full = shape_cost(opened.teacher.config["model_cfg"], opened.shapes)
    assert (row["parameters"] < full.parameters).all() and row["macs"].is_monotonic_decreasing and "MMACs" in _cut_html(history, 0, 0.5)
    arrays, labels = read_snapshot(history.snapshots[0][0])
    watched = Watched(run)
    watched.look()
    chance = np.random.default_rng(0)
    closing = {name: chance.normal(0, 3, array.shape).astype("f4") for name, array in arrays.items() if name.startswith("gates/")}
    watched.arrays, watched.labels = arrays | closing, labels
    assert GateMatrices().figure(watched) and NetworkDrawing().png(watched)[:4] == b"\x89PNG"
    towers = {tower.name: tower for tower in drawn_towers(watched)}
    assert {tower: drawn.student for tower, drawn in towers.items()} == opened.shapes, "the network under the gates"
    now = standing(watched, list(towers.values()))
    left = count_cost(new_model(opened.teacher.config["model_cfg"], like=opened.teacher, towers=now.shapes))
    numbers = {numbers[0]: numbers[2] for numbers in network_numbers(watched, now)}
    assert numbers["parameters"] == left.parameters / 1e6 < full.parameters / 1e6 and numbers["MMACs per pair"] == left.macs / 1e6
    assert stage_plan(run, 1).plot().axes, "the plan as a picture"


def test_one_tower_is_cut_and_the_other_stays_whole(folder_of, job, tmp_path):
    teacher = folder_of("inverted_blocks", CANNOT_BE_CUT["inverted_blocks"])
    with pytest.raises(ValueError, match="gate_towers='text' leaves it whole and cuts the other"):
        job(teacher, losses="affinity_mimicking=1")
    with pytest.raises(ValueError, match="gate_towers='sound' is not valid: name image, text, or both"):
        job(teacher, gate_towers="sound")
    opened = job(teacher, losses="affinity_mimicking=1", gate_towers="text", batch_size=4, steps=2)
    train(opened)
    student = opens_elsewhere(tmp_path / "run" / "stage-1" / "student", tmp_path / "out")
    before = {name: weight.shape for name, weight in opened.teacher.model.state_dict().items()}
    after = {name: weight.shape for name, weight in student.model.state_dict().items()}
    assert {name for name in before if before[name] != after.get(name)} == {name for name in before if name.startswith("text.") and before[name] != after[name]} != set()
    assert set(student.config["towers"]) == {"text"} and 0.3 < compare(opened).loc["stage-1", "kept"] < 0.7


def test_kinds_of_gates_that_a_tower_cannot_have_are_refused(folder_of, job):
    with pytest.raises(ValueError, match="the image tower can have gates of neurons"):
        job(folder_of("convnext", OF_OTHER_KINDS["convnext"]), gate_kinds="hidden,heads")
    with pytest.raises(ValueError, match="the image tower is in stages: choose inheritance='auto'"):
        job(folder_of("convnext", OF_OTHER_KINDS["convnext"]), inheritance="auto_uniform")


@pytest.mark.parametrize("kinds", ["hidden,heads,neurons", "heads,neurons"])
def test_a_text_tower_of_transformers_is_cut(kinds, job, tmp_path):
    config, tokenizer = hugging_text(tmp_path / "bert")
    config["text_cfg"]["hf_proj_type"] = "mlp"
    teacher = save_model(new_model(config, tokenizer=tokenizer), tmp_path / "teacher")
    train(job(teacher, gate_kinds=kinds, losses="affinity_mimicking=1", batch_size=4, steps=2))
    student = load_model(tmp_path / "run" / "stage-1" / "student", "cpu")
    assert student.shapes["text"].layout == "bert" and sum(student.shapes["text"].neurons) < 128
    if "hidden" in kinds:
        with pytest.raises(ValueError, match="cannot be padded: its norm .*LayerNorm looks at what was cut"):
            pad_towers(student)
        card = (export_student(tmp_path / "run", tmp_path / "out", onnx=True) / "README.md").read_text()
        assert "cannot open it" in card and load_model(tmp_path / "out", "cpu").shapes == student.shapes
    else:
        opens_elsewhere(tmp_path / "run" / "stage-1" / "student", tmp_path / "out")
