import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from vlkd_lab.data import load_pairs
from vlkd_lab.evaluation import (
    Classes,
    accuracy,
    affinity_divergence,
    agreement,
    alarms,
    classifier,
    compare,
    encode_pairs,
    find_classes,
    finish,
    plot_losses,
    plot_shapes,
    plot_tradeoff,
    plot_validation,
    predict,
    score,
    show_table,
    steps_to_reach,
)
from vlkd_lab.features import Features, recall
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.models import latencies, load_model
from vlkd_lab.runs import Run, RunWriter
from vlkd_lab.trainers import check_parameters, train


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_class_is_the_normalised_mean_of_its_templates(tiny_teacher):
    vlm = load_model(tiny_teacher, "cpu")
    classes = Classes(("star", "house", "<b>"), ("a {}", "the {} {}"))
    rows = classifier(vlm, classes)
    with torch.no_grad():
        by_hand = vlm.encode_text(vlm.tokenizer(["a house", "the house house"])).mean(dim=0)
    assert torch.allclose(rows[1], by_hand / by_hand.norm(), atol=1e-6) and rows.shape == (3, 16)


def test_classes_lie_beside_the_shards(tmp_path):
    (tmp_path / "val-000000.tar").touch()
    assert find_classes(tmp_path / "val-000000.tar") is None
    (tmp_path / "classes.txt").write_text("\ufeffstar\nnew\u2028line\x0bhouse\r\n\n", encoding="utf-8")
    assert find_classes(tmp_path / "val-000000.tar").names == ("star", "new\u2028line\x0bhouse"), "line k is class k"
    (tmp_path / "classes.txt").write_text("star\n\nhouse\n")
    with pytest.raises(ValueError, match="line 2 is blank: each line names the class of its number"):
        find_classes(tmp_path / "val-000000.tar")
    (tmp_path / "classes.txt").write_text("star\nhouse\n")
    (tmp_path / "templates.txt").write_text("no place")
    with pytest.raises(ValueError, match="no place"):
        find_classes(tmp_path / "val-000000.tar")


def test_accuracy_counts_labelled_samples_only():
    assert accuracy(torch.tensor([1, 1, 2]), [1, None, 0]) == 0.5
    assert math.isnan(accuracy(torch.tensor([1]), [None]))
    assert predict(unit(5, 4), unit(3, 4, seed=1)).shape == (5,)


def test_agreement_is_perfect_with_oneself_and_falls_with_noise():
    teacher = Features(unit(60, 8), unit(60, 8, seed=1), torch.tensor(30.0))
    levels = []
    for noise in (0.0, 0.3, 3.0):
        image = F.normalize(teacher.image + noise * unit(60, 8, seed=2))
        levels.append(agreement(Features(image, teacher.text, teacher.scale), teacher, unit(5, 8, seed=3), unit(5, 8, seed=3)))
    assert levels[0]["same_caption"] == levels[0]["same_class"] == 1 and abs(levels[0]["affinity_divergence"]) < 1e-5
    for name, sign in (("same_caption", 1), ("same_class", 1), ("affinity_divergence", -1)):
        assert sign * levels[0][name] > sign * levels[1][name] > sign * levels[2][name]


def test_divergence_is_a_kl_per_batch():
    s, t = (Features(unit(6, 4, seed=k), unit(6, 4, seed=k + 1), torch.tensor(5.0)) for k in (0, 7))
    kl = lambda a, b: F.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean")  # noqa: E731
    by_hand = (kl(s.logits(), t.logits()) + kl(s.logits().T, t.logits().T)) / 2
    assert affinity_divergence(s, t) == pytest.approx(by_hand.item(), rel=1e-5)


def test_alarms_are_raised_at_chance_and_for_nan():
    fine = {"zero_shot": 0.5, "image_to_text_r1": 0.3, "text_to_image_r1": 0.3}
    assert alarms("m", fine, 500, 16) == []
    assert "chance among 500 captions" in alarms("m", fine | {"image_to_text_r1": 0.002, "text_to_image_r1": 0.004}, 500, 16)[0]
    ten = {"image_to_text_r1": 0.29, "text_to_image_r1": 0.29}
    assert not alarms("m", fine | ten, 10) and alarms("m", fine | {name: 0.19 for name in ten}, 10), "a third is no chance among ten"
    assert "16 classes" in alarms("m", fine | {"zero_shot": 0.07}, 500, 16)[0]
    assert "NaN" in alarms("m", {"image_to_text_r1": math.nan}, 500)[0]


def test_a_broken_model_scores_nan(tiny_teacher, scenes):
    vlm, pairs = load_model(tiny_teacher, "cpu"), load_pairs(f"{scenes}/val-000000.tar")
    with torch.no_grad():
        vlm.model.visual.proj.fill_(math.nan)
    scores, _, _ = score(vlm, pairs, Classes(("a", "b")))
    assert all(math.isnan(v) for v in scores.values())


def test_scores_are_those_of_the_features(tiny_teacher, scenes):
    vlm, pairs = load_model(tiny_teacher, "cpu"), load_pairs(f"{scenes}/val-000000.tar")
    scores, features, _ = score(vlm, pairs)
    assert len(features) == 48 and math.isnan(scores["zero_shot"])
    assert {k: scores[k] for k in recall(features)} == recall(features, captions=pairs.captions)
    assert torch.allclose(encode_pairs(vlm, pairs, batch_size=7).image, features.image, atol=1e-6)


def test_steps_count_from_the_stage_and_from_the_teacher(tmp_path):
    with RunWriter(tmp_path) as run:
        for step in range(11, 21):
            run.log({"stage": "stage-2", "step": step, "total": 1.0})
            if step % 2 == 0:
                run.log(
                    {"event": "validation", "stage": "stage-2", "step": step, "image_to_text_r1": step / 20, "text_to_image_r1": step / 20}
                )
    assert steps_to_reach(run, "stage-2", 0.79) == (6, 16) and steps_to_reach(run, "stage-2", 1.1) is None


def test_the_table_of_a_job(scenes, tiny_teacher, tmp_path):
    (scenes / "classes.txt").write_text("\n".join(f"thing {k}" for k in range(16)))
    given = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", teacher=str(tiny_teacher), device="cpu")
    job = open_tinyclip(
        check_parameters(TinyCLIP, given | dict(steps=4, stages=2, batch_size=16, out=str(tmp_path / "run"), validate_every=2))
    )
    train(job)
    table = compare(job)
    assert list(table.index) == ["teacher", "stage-1", "stage-2", "scratch-2"]
    assert table.loc["teacher", "same_caption"] == 1 and table.loc["teacher", "kept"] == 1
    assert table.loc["stage-2", "parameters"] == table.loc["scratch-2", "parameters"] < table.loc["stage-1", "parameters"]
    assert table.loc["stage-2", "macs"] < table.loc["stage-1", "macs"] < table.loc["teacher", "macs"]
    assert 0.2 < table.loc["stage-2", "kept"] <= 0.25 and table.loc["stage-2", "steps"] == table.loc["scratch-2", "steps"] == 8
    result = finish(job, table)
    run = Run(job.run.folder)
    assert run.status()["state"] == "finished" and run.result()["models"].keys() == result["models"].keys()
    assert any("chance" in w for w in result["warnings"]), "an untrained teacher is at chance, and that is said"
    page = show_table(table, ["<script>alert(1)</script>"]).data
    assert "<script>" not in page and "scratch-2" in page and "nan" not in page.lower()
    named = [text.get_text() for axis in plot_losses(run).axes if axis.get_legend() for text in axis.get_legend().get_texts()]
    assert "affinity mimicking" in named and "contrastive" in named, "every term is named"
    models = {"teacher": job.teacher}
    for figure in (plot_losses(run), plot_validation(run, 0.5), plot_tradeoff(table), plot_shapes(models)):
        assert figure.axes and all(axis.get_xlabel() or axis.get_ylabel() for axis in figure.axes[:1])
    assert isinstance(table, pd.DataFrame)
    assert not any("beyond" in warning or "trained on" in warning for warning in run.status()["warnings"])
    compare(job, job.val[:6], Classes(("thing 0",)))
    assert any("have a class beyond classes.txt" in warning for warning in run.status()["warnings"])


class OnAClock:
    "A model that takes as long as it is told"

    model = torch.nn.Linear(1, 1)
    device = torch.device("cpu")
    image_shape = (4, 4)

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, iter(seconds)

    def tokenizer(self, captions):
        return torch.zeros(len(captions), 2)

    def encode(self, batch):
        assert torch.get_num_threads() == 1, "several threads wait for each other where the machine is shared"
        self.clock[0] += next(self.seconds)


def test_noise_that_comes_and_goes_gives_two_equal_students_one_latency(monkeypatch):
    "Some rounds are disturbed for who happens to run then: medians agree, and the spread says that there was noise"
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    noisy = {"student": [9, 1, 1, 4, 1, 1, 1, 3, 1, 1, 1, 5], "scratch": [1, 1, 1, 1, 6, 1, 7, 1, 1, 1, 2, 1]}
    torch.set_num_threads(2)
    timed = latencies({name: OnAClock(clock, seconds) for name, seconds in noisy.items()}, batch_size=10)
    assert torch.get_num_threads() == 2
    assert timed["student"].median == timed["scratch"].median == pytest.approx(100)
    assert (timed["student"].low, timed["student"].high) == pytest.approx((100, 300)) and timed["scratch"].high == pytest.approx(200)
    clock[0] = 0.0
    drifting = [1.0 + round_ for round_ in range(12) for _ in range(2)]  # a machine that becomes slower and slower
    in_turn = iter(drifting)
    both = latencies({name: OnAClock(clock, in_turn) for name in ("student", "scratch")}, batch_size=10)
    assert both["student"] == both["scratch"]


def test_the_table_says_the_spread(monkeypatch):
    table = pd.DataFrame({"teacher": dict(latency_ms=0.5, latency_low_ms=0.41, latency_high_ms=0.77)}).T
    assert "0.50 (0.41–0.77)" in show_table(table).data and "latency, ms a pair" in show_table(table).data
    assert "0.50" in show_table(table[["latency_ms"]]).data, "of a run from before"
