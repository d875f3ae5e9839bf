"""The benchmark pages run to their tables, at sizes that take seconds; what they measure is looked at where a machine is quiet."""

import json
import sys
from pathlib import Path

import forked
import ipywidgets
import jupyter_page
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from page_cells import run_page

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "nbs" / "results"
TRAINED = dict(steps=2, batch_size=8, scored_pairs=30)
SMALL = {
    "balancing": dict(row_counts=[300], exact_rows=400, many_rows=500),
    "curation": dict(most_rows=20_000, scale_down=40),
    "deploy": dict(model="", students=["auto, half"], many=2, rounds=1, threads=[1], onnx_forms=["fp32", "int8"], compiler="eager", **TRAINED),
    "gpu": {},
    "loader": dict(pictures=60, shards=2, side=64, workers=[1], batch_size=4, batches=2, repeats=1, tried=5),
    "losses": dict(sizes=[48, 64], width=16, repeats=1, threads=1),
    "methods": dict(data="scenes:96", steps=2, batch_size=16, seeds=[0], validate_pairs=32, names="contrastive, no teacher; CLIP-KD, masked (MFD); TinyCLIP, manual"),
    "mapping": dict(shares="0.2", seeds=1, steps=2, batch_size=8),
    "sentences": dict(turns=1, steps=1, depth=1, sentences=300, shards=1, lines=400, keep=20, file_lines=120, engines=[""]),
    "step": dict(steps=2, batch_size=16, repeats=1),
    "teachers": dict(names="RN50"),
    "views": dict(pairs=1, page_pairs=1, seconds=0.5, updates=20, threads=1, batch_size=16),
}
TABLES = {  # of a page: the names of its tables, and how many rows each has at these sizes
    "balancing": dict(table=2),
    "curation": dict(table=5),
    "deploy": dict(sizes=2, table=10, pruned=9, scores=6),
    "gpu": dict(table=None),
    "loader": dict(table=3, others=None),
    "losses": dict(times=3, peaks=3, ratios=3),
    "methods": dict(table=3),
    "mapping": dict(table=3),
    "sentences": dict(table=2, files=4),
    "step": dict(table=3),
    "teachers": dict(table=1),
    "views": dict(summary=2, memory=2),
}
NOT_MEASURED = {"recall", "pairs", "MB at the peak", "ms, text of 1", "ms, text of 2"}  # columns that have nothing in the rows of some ways


@pytest.fixture
def here(monkeypatch):
    "The folder of the pages; what a page changes of this process is taken back"
    threads = torch.get_num_threads()
    monkeypatch.chdir(RESULTS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(ipywidgets.Widget, "_send", ipywidgets.Widget._send)
    before = set(RESULTS.iterdir())
    with plt.rc_context():
        yield
    torch.set_num_threads(threads)
    assert set(RESULTS.iterdir()) == before, "a page leaves nothing beside it"


def check_table(table, rows):
    "As many rows as it is to have, and numbers in all columns of numbers"
    assert len(table) == rows if rows else len(table) > 0
    for name, column in table.items():
        numbers = pd.to_numeric(column, errors="coerce") if column.dtype == object else column
        if name not in NOT_MEASURED and pd.api.types.is_numeric_dtype(numbers) and numbers.notna().any():
            assert np.isfinite(numbers.astype(float)).all(), f"{name}: {column.tolist()}"
    assert "failed" not in table, table["failed"].dropna().tolist()


def test_every_benchmark_is_here():
    assert {path.stem.removeprefix("benchmark_") for path in RESULTS.glob("benchmark_*.ipynb")} == set(SMALL) == set(TABLES)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "views"])
def test_a_benchmark_fills_its_tables(name, here, monkeypatch):
    monkeypatch.setattr(sys, "executable", forked.python())  # each measurement is a process of its own
    names = run_page(RESULTS / f"benchmark_{name}.ipynb", SMALL[name])
    for table, rows in TABLES[name].items():
        check_table(names[table], rows)
    if name == "balancing":
        for found in (names["large"], names["million"]):
            assert found["recall"] == 1 and found["seconds"] > 0 and found["groups"] > 100
    if name == "deploy":
        sizes = names["scores"].loc["teacher", "MB"]
        assert sizes["ONNX int8"] < 0.5 * sizes["ONNX fp32"] and (names["scores"].loc["teacher", "R@1"] > 0.5).all()
        assert (names["pruned"]["fewer products"] > 1.5).all() and (names["table"].groupby("form")["MB on disk"].nunique() == 2).all()
    if name == "sentences":
        assert names["chosen"]["seconds"] > 0 and names["chosen"]["scenes"] > 0.3


def test_the_ablation_of_reinforced_data_fills_its_table(here):
    small = dict(data="scenes:48", second_data="scenes:48", second_steps=1, augmentations=2, steps=2, batch_size=8, validate_pairs=40)
    names = run_page(RESULTS / "ablation_reinforced.ipynb", small | dict(seeds=[0, 1]))
    check_table(names["table"], 11)
    assert names["each"].shape == (22, 2) and list(names["table"].index) == list(names["rows"])
    stored = {folder: json.loads((names["home"] / folder / "reinforced.json").read_text()) for folder in names["stored"]}
    assert stored["both, crops"]["augmentations"] == 2 and stored["first"]["augmentations"] == 0
    assert stored["both"]["teacher_widths"] == "64,64" and stored["second"]["weights"] != stored["first"]["weights"]
    configs = {name: json.loads((names["home"] / f"runs/{number}-0/config.json").read_text()) for number, name in enumerate(names["rows"])}
    assert len({config["parameters"]["start_from"] for config in configs.values()}) == 1, "all begin as the same student"
    assert len({(config["parameters"]["steps"], config["parameters"]["batch_size"]) for config in configs.values()}) == 1
    taught = {name: "affinity_mimicking" in config["objective"] for name, config in configs.items()}
    assert [name for name, is_taught in taught.items() if not is_taught] == ["nothing stored", "all but features"]
    two = {name for name, config in configs.items() if config["parameters"].get("both_captions")}
    assert two == {name for name in configs if name.startswith("all") or name.endswith("synthetic captions")} - {"all but synthetic captions"}


@pytest.mark.skipif(not jupyter_page.find_chromium(), reason="needs Chromium")
def test_the_benchmark_of_views_fills_its_tables(here):
    names = run_page(RESULTS / "benchmark_views.ipynb", SMALL["views"])
    for table, rows in TABLES["views"].items():
        check_table(names[table], rows)
    assert len(names["without"]) == len(names["within"]) == 2
    assert 0 < np.median(names["took"][20:]) < 1000 and 0 < np.median(names["sent"][20:]) < 300_000
