"""The static figures of the library on small data made by formulas, and how two pictures of one are compared.

    python tests/figures.py            writes tests/golden/figures/NAME.png anew, all of them
    python tests/figures.py NAME...    these alone

A stored picture is what a person has looked at and found right. Look at what changed before you commit it.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import matplotlib.style
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import RendererAgg
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import maximum_filter, minimum_filter

from vlkd_lab.blip_terms import blip_terms
from vlkd_lab.data import Pairs, inspect_shards, load_pairs, show_batch, thumbnail
from vlkd_lab.features import Batch, Features
from vlkd_lab.gates import Gates, budget, gates_from_arrays
from vlkd_lab.models import TowerShape
from vlkd_lab.runs import Run, RunWriter, Snapshots, write_snapshot
from vlkd_lab.samples import make_sample, show_scenes, write_shards
from vlkd_lab.widgets import (
    LINE_COLOURS,
    CrossAttention,
    GateMatrices,
    LossCurves,
    ProbeMatrices,
    StaticFigure,
    StudentMap,
    Watched,
    attach,
    curve,
    curve_style,
    heatmaps_json,
    overlay,
    panel_layout,
    plain_layout,
)

STORED = Path(__file__).parent / "golden" / "figures"
FIGURES: dict[str, Callable[[Path], bytes]] = {}  # name -> its PNG, drawn with an empty folder at hand


def figure(draw: Callable) -> Callable:
    "Put a function in the table under its own name"
    FIGURES[draw.__name__] = draw
    return draw


def png_of(drawn) -> bytes:
    "A matplotlib figure as PNG"
    drawn.savefig(buffer := io.BytesIO(), format="png", dpi=90)
    return buffer.getvalue()


def png_bytes(image: Image.Image) -> bytes:
    "A picture as PNG"
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def shown(static) -> bytes:
    "The picture that a frontend without Plotly shows of a static figure: an image, or one inside HTML"
    bundle = static._repr_mimebundle_()
    if "image/png" in bundle:
        return base64.b64decode(bundle["image/png"])
    start = bundle["text/html"].index("data:image/png;base64,") + len("data:image/png;base64,")
    return base64.b64decode(bundle["text/html"][start : bundle["text/html"].index('"', start)])


def waves(*shape: int, seed: float = 1.0) -> np.ndarray:
    "Numbers from -1 to 1 without an order that one could see, the same on every machine"
    count = np.arange(1, np.prod(shape) + 1)
    return np.sin(seed * 12.9898 * count + 0.37 * count**2).reshape(shape)


# ---- runs, written by hand ----------------------------------------------------------------------------------------

MODEL = dict(
    embed_dim=16,
    vision_cfg=dict(layers=3, width=32, head_width=8, patch_size=16, image_size=32),
    text_cfg=dict(context_length=16, vocab_size=64, width=16, heads=2, layers=2),
)
SHAPES = {"image": TowerShape(32, 8, (4, 4, 4), (128, 128, 128)), "text": TowerShape(16, 8, (2, 2), (64, 64))}


def write_run(folder: Path, factor: float = 1.0, **parameters) -> Run:
    "Two stages with a budget and a baseline; the directions of retrieval are far apart"
    parameters = {"batch_size": 64, "target_sparsity": 0.75, "teacher": "t", "gate_kinds": "hidden,heads,neurons", **parameters}
    config = {"method": "TinyCLIP", "objective": {"affinity_mimicking": 1.0, "feature_mimicking": 300.0}, "parameters": parameters}
    config |= {"stages": {"stage-1": "student", "stage-2": "student", "scratch-2": "baseline"}, "model": MODEL}
    config["towers"] = {tower: asdict(shape) for tower, shape in SHAPES.items()}
    with RunWriter(folder) as writer:
        (folder / "config.json").write_text(json.dumps(config))
        for step in range(1, 181):
            stage = "stage-1" if step <= 60 else "stage-2" if step <= 120 else "scratch-2"
            line = {"stage": stage, "step": step, "affinity_mimicking": 4 * factor / step**0.4, "feature_mimicking": 0.02 / step**0.9}
            line["total"] = 6 * factor / step**0.5
            if stage != "scratch-2":
                line |= {"expected_sparsity": factor * step / 200, "target_sparsity": min(step / 80, 0.75)}
            else:
                line = {key: value for key, value in line.items() if key != "feature_mimicking"}
            writer.log(line)
            if step % 15 == 0:
                high = 0.9 if stage != "scratch-2" else 0.3
                scores = {"image_to_text_r1": high * factor * (1 - 20 / (step + 20)), "text_to_image_r1": 0.2 * step / 180}
                writer.log({"event": "validation", "stage": stage, "step": step, **scores})
        writer.log({"event": "control", "stage": "stage-1", "step": 30, "weights": {"feature_mimicking": 60.0}})
        for step, share in ((40, 0.8), (80, 0.5), (110, 0.65)):
            pulls = {"affinity_mimicking": share, "feature_mimicking": 1 - share}
            writer.log({"event": "gradient_share", "stage": "stage-2", "step": step, "shares": pulls})
    return Run(folder)


def write_probe(run: Run, rows: int = 12) -> dict[str, torch.Tensor]:  # what a snapshot has of its student
    "A probe whose pairs lie beside a ramp that tells images from texts, and a student that is worse where images come late"
    ramp = np.linspace(-0.3, 0.3, rows)[None, :] * np.linspace(0.2, 1, rows)[:, None]
    teacher = 0.5 * np.eye(rows) + ramp + 0.08 * waves(rows, rows)
    student = teacher * np.linspace(1, 0.3, rows)[:, None] + 0.05 * waves(rows, rows, seed=2.0)
    write_snapshot(run.folder / "probe.safetensors", {"teacher": torch.tensor(teacher).float(), "teacher_scale": torch.tensor([12.0])}, {})
    (run.folder / "probe.json").write_text(json.dumps({"captions": [f"caption {k}" for k in range(rows)]}))
    arrays = {"student": torch.tensor(student).float(), "student_scale": torch.tensor([12.0])}
    Snapshots(run).take(lambda: arrays, stage="stage-2", phase="distil", step=120)
    return arrays


def gate_values(openness: float) -> dict[str, torch.Tensor]:
    "Gates of which a later layer has fewer open ones, and whose units have no order"
    arrays = {}
    for tower, shape in SHAPES.items():
        for kind, of_layers in (("hidden", (shape.width,)), ("heads", shape.heads), ("neurons", shape.neurons)):
            parts = [openness - 2 * layer + 5 * waves(size, seed=1 + layer) for layer, size in enumerate(of_layers)]
            arrays[f"gates/{tower}/{kind}"] = torch.tensor(np.concatenate(parts)).float()
    return arrays


def write_gates(run: Run, **more: torch.Tensor) -> None:
    "Two kept snapshots of gates that close, and of what else there is"
    for step, openness in ((0, 6.0), (60, 1.0)):
        labels = dict(stage="stage-1", phase="gates", step=step, phase_step=step)
        Snapshots(run).take(lambda openness=openness: gate_values(openness) | more, keep=f"stage-1-gates-{step:08d}", **labels)


def clustered_features(count: int, noise: float, clusters: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Features around centres on an ellipse, the centres, and where each feature belongs; later clusters are smaller"
    angles = 2 * np.pi * np.arange(clusters) / clusters
    centers = np.stack([3 * np.cos(angles), np.sin(angles), *[0 * angles] * 3], axis=1)
    members = (clusters * (np.arange(count) / count) ** 1.6).astype(int)
    return centers[members] + noise * waves(count, 5, seed=3.0), centers, members


def write_clusters(run: Run, clusters: int = 6) -> None:
    "A run with clusters; its student has moved every fifth image to the next centre"
    teacher, centers, members = clustered_features(90, 0.25, clusters)
    arrays = dict(centers=torch.tensor(centers).float(), teacher=torch.tensor(teacher).half(), assignment=torch.tensor(members).int())
    arrays["sizes"] = torch.arange(clusters) * 10 + 1
    write_snapshot(run.folder / "clusters.safetensors", arrays, {})
    about = dict(captions=["a caption"] * 90, keys=["k"] * 90, labels=None, pictures=[thumbnail(Image.new("RGB", (4, 4)))] * 90)
    (run.folder / "clusters.json").write_text(json.dumps(about))
    moved = np.where(np.arange(90) % 5 == 0, (members + 1) % clusters, members)
    student = centers[moved] + 0.35 * waves(90, 5, seed=5.0)
    arrays = {"clusters_student": torch.tensor(student).half(), "clusters_assignment": torch.tensor(moved).int()}
    Snapshots(run).take(lambda: arrays, keep="student-7", stage="student", phase="distil", step=7)


def write_blip_run(folder: Path) -> Run:
    "A run that distils a BLIP, with a probe that has cross-attention"
    terms = [term.name for term in blip_terms()]
    config = {"method": "Dlip", "terms": terms, "objective": {name: float(name != "similarities") for name in terms}, "tasks": []}
    config |= {"stages": {"student": "student", "scratch": "baseline"}, "parameters": {"batch_size": 8, "teacher": "t"}}
    with RunWriter(folder) as writer:
        (folder / "config.json").write_text(json.dumps(config))
        for k, stage in enumerate(("student", "scratch")):
            for step in range(40 * k + 1, 40 * k + 41):
                values = {name: (0.02 * 1.5**place) / step**0.5 for place, name in enumerate(terms)}
                writer.log({"stage": stage, "step": step, **values, "total": 1.0, "seconds": 0.5})
                if step % 10 == 0:
                    scores = {"image_to_text_r1": 0.8, "text_to_image_r1": step / 400, "caption_loss": 20 / (step + 10)}
                    writer.log({"event": "validation", "stage": stage, "step": step, **scores, "answer_accuracy": 0.2 + step / 200})
        shares = {name: (place + 1) / 136 for place, name in enumerate(terms)}
        writer.log({"event": "gradient_share", "stage": "student", "step": 40, "shares": shares})
        words = ["[ENC]", "a", "small", "red", "star", "[SEP]"]
        image = make_sample(3, size=64).image
        probe = {"captions": ["a small red star"], "keys": ["k"], "labels": None, "pictures": [thumbnail(image, 64)], "words": [words]}
        (folder / "probe.json").write_text(json.dumps(probe))
        maps = {f"teacher_cross_{module}": attention(4, len(words), row) for row, module in enumerate(("fusion", "decoder"))}
        write_snapshot(folder / "probe.safetensors", maps, {})
        maps = {f"student_cross_{module}": attention(2, len(words), row) for row, module in enumerate(("fusion", "decoder"))}
        Snapshots(writer).take(lambda: maps, keep="student-40", stage="student", phase="distil", step=40)
    return Run(folder)


def attention(grid: int, tokens: int, row: int) -> torch.Tensor:
    "(1, L, grid²) shares: each token looks at one patch, the next one at the patch to the right"
    shares = np.full((1, tokens, grid, grid), 0.2 / grid**2)
    for token in range(tokens):
        shares[0, token, min(row, grid - 1), token % grid] += 0.8
    return torch.tensor(shares.reshape(1, tokens, -1)).half()


def looked_at(run: Run) -> Watched:
    "What its views know of a run"
    watched = Watched(Run(run.folder))
    watched.look()
    return watched


# ---- the bench ----------------------------------------------------------------------------------------------------


@figure
def lines_points_marks(folder):
    "What figures are drawn with: lines, points on a scale, a logarithmic axis, marks, notes, a legend"
    x = np.arange(1, 41)
    lines = [curve(x, 10 ** (x / 13), "rises", line=curve_style(LINE_COLOURS[0]))]
    lines.append(curve(x, np.where(abs(x - 20) < 3, np.nan, 300 / x), "falls, with a gap", line=curve_style(LINE_COLOURS[5], "dash")))
    marker = dict(size=9, color=x.tolist(), colorscale="Viridis", cmin=0, cmax=40, colorbar={"title": {"text": "number"}})
    lines.append(curve(x, 3 * x + 20 * waves(40), "points", 2, mode="markers", marker=marker, showlegend=False))
    crosses = dict(size=8, color=LINE_COLOURS[5], symbol="x")
    lines.append(curve(x[::8], 140 - 3 * x[::8], "crosses", 2, mode="markers", marker=crosses))
    layout = plain_layout(700, 260) | panel_layout(1, "step", "value", [0, 0.4]) | panel_layout(2, "x", "y", [0.52, 0.9])
    layout["yaxis1"]["type"] = "log"
    layout["shapes"] = [dict(type="line", x0=12, x1=12, y0=0, y1=1, xref="x", yref="y domain", line={"color": "#D55E00", "dash": "dot"})]
    layout["annotations"] = [dict(x=12, y=1, xref="x", yref="y domain", text="here", showarrow=False, font={"color": "#D55E00"})]
    return shown(StaticFigure({"data": lines, "layout": layout}))


@figure
def matrices(folder):
    "Matrices side by side in two rows: a corner, a row, a column, and a difference with a hole"
    corner, row, column = np.zeros((3, 6, 9))
    corner[:2, :3], row[1], column[:, 2] = 1, 1, 1
    difference = np.linspace(-1, 1, 54).reshape(6, 9)
    difference[4, 6] = np.nan
    drawn = {"corner": (corner, 0, 1), "second row": (row, 0, 1), "third column": (column, 0, 2), "difference": (difference, -1, 1)}
    return shown(StaticFigure(heatmaps_json(drawn, "what it means", width=640, height=180)))


@figure
def bench_curves(folder):
    return LossCurves().png(looked_at(write_run(folder / "run")))


@figure
def bench_modules(folder):
    return LossCurves().png(looked_at(write_blip_run(folder / "run")))


@figure
def bench_cosines(folder):
    write_probe(run := write_run(folder / "run"))
    return ProbeMatrices().png(looked_at(run))


@figure
def bench_probabilities(folder):
    write_probe(run := write_run(folder / "run"))
    watched = looked_at(run)
    watched.choice.measure = "image_to_text"
    return ProbeMatrices().png(watched)


@figure
def bench_gates(folder):
    write_gates(run := write_run(folder / "run"))
    return GateMatrices().png(looked_at(run))


@figure
def bench_clusters(folder):
    write_clusters(run := Run(folder / "run"))
    return StudentMap().png(looked_at(run))


@figure
def bench_many_clusters(folder):
    write_clusters(run := Run(folder / "run"), clusters=30)
    return StudentMap().png(looked_at(run))


@figure
def bench_attention(folder):
    return CrossAttention(write_blip_run(folder / "run").folder)._repr_png_()


@figure
def bench(folder):
    "All parts of a run, one below the other"
    run = write_run(folder / "run")
    write_gates(run, **write_probe(run))
    return shown(attach(run.folder, live=False).static())


@figure
def several_runs(folder):
    for name, factor in (("one", 1.0), ("other", 0.6)):
        write_run(folder / name, factor)
    return shown(overlay([folder / "one", folder / "other"], live=False).static())


# ---- explorers ----------------------------------------------------------------------------------------------------


@figure
def explored_affinities(folder):
    "Ordered by disagreement: the pairs about which the models differ most are first"
    from vlkd_lab.explorers import Affinities, AffinityExplorer

    text = torch.nn.functional.normalize(torch.tensor(waves(10, 5)).float(), dim=1)
    image = torch.nn.functional.normalize(text + 0.2 * torch.tensor(waves(10, 5, seed=7.0)).float(), dim=1)
    blurred = torch.nn.functional.normalize(image + torch.linspace(0, 3, 10)[:, None] * text.roll(1, 0), dim=1)
    scale = torch.tensor(8.0)
    captions = tuple(f"caption {k}" for k in range(10))
    pairs = Pairs(tuple(np.zeros((8, 8, 3), np.uint8) for _ in captions), captions, (None,) * 10, captions)
    explorer = AffinityExplorer(Affinities(Features(image, text, scale), Features(blurred, text, scale), captions), pairs, live=False)
    explorer.affinities.order("disagreement")
    return shown(explorer.static())


@figure
def explored_gates(folder):
    from vlkd_lab.explorers import GateExplorer

    write_gates(run := write_run(folder / "run"))
    return shown(GateExplorer(run, live=False).static())


def cluster_map(**more) -> bytes:
    "A map of clusters without UMAP, which differs from machine to machine"
    from vlkd_lab.explorers import ClusterMap, ClusterState

    features, _, members = clustered_features(90, 0.25)
    choice = more.pop("colour_by", "cluster")
    state = ClusterState(features, more.pop("assignment", members), **more)
    state.umap = SimpleNamespace(ready=lambda: False, wait=lambda seconds: False, problem="", coordinates=None)
    state.choose(colour_by=choice)
    return shown(ClusterMap(state, live=False).static())


@figure
def explored_clusters(folder):
    return cluster_map()


@figure
def explored_moves(folder):
    members = clustered_features(90, 0.25)[2]
    moved = np.where(np.arange(90) % 5 == 0, (members + 1) % 6, members)
    return cluster_map(assignment=moved, wanted=members, colour_by="moved")


@figure
def explored_many_clusters(folder):
    return cluster_map(assignment=clustered_features(90, 0.25)[2] * 3 + np.arange(90) % 3)


@figure
def explored_balance(folder):
    from vlkd_lab.balance_explorer import BalanceExplorer
    from vlkd_lab.balance_report import StoreRows
    from vlkd_lab.balancing import link, unit_rows

    write_shards(folder / "scenes", 60, per_shard=60, size=16)
    rows, _, _ = clustered_features(60, 0.15)
    rows = unit_rows((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float32))
    report = inspect_shards(folder / "scenes")

    class Given(StoreRows):
        "Rows that no store holds"

        def take(self, places):
            return rows[places]

        def keys(self, places):
            return [load_pairs(report).keys[place] for place in places]

    store = SimpleNamespace(reports={shard.name: shard for shard in report.shards})
    explorer = BalanceExplorer(link(rows, most=0.5), Given(store, rows), 0.06, live=False)
    return shown(explorer.static())


# ---- tables and their pictures: evaluation, gates, plans, data ----------------------------------------------------


@figure
def losses(folder):
    from vlkd_lab.evaluation import plot_losses

    return png_of(plot_losses(write_run(folder / "run")))


@figure
def losses_of_a_blip(folder):
    from vlkd_lab.evaluation import plot_losses

    return png_of(plot_losses(write_blip_run(folder / "run")))


@figure
def validation(folder):
    from vlkd_lab.evaluation import plot_validation

    return png_of(plot_validation(write_run(folder / "run"), teacher=0.7))


@figure
def tradeoff(folder):
    from vlkd_lab.evaluation import plot_tradeoff

    rows = {
        "teacher": dict(parameters=9e6, zero_shot=0.8, image_to_text_r1=0.9, text_to_image_r1=0.5),
        "stage-1": dict(parameters=5e6, zero_shot=0.7, image_to_text_r1=0.8, text_to_image_r1=0.2),
        "stage-2": dict(parameters=3e6, zero_shot=0.5, image_to_text_r1=0.6, text_to_image_r1=0.2),
        "scratch-2": dict(parameters=3e6, zero_shot=0.3, image_to_text_r1=0.3, text_to_image_r1=0.1),
    }
    table = pd.DataFrame(rows).T
    table.attrs["baselines"] = ["scratch-2"]
    return png_of(plot_tradeoff(table))


@figure
def shapes(folder):
    from vlkd_lab.evaluation import plot_shapes
    from vlkd_lab.models import new_model

    slim = {"image": TowerShape(24, 8, (3, 2, 1), (100, 60, 30)), "text": TowerShape(16, 8, (2, 1), (64, 20))}
    return png_of(plot_shapes({"teacher": new_model(MODEL), "student": new_model(MODEL, towers=slim)}))


@figure
def progress_of_a_blip(folder):
    from vlkd_lab.methods.blip_training import plot_progress

    levels = {"image_to_text_r1": 0.9, "text_to_image_r1": 0.5, "caption_loss": 0.3, "answer_accuracy": 0.8}
    run = write_blip_run(folder / "run")
    job = SimpleNamespace(run=run, teaches=True, teacher=None, validation=lambda vlm, objective: levels, baselines=["scratch"])
    return png_of(plot_progress(job))


@figure
def gates(folder):
    from vlkd_lab.gates import gate_plot

    values = {name: array.numpy() for name, array in gate_values(2.0).items()}
    return png_of(gate_plot(gates_from_arrays(Gates(SHAPES, budget(SHAPES)), values)))


@figure
def plan(folder):
    from vlkd_lab.inheritance import front_step, plan_manual
    from vlkd_lab.models import new_model

    deep = MODEL | dict(vision_cfg=MODEL["vision_cfg"] | dict(layers=6), text_cfg=MODEL["text_cfg"] | dict(layers=4))
    small = MODEL | dict(
        vision_cfg=dict(layers=3, width=24, head_width=8, patch_size=16, image_size=32),
        text_cfg=dict(context_length=16, vocab_size=64, width=8, heads=1, layers=2),
    )
    states = [new_model(config).model.state_dict() for config in (deep, small)]
    return png_of(plan_manual(states[0], states[1], 8, front_step).plot())


@figure
def transfer(folder):
    from vlkd_lab.transfer import Transfer, plot_transfer

    names = ["teacher", "student", "scratch"]
    sets = ["shape", "colour", "size", "mean"]
    zero_shot = pd.DataFrame([[0.9, 0.8, 0.7, 0.8], [0.7, 0.3, 0.6, 0.53], [0.2, 0.1, 0.4, 0.23]], names, sets)
    probes = pd.DataFrame([[0.95, 0.9, 0.85, 0.9], [0.8, 0.7, 0.5, 0.67], [0.5, 0.6, 0.3, 0.47]], names, sets)
    shifts = ["unshifted", "noise", "blur", "turned", "mean"]
    shifted = pd.DataFrame([[0.8, 0.7, 0.5, 0.4, 0.53], [0.53, 0.5, 0.2, 0.1, 0.27], [0.23, 0.2, 0.1, 0.05, 0.12]], names, shifts)
    return png_of(plot_transfer(Transfer(zero_shot, probes, shifted)))


@figure
def balance(folder):
    from vlkd_lab.balancing import link, plot_balance

    rows = clustered_features(120, 0.15)[0]
    return png_of(plot_balance(link((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), 0.5), 0.06))


@figure
def sentences_kept(folder):
    from vlkd_lab.corpus import REASONS, Selection, plot_selection

    scores = np.linspace(0.45, 0.25, 80).astype(np.float32)
    histogram = np.zeros(400, dtype=np.int64)
    histogram[225:300] = (30 * np.exp(-((np.arange(225, 300) - 245) ** 2) / 200)).astype(int)
    counts = {"read": 900, "kept": 80, **{reason: 30 + 90 * k for k, reason in enumerate(REASONS)}}
    zeros = np.zeros(80, dtype=np.int64)
    dropped = {reason: () for reason in REASONS}
    return png_of(plot_selection(Selection(("s",) * 80, scores, zeros, zeros, zeros, ("a",), 80, 0.2, 2.0, counts, dropped, histogram)))


@figure
def methods_side_by_side(folder):
    from vlkd_lab.verdicts import few_colours, plot_overall

    rows = []
    for k, method in enumerate(("no teacher", "TinyCLIP", "CLIP-CID", "DIME-FM", "DLIP, two towers")):
        for start, gain in (("from nothing", 0), ("inherited", 0.25)):
            for seed in range(2):
                score = 0.1 + 0.08 * k + gain + 0.02 * seed
                rows.append({"method": method, "start": start, "seed": seed, "R@1": score, "zero-shot": 0.95 - score})
    teacher = {"students": {"student": {"scores": {"r1": 0.8, "zero_shot": 0.9}}}}
    return few_colours(plot_overall(pd.DataFrame(rows), teacher), dpi=80).data


@figure
def validation_over_seeds(folder):
    from vlkd_lab.verdicts import few_colours, plot_curves

    records = {}
    for trial, height in (("a", 0.7), ("b", 0.4)):
        records[trial] = {}
        for seed in range(3):
            points = [[step, height * (1 + 0.2 * seed) * (1 - 50 / (step + 50))] for step in range(0, 401, 40)]
            records[trial][seed] = {"students": {"student": {"curve": points}}}
    return few_colours(plot_curves(records, {"with a teacher": "a", "alone": "b", "not run": "c"}), dpi=90).data


@figure
def scenes(folder):
    "Seven pictures in two rows, each with another corner in another colour"
    samples = []
    for k in range(7):
        image = Image.new("RGB", (32, 32), LINE_COLOURS[k])
        image.paste("white", (16 * (k % 2), 8 * (k % 3), 16 * (k % 2) + 16, 8 * (k % 3) + 16))
        samples.append(replace(make_sample(k, size=16), image=image))
    return png_of(show_scenes(samples, columns=4))


@figure
def batch(folder):
    "Normalised pictures: a red, a green and a blue one, each with a bright corner, and a ramp"
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = torch.zeros(4, 3, 16, 16)
    for k in range(3):
        images[k, k] = 0.7
        images[k, :, :5, :5] = 1.0
    images[3] = torch.linspace(0, 1, 16)[None, :, None]
    images = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    of_pictures = Batch(images, torch.zeros(4, 4).long(), captions=("red", "green", "blue", "a ramp from above to below"), labels=(0, None, 2, 3))
    return png_of(show_batch(of_pictures, mean, std, count=4))


# ---- what is drawn, and whether two pictures show the same --------------------------------------------------------

NEAR = 3  # pixels by which edges may lie apart
FAR = 12  # pixels by which a tile as a whole may lie apart, where a legend or an axis makes room for wider letters
TILE = 48  # pixels a side; the worst tile decides, since a wrong curve is a small part of a picture
COLOUR = 16  # of 255; nearer colours are the same
LIMIT = 0.027  # of a tile. Measured: up to 0.020 for other letters, thicker lines or matplotlib 3.10; 0.035 and more for a fault
WORDS_FAR = 24  # pixels by which a word may lie apart


@dataclass(frozen=True)
class Drawing:
    "A picture, and the words in it: other versions of a library draw letters otherwise, so words are compared as words"

    png: bytes
    words: tuple[tuple, ...]  # (text, left, top, right, bottom) in pixels

    def pixels(self) -> np.ndarray:  # (H, W, 3) uint8, as on a white page
        drawn = Image.open(io.BytesIO(self.png)).convert("RGBA")
        page = Image.new("RGBA", drawn.size, "white")
        return np.asarray(Image.alpha_composite(page, drawn).convert("RGB"))

    def save(self, path: Path) -> None:
        "As a PNG with a palette, which takes a third of the room; the words stand in its text"
        image = Image.fromarray(self.pixels()).quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        about = PngInfo()
        about.add_text("words", json.dumps([[text, *map(round, box)] for text, *box in self.words]), zip=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "PNG", optimize=True, pnginfo=about)


def stored(name: str) -> Drawing:
    "A figure's picture as it was found right"
    png = (STORED / f"{name}.png").read_bytes()
    return Drawing(png, tuple(map(tuple, json.loads(Image.open(io.BytesIO(png)).text["words"]))))


def drawn(name: str, **style: Any) -> Drawing:
    "A figure drawn now, whatever a matplotlibrc says; `style`: what matplotlib's defaults are to be instead"
    with tempfile.TemporaryDirectory() as folder, matplotlib.style.context(["default", style]), noted_words() as words:
        png = FIGURES[name](Path(folder))
    return Drawing(png, tuple(words))


@contextmanager
def noted_words():
    "The words that matplotlib writes meanwhile; several pages are several pictures, one below the other"
    words = []
    pages = []
    draw_text = RendererAgg.draw_text

    def noting(self, gc, x, y, text, prop, angle, ismath=False, mtext=None):
        if self not in pages:
            pages.append(self)
        top = y + sum(page.height for page in pages[: pages.index(self)])
        width, height, below = self.get_text_width_height_descent(text, prop, ismath)
        box = (x, top - height + below, x + width, top + below)
        if angle:
            box = (x - height + below, top - width, x + below, top)
        words.append((re.sub(r"\$|\\mathdefault|[{}]", "", text), *map(float, box)))
        return draw_text(self, gc, x, y, text, prop, angle, ismath, mtext)

    with mock.patch.object(RendererAgg, "draw_text", noting):
        yield words


def differences(one: Drawing, other: Drawing) -> list[str]:  # empty: they show the same
    "What differs between two drawings of a figure, in words"
    sizes = [drawing.pixels().shape[:2] for drawing in (one, other)]
    if max(abs(a - b) for a, b in zip(*sizes, strict=True)) > 2:
        return [f"it was {sizes[0][1]} × {sizes[0][0]} pixels and is {sizes[1][1]} × {sizes[1][0]}"]
    apart, place = worst_tile(one, other)
    reasons = words_apart(one, other)
    if apart > LIMIT:
        reasons.append(f"the {TILE} pixels right of and below {place} differ by {apart:.3f}, more than {LIMIT}")
    return reasons


def words_apart(one: Drawing, other: Drawing) -> list[str]:
    "Words that are only in one drawing, or elsewhere"
    counts = [Counter(text for text, *_ in drawing.words) for drawing in (one, other)]
    reasons = []
    for gone, verb in ((counts[0] - counts[1], "gone"), (counts[1] - counts[0], "new")):
        if gone:
            reasons.append(f"words that are {verb}: {', '.join(map(repr, gone.elements()))}")
    for text, *box in one.words:
        moves = [np.abs(middle(box) - middle(others)).max() for same, *others in other.words if same == text]
        if moves and min(moves) > WORDS_FAR:
            reasons.append(f"{text!r} is {min(moves):.0f} pixels away from its place")
    return reasons


def middle(box: Sequence[float]) -> np.ndarray:
    "Of a box left, top, right, bottom"
    return np.array([box[0] + box[2], box[1] + box[3]]) / 2


def worst_tile(one: Drawing, other: Drawing) -> tuple[float, tuple[int, int]]:  # 0 to 1, its left and top in pixels
    "The first tile found that differs by more than LIMIT, or else the one that differs most, when each may lie a little apart"
    if np.array_equal(one.pixels(), other.pixels()):
        return 0.0, (0, 0)
    sides = [_Side(drawing, np.maximum(one.pixels().shape, other.pixels().shape)) for drawing in (one, other)]
    whole = tuple(slice(0, size) for size in sides[0].words.shape)
    differing = _apart(*sides, whole, whole)
    tiles = {}
    for top in range(FAR, differing.shape[0] - TILE - FAR + 1, TILE // 2):
        for left in range(FAR, differing.shape[1] - TILE - FAR + 1, TILE // 2):
            tiles[top, left] = differing[top : top + TILE, left : left + TILE].mean()
    worst = (0.0, (0, 0))
    for (top, left), apart in sorted(tiles.items(), key=lambda tile: -tile[1]):
        here = np.s_[top : top + TILE, left : left + TILE]
        for there in _moved(top, left):
            if apart <= LIMIT / 2:
                break
            apart = min(apart, _apart(*sides, here, there).mean())
        worst = max(worst, (float(apart), (left - FAR, top - FAR)))
        if apart > LIMIT:
            break
    return worst


def _moved(top: int, left: int) -> Iterator[tuple[slice, slice]]:
    "The places in which a tile may be found"
    steps = range(-FAR, FAR + 1, NEAR)
    for down, right in product(steps, steps):
        yield np.s_[top + down : top + down + TILE, left + right : left + right + TILE]


class _Side:
    "A drawing with a white border, the colours that its pixels have near by, and where its words are"

    def __init__(self, drawing: Drawing, shape: Sequence[int]):
        pixels = drawing.pixels()
        border = [(FAR, FAR + TILE + size - have) for size, have in zip(shape[:2], pixels.shape, strict=False)]
        self.pixels = np.pad(pixels, [*border, (0, 0)], constant_values=255).astype(np.int16)
        near = (2 * NEAR + 1, 2 * NEAR + 1, 1)
        self.low = minimum_filter(self.pixels, near)
        self.high = maximum_filter(self.pixels, near)
        self.words = np.zeros(self.pixels.shape[:2], dtype=bool)
        for _, left, top, right, bottom in drawing.words:
            rows = slice(max(0, int(top) + FAR - NEAR - 1), int(bottom) + FAR + NEAR + 2)
            self.words[rows, max(0, int(left) + FAR - NEAR - 1) : int(right) + FAR + NEAR + 2] = True


def _apart(one: _Side, other: _Side, here: tuple[slice, slice], there: tuple[slice, slice]) -> np.ndarray:  # 0 to 1
    "How far each pixel of a place is from all the colours near by in the other drawing; words are left out"
    beyond = np.maximum(_beyond(one.pixels[here], other.low[there], other.high[there]), _beyond(other.pixels[there], one.low[here], one.high[here]))
    return np.where(one.words[here] | other.words[there], 0, np.clip(beyond - COLOUR, 0, 128) / 128)


def _beyond(pixels: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    "By how much the colours (H, W, 3) lie outside of an interval, at most of the three channels"
    return np.maximum(low - pixels, pixels - high).clip(0).max(axis=-1)


def side_by_side(one: Drawing, other: Drawing) -> Image.Image:
    "Two drawings and their difference, one below the other: red is only in the first, blue only in the second"
    pixels = [drawing.pixels().astype(int) for drawing in (one, other)]
    height, width = (max(sizes) for sizes in zip(*(each.shape[:2] for each in pixels), strict=True))
    whole = np.full((3 * height, width, 3), 255)
    darkness = np.zeros((2, height, width))
    for k, each in enumerate(pixels):
        whole[k * height : k * height + each.shape[0], : each.shape[1]] = each
        darkness[k, : each.shape[0], : each.shape[1]] = 255 - each.mean(axis=2)
    whole[2 * height :] = 255 - np.stack([darkness[1], darkness.max(axis=0), darkness[0]], axis=-1)
    return Image.fromarray(whole.astype(np.uint8))


def main(names: list[str]) -> None:
    "Write the stored pictures, and say what differs from those before"
    for name in names or FIGURES:
        new = drawn(name)
        changes = differences(stored(name), new) if (STORED / f"{name}.png").exists() else ["it is new"]
        new.save(STORED / f"{name}.png")
        print(f"{name:24s} {(STORED / f'{name}.png').stat().st_size:7,} bytes  {'; '.join(changes)}")
    if not names:
        for path in STORED.glob("*.png"):
            if path.stem not in FIGURES:
                path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
