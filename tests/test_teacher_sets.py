"A teacher as a set: every method that takes one takes several, beside or stored, over readers and processes, and goes on."

import json
import re
import shutil
from pathlib import Path

import forked
import pytest
import torch
from conftest import TINY, lines_of
from safetensors.torch import load_file

from vlkd_lab.evaluation import compare, finish
from vlkd_lab.export import export_student
from vlkd_lab.models import new_model, save_model, train_tokenizer
from vlkd_lab.runs import Run
from vlkd_lab.trainers import change, current_student, open_job, train

METHODS = ["TinyCLIP", "Distil", "ClipCid", "DimeFm"]


@pytest.fixture(scope="session")
def large_teacher(tmp_path_factory):
    "A teacher with another picture size, tokenizer, dimension and scale"
    folder = tmp_path_factory.mktemp("large")
    tokenizer = train_tokenizer(["a big green circle over a tiny yellow tree"] * 9, folder / "words", 290, 16)
    vision = TINY["vision_cfg"] | dict(image_size=48)
    text = TINY["text_cfg"] | dict(vocab_size=len(tokenizer.tokenizer), hf_tokenizer_name="tiny", context_length=16)
    model = new_model(dict(embed_dim=24, vision_cfg=vision, text_cfg=text), tokenizer=tokenizer, seed=8)
    model.model.logit_scale.data.fill_(2.0)
    return save_model(model, folder / "large")


@pytest.fixture
def parameters(scenes, tiny_teacher, large_teacher, tmp_path):
    "Of a job with two teachers that takes a second, in a folder of its own"

    def of(method, out="run", **changes):
        common = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", device="cpu")
        common |= dict(steps=3, batch_size=8, warmup=1, validate_every=3, validate_pairs=16, probe_pairs=4, out=str(tmp_path / out))
        common |= dict(teacher=f"{tiny_teacher}=3, {large_teacher}", compare_scratch=False, teacher_features="online")
        own = {
            "TinyCLIP": dict(stages=1, inheritance="manual", losses="affinity_mimicking=1, feature_mimicking=30"),
            "Distil": dict(inheritance="manual"),
            "ClipCid": dict(clusters=4, removed_share=0.3, map_images=8),
            "DimeFm": dict(sentences=common["data"], sentence_batch=12, text_tower="student"),
        }
        return common | own[method] | changes

    return of


def run_of(method, given):
    train(open_job(method, given))
    return Run(given["out"])


def totals(given, name="total"):
    return [line[name] for line in lines_of(given["out"]) if name in line and "step" in line]


@pytest.mark.parametrize("method", METHODS)
def test_a_set_teaches_beside_and_stored_with_and_without_readers(method, parameters):
    cases = {"beside": {}, "reader": dict(workers=1), "stored": dict(teacher_features="stored")}
    for name, changes in cases.items():
        run = run_of(method, parameters(method, name, **changes))
        assert run.status()["state"] == "waiting" and not (run.folder / "bad_samples.jsonl").exists()
    beside, reader, stored = (totals(parameters(method, name)) for name in cases)
    assert beside == reader and len(beside) == 3
    assert stored == pytest.approx(beside, rel=5e-3)
    alone = parameters(method, "alone", teacher=parameters(method)["teacher"].partition("=")[0])
    run_of(method, alone)
    assert totals(alone) != pytest.approx(beside, rel=1e-3), "the second teacher counts"


def test_twins_teach_what_one_of_them_does(parameters, tiny_teacher, tmp_path):
    twin = shutil.copytree(tiny_teacher, tmp_path / "twin")
    given = dict(losses="affinity_mimicking=1, relational=0.5, contrastive=0.3")
    run_of("Distil", parameters("Distil", "one", teacher=str(tiny_teacher), **given))
    run_of("Distil", parameters("Distil", "two", teacher=f"{tiny_teacher}=0.2, {twin}=0.6", **given))
    for name in ("total", "affinity_mimicking", "relational", "contrastive"):
        one, two = (totals(parameters("Distil", out), name) for out in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-5), name


def test_gates_are_learned_from_a_set_and_the_student_can_be_looked_at(parameters):
    given = parameters("TinyCLIP", inheritance="auto", stages=2, steps=4, target_sparsity=0.4)
    run = run_of("TinyCLIP", given)
    phases = {(line["stage"], line["phase"]) for line in run.metrics() if "total" in line}
    assert {("stage-1", "gates"), ("stage-2", "distil")} <= phases
    job = open_job("TinyCLIP", given)
    table = compare(job)
    assert list(table.index) == ["teacher", "teacher-2", "stage-1", "stage-2"]
    assert table.loc["teacher-2", "parameters"] != table.loc["teacher", "parameters"]
    finish(job, table)
    card = (export_student(run.folder, run.folder.parent / "away", onnx=False) / "README.md").read_text()
    sizes = [f"{table.loc[name, 'parameters'] / 1e6:.2f} M" for name in ("teacher", "teacher-2")]
    for number, (size, weight) in enumerate(zip(sizes, ("0.75", "0.25"), strict=True), start=1):
        assert re.search(rf"\| teacher {number} \| \w+, weight {weight}, {size} parameters, SHA-256 [0-9a-f]{{16}} \|", card)
    assert "|  | this model | teacher 1 | teacher 2 |" in card
    assert current_student(run).config["model_cfg"]["embed_dim"] == TINY["embed_dim"]


JOBS = """
import json, sys
from vlkd_lab.trainers import open_job, train
for method, given in json.loads(sys.argv[1]):
    train(open_job(method, given))
"""


def test_two_processes_give_what_one_gives_from_a_set(parameters, tmp_path, scenes):
    whole = dict(data=f"{scenes}/train-{{000000..000001}}.tar", batch_size=80, validate_pairs=16, shuffle=1)
    kinds = {"Distil": {}, "DimeFm": dict(sentence_batch=80, sentences=whole["data"])}
    stored = {f"{method}-stored": (method, kinds[method] | dict(teacher_features="stored")) for method in kinds}
    cases = {method: (method, changes) for method, changes in kinds.items()} | stored
    (tmp_path / "jobs.py").write_text(JOBS)
    for count in (1, 2):
        jobs = [(method, parameters(method, f"{name}-{count}", **whole | changes)) for name, (method, changes) in cases.items()]
        forked.run(str(tmp_path / "jobs.py"), json.dumps(jobs), processes=count)
    for name, (method, _) in cases.items():
        one, two = (totals(parameters(method, f"{name}-{count}")) for count in (1, 2))
        assert len(one) == 3 and one == pytest.approx(two, rel=2e-3), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_set_teaches_in_half_precision(precision, parameters):
    run_of("Distil", parameters("Distil", "fp32"))
    run_of("Distil", parameters("Distil", precision, precision=precision))
    single, half = (totals(parameters("Distil", kind)) for kind in ("fp32", precision))
    assert half[0] == pytest.approx(single[0], rel=0.05) and half != single


def test_gradient_caching_and_crops_with_a_set(parameters):
    run_of("Distil", parameters("Distil", "whole"))
    run_of("Distil", parameters("Distil", "parts", micro_batch=3))
    assert totals(parameters("Distil", "parts")) == pytest.approx(totals(parameters("Distil", "whole")), rel=1e-4)
    crops = dict(crop_scale=0.5, augmentations=2)
    run_of("Distil", parameters("Distil", "crops", **crops))
    run_of("Distil", parameters("Distil", "kept", teacher_features="stored", **crops))
    assert totals(parameters("Distil", "kept")) == pytest.approx(totals(parameters("Distil", "crops")), rel=5e-3)


def test_stores_of_a_set_have_folders_of_their_own(parameters, tmp_path):
    given = parameters("ClipCid", teacher_features="stored", features=str(tmp_path / "features"))
    run_of("ClipCid", given)
    owners = [json.loads(path.read_text())["width"] for path in (tmp_path / "features").glob("*/store.json")]
    assert sorted(owners) == [16, 24]


def test_a_run_of_a_set_goes_on_with_the_same_set_alone(parameters, tmp_path, large_teacher):
    given = parameters("Distil")
    run = run_of("Distil", given)
    first, second = given["teacher"].split("=3, ")
    moved = shutil.copytree(large_teacher, tmp_path / "moved")
    run_of("Distil", given | dict(teacher=f"{first}=6, {moved}=2", steps=4))
    assert [line["step"] for line in run.metrics() if "total" in line] == [1, 2, 3, 4]
    for other in (f"{first}, {second}", first, f"{second}, {first}=3"):
        with pytest.raises(ValueError, match="teacher"):
            open_job("Distil", given | dict(teacher=other, steps=4))
    assert run.config()["teacher_sha256"].count("=") == 2


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("Distil", "{0}, {0}", "each name once"),
        ("Distil", "{0}=0, {1}", "each weight above 0"),
        ("Distil", "{0}, no/such", "no/such"),
        ("DimeFm", "{0}, {1}", "text_tower='student'"),
        ("Dlip", "{0}, {1}", "one BLIP"),
    ],
)
def test_sets_that_make_no_sense_are_refused(method, changes, message, parameters, tiny_teacher, large_teacher):
    given = parameters("Distil" if method == "Dlip" else method, teacher=changes.format(tiny_teacher, large_teacher))
    given.pop("inheritance", None)
    if method == "Dlip":
        given.pop("teacher_features")
    if method == "DimeFm":
        given["text_tower"] = "teacher"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_job(method, given)
    assert not Path(given["out"]).exists()


def test_weights_of_terms_change_in_mid_run_and_projections_are_kept(parameters, monkeypatch):
    from vlkd_lab import trainers

    step, fits = trainers.take_step, []

    def observed(loop, batch):
        if not fits:
            with pytest.raises(ValueError, match="centres"):
                line = step(loop, batch)
                change(loop, {"weights": {"cluster_distribution": 1.0}})
            assert change(loop, {"weights": {"relational": 0.0}}) == {"weights": {"relational": 0.0}}
            fits.append(loop)
            return line
        return step(loop, batch)

    monkeypatch.setattr(trainers.loop, "take_step", observed)
    given = parameters("Distil", checkpoint_seconds=0.0)
    run_of("Distil", given)
    assert "relational" not in totals_names(given)[-1] and len(fits[0].extra) == 4, "weight and bias of the image's and text's"
    before = load_file(next((Path(given["out"]) / "student" / "student").glob("*model.safetensors")))
    run_of("Distil", given | dict(steps=4))
    after = load_file(next((Path(given["out"]) / "student" / "student").glob("*model.safetensors")))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def totals_names(given):
    return [set(line) for line in lines_of(given["out"]) if "total" in line]
