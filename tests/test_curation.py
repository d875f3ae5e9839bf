"""Curation out of core: the answers of one process that holds everything, whoever computes them and whatever dies on the way."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vlkd_lab import curation, project
from vlkd_lab.balance_report import about_recall
from vlkd_lab.balancing import balance_at, cluster, link, load_linkage
from vlkd_lab.curation import cells as C
from vlkd_lab.curation import clusters as K
from vlkd_lab.curation import duplicates as D
from vlkd_lab.curation import rows as R
from vlkd_lab.data import inspect_shards, write_index
from vlkd_lab.engines import Engine, job_progress
from vlkd_lab.models import load_model
from vlkd_lab.project import alone_in
from vlkd_lab.stores import FeatureStore, fill, load, store_key

THRESHOLDS = (0.01, 0.05, 0.2, 0.4, 0.6)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def hard():
    "Near copies, a chain through many cells, a giant group, equal rows, rows alone; in half precision, as stores have them"
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((40, 24))[rng.integers(40, size=600)] + 0.5 * rng.standard_normal((600, 24))
    copies = topics[:300] + 0.08 * rng.standard_normal((300, 24))
    angle = np.linspace(0, 3, 150)[:, None]
    chain = np.cos(angle) * np.eye(24)[0] + np.sin(angle) * np.eye(24)[1]
    giant = rng.standard_normal(24) + 0.02 * rng.standard_normal((200, 24))
    rows = unit(np.concatenate([topics, copies, chain, giant, np.repeat(topics[:10], 15, axis=0)])).astype(np.float16)
    return rows[rng.permutation(len(rows))]


@pytest.fixture(scope="module")
def whole(hard):
    "The linkage of all pairs, in memory"
    return link(R.unit_length(hard), most=0.6)


def small_plan(monkeypatch, piece=113, region=60):
    "Pieces and regions so small that everything crosses borders"
    plan = D._plan
    monkeypatch.setattr(D, "_plan", lambda *given, **more: replace(plan(*given, **more), piece=piece, region=region))


def same_groups(a, b):
    return all(np.array_equal(a.groups(t), b.groups(t)) for t in THRESHOLDS)


OPTIONS = dict(most=0.6, per_cell=20, probes=64, progress=False)


@pytest.mark.parametrize(("piece", "region"), [(1 << 17, 1 << 19), (113, 60), (64, 5), (1399, 100)])
def test_every_pair_is_found_whatever_the_pieces_and_regions(hard, whole, tmp_path, monkeypatch, piece, region):
    small_plan(monkeypatch, piece, region)
    found = curation.near_duplicates(hard, folder=tmp_path, **OPTIONS)
    assert same_groups(found, whole) and found.recall == 1
    assert len(found.edges) == len(whole.edges) and (found.edges[:, 0] < found.edges[:, 1]).all()


class Backwards(Engine):
    "Tasks in another order"

    def _run(self, function, tasks):
        for number in sorted(tasks, key=lambda k: (k * 7919) % 101, reverse=True):
            yield number, function(tasks[number])


def test_the_order_of_the_tasks_changes_nothing(hard, whole, tmp_path, monkeypatch):
    few = OPTIONS | dict(probes=1)
    small_plan(monkeypatch)
    one = curation.near_duplicates(hard, folder=tmp_path / "one", **few)
    monkeypatch.setattr("vlkd_lab.engines.Engine", Backwards)
    other = curation.near_duplicates(hard, folder=tmp_path / "other", **few)
    assert same_groups(one, other) and one.recall == other.recall < 1 and np.array_equal(one.distances, other.distances)
    assert np.array_equal(one.edges, other.edges)


def test_pieces_and_regions_change_nothing_where_pairs_are_missed_either(hard, tmp_path, monkeypatch):
    few = OPTIONS | dict(probes=1)
    found = [curation.near_duplicates(hard, folder=tmp_path / "large", **few)]
    for piece, region in ((113, 60), (700, 200)):
        with monkeypatch.context() as changed:
            small_plan(changed, piece, region)
            found.append(curation.near_duplicates(hard, folder=tmp_path / str(piece), **few))
    assert all(same_groups(found[0], other) and other.recall == found[0].recall for other in found[1:])


def test_recall_is_the_share_of_true_pairs_that_meet_in_a_cell(hard, tmp_path, monkeypatch):
    small_plan(monkeypatch)
    found = curation.near_duplicates(hard, folder=tmp_path, sample=len(hard), **OPTIONS | dict(probes=2))
    rows = R.unit_length(hard)
    asked = D._asked(C.load_cells(tmp_path / "cells.safetensors"), rows, D.LinkPlan(**json.loads((tmp_path / "plan.json").read_text())))
    i, j = np.nonzero(np.linalg.norm(rows[:, None].astype(np.float64) - rows[None], axis=2) < 0.6)
    i, j = i[i != j], j[i != j]
    meet = (asked[i][:, :, None] == asked[j][:, None, :]).any(axis=(1, 2))
    assert found.recall == meet.mean() and 0.9 < found.recall < 1


def kill_a_child(folder, wanted):
    "Kill a worker as soon as the folder has a file of some kind; whether one was killed"
    killed = []

    def workers():
        found = []
        for one in psutil.Process().children(recursive=True):
            try:
                words = " ".join(one.cmdline())
            except psutil.Error:  # it has just ended
                continue
            if ("popen_loky" in words or "spawn_main" in words) and "resource_tracker" not in words:
                found.append(one)
        return found

    def watch():
        for _ in range(6000):
            if list(folder.glob(wanted)) and (found := workers()):
                found[-1].kill()
                killed.append(found[-1].pid)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread, killed


@pytest.mark.parametrize("engine", ["local", "dask"])
def test_other_processes_give_the_same_also_when_one_is_killed(hard, whole, tmp_path, monkeypatch, engine):
    small_plan(monkeypatch, piece=40)
    thread, killed = kill_a_child(tmp_path, "piece-000003*")
    found = curation.near_duplicates(hard, folder=tmp_path, engine=engine, workers=2, **OPTIONS)
    thread.join()
    assert killed and same_groups(found, whole) and found.recall == 1
    (told,) = job_progress(tmp_path)
    pieces = -(-len(hard) // 40)
    done = {phase["name"]: phase["done"] for phase in told["phases"]}
    assert told["state"] == "finished" and told["phase"] == "join the forests" and told["recall"] == 1 and told["true_pairs"] > 1000
    assert list(done) == ["find cells", "sort rows by cell", "link near rows", "count what was seen", "join the forests"]
    assert done["find cells"] == done["join the forests"] == 1 and done["sort rows by cell"] == done["count what was seen"] == pieces
    assert told["workers"] == 2 == len(told["worker_mb"]) and all(megabytes > 20 for megabytes in told["worker_mb"].values())


def test_recall_so_far_is_told_while_it_is_counted(hard, tmp_path, monkeypatch):
    small_plan(monkeypatch, piece=200)
    seen_in_piece, told = D._seen_in_piece, []

    def looks(number, **given):
        told.extend(job_progress(tmp_path))
        return seen_in_piece(number, **given)

    monkeypatch.setattr(D, "_seen_in_piece", looks)
    found = curation.near_duplicates(hard, folder=tmp_path, **OPTIONS | dict(probes=2))
    counting = [each for each in told if each["phase"] == "count what was seen"]
    assert [each["done"] for each in counting][:2] == [0, 1] and "recall" not in counting[0] and 0 < counting[1]["recall"] <= 1
    (over,) = job_progress(tmp_path)
    assert over["recall"] == pytest.approx(found.recall) and over["true_pairs"] >= counting[-1]["true_pairs"]


def test_a_linkage_that_was_cut_off_goes_on(hard, whole, tmp_path, monkeypatch):
    small_plan(monkeypatch)
    np.save(tmp_path / "given.npy", hard)
    link_region, done = D._link_region, []

    def dies(number, **given):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(number)
        return link_region(number, **given)

    folder = tmp_path / "linkage"
    with monkeypatch.context() as changed:
        changed.setattr(D, "_link_region", dies)
        with pytest.raises(KeyboardInterrupt):
            curation.near_duplicates(tmp_path / "given.npy", folder=folder, **OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    found = curation.near_duplicates(tmp_path / "given.npy", folder=folder, memory_mb=77, **OPTIONS)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    made_once = [name for name in before if not name.startswith("sample")]
    assert same_groups(found, whole) and all(before[name] == after[name] for name in made_once)
    assert sum(name.startswith("forest") for name in before) == 3


def test_a_folder_of_other_rows_or_other_cells_is_refused(hard, tmp_path):
    np.save(tmp_path / "a.npy", hard[:300])
    curation.near_duplicates(tmp_path / "a.npy", folder=tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match="was begun with probes=64, and 3 is wanted now"):
        curation.near_duplicates(tmp_path / "a.npy", folder=tmp_path / "out", **OPTIONS | dict(probes=3))
    np.save(tmp_path / "a.npy", hard[:301])
    with pytest.raises(ValueError, match="was begun with other rows .300 rows of width 24 then, 301 of width 24 now."):
        curation.near_duplicates(tmp_path / "a.npy", folder=tmp_path / "out", **OPTIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        curation.near_duplicates(tmp_path / "a.npy", folder=tmp_path / "mine", **OPTIONS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(most=0), "most=0"),
        (dict(most=2.5), "most=2.5"),
        (dict(probes=0), "probes=0"),
        (dict(per_cell=1), "per_cell=1"),
        (dict(sample=-1), "sample=-1"),
        (dict(seed=-1), "seed=-1 is not valid: a whole number, at least 0"),
        (dict(probes=2.5), "probes=2.5 is not valid: a whole number, at least 1"),
        (dict(workers=1.5), "workers=1.5"),
        (dict(memory_mb=3), "memory_mb=3"),
        (dict(engine="ray"), "choose one of local, dask"),
        (dict(workers=0), "workers=0"),
    ],
)
def test_what_is_not_valid_is_refused_before_anything_is_written(hard, tmp_path, wrong, said):
    np.save(tmp_path / "rows.npy", hard)
    with pytest.raises(ValueError, match=said):
        curation.near_duplicates(tmp_path / "rows.npy", folder=tmp_path / "out", **OPTIONS | wrong)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_without_a_sample_nothing_is_said_of_recall(hard, tmp_path):
    found = curation.near_duplicates(hard, folder=tmp_path, sample=0, **OPTIONS)
    (told,) = job_progress(tmp_path)
    assert np.isnan(found.recall) and np.isnan(load_linkage(tmp_path / "linkage.safetensors").recall)
    assert about_recall(found).startswith("not measured")
    assert "recall" not in told and not any(phase["name"].startswith("count") for phase in told["phases"])


@pytest.mark.parametrize("memory_mb", [64, 1024])
@pytest.mark.parametrize("threshold", [0.02, 0.3])
def test_who_stays_is_who_stays_in_memory(hard, whole, tmp_path, monkeypatch, memory_mb, threshold):
    if memory_mb == 64:
        monkeypatch.setattr(D, "_BASKET_BYTES", 1 << 18)
    ours = curation.balance_rows(whole, hard, threshold, tmp_path, memory_mb=memory_mb, progress=False)
    exact = balance_at(whole, R.unit_length(hard), threshold)
    assert torch.equal(ours.group, exact.group) and torch.equal(ours.keep, exact.keep) and ours.threshold == threshold
    assert len(list((tmp_path / f"balance-{threshold:g}").glob("baskets-*"))) > (memory_mb == 64)
    with pytest.raises(ValueError, match="memory_mb=63 is not valid: at least 64"):
        curation.balance_rows(whole, hard, threshold, tmp_path, memory_mb=63, progress=False)
    with pytest.raises(ValueError, match="the linkage is of 1400 rows"):
        curation.balance_rows(whole, hard[:-1], threshold, tmp_path, progress=False)


def test_two_processes_choose_the_same_who_stays(hard, whole, tmp_path):
    ours = curation.balance_rows(whole, hard, 0.3, tmp_path, engine="local", workers=2, progress=False)
    assert torch.equal(ours.keep, balance_at(whole, R.unit_length(hard), 0.3).keep)


def test_products_are_exact_up_to_the_widest_rows():
    rng = np.random.default_rng(0)
    for width in (2, 768, 4096):
        spread = rng.standard_normal((6, width)) * rng.choice([1e-9, 1], (6, width), p=[0.3, 0.7])
        rows = C.whole_numbers(unit(np.concatenate([spread, np.ones((1, width)), np.eye(1, width)])))
        exact = rows.astype(np.int64) @ rows.astype(np.int64).T
        assert np.abs(rows).astype(np.int64).max() <= 4000 and exact.max() < 1 << 24
        assert np.array_equal(rows @ rows.T, exact) and np.array_equal(torch.from_numpy(rows) @ torch.from_numpy(rows).T, exact)
    with pytest.raises(ValueError, match="products are exact up to width 4096"):
        C.whole_numbers(np.zeros((1, 4097), np.float32))


def test_cells_do_not_depend_on_pieces_or_workers(hard, tmp_path):
    files = R.row_files(hard, folder=tmp_path)
    one = C.train_cells(files, 90, tmp_path, seed=3)
    for number, (piece, engine) in enumerate(((137, None), (1 << 16, Engine(2)))):
        other = C.train_cells(files, 90, tmp_path / str(number), seed=3, piece=piece, engine=engine)
        assert np.array_equal(one.centers, other.centers) and np.array_equal(one.starts, other.starts)
    assert not np.array_equal(one.centers, C.train_cells(files, 90, tmp_path, seed=4).centers)
    assert len(one.centers) == 90 and one.starts[-1] == 90 and len(one.groups) > 5


def test_nearest_cells_are_those_of_all_centres_when_all_groups_are_looked_at(hard, tmp_path):
    cells = C.train_cells(R.row_files(hard, folder=tmp_path), 90, tmp_path)
    rows = C.whole_numbers(R.unit_length(hard))
    found, products = cells.nearest(rows, probes=5, looked=len(cells.groups))
    every = rows.astype(np.int64) @ cells.centers.astype(np.int64).T
    slow = np.array([sorted(range(90), key=lambda k: (-row[k], k))[:5] for row in every])
    assert np.array_equal(found, slow) and np.array_equal(products, np.take_along_axis(every, slow, axis=1))


@pytest.mark.parametrize("seed", range(3))
def test_clear_blobs_of_unequal_sizes_are_found_from_any_seed(seed, tmp_path):
    rng = np.random.default_rng(5)
    planted = np.repeat(np.arange(8), (1000, 500, 300, 200, 100, 50, 30, 20))
    rows = unit(np.eye(8, 16)[planted] + 0.03 * rng.standard_normal((len(planted), 16)))
    found = curation.cluster_rows(rows, 8, tmp_path, seed=seed, sampled=300, progress=False)
    assert len({(a, b) for a, b in zip(planted.tolist(), found.assignment.tolist(), strict=True)}) == 8


def test_clusters_are_the_same_whoever_makes_them_and_none_is_empty(hard, tmp_path):
    one = curation.cluster_rows(hard, 120, tmp_path / "one", progress=False)
    two = curation.cluster_rows(hard, 120, tmp_path / "two", piece=100, engine="local", workers=2, progress=False)
    assert torch.equal(one.assignment, two.assignment) and torch.equal(one.centers, two.centers)
    sizes = torch.bincount(one.assignment, minlength=120)
    assert sizes.min() > 0 and sizes.sum() == len(hard) and torch.allclose(one.centers.norm(dim=1), torch.ones(120), atol=1e-3)
    points = torch.from_numpy(R.unit_length(hard))
    flat = cluster(points, 120)
    close = [(points * found.centers[found.assignment]).sum(dim=1).mean() for found in (one, flat)]
    assert close[0] > 0.97 * close[1]


def test_a_centre_without_rows_moves_to_a_row_that_lies_far(hard, tmp_path, monkeypatch):
    train = C.train_cells

    def with_an_empty_one(*given, **more):
        cells = train(*given, **more)
        cells.centers[3] = -cells.centers.sum(axis=0) // len(cells.centers)  # opposite of where rows are
        return cells

    monkeypatch.setattr(K, "train_cells", with_an_empty_one)
    found = curation.cluster_rows(hard, 40, tmp_path, progress=False)
    assert torch.bincount(found.assignment, minlength=40).min() > 0 and (tmp_path / "cells-1.safetensors").exists()


def test_as_many_clusters_as_asked_for_however_unequal_the_groups_are(hard, tmp_path):
    rng = np.random.default_rng(0)
    near = np.eye(16)[0] + 0.05 * rng.standard_normal((3000, 16))
    skewed = unit(np.concatenate([near, rng.standard_normal((60, 16))]))
    copies = np.concatenate([np.repeat(skewed[:1], 600, axis=0), skewed[-60:], skewed[1:200]])
    for number, (rows, k) in enumerate(((skewed, 70), (skewed, 150), (copies, 90), (copies, 255))):
        found = curation.cluster_rows(rows, k, tmp_path / str(number), progress=False)
        sizes = torch.bincount(found.assignment, minlength=len(found.centers))
        assert len(sizes) == k and sizes.min() > 0
    with pytest.raises(ValueError, match="k=300: only 260 of the rows looked at differ"):
        curation.cluster_rows(copies, 300, tmp_path / "too many", progress=False)


def test_centres_are_shared_out_within_what_groups_can_have():
    sizes = np.array([5000, 3, 2, 1, 1])
    assert C._shares(sizes, sizes, 6).tolist() == [2, 1, 1, 1, 1]
    assert C._shares(sizes, np.array([1, 3, 2, 1, 1]), 7).tolist() == [1, 2, 2, 1, 1]
    assert C._shares(sizes, np.array([1, 3, 2, 1, 1]), 100).tolist() == [1, 3, 2, 1, 1]


def test_few_rows_are_looked_at_but_never_none(hard, tmp_path):
    for seed in range(3):
        found = curation.cluster_rows(hard, 1, tmp_path / str(seed), seed=seed, sampled=1, progress=False)
        assert found.assignment.tolist() == [0] * len(hard)


def test_a_group_may_lose_its_only_centre(hard):
    rows = C.whole_numbers(R.unit_length(hard))
    cells = C.Cells(rows[[0, 900, 5]], np.concatenate([rows[:3], -rows[900:901], rows[5:6]]), np.array([0, 3, 4, 5]))
    named = [(0.0, 1000, 0)]
    moved = K._refilled(cells, np.array([500, 300, 300, 0, 300]), named, Given(hard))
    assert len(moved.centers) == 5 and (np.diff(moved.starts) > 0).all() and len(moved.groups) == len(moved.starts) - 1
    found, _ = moved.nearest(rows, probes=2)
    assert found.min() >= 0


class Given:
    "Rows in memory"

    def __init__(self, rows):
        self.rows = rows

    def take(self, rows):
        return self.rows[rows]


def test_a_row_that_is_no_unit_row_is_named_by_its_own_number(tmp_path):
    rows = unit(np.random.default_rng(0).standard_normal((9000, 4)))
    rows[6000:] *= 3
    with pytest.raises(ValueError, match="row [678][0-9]{3} has length 3"):
        curation.near_duplicates(rows, 0.1, tmp_path, per_cell=9000, progress=False)


def test_an_array_may_be_given_again_and_leaves_files_of_others_alone(hard, tmp_path):
    folder = tmp_path / "out"
    one = curation.near_duplicates(hard, folder=folder, **OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("forest-*")}
    options = OPTIONS | dict(most=np.float64(0.6), probes=np.int64(64), per_cell=np.int64(20))
    again = curation.near_duplicates(torch.from_numpy(hard), folder=folder, memory_mb=99, **options)
    assert same_groups(one, again)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("forest-*")}
    with pytest.raises(ValueError, match="was begun with other rows"):
        curation.near_duplicates(hard[:-1], folder=folder, **OPTIONS)
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine" / "rows.npy", hard[:50])
    with pytest.raises(ValueError, match="holds other files"):
        curation.near_duplicates(hard, folder=tmp_path / "mine", **OPTIONS)
    curation.cluster_rows(hard, 5, tmp_path / "mine", progress=False)
    assert len(np.load(tmp_path / "mine" / "rows.npy")) == 50
    with pytest.raises(ValueError, match="holds the embeddings: name another folder"):
        curation.cluster_rows(tmp_path / "mine", 5, tmp_path / "mine", progress=False)


def test_arrays_of_every_kind_are_rows_or_named(hard, tmp_path):
    files = R.row_files(np.asfortranarray(hard), folder=tmp_path)
    assert np.array_equal(files.piece(0, len(files)), hard)
    files = R.row_files(torch.from_numpy(hard[:9]).bfloat16(), folder=tmp_path)
    assert files.dtype == "float32" and len(files) == 9
    for wrong, said in (
        (hard[0], r"an array of shape \(24,\)"),
        (hard[:0], r"an array of shape \(0, 24\)"),
        (hard[:3].tolist(), "one array, or files"),
        ([hard, hard], "one array, or files"),
    ):
        with pytest.raises(ValueError, match=said):
            R.row_files(wrong, folder=tmp_path)


def test_rows_are_read_from_wherever_they_lie(hard, tmp_path):
    np.save(tmp_path / "a.npy", hard[:100])
    save_file({"rows": hard[100:250].astype(np.float32), "keys": hard[:1]}, tmp_path / "b.safetensors")
    np.save(tmp_path / "c.npy", hard[:0])
    files = R.row_files([tmp_path / "a.npy", tmp_path / "c.npy", tmp_path / "b.safetensors"])
    assert len(files) == 250 and files.dtype == "float32"
    chosen = np.array([0, 99, 100, 101, 249])
    assert np.array_equal(files.take(chosen), hard[chosen].astype(np.float32))
    assert np.array_equal(R.row_files(torch.from_numpy(hard[:7]), folder=tmp_path / "t").piece(0, 7), hard[:7])


def test_a_store_of_indices_is_the_rows_that_they_keep(scenes, tiny_teacher, tmp_path):
    teacher = load_model(tiny_teacher, "cpu")
    report = inspect_shards(f"{scenes}/train-{{000000..000002}}.tar")
    store = FeatureStore(report, store_key(teacher), tmp_path / "store")
    fill(store, teacher, ["image"], progress=False)
    stored = load(store, captioned=True)
    every = R.row_files(store, captioned=True)
    assert np.array_equal(every.piece(0, len(every)), stored.rows)
    names = [key.split("/", 1)[1] for key in stored.keys if key.startswith("train-000001/")][::3]
    index = write_index(tmp_path / "train-000001.kept.json", report.shards[1], names)
    kept = FeatureStore(inspect_shards([index, report.shards[0].path], cache=False), store_key(teacher), tmp_path / "store")
    rows = R.row_files(kept)
    assert len(rows) == report.shards[0].count + len(names)
    assert np.array_equal(rows.piece(0, len(rows)), load(kept).rows)
    chosen = np.arange(0, len(rows), 7)
    assert np.array_equal(rows.only(chosen).piece(0, len(chosen)), load(kept).rows[chosen])
    store.path("train-000002", "image").unlink()
    with pytest.raises(ValueError, match="missing; fill the store first"):
        R.row_files(store)


def broken(tmp_path, hard):
    yield tmp_path / "typo", "typo: there is no such file"
    yield None, "one array, or files"
    bad = hard.copy()
    bad[17] = np.nan
    yield bad, "row 17 has length nan"
    bad = hard.copy()
    bad[900] *= 2
    yield bad, "row 900 has length [12]"
    whole = tmp_path / "cut.npy"
    np.save(whole, hard)
    whole.write_bytes(whole.read_bytes()[:-100])
    yield whole, "the file ends before its 1400 rows do"
    np.save(tmp_path / "columns.npy", np.asfortranarray(hard))
    yield tmp_path / "columns.npy", "stored by columns"
    np.save(tmp_path / "double.npy", hard.astype(np.float64))
    yield tmp_path / "double.npy", "half or single precision"
    save_file({"embeddings": hard}, tmp_path / "other.safetensors")
    yield tmp_path / "other.safetensors", "no tensor 'rows' in it; its tensors: embeddings"
    np.save(tmp_path / "narrow.npy", hard[:, :5])
    np.save(tmp_path / "wide.npy", hard)
    yield [tmp_path / "narrow.npy", tmp_path / "wide.npy"], "narrow.npy 5, wide.npy 24"
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty", "there are no embeddings"
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    yield tmp_path / "pickled.npy", "rows are of two dimensions"
    (tmp_path / "short.safetensors").write_bytes(b"\x00" * 5)
    yield tmp_path / "short.safetensors", "no tensor 'rows'"


def test_damaged_and_foreign_embeddings_are_named(hard, tmp_path):
    for number, (source, said) in enumerate(broken(tmp_path, hard)):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            curation.near_duplicates(source, folder=tmp_path / f"out-{number}", **OPTIONS)


@pytest.mark.parametrize("wrong", [dict(k=0), dict(k=2.5), dict(k=1401), dict(k=9, seed=-1), dict(k=9, piece=0), dict(k=9, iterations=0.5)], ids=str)
def test_clusters_that_cannot_be_are_refused(hard, tmp_path, wrong):
    name, value = list(wrong.items())[-1]
    with pytest.raises(ValueError, match=f"^{name}={value} "):
        curation.cluster_rows(hard, folder=tmp_path / "out", **wrong, progress=False)


def strange():
    "Rows as strangers bring them, and how they are looked through"
    rng = np.random.default_rng(3)
    rows = unit(np.repeat(rng.standard_normal((30, 8)), 4, axis=0) + 0.1 * rng.standard_normal((120, 8)))
    wide = unit(np.repeat(rng.standard_normal((10, 4096)), 3, axis=0) + 0.1 * rng.standard_normal((30, 4096)))
    signs = np.where(rng.random(50) < 0.5, -1.0, 1.0).astype(np.float32)[:, None]
    yield "one row", rows[:1], {}
    yield "two rows", rows[:2], {}
    yield "all equal", np.repeat(rows[:1], 300, axis=0), {}
    yield "width 1", signs, dict(most=2.0)
    yield "width 4096", wide, {}
    yield "large cells", rows, dict(per_cell=10**9)
    yield "more probes than cells", rows, dict(probes=10**7)
    yield "the smallest threshold", np.concatenate([rows, rows]), dict(most=0.0001)
    yield "the largest threshold", rows, dict(most=2.0)
    yield "a smallest one above", rows, dict(most=0.005, finest=0.3)


@pytest.mark.parametrize(("rows", "given"), [pytest.param(*case, id=name) for name, *case in strange()])
def test_strange_rows_have_the_groups_of_all_pairs(rows, given, tmp_path):
    options = OPTIONS | given
    found = curation.near_duplicates(rows, folder=tmp_path / "out", **options)
    exact = link(R.unit_length(rows), most=options["most"], finest=found.finest)
    for threshold in np.linspace(exact.finest, exact.most, 4):
        assert np.array_equal(found.groups(threshold), exact.groups(threshold))
    stays = curation.balance_rows(found, rows, exact.most, tmp_path / "out", progress=False)
    assert torch.equal(stays.keep, balance_at(exact, R.unit_length(rows), exact.most).keep)
    for k in {1, len(np.unique(rows, axis=0))}:
        sizes = torch.bincount(curation.cluster_rows(rows, k, tmp_path / "clusters", progress=False).assignment, minlength=k)
        assert len(sizes) == k and sizes.min() > 0


def test_files_of_one_row_and_of_none_are_read_and_hidden_ones_are_not(hard, whole, tmp_path):
    for number, row in enumerate(hard[:200]):
        np.save(tmp_path / f"{number:04d}.npy", row[None])
    np.save(tmp_path / "0100-none.npy", hard[:0])
    np.save(tmp_path / "._0000.npy", hard[5:9])
    files = R.row_files(tmp_path)
    assert len(files) == 200 and np.array_equal(files.piece(0, 200), hard[:200])


def test_memory_stays_within_the_budget(tmp_path):
    "60,000 rows of 256 numbers are 61 MB in single precision; a process that held products of all would take 14 GB"
    script = """
import resource, sys
import numpy as np
from vlkd_lab.curation import near_duplicates
from vlkd_lab.balancing import link
rng = np.random.default_rng(0)
rows = rng.standard_normal((300, 256)).astype(np.float32)[np.arange(60000) % 300] + rng.standard_normal((60000, 256), dtype=np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
np.save(sys.argv[1] + "/rows.npy", rows.astype(np.float16))
link(rows[:500], most=0.5)  # what libraries take
del rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
near_duplicates(sys.argv[1] + "/rows.npy", 0.5, sys.argv[1] + "/out", memory_mb=64, sample=64, probes=4, progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 130, done.stdout


# Two calls at once


HOLDS = """
import os, sys, time
from vlkd_lab.project import alone_in
with alone_in(sys.argv[1], sys.argv[2]):
    if len(sys.argv) > 3 and os.fork():  # a child that outlives it
        os.kill(os.getpid(), 9)
    print("ready", flush=True)
    time.sleep(60)
"""


def held(folder, *more, lock="at-work.lock"):
    "A process that is at work in a folder"
    command = [sys.executable, "-c", HOLDS, str(folder), lock, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_call_is_refused_by_name_until_the_first_has_ended_however(hard, tmp_path):
    process = held(tmp_path)
    with pytest.raises(RuntimeError, match=rf"{tmp_path} is at work already: process {process.pid} on .* since 20.*; wait, or name another folder"):
        curation.near_duplicates(hard, folder=tmp_path, **OPTIONS)
    with pytest.raises(RuntimeError, match="is at work already"):
        curation.cluster_rows(hard, 5, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["at-work.lock"]
    process.kill()
    process.wait()
    curation.cluster_rows(hard, 5, tmp_path, progress=False)
    assert not list(tmp_path.glob("*.lock"))


def test_a_child_that_outlives_its_parent_has_no_part_in_the_lock(tmp_path):
    process = held(tmp_path, "fork")
    process.wait()
    with alone_in(tmp_path):
        pass


def test_who_stays_is_chosen_once_at_a_time_for_a_threshold(hard, whole, tmp_path):
    with alone_in(tmp_path, "balance-0.3.lock"):
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} on"):
            curation.balance_rows(whole, hard, 0.3, tmp_path, progress=False)
        curation.balance_rows(whole, hard, threshold=0.2, folder=tmp_path, progress=False)


def test_a_folder_without_locks_is_worked_in_all_the_same(hard, whole, tmp_path, monkeypatch):
    def without(handle, kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    assert same_groups(curation.near_duplicates(hard, folder=tmp_path, **OPTIONS), whole)


def test_a_folder_that_cannot_be_written_is_named_and_none_is_left_behind(hard, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out cannot be written .*: name another folder"):
        curation.near_duplicates(hard, folder=tmp_path / "file" / "out", **OPTIONS)
    with pytest.raises(ValueError, match="probes=0"):
        curation.near_duplicates(hard, folder=tmp_path / "new", **OPTIONS | dict(probes=0))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("plan", ["{}", "no plan", '{"fingerprint": "0", "layout": 2}', "[]"])
def test_a_plan_of_another_version_is_named(hard, tmp_path, plan):
    (tmp_path / "plan.json").write_text(plan)
    with pytest.raises(ValueError, match="plan.json cannot be read, or is of another version of the lab: name another folder"):
        curation.near_duplicates(hard, folder=tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    "full",
    [OSError(28, "No space left on device"), OSError("4096 requested and 12 written"), SafetensorError("I/O error: Disk quota exceeded (os error 122)")],
    ids=str,
)
def test_a_full_disk_is_said_with_the_file_and_what_is_finished_stays(hard, whole, tmp_path, monkeypatch, full):
    small_plan(monkeypatch)
    save, files = R.save_file, []

    def fails(arrays, path):
        files.append(path)
        if len(files) == 7:
            raise full
        save(arrays, path)

    with monkeypatch.context() as changed:
        for module in (R, D):
            changed.setattr(module, "save_file", fails)
        with pytest.raises(OSError, match=f"no room is left on the disk; what is finished stays: '{tmp_path}/out/[a-z]+-0000"):
            curation.near_duplicates(hard, folder=tmp_path / "out", **OPTIONS)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".") or path.suffix == ".lock"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("piece-*")}
    assert same_groups(curation.near_duplicates(hard, folder=tmp_path / "out", **OPTIONS), whole)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_full_disk_keeps_nobody_out(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", lambda self, mode, **more: Full(self, mode.replace("b", "")))
    with alone_in(tmp_path), pytest.raises(RuntimeError, match="is at work already: another process"), alone_in(tmp_path):
        pass
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_is_gone_is_taken_anew(tmp_path, monkeypatch):
    "Whoever opened the file before its owner took it away has locked nothing"
    take, opened = project.try_lock, []

    def slowly(handle, *more):
        opened.append(handle)
        if len(opened) == 1:
            (tmp_path / "at-work.lock").unlink()
        return take(handle, *more)

    monkeypatch.setattr(project, "try_lock", slowly)
    with alone_in(tmp_path):
        assert (tmp_path / "at-work.lock").read_text().startswith(f"process {os.getpid()} on")
        with pytest.raises(RuntimeError, match="is at work already"), alone_in(tmp_path):
            pass
