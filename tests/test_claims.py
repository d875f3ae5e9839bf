"""Trials and claims: what is run, kept, judged and shown; the numbers that come with the project belong to the trials as they are."""

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from scipy import optimize, stats

from vlkd_lab import samples, trials, verdicts
from vlkd_lab.data import escaped, load_pairs
from vlkd_lab.evaluation import first_step
from vlkd_lab.methods import METHODS
from vlkd_lab.models import load_model
from vlkd_lab.runs import to_json
from vlkd_lab.trainers import check_parameters, find_data
from vlkd_lab.trials import Trial, origin, run_trial, score_model
from vlkd_lab.verdicts import CLAIMS, TRIALS, Claim, judge, overall, own_results, show_verdicts, speed_up

ROOT = Path(__file__).parent.parent
VERDICTS = {3: "holds (3 of 3 seeds)", 1: "cannot be seen at this size (1 of 3 seeds)", 0: "does not hold (0 of 3 seeds)"}
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


@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_can_run_on_other_scenes(name):
    trial = TRIALS[name].on_other_scenes(5)
    options = asdict(check_parameters(METHODS[trial.method].parameters, dict(trial.parameters)))
    assert options["data"].endswith(",seed:5") and options["val"] == "scenes:1000,seed:5"
    before = asdict(check_parameters(METHODS[trial.method].parameters, dict(TRIALS[name].parameters)))
    assert {key for key, value in options.items() if before[key] != value} == {"data", "val"}


def test_other_scenes_are_others_for_training_for_validation_and_for_the_score(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "cache_folder", lambda: tmp_path)
    asked = []

    def fewer(where, held_out=False):
        asked.append((where, held_out))
        return find_data(where.replace("16000", "80").replace("1000", "40"), held_out=held_out)

    monkeypatch.setattr(trials, "find_data", fewer)
    found = score_model(load_model(tiny_teacher, "cpu"), 5)
    assert set(found) == {"r1", "zero_shot", "linear_probe", "robustness", "robustness_kept"}
    assert set(asked) == {("scenes:16000,seed:5", False), ("scenes:1000,seed:5", True)}
    pictures = {}
    for where, held_out in [("scenes:40", False), ("scenes:40,seed:5", False), ("scenes:40,seed:5", True), ("scenes:40,seed:6", True)]:
        pictures[where, held_out] = {image.tobytes() for image in load_pairs(find_data(where, held_out=held_out)).images}
    assert sum(map(len, pictures.values())) == len(set().union(*pictures.values())) == 160
    for wrong in ("scenes:40,seed:-1", "scenes:40,seed:1.5"):
        with pytest.raises(ValueError, match="seed:N"):
            find_data(wrong)
    with pytest.raises(ValueError, match="is not generated"):
        Trial("TinyCLIP", "", {"data": "shards/"}).on_other_scenes(5)


def record(**scores):
    return {"students": {"student": {"scores": scores}}}


def claim(margins=lambda values: {HOSTILE: values["b"] - values["a"]}, **changed):
    measure = lambda found: {name: verdicts.at(found, name, "r1") for name in "ab"}  # noqa: E731
    given = dict(paper=HOSTILE, says=HOSTILE, test=HOSTILE, rule=HOSTILE, trials=("a", "b"), measure=measure, margins=margins)
    return Claim(**given | changed)


def judged(*differences, **changed):
    "The verdict on made-up seeds of which b is so far above a"
    records = {"a": {}, "b": {}}
    for seed, difference in enumerate(differences):
        records["a"][seed], records["b"][seed] = record(r1=0.5), record(r1=0.5 + difference)
    return judge(claim(**changed), records)


@pytest.mark.parametrize("better, words", VERDICTS.items(), ids=("all", "some", "none"))
def test_a_verdict_counts_the_seeds(better, words):
    verdict = judged(*(0.1 if seed < better else -0.1 for seed in range(3)))
    assert verdict.words == words and list(verdict.values.index) == [0, 1, 2] and list(verdict.values.columns) == ["a", "b"]
    assert bool(verdict.because) == (better == 1) and verdict._repr_html_().count(verdict.words) == 1


@pytest.mark.parametrize(
    "differences, answer, because",
    [
        ((0.02, 0.03, 0.04), "holds", ""),
        ((0.01, 0.06, 0.02), "cannot be seen at this size", "+3.0 points, between -1.5 and +7.5; 3 seeds see 6.1 or more, this would take about 7"),
        ((0.01, 0.06, 0.02) * 2, "holds", ""),
        ((-0.02, -0.03, -0.04), "does not hold", ""),
        ((0.02, 0.03, float("nan")), "cannot be seen at this size", "nan"),
        ((-0.01, -0.06, -0.02), "cannot be seen at this size", "-3.0 points, between -7.5 and +1.5"),
        ((0.0, 0.0, 0.0), "does not hold", ""),
        ((0.02,), "not decided", "one seed has no spread"),
        ((0.1, -0.1, 0.0001), "cannot be seen at this size", "would take more than 1,000"),
    ],
    ids=str,
)
def test_a_verdict_is_as_sure_as_its_seeds(differences, answer, because):
    verdict = judged(*differences)
    assert verdict.words.partition(" (")[0] == answer
    assert because in verdict.because and bool(verdict.because) == bool(because)
    assert verdict.because in show_verdicts({"x": verdict}).replace(escaped(HOSTILE), HOSTILE)


def test_of_several_conditions_the_one_that_decides_is_named():
    margins = lambda values: {"far": values["b"] - values["a"] + 1, "near": values["b"] - values["a"]}  # noqa: E731
    assert judged(0.01, 0.06, 0.02, margins=margins).because.startswith("near: +3.0 points")
    against = lambda values: {"wide": 9 * (values["b"] - values["a"]) - 0.01, "clear": values["b"] - values["a"] - 0.052}  # noqa: E731
    verdict = judged(0.01, 0.06, 0.02, margins=against)
    assert verdict.deciding.name == "clear", "one condition that is seen not to be met is enough"
    bounds = verdicts.power(verdict.margins)
    assert bounds.loc["clear", "visible"] == pytest.approx(_visible(verdict.margins["clear"].std(), 3, 0.025)), "a no, of two conditions"
    assert bounds.loc["wide", "visible"] == pytest.approx(_visible(verdict.margins["wide"].std(), 3)), "a yes"


def test_fresh_seeds_are_asked_for_where_seeds_decide():
    shown = verdicts.list_open({"x": judged(0.01, 0.06, 0.02), "sure": judged(0.02, 0.03, 0.04), "one": judged(0.5)})
    assert "-p row x -p first_seed 3 -p seeds 7 -p alone True" in shown and "-p row one -p first_seed 1 -p seeds 5" in shown
    assert "sure" not in shown and "the rule's edge" in verdicts.list_open({"edge": judged(0.1, -0.1, 0.0001)})


def test_trials_beside_are_shown_and_not_judged():
    records = {"a": {0: record(r1=0.1), 1: record(r1=0.2)}, "b": {1: record(r1=0.4)}}
    measure = lambda found: {name: verdicts.at(found, name, "r1") for name in found}  # noqa: E731
    verdict = judge(claim(trials=("b",), beside=("a",), measure=measure, margins=lambda values: {"b": values["b"]}), records)
    assert list(verdict.values.index) == [0, 1] and list(verdict.margins.index) == [1] and verdict.words == "not decided (1 of 1 seed)"
    assert verdict.values["a"].tolist() == [0.1, 0.2] and show_verdicts({"x": verdict})


def test_a_number_that_is_none_is_read_from_json_and_decides_nothing():
    records = json.loads(json.dumps(to_json({n: {s: record(r1=0.1 * s + (n == "b")) for s in (1, 2, 3)} for n in "ab"})))
    records = {name: {int(seed): found for seed, found in of_one.items()} for name, of_one in records.items()}
    records["b"][2]["students"]["student"]["scores"]["r1"] = to_json(float("nan"))
    assert judge(claim(), records).words == "cannot be seen at this size (2 of 3 seeds)"


def test_bounds_and_power_are_those_of_students_t():
    margins = pd.DataFrame({"one": [0.1, 0.2, 0.4, 0.3, 0.1], "other": [0.0, 0.2, -0.2, 0.1, 0.1]})
    bounds = verdicts.power(margins)
    for name, seeds in margins.items():
        error = seeds.std(ddof=1) / 5**0.5
        assert bounds.loc[name, "low"] == pytest.approx(seeds.mean() + stats.t.ppf(0.05, 4) * error)
        assert bounds.loc[name, "high"] == pytest.approx(seeds.mean() + stats.t.ppf(0.975, 4) * error), "two conditions: each at 2.5 %"
        exact = optimize.brentq(lambda far: stats.nct.sf(stats.t.ppf(0.95, 4), 4, far) - 0.8, 0.1, 50) * error  # noqa: B023
        assert bounds.loc[name, "visible"] == pytest.approx(exact, rel=0.02), "four of five such trials see it"
        enough = int(bounds.loc[name, "seeds"])
        assert [_visible(seeds.std(ddof=1), n) <= abs(seeds.mean()) for n in (enough - 1, enough)] == [False, True]
    assert verdicts.power(margins.head(1))[["low", "high", "visible"]].isna().all(axis=None)


def _visible(spread, n, level=0.05):
    return (stats.t.ppf(1 - level, n - 1) + stats.t.ppf(0.8, n - 1)) * spread / n**0.5


def test_a_seed_without_all_trials_is_not_judged():
    verdict = judge(claim(), {"a": {0: record(r1=0.1), 1: record(r1=0.1)}, "b": {1: record(r1=0.2), 2: record(r1=0.2)}})
    assert list(verdict.values.index) == [1] and verdict.yes == (True,)
    assert judge(claim(), {}).words == "not run yet" and "not run yet" in show_verdicts({"x": judge(claim(), {})})


def test_verdicts_show_texts_as_texts_and_every_seed_as_a_dot():
    records = {name: {s: record(r1=0.1 * s) for s in range(4)} for name in "ab"}
    shown = show_verdicts({HOSTILE: judge(claim(), records)})
    assert "<img" not in shown and shown.count("h.01") == 12 and "15.0" in shown, "two labels, one condition, four seeds"


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
    assert {0, 1, 2} <= set(verdict.values.index) or verdict.because.endswith("one seed has no spread")
    judged = verdict.values.loc[verdict.margins.index]
    assert not judged.isna().any().any() and not verdict.margins.isna().any().any() and len(verdict.yes) == len(judged)
    assert len(judged) == len(verdict.values) or CLAIMS[name].beside
    assert set(stored["trials"]) <= set(TRIALS)


def test_four_methods_are_compared_at_equal_samples():
    more = deepcopy(stored["trials"])
    more["towers-clip-cid-scratch"][10] = more["towers-clip-cid-scratch"][0]  # as a row that was run with other seeds leaves it
    pd.testing.assert_frame_equal(overall(more), overall(stored["trials"]))
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
    found = {trial: {0: trained(trial)} for trial in CLAIMS[name].trials + CLAIMS[name].beside}
    for where, value in better.items():
        trial, _, stage = where.replace("_", "-").replace("--", "__").partition("__")
        trial = next(one for one in found if one.replace(".", "-") == trial)
        made = trained(trial, *(value if isinstance(value, tuple) else (value,)))
        found[trial][0]["students"] |= {stage: made["students"][stage]} if stage else made["students"]
    verdict = judge(CLAIMS[name], found, {"teacher": trained("teacher"), "blip": trained("blip")})
    assert not verdict.values.isna().any().any()
    return verdict.yes == (True,)


RULES = {  # claim -> what makes it hold, what makes it fail
    "tinyclip-half": (dict(stages_0_75__stage_2=0.47), dict(stages_0_75__stage_2=0.466)),
    "tinyclip-speed": (dict(towers_contrastive_inherited=(0.6, 20)), dict(towers_contrastive_inherited=(0.5, 90))),
    "tinyclip-affinity": (dict(towers_tinyclip_inherited=0.51), dict(towers_tinyclip_scratch=0.6)),
    "tinyclip-stages": (dict(stages_0_9=0.6), dict(at_once_0_9=0.6)),
    "tinyclip-stages-firm": (dict(stages_0_9_firm=0.6), dict(at_once_0_9_firm=0.6)),
    "clip-cid-filtering": (dict(cid_copies_balanced=0.495), dict(cid_copies_balanced=0.48)),
    "clip-cid-filtering-near": (dict(cid_balanced_long=0.495), dict(cid_balanced_long=0.48)),
    "clip-cid-cluster": (dict(cid_cluster=0.6, cid_whole=0.6), dict(cid_cluster=0.6)),
    "clip-cid-samples": (dict(towers_clip_cid_scratch=(0.6, 50)), dict(towers_clip_cid_scratch=(0.5, 90))),
    "dime-fm-unpaired": (dict(unpaired__student=0.6), dict(unpaired__scratch=0.6)),
    "dime-fm-teacher": (dict(towers_dime_fm_scratch=0.495), dict(towers_dime_fm_scratch=0.48)),
    "dime-fm-robust": (dict(unpaired__student=0.6), dict(unpaired__student=0.4)),
    "dlip-half": (dict(dlip_half=0.47), dict(dlip_half=0.466)),
    "dlip-22": (dict(dlip_22_whole=0.48), dict(dlip_22_whole=0.47, dlip_22=0.5)),
    "dlip-speed": (dict(dlip_22=0.51), dict(dlip_22=0.5)),
    "dlip-modules": (dict(dlip_image=0.45, dlip_text=0.45), dict(dlip_image=0.45)),
    "dlip-fusion": (dict(dlip_fusion_2=0.495, dlip_fusion_1=0.4), dict(dlip_fusion_2=0.45, dlip_fusion_1=0.4)),
    "dlip-decoder": (dict(dlip_scratch=0.6), dict(dlip_scratch_no_decoder=0.6)),
    "dlip-begin": (dict(dlip_begin_image=0.6), dict(dlip_begin_text=0.6)),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_rule_says_yes_to_what_it_asks_for_and_no_to_the_contrary(name):
    better, worse = RULES[name]
    assert holds(name, **better) and not holds(name, **worse)
