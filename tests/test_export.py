"""The way out: padded shapes, ONNX, cards, uploads only when asked, and what others' tools find in what was exported."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pandas as pd
import papermill
import pytest
import timm
import torch
from conftest import TINY
from onnx import TensorProto
from onnx import load as load_onnx_graph
from papermill.inspection import _infer_parameters, load_notebook_node
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, SiglipModel
from webdataset import TarWriter

from vlkd_lab.data import load_pairs, raw_samples
from vlkd_lab.evaluation import (
    accuracy,
    classifier,
    compare,
    encode_pairs,
    find_classes,
    finish,
    predict,
    score,
)
from vlkd_lab.export import (
    check_onnx,
    clip_benchmark,
    compare_onnx,
    export_onnx,
    export_program,
    export_student,
    find_origin,
    load_onnx,
    onnx,
    pad_towers,
    padded_shapes,
    push_student,
    repository,
    shards,
    to_clip_benchmark,
)
from vlkd_lab.export import transformers as transformers_page
from vlkd_lab.features import recall
from vlkd_lab.fusion import load_blip, new_blip, save_blip
from vlkd_lab.hub_names import siglip_tower
from vlkd_lab.methods.clip_cid import ClipCid, open_clip_cid
from vlkd_lab.methods.contrastive import Contrastive, open_contrastive
from vlkd_lab.methods.dlip import Dlip, open_dlip
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.models import TowerShape, load_model, new_model, preprocessing, save_model
from vlkd_lab.runs import Run
from vlkd_lab.samples import LABEL_SETS
from vlkd_lab.trainers import check_parameters, train

ROOT = Path(__file__).parent.parent
CUT = {"image": TowerShape(23, 8, (3, 1), (5, 90)), "text": TowerShape(19, 8, (0, 2), (40, 0))}


def shaken(student, seed=0, by=0.2):
    "The student with random weights everywhere, norms included"
    torch.manual_seed(seed)
    for weight in student.model.parameters():
        weight.data += by * torch.randn_like(weight)
    student.model.eval()
    return student


def slim(teacher, cut=CUT, seed=0, **changes):
    "An irregular student of the tiny teacher's kind; changes: of the configuration's parts"
    like = load_model(teacher, "cpu")
    config = {part: of | changes.get(part, {}) if isinstance(of, dict) else of for part, of in like.config["model_cfg"].items()}
    config |= {name: value for name, value in changes.items() if not isinstance(value, dict)}
    return shaken(new_model(config, like=like, towers=cut, seed=seed), seed)


def features(model, tokenizer, size=32):
    torch.manual_seed(1)
    image, text = torch.randn(5, 3, size, size), tokenizer(["a red star", "a large blue house on the sea", "", "a small cat"])
    with torch.no_grad():
        return model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)


def apart(one, other, tokenizer, size=32):
    return max(float((a - b).abs().max()) for a, b in zip(features(one, tokenizer, size), features(other, tokenizer, size), strict=True))


def random_shape(chance):
    heads = tuple(int(n) for n in chance.integers(0, 5, 2))
    return TowerShape(int(chance.integers(9, 33)), int(chance.choice([4, 8])), heads, tuple(int(n) for n in chance.integers(0, 40, 2)))


def test_any_irregular_shape_is_the_same_function_in_open_clips_shapes(tiny_teacher):
    chance, widened = np.random.default_rng(0), 0
    for seed in range(30):
        image, text = random_shape(chance), random_shape(chance)
        changes = dict(vision_cfg=dict(head_width=image.head_width), text_cfg=dict(heads=32 // text.head_width))
        student = slim(tiny_teacher, dict(image=image, text=text), seed, **changes)
        padded, shapes = pad_towers(student), padded_shapes(dict(image=image, text=text))
        assert padded.config["towers"] is None and all(shape.plain for shape in shapes.values())
        for tower, shape in shapes.items():
            cut = dict(image=image, text=text)[tower]
            assert shape.width >= max(cut.width, max(cut.heads) * cut.head_width) and shape.head_width >= cut.head_width * any(cut.heads)
        assert apart(student.model, padded.model, student.tokenizer) < 3e-6, (seed, image, text)
        widened += shapes["image"].width > image.width and shapes["text"].width > text.width
    assert widened > 5, "the stream was widened in many of them"


@pytest.mark.parametrize(
    "changes",
    [
        dict(quick_gelu=True),
        dict(vision_cfg=dict(no_ln_pre=True)),
        dict(vision_cfg=dict(pool_type="avg", final_ln_after_pool=True), text_cfg=dict(no_causal_mask=True, pool_type="last")),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_padding_keeps_other_kinds_of_towers_too(tiny_teacher, changes):
    student = slim(tiny_teacher, **changes)
    padded = pad_towers(student)
    assert apart(student.model, padded.model, student.tokenizer) < 3e-6
    vision = padded.config["model_cfg"]["vision_cfg"]
    assert vision["width"] == 27 and "norm_kwargs" not in vision, "no norm needs another epsilon"


def test_the_epsilon_of_the_norms_is_carried_over(tiny_teacher):
    student = slim(tiny_teacher)
    for norm in (m for m in student.model.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.eps = 0.5
    assert apart(student.model, pad_towers(student).model, student.tokenizer) < 3e-6


def test_padding_computes_in_double_precision_and_leaves_the_student_as_it_was(tiny_teacher):
    student = slim(tiny_teacher)
    before = {name: weight.clone() for name, weight in student.model.state_dict().items()}
    student.model.double()
    padded = pad_towers(student)
    assert all(torch.equal(before[name].double(), weight) for name, weight in student.model.state_dict().items())
    assert pad_towers(padded) is padded and all(weight.dtype == torch.float32 for weight in padded.model.parameters())


def towers_of(kind, teacher, blip):
    if kind == "blip":
        return shaken(load_blip(blip, "cpu"), by=0.02)
    if kind == "slim":
        return slim(teacher)
    if kind == "resnet":
        vision = dict(layers=[1, 1, 1, 1], width=8, image_size=64, patch_size=None)
        return shaken(new_model(TINY | dict(vision_cfg=vision, text_cfg=TINY["text_cfg"] | dict(vocab_size=49408))), by=0.02)
    return load_model(teacher, "cpu")


@pytest.mark.parametrize("kind", ["plain", "slim", "resnet", "blip"])
def test_onnx_gives_the_features_of_pytorch_for_any_batch(kind, tiny_teacher, tiny_blip, tmp_path):
    import onnxruntime

    vlm = towers_of(kind, tiny_teacher, tiny_blip)
    vlm.model.train()
    apart = check_onnx(vlm, export_onnx(vlm, tmp_path), batch_sizes=(1, 2, 3, 7))
    assert set(apart) == {"image", "text"} and max(apart.values()) < 3e-6
    assert vlm.model.training and torch.backends.mha.get_fastpath_enabled(), "as they were"
    sessions = {side: onnxruntime.InferenceSession(str(tmp_path / f"{side}.onnx")) for side in apart}
    text = vlm.tokenizer(["a red star", "a house"]).numpy()
    rows = sessions["text"].run(None, {"tokens": text})[0]
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5) and abs(rows[0] - rows[1]).max() > 1e-4
    said = {name: json.loads(value) for name, value in sessions["image"].get_modelmeta().custom_metadata_map.items()}
    assert said["scale"] == pytest.approx(float(vlm.scale.detach())) and said["mean"] == vlm.config["preprocess_cfg"]["mean"]
    assert said["normalised"] is True and said["size"] == vlm.image_size


def test_onnx_files_of_another_model_and_constants_of_the_example_are_noticed(tiny_teacher, tmp_path, monkeypatch):
    student = slim(tiny_teacher)
    export_onnx(student, tmp_path)
    with pytest.raises(ValueError, match="image.onnx differs from the model in PyTorch by"):
        check_onnx(shaken(slim(tiny_teacher), seed=5), tmp_path)
    honest = onnx._TextSide.forward
    monkeypatch.setattr(onnx._TextSide, "forward", lambda self, tokens: honest(self, tokens) + float(tokens.shape[0] - 2))
    constant = export_onnx(student, tmp_path)
    with pytest.raises(ValueError, match="text.onnx differs"):
        check_onnx(student, constant)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxruntime; or export with onnx=False"):
        export_onnx(student, tmp_path)


def test_half_precision_leaves_as_float32(tiny_teacher, tmp_path):
    student = slim(tiny_teacher)
    half = replace(student, model=student.model.bfloat16())
    assert max(check_onnx(half, export_onnx(half, tmp_path)).values()) < 3e-6
    assert next(half.model.parameters()).dtype == torch.bfloat16


FORMS = ("fp16", "int8", "int8_static")


@pytest.mark.parametrize("kind", ["plain", "slim", "resnet", "blip"])
def test_smaller_forms_lose_little_take_any_batch_and_are_compared_as_files(kind, scenes, tiny_teacher, tiny_blip, tmp_path):
    vlm = towers_of(kind, tiny_teacher, tiny_blip)
    calibration, pairs = load_pairs(scenes / "train-000000.tar", limit=20), load_pairs(scenes / "val-000000.tar")
    export_onnx(vlm, tmp_path, forms=FORMS, calibration=calibration)
    names = {"image.onnx", "text.onnx"} | {f"{side}.{form}.onnx" for side in ("image", "text") for form in FORMS}
    assert {path.name for path in tmp_path.iterdir()} == names
    classes = find_classes(scenes / "val-000000.tar")
    compared = {one.form: one for one in compare_onnx(vlm, tmp_path, FORMS, pairs, classes)}
    assert list(compared) == ["PyTorch", "fp32", *FORMS]
    honest = encode_pairs(vlm, pairs)
    for form in ("fp32", *FORMS):
        files = load_onnx(vlm, tmp_path, form, threads=1)
        rows = encode_pairs(files, pairs, batch_size=7)  # the last one is smaller
        for side in ("image", "text"):
            ours, theirs = getattr(honest, side), getattr(rows, side)
            assert compared[form].cosine[side] == pytest.approx(float((ours * theirs).sum(1).mean()), abs=5e-3)
            assert float((ours - theirs).abs().max()) <= compared[form].difference[side] + 0.02
            assert theirs.norm(dim=1).sub(1).abs().max() < 2e-3, "unit rows"
        scores = score(load_onnx(vlm, tmp_path, form), pairs, classes)[0]
        assert compared[form].scores == scores and compared[form].pairs == len(pairs)
        assert files.scale.item() == pytest.approx(float(vlm.scale.detach()))
        about = files.model.sessions["text"].get_modelmeta().custom_metadata_map
        assert json.loads(about["scale"]) == pytest.approx(float(vlm.scale.detach())) and json.loads(about["normalised"])
    assert max(compared["fp32"].difference.values()) < 3e-6 < max(compared["int8"].difference.values())
    assert compared["int8"].difference != compared["int8_static"].difference
    assert all(min(compared[form].cosine.values()) > 0.98 for form in FORMS)


def types_of(path, kind):
    "How many stored tensors of a file are of a type"
    return sum(tensor.data_type == kind for tensor in load_onnx_graph(str(path)).graph.initializer)


def test_smaller_forms_hold_halves_and_bytes_with_a_scale_for_each_channel(scenes, tiny_teacher, tmp_path):
    vlm = load_model(tiny_teacher, "cpu")
    export_onnx(vlm, tmp_path, forms="int8_static,fp16,int8", calibration=load_pairs(scenes / "train-000000.tar", limit=8))
    for side in ("image", "text"):
        assert types_of(tmp_path / f"{side}.onnx", TensorProto.INT8) == types_of(tmp_path / f"{side}.onnx", TensorProto.FLOAT16) == 0
        assert types_of(tmp_path / f"{side}.fp16.onnx", TensorProto.FLOAT16) > 10
        for form in ("int8", "int8_static"):
            graph = load_onnx_graph(str(tmp_path / f"{side}.{form}.onnx")).graph
            scales = [tensor for tensor in graph.initializer if tensor.name.endswith("_scale") and len(tensor.dims) == 1]
            assert sum(tensor.dims[0] > 1 for tensor in scales) >= 8, "a scale for each channel of each matrix"
            words = vlm.config["model_cfg"]["text_cfg"]["vocab_size"]
            tables = [tensor.data_type for tensor in graph.initializer if tensor.dims and tensor.dims[0] == words]
            assert len(tables) == (side == "text") and set(tables) <= {TensorProto.INT8, TensorProto.UINT8}, "token embeddings too"
            dynamic = {node.op_type for node in graph.node} & {"DynamicQuantizeLinear", "QuantizeLinear"}
            assert dynamic == {"DynamicQuantizeLinear" if form == "int8" else "QuantizeLinear"}
    reader = onnx._CalibrationRows(vlm, "text", "tokens", load_pairs(scenes / "train-000000.tar", limit=5), batch_size=2)
    assert [len(batch["tokens"]) for batch in iter(reader.get_next, None)] == [2, 2, 1]


def test_a_form_that_is_of_no_use_or_not_there_is_refused(scenes, tiny_teacher, tmp_path):
    vlm = load_model(tiny_teacher, "cpu")
    export_onnx(vlm, tmp_path, forms="fp16")
    other = shaken(load_model(tiny_teacher, "cpu"), seed=5)
    with pytest.raises(ValueError, match=r"image.onnx is of no use: the mean cosine .* less than least_cosine=0.95"):
        compare_onnx(other, tmp_path, "fp16", load_pairs(scenes / "val-000000.tar"), least_cosine=0.95)
    broken = load_model(tiny_teacher, "cpu")
    broken.model.visual.proj.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="cosine of its features with the model's is nan"):
        compare_onnx(broken, tmp_path, "fp16")
    with pytest.raises(FileNotFoundError, match=r"image.int8.onnx: export_onnx\(..., forms='int8'\) writes it"):
        load_onnx(vlm, tmp_path, "int8")
    with pytest.raises(ValueError, match="'int4' is not valid: choose from fp32, fp16, int8, int8_static"):
        export_onnx(vlm, tmp_path, forms="int4")
    with pytest.raises(ValueError, match="needs pairs that calibrate it"):
        export_onnx(vlm, tmp_path, forms="int8_static")
    with pytest.raises(ValueError, match="unit rows"):
        load_onnx(vlm, tmp_path).model.encode_image(torch.zeros(1, 3, 32, 32), normalize=False)


def test_a_runs_own_data_calibrate_and_score_the_forms_of_its_student(trained, tiny_teacher, tmp_path, monkeypatch):
    job = trained(TinyCLIP, open_tinyclip, teacher=str(tiny_teacher), stages=1)
    sizes = []
    honest = repository.export_onnx
    monkeypatch.setattr(repository, "export_onnx", lambda *a, **k: sizes.append(k) or honest(*a, **k))
    out = export_student(job.run.folder, tmp_path / "away", onnx_forms=FORMS)
    assert len(sizes[0]["calibration"]) == 120 and sizes[0]["forms"] == ("fp32", *FORMS)
    card = (out / "README.md").read_text()
    student = load_model(job.run.folder / "stage-1" / "student", "cpu")
    scores = score(load_onnx(student, out / "onnx", "int8_static"), load_pairs(job.options.val))[0]
    [line] = [line for line in card.splitlines() if line.startswith("| int8_static |")]
    assert f"| {scores['image_to_text_r1']:.1%} | {scores['text_to_image_r1']:.1%} |" in line and "on 48 pairs" in card
    assert str(tmp_path) not in card
    config = json.loads((job.run.folder / "config.json").read_text())
    config["parameters"] |= dict(data="gone-{000..001}.tar", val="gone.tar")
    (job.run.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the data of a run do not lie here: name shards as calibration"):
        export_student(job.run.folder, tmp_path / "b", onnx_forms="int8_static")
    card = (export_student(job.run.folder, tmp_path / "b", onnx_forms="int8") / "README.md").read_text()
    assert "on noise and a few texts" in card and "| int8 |" in card and "int8" not in (
        export_student(job.run.folder, tmp_path / "c", onnx=False, onnx_forms="int8") / "README.md"
    ).read_text()


@pytest.mark.parametrize("kind", ["plain", "slim", "blip"])
def test_an_exported_program_gives_the_features_for_any_batch_or_for_one(kind, tiny_teacher, tiny_blip):
    vlm = towers_of(kind, tiny_teacher, tiny_blip)
    vlm.model.train()
    picture, words = torch.randn(3, 3, *vlm.image_shape), vlm.tokenizer(["a red star", "a house", ""])
    of_any = {side: export_program(vlm, side) for side in ("image", "text")}
    assert vlm.model.training, "as it was"
    vlm.model.eval()
    with torch.no_grad():
        assert torch.allclose(of_any["image"].module()(picture), vlm.encode_image(picture), atol=2e-6)
        assert torch.allclose(of_any["text"].module()(words), vlm.encode_text(words), atol=2e-6)
        one = export_program(vlm, "image", batch_size=1).module()
        assert torch.allclose(one(picture[:1]), vlm.encode_image(picture[:1]), atol=2e-6)
        with pytest.raises(AssertionError):
            one(picture)
    with pytest.raises(ValueError, match="side='images' is not valid: image or text"):
        export_program(vlm, "images")


@pytest.fixture
def trained(scenes, tiny_teacher, tmp_path):
    "Runs of every kind of job, trained for six steps"
    common = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", device="cpu")
    common |= dict(steps=6, batch_size=16, warmup=2, validate_every=3, validate_pairs=40, out=str(tmp_path / "run"))

    def make(kind, opened, **given):
        job = opened(check_parameters(kind, common | given))
        train(job)
        return job

    return make


def run_code(folder, card):
    "Execute the card's Python as it stands, in the exported folder; what it printed"
    out, names = StringIO(), {}
    with redirect_stdout(out):
        for block in re.findall(r"```python\n(.*?)```", card, re.S):
            exec(block, names)
    return out.getvalue()


def files_without(folder, *words):
    for path in (p for p in folder.rglob("*") if p.suffix in (".json", ".md", ".txt")):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path


def test_a_tinyclip_run_leaves_for_open_clip(trained, tiny_teacher, scenes, tmp_path, monkeypatch):
    job = trained(TinyCLIP, open_tinyclip, teacher=str(tiny_teacher), stages=2, target_sparsity=0.6)
    finish(job, compare(job))
    out = export_student(job.run.folder, tmp_path / "away", licence="mit", datasets=["conceptual_captions"])
    student = load_model(job.run.folder / "stage-2" / "student", "cpu")
    assert student.config["towers"], "layers differ"
    opened, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    assert type(opened) is open_clip.CLIP and apart(opened.eval(), student.model, tokenizer) < 3e-6
    picture = load_pairs(scenes / "val-000000.tar", limit=1).pil(0)
    assert torch.equal(preprocess(picture), student.preprocess(picture))
    assert apart(load_model(out / "slim", "cpu").model, student.model, tokenizer) == 0
    card = huggingface_hub.ModelCard.load(out / "README.md")
    front = {name: value for name, value in card.data.to_dict().items() if name != "model-index"}
    assert front == dict(license="mit", library_name="open_clip", pipeline_tag="zero-shot-image-classification",
                         tags=["clip", "distillation", "vlkd_lab"], datasets=["conceptual_captions"])  # fmt: skip
    result, config = job.run.result()["models"], job.run.config()
    found = {one.metric_name: one for one in card.data.eval_results}
    assert found["zero-shot accuracy"].metric_value == result["stage-2"]["zero_shot"] and card.data.model_name == "away"
    assert found["image→text R@5"].metric_value == result["stage-2"]["image_to_text_r5"] and found["image→text R@5"].metric_type == "recall"
    assert {(one.dataset_name, one.dataset_args["first_pairs"]) for one in found.values()} == {("val-000000.tar", 40)}
    for wanted in (
        f"| parameters | {result['stage-2']['parameters'] / 1e6:.2f} M |",
        f"| zero-shot accuracy | {result['stage-2']['zero_shot']:.1%} | {result['teacher']['zero_shot']:.1%} |",
        "first 40 validation pairs of val-000000.tar", f"120 samples, fingerprint {config['data']['fingerprint'][:16]}",
        f"{result['teacher']['parameters'] / 1e6:.2f} M parameters, SHA-256 {config['teacher_sha256'][:16]}", "| seed | 0 |",
        f"torch {config['versions']['torch']}", "TinyCLIP", "| target_sparsity | 0.6 |", "feature_mimicking 300",
    ):  # fmt: skip
        assert wanted in card.content, wanted
    files_without(out, str(tmp_path), str(scenes.parent), "/root", "/tmp")
    picture.save(out / "image.jpg")
    monkeypatch.chdir(out)
    shown = re.findall(r"tensor\(\[\[(.*?)\]\]", run_code(out, card.content))
    assert len(shown) == 2, "by open_clip and by transformers"
    by_open_clip, by_transformers = ([float(number) for number in row.split(",")] for row in shown)
    assert by_transformers == pytest.approx(by_open_clip, abs=2e-4) and "as a `CLIPModel`" not in card.content
    assert "In transformers it is a `CLIPModel`" in card.content and set(front) == {"license", "library_name", "pipeline_tag", "tags", "datasets"}


def test_the_last_finished_student_leaves_and_scratch_only_by_name(trained, tiny_teacher, tmp_path):
    job = trained(TinyCLIP, open_tinyclip, teacher=str(tiny_teacher), stages=2, compare_scratch=True)
    run = job.run.folder
    assert find_origin(run).stage == "stage-2" and find_origin(run, "stage-1").folder == run / "stage-1" / "student"
    assert "baseline" in (export_student(run, tmp_path / "away", stage="scratch-2", onnx=False) / "README.md").read_text()
    (run / "stage-2" / "done.json").unlink()
    assert find_origin(run).stage == "stage-1"
    with pytest.raises(ValueError, match="finished stages of run are: scratch-2, stage-1"):
        export_student(run, tmp_path / "unfinished", stage="stage-2")
    assert not (tmp_path / "unfinished").exists()
    card = (tmp_path / "away" / "README.md").read_text()
    assert "image→text R@1" in card, "not evaluated at its end: what its last validation said"


def test_teachers_and_clip_cids_students_leave(trained, tiny_teacher, tmp_path):
    teacher = trained(Contrastive, open_contrastive, image_size=32, patch_size=16, vocabulary=300, out=str(tmp_path / "teacher"))
    card = (export_student(teacher.run.folder, tmp_path / "a", onnx=False) / "README.md").read_text()
    assert "| teacher | none |" in card and "contrastive training from nothing" in card and "|  | this model |\n" in card
    cid = trained(ClipCid, open_clip_cid, teacher=str(tiny_teacher), map_images=24, clusters=6, removed_share=0.3, compare_scratch=False)
    card = (export_student(cid.run.folder, tmp_path / "b", onnx=False) / "README.md").read_text()
    assert "CLIP-CID" in card and "| removed_share | 0.3 |" in card and not (tmp_path / "b" / "slim").exists()


def test_a_blip_leaves_for_transformers_task_by_task(trained, tiny_blip, scenes, tmp_path, monkeypatch):
    given = dict(teacher=str(tiny_blip), student="image:1x32, text:1x32", queue=21, compare_scratch=False, probe_pairs=6)
    job = trained(Dlip, open_dlip, **given)
    out = export_student(job.run.folder, tmp_path / "away", repository="ann/tiny-blip", licence="apache-2.0")
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"retrieval", "captioning", "answering", "onnx"}
    student, again = (load_blip(folder, "cpu") for folder in (job.run.folder / "student" / "student", out))
    assert all(torch.equal(a, b) for a, b in zip(student.model.parameters(), again.model.parameters(), strict=True))
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "zero-shot-image-classification"
    assert "| parameters, decoder |" in card.content and "MMACs, captioning" in card.content and "DLIP" in card.content
    files_without(out, str(tmp_path), str(tiny_blip.parent))
    picture = load_pairs(scenes / "val-000000.tar", limit=1).pil(0)
    picture.save(out / "image.jpg", quality=100, subsampling=0)
    monkeypatch.chdir(out)
    shown = run_code(out, card.content.replace('name = "ann/tiny-blip"', 'name = "."'))
    image, text = student.preprocess(picture)[None], student.tokenizer(["what colour is the star?"])
    with torch.no_grad():
        cosine = float(student.encode_image(image) @ student.encode_text(text).T)
    assert [float(n) for n in re.findall(r"^tensor\(\[\[(-?[\d.]+)\]\]\)", shown)] == [pytest.approx(cosine, abs=0.02)]
    logit = pytest.approx(cosine * float(student.scale.detach()), abs=0.3)
    assert [float(n) for n in re.findall(r"^\[\[(-?[\d.]+)\]\]", shown, re.M)] == [logit]


def test_what_transformers_cannot_open_is_said(tiny_blip, tmp_path):
    shape = replace(load_blip(tiny_blip, "cpu").shape, fusion_layers=1)
    save_blip(new_blip(shape, load_blip(tiny_blip, "cpu").tokenizer), tmp_path / "blip")
    out = export_student(tmp_path / "blip", tmp_path / "away", onnx=False)
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"captioning"}
    assert "cannot open it for retrieval" in (out / "README.md").read_text() and load_blip(out, "cpu").shape.fusion_layers == 1


HOSTILE = '/home/ann/secret/<img src=x onerror="alert(1)">|[a](javascript:b)\n# `c`\u202e.tar'


def test_a_card_shows_names_as_they_are_and_no_folders(tiny_teacher, tmp_path):
    save_model(load_model(tiny_teacher, "cpu"), tmp_path / "run" / "student" / "student")
    (tmp_path / "run" / "student" / "done.json").write_text("{}")
    given = dict(data=HOSTILE, val=HOSTILE, teacher=HOSTILE, validate_pairs=10, note="C:\\Users\\ann\\x, https://ann:key@host/y")
    config = dict(method=HOSTILE, parameters=given, versions={HOSTILE: HOSTILE}, objective={HOSTILE: 1.0}, data=dict(total=3))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    result = dict(models=dict(student=dict(zero_shot=0.5, same_class="nan")), warnings=[HOSTILE])
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    card = (export_student(tmp_path / "run", tmp_path / "away", onnx=False) / "README.md").read_text()
    for forbidden in ("secret", "/home", "Users", "key@", "\u202e", "\n# `"):
        assert forbidden not in card, forbidden
    assert not re.search(r"(?<!\\)(<img|\]\(javascript|`c)", card) and card.count("\\<img") > 5
    assert "| zero-shot accuracy | 50.0% |" in card and "| same class as the teacher | — |" in card
    assert all(line.count("|") - line.count("\\|") == 3 for line in card.splitlines() if line.startswith("| data")), "cells stay cells"
    assert huggingface_hub.ModelCard(card).data.license == "unknown"


def test_a_card_names_each_teacher_of_a_set(tiny_teacher, tmp_path):
    run, digests = tmp_path / "run", ["a" * 64, "b" * 64]
    save_model(load_model(tiny_teacher, "cpu"), run / "student" / "student")
    (run / "student" / "done.json").write_text("{}")

    def lines(teacher, *of):
        config = dict(method="Distil", parameters=dict(teacher=teacher), teacher_sha256=", ".join(of))
        (run / "config.json").write_text(json.dumps(config))
        models = {"teacher": dict(parameters=2_000_000, zero_shot=0.6), "teacher-2": dict(parameters=3_000_000, zero_shot=0.7)}
        (run / "result.json").write_text(json.dumps(dict(models=models | dict(student=dict(zero_shot=0.5, same_class=0.9)))))
        card = (export_student(run, tmp_path / "away", onnx=False) / "README.md").read_text().splitlines()
        return "\n".join(line for line in card if "teacher" in line or "zero-shot" in line and "|" in line)

    card = lines("/data/ann/large=2, ViT-B-32/openai", f"{digests[0]}=0.666667", f"{digests[1]}=0.333333")
    assert f"| teacher 1 | large, weight 0.667, 2.00 M parameters, SHA-256 {digests[0][:16]} |" in card
    assert f"| teacher 2 | ViT-B-32/openai, weight 0.333, 3.00 M parameters, SHA-256 {digests[1][:16]} |" in card
    assert "|  | this model | teacher 1 | teacher 2 |" in card and "| zero-shot accuracy | 50.0% | 60.0% | 70.0% |" in card
    assert "same class as teacher 1" in card and "/data" not in card
    card = lines("/data/ann/a, b=2", digests[0])  # one teacher, whose path cannot be looked at here
    assert f"| teacher | a, b=2, 2.00 M parameters, SHA-256 {digests[0][:16]} |" in card and "|  | this model | its teacher |" in card
    assert "| teacher 2 | b, weight 0.5, 3.00 M parameters, SHA-256 not known |" in lines("a, b"), "of a run without digests"


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(licence="Apache"), "licence='Apache' is not valid: apache-2.0"),
        (dict(repository="mine"), "write USER/NAME"),
        (dict(repository="ann/mine"), "needs the licence that is right"),
        (dict(datasets="coco"), "a list of names"),
        (dict(stage="stage-9"), "finished stages of run are: stage-1"),
        (dict(source="nowhere"), "neither a run folder nor a model's"),
        (dict(out="taken"), "taken holds something else than an earlier export (thesis.txt)"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded_or_written(given, message, tiny_teacher, tmp_path, monkeypatch):
    run = tmp_path / "run"
    save_model(load_model(tiny_teacher, "cpu"), run / "stage-1" / "student")
    (run / "config.json").write_text(json.dumps({"method": "TinyCLIP", "parameters": {}}))
    (run / "stage-1" / "done.json").write_text("{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years")
    monkeypatch.setattr(repository, "load_student", lambda *a: pytest.fail("loaded"))
    given = dict(source=run, out=tmp_path / "away") | {k: tmp_path / v if k in ("source", "out") else v for k, v in given.items()}
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError), match=re.escape(message)):
        export_student(**given)
    assert not (tmp_path / "away").exists() and (tmp_path / "taken" / "thesis.txt").read_text() == "years"


def test_an_earlier_export_is_replaced_whole_and_stays_when_a_new_one_fails(tiny_teacher, tmp_path, monkeypatch):
    save_model(slim(tiny_teacher), tmp_path / "slim-one")
    out = export_student(tmp_path / "slim-one", tmp_path / "away")
    assert (out / "slim").is_dir() and (out / "onnx").is_dir()
    export_student(tiny_teacher, out, onnx=False)
    assert not (out / "slim").exists() and not (out / "onnx").exists()
    monkeypatch.setattr(repository, "check_onnx", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_student(tmp_path / "slim-one", out)
    assert not (out / "slim").exists() and load_model(out, "cpu") and not list(tmp_path.glob(".away*"))


class FakeHub:
    "Takes down what it is asked for"

    asked: list = []

    def create_repo(self, *given, **named):
        self.asked.append(("create_repo", given, named))

    def upload_folder(self, **named):
        self.asked.append(("upload_folder", sorted(p.name for p in Path(named["folder_path"]).iterdir()), named))


def test_nothing_is_uploaded_unless_asked_and_then_exactly_the_folder(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "asked", [])
    out = export_student(tiny_teacher, tmp_path / "away", repository="ann/tiny", licence="mit", onnx=False)
    assert FakeHub.asked == []
    assert push_student(out, "ann/tiny") == "https://huggingface.co/ann/tiny"
    (create, given, named), (upload, names, sent) = FakeHub.asked
    assert (create, given, named["private"], named["exist_ok"]) == ("create_repo", ("ann/tiny",), True, True)
    assert upload == "upload_folder" and sent["repo_id"] == "ann/tiny" and sent["folder_path"] == str(out)
    of_transformers = {"config.json", "model.safetensors", "preprocessor_config.json"}
    of_open_clip = {"open_clip_config.json", "open_clip_model.safetensors"}
    assert set(names) == {"README.md", "tokenizer.json", "tokenizer_config.json"} | of_open_clip | of_transformers
    assert json.loads((out / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "ann/tiny"
    for folder, name, message in (
        (out, "ann/other", "tokenizer is named 'ann/tiny'"),
        (export_student(tiny_teacher, tmp_path / "b", onnx=False), "ann/tiny", "names no licence"),
        (tiny_teacher, "ann/tiny", "no exported student"),
        (out, "tiny", "write USER/NAME"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            push_student(folder, name)
    assert len(FakeHub.asked) == 2


# transformers

CAPTIONS = ["a red star", "A large BLUE house, by the sea!", "", "a star " * 40]
ALL_TEXT = dict(no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs=dict(eps=1e-6))
TANH = dict(act_kwargs=dict(approximate="tanh"))
CLIPS = {
    "plain": {},
    "quick_gelu": dict(quick_gelu=True),
    "custom_text": dict(custom_text=True),
    "end_by_its_name": dict(text_cfg=dict(pool_type="eos", eos_id=299)),
    "approximations_and_norms": dict(vision_cfg=TANH | dict(norm_kwargs=dict(eps=0.01)), text_cfg=dict(norm_kwargs=dict(eps=0.3))),
    "layer_scale": dict(vision_cfg=dict(ls_init_value=0.3), text_cfg=dict(ls_init_value=0.2)),
    "row_of_one_scale": dict(nonscalar_logit_scale=True),
}


def siglip_of(words, tower=None, seed=0, **changes):
    "A student with a SigLIP's towers and the tiny teacher's words, of sizes that timm has no name for"
    text = TINY["text_cfg"] | dict(vocab_size=300, hf_tokenizer_name="tiny") | ALL_TEXT | TANH
    tower = tower or siglip_tower((48, 2, 3, 70), 32, 8, tanh=True)
    config = dict(embed_dim=48, vision_cfg=tower, text_cfg=text, custom_text=True, init_logit_bias=-10.0) | changes
    vlm = shaken(new_model(config, tokenizer=words, seed=seed), seed, by=0.1)
    view = vlm.config["preprocess_cfg"] | dict(mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash")
    return replace(vlm, preprocess=preprocessing(view), config=vlm.config | dict(preprocess_cfg=view))


def photo(height, width):
    "A picture with soft and hard edges"
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([rows * 3 % 256, columns * 5 % 256, (rows * columns) // 9 % 256], axis=2)
    return Image.fromarray(waves.astype(np.uint8))


def as_transformers(folder, kind):
    "What a folder's model and processor of transformers make of pictures and captions: a function, and the processor"
    model, processor = kind.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, backend="pil")

    def both(pictures, captions):
        given = processor(images=pictures, text=captions, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            said = model(**given)
        return said.image_embeds, said.text_embeds, said.logits_per_image, given["pixel_values"]

    return both


def as_ours(vlm, pictures, captions):
    seen = torch.stack([vlm.preprocess(picture) for picture in pictures])
    with torch.no_grad():
        image, text = vlm.encode_image(seen), vlm.encode_text(vlm.tokenizer(captions))
        bias = 0 if getattr(vlm.model, "logit_bias", None) is None else vlm.model.logit_bias
        return image, text, vlm.scale * image @ text.T + bias, seen


def only_transformers_files(folder, to):
    "The way to a repository of the hub that holds nothing else"
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    to.mkdir()
    for path in folder.iterdir():
        if path.name in names:
            shutil.copy(path, to)
    return to


@pytest.mark.parametrize("is_slim", [False, True])
@pytest.mark.parametrize("kind", CLIPS)
def test_a_clip_opens_in_transformers_with_its_pictures_and_words_and_comes_back(kind, is_slim, tiny_teacher, tmp_path):
    student = slim(tiny_teacher, CUT if is_slim else None, **CLIPS[kind])
    save_model(student, tmp_path / "student")
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False)
    pictures = [photo(65, 195), photo(33, 33), photo(99, 33)]  # odd sides, even margins
    ours, theirs = as_ours(student, pictures, CAPTIONS), as_transformers(out, CLIPModel)(pictures, CAPTIONS)
    assert [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)] == pytest.approx([0, 0, 0, 0], abs=2e-4)
    assert apart(open_clip.create_model(f"local-dir:{out}").eval(), student.model, open_clip.get_tokenizer(f"local-dir:{out}")) < 5e-6
    assert isinstance(CLIPProcessor.from_pretrained(out).tokenizer(CAPTIONS, truncation=True)["input_ids"], list)
    again = load_model(only_transformers_files(out, tmp_path / "hub"), "cpu")
    assert [float((a - b).abs().max()) for a, b in zip(ours, as_ours(again, pictures, CAPTIONS), strict=True)] == pytest.approx([0] * 4, abs=2e-4)
    assert "In transformers it is a `CLIPModel`" in (out / "README.md").read_text()
    assert again.config["preprocess_cfg"] == student.config["preprocess_cfg"]


def test_how_somebody_called_a_tokenizer_does_not_stay_with_it(tiny_teacher, tmp_path):
    "Those of sentence-transformers remember 128 tokens, which a processor would take for its own"
    student = slim(tiny_teacher)
    student.tokenizer.tokenizer.init_kwargs |= dict(max_length=128, stride=0, truncation_strategy="longest_first")
    save_model(student, tmp_path / "student")
    assert json.loads((tmp_path / "student" / "tokenizer_config.json").read_text())["max_length"] == 128
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False)
    assert "In transformers it is a `CLIPModel`" in (out / "README.md").read_text()
    given = CLIPProcessor.from_pretrained(out)(text=CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    assert given["input_ids"].shape[1] == student.config["model_cfg"]["text_cfg"]["context_length"]


def test_a_clip_with_clips_own_words_is_a_clip_everywhere(tiny_teacher, tmp_path):
    text = TINY["text_cfg"] | dict(vocab_size=49408, context_length=20)
    student = shaken(new_model(TINY | dict(text_cfg=text)))
    save_model(student, tmp_path / "student")
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False, repository="ann/clip", licence="mit")
    captions = [*CAPTIONS, "naïve café, 3:15pm", "A  Photo of THE dog's 12 toys!!"]
    ours, theirs = as_ours(student, [photo(64, 64)], captions), as_transformers(out, CLIPModel)([photo(64, 64)], captions)
    assert [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)] == pytest.approx([0] * 4, abs=2e-4)
    assert type(open_clip.get_tokenizer(f"local-dir:{out}")) is type(student.tokenizer) and load_model(out, "cpu").same_view(student)
    assert type(CLIPProcessor.from_pretrained(out).tokenizer).__name__.startswith("CLIPTokenizer")
    again = load_model(only_transformers_files(out, tmp_path / "hub"), "cpu")
    assert again.same_view(student) and apart(again.model, student.model, student.tokenizer) < 2e-6
    assert push_student(out, "ann/clip", api=FakeHub()) == "https://huggingface.co/ann/clip"


NAMED = "vit_base_patch32_siglip_256"


@pytest.fixture
def small_siglips(monkeypatch):
    "timm's towers of SigLIPs have two blocks of 48 channels"
    whole, sizes = timm.create_model, dict(depth=2, embed_dim=48, num_heads=3)

    def create_model(name, *given, **options):
        return whole(name, *given, **options | (sizes if "siglip" in name or name.startswith("local-dir:") else {}))

    monkeypatch.setattr(timm, "create_model", create_model)


SIGLIPS = {
    "own_sizes": {},
    "exact_gelu": dict(tower=siglip_tower((48, 2, 3, 70), 32, 8, tanh=False)),
    "a_name_of_timms": dict(tower=dict(timm_model_name=NAMED, timm_pool="map", timm_proj="none", image_size=256)),
    "no_bias": dict(init_logit_bias=None),
}


@pytest.mark.parametrize("is_slim", [False, True])
@pytest.mark.parametrize("kind", SIGLIPS)
def test_a_siglip_opens_in_transformers_and_comes_back(kind, is_slim, tiny_teacher, tmp_path, monkeypatch, request):
    has_name = kind == "a_name_of_timms"
    if has_name:
        request.getfixturevalue("small_siglips")
    words = load_model(tiny_teacher, "cpu").tokenizer
    student = siglip_of(words, **SIGLIPS[kind])
    if is_slim:
        image = student.shapes["image"]
        towers = {"image": replace(image, width=24, heads=(1,) * image.layers, neurons=(9,) * image.layers), "text": CUT["text"]}
        whole = student
        student = replace(new_model(whole.config["model_cfg"], like=whole, towers=towers), preprocess=whole.preprocess)
        student = shaken(student, by=0.1)
    save_model(student, tmp_path / "student")
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False)
    pictures = [photo(65, 43), photo(31, 90)]
    ours, theirs = as_ours(student, pictures, CAPTIONS), as_transformers(out, SiglipModel)(pictures, CAPTIONS)
    assert [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)] == pytest.approx([0] * 4, abs=2e-4)
    again = load_model(only_transformers_files(out, tmp_path / "hub"), "cpu")
    assert [float((a - b).abs().max()) for a, b in zip(ours, as_ours(again, pictures, CAPTIONS), strict=True)] == pytest.approx([0] * 4, abs=2e-4)
    assert "In transformers it is a `SiglipModel`" in (export_student(tmp_path / "hub", tmp_path / "on", onnx=False) / "README.md").read_text()
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert (card.data.library_name, (out / "open_clip_config.json").exists()) == (("open_clip" if has_name else "transformers"), has_name)
    assert ("timm has no name for an image tower of its sizes" in card.content) is not has_name
    assert (".sigmoid()" in card.content) is (kind != "no_bias") and (out / "slim").is_dir() is is_slim
    assert apart(load_model(out, "cpu").model, student.model, words, student.image_size) < 5e-6
    pictures[0].save(out / "image.jpg", quality=100, subsampling=0)
    monkeypatch.chdir(out)
    assert "tensor" in run_code(out, card.content)


def test_a_siglips_approximated_gelu_is_said_where_open_clip_computes_another(tiny_teacher, small_siglips, tmp_path):
    words = load_model(tiny_teacher, "cpu").tokenizer
    tower = dict(timm_model_name="vit_base_patch16_siglip_224", timm_pool="map", timm_proj="none", image_size=224) | TANH
    student = siglip_of(words, tower)
    save_model(student, tmp_path / "student")
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False)
    card = (out / "README.md").read_text()
    said = float(re.search(r"its features of images are up to (\S+) away there", card)[1])
    theirs = open_clip.create_model(f"local-dir:{out}").eval()
    found = apart(theirs, student.model, words, 224)
    assert 1e-5 < found < 3 * said and "In transformers it is a `SiglipModel`" in card
    assert apart(load_model(out, "cpu").model, student.model, words, 224) == 0
    assert "away there" not in (export_student(tiny_teacher, tmp_path / "b", onnx=False) / "README.md").read_text()


NEITHER = {
    "its image tower is a ResNet": dict(vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None)),
    "its image tower has the pool 'avg'": dict(vision_cfg=TINY["vision_cfg"] | dict(pool_type="avg")),
    "its image tower ends in an attentional pool": dict(vision_cfg=TINY["vision_cfg"] | dict(attentional_pool=True, attn_pooler_heads=2)),
    "its image tower has no norm before": dict(vision_cfg=TINY["vision_cfg"] | dict(no_ln_pre=True)),
    "its pictures of 32×48 pixels are no squares": dict(vision_cfg=TINY["vision_cfg"] | dict(image_size=[32, 48])),
    "its logits have a bias": dict(init_logit_bias=-10.0),
    "its text tower has no mask": dict(text_cfg=ALL_TEXT),
    "its text tower has the pool 'last'": dict(text_cfg=dict(pool_type="last")),
    "norm of queries": dict(vision_cfg=TINY["vision_cfg"] | dict(qk_norm=True)),
    "test_vit, and no SigLIP's": dict(vision_cfg=dict(timm_model_name="test_vit", timm_pool="avg", timm_proj="linear", image_size=160)),
    "its end token has the number 2": dict(text_cfg=dict(pool_type="eos", eos_id=2)),
}


@pytest.mark.parametrize("reason", NEITHER)
def test_why_transformers_has_no_class_stands_on_the_card(reason, tiny_teacher, tmp_path):
    like = load_model(tiny_teacher, "cpu")
    changes = dict(NEITHER[reason])
    changes["text_cfg"] = like.config["model_cfg"]["text_cfg"] | changes.get("text_cfg", {})
    student = shaken(new_model(like.config["model_cfg"] | changes, tokenizer=like.tokenizer))
    save_model(student, tmp_path / "student")
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False)
    card = (out / "README.md").read_text()
    told = next(line for line in card.splitlines() if "has no class for it" in line)
    if reason == "norm of queries":
        reason = "ln\\_q" if "ln\\_q" in told else "which a CLIPModel has not"
    assert reason in told and "from_pretrained" not in card and not (out / "config.json").exists()
    assert open_clip.create_model(f"local-dir:{out}") and not (out / "preprocessor_config.json").exists()


def test_what_computes_otherwise_in_transformers_is_not_left_there(tiny_teacher, tmp_path, monkeypatch):
    save_model(slim(tiny_teacher), tmp_path / "student")
    monkeypatch.setattr(transformers_page, "_activation", lambda module: "quick_gelu")
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False)
    told = (out / "README.md").read_text()
    assert re.search(r"has no class for it: its features of images are \S+ away in transformers, more than 0.0001", told)
    assert not (out / "model.safetensors").exists() and load_model(out, "cpu")


def test_without_transformers_nothing_of_it_is_written(tiny_teacher, tmp_path):
    out = export_student(tiny_teacher, tmp_path / "away", onnx=False, transformers=False)
    assert not (out / "config.json").exists() and "transformers" not in (out / "README.md").read_text()


def test_words_of_a_siglip_lose_their_marks_in_transformers_as_in_open_clip(tiny_teacher, tmp_path):
    save_model(siglip_of(load_model(tiny_teacher, "cpu").tokenizer), tmp_path / "student")
    file = tmp_path / "student" / "vlkd_lab_config.json"
    said = json.loads(file.read_text())
    said["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = dict(clean="canonicalize")
    file.write_text(json.dumps(said))
    student = load_model(tmp_path / "student", "cpu")
    out = export_student(tmp_path / "student", tmp_path / "away", onnx=False)
    captions = ["a red_star", "A large  BLUE house,\tby the sea!", "(a) [star]? ~ 5% \\ it's"]
    ours, theirs = as_ours(student, [photo(9, 9)], captions), as_transformers(out, SiglipModel)([photo(9, 9)], captions)
    assert [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)] == pytest.approx([0] * 4, abs=2e-4)
    assert torch.equal(load_model(out, "cpu").tokenizer(captions), student.tokenizer(captions)), "twice is once"


def test_transformers_own_way_of_resizing_is_a_little_off(tiny_teacher, tmp_path):
    "The default processor, through tensors, rounds otherwise; and of an odd margin the square may lie one pixel apart"
    teacher = load_model(tiny_teacher, "cpu")
    out = export_student(tiny_teacher, tmp_path / "away", onnx=False)
    exact, default = (CLIPProcessor.from_pretrained(out, **given).image_processor for given in (dict(backend="pil"), {}))
    picture = photo(65, 195)
    pixels = {name: torch.as_tensor(np.array(kind(picture, return_tensors="np").pixel_values[0])) for name, kind in {"exact": exact, "default": default}.items()}
    assert torch.allclose(pixels["exact"], teacher.preprocess(picture), atol=1e-5)
    assert 0 < float((pixels["default"] - teacher.preprocess(picture)).abs().max()) < 12 / 255 / 0.26
    odd = photo(64, 70)  # 35 pixels wide: 3 are cut away
    theirs = torch.as_tensor(exact(odd, return_tensors="np").pixel_values[0])
    assert torch.allclose(theirs[:, :, 1:], teacher.preprocess(odd)[:, :, :-1], atol=1e-5)


BENCHMARK = """
import json, sys
sys.modules["vlkd_lab"] = None  # cannot be imported
from clip_benchmark.cli import main
for given in json.loads(sys.argv[1]):
    sys.argv = ["clip_benchmark", "eval", *given]
    main()
"""


def benchmark(*runs):
    "Run CLIP_benchmark's own command; the metrics of each run"
    done = subprocess.run([sys.executable, "-c", BENCHMARK, json.dumps(runs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(given[given.index("--output") + 1]).read_text())["metrics"] for given in runs]


def test_clip_benchmark_and_open_clip_find_the_accuracy_that_we_find(scenes, tmp_path):
    "Of a student that was cut irregularly out of the shipped teacher and padded, on shipped scenes in CLIP_benchmark's layout"
    pytest.importorskip("clip_benchmark")
    val = ROOT / "data_samples" / "scenes" / "val-000000.tar"
    whole = load_model(ROOT / "data_samples" / "teacher", "cpu")
    cut = {"image": TowerShape(128, 16, (8, 8, 8, 8), (512, 512, 512, 511)), "text": TowerShape(96, 16, (6, 6, 6, 6), (384, 384, 384, 380))}
    student = new_model(whole.config["model_cfg"], like=whole, towers=cut)
    state = whole.model.state_dict()
    student.model.load_state_dict({n: state[n][tuple(slice(size) for size in w.shape)] for n, w in student.model.state_dict().items()})
    save_model(student, tmp_path / "student")
    out, colours = export_student(tmp_path / "student", tmp_path / "away", onnx=False), LABEL_SETS["colour"]
    assert to_clip_benchmark(val, tmp_path / "colour", colours.names, colours.templates, labels="colour") == dict(written=1000, left_out=0)
    to_clip_benchmark(val, tmp_path / "captions")
    common = ["--model", f"local-dir:{out}", "--pretrained", "none", "--no_amp", "--batch_size", "250", "--quiet"]
    found, retrieved = benchmark(
        [*common, "--dataset", "wds/colour", "--dataset_root", str(tmp_path / "colour"), "--output", str(tmp_path / "a.json")],
        [*common, "--dataset", "wds/captions", "--dataset_root", str(tmp_path / "captions"), "--task", "zeroshot_retrieval",
         "--recall_k", "1", "5", "--output", str(tmp_path / "b.json"), "--num_workers", "1"],
    )  # fmt: skip
    pairs = load_pairs(val)
    seen, classes = encode_pairs(student, pairs), SimpleNamespace(names=colours.names, templates=colours.templates)
    ours = accuracy(predict(seen.image, classifier(student, classes)), pairs.sets["colour"])
    assert 0.3 < ours < 0.95 and found["acc1"] == pytest.approx(ours, abs=1.01e-3), "but for one of a thousand, at a tie"
    own = recall(seen, ks=(1, 5))
    assert retrieved["text_retrieval_recall@1"] == pytest.approx(own["image_to_text_r1"], abs=2e-3)
    assert retrieved["image_retrieval_recall@5"] == pytest.approx(own["text_to_image_r5"], abs=2e-3)

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    rows = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(f"local-dir:{out}"), colours.names, colours.templates)
    with torch.no_grad():
        seen = torch.stack([preprocess(pairs.pil(k)) for k in range(len(pairs))]).split(250)
        images = torch.cat([model.encode_image(part, normalize=True) for part in seen])
    assert accuracy((images @ rows).argmax(dim=1), pairs.sets["colour"]) == pytest.approx(ours, abs=1.01e-3)


@pytest.fixture
def bench(scenes, tmp_path):
    "The validation scenes in CLIP_benchmark's layout: labelled, and with captions; their pairs and their classes"
    pytest.importorskip("clip_benchmark")
    val = scenes / "val-000000.tar"
    classes = find_classes(val)
    to_clip_benchmark(val, tmp_path / "bench/wds_vtab-cifar10", classes.names, classes.templates)
    to_clip_benchmark(val, tmp_path / "bench/flickr8k", parts=2)
    return load_pairs(val), classes


def test_clip_benchmark_from_one_call_finds_a_slim_students_scores_and_keeps_them(bench, tiny_teacher, tmp_path):
    pairs, classes = bench
    run = tmp_path / "run"
    save_model(slim(tiny_teacher), run / "stage-1" / "student")
    save_model(load_model(tiny_teacher, "cpu"), run / "stage-2" / "student")
    (run / "config.json").write_text(json.dumps({"method": "TinyCLIP", "parameters": {}}))
    for stage in ("stage-1", "stage-2"):
        (run / stage / "done.json").write_text("{}")
    root = str(tmp_path / "bench")
    common = dict(root=root, device="cpu", batch_size=7)
    for stage in ("stage-1", "stage-2"):
        vlm = load_model(run / stage / "student", "cpu")
        assert bool(vlm.config.get("towers")) == (stage == "stage-1"), "the first is slim, which open_clip cannot open"
        table = clip_benchmark(run, "wds/cifar10, flickr8k", stage=stage, **common)
        assert list(table.index) == ["cifar10", "flickr8k"] and list(table["task"]) == ["zeroshot_classification", "zeroshot_retrieval"]
        ours = accuracy(predict(encode_pairs(vlm, pairs).image, classifier(vlm, classes)), pairs.labels)
        assert table.loc["cifar10", "acc1"] == pytest.approx(ours)
        ranks = recall(encode_pairs(vlm, pairs, every_caption=True), captions=pairs.all_captions)
        for their, name in (("image", "text_to_image"), ("text", "image_to_text")):
            for k in (1, 5, 10):
                assert table.loc["flickr8k", f"{their}_retrieval_recall@{k}"] == pytest.approx(ranks[f"{name}_r{k}"])
    kept = json.loads((run / "clip_benchmark.json").read_text())
    assert list(kept) == ["stage-1", "stage-2"] and kept["stage-1"]["cifar10"]["split"] == "test"
    again = clip_benchmark(run, [str(tmp_path / "bench/flickr8k")], device="cpu")  # the last student
    assert list(again.index) == ["cifar10", "flickr8k"], "what was measured before stays"
    rows = pd.read_csv(run / "clip_benchmark.csv", index_col="dataset")
    assert rows.loc["cifar10", "acc1"] == pytest.approx(kept["stage-2"]["cifar10"]["scores"]["acc1"])
    card = (export_student(run, tmp_path / "away", onnx=False) / "README.md").read_text()
    assert f"| cifar10 | {rows.loc['cifar10', 'acc1']:.1%} |" in card and "LAION's CLIP_benchmark" in card


def test_clip_benchmark_takes_a_blip_and_a_model_without_its_run(bench, tiny_blip, tmp_path):
    pairs, _ = bench
    table = clip_benchmark(tiny_blip, "flickr8k", root=str(tmp_path / "bench"), device="cpu", workers=2, out=tmp_path / "results")
    blip = load_blip(tiny_blip, "cpu")
    ranks = recall(encode_pairs(blip, pairs, every_caption=True), captions=pairs.all_captions)
    assert table.loc["flickr8k", "image_retrieval_recall@5"] == pytest.approx(ranks["text_to_image_r5"])
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"clip_benchmark.json", "clip_benchmark.csv"}
    before = set(tiny_blip.iterdir())
    clip_benchmark(tiny_blip, "flickr8k", root=str(tmp_path / "bench"), device="cpu")
    assert set(tiny_blip.iterdir()) == before, "a model's folder is left alone"


@pytest.mark.parametrize(
    "sets, given, message",
    [
        ("imagenet", {}, "data set 'imagenet' is not valid: no folder of that name has test/nshards.txt; .* imagenet1k"),
        ("wds/cifar10, nowhere", dict(root="bench"), "data set 'nowhere' is not valid: no folder of that name in bench has"),
        ("winoground", {}, "data set 'winoground' is not valid"),
        ("", {}, "sets: name at least one"),
        ("cifar10", dict(root="bench", split="train"), "train/nshards.txt"),
    ],
)
def test_sets_that_there_are_not_are_refused_before_anything_is_loaded(sets, given, message, bench, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "load_student", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr(shards, "project_root", lambda: tmp_path)
    with pytest.raises(ValueError, match=message):
        clip_benchmark(tiny_teacher, sets, **given)


def test_names_that_everybody_writes_lead_to_the_hubs_shards(bench, tmp_path):
    hub = "https://huggingface.co/datasets/clip-benchmark/wds_{}/tree/main"
    places = {"wds/imagenet1k": "imagenet1k", "mscoco_captions": "mscoco_captions", "cifar10": "vtab-cifar10", "wds/vtab/pets": "vtab-pets"}
    for name, folder in places.items():
        assert shards._find_set(name, "", "test").place == hub.format(folder)
    address = hub.format("imagenet-a")
    assert shards._find_set(address, "", "test") == shards._BenchmarkSet("imagenet-a", address)
    assert shards._find_set("cifar10", str(tmp_path / "bench"), "test").place == str(tmp_path / "bench/wds_vtab-cifar10")
    assert {"mscoco_captions", "flickr8k", "flickr30k"} == set(shards._listed_sets(["retrieval"]))


def test_shards_for_clip_benchmark_leave_out_what_is_damaged_or_has_no_label(scenes, tmp_path):
    samples = list(raw_samples(scenes / "val-000000.tar"))[:6]
    with TarWriter(str(tmp_path / "odd.tar")) as tar:
        for k, sample in enumerate(samples):
            fields = {"jpg": sample["jpg"] if k != 1 else b"no picture", "txt": sample["txt"]}
            tar.write({"__key__": sample["__key__"], **fields, **({"cls": str(k % 3).encode()} if k != 2 else {})})
    named = ("a\nb", "{curly}", "c")
    counts = to_clip_benchmark(tmp_path / "odd.tar", tmp_path / "out", named, ("a {} {drawing}",), parts=8)
    assert counts == dict(written=4, left_out=2) and (tmp_path / "out/test/nshards.txt").read_text() == "4\n"
    assert sorted(p.name for p in (tmp_path / "out/test").glob("*.tar")) == [f"{k}.tar" for k in range(4)]
    assert (tmp_path / "out/classnames.txt").read_text() == "a b\n{curly}\nc\n"
    template = (tmp_path / "out/zeroshot_classification_templates.txt").read_text().strip()
    assert template.format(c=named[1]) == "a {curly} {drawing}"
    written = [sample for k in range(4) for sample in raw_samples(tmp_path / f"out/test/{k}.tar")]
    assert [s["jpg"] for s in written] == [samples[k]["jpg"] for k in (0, 3, 4, 5)] and [int(s["cls"]) for s in written] == [0, 0, 1, 2]
    with pytest.raises(FileExistsError):
        to_clip_benchmark(tmp_path / "odd.tar", tmp_path / "out", named)
    with pytest.raises(ValueError, match="label 2 of .* is outside of the 2 class names"):
        to_clip_benchmark(tmp_path / "odd.tar", tmp_path / "broken", named[:2])
    assert not (tmp_path / "broken").exists()


def notebook(to, **parameters):
    given = dict(cwd=str(to.parent), progress_bar=False)
    made = papermill.execute_notebook(ROOT / "nbs" / "export_student.ipynb", to, parameters, **given)
    shown = [o for cell in made.cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join("".join(o.get("text", "")) + json.dumps(o.get("data", {})) for o in shown)


def test_the_job_takes_a_run_or_what_ships_and_uploads_nothing(tiny_teacher, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "data_samples").symlink_to(ROOT / "data_samples")
    shards = str(scenes / "val-000000.tar")
    given = dict(onnx_forms="int8_static, fp16", calibration=shards, validation=shards)
    shown = notebook(tmp_path / "nbs" / "a.ipynb", **given)
    assert "image.int8_static.onnx" in shown and "text.fp16.onnx" in shown and "| int8_static |" in shown
    assert "a model without its run" in shown and "nothing was uploaded" in shown and (tmp_path / "runs/exports/teacher/onnx").is_dir()
    assert "In transformers it is a `CLIPModel`" in shown and (tmp_path / "runs/exports/teacher/config.json").is_file()
    run = tmp_path / "runs" / "tiny"
    save_model(slim(tiny_teacher), run / "stage-1" / "student")
    (run / "stage-1" / "done.json").write_text("{}")
    (run / "config.json").write_text(json.dumps({"method": "TinyCLIP", "parameters": {"data": "scenes:100"}}))
    pytest.importorskip("clip_benchmark")
    to_clip_benchmark(scenes / "val-000000.tar", tmp_path / "sets/flickr8k", parts=1)
    given = dict(benchmark="wds/flickr8k", benchmark_root="sets", timm=True)
    shown = notebook(tmp_path / "nbs" / "b.ipynb", onnx=False, transformers=False, licence="mit", **given)
    assert "image_retrieval_recall@1" in shown and "| flickr8k |" in shown and (run / "clip_benchmark.csv").is_file()
    assert not (tmp_path / "runs/exports/tiny-stage-1/config.json").exists()
    assert (tmp_path / "runs/exports/tiny-stage-1/timm/config.json").is_file() and "Its image tower alone is timm's" in shown
    assert "tiny-stage-1" in shown and "in open_clip's shapes" in shown and "license: mit" in shown and str(tmp_path) not in shown
    assert Run(run).folder.exists() and (tmp_path / "runs/exports/tiny-stage-1/slim").is_dir()


FORM_PARAMETERS = ["onnx_forms", "calibration", "validation", "benchmark", "benchmark_root"]


def test_the_job_has_one_parameters_cell_that_papermill_reads():
    node = load_notebook_node(str(ROOT / "nbs" / "export_student.ipynb"))
    found = {p.name: p for p in _infer_parameters(node)}
    assert list(found) == ["run_folder", "stage", "out", "licence", "datasets", "onnx", "transformers", "timm", *FORM_PARAMETERS, "push_to", "private"]
    assert found["push_to"].default == '""' and all(p.help for p in found.values())
