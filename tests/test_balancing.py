"Near-duplicates against a slow obvious version, in any blocks, parts and order; balanced data; clusters"

import json
import tarfile
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from test_data import members, own_cache, picture, tar  # noqa: F401

from vlkd_lab import balancing as B
from vlkd_lab.data import DataReport, inspect_shards, load_pairs, raw_samples
from vlkd_lab.models import load_model
from vlkd_lab.stores import FeatureStore, StoredKeys, fill, load, store_key


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def distances_of(rows):  # (N, N) float64
    gaps = rows[:, None].astype(np.float64) - rows[None].astype(np.float64)
    return np.sqrt((gaps * gaps).sum(axis=2))


def obvious_groups(distances, threshold):
    "Every row takes the smallest number among its neighbours until nothing changes"
    near = (distances < threshold) | np.eye(len(distances), dtype=bool)
    number = np.arange(len(distances))
    while True:
        lower = np.where(near, number, len(number)).min(axis=1)
        if (lower == number).all():
            return np.unique(number, return_inverse=True)[1]
        number = lower


def balance_of(groups):
    groups = np.asarray(groups)
    return B.Balance(torch.from_numpy(groups), torch.from_numpy(np.unique(groups, return_index=True)[1]), 0.3)


RNG = np.random.default_rng(5)
RANDOM = unit(np.concatenate([c + 0.15 * RNG.standard_normal((10, 9)) for c in RNG.standard_normal((25, 9))]))
GIANT = unit(RNG.standard_normal(16) + 0.02 * RNG.standard_normal((3000, 16)))
CASES = {
    "random": RANDOM,
    "chain": unit([[np.cos(0.03 * k), np.sin(0.03 * k)] for k in RNG.permutation(150)]),
    "ties": np.concatenate([np.eye(6), -np.eye(6), np.eye(6)[:2]]).astype(np.float32),
    "identical": unit(RNG.standard_normal((4, 7)))[np.arange(200) % 4],
    "giant": GIANT[:250],
    "signed zeros": np.array([[1, 0, 0], [1, -0.0, 0], [0, 1, -0.0], [-0.0, 1, 0], [1, 0, -0.0], [0, 0, 1], [1, 0, 0]], dtype=np.float32),
    "last bits": np.array([[1, k * 2.0**-23] for k in (-4, -2, 0, 1, 2, 5, 9)], dtype=np.float32),
    "wide": unit(np.repeat(RNG.standard_normal((6, 70)), 8, axis=0) + 0.4 * RNG.standard_normal((48, 70)) * np.linspace(0, 1, 70)),
    "opposite": np.array([[1, 0], [-1, 0]], dtype=np.float32),
    "two": unit([[1, 0], [1, 0.1]]),
    "one": unit([[3, 4]]),
    "half precision": RANDOM[:80].astype(np.float16),
    "tensor": torch.from_numpy(RANDOM[:80]).double(),
    "half tensor": torch.from_numpy(RANDOM[:80]).half(),
}


@pytest.mark.parametrize("small", [False, True], ids=["one block", "many small blocks"])
@pytest.mark.parametrize("name", CASES)
def test_groups_equal_the_obvious_ones_at_every_threshold(name, small, monkeypatch):
    if small:
        monkeypatch.setattr(B, "_PAIRS", 40)  # settles often, so that levels and connected rows are skipped
    rows = np.asarray(CASES[name], dtype=np.float32)
    apart = distances_of(rows)
    linkage = B.link(CASES[name], most=2, finest=1e-3, memory_mb=1 if small else 1024)
    assert len(linkage.edges) == len(linkage.distances) < len(rows) and (np.diff(linkage.distances) >= 0).all()
    assert (apart[linkage.edges[:, 0], linkage.edges[:, 1]] == linkage.distances).all() and (linkage.distances < 2).all()
    seen = np.unique(apart[(apart > 0.001) & (apart < 2)])
    seen = np.concatenate([seen[:: max(len(seen) // 12, 1)], linkage.distances[linkage.distances > 0.001][::25]])
    for threshold in np.concatenate([[linkage.finest, 0.01, 0.5, 2], seen, np.nextafter(seen, 3)]):
        expected = obvious_groups(apart, threshold)
        assert (linkage.groups(threshold) == expected).all(), threshold
        assert linkage.removed(threshold) == len(rows) - expected.max() - 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threshold", [2.0**-22, 0.05, 0.7, 2**0.5, 2.0])
def test_what_stays_is_the_row_nearest_to_its_groups_mean(name, threshold):
    rows = np.asarray(CASES[name], dtype=np.float32)
    balance = B.semantic_balance(CASES[name], threshold)
    assert (balance.group.numpy() == obvious_groups(distances_of(rows), threshold)).all()
    expected = []
    for k in range(int(balance.group.max()) + 1):
        own = np.flatnonzero(balance.group.numpy() == k)
        away = ((rows[own].astype(np.float64) - rows[own].astype(np.float64).mean(axis=0)) ** 2).sum(axis=1)
        expected.append(own[np.flatnonzero(away <= away.min() + 1e-12)[0]])
        assert len(own) != 2 or expected[-1] == own[0], "of a pair the first stays"
    assert balance.keep.tolist() == sorted(expected)
    removed = B.link(CASES[name], most=threshold, finest=threshold).removed(threshold)
    assert removed == len(balance.group) - len(balance.keep) == round(balance.removed_share * len(rows))
    assert balance.sizes().sum() == len(rows) and all(g[0] in balance.keep for g in balance.largest(3))


def test_a_threshold_that_is_a_distance_does_not_join():
    distance = B.exact_distances(RANDOM, np.array([0]), np.array([1]))[0]
    assert B.semantic_balance(RANDOM[:2], distance).group.tolist() == [0, 1]
    assert B.semantic_balance(RANDOM[:2], np.nextafter(distance, 3)).group.tolist() == [0, 0]


def test_rows_whose_digests_collide_are_told_apart(monkeypatch):
    class Same:
        integers = staticmethod(lambda low, high, size, dtype: np.zeros(size, dtype))

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Same)
    assert B.link(np.eye(5, dtype=np.float32)[[0, 1, 0, 2, 1]], 1.0).groups(0.5).tolist() == [0, 1, 0, 2, 1]


def test_thousands_of_copies_are_one_group():
    assert (B.link(CASES["identical"][np.arange(9000) % 4], most=0.5).groups(0.01) == np.arange(9000) % 4).all()


def test_pairs_at_the_very_edge_are_not_lost_to_rounding():
    "Wide rows, of which products in single precision err most; every pair alone, at the least threshold that joins it"
    rows = unit(np.abs(np.random.default_rng(2).standard_normal((40, 1024))) ** 3)
    for i, j in np.random.default_rng(3).integers(0, 20, (60, 2)) * 2 + [0, 1]:
        most = np.nextafter(B.exact_distances(rows, np.array([i]), np.array([j]))[0], 3)
        assert B.link(rows[[i, j]], most=most).removed(most) == 1


COARSE = dict(exact_up_to=0, probes=1)


@pytest.mark.parametrize("parts,options", [(1, {}), (2, {}), (7, {}), (1, COARSE), (3, COARSE)])
def test_blocks_and_parts_change_nothing(parts, options, monkeypatch):
    rows = unit(np.concatenate([GIANT[:700, :9], RANDOM, GIANT[:400, 1:10], RANDOM[:50]]))
    options = dict(most=1.0, finest=1e-3) | options
    whole = B.link(rows, **options)
    shares = [B.link(rows, memory_mb=1, part=(k, parts), **options) for k in range(parts)]
    monkeypatch.setattr(B, "_PAIRS", 99)
    shares[0] = B.link(rows, memory_mb=1, part=(0, parts), **options)
    joined = B.join_linkages(shares[::-1])
    assert (joined.distances == whole.distances).all()
    for threshold in (0.01, 0.02, 0.1, 0.3, 1.0):
        assert (joined.groups(threshold) == whole.groups(threshold)).all()
    assert joined.recall == whole.recall


@pytest.mark.parametrize("threshold", [0.01, 0.02])
def test_pairs_closer_than_the_default_finest_are_not_forgotten(threshold):
    rows = unit(1 + 0.3 * np.random.default_rng(4).standard_normal((300, 8)))
    rows = unit(np.concatenate([rows, rows + np.eye(8)[0] * 0.005]))
    groups = B.link(rows, most=1.0, memory_mb=1).groups(threshold)
    assert (groups == obvious_groups(distances_of(rows), threshold)).all()


@pytest.mark.parametrize("name", ["random", "chain", "ties", "signed zeros"])
def test_the_order_of_the_rows_changes_nothing(name):
    order = np.random.default_rng(1).permutation(len(CASES[name]))
    plain, turned = B.link(CASES[name], most=2), B.link(CASES[name][order], most=2)
    assert (plain.distances == turned.distances).all()
    for threshold in (0.01, 0.3, 2**0.5, 2.0):
        one, two = plain.groups(threshold)[order], turned.groups(threshold)
        assert len(set(zip(one.tolist(), two.tolist(), strict=True))) == one.max() + 1 == two.max() + 1


def test_a_giant_group_waits_in_bounded_memory(monkeypatch):
    waited, sides, settle, near = [], [], B.GrowingForest.settle, B.NearPairs.near
    monkeypatch.setattr(B, "_PAIRS", 2000)

    def counted(self):
        waited.append((self.count, sum(len(edges) for edges, _ in self.waiting), self.room))
        settle(self)

    def sized(self, one, other, *more):
        sides.append(max(one.stop - one.start, other.stop - other.start))
        return near(self, one, other, *more)

    monkeypatch.setattr(B.GrowingForest, "settle", counted)
    monkeypatch.setattr(B.NearPairs, "near", sized)
    tracemalloc.start()
    linkage = B.link(GIANT, most=2, finest=1e-4, memory_mb=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert linkage.removed(2) == 2999 and len(linkage.edges) == 2999 and linkage.groups(2).max() == 0
    assert len(waited) > 1
    assert all(count == true <= room + 2000 and room <= 4096 for count, true, room in waited)
    assert max(sides) <= 128 and peak < 3000 * 3000 // 2, "not even a bit of every pair"


@pytest.mark.parametrize("probes", [1, 3, 20])
def test_a_coarse_partition_says_what_it_misses(probes, monkeypatch):
    rng = np.random.default_rng(6)
    rows = unit(np.repeat(rng.standard_normal((200, 24)), 10, axis=0) + 0.12 * rng.standard_normal((2000, 24)))
    offered, offer = set(), B.GrowingForest.offer

    def watched(self, i, j, low):
        offered.update(zip(i.tolist(), j.tolist(), strict=True))
        offer(self, i, j, low)

    monkeypatch.setattr(B.GrowingForest, "offer", watched)
    monkeypatch.setattr(B._Cells.__init__, "__defaults__", (100,))  # rows a cell
    coarse = B.link(rows, most=0.8, exact_up_to=0, probes=probes)
    monkeypatch.setattr(B._recall, "__defaults__", (len(rows),))  # rows in the sample
    whole_sample = B.link(rows, most=0.8, exact_up_to=0, probes=probes).recall
    monkeypatch.undo()
    exact, squared = B.link(rows, most=0.8), 2 - 2 * rows.astype(np.float64) @ rows.T
    true = set(zip(*(side.tolist() for side in np.nonzero(np.triu(squared < 0.64, 1))), strict=True))
    recall = len(true & offered) / len(true)
    assert np.isclose(whole_sample, recall, rtol=1e-9) and abs(coarse.recall - recall) < 0.04 and exact.recall == 1
    assert (coarse.recall == 1) == (probes == 20), "twenty cells in all"
    i, j = coarse.edges.T
    assert (B.exact_distances(rows, i, j) == coarse.distances).all() and (coarse.distances < 0.8).all()
    for threshold in (0.3, 0.5, 0.65, 0.8):
        groups, allowed = coarse.groups(threshold), exact.groups(threshold)
        assert len(set(zip(groups.tolist(), allowed.tolist(), strict=True))) == groups.max() + 1 >= allowed.max() + 1
        assert probes < 20 or (groups == allowed).all()
    assert B.balance_at(coarse, rows, 0.8).recall == coarse.recall


WRONG = [
    (lambda: B.link(2 * RANDOM, 1.0), r"unit rows; row \d+ has length 2: divide each row by its length"),
    (lambda: B.link(np.where(np.arange(250)[:, None] == 7, np.nan, RANDOM), 1.0), "row 7 has length nan"),
    (lambda: B.link(RANDOM[0], 1.0), r"\(N, D\) with at least one row; they are \(9,\)"),
    (lambda: B.link(RANDOM[None], 1.0), r"they are \(1, 250, 9\)"),
    (lambda: B.link(RANDOM[:0], 1.0), r"they are \(0, 9\)"),
    (lambda: B.link(RANDOM, 2.1), "most=2.1.* above 0, at most 2"),
    (lambda: B.link(RANDOM, 1.0, finest=0), "finest=0 .* above 0"),
    (lambda: B.semantic_balance(RANDOM, 0), "threshold=0 .* above 0 and at most 2"),
    (lambda: B.semantic_balance(RANDOM, float("nan")), "threshold=nan .* above 0"),
    (lambda: B.link(RANDOM, 1.0).groups(1.1), "threshold=1.1 .* from 0.01 to 1$"),
    (lambda: B.link(RANDOM, 1.0).removed(0.001), "threshold=0.001 .* from 0.01 to 1$"),
    (lambda: B.link(RANDOM, 1.0).threshold_for(1.0), "share=1 .* between 0 and 1"),
    (lambda: B.link(RANDOM[::10], 0.2).threshold_for(0.5), "no threshold up to largest_threshold=0.2 removes 50.0%: 0.0% at most"),
    (lambda: B.balance_at(B.link(RANDOM, 1.0), RANDOM[:9], 0.5), "250 rows, embeddings has 9"),
    (lambda: B.usable_threshold(B.link(RANDOM, 1.0), 0.011), "would remove nothing: the nearest two images are 0"),
    (lambda: B.usable_threshold(B.link(RANDOM[::10], 0.2), 0.1), "would remove nothing: no two images are closer than 0.2"),
    (lambda: B.usable_threshold(B.link(GIANT[:99], 1.0), 0.9), "would remove everything: all images are one group"),
    (lambda: B.cluster(RANDOM, 251), "k=251 .* 250 rows, so k must be from 1 to 250"),
    (lambda: B.cluster(RANDOM, 0), "k=0 .* from 1 to 250"),
    (lambda: B.cluster(unit(np.eye(6))[[0] * 8 + [1, 2, 3, 4]], 6), "k=6 .* only 5 of the 12 rows differ"),
    (lambda: B.write_balanced(DataReport(()), [], balance_of([0]), "", form="tar"), "form='tar' .* 'index' or 'shards'"),
    (lambda: B.join_linkages([B.link(RANDOM, 1.0), B.link(RANDOM, 0.9)]), "not parts of one: number of rows, finest and most"),
    (lambda: B.usable_threshold(B.link(CASES["two"], 1.0), 0.5), "would remove everything"),
    (lambda: B.link(RANDOM, 1.0, part=(3, 2)), "part"),
    (lambda: B.link(RANDOM, 2.0).threshold_for(0.001), "least"),
    (lambda: B.cluster(RANDOM[[0, 30]].repeat(6, axis=0), 10), "only 2 of the 12 rows differ"),
    (lambda: B.write_balanced(DataReport(()), ["nowhere/1"], balance_of([0]), "", progress=False), "nowhere/1"),
]  # fmt: skip


@pytest.mark.parametrize("call,words", WRONG)
def test_what_is_wrong_is_named_with_what_is_valid(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("share", [0.004, 0.1, 0.437, 0.9])
def test_the_threshold_for_a_share_removes_that_share(share):
    linkage = B.link(RANDOM, most=2.0)
    assert linkage.removed(linkage.threshold_for(share)) == linkage.removed(B.usable_threshold(linkage, share=share)) == round(share * 250)
    twins = B.link(CASES["identical"], most=2.0)
    assert twins.threshold_for(0.1) == twins.finest and twins.removed(twins.finest) == 196


def test_a_saved_linkage_is_the_same(tmp_path):
    linkage = replace(B.link(RANDOM, most=1.7, finest=0.1), recall=1 / 3)
    linkage.save(tmp_path / "linkage.safetensors")
    read = B.load_linkage(tmp_path / "linkage.safetensors")
    assert (read.count, read.finest, read.most, read.recall) == (250, 0.1, 1.7, 1 / 3)
    assert (read.edges == linkage.edges).all() and (read.distances == linkage.distances).all()


def test_what_each_class_loses_adds_up():
    balance, labels = B.semantic_balance(RANDOM, 0.5), np.repeat([3, 0, -1, 1, 0], 50)
    table, stays = B.lost_per_class(balance, labels, ("a", "b")), set(balance.keep.tolist())
    assert table["images"].to_dict() == {"a": 100, "b": 50, "class 3": 50} and table["images"].is_monotonic_increasing
    for name, k in (("a", 0), ("b", 1), ("class 3", 3)):
        assert table.loc[name, "kept"] == sum(row in stays for row in np.flatnonzero(labels == k))
    assert sorted(B.lost_per_class(balance, labels).index) == ["class 0", "class 1", "class 3"]
    unlabelled = sum(100 <= row < 150 for row in stays)
    assert table["kept"].sum() + unlabelled == len(stays) and np.allclose(table["removed"], 1 - table["kept"] / table["images"])
    assert B.plot_balance(B.link(RANDOM, 1.0), 0.5).axes[0].texts[0].get_text() == f"0.5: {balance.removed_share:.1%}"


# data


@pytest.fixture
def shards(tmp_path):
    "Three shards, one compressed, one with captions in JSON; 19 samples"
    (tmp_path / "in").mkdir()
    tar(tmp_path / "in" / "a.tar", members(range(6)))
    tar(tmp_path / "in" / "b.tar.gz", members(range(6, 12)))
    markup = [(f"{n:05d}.{end}", value) for n in range(12, 18) for end, value in
              (("jpg", picture(n)), ("json", b'{"caption": "in JSON", "cls": 1}'))]  # fmt: skip
    tar(tmp_path / "in" / "c.tar", [*markup, ("00099.jpg", picture(99)), ("00099.txt", b"<b onclick='x'>\"&")])
    return inspect_shards(tmp_path / "in", progress=False)


def names(report):
    return [f"{shard.name}/{sample['__key__']}" for shard in report.usable for sample in raw_samples(shard.path)]


def test_indices_and_shards_leave_the_same_samples_byte_for_byte(shards, tmp_path):
    keys, balance = names(shards), balance_of(np.r_[np.arange(6).repeat(2), np.full(7, 6)])
    chosen = [keys[row] for row in balance.keep.tolist()]
    wanted = {f"{shard.name}/{s['__key__']}": {k: v for k, v in s.items() if k[0] != "_"} for shard in shards.usable
              for s in raw_samples(shard.path)}  # fmt: skip
    left = {}
    for form in ("index", "shards"):
        files = B.write_balanced(shards, keys, balance, tmp_path / form, form, progress=False)
        report = inspect_shards(files, cache=False, progress=False)
        assert names(report) == chosen and report.total == len(chosen) and not report.damaged
        pairs = left[form] = load_pairs(report)
        for shard in report.usable:
            for sample in raw_samples(shard.path):
                fields = {k: v for k, v in sample.items() if k[0] != "_"}
                assert fields == wanted[f"{shard.name}/{sample['__key__']}"]
        about = json.loads((tmp_path / form / "balance.json").read_text())
        assert (about["images"], about["kept"], about["threshold"]) == (19, 7, 0.3) and about["fingerprint"] == shards.fingerprint
        assert pairs.captions == left["index"].captions and pairs.labels == left["index"].labels
    with tarfile.open(tmp_path / "shards" / "b.tar") as file:
        assert file.getnames() == [f"{n:05d}.{end}" for n in (6, 8, 10) for end in ("cls", "jpg", "txt")]


def test_an_index_whose_shard_changed_is_reported_damaged(shards, tmp_path):
    files = B.write_balanced(shards, names(shards), balance_of(np.arange(19)), tmp_path / "out", progress=False)
    tar(tmp_path / "in" / "a.tar", members(range(1, 7)))
    (tmp_path / "in" / "c.tar").unlink()
    report = inspect_shards(files, progress=False)
    assert [shard.name for shard in report.usable] == ["b"]
    assert "changed since the index was made" in report.damaged[0].problem and "c.tar is gone" in report.damaged[1].problem


def test_a_gallery_shows_markup_as_text_and_what_stays_first(shards):
    keys = names(shards)
    balance = B.Balance(torch.tensor([0] * 17 + [1, 1]), torch.tensor([3, 18]), 0.3)
    page = B.gallery(shards, keys, balance, groups=2, each=4).data
    assert "<b onclick" not in page and "&lt;b onclick=&#x27;x&#x27;&gt;&quot;&amp;" in page
    assert page.count("<img") == 6 and page.count("outline") == 2
    assert page.index("picture 3") < page.index("picture 0") < page.index("picture 1") and "17 images" in page
    assert "No two images" in B.gallery(shards, keys, balance_of(np.arange(19))).data


# clusters


@pytest.mark.parametrize("k", [1, 2, 30, 250])
def test_clusters_have_unit_centres_near_rows_and_none_is_empty(k):
    rows = torch.from_numpy(RANDOM)
    found, again = B.cluster(rows, k), B.cluster(RANDOM, k)
    assert found.centers.shape == (k, 9) and torch.allclose(found.centers.norm(dim=1), torch.ones(k), atol=1e-5)
    assert torch.equal(found.assignment, (rows @ found.centers.T).argmax(dim=1)) and len(found.assignment.unique()) == k
    assert torch.equal(found.centers, again.centers) and torch.equal(found.assignment, again.assignment)
    if k == 30:
        other = B.cluster(RANDOM, k, seed=1)
        assert not torch.equal(other.centers, found.centers)
        best = torch.stack([torch.nn.functional.normalize(rows[found.assignment == c].mean(dim=0), dim=0) for c in range(k)])
        assert (best * found.centers).sum(dim=1).median() > 0.999, "a centre is its rows' mean direction"


def blobs(sizes, width, noise, seed):
    "Rows around as many directions at right angles to each other, and which is whose"
    rng, labels = np.random.default_rng(seed), np.repeat(np.arange(len(sizes)), sizes)
    directions = np.linalg.qr(rng.standard_normal((width, len(sizes))))[0].T
    order = rng.permutation(len(labels))
    return unit(directions[labels] + noise / np.sqrt(width) * rng.standard_normal((len(labels), width)))[order], labels[order]


@pytest.mark.parametrize(
    "sizes, noise",
    [([40] * 8, 0.1), ([40] * 8, 0.3), ([400, 200, 100, 50, 30, 20, 15, 12], 0.1)],
    ids=["even", "noisy", "uneven"],
)
def test_eight_clear_blobs_are_found_whatever_the_seed(sizes, noise):
    for seed in range(20):
        rows, labels = blobs(sizes, 24, noise, seed)
        assert adjusted_mutual_info_score(labels, B.cluster(rows, 8, seed).assignment) == pytest.approx(1.0), seed


def test_clusters_are_as_tight_as_another_k_means_finds_them():
    rows = unit(np.random.default_rng(5).standard_normal((1500, 24)))
    tightness = lambda centers: float(1 - B.nearest_center(torch.from_numpy(rows), centers)[1].mean())  # noqa: E731
    for seed in range(3):
        theirs = torch.from_numpy(KMeans(40, n_init=1, max_iter=30, random_state=seed).fit(rows).cluster_centers_)
        theirs = torch.nn.functional.normalize(theirs.float(), dim=1)
        assert tightness(B.cluster(rows, 40, seed).centers) <= 1.02 * tightness(theirs)


def test_starting_points_are_distinct_rows_in_whatever_part_of_many_rows():
    rows = unit(np.random.default_rng(6).standard_normal((400, 5)))
    counts = np.ones(400, dtype=np.int64)
    for k in (1, 2, 17, 399, 400):
        assert len(set(B._starting_rows(rows, counts, k, 0).tolist())) == k
    some = B._starting_rows(rows, counts, 3, 0, most=10)
    assert len(set(some.tolist())) == 3, "192 of the 400 rows are looked at"
    assert (B._starting_rows(rows, counts, 30, 1) == B._starting_rows(rows, counts, 30, 1)).all()
    alike = np.repeat(rows[:1], 6, axis=0) + np.float32(1e-7) * np.arange(30, dtype=np.float32).reshape(6, 5)
    assert sorted(B._starting_rows(alike, counts[:6], 6, 0)) == list(range(6)), "also where single precision tells nothing apart"


def test_a_row_that_occurs_often_weighs_as_much():
    rows = unit(np.array([[1, 0, 0], [0, 1, 0], [0, 0.8, 0.6]]))
    heavy = B._starting_rows(rows, np.array([1, 1000, 1000]), 2, 0)
    assert set(heavy.tolist()) == {1, 2}, "the two that stand for most rows, though they are the nearest pair"


@pytest.fixture
def poor(monkeypatch):
    "k-means that leaves all but three centres where no row is"
    import faiss

    train = faiss.Kmeans.train

    def badly(self, rows, **options):
        train(self, rows, **options)
        self.centroids[3:] = -rows.mean(axis=0)

    monkeypatch.setattr(faiss.Kmeans, "train", badly)


def test_centres_that_no_row_is_nearest_to_move_to_rows(poor):
    rows = GIANT[:40]
    found = B.cluster(rows, 8)
    assert torch.bincount(found.assignment, minlength=8).min() >= 1
    assert torch.equal(found.assignment, (torch.from_numpy(rows) @ found.centers.T).argmax(dim=1))
    assert torch.allclose(found.centers.norm(dim=1), torch.ones(8), atol=1e-5)
    farthest = (torch.from_numpy(rows) @ found.centers[:3].T).amax(dim=1).argmin()
    moved = (found.centers[3:] - torch.from_numpy(rows)[farthest]).norm(dim=1)
    assert moved.min() < 1e-6, "the first to get a centre of its own"


@pytest.mark.parametrize("chunk", [1, 70, 333, 1 << 26])
def test_chunks_of_cosines_change_nothing(chunk):
    rows, centers = torch.from_numpy(RANDOM), torch.from_numpy(RANDOM[::7])
    which, cosine = B.nearest_center(rows, centers, chunk)
    assert torch.equal(which, (rows @ centers.T).argmax(dim=1)) and torch.allclose(cosine, (rows @ centers.T).amax(dim=1), atol=1e-6)


def test_the_default_number_of_clusters():
    assert [B.default_clusters(n) for n in (1, 64, 128, 1000, 40_000, 400_000_000)] == [2, 2, 4, 31, 256, 1_000_000]


def test_a_linkage_up_to_a_measured_distance_can_be_read_again(tmp_path):
    linkage = B.link(RANDOM, most=np.float64(0.5))
    linkage.save(tmp_path / "linkage.safetensors")
    assert B.load_linkage(tmp_path / "linkage.safetensors").most == 0.5


def test_two_classes_of_one_name_are_both_counted():
    table = B.lost_per_class(balance_of([0, 0, 1, 2]), [0, 0, 1, 2], ("crane", "crane", "maillot"))
    assert table["images"].sum() == 4


def test_rows_that_nearly_agree_can_each_be_a_cluster():
    rows = unit(1 + 1e-5 * np.random.default_rng(7).standard_normal((6, 6)))
    assert len(B.cluster(rows, 6).assignment.unique()) == 6


def test_a_centre_that_moved_to_a_row_is_a_unit_row(poor):
    assert torch.allclose(B.cluster(RANDOM * np.float32(1.008), 8).centers.norm(dim=1), torch.ones(8), atol=1e-5)


def test_a_gallery_shows_captions_that_are_in_json(shards):
    assert B.find_pictures(shards, ["c/00012"])["c/00012"][1] == "in JSON"


def test_a_folder_that_is_written_again_holds_the_later_balance(shards, tmp_path):
    keys = names(shards)
    for groups in (np.arange(19), np.zeros(19, dtype=int)):
        B.write_balanced(shards, keys, balance_of(groups), tmp_path / "out", progress=False)
    assert inspect_shards(tmp_path / "out", progress=False).total == 1


@pytest.fixture
def store(shards, tiny_teacher, tmp_path):
    teacher = load_model(tiny_teacher, "cpu")
    store = FeatureStore(shards, store_key(teacher), tmp_path / "store")
    fill(store, teacher, ["image"], progress=False)
    return store


@pytest.mark.parametrize("form", ["index", "shards"])
@pytest.mark.parametrize("groups", [np.arange(19) // 3, np.arange(19) // 12, np.arange(19)])
def test_names_read_shard_by_shard_leave_the_same_bytes(store, shards, tmp_path, form, groups):
    stored, balance = load(store), balance_of(groups)
    files = {}
    for name, keys in (("list", stored.keys), ("names", StoredKeys(store))):
        written = B.write_balanced(shards, keys, balance, tmp_path / name, form, progress=False)
        assert written == sorted(written) and all(path.exists() for path in written)
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert files["list"] == files["names"] and len(files["list"]) > 1


def test_a_store_of_other_rows_or_shards_leaves_nothing(store, shards, tmp_path):
    with pytest.raises(ValueError, match="the balance is of 20 rows, and the store has 19"):
        B.write_balanced(shards, StoredKeys(store), balance_of(np.arange(20)), tmp_path / "out", progress=False)
    fewer = DataReport(shards.shards[:2])
    with pytest.raises(ValueError, match="c/00012 is of none of these shards: a, b"):
        B.write_balanced(fewer, StoredKeys(store), balance_of(np.arange(19)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    pictures = B.gallery(shards, StoredKeys(store), balance_of(np.arange(19) // 10), groups=2)
    assert pictures.data.count("<img") == 16
