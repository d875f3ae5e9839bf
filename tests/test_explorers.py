"""Affinities, gates and clusters looked at closely, without a browser."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image
from test_widgets import HOSTILE as HOSTILE_CAPTION
from test_widgets import MARKUP, clusters_snapshot, write_clusters

from vlkd_lab import explorers, widgets
from vlkd_lab.data import load_pairs
from vlkd_lab.explorers import (
    Affinities,
    AffinityExplorer,
    ClusterMap,
    ClusterState,
    GateExplorer,
    GateHistory,
    Umap,
    cell_html,
    cluster_table,
    confusion_html,
    confusions,
    disagreement,
    most_disputed,
    purity,
    run_clusters,
)
from vlkd_lab.features import Features
from vlkd_lab.gates import sparsity
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.models import count_cost, load_model, tower_shapes
from vlkd_lab.runs import Run, find_run
from vlkd_lab.stages import full_shapes
from vlkd_lab.trainers import train
from vlkd_lab.widgets import visible

HOSTILE = "<script>alert(1)</script> \"q\" 'a' \u202eright"


@pytest.fixture(scope="module")
def pairs(scenes):
    "Twelve validation pairs; the first caption is hostile"
    found = load_pairs(scenes / "val-000000.tar", limit=12)
    return replace(found, captions=(HOSTILE, *found.captions[1:]), keys=(HOSTILE, *found.keys[1:]))


def features(seed, rows=12, scale=20.0):
    random = torch.Generator().manual_seed(seed)
    image, text = (torch.nn.functional.normalize(torch.randn(rows, 6, generator=random), dim=1) for _ in range(2))
    return Features(image, text, torch.tensor(scale))


@pytest.fixture(scope="module")
def run(scenes, tiny_teacher, tmp_path_factory):
    "A short run with gates"
    folder = tmp_path_factory.mktemp("explored") / "run"
    given = dict(data=f"{scenes}/train-000000.tar", val=f"{scenes}/val-000000.tar", teacher=str(tiny_teacher), out=str(folder))
    given |= dict(stages=2, steps=20, gate_share=0.6, batch_size=16, warmup=1, target_sparsity=0.6, validate_every=20)
    given |= dict(device="cpu", compare_scratch=False)
    job = open_tinyclip(TinyCLIP(**given))
    train(job)
    return job.run


def test_disagreement_is_the_divergence_of_every_row():
    teacher, student = (torch.softmax(torch.randn(5, 5, generator=torch.Generator().manual_seed(k)), dim=1) for k in (0, 1))
    expected = torch.nn.functional.kl_div(student.log(), teacher, reduction="none").sum(1)
    assert np.allclose(disagreement(teacher.numpy(), student.numpy()), expected, atol=1e-6)


def test_orders_move_rows_and_columns_together(pairs):
    look = Affinities(features(0), features(1), pairs.captions, pairs.labels)
    whole = look.matrix("teacher")
    look.order("class")
    labels = [pairs.labels[i] for i in look.rows]
    assert labels == sorted(labels) and np.allclose(look.matrix("teacher"), whole[np.ix_(look.rows, look.rows)])
    look.order("disagreement")
    both = [look.matrix(name, "image_to_text") for name in ("teacher", "student")]
    assert (np.diff(disagreement(*both)) <= 1e-6).all() and most_disputed(look)[0] == 0
    look.order("given")
    assert np.array_equal(look.matrix("teacher"), whole)
    with pytest.raises(ValueError, match="given, class, disagreement"):
        look.order("size")


def test_behind_a_cell_stand_the_right_pair_and_scores(pairs):
    teacher, student = features(0), features(1)
    look = Affinities(teacher, student, pairs.captions, pairs.labels)
    look.order("disagreement")
    said = look.cell(2, 5)
    i, j = look.rows[2], look.rows[5]
    cosines = teacher.image[i] @ teacher.text.T
    assert said["image"] == i and said["text"] == j and said["teacher"]["cosine"] == pytest.approx(float(cosines[j]), abs=1e-6)
    assert said["teacher"]["probability"] == pytest.approx(float(torch.softmax(20 * cosines, 0)[j]), rel=1e-4)
    assert said["teacher"]["rank"] == 1 + int((cosines > cosines[j]).sum())


def test_captions_behind_a_cell_are_text(pairs):
    look = Affinities(features(0), features(1), pairs.captions, pairs.labels)
    page = cell_html(look, pairs, (0, 0)) + confusion_html(pairs, [(0, 0, 1)], "mended " + HOSTILE)
    assert "<script>" not in page and "\u202e" not in page and page.count("&lt;script&gt;") >= 5 and "its own" in page
    assert "Click a cell" in cell_html(look, pairs, None)


def test_a_click_selects_in_all_matrices_and_another_order_forgets_it(pairs):
    look = AffinityExplorer(Affinities(features(0), features(1), pairs.captions, pairs.labels), pairs, live=True)
    look.views["student"]._hear({"chosen": [3, 4]})
    assert look.selected == (3, 4) and all(view.selected == [3, 4] for view in look.views.values())
    assert "rank of this text" in look.detail.value
    look.panel._hear({"requested": {"order": "disagreement"}})
    assert look.selected is None and look.views["teacher"].selected == []
    assert look.views["teacher"].row_texts[0] == visible(pairs.captions[look.affinities.rows[0]])
    look.panel._hear({"requested": {"measure": "image_to_text"}})
    assert look.views["teacher"].measure == "P(text | image)"
    assert look.views["teacher"].matrix.sum(axis=1) == pytest.approx(np.ones(12), abs=1e-5)
    look.close()


def test_confusions_count_equal_captions_as_one():
    text = torch.eye(3)
    before = Features(torch.eye(3)[[1, 0, 2]], text, torch.tensor(1.0))
    after = Features(torch.eye(3)[[0, 1, 0]], text, torch.tensor(1.0))
    assert confusions(before, after, ["a", "b", "c"]) == {"mended": [(0, 1, 0), (1, 0, 1)], "made": [(2, 2, 0)]}
    assert confusions(before, after, ["a", "a", "a"]) == {"mended": [], "made": []}


def test_what_a_cut_would_leave_is_what_the_cut_left(run):
    history = GateHistory(run)
    assert len(history) > 10 and history.said(0) == "stage-1, step 0 of its gates"
    last = max(k for k, (_, labels) in enumerate(history.snapshots) if labels["stage"] == "stage-1")
    left = history.cuts(last, [0.3]).iloc[0]
    student = load_model(run.folder / "stage-1" / "student", "cpu")
    cost = count_cost(student)
    assert (left["parameters"], left["macs"]) == (cost.parameters, cost.macs)
    widths = {tower: shape.head_width for tower, shape in full_shapes(run).items()}
    assert left["sparsity"] == pytest.approx(sparsity(tower_shapes(student.model.state_dict(), widths), history.gates(last).costs))


def test_sliders_of_the_gates_are_kept_in_range(run):
    look = GateExplorer(run, live=True)
    first = {name: view.frame for name, view in look.views.items()}
    look.panel._hear({"requested": {"snapshot": 0}})
    assert look.place == 0 and any(view.frame != first[name] for name, view in look.views.items())
    look.panel._hear({"requested": {"snapshot": 99, "target": 3.0, "ordered": False}})
    assert look.place == len(look.history) - 1 and look.target == 0.97 and not look.ordered
    look.close()
    shown = GateExplorer(run, live=False).static()._repr_mimebundle_()["text/html"]
    assert "data:image/png" in shown and "MMACs per pair" in shown


def test_a_run_without_gates_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"parameters": {}}))
    with pytest.raises(ValueError, match="keeps no snapshot of gates"):
        GateHistory(find_run(tmp_path))


@pytest.fixture
def state(pairs):
    random = np.random.default_rng(0)
    return ClusterState(random.normal(size=(12, 5)), [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2], pairs, [HOSTILE] * 20, [0] * 12)


def test_the_plane_is_that_of_pca_and_stays(state):
    from sklearn.decomposition import PCA

    fitted = PCA(2).fit(state.features)
    assert np.allclose(np.abs(state.coordinates()), np.abs(fitted.transform(state.features)), atol=1e-5)
    assert np.allclose(state.plane.shares, fitted.explained_variance_ratio_)
    kept = state.coordinates()[3]
    changed = state.features.copy()
    changed[4:] += 5
    state.update(changed, state.assignment[::-1].copy())
    assert np.allclose(state.coordinates()[3], kept) and list(state.sizes()) == [6, 4, 2]


def test_colours_of_clusters_classes_and_errors(state):
    for colour in ("cluster", "class", "error"):
        state.choose(colour_by=colour)
        figure = go.Figure(explorers._clusters_json(state))
        assert sum(len(trace.x) for trace in figure.data[:-1]) == 12 and figure.layout.xaxis.title.text.startswith("PCA 1 (")
        text = json.dumps(figure.to_dict(), default=str)
        assert "<script>" not in text and "\u202e" not in text
    names = {trace.name for trace in figure.data[:-1]}
    assert names == {"right", "wrong"}
    with pytest.raises(ValueError, match="colour_by must be one of cluster, class, error"):
        state.choose(colour_by="size")
    with pytest.raises(ValueError, match="layout must be one of PCA"):
        state.choose(layout="UMAP")


def test_of_many_groups_the_chosen_one_is_lit_and_many_points_are_drawn_by_webgl(monkeypatch):
    monkeypatch.setattr(explorers, "Umap", lambda *_: None)  # it takes seconds, and nothing is made of it
    many = ClusterState(np.random.default_rng(0).normal(size=(5001, 3)), np.arange(5001) % 40)
    points, lit = explorers._clusters_json(many)["data"][:2]
    assert points["type"] == "scattergl" and points["marker"]["color"] == widgets.GREY and len(points["x"]) == 5001
    view = ClusterMap(many, live=True)
    view.figure._hear({"chosen": [0, 47]})
    drawn = view.figure.value["traces"]
    assert [trace["name"] for trace in drawn[:2]] == ["40 clusters", "cluster 7"]
    assert len(view.figure.points("cluster 7")[0]) == 125 and drawn[1]["colour"] == widgets.CATEGORIES[0]
    view.figure._hear({"chosen": [1, 3]})
    assert many.assignment[many.selected] == 7, "a point that is lit can be chosen too"
    view.close()


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(features=np.zeros(4)), r"features must be \(N, D\)"),
        (dict(assignment=[0, 1]), "assignment has 2 entries, features has 12 rows"),
        (dict(predicted=[0]), "predicted has 1 entries"),
    ],
)
def test_samples_that_do_not_fit_are_refused(given, message):
    whole = dict(features=np.random.default_rng(0).normal(size=(12, 4)), assignment=[0] * 12)
    with pytest.raises(ValueError, match=message):
        ClusterState(**whole | given)


def test_umap_takes_the_place_of_pca_unless_somebody_chose(state):
    class Ready:
        problem, coordinates = "", np.arange(24.0).reshape(12, 2)

        def ready(self):
            return True

    state.umap = Ready()
    look = ClusterMap(state, live=True)
    look.update()
    assert state.layout == "UMAP" and look.figure.value["panels"][0]["x"]["title"] == "UMAP 1 (seed 0)"
    look.panel._hear({"requested": {"layout": "PCA"}})
    look.update()
    assert state.layout == "PCA" and [b["value"] for b in look.panel.buttons if b.get("pressed")] == ["cluster", "PCA"]
    look.select(7)
    assert "<script>" not in look.detail.value and "<img" in look.detail.value
    look.select(0)
    assert "&lt;script&gt;" in look.detail.value and "<script>" not in look.detail.value
    look.feed(state.features * 2, state.assignment)
    assert state.layout == "PCA" and state.umap is None
    look.close()


def test_a_click_on_a_point_shows_its_sample(state):
    look = ClusterMap(state, live=True)
    look.figure._hear({"chosen": [1, 2]})
    assert state.selected == 8 and "<img" in look.detail.value
    look.figure._hear({"chosen": [len(look.figure.names) - 1, 0]})
    assert state.selected == 8, "a size is no sample"
    look.close()


def test_umap_runs_in_a_process_of_its_own(tmp_path):
    random = np.random.default_rng(0).normal(size=(20, 4))
    worker = Umap(random, seed=3)
    assert worker.wait(150) and worker.coordinates.shape == (20, 2) and np.isfinite(worker.coordinates).all()


def test_umap_that_cannot_be_had_is_said_and_pca_stays(state, monkeypatch):
    monkeypatch.setattr(explorers, "_UMAP", "raise SystemExit('no umap here')")
    look = ClusterMap(state, live=False).static()
    assert "no umap here" in look._repr_mimebundle_()["text/plain"]
    image = Image.open(io.BytesIO(base64.b64decode(look._repr_mimebundle_()["image/png"])))
    assert image.size == (830, 400)


def test_purity_counts_classes_of_clusters(state):
    table = purity(state)
    labels = state.labels[state.assignment == 0]
    assert list(table["samples"]) == [6, 4, 2] and table["share"].iloc[0] == np.bincount(labels).max() / 6
    assert "\u202e" not in table["class"].iloc[0]


@pytest.fixture
def clustered(tmp_path):
    "A run with clusters that has kept two students, and a baseline"
    run = Run(tmp_path / "clustered")
    with pytest.raises(ValueError, match="holds no clusters"):
        run_clusters(run)
    write_clusters(run, count=4)
    with pytest.raises(ValueError, match="keeps no snapshot"):
        cluster_table(run)
    clusters_snapshot(run, [1] * 6, step=0, keep="first")
    clusters_snapshot(run, [0, 0, 1, 1, 2, 0], step=9, keep="last")
    return run


def test_before_and_after_of_a_run_with_clusters(clustered):
    table = cluster_table(clustered)
    assert list(table.index) == ["teacher", "student, step 0", "student, step 9"]
    assert table["agreement"].tolist() == pytest.approx([1, 1 / 3, 5 / 6]) and table["purity"].tolist() == pytest.approx([1, 1 / 3, 5 / 6])
    assert table["empty clusters"].tolist() == [1, 3, 1] and table["largest cluster"].tolist() == [2, 6, 3]


def test_the_student_of_a_run_on_its_teachers_plane(clustered):
    state = run_clusters(clustered)
    assert np.allclose(state.plane.mean, widgets.RunClusters(clustered).teacher.mean(axis=0))
    assert state.choices()["colour_by"] == ("cluster", "class", "moved") and state.labels.tolist() == [0, 1, -1, 1, 0, 0]
    state.choose(colour_by="moved")
    stayed, moved, _ = explorers._clusters_json(state)["data"]
    assert moved["customdata"] == [5] and moved["marker"]["symbol"] == "x" and len(stayed["x"]) == 5
    assert run_clusters(clustered, 0).assignment.tolist() == [1] * 6
    table = purity(state)
    assert table["teacher's cluster"].tolist() == [0, 1, 2] and table["its share"].tolist() == pytest.approx([2 / 3, 1, 1])


def test_the_map_of_a_run_shows_thumbnails_and_captions_as_text(clustered, monkeypatch):
    monkeypatch.setattr(explorers, "_UMAP", "raise SystemExit('no umap here')")
    look = ClusterMap(run_clusters(clustered), live=True)
    for row, text in ((0, MARKUP), (1, HOSTILE_CAPTION)):
        look.select(row)
        assert "data:image/jpeg" in look.detail.value and look.detail.value.count("<img") == 1 and "teacher: cluster 0" in look.detail.value
        assert text not in look.detail.value and "\u202e" not in look.detail.value
    look.ask({"colour_by": "moved"})
    assert look.figure.names[:2] == ["centre of the teacher", "another centre"]
    assert look.static().png[:4] == b"\x89PNG"
    look.close()
