"CLIP-KD, CLIP-RD and SigLIP as jobs: every parameter, processes, what goes on, what joins in mid-run, and the way out"

import json

import open_clip
import pytest
import torch
from conftest import lines_of
from test_matrix import other_teachers as other_teachers  # noqa: PLC0414  a fixture
from test_matrix import parameters as parameters  # noqa: PLC0414  a fixture
from test_matrix import parameters_in as parameters_in  # noqa: PLC0414  a fixture
from test_matrix import two_give_what_one_gives

from vlkd_lab import trainers
from vlkd_lab.export import export_student, reinforce
from vlkd_lab.losses import LOSSES
from vlkd_lab.methods import clip_kd, find_method
from vlkd_lab.methods.clip_kd import masked_pictures, patch_of
from vlkd_lab.models import load_model, new_model, save_model
from vlkd_lab.runs import Run
from vlkd_lab.trainers import open_job, train

EVERYTHING = (
    "contrastive=1, feature_mimicking=2000, relational=1, interactive_contrastive=1, interactive_relational=1, "
    "gradient_mimicking=50, augmented_features=1, vertical_relational=1, cross_relational=1"
)


def totals(given):
    return [line["total"] for line in Run(given["out"]).metrics() if "total" in line]


def trained(method, given):
    job = open_job(method, given)
    train(job)
    return job


@pytest.fixture
def biased_teacher(tiny_teacher, tmp_path):
    "The tiny teacher as one that was trained with a bias of the logits"
    teacher = load_model(tiny_teacher, "cpu")
    config = teacher.config["model_cfg"] | dict(init_logit_bias=-4.0)
    return str(save_model(new_model(config, like=teacher, seed=3), tmp_path / "biased"))


def test_two_processes_give_what_one_gives(parameters, biased_teacher, tmp_path):
    answers = dict(teacher=biased_teacher, losses="sigmoid_mimicking=1, sigmoid_contrastive=1")
    kinds = {
        "everything": ("CLIP-KD", dict(losses=EVERYTHING, mask_share=0.5, student_share=0.4, inheritance="none")),
        "cached": ("CLIP-KD", dict(losses=EVERYTHING, mask_share=0.5, micro_batch=5)),
        "relations": ("CLIP-RD", {}),
        "sigmoid": ("SigLIP", {}),
        "answers": ("SigLIP", answers | dict(micro_batch=6)),
        "gated": ("TinyCLIP", answers | dict(inheritance="auto", target_sparsity=0.4)),
    }
    two_give_what_one_gives(kinds, parameters, tmp_path)


@pytest.mark.parametrize("method", ["CLIP-KD", "SigLIP"])
def test_gradient_caching_changes_nothing(method, parameters):
    changes = dict(losses=EVERYTHING, mask_share=0.75) if method == "CLIP-KD" else {}
    whole, parts = (parameters(method, f"of-{size}", **changes, micro_batch=size) for size in (0, 3))
    for given in (whole, parts):
        trained(method, given)
    assert totals(parts) == pytest.approx(totals(whole), rel=1e-4)


def test_a_killed_run_goes_on_with_the_weights_of_its_loss(parameters, killed_in_its_fourth_step):
    changes = dict(losses=EVERYTHING, mask_share=0.5, steps=6, checkpoint_seconds=0.0)
    whole, killed = (parameters("CLIP-KD", name, **changes) for name in ("whole", "killed"))
    trained("CLIP-KD", whole)
    killed_in_its_fourth_step(lambda: open_job("CLIP-KD", killed))
    assert lines_of(killed["out"]) == lines_of(whole["out"])


def test_masks_change_what_the_student_sees_and_nothing_else(parameters, tmp_path):
    ends = {}
    for name, changes in {
        "whole": {},
        "masked": dict(mask_share=0.75),
        "coarse": dict(mask_share=0.75, mask_patch=32),
        "cropped": dict(mask_share=0.75, crop_scale=0.5, augmentations=2, teacher_features="stored"),
    }.items():
        given = parameters("CLIP-KD", name, losses="feature_mimicking=1", **changes)
        job = trained("CLIP-KD", given)
        ends[name] = totals(given)
        assert job.teacher is not None
    assert ends["whole"][0] != ends["masked"][0], "a part of a picture has other features"
    assert ends["coarse"][0] == ends["whole"][0] and ends["coarse"] == ends["whole"], "a picture of one patch stays"
    assert len(ends["cropped"]) == 3


def test_the_patch_of_a_network():
    tower = dict(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None)
    text = dict(context_length=8, width=16, heads=2, layers=1)
    resnet = new_model(dict(embed_dim=16, vision_cfg=tower, text_cfg=text), seed=1)
    timm = dict(timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="", timm_proj="linear", image_size=32)
    assert patch_of(resnet.model) == 32
    assert patch_of(new_model(dict(embed_dim=16, vision_cfg=timm, text_cfg=text), seed=1).model) == 16


def test_a_mask_is_drawn_for_each_picture_and_step():
    pictures = torch.ones(4, 3, 20, 36)
    one, again, other = (masked_pictures(pictures, 0.5, 16, range(seed, seed + 4)) for seed in (1, 1, 9))
    assert torch.equal(one, again) and not torch.equal(one, other)
    kept = one[:, 0].unfold(1, 16, 16).unfold(2, 16, 16)
    assert set(kept.flatten(3).amax(3).unique().tolist()) == {0.0, 1.0}
    assert one.shape == pictures.shape and torch.equal(masked_pictures(pictures, 0.0, 16, range(4)), pictures)


def test_every_step_and_picture_has_a_mask_of_its_own(parameters, monkeypatch):
    drawn = []
    monkeypatch.setattr(clip_kd, "masked_pictures", lambda image, share, patch, seeds: drawn.append(list(seeds)) or image)
    trained("CLIP-KD", parameters("CLIP-KD", losses="feature_mimicking=1", mask_share=0.5, data=parameters("CLIP-KD")["val"], batch_size=48))
    assert len(drawn) == 3 and len({seed for step in drawn for seed in step}) == 3 * 48, "the same pictures in every step"


def test_the_teacher_sees_the_whole_picture(parameters, monkeypatch):
    learn, seen = clip_kd.learn_from_pairs, []

    def looking(loop, batch, shown=None):
        seen.append((batch.for_teacher().image, (batch if shown is None else shown).image))
        return learn(loop, batch, shown)

    monkeypatch.setattr(clip_kd, "learn_from_pairs", looking)
    trained("CLIP-KD", parameters("CLIP-KD", losses="feature_mimicking=1", mask_share=0.5))
    for whole, masked in seen:
        stays = masked != 0
        assert torch.equal(whole[stays], masked[stays]) and 0.4 < stays.float().mean() < 0.6 < (whole != 0).float().mean()


@pytest.mark.parametrize("scale", [0.0, 2.66])
def test_the_scale_across_the_models_begins_where_one_says(scale, parameters):
    job = trained("CLIP-KD", parameters("CLIP-KD", losses="interactive_contrastive=1", interactive_scale=scale))
    student = job.new_student()
    term = next(term for term in job.objective(student).terms if term.name == "interactive_contrastive")
    if scale == 0:
        assert term.function is LOSSES["interactive_contrastive"].function
    else:
        assert float(term.function[0].log_scale.exp()) == pytest.approx(2.66)


def test_several_teachers_have_fusions_and_scales_of_their_own(parameters, tiny_teacher, tmp_path):
    teacher = load_model(tiny_teacher, "cpu")
    wide = save_model(new_model(teacher.config["model_cfg"] | dict(embed_dim=24), like=teacher, seed=8), tmp_path / "wide")
    given = parameters("CLIP-KD", teacher=f"{tiny_teacher}, {wide}", losses=EVERYTHING, inheritance="none")
    job = trained("CLIP-KD", given)
    objective = job.objective(job.new_student())
    fused = next(term for term in objective.terms if term.name == "augmented_features").function
    assert [module.image.out_features for module in fused] == [16, 24] and len(totals(given)) == 3


def test_rows_in_shards_teach_them_too(parameters, tiny_teacher, tmp_path):
    given = parameters("CLIP-KD", losses=EVERYTHING, inheritance="none", student=str(tiny_teacher))
    reinforce(given["data"], [load_model(tiny_teacher, "cpu")], tmp_path / "reinforced", progress=False)
    rows = given | dict(data=str(tmp_path / "reinforced"), teacher="", teacher_features="shards")
    trained("CLIP-KD", rows)
    assert len(totals(rows)) == 3
    refused = rows | dict(out=f"{rows['out']}-refused", losses="sigmoid_mimicking=1")
    with pytest.raises(ValueError, match=r"sigmoid_mimicking needs a bias of the logits, and a teacher has none"):
        open_job("SigLIP", refused)


def test_what_has_weights_of_its_own_joins_where_it_was_built(parameters):
    for method, joins in (("CLIP-KD", True), ("Distil", False)):
        given = parameters(method, method, steps=4, losses="contrastive=1")
        run = Run(given["out"])
        job = open_job(method, given)
        run.control(weights={"augmented_features": 0.5})
        train(job)
        joined = [line for line in run.metrics() if "augmented_features" in line and "total" in line]
        assert bool(joined) == joins
        assert joins or "augmented_features cannot join an objective" in json.dumps(run.status())
    trained("Distil", parameters("Distil", "begins", losses="augmented_features=1"))
    assert len(totals(parameters("Distil", "begins"))) == 3


@pytest.mark.parametrize("method", ["CLIP-KD", "CLIP-RD"])
def test_without_a_teacher_there_is_nothing_to_learn_from(method, parameters):
    with pytest.raises(ValueError, match=rf"teacher='' is not valid: {method} has a teacher"):
        open_job(method, parameters(method, teacher="", inheritance="none"))


def test_a_student_of_siglips_kind_leaves_as_one(parameters, other_teachers, tmp_path):
    answers = "sigmoid_mimicking=1, sigmoid_contrastive=1"
    kinds = {"SigLIP": dict(inheritance="manual"), "TinyCLIP": dict(inheritance="auto", target_sparsity=0.4)}
    for method, changes in kinds.items():
        given = parameters(method, method, teacher=other_teachers["siglip"], losses=answers, **changes)
        job = trained(method, given)
        out = export_student(job.run.folder, tmp_path / f"out-{method}", onnx=False)
        opened = open_clip.create_model_and_transforms(f"local-dir:{out}")[0].eval()
        student = trainers.load_student(job.run.folder / ("student" if method == "SigLIP" else "stage-1") / "student")
        assert float(opened.logit_bias) == pytest.approx(float(student.bias)) != -10.0
        pictures = torch.randn(3, 3, *student.image_shape)
        with torch.no_grad():
            torch.testing.assert_close(opened.encode_image(pictures, normalize=True), student.encode_image(pictures), rtol=0, atol=1e-5)


def test_a_bias_and_scale_begin_where_one_says_and_a_clip_has_none(parameters):
    given = parameters("SigLIP", first_scale=5.0, first_bias=-3.0)
    student = open_job("SigLIP", given).new_student()
    assert float(student.bias) == -3 and float(student.scale) == pytest.approx(5.0)
    for method in ("Distil", "TinyCLIP", "CLIP-KD", "ClipCid"):
        with pytest.raises(ValueError, match=r"sigmoid_contrastive needs a bias of the logits, and the student has none: name a SigLIP"):
            open_job(method, parameters(method, "none", losses="sigmoid_contrastive=1"))
    assert "sigmoid_contrastive" in find_method("CLIP-KD").parameters().terms()


@pytest.fixture
def wide(tiny_teacher, tmp_path):
    "A student of another width than the teacher's"
    config = load_model(tiny_teacher, "cpu").config["model_cfg"] | dict(embed_dim=24)
    (tmp_path / "wide.json").write_text(json.dumps(config))
    losses = "contrastive=1, feature_mimicking=2000, relational=1, interactive_contrastive=1"
    return dict(student=str(tmp_path / "wide.json"), inheritance="none", losses=losses)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "unit"])
@pytest.mark.parametrize("exponential", [True, False], ids=["exponential", "plain"])
def test_projection_and_scale_are_as_asked(raw, exponential, wide, parameters):
    "The first step of a job from the towers' own rows: projected as they are or of unit length, the scale learnt as a logarithm or itself"
    start = 14.0 if exponential else 2.66
    given = parameters("CLIP-KD", **wide, raw_projection=raw, exponential_scale=exponential, interactive_scale=start)
    job = open_job("CLIP-KD", given)
    student, batch = job.new_student(), next(job.batches(0))
    objective = job.objective(student)
    with torch.no_grad():
        rows = {"image": student.model.encode_image(batch.image), "text": student.model.encode_text(batch.text)}
        taught = trainers.ask(job.source, batch)
        unit = {side: one / one.norm(dim=1, keepdim=True) for side, one in rows.items()}
        near = {}
        for side, layer in (("image", objective.project.image), ("text", objective.project.text)):
            mapped = (rows if raw else unit)[side] @ layer.weight.T + layer.bias
            near[side] = mapped / mapped.norm(dim=1, keepdim=True)
        s, t, own = student.scale, taught.scale, torch.arange(len(batch))
        ours, theirs = s * unit["image"] @ unit["text"].T, t * taught.image @ taught.text.T
        cross, nll = torch.nn.functional.cross_entropy, torch.nn.functional.kl_div
        total = (cross(ours, own) + cross(ours.T, own)) / 2
        total += 2000 * ((near["image"] - taught.image).square().mean() + (near["text"] - taught.text).square().mean())
        for a, b in ((ours, theirs), (ours.T, theirs.T)):
            total += nll(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean") / 2
        total += (cross(start * near["image"] @ taught.text.T, own) + cross(start * near["text"] @ taught.image.T, own)) / 2
    train(job)
    assert totals(given)[0] == pytest.approx(float(total), rel=1e-4)
    # what is validated and given away has rows of unit length
    scored = [line for line in Run(given["out"]).metrics() if line.get("event") == "validation"]
    assert scored and load_model(f"{given['out']}/student/student", "cpu").config["model_cfg"]["embed_dim"] == 24


def test_raw_rows_go_through_caching_and_processes(wide, parameters, tmp_path):
    whole, parts = (parameters("CLIP-KD", f"raw-{size}", **wide, micro_batch=size) for size in (0, 3))
    for given in (whole, parts):
        assert isinstance(trained("CLIP-KD", given).learner(load_model(f"{given['out']}/student/student").model), clip_kd.RawLearner)
    assert totals(parts) == pytest.approx(totals(whole), rel=1e-4)
    two_give_what_one_gives({"raw": ("CLIP-KD", wide | dict(exponential_scale=False, interactive_scale=2.66))}, parameters, tmp_path)


def test_runs_from_before_go_on_as_they_began(wide, parameters):
    given = parameters("CLIP-KD", "former", **wide, raw_projection=False)
    trained("CLIP-KD", given)
    path = Run(given["out"]).folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("raw_projection", "exponential_scale"):
        del config["parameters"][name]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="parameters.raw_projection: it has false, asked for true"):
        open_job("CLIP-KD", given | dict(raw_projection=True))
    trained("CLIP-KD", given | dict(steps=given["steps"] + 1))
