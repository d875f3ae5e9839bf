"What the bench knows of the networks: sizes, costs, heads and pairs, against slow obvious ways"

import json
import time

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_job
from figures import MODEL, SHAPES, gate_values, write_gates, write_probe, write_run

from vlkd_lab import runs, trainers
from vlkd_lab.data import visible
from vlkd_lab.fusion import blip_cost
from vlkd_lab.gates import Gates, budget, gates_from_arrays, kept_shapes, open_probability
from vlkd_lab.methods import METHODS, find_method
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.models import HEAD_PAIRS, count_cost, head_maps, load_model, shape_cost
from vlkd_lab.runs import Run, Snapshots, kept_snapshots, read_snapshot
from vlkd_lab.trainers import check_parameters, train
from vlkd_lab.widgets import (
    NetworkDrawing,
    NetworkView,
    PairView,
    ProbeMatrices,
    Watched,
    bench_parts,
    drawn_towers,
    head_overlap,
    head_shares,
    measured,
    network_numbers,
    standing,
)

HOSTILE = "<script>alert(1)</script> \u202eevil"


def looked(run):
    watched = Watched(Run(run if not isinstance(run, Run) else run.folder))
    watched.look()
    return watched


def numbers_of(watched):
    return {row[0]: row[2:] for row in network_numbers(watched, standing(watched, drawn_towers(watched)))}


def told_of_networks(run):
    "What a run warns of that could not be looked at"
    return [warning for warning in run.status().get("warnings", ()) if "look" in warning or "inside" in warning]


def run_job(method, given):
    method = find_method(method)
    job = method.open(check_parameters(method.parameters, given))
    train(job)
    return job


# ---- gates and cuts


def test_numbers_under_gates_are_those_of_the_cut(tmp_path):
    run = write_run(tmp_path / "run")
    for openness in (5.0, 1.0, -1.0):
        arrays = gate_values(openness)
        Snapshots(run).take(lambda arrays=arrays: arrays, stage="stage-1", phase="gates", step=9)
        gates = gates_from_arrays(Gates(SHAPES, budget(SHAPES)), {name: array.numpy() for name, array in arrays.items()})
        cut = kept_shapes(SHAPES, gates.final())
        watched = looked(run)
        numbers = numbers_of(watched)
        assert numbers["parameters"][0] == shape_cost(MODEL, cut).parameters / 1e6
        assert numbers["MMACs per pair"] == [shape_cost(MODEL, cut).macs / 1e6, shape_cost(MODEL, SHAPES).macs / 1e6]
        now = standing(watched, drawn_towers(watched))
        chances = gates.open_probabilities()
        for tower, shape in cut.items():
            assert now.shapes[tower] == shape
            for layer, heads in enumerate(chances[tower].heads):
                assert np.allclose(now.keep[tower][layer], heads.detach().numpy(), atol=1e-6)


def test_a_head_is_as_open_as_its_block_lets_it_be(tmp_path):
    run = write_run(tmp_path / "run")
    blocks = torch.tensor([5.0, -1.0, 0.3])
    arrays = gate_values(1.0) | {"gates/image/attention_block": blocks, "gates/text/attention_block": torch.ones(2)}
    Snapshots(run).take(lambda: arrays, stage="stage-1", phase="gates", step=9)
    watched = looked(run)
    keep = standing(watched, drawn_towers(watched)).keep["image"]
    heads = open_probability(arrays["gates/image/heads"]).split([4, 4, 4])
    for layer, block in enumerate(open_probability(blocks)):
        assert 0.05 < block < 1 and np.allclose(keep[layer], (heads[layer] * block).numpy(), atol=1e-6), layer


def test_the_validation_beside_the_drawing_is_the_stages_newest(tmp_path):
    run = write_run(tmp_path / "run")
    Snapshots(run).take(lambda: gate_values(1.0), stage="stage-1", phase="gates", step=60)
    events = [m for m in run.metrics() if m.get("event") == "validation" and m["stage"] == "stage-1"]
    recalls = [50 * (event["image_to_text_r1"] + event["text_to_image_r1"]) for event in events]
    assert numbers_of(looked(run))["R@1, validation"][0] == pytest.approx(recalls[-1]) and len(set(recalls)) == 4


@pytest.mark.parametrize("one, other, shared", [([1, 1, 0, 0], [0, 0, 1, 1], 0.0), ([1, 1, 0, 0], [0, 2, 2, 0], 0.5), ([1, 3, 0, 0], [2, 6, 0, 0], 1.0)])
def test_overlap_is_the_attention_that_both_give_to_the_same_places(one, other, shared):
    assert head_overlap({"teacher": np.array(one, float), "student": np.array(other, float)}) == pytest.approx(shared)


@pytest.fixture(scope="module")
def two_stages(scenes, tiny_teacher, tmp_path_factory):
    "A TinyCLIP job of two stages, in which somebody asks for the heads of the probe's second pair"
    out = tmp_path_factory.mktemp("network") / "run"
    given = tiny_job(scenes, tiny_teacher, out, "TinyCLIP", stages=2, steps=10, target_sparsity=0.5, keep_snapshots=4)
    job = open_tinyclip(check_parameters(TinyCLIP, given | dict(gate_learning_rate=1.0, multiplier_learning_rate=2.0)))
    step, patch = trainers.take_step, pytest.MonkeyPatch()

    def asks(loop, batch):
        if loop.phase.folder == "stage-1/distil" and loop.step == 1:
            job.run.control(attention=1)
        return step(loop, batch)

    patch.setattr(trainers.loop, "take_step", asks)
    train(job)
    patch.undo()
    return job


def test_numbers_after_a_stage_are_those_of_the_student_that_was_cut_out(two_stages):
    run = Run(two_stages.run.folder)
    watched = looked(run)
    teacher = count_cost(two_stages.teacher)
    for stage in ("stage-1", "stage-2"):
        student = load_model(run.folder / stage / "student", "cpu")
        cost = count_cost(student)
        watched.arrays, watched.labels = {}, {"stage": stage}
        numbers = numbers_of(watched)
        assert numbers["parameters"] == [cost.parameters / 1e6, teacher.parameters / 1e6]
        assert numbers["MMACs per pair"] == [cost.macs / 1e6, teacher.macs / 1e6]
        assert numbers["size as saved"][0] == 4 * sum(weight.numel() for weight in student.model.parameters()) / 1e6
        assert {tower.name: tower.student for tower in drawn_towers(watched)} == student.shapes
    assert numbers["R@1, validation"][0] == pytest.approx(
        [50 * (m["image_to_text_r1"] + m["text_to_image_r1"]) for m in run.metrics() if m.get("event") == "validation"][-1]
    )


def test_heads_stand_where_the_teacher_had_them(two_stages):
    "Followed by hand through the weights: value rows of both cuts, scaled by their gates, are the teacher's"
    watched = looked(two_stages.run.folder)
    first, second = (load_model(two_stages.run.folder / f"stage-{k}" / "init", "cpu").shapes for k in (1, 2))
    for tower in drawn_towers(watched):
        assert tower.student == second[tower.name] and tower.rows == tuple((k, k) for k in range(tower.teacher.layers))
        for layer, heads in enumerate(tower.places):
            assert len(heads) == second[tower.name].heads[layer] and list(heads) == sorted(set(heads))
            assert first[tower.name].heads[layer] >= len(heads)
            for index, place in enumerate(heads):
                assert tower.head_at(layer, place) == ((layer, place), (layer, index))


# ---- where heads look


def test_a_job_shows_the_heads_that_were_asked_for(two_stages):
    run = Run(two_stages.run.folder)
    kept = {path.stem: read_snapshot(path) for path, _ in kept_snapshots(run)}
    rows = {name: arrays["student_heads_rows"].tolist() for name, (arrays, _) in kept.items() if "student_heads_rows" in arrays}
    asked = {name for name, of_pair in rows.items() if of_pair == [1]}
    ends = {name for name, of_pairs in rows.items() if of_pairs == [0, 1, 2, 3]}
    assert ends == {"stage-1-gates-00000004", "stage-1-distil-00000006", "stage-2-gates-00000004", "stage-2-distil-00000006"}
    assert asked and not any(name.startswith("stage-1-gates") for name in asked), "the request came later"
    assert not told_of_networks(run)
    student = load_model(run.folder / "stage-2" / "student", "cpu")
    arrays = kept["stage-2-distil-00000006"][0]
    maps = head_maps(student.model, two_stages.probe.image, two_stages.probe.text)
    for tower, expected in maps.items():
        assert np.allclose(arrays[f"student_heads_{tower}"], expected.numpy(), atol=2e-3), tower
    watched = looked(run)
    teacher = head_maps(two_stages.teacher.model, two_stages.probe.image, two_stages.probe.text)
    image = drawn_towers(watched)[0]
    shares = head_shares(watched, image, row=1, place=image.places[1][0], pair=3)
    assert np.allclose(shares["teacher"], teacher["image"][3, 1, image.places[1][0]].numpy(), atol=2e-3)
    assert np.allclose(shares["student"], maps["image"][3, 1, 0].numpy(), atol=2e-3)


def test_a_request_of_yesterday_asks_nothing_of_a_new_start(scenes, tiny_teacher, tmp_path):
    given = tiny_job(scenes, tiny_teacher, tmp_path / "run", "Distil", student_share=0.5, losses="affinity_mimicking=1")
    Run(tmp_path / "run").control(attention=1)
    job = run_job("Distil", given)
    assert job.run.requested()["attention"] == -1
    with pytest.raises(ValueError, match="a picture of the probe"):
        job.run.control(attention=True)


def test_looking_costs_the_training_at_most_a_share_of_its_time(tmp_path, monkeypatch):
    "A snapshot that takes long puts the next one off: however slow heads are, snapshots keep their share"
    taken = []
    monkeypatch.setattr(runs, "is_watched", lambda run: True)
    snapshots = Snapshots(Run(tmp_path))
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        snapshots.offer(lambda: time.sleep(0.02) or taken.append(1) or {"x": torch.zeros(1)}, stage="s", phase="p", step=0)
    assert len(taken) == 1, "20 ms are 1 % of 2 s"


# ---- every kind of run has its drawing

RESNET = dict(TINY, vision_cfg=dict(layers=[1, 1, 1, 1], width=8, head_width=8, image_size=32))


@pytest.mark.parametrize("kind", ["manual", "own shapes", "resnet", "set", "alone", "contrastive", "sentences"])
def test_runs_without_gates(kind, scenes, tiny_teacher, tmp_path):
    resnet = tmp_path / "resnet.json"
    vocabulary = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    if kind != "resnet":
        vocabulary = TINY["text_cfg"]  # CLIP's own words
    resnet.write_text(json.dumps(RESNET | dict(text_cfg=vocabulary)))
    method, changes = {
        "manual": ("Distil", dict(inheritance="manual", student_share=0.4)),
        "own shapes": ("Distil", dict(student_share=0.4)),
        "resnet": ("Distil", dict(student=str(resnet))),
        "set": ("Distil", dict(teacher=f"{tiny_teacher}, {tiny_teacher}/", student_share=0.4)),
        "alone": ("Distil", dict(teacher="", student=str(resnet), losses="contrastive=1")),
        "contrastive": ("Contrastive", dict(architecture=str(resnet))),
        "sentences": ("DimeFm", dict(sentence_batch=8)),
    }[kind]
    given = tiny_job(scenes, tiny_teacher, tmp_path / "run", method, losses="affinity_mimicking=1") | changes
    if method != "Distil":
        given.pop("losses")
    job = run_job(method, given)
    assert not told_of_networks(job.run)
    watched = looked(job.run.folder)
    stage = "teacher" if kind == "contrastive" else "student"
    cost = count_cost(load_model(job.run.folder / stage / "student", "cpu"))
    numbers = numbers_of(watched)
    assert numbers["parameters"][0] == cost.parameters / 1e6 and numbers["MMACs per pair"][0] == cost.macs / 1e6
    has_teacher = kind not in ("alone", "contrastive")
    assert (numbers["parameters"][1] is not None) == has_teacher
    towers = {tower.name: tower for tower in drawn_towers(watched)}
    assert set(towers) == {"image", "text"} and NetworkDrawing().png(watched)[:4] == b"\x89PNG"
    if kind == "resnet":
        assert towers["image"].student is None and towers["image"].blocks["student"] == "ResNet with bottlenecks"
    if kind in ("alone", "contrastive"):
        assert towers["image"].student.neurons == (8, 16, 32, 64) and not any(towers["image"].student.heads)
    if kind == "manual":
        assert towers["image"].origin == "" and towers["image"].places[0] == tuple(range(towers["image"].student.heads[0]))
    if kind == "own shapes":
        assert towers["image"].origin.startswith("not inherited")
    view = NetworkView(watched)
    view.choose({"head": ["text", 0, 0], "pair": 1})
    shown = [panel["model"] for panel in view.panels]
    assert shown == ([] if kind == "sentences" else ["teacher", "student"] if has_teacher else ["student"]), view.said
    view.choose({"head": ["image", 0, 0]})
    assert json.dumps(view.numbers) and len(json.dumps([view.towers, view.sizes, view.numbers])) < 6000


def test_a_blip_has_its_drawing(scenes, tiny_blip, tmp_path):
    data = f"{scenes}/train-{{000000..000002}}.tar"
    given = dict(data=data, val=f"{scenes}/val-000000.tar", teacher=str(tiny_blip), device="cpu", out=str(tmp_path / "run"))
    given |= dict(steps=2, batch_size=4, warmup=1, validate_every=2, validate_pairs=4, probe_pairs=4, student="image:1x16, text:1x16")
    job = run_job("Dlip", given | dict(compare_scratch=False, losses="base:1"))
    watched = looked(job.run.folder)
    assert not told_of_networks(job.run)
    student, teacher = (blip_cost(model) for model in (find_student(job), job.teacher))
    numbers = numbers_of(watched)
    assert numbers["parameters"] == [student.total / 1e6, teacher.total / 1e6]
    assert numbers["MMACs per pair"] == [student.macs["retrieval"] / 1e6, teacher.macs["retrieval"] / 1e6]
    towers = {tower.name: tower for tower in drawn_towers(watched)}
    assert list(towers) == ["image", "text", "decoder"] and towers["image"].student.layers == 1
    assert [row[1] for row in towers["image"].rows].count(None) == 1, "a ghost"
    view = NetworkView(watched)
    for tower, row in (("image", 0), ("text", 0)):
        layer = next(k for k, (_, ours) in enumerate(towers[tower].rows) if ours is not None)
        view.choose({"head": [tower, layer, 0], "pair": 2})
        assert [panel["model"] for panel in view.panels] == ["teacher", "student"], view.said
        assert row == 0 and "overlap" in view.said
    assert view.words[0] == "start"


def find_student(job):
    return METHODS["Dlip"].models[0].load(job.run.folder / "student" / "student", "cpu")


# ---- the pair behind a cell


def test_a_pair_is_what_the_matrices_say(tmp_path):
    run = write_run(tmp_path / "run")
    write_probe(run)
    watched = looked(run)
    view = PairView()
    for cell in ((0, 0), (3, 7), (11, 2)):
        view.cell = cell
        view.show(watched)
        for model, arrays in (("teacher", watched.teacher), ("student", watched.arrays)):
            shown = view.facts["models"][model]
            scale = float(arrays[f"{model}_scale"][0])
            texts, images = (measured(arrays[model], scale, name) for name in ("image_to_text", "text_to_image"))
            assert shown["cosine"] == pytest.approx(float(arrays[model][cell])) and shown["text"] == pytest.approx(float(texts[cell]), abs=1e-6)
            assert shown["image"] == pytest.approx(float(images[cell]), abs=1e-6)
            assert shown["first_text"] == [int(texts[cell[0]].argmax()), pytest.approx(float(texts[cell[0]].max()), abs=1e-6)]
            assert shown["first_image"] == [int(images[:, cell[1]].argmax()), pytest.approx(float(images[:, cell[1]].max()), abs=1e-6)]


def test_changes_since_the_stage_before(two_stages):
    watched = looked(two_stages.run.folder)
    view = PairView()
    view.show(watched)
    before = read_snapshot(two_stages.run.folder / "snapshots/kept/stage-1-distil-00000006.safetensors")[0]["student"]
    captions = watched.probe["captions"]
    expected = {"mended": [], "made": []}
    for i, caption in enumerate(captions):
        old, new = int(before[i].argmax()), int(watched.arrays["student"][i].argmax())
        was, now = captions[old] == caption, captions[new] == caption
        if was != now:
            expected["mended" if now else "made"].append([i, old, new])
    assert view.changes["since"] == "the end of stage-1" and {name: view.changes[name] for name in expected} == expected


def test_a_bench_opens_the_pair_of_a_cell_and_follows(tmp_path):
    run = write_run(tmp_path / "run")
    write_probe(run)
    probe = {"captions": [f"{k} {HOSTILE}" for k in range(12)], "pictures": ["data:image/png;base64,AA", "http://elsewhere", *[""] * 10]}
    (run.folder / "probe.json").write_text(json.dumps(probe))
    part, watched = ProbeMatrices().live(), looked(run)
    part.update(watched)
    part.views["student"]._hear({"chosen": [1, 0]})
    assert list(part.pair.pictures) == ["0"] and "\u202e" not in json.dumps(part.pair.facts, ensure_ascii=False)
    assert part.pair.facts["captions"]["1"] == visible(probe["captions"][1])
    before = part.pair.facts["models"]["student"]["cosine"]
    arrays = {"student": torch.eye(12), "student_scale": torch.tensor([12.0])}
    Snapshots(run).take(lambda: arrays, stage="stage-2", phase="distil", step=130)
    watched.look()
    part.update(watched)
    assert part.pair.facts["models"]["student"]["cosine"] == 0 != before and part.pair.facts["cell"] == [1, 0]
    (run.folder / "probe.json").write_text(json.dumps({"captions": probe["captions"]}))
    fresh, bare = ProbeMatrices().live(), looked(run)
    fresh.update(bare)
    fresh.views["teacher"]._hear({"chosen": [2, 2]})
    assert fresh.pair.pictures == {} and fresh.pair.facts["is_own"], "a probe without pictures"


def test_a_pair_and_a_drawing_take_few_milliseconds_and_bytes(tmp_path):
    run = write_run(tmp_path / "run")
    student = write_probe(run, rows=64)
    write_gates(run, **student)
    watched = looked(run)
    part, drawing = ProbeMatrices().live(), NetworkView(watched)
    part.update(watched)
    part.choose((5, 9))
    for name, show in (("pair", lambda: part.pair.show(watched)), ("drawing", drawing.show)):
        times = []
        for _ in range(20):
            start = time.thread_time()
            show()
            times.append(time.thread_time() - start)
        print(f"{name}: {1000 * sorted(times)[10]:.2f} ms")
        assert sorted(times)[10] < 0.005, name
    sizes = len(json.dumps([part.pair.facts, part.pair.changes])), len(json.dumps([drawing.sizes, drawing.numbers])) + len(drawing.keep)
    print(f"pair {sizes[0]} bytes, drawing {sizes[1]} bytes")
    assert max(sizes) < 8000


def test_every_method_of_towers_has_the_drawing(tmp_path):
    run = write_run(tmp_path / "run")
    assert NetworkDrawing in {type(part) for part in bench_parts(looked(run))}
    own = ("TinyCLIP", "Distil", "Contrastive", "ClipCid", "DimeFm", "Dlip", "BlipTraining")
    assert all(NetworkDrawing in METHODS[name].views for name in own) and HEAD_PAIRS == 16
