"""Trials and claims: what is run, kept, judged and shown; the numbers that come with the project belong to the trials as they are."""

import json
from copy import deepcopy
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from vlkd_lab import verdicts
from vlkd_lab.evaluation import first_step
from vlkd_lab.methods import METHODS
from vlkd_lab.runs import to_json
from vlkd_lab.trainers import check_parameters
from vlkd_lab.trials import Trial, origin, run_trial
from vlkd_lab.verdicts import CLAIMS, TRIALS, Claim, judge, overall, own_results, show_verdicts, speed_up

ROOT = Path(__file__).parent.parent
VERDICTS = {3: "holds (3 of 3 seeds)", 1: "undecided (1 of 3 seeds)", 0: "does not hold (0 of 3 seeds)"}
HOSTILE = "<img src=x onerror=alert(1)>"


def tiny(scenes, teacher, **changed):
    "A trial of seconds"
    given = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=str(next(scenes.glob("val-*.tar"))), teacher=str(teacher))
    given |= dict(stages=1, steps=4, batch_size=16, inheritance="manual", validate_every=2, validate_pairs=16, device="cpu", probe_pairs=0)
    return Trial("TinyCLIP", "tiny", given | dict(compare_scratch=True, losses="affinity_mimicking=1") | changed)


def count(model):
    return {"r1": float(sum(p.numel() for p in model.model.parameters()))}


def test_a_trial_is_trained_once_and_then_read(scenes, tiny_teacher, tmp_path):
    trial = tiny(scenes, tiny_teacher)
    first = run_trial("tiny", trial, 1, tmp_path, count)
    assert set(first["students"]) == {"stage-1", "scratch-1"} and first["seed"] == 1
    assert first["samples"] == {"stage-1": 64, "scratch-1": 64}
    assert first["students"]["stage-1"]["curve"] and first["students"]["stage-1"]["step_seconds"] > 0
    assert first["students"]["stage-1"]["scores"]["r1"] == first["students"]["stage-1"]["parameters"]
    written = (tmp_path / "tiny-1" / "metrics.jsonl").stat().st_mtime_ns
    assert run_trial("tiny", trial, 1, tmp_path, lambda model: pytest.fail("scored again")) == first
    assert (tmp_path / "tiny-1" / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_trial_keeps_where_its_training_began(scenes, tiny_teacher, tmp_path):
    (tmp_path / "tiny-0").mkdir()
    (tmp_path / "tiny-0" / "origin.json").write_text(json.dumps({"commit": "abc", "machine": "m", "date": "d", "torch": "t"}))
    assert run_trial("tiny", tiny(scenes, tiny_teacher), 0, tmp_path, count)["origin"]["commit"] == "abc"
    assert origin()["machine"].split()[1:3] == ["CPU", "cores"]


def test_another_trials_folder_is_not_overwritten(scenes, tiny_teacher, tmp_path):
    run_trial("tiny", tiny(scenes, tiny_teacher), 0, tmp_path, count)
    before = (tmp_path / "tiny-0" / "trial.json").read_text()
    with pytest.raises(ValueError, match="steps"):
        run_trial("tiny", tiny(scenes, tiny_teacher, steps=5), 0, tmp_path, count)
    assert (tmp_path / "tiny-0" / "trial.json").read_text() == before


@pytest.mark.parametrize("name", TRIALS)
def test_the_parameters_of_every_trial_are_valid(name):
    trial = TRIALS[name]
    options = check_parameters(METHODS[trial.method].parameters, dict(trial.parameters))
    options.weights()
    assert trial.parameters["probe_pairs"] == 0


def record(**scores):
    return {"students": {"student": {"scores": scores}}}


def claim(holds=lambda values: values["b"] > values["a"], **changed):
    measure = lambda found: {name: verdicts.at(found, name, "r1") for name in "ab"}  # noqa: E731
    given = dict(paper=HOSTILE, says=HOSTILE, test=HOSTILE, rule=HOSTILE, trials=("a", "b"), measure=measure, holds=holds)
    return Claim(**given | changed)


@pytest.mark.parametrize("better, words", VERDICTS.items(), ids=("all", "some", "none"))
def test_a_verdict_counts_the_seeds(better, words):
    records = {"a": {s: record(r1=0.5) for s in range(3)}, "b": {s: record(r1=0.6 if s < better else 0.4) for s in range(3)}}
    verdict = judge(claim(), records)
    assert verdict.words == words and list(verdict.values.index) == [0, 1, 2] and list(verdict.values.columns) == ["a", "b"]


def test_a_seed_without_all_trials_is_not_judged():
    verdict = judge(claim(), {"a": {0: record(r1=0.1), 1: record(r1=0.1)}, "b": {1: record(r1=0.2), 2: record(r1=0.2)}})
    assert list(verdict.values.index) == [1] and verdict.yes == (True,)
    assert judge(claim(), {}).words == "not run yet" and "not run yet" in show_verdicts({"x": judge(claim(), {})})


def test_verdicts_show_texts_as_texts_and_every_seed_as_a_dot():
    records = {name: {s: record(r1=0.1 * s) for s in range(4)} for name in "ab"}
    shown = show_verdicts({HOSTILE: judge(claim(), records)})
    assert "<img" not in shown and shown.count("h.01") == 8 and "15.0" in shown


def test_steps_to_a_score():
    slow, fast = {"curve": [[20, 0.1], [40, 0.3], [60, 0.2]]}, {"curve": [[20, 0.35]]}
    assert speed_up(slow, fast) == 2.0 and speed_up(fast, slow) == 0.0 and first_step([[5, 0.1]], 0.2) is None


def test_every_claim_looks_at_trials_that_there_are():
    assert all(set(own.trials) <= set(TRIALS) and own.unit in ("%", "×", "") for own in CLAIMS.values())
    assert {own.paper for own in CLAIMS.values()} == {"TinyCLIP", "CLIP-CID", "DIME-FM", "DLIP"}


def test_own_runs_count_only_with_the_trials_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "TRIALS", {"a": Trial("TinyCLIP", "", {"steps": 3})})
    for seed, steps in ((0, 3), (1, 4)):
        (tmp_path / f"a-{seed}").mkdir()
        (tmp_path / f"a-{seed}" / "trial.json").write_text(json.dumps({"trial": "a", "seed": seed, "parameters": {"steps": steps}}))
    assert list(own_results(tmp_path)["a"]) == [0]


def test_results_are_kept_and_come_back(tmp_path):
    path = tmp_path / "results.json"
    verdicts.keep_results({"a": {0: {"r1": 1 / 3}}}, {"teacher": {}}, path)
    assert verdicts.stored_results(path) == {"trials": {"a": {0: {"r1": 0.33333}}}, "teachers": {"teacher": {}}}


stored = verdicts.stored_results()


@pytest.mark.parametrize("name", TRIALS)
def test_the_numbers_that_come_along_are_of_the_trials_as_they_are(name):
    for found in stored["trials"].get(name, {}).values():
        assert found["parameters"] == to_json(dict(TRIALS[name].parameters)) and found["trial"] == name
        assert set(found["origin"]) == {"commit", "machine", "date", "torch"}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_is_judged_by_all_it_looks_at(name):
    verdict = judge(CLAIMS[name], stored["trials"], stored["teachers"])
    assert {0, 1, 2} <= set(verdict.values.index), "three seeds"
    assert not verdict.values.isna().any().any() and len(verdict.yes) == len(verdict.values)
    assert set(stored["trials"]) <= set(TRIALS)


def test_four_methods_are_compared_at_equal_samples():
    table = overall(stored["trials"])
    assert len(table) == 5 * 2 * 3 and table["images seen"].nunique() == 1 and table["parameters"].nunique() == 1
    assert table.groupby(["method", "start"]).size().eq(3).all() and isinstance(table, pd.DataFrame)


def test_the_page_says_what_the_stored_numbers_say():
    page = nbformat.read(ROOT / "nbs" / "results" / "claims.ipynb", 4)
    said = json.dumps([cell.get("outputs", []) for cell in page.cells], ensure_ascii=False)
    for name in CLAIMS:
        assert judge(CLAIMS[name], stored["trials"], stored["teachers"]).words in said and f">{name}</small>" in said
    for found in (found for by_seed in stored["trials"].values() for found in by_seed.values()):
        assert found["origin"]["commit"] in said and found["origin"]["date"] in said
    readme = (ROOT / "README.md").read_text()
    for own in CLAIMS.values():
        assert f"| {own.paper} | {own.says} | {judge(own, stored['trials'], stored['teachers']).words} |" in readme


STAGES = {"stages-0.75": ("stage-1", "stage-2", "stage-3", "scratch-3"), "stages-0.9": ("stage-3",), "stages-0.9-firm": ("stage-3",),
          "unpaired": ("student", "scratch")}  # fmt: skip
SCORES = ("r1", "zero_shot", "linear_probe", "robustness", "robustness_kept", "retrieval_r1", "cider", "answer_accuracy",
          "features_image_to_text_r1")  # fmt: skip


def trained(name, value=0.5, steps=100):
    "A made-up record: every score the same, reached after so many steps"
    first = "stage-1" if TRIALS.get(name) and TRIALS[name].method == "TinyCLIP" else "student"
    curve = [[0, 0.0], [steps, value], [400, value]]
    student = {"scores": dict.fromkeys(SCORES, value), "curve": curve, "speed_up": {"retrieval": 4 * value, "captioning": 4 * value}}
    return {"students": {stage: deepcopy(student) for stage in STAGES.get(name, (first,))}}


def holds(name, **better):
    "Whether a claim holds when some trials (or TRIAL__STAGE) have another score than 0.5"
    found = {trial: {0: trained(trial)} for trial in CLAIMS[name].trials}
    for where, value in better.items():
        trial, _, stage = where.replace("_", "-").replace("--", "__").partition("__")
        trial = next(one for one in found if one.replace(".", "-") == trial)
        made = trained(trial, *(value if isinstance(value, tuple) else (value,)))
        found[trial][0]["students"] |= {stage: made["students"][stage]} if stage else made["students"]
    verdict = judge(CLAIMS[name], found, {"teacher": trained("teacher"), "blip": trained("blip")})
    assert not verdict.values.isna().any().any()
    return verdict.yes == (True,)


RULES = {  # claim -> what makes it hold, what makes it fail
    "tinyclip-half": ({}, dict(stages_0_75__stage_2=0.47)),
    "tinyclip-speed": (dict(towers_contrastive_inherited=(0.6, 20)), dict(towers_contrastive_inherited=(0.5, 90))),
    "tinyclip-affinity": (dict(towers_tinyclip_inherited=0.6), dict(towers_tinyclip_scratch=0.6)),
    "tinyclip-stages": (dict(stages_0_9=0.6), dict(at_once_0_9=0.6)),
    "tinyclip-stages-firm": (dict(stages_0_9_firm=0.6), dict(at_once_0_9_firm=0.6)),
    "clip-cid-filtering": (dict(cid_balanced=0.495), dict(cid_balanced=0.48)),
    "clip-cid-cluster": (dict(cid_cluster=0.6, cid_whole=0.6), dict(cid_cluster=0.6)),
    "clip-cid-samples": (dict(cid_whole=(0.6, 50)), dict(cid_whole=(0.5, 90))),
    "dime-fm-unpaired": (dict(unpaired__student=0.6), dict(unpaired__scratch=0.6)),
    "dime-fm-robust": (dict(unpaired__student=0.6), dict(unpaired__student=0.4)),
    "dlip-half": (dict(dlip_half=0.46), dict(dlip_half=0.44)),
    "dlip-22": (dict(dlip_22_long=0.48), dict(dlip_22_long=0.47, dlip_22=0.5)),
    "dlip-speed": ({}, dict(dlip_22=0.4)),
    "dlip-modules": (dict(dlip_image=0.45, dlip_text=0.45), dict(dlip_image=0.45)),
    "dlip-fusion": (dict(dlip_fusion_2=0.495, dlip_fusion_1=0.4), dict(dlip_fusion_2=0.45, dlip_fusion_1=0.4)),
    "dlip-decoder": (dict(dlip_scratch=0.6), dict(dlip_scratch_no_decoder=0.6)),
    "dlip-begin": (dict(dlip_begin_image=0.6), dict(dlip_begin_text=0.6)),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_rule_says_yes_to_what_it_asks_for_and_no_to_the_contrary(name):
    better, worse = RULES[name]
    assert holds(name, **better) and not holds(name, **worse)
