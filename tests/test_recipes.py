"TinyCLIP as its scripts have it: rates, lists by stage, rules of copies, and a source of weights apart from the teacher"

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import TINY, tiny_job

from vlkd_lab.gates import sparsity
from vlkd_lab.inheritance import even_spread, front_step, plan_manual
from vlkd_lab.methods.tinyclip import TINYCLIP_RECIPE, TinyCLIP, open_tinyclip
from vlkd_lab.models import load_model, model_config, new_model, save_model
from vlkd_lab.runs import Run, load_checkpoint, read_json
from vlkd_lab.stages import stage_plan
from vlkd_lab.trainers import LATER, check_parameters, main, open_job, out_folder, train
from vlkd_lab.widgets import Watched
from vlkd_lab.widgets.network import _followed, drawn_towers


@pytest.fixture
def job_of(scenes, tiny_teacher, tmp_path):
    "A function: a job of a few steps"

    def open_job(teacher=tiny_teacher, name="run", **changes):
        given = tiny_job(scenes, teacher, tmp_path / name, "TinyCLIP", stages=1, steps=4, keep_snapshots=0, target_sparsity=0.5)
        given |= {"losses": "affinity_mimicking=1"} | changes
        return open_tinyclip(check_parameters(TinyCLIP, {key: value for key, value in given.items() if value is not None}))

    return open_job


@pytest.fixture
def deep(tiny_teacher, tmp_path):
    "The folder of a teacher of four layers a tower"
    like = load_model(tiny_teacher, "cpu")
    config = json.loads(json.dumps(like.config["model_cfg"]))
    for part in ("vision_cfg", "text_cfg"):
        config[part]["layers"] = 4
    return save_model(new_model(config, like=like, seed=8), tmp_path / "deep")


def student_file(tmp_path, teacher, name="student", **changes):
    "A configuration in a file: the teacher's with other values, as vision_cfg=dict(layers=1)"
    config = json.loads(json.dumps(load_model(teacher, "cpu").config["model_cfg"]))
    for part, values in changes.items():
        config[part] = config[part] | values if isinstance(values, dict) else values
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return str(tmp_path / f"{name}.json")


def rates_of(run, stage, phase):
    "The learning rate of each step of a phase"
    return [line["learning_rate"] for line in run.metrics() if (line.get("stage"), line.get("phase")) == (stage, phase) and "total" in line]


# rates


def test_published_rates_rise_through_the_gates_and_fall_from_the_peak_with_a_new_optimizer(job_of):
    peak, gate_steps, steps = 1e-3, 4, 10
    job = job_of(steps=steps, gate_steps=gate_steps, schedule="published", warmup=3, learning_rate=peak, stages=2, checkpoint_seconds=0.0)
    train(job)
    left = steps - gate_steps
    for stage in ("stage-1", "stage-2"):
        assert rates_of(job.run, stage, "gates") == pytest.approx([peak * (k + 1) / gate_steps for k in range(gate_steps)])
        cosine = [peak * (1 + math.cos(math.pi * k / left)) / 2 for k in range(left)]
        assert rates_of(job.run, stage, "distil") == pytest.approx(cosine), "no second warm-up"
    optimizer = load_checkpoint(job.run, "stage-2/distil", cut=False)["optimizer"]
    taken = {int(state["step"]) for state in optimizer["state"].values()}
    assert taken == {left}, "it has seen the steps behind the cut alone"


def test_published_rates_of_a_copied_student_fall_when_they_have_risen(job_of):
    job = job_of(inheritance="manual", steps=8, warmup=3, schedule="published", learning_rate=1e-3)
    train(job)
    expected = [1 / 3, 2 / 3, 1.0] + [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]
    assert rates_of(job.run, "stage-1", "distil") == pytest.approx([1e-3 * factor for factor in expected])


def test_without_a_word_the_rates_are_as_ever(job_of):
    job = job_of(steps=6, warmup=2, learning_rate=1e-3)
    train(job)
    both = rates_of(job.run, "stage-1", "gates") + rates_of(job.run, "stage-1", "distil")
    assert both == pytest.approx([1e-3 * min(1, (k + 1) / 2) * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)])


def test_a_job_with_the_published_recipe_has_its_numbers(job_of):
    sizes = dict(steps=6, gate_steps="3", batch_size=8, losses=None, warmup=None)
    job = job_of(recipe="published", **sizes)
    train(job)
    written = job.run.config()["parameters"]
    assert {name: written[name] for name in TINYCLIP_RECIPE if name not in ("gate_steps", "warmup")} == {
        name: value for name, value in TINYCLIP_RECIPE.items() if name not in ("gate_steps", "warmup")
    }
    groups = load_checkpoint(job.run, "stage-1/distil", cut=False)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0] and groups[0]["betas"] == (0.9, 0.98)
    assert rates_of(job.run, "stage-1", "gates") == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4])
    lines = [line for line in job.run.metrics() if "total" in line]
    assert all("feature_mimicking" not in line for line in lines)
    again = open_tinyclip(replace(job.options, steps=7))  # what is written is what is meant
    assert again.options.gate_steps == "3" and again.plan == [("stage-1", 7)]


def test_gates_have_the_numbers_of_their_own_optimizer(job_of):
    job = job_of(steps=6, gate_steps=5, gate_beta2=0.999, gate_epsilon=1e-8, checkpoint_seconds=0.0)
    job.run.control(stop=False)
    seen = []
    take = torch.optim.AdamW.step

    def step(optimizer, *given, **named):
        seen.append([(group["betas"], group["eps"]) for group in optimizer.param_groups])
        return take(optimizer, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train(job)
    own = ((0.9, 0.98), 1e-6)
    assert seen[0] == [own, own, ((0.9, 0.999), 1e-8), ((0.9, 0.999), 1e-8)] and seen[-1] == [own, own]


def test_the_recipe_asks_for_steps_and_knows_no_maps(job_of, tmp_path):
    with pytest.raises(ValueError, match=r"gate_steps='3000' is not valid: stage 1 has 4 steps.*give fewer than 4, or more steps"):
        job_of(recipe="published", losses=None)
    with pytest.raises(ValueError, match="schedule='published' is not valid with inheritance='mapped'"):
        job_of(schedule="published", inheritance="mapped")
    with pytest.raises(ValueError, match="recipe must be str, one of 'table_top', 'published'"):
        job_of(recipe="theirs")
    assert not (tmp_path / "run").exists()


def test_a_recipe_is_settled_once_and_a_run_keeps_its_folder():
    published = TinyCLIP(recipe="published", steps=9000, gate_learning_rate=0.05)
    assert TinyCLIP(**asdict(published)) == published and published.gate_learning_rate == 0.05
    assert {field.name for field in fields(TinyCLIP)} >= set(TINYCLIP_RECIPE), "every published value has a parameter"
    assert TinyCLIP(recipe="published", stages=4).gate_steps == "3000,5000,8000,8000"
    added = {name for name in LATER if hasattr(TinyCLIP, name)}
    for name in ("recipe", "schedule", "target_sparsities", "stage_steps", "gate_steps", "sparsity_ramp", "gate_beta2", "gate_epsilon"):
        assert name in added and LATER[name] == getattr(TinyCLIP(), name)
    assert out_folder(TinyCLIP()) != out_folder(TinyCLIP(gate_beta2=0.999))


# lists by stage


def test_targets_steps_and_gate_steps_are_lists_by_stage(job_of):
    lists = dict(target_sparsities="0.2,0.5", stage_steps="5,8", gate_steps="2,5", sparsity_ramp=1)
    job = job_of(stages=2, steps=None, target_sparsity=None, **lists)
    assert (job.options.steps, job.options.target_sparsity) == (8, 0.5) and job.plan == [("stage-1", 5), ("stage-2", 8)]
    train(job)
    taken = {}
    for line in job.run.metrics():
        if "total" in line:
            taken.setdefault((line["stage"], line["phase"]), []).append(line)
    counts = {at: len(lines) for at, lines in taken.items()}
    assert counts == {("stage-1", "gates"): 2, ("stage-1", "distil"): 3, ("stage-2", "gates"): 5, ("stage-2", "distil"): 3}
    targets = [line["target_sparsity"] for line in taken["stage-2", "gates"]]
    assert targets[1:] == [0.5] * 4 and targets[0] < 0.5, "a ramp of one step, and not of half the phase"
    for number, target in ((1, 0.2), (2, 0.5)):
        student = load_model(job.run.folder / f"stage-{number}" / "student", "cpu")
        assert target <= sparsity(student.shapes, job.costs) < target + 0.12


def test_one_number_is_for_all_stages_as_papermill_reads_it(job_of):
    job = job_of(stages=2, steps=None, stage_steps=5, gate_steps=2, target_sparsities=0.4, target_sparsity=None)
    assert (job.options.stage_steps, job.options.gate_steps, job.options.target_sparsity) == ("5", "2", 0.4)
    assert job.options.targets() == [0.2, 0.4]
    train(job)
    assert len(rates_of(job.run, "stage-2", "gates")) == 2 and len(rates_of(job.run, "stage-2", "distil")) == 3


def test_the_last_of_a_list_takes_more_steps(job_of):
    given = dict(stages=2, stage_steps="3,4", steps=4, inheritance="manual")
    train(job_of(**given))
    more = job_of(**given | dict(steps=6))
    train(more)
    assert len(rates_of(more.run, "stage-1", "distil")) == 3 and len(rates_of(more.run, "stage-2", "distil")) == 6


def test_another_target_in_mid_run_takes_the_earlier_ones_along(job_of):
    job = job_of(stages=2, target_sparsity=None, target_sparsities="0.1,0.6", steps=6, gate_steps="4", sparsity_ramp=1)
    job.run.control(target_sparsity=0.3)
    train(job)
    asked = [line["target_sparsity"] for line in job.run.metrics() if line.get("phase") == "gates" and "total" in line and line["stage"] == "stage-1"]
    assert asked[-1] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gate_steps="1,2"), "gate_steps='1,2' is not valid with stages=3: give one number, or one for each stage"),
        (dict(stage_steps="5,6,7,8", steps=8), "stage_steps='5,6,7,8' is not valid with stages=3"),
        (dict(target_sparsities="0.5,0.2,0.6"), "target_sparsities must be str, numbers above 0, up to 0.97, that do not fall"),
        (dict(target_sparsities="0.2,0.5,0.98"), "target_sparsities must be str"),
        (dict(gate_steps="2.5"), "gate_steps must be str, whole numbers from 1"),
        (dict(stage_steps="0,5,5"), "stage_steps must be str, whole numbers from 1"),
        (dict(stage_steps="5,6,7", steps=5), "steps=5 is not valid with stage_steps='5,6,7', which ends with 7"),
        (dict(target_sparsities="0.2,0.4,0.6", target_sparsity=0.7), "target_sparsity=0.7 is not valid with target_sparsities"),
        (dict(stage_steps="5,6,7", steps=7, gate_steps="4,6,5"), "gate_steps='4,6,5' is not valid: stage 2 has 6 steps"),
    ],
)
def test_lists_that_are_none_of_these_stages_are_refused_before_anything_is_made(changes, message, job_of, tmp_path):
    with pytest.raises(ValueError, match=message):
        job_of(**dict(stages=3, steps=None, target_sparsity=None) | changes)
    assert not (tmp_path / "run").exists()


# advice


def test_gates_that_cannot_close_are_said_before_and_while_a_job_runs(job_of):
    job = job_of(steps=5, gate_steps=3, gate_learning_rate=0.02)
    said = "no gate can close in stage 1: in 3 steps gate_learning_rate=0.02 moves log alpha by 0.06, of 9.2 between open and closed"
    assert said in job.about_data and "choose gate_learning_rate=3.08, or 461 gate_steps" in job.about_data
    train(job)
    assert any(warning.startswith(said) for warning in job.run.status()["warnings"])
    quick = job_of(name="quick", steps=5, gate_steps=3, gate_learning_rate=3.08)
    assert "no gate can close" not in quick.about_data and quick.advice == ""
    later = job_of(name="later", stages=2, steps=60, gate_steps="50,40")
    assert "stage 2: in 40 steps" in later.about_data, "9.2 / 0.2 are 47 steps"
    assert job_of(name="manual", inheritance="manual").advice == ""


# copies


def drawn_of(job):
    "The towers of the first stage's student as the bench draws them"
    watched = Watched(Run(job.run.folder))
    watched.look()
    watched.arrays, watched.labels = {}, {"stage": "stage-1"}
    return {drawn.name: drawn for drawn in drawn_towers(watched)}


def equal_leading(student, source, layer, of, prefix="visual."):
    "Whether a student's layer is the leading part of a layer of its source"
    name = f"{prefix}transformer.resblocks.{{}}.mlp.c_fc.weight"
    weight = student[name.format(layer)]
    return torch.equal(weight, source[name.format(of)][: weight.shape[0], : weight.shape[1]])


@pytest.mark.parametrize(("rule", "expected"), [("front_step", front_step(4, 3)), ("even_spread", even_spread(4, 3))])
def test_the_rule_of_layers_is_the_jobs(rule, expected, job_of, deep, tmp_path):
    student = student_file(tmp_path, deep, vision_cfg=dict(layers=3), text_cfg=dict(layers=3))
    job = job_of(deep, inheritance="manual", student=student, layers=rule)
    train(job)
    assert stage_plan(job.run, 1).layers == {"image": expected, "text": expected}
    (job.run.folder / "stage-1" / "plan.json").unlink()  # as before the stage has begun
    drawn = drawn_of(job)["image"]
    assert [source for source, layer in drawn.rows if layer is not None] == list(expected)
    init, source = (load_model(path, "cpu").model.state_dict() for path in (job.run.folder / "stage-1" / "init", deep))
    for layer, of in enumerate(expected):
        assert equal_leading(init, source, layer, of) and equal_leading(init, source, layer, of, "")
    for wrong, message in ((dict(layers="middle"), "layers must be str, one of 'even_spread', 'front_step'"), (dict(layers="front_step", inheritance="mapped"), "maps begin with an even")):
        with pytest.raises(ValueError, match=message):
            job_of(deep, "wrong", **wrong)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_is_inherited_and_the_other_begins_fresh(tower, job_of, deep):
    job = job_of(deep, inheritance="manual", stages=2, inherit_towers=tower)
    train(job)
    first, second, end = (load_model(job.run.folder / path, "cpu").model.state_dict() for path in ("stage-1/init", "stage-2/init", "stage-1/student"))
    source = load_model(deep, "cpu").model.state_dict()
    assert list(stage_plan(job.run, 1).layers) == [tower] and set(stage_plan(job.run, 2).layers) == {"image", "text"}
    for name, prefix in (("image", "visual."), ("text", "")):
        assert equal_leading(first, source, 0, 0, prefix) == (name == tower)
        assert equal_leading(second, end, 0, 0, prefix), "the second stage inherits both from the first"
    assert first["logit_scale"] == source["logit_scale"]
    origins = {name: drawn.origin.startswith("not inherited") for name, drawn in drawn_of(job).items()}
    assert origins == {"image": tower == "text", "text": tower == "image"}, "and views say which"


def test_a_copy_of_one_tower_asks_nothing_of_the_other(job_of, deep, tmp_path):
    other_text = student_file(tmp_path, deep, text_cfg=dict(heads=2, width=48, layers=5))
    with pytest.raises(ValueError, match="text tower"):
        job_of(deep, inheritance="manual", student=other_text)
    train(job_of(deep, inheritance="manual", student=other_text, inherit_towers="image"))
    with pytest.raises(ValueError, match="lock_text=True is not valid here: the student's text tower begins at random"):
        job_of(deep, "locked", inheritance="manual", student=other_text, inherit_towers="image", lock_text=True)
    for inheritance in ("auto", "mapped", "none"):
        with pytest.raises(ValueError, match="inherit_towers='image' is not valid with inheritance="):
            job_of(deep, "wrong", inheritance=inheritance, inherit_towers="image")
    with pytest.raises(ValueError, match="inherit_towers='sound' is not valid: name image, text, or both"):
        job_of(deep, "wrong", inheritance="manual", inherit_towers="sound")


def test_a_student_inherits_from_one_model_while_another_teaches(job_of, deep, tiny_teacher, tmp_path):
    "100, 75, 50: the middle model is no part of the teacher, and the last student none of the teacher's"
    middle = new_model(
        json.loads((tmp_path / "x.json").read_text()) if student_file(tmp_path, deep, "x", vision_cfg=dict(layers=5), text_cfg=dict(layers=3)) else {},
        like=load_model(deep, "cpu"), seed=21,
    )  # fmt: skip
    folder = save_model(middle, tmp_path / "middle")
    last = student_file(tmp_path, deep, "last", vision_cfg=dict(layers=5), text_cfg=dict(layers=2))
    with pytest.raises(ValueError, match="deeper"):
        job_of(deep, inheritance="manual", student=last)
    job = job_of(deep, inheritance="manual", student=last, start_from=str(folder), layers="front_step")
    train(job)
    init = load_model(job.run.folder / "stage-1" / "init", "cpu").model.state_dict()
    assert stage_plan(job.run, 1).layers == {"image": (0, 1, 2, 3, 4), "text": (0, 1)}
    assert all(equal_leading(init, middle.model.state_dict(), layer, layer) for layer in range(5))
    assert read_json(job.run.folder / "config.json")["parameters"]["teacher"] == str(deep)
    taught = torch.load(job.run.folder / "stage-1/distil/checkpoint.pt", weights_only=True)
    assert taught["step"] == 4 and job.teacher.name != job.start.name


def test_a_later_stage_has_the_bias_of_the_stage_before(job_of, tiny_teacher, tmp_path):
    config = json.loads(json.dumps(load_model(tiny_teacher, "cpu").config["model_cfg"])) | dict(init_logit_bias=-10.0)
    biased = save_model(new_model(config, like=load_model(tiny_teacher, "cpu"), seed=3), tmp_path / "biased")
    bias = {}
    for inheritance in ("manual", "auto"):
        job = job_of(biased, inheritance, inheritance=inheritance, stages=2, losses="sigmoid_mimicking=1", learning_rate=1e-2)
        train(job)
        for path in ("stage-1/init", "stage-1/student", "stage-2/init"):
            bias[inheritance, path] = load_model(job.run.folder / path, "cpu").model.logit_bias.item()
    first, learned, second = (bias["manual", path] for path in ("stage-1/init", "stage-1/student", "stage-2/init"))
    assert first == -10 != learned == second, "it was learned, and is inherited"
    assert bias["auto", "stage-1/init"] != -10, "while gates are learned, the network learns, too"


# ResNets


def test_a_resnet_is_copied_by_the_job_as_the_rule_says(job_of, tiny_teacher, tmp_path):
    like = load_model(tiny_teacher, "cpu")
    text = like.config["model_cfg"]["text_cfg"]
    resnet = dict(layers=[2, 4, 3, 2], width=16, image_size=32, patch_size=None, head_width=16)
    teacher = save_model(new_model(TINY | dict(vision_cfg=resnet, text_cfg=text), like=like, seed=5), tmp_path / "resnet")
    student = student_file(tmp_path, teacher, vision_cfg=dict(layers=[1, 2, 2, 2], width=8), text_cfg=dict(layers=1))
    job = job_of(teacher, inheritance="manual", student=student, layers="front_step")
    train(job)
    assert stage_plan(job.run, 1).layers["image"] == ((0,), (0, 2), (0, 1), (0, 1))
    init, source = (load_model(path, "cpu").model.state_dict() for path in (job.run.folder / "stage-1" / "init", teacher))
    steps = {1: 2 // 1, 2: 4 // 2, 3: 3 // 2, 4: 2 // 2}
    compared = 0
    for name, weight in init.items():
        of = name
        if name.startswith("visual.layer"):
            stage, block = name.removeprefix("visual.layer").split(".")[:2]
            of = name.replace(f"layer{stage}.{block}.", f"layer{stage}.{int(block) * steps[int(stage)]}.", 1)
        if name.startswith("visual."):
            leading = tuple(slice(size) for size in weight.shape)
            assert torch.equal(weight, source[of][leading]), name
            compared += 1
    assert compared > 60 and torch.isfinite(load_model(job.run.folder / "stage-1" / "student", "cpu").model.visual.attnpool.c_proj.weight).all()


PUBLISHED_SIZES = json.loads((Path(__file__).parent / "golden" / "tinyclip_configs.json").read_text())["models"]


def described(name):
    "Shapes and parameters of a published architecture, or of its teacher; nothing is allocated"
    with torch.device("meta"):
        network = open_clip.model.CLIP(**open_clip_config(name))
    state = network.state_dict()
    return state, {name for name, _ in network.named_parameters()}


def open_clip_config(name):
    config = model_config(name)
    known = ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg")
    return {key: value for key, value in config.items() if key in known}


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (("ViT-B-32", "TinyCLIP-ViT-61M-32-Text-29M", "TinyCLIP-ViT-40M-32-Text-19M"), None),
        (("RN50", "TinyCLIP-ResNet-30M-Text-29M", "TinyCLIP-ResNet-19M-Text-19M"), [(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, 1, 2)]),
    ],
    ids=["vit", "resnet"],
)
def test_published_students_are_copied_one_from_the_other_and_have_their_published_sizes(names, blocks):
    for source, student in zip(names, names[1:], strict=False):
        state, _ = described(source)
        shapes, parameters = described(student)
        plan = plan_manual(state, shapes, 64, layers=front_step)
        copied = {copy.name: math.prod(copy.shape) for copy in plan.copies}
        golden = PUBLISHED_SIZES[student]["parameters"]
        assert sum(size for name, size in copied.items() if name.startswith("visual.") and name in parameters) == golden["image_tower"]
        assert sum(size for name, size in copied.items() if not name.startswith("visual.")) == golden["text_tower"]
        assert set(copied) == set(shapes) - {"logit_scale"}
        text = [12, 9, 6][names.index(student)]
        assert plan.layers["text"] == tuple(range(text)), "12 to 9 and 9 to 6 keep the first"
        if blocks:
            assert plan.layers["image"] == tuple(blocks)


def test_a_command_gives_lists_and_the_recipe(scenes, tiny_teacher, tmp_path):
    given = tiny_job(scenes, tiny_teacher, tmp_path / "run", "TinyCLIP", probe_pairs=0, keep_snapshots=0, recipe="published", stages=2, gate_steps=2)
    given |= dict(stage_steps="3,4")
    del given["steps"]
    words = [f"{name}={value}" for name, value in given.items() if name != "out"]
    main([str(tmp_path / "run"), "method=TinyCLIP", *words])
    run = Run(tmp_path / "run")
    assert [len(rates_of(run, f"stage-{k}", phase)) for k in (1, 2) for phase in ("gates", "distil")] == [2, 1, 2, 2]
    assert run.config()["parameters"]["gate_steps"] == "2" and run.config()["parameters"]["hold_scale"] == 50


def test_a_list_of_equal_targets_is_a_list():
    assert TinyCLIP(stages=3, target_sparsities="0.5,0.5,0.5").targets() == [0.5, 0.5, 0.5]
    assert TinyCLIP(stages=3, target_sparsities="0.6").targets() == pytest.approx([0.2, 0.4, 0.6])


def test_of_maps_the_rate_falls_to_the_same_share_of_its_peak(scenes, tiny_teacher, tmp_path):
    given = dict(inheritance="mapped", map_share=0.5, learning_rate=1e-2, learning_rate_floor=2e-3, map_learning_rate=1e-3, steps=8, warmup=1)
    job = open_job("Distil", tiny_job(scenes, tiny_teacher, tmp_path / "run", "Distil", student_share=0.5, **given))
    train(job)
    rates = {}
    for line in job.run.metrics():
        if "total" in line:
            rates.setdefault(line["phase"], []).append(line["learning_rate"])
    assert len(rates) == 2 and all(max(of) == of[0] for of in rates.values()), "no rate rises above its peak"


def test_a_tower_that_began_with_nothing_is_followed_nowhere():
    places = {"image": [(0, (1,))], "text": [(0, (0,))]}
    assert _followed(places, {"image": [(3, (4, 5))]}) == {"image": [(3, (5,))]}
