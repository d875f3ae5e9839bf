"""What a balance throws away, seen: of all rows or of a sample, honestly labelled, on a page that stays, and while a job is at work."""

import io
import json
import re
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import tar
from PIL import Image

from vlkd_lab import balance_explorer
from vlkd_lab.balance_explorer import BalanceExplorer, Linking, balance_json
from vlkd_lab.balance_report import (
    LinkedGroups,
    about_sample,
    removed_curve,
    shown_groups,
    store_rows,
    write_balance_report,
)
from vlkd_lab.balancing import Linkage, balance_at, find_pictures, link, load_clusters, spanning_forest
from vlkd_lab.data import inspect_shards, load_pairs
from vlkd_lab.engines import PROGRESS, TaskProgress, job_progress, open_engine
from vlkd_lab.explorers import ClusterMap, clusters_of_all, find_clusters, map_of
from vlkd_lab.models import load_model
from vlkd_lab.stores import FeatureStore, fill, load, store_key
from vlkd_lab.widgets import CurationView, curation_json, curation_status, watch_curation

MARKUP = "<script>alert(1)</script>' onerror='alert(2)' \"q\" \u202eright"


@pytest.fixture(scope="module")
def store(tiny_teacher, tmp_path_factory):
    "60 pictures in two shards, many nearly the same; keys and captions are hostile, every third has no class"
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    bases = rng.integers(0, 255, (12, 8, 8, 3))
    for number in range(2):
        members = []
        for k in range(30):
            pixels = np.clip(bases[rng.integers(12)] + rng.integers(-6, 6, (8, 8, 3)), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).resize((32, 32)).save(buffer, "PNG")
            key = f"<b id=x>&'{number}-{k:03d}"
            members += [(f"{key}.png", buffer.getvalue()), (f"{key}.txt", f"{MARKUP} {k}".encode())]
            if k % 3:
                members.append((f"{key}.cls", str(k % 4).encode()))
        tar(folder / f"shard-{number:06d}.tar", members)
    teacher = load_model(tiny_teacher, "cpu")
    store = FeatureStore(inspect_shards(folder), store_key(teacher), folder / "features")
    fill(store, teacher, ["image"], progress=False)
    return store


@pytest.fixture(scope="module")
def near(store):
    "A threshold at which a part of the pictures goes, and the linkage up to twice that"
    unit = load(store).unit()
    apart = np.sort(np.linalg.norm(unit[:, None] - unit[None], axis=2)[np.triu_indices(60, 1)])
    threshold = float(apart[120])
    return threshold, link(unit, most=min(2 * threshold, 2))


class Page(HTMLParser):
    "The elements of a page and its text"

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def check(self):
        for tag, attributes in self.elements:
            assert tag not in ("script", "b", "iframe", "link", "object"), tag
            assert not [name for name in attributes if name.startswith("on")], attributes
            for name in ("src", "href"):
                assert attributes.get(name, "data:").startswith("data:")


def random_linkage(seed, count=400):
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, count, (rng.integers(1, 500), 2))
    edges = edges[edges[:, 0] != edges[:, 1]]
    distances = np.round(rng.uniform(0, 1, len(edges)), 2)  # with ties
    return Linkage(count, 0.01, 1.0, *spanning_forest(count, edges, distances))


@pytest.mark.parametrize("seed", range(6))
def test_groups_by_edges_are_the_groups_of_all_rows(seed):
    linkage = random_linkage(seed)
    linked = LinkedGroups(linkage)
    for threshold in (0.01, 0.1, 0.37, 0.5, 1.0):
        slow = linkage.groups(threshold)
        sizes = -np.sort(-np.bincount(slow))
        found = linked.at(threshold)
        assert found.sizes.tolist() == [size for size in sizes.tolist() if size > 1]
        assert found.removed == 400 - len(sizes) and found.removed_share == found.removed / 400
        order = np.lexsort((np.unique(slow, return_index=True)[1], -np.bincount(slow)))
        for place in range(len(found.sizes)):
            assert found.members(place).tolist() == np.flatnonzero(slow == order[place]).tolist()
        ranks, curve = found.size_curve(points=10**5)
        assert curve.tolist() == sizes.tolist() and ranks.tolist() == list(range(1, len(sizes) + 1))
    at, removed = removed_curve(linkage, points=10**5)
    assert removed.tolist() == pytest.approx([100 * (k + 1) / 400 for k in range(len(linkage.distances))]) and np.array_equal(at, linkage.distances)


def test_a_linkage_without_a_pair_has_no_groups(tmp_path):
    none = Linkage(5, 0.01, 1.0, np.zeros((0, 2), np.int64), np.zeros(0))
    at = LinkedGroups(none).at(0.5)
    assert at.removed == 0 and not len(at.sizes) and at.size_curve()[1].tolist() == [1] * len(at.size_curve()[1])
    page = write_balance_report(none, None, 0.5, tmp_path / "none.html").read_text()
    assert "0.0% of 5 images go at 0.500" in page and page.count("<svg") == 2


def test_what_a_sample_is_said_to_hold_is_what_it_holds(store):
    rows = store_rows(store, sample=17, seed=5)
    chosen = set(rows.chosen.tolist())
    inside = sum(a in chosen and b in chosen for a, b in combinations(range(60), 2))
    share = 100 * inside / len(list(combinations(range(60), 2)))
    assert f"a random sample of 17 of 60 images: {share:.3g} % of all pairs are in it" in about_sample(len(rows), rows.total)
    assert "so the share that goes of all 60 is larger" in about_sample(17, 60)
    assert about_sample(60, 60) == "all 60 images" and "0.25 % of all pairs" in about_sample(20_000, 400_000)
    assert store_rows(store, sample=60).chosen is None and store_rows(store, sample=99).chosen is None
    draws = [tuple(store_rows(store, 17, seed).chosen) for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    drawn = np.bincount(np.concatenate([store_rows(store, 17, seed).chosen for seed in range(200)]), minlength=60)
    assert 30 < drawn.min() and drawn.max() < 90, "every image is drawn as often as any"
    for wrong in (1, -3):
        with pytest.raises(ValueError, match=f"sample={wrong} is not valid: at least 2 images, or 0 for all"):
            store_rows(store, wrong)


def test_a_sample_is_a_lower_bound_on_average(store, near):
    threshold, whole = near
    shares = []
    for seed in range(40):
        rows = store_rows(store, 20, seed)
        shares.append(link(rows.take(np.arange(20)), most=whole.most).removed(threshold) / 20)
    assert 0 < np.mean(shares) < 0.8 * whole.removed(threshold) / 60


def test_names_classes_and_rows_of_a_sample_are_those_of_its_images(store):
    stored = load(store)
    for sample in (0, 23):
        rows = store_rows(store, sample, seed=2)
        chosen = np.arange(60) if rows.chosen is None else rows.chosen
        some = np.array([0, 3, len(rows) - 1])
        assert rows.keys(some) == [stored.keys[k] for k in chosen[some]] and np.array_equal(rows.labels(), stored.labels[chosen])
        assert np.array_equal(rows.take(some), stored.unit()[chosen[some]]) and len(rows.files) == len(rows)


def test_only_captioned_samples_count_where_a_job_trains_on_pairs(tiny_teacher, tmp_path):
    "Their numbers are those of the linkage of a CLIP-CID run"
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    members = []
    for k in range(6):
        members += [(f"{k}.png", buffer.getvalue()), (f"{k}.txt", b"a red one" if k % 2 else b"")]
    teacher = load_model(tiny_teacher, "cpu")
    store = FeatureStore(inspect_shards(tar(tmp_path / "one.tar", members)), store_key(teacher), tmp_path / "features")
    fill(store, teacher, ["image"], progress=False)
    assert store_rows(store, captioned=True).keys(range(3)) == [f"one/{k}" for k in (1, 3, 5)] and len(store_rows(store)) == 6


def test_the_numbers_of_a_report_are_those_of_a_slow_count(store, near, tmp_path):
    threshold, linkage = near
    stored, rows = load(store), store_rows(store)
    balance = balance_at(linkage, stored.unit(), threshold)
    path = write_balance_report(linkage, rows, threshold, tmp_path / "r.html", balance, (MARKUP, "<b>"), dict(data=MARKUP))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    page.check()
    assert "\u202e" not in text and text.count("&lt;script&gt;") > 20 and "Content-Security-Policy" in text
    keeps = set(balance.keep.tolist())
    sizes = np.bincount(linkage.groups(threshold))
    cells = page.texts
    facts = {cells[k]: cells[k + 1] for k in range(len(cells) - 1)}
    removed = 60 - len(keeps)
    assert facts["go"] == f"{removed:,} ({removed / 60:.2%} of 60)" and facts["stay"] == str(len(keeps))
    assert facts["groups of more than one"] == str((sizes > 1).sum()) and facts["largest group"] == str(sizes.max())
    assert facts["threshold"].startswith(f"{threshold:.6g},") and facts["images"] == "all 60 images"
    for k, name in ((0, "<script>alert(1)</script>"), (1, "<b>"), (2, "class 2"), (3, "class 3")):
        inside = [row for row in range(60) if stored.labels[row] == k]
        stay = sum(row in keeps for row in inside)
        at = next(n for n, text in enumerate(cells) if text.startswith(name) and cells[n + 1] == str(len(inside)))
        assert cells[at + 2 : at + 4] == [str(stay), f"{1 - stay / len(inside):.1%}"]
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    framed = [attributes for attributes in pictures if "outline" in attributes["style"]]
    names = {re.search(r"\((shard-.*)\)$", attributes["title"])[1] for attributes in framed}
    assert names <= {stored.keys[row] for row in keeps} and len(names) == len(framed) >= 2, "who is framed stays"


def test_a_report_says_what_it_does_not_know(store, near, tmp_path):
    threshold, linkage = near
    some = store_rows(store, 30, seed=1)
    part = link(some.take(np.arange(30)), most=linkage.most)
    text = write_balance_report(part, some, threshold, tmp_path / "s.html").read_text(encoding="utf-8")
    assert text.count(about_sample(30, 60)) == 2 and "it was not counted who stays" in text.lower() and "all 60 images" not in text
    balance = balance_at(part, some.take(np.arange(30)), threshold)
    text = write_balance_report(part, some, threshold, tmp_path / "s.html", balance).read_text(encoding="utf-8")
    assert f"Counted over {about_sample(30, 60)}" in text
    missed = Linkage(60, linkage.finest, linkage.most, linkage.edges, linkage.distances, recall=0.874)
    text = write_balance_report(missed, store_rows(store), threshold, tmp_path / "m.html", each=2, groups=1).read_text(encoding="utf-8")
    assert "87.4% of the near pairs were looked at, measured on a sample: at least this goes" in text and 2 <= text.count("<img") <= 4


@pytest.mark.parametrize("each", [1, 3, 8])
def test_of_a_group_the_one_that_stays_is_shown_first(store, near, each):
    threshold, linkage = near
    rows, balance = store_rows(store), balance_at(linkage, load(store).unit(), threshold)
    groups = LinkedGroups(linkage).at(threshold)
    for shown, members in zip(shown_groups(groups, rows, range(5), each), balance.largest(5), strict=False):
        assert list(shown.keys) == rows.keys(members[:each]) and shown.size == len(members)
    unframed = shown_groups(groups, rows, [0], each, most=1)[0]
    assert not unframed.is_framed and list(unframed.keys) == rows.keys(groups.members(0)[:each])


def test_a_shard_is_left_as_soon_as_its_pictures_are_found(store, monkeypatch):
    report, read = inspect_shards(sorted({shard.path for shard in store.reports.values()})), []
    from vlkd_lab import balancing

    def counted(path, *given):
        for sample in raw(path, *given):
            read.append(sample["__key__"])
            yield sample

    raw = balancing.raw_samples
    monkeypatch.setattr(balancing, "raw_samples", counted)
    keys = store_rows(store).keys([1, 4])
    assert set(find_pictures(report, keys)) == set(keys) and len(read) == 5


def test_the_explorer_says_what_its_numbers_are_of(store, near):
    threshold, linkage = near
    whole = BalanceExplorer(linkage, store_rows(store), threshold, live=True)
    head = dict(whole.panel.head)
    removed = linkage.removed(threshold)
    assert head["images"] == "all 60" and head["removed"] == f"{removed / 60:.1%}" and head["stay"] == f"{60 - removed} of 60"
    assert not whole.panel.messages and "<script" not in whole.shown.value and "\u202e" not in whole.shown.value
    whole.close()
    some = store_rows(store, 20, seed=4)
    part = Linking(progress=False).linkage(some, linkage.most)
    missed = Linkage(20, part.finest, part.most, part.edges, part.distances, recall=0.9)
    look = BalanceExplorer(missed, some, threshold, live=True)
    notes = [message["text"] for message in look.panel.messages]
    assert notes == [about_sample(20, 60), "90.0% of the near pairs were looked at, measured on a sample: at least this goes"]
    assert dict(look.panel.head)["images"] == "sample, 20 of 60" and dict(look.panel.head)["recall"] == "90.0%"
    axes = balance_json(missed, look.groups, of=look.of)["layout"]
    assert axes["yaxis1"]["title"]["text"] == "images of the sample removed, %" and about_sample(20, 60) in look.static().text
    look.close()
    with pytest.raises(ValueError, match="the linkage is of 20 rows, and these are 60"):
        BalanceExplorer(missed, store_rows(store))


def test_a_step_of_the_slider_looks_at_no_other_rows_than_those_it_shows(store, near, monkeypatch):
    threshold, linkage = near
    rows, looked = store_rows(store), []
    take = type(rows.every).take
    monkeypatch.setattr(type(rows.every), "take", lambda self, places: looked.extend(places.tolist()) or take(self, places))
    monkeypatch.setattr(Linkage, "groups", lambda *_: pytest.fail("components of all rows"))
    look = BalanceExplorer(linkage, rows, threshold, live=False)
    look.static()
    groups = look.groups
    shown = [row for place in range(min(4, len(groups.sizes))) for row in groups.members(place)]
    assert sorted(looked) == sorted(shown) and len(shown) < 60


def test_a_finished_linkage_is_opened_and_one_of_other_rows_refused(store, near, tmp_path, monkeypatch):
    threshold, linkage = near
    rows = store_rows(store)
    for engine in ("memory", "local"):
        linking = Linking(engine, workers=1, folder=tmp_path / engine, progress=False)
        made = linking.linkage(rows, linkage.most)
        assert np.array_equal(made.groups(threshold), linkage.groups(threshold))
        balance = balance_at(linkage, load(store).unit(), threshold)
        assert torch.equal(linking.balance(made, rows, threshold).keep, balance.keep)
        with monkeypatch.context() as changed:
            for name in ("link", "near_duplicates"):
                changed.setattr(balance_explorer, name, lambda *_, **__: pytest.fail("computed again"))
            opened = linking.linkage(rows, 2.0)
            assert np.array_equal(opened.distances, made.distances) and opened.most == linkage.most
            with pytest.raises(ValueError, match=r"is of 60 images, and a random sample of 20 of 60 images are to be looked at"):
                linking.linkage(store_rows(store, 20), linkage.most)
        (tmp_path / engine / "linkage.safetensors").unlink()
        linking.linkage(store_rows(store, 20, seed=1), linkage.most) if engine == "memory" else None
    with pytest.raises(ValueError, match="is of other images"):
        Linking(folder=tmp_path / "memory").linkage(store_rows(store, 20, seed=2), linkage.most)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(engine="ray"), "choose one of memory, local, dask"),
        (dict(engine="local"), "name a folder for the linkage"),
        (dict(engine="local", folder="x", address="tcp://a:1"), "choose engine='dask' with it"),
    ],
)
def test_who_links_is_checked_before_anything_is_read(wrong, said):
    with pytest.raises(ValueError, match=said):
        Linking(**wrong)


# Clusters


def test_a_map_of_many_shows_a_sample_and_the_sizes_of_all(store, tmp_path, monkeypatch):
    rows = store_rows(store)
    made = find_clusters(rows, 4, tmp_path / "clusters", seed=1)
    monkeypatch.setattr("vlkd_lab.explorers.cluster", lambda *_: pytest.fail("computed again"))
    opened = find_clusters(rows, 7, tmp_path / "clusters")
    assert torch.equal(opened.assignment, made.assignment) and torch.equal(opened.centers, made.centers)
    state = clusters_of_all(rows, made, 25, seed=3, names=[MARKUP] * 4, classify=lambda unit: unit.argmax(dim=1) % 4)
    counted = [made.assignment.tolist().count(k) for k in range(4)]
    assert state.sizes().tolist() == sorted((n for n in counted if n), reverse=True) and map_of(state) == "25 of 60 images"
    place = {key: row for row, key in enumerate(rows.keys(range(60)))}
    assert state.assignment.tolist() == [made.assignment[place[key]] for key in state.pairs.keys]
    assert state.labels.tolist() == [rows.labels()[place[key]] for key in state.pairs.keys]
    pairs = load_pairs(inspect_shards([shard.path for shard in store.reports.values()]))
    pictures = dict(zip(pairs.keys, pairs.images, strict=True))
    assert all(np.array_equal(image, pictures[key]) for key, image in zip(state.pairs.keys, state.pairs.images, strict=True))
    look = ClusterMap(state, live=True)
    assert look.panel.head == [["map", "25 of 60 images"], ["sizes", "images, of all 60"]]
    look.select(0)
    assert "<script" not in look.detail.value and "\u202e" not in look.detail.value
    look.close()
    state.umap = None
    assert look.static()._repr_mimebundle_()["text/plain"].startswith("clusters of 25 of 60 images")
    with pytest.raises(ValueError, match="holds clusters of other rows"):
        find_clusters(store_rows(store, 30), 4, tmp_path / "clusters")
    with pytest.raises(ValueError, match="holds no saved clusters: it has no assignment, centers"):
        load_clusters(store.path("shard-000000", "image"))


def test_a_sample_of_pairs_is_drawn_from_all_of_them(store):
    report = inspect_shards([shard.path for shard in store.reports.values()])
    every = load_pairs(report).keys
    assert load_pairs(report, limit=12).keys == every[:12]
    drawn = [load_pairs(report, limit=12, seed=seed).keys for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and list(drawn[0]) == [key for key in every if key in set(drawn[0])]
    counts = np.zeros(60)
    for seed in range(60):
        counts[[every.index(key) for key in load_pairs(report, limit=20, seed=seed).keys]] += 1
    assert counts.sum() == 1200 and counts.min() > 5 and counts.max() < 36
    assert load_pairs(report, limit=60, seed=3).keys == load_pairs(report, limit=99, seed=3).keys == every


# A job at work


def halves(number):
    return number / 2


def test_what_is_told_is_drawn_and_what_is_strange_is_text(tmp_path):
    view = CurationView(tmp_path, live=True)
    assert "nothing is told" in view.panel.messages[0]["text"] and watch_curation(tmp_path, live=False).static().png is None
    told = TaskProgress(tmp_path, MARKUP, [f"read {MARKUP}", "rest"], unit="bytes")
    with open_engine() as engine, told:
        parts = told.each(engine, f"read {MARKUP}", halves, range(4), 4000, measure=lambda found: dict(recall=0.5, true_pairs=len(found)))
        for _ in range(3):
            next(parts)
        told._write(at_once=True)
        view._looked = -1e9
        view.update()
        head = dict(view.panel.head)
        assert head["parts"] == "3 of 4" and head["recall so far"] == "50.0% of 3 true pairs" and head["state"] == "working"
        assert view.panel.share == 0.75 and head["memory"].startswith("1 worker, ") and "bytes a second" in head
        assert head["left in this phase"].endswith(" s") and head["last word"].endswith(" s ago")
        drawn = json.dumps(curation_json(view.jobs), default=np.ndarray.tolist, ensure_ascii=False)
        assert "<script" not in drawn and "\u202e" not in drawn and "\u202e" not in str(head)
        list(parts)
    told.finish()
    page = watch_curation(tmp_path, live=False).static()._repr_mimebundle_()
    assert "state: finished" in page["text/plain"] and "recall: 50.0%" in page["text/plain"] and "<script" not in page["text/html"]
    Page(page["text/html"]).check()
    view.close()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"phases": {"a": 1}, "began": 1, "worker_mb": [3], "done": "x", "parts": null, "seconds_left": "never"}'])
def test_files_that_tell_nonsense_are_survived(tmp_path, text):
    (tmp_path / PROGRESS).write_text(text)
    view = CurationView(tmp_path, live=True)
    bars = curation_status({} if not view.jobs else view.jobs[0])
    assert all(isinstance(value, str) for _, value in bars) and view.static().text
    view.close()


def test_speed_and_time_left_are_those_of_the_last_parts(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("vlkd_lab.engines.time.monotonic", lambda: clock[0])
    told = TaskProgress(tmp_path, "slow", ["there already, then new"])
    with open_engine() as engine, told:
        parts = told.each(engine, "there already, then new", halves, range(200), 20_000)
        for number in range(140):
            clock[0] += 0.0 if number < 100 else 2.0  # a hundred were finished before
            next(parts)
        clock[0] += 1
        told._write(at_once=True)
    (now,) = job_progress(tmp_path)
    assert now["done"] == 140 and now["a_second"] == 50 and now["seconds_left"] == pytest.approx(120)
    assert now["phases"][0]["seconds"] == 80


def test_memory_is_that_of_the_workers_that_told_last(tmp_path):
    told = TaskProgress(tmp_path, "many", ["part"])
    told.about["workers"] = 2
    told.megabytes.update({"a/1": 100, "a/2": 200, "b/9": 300})
    told._begin("part", 3)
    (now,) = job_progress(tmp_path)
    assert now["worker_mb"] == {"a/2": 200, "b/9": 300} and now["memory_mb"] > 20
    assert dict(curation_status(now))["memory"] == "2 workers, 500 MB; the largest 300 MB"
