"""CLIP-CID as a job: what it prepares, what it refuses, and that a killed one ends as if undisturbed."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import TINY, in_two_processes, lines_of

from vlkd_lab.balancing import nearest_center
from vlkd_lab.data import inspect_shards, load_pairs
from vlkd_lab.engines import job_progress
from vlkd_lab.evaluation import compare, finish, probe_table
from vlkd_lab.features import Features
from vlkd_lab.losses import ClusterTerms, cluster_classification
from vlkd_lab.methods import tinyclip
from vlkd_lab.methods.clip_cid import ClipCid, cid_objective, open_clip_cid
from vlkd_lab.models import image_tower, load_model, new_model, save_model
from vlkd_lab.runs import Run, kept_snapshots, newest_snapshot, read_snapshot
from vlkd_lab.stores import FeatureStore, fill, store_key
from vlkd_lab.trainers import check_parameters, train


@pytest.fixture
def tiny(scenes, tiny_teacher, tmp_path):
    "Parameters of a job that takes seconds"
    given = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", teacher=str(tiny_teacher), device="cpu")
    given |= dict(steps=6, batch_size=16, warmup=2, validate_every=3, validate_pairs=40, map_images=24, clusters=6, removed_share=0.3)
    return given | dict(out=str(tmp_path / "run"), compare_scratch=False)


def job_of(tiny, **changes):
    return open_clip_cid(check_parameters(ClipCid, tiny | changes))


def test_what_the_job_prepares_is_what_it_trains_on(tiny):
    job = job_of(tiny)
    train(job)
    kept = {job.stored.keys[row] for row in job.balance.keep.tolist()}
    assert job.balanced.total == len(kept) == 120 - job.linkage.removed(job.threshold) == 84
    assert {key for batch, _ in zip(job.batches(0), range(12), strict=False) for key in batch.keys} <= kept
    found = read_snapshot(job.run.folder / "clusters.safetensors")[0]
    assert found["sizes"].sum() == 84 and found["sizes"].min() > 0 and np.allclose(np.linalg.norm(found["centers"], axis=1), 1, atol=1e-5)
    arrays, labels = newest_snapshot(job.run)
    again = nearest_center(torch.from_numpy(arrays["clusters_student"]).float(), torch.from_numpy(found["centers"]))[0]
    assert (again.numpy() == arrays["clusters_assignment"]).mean() > 0.9 and labels["stage"] == "student"
    events = [line for line in job.run.metrics() if line.get("event") == "validation"]
    assert len(events) == 3 and all(0 <= event["cluster_agreement"] <= 1 for event in events)
    table = compare(job)
    assert list(table.index) == ["teacher", "student"] and set(finish(job, table)["models"]) == {"teacher", "student"}
    assert job.run.status()["state"] == "finished"


def test_each_half_can_be_used_alone(tiny, tmp_path):
    whole = job_of(tiny, removed_share=0.0)
    assert whole.balanced.total == 120 and not (whole.run.folder / "balanced").exists()
    assert not (whole.run.folder / "balance.html").exists(), "nothing goes"
    job = job_of(tiny, out=str(tmp_path / "half"))
    assert job.balanced.total == 84
    pairs = load_pairs(inspect_shards(job.run.folder / "balanced"))
    assert len(pairs) == 84 and set(pairs.keys) == {job.stored.keys[row] for row in job.balance.keep.tolist()}
    other = tinyclip.open_tinyclip(
        tinyclip.TinyCLIP(
            **{k: tiny[k] for k in ("val", "teacher", "device", "batch_size")}, data=f"{job.run.folder}/balanced", out=f"{tmp_path}/t"
        )
    )
    assert other.report.total == 84, "any job takes the balanced data"


def test_an_engine_leaves_out_what_this_process_would_and_finds_clusters(tiny, tmp_path):
    from distributed import LocalCluster

    plain = job_of(tiny)
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address=":0", silence_logs=50) as cluster:
        engines = dict(local=dict(engine_workers=1), dask=dict(engine_address=cluster.scheduler_address))
        jobs = {name: job_of(tiny, engine=name, out=str(tmp_path / name), **given) for name, given in engines.items()}
        for job in jobs.values():
            train(job)
            assert torch.equal(job.balance.keep, plain.balance.keep) and job.balanced.total == plain.balanced.total == 84
            assert not (job.run.folder / "curation").exists(), "rows that were sorted anew are not left behind"
            told = job_progress(job.run.folder)
            assert [each["job"].split(" at ")[0] for each in told] == ["near-duplicates", "who stays", "6 clusters"]
            assert {each["state"] for each in told} == {"finished"} and told[0]["recall"] == 1
            page = (job.run.folder / "balance.html").read_text(encoding="utf-8")
            assert "30.0% of 120 images go" in page and "all 120 images" in page and "data:image/jpeg" in page
            assert f"<td>engine</td><td>{job.options.engine}</td>" in page
    found = [read_snapshot(job.run.folder / "clusters.safetensors")[0] for job in jobs.values()]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in ("centers", "training", "sizes"))
    assert found[0]["sizes"].sum() == 84 and found[0]["sizes"].min() > 0 and len(found[0]["sizes"]) == 6
    whole = job_of(tiny, engine="local", removed_share=0.0, engine_workers=1, out=str(tmp_path / "whole"))
    assert len(whole.clusters.assignment) == 120


def test_what_a_killed_engine_left_of_features_that_were_written_again_is_made_anew(tiny, tmp_path, monkeypatch):
    given = dict(engine="local", engine_workers=1, out=str(tmp_path / "out"), features=str(tmp_path / "features"))

    def killed(*given):
        raise KeyboardInterrupt

    def begun():
        with monkeypatch.context() as changed:
            changed.setattr("vlkd_lab.curation.duplicates._join", killed)
            with pytest.raises(KeyboardInterrupt):
                _ = job_of(tiny, **given).linkage

    begun()
    job = job_of(tiny, **given)
    forests = {path: path.stat().st_mtime_ns for path in job.balancing.folder.glob("forest-*")}
    begun()
    assert forests == {path: path.stat().st_mtime_ns for path in job.balancing.folder.glob("forest-*")}, "nothing was lost"
    for path in (tmp_path / "features").glob("*.safetensors"):
        os.utime(path)
    groups = job.linkage.groups(0.5)
    assert np.array_equal(groups, job_of(tiny).linkage.groups(0.5)) and "written again since" in (job.run.folder / "status.json").read_text()
    assert not job.balancing.folder.exists()


@pytest.mark.parametrize("changes", [dict(class_share=0.4), dict(wide=True), dict(teacher_features="online", crop_scale=0.6)], ids=str)
def test_killed_in_the_middle_it_ends_as_if_undisturbed(changes, tiny, tiny_teacher, tmp_path, ends_as_if_undisturbed):
    if changes.pop("wide", False):
        config = json.loads((tiny_teacher / "open_clip_config.json").read_text())["model_cfg"] | dict(embed_dim=24)
        (tmp_path / "wide.json").write_text(json.dumps(config))
        changes = dict(student=str(tmp_path / "wide.json"))
    ends_as_if_undisturbed(lambda out: job_of(tiny | changes, checkpoint_seconds=0.0, out=out))


def test_a_second_start_finds_everything(tiny, monkeypatch):
    train(job_of(tiny))
    lines = lines_of(tiny["out"])
    for name in ("link", "cluster", "write_balanced"):
        monkeypatch.setattr(f"vlkd_lab.balancing.{name}", lambda *a, **k: pytest.fail("computed again"))
    monkeypatch.setattr("vlkd_lab.stores.encode_shard", lambda *a, **k: pytest.fail("encoded again"))
    train(job_of(tiny))
    assert lines_of(tiny["out"]) == lines


def test_stored_features_teach_as_the_teacher_does(tiny, tmp_path):
    train(job_of(tiny))
    train(job_of(tiny, teacher_features="online", out=str(tmp_path / "beside")))
    a, b = ([line["total"] for line in lines_of(out) if "total" in line] for out in (tiny["out"], tmp_path / "beside"))
    assert len(a) == 6 and a == pytest.approx(b, rel=2e-3)


def test_every_term_moves_the_student_and_its_scale_reaches_it(tiny, tmp_path):
    totals = {}
    for k, changes in enumerate(
        (
            {},
            dict(cluster_scale=8.0),
            dict(teacher_cluster_scale=8.0),
            dict(cluster_margin=0.3),
            dict(instance_scale=5.0),
            dict(losses="contrastive:1"),
        )
    ):
        job = job_of(tiny, out=str(tmp_path / str(k)), **changes)
        student = job.new_student()
        batch = next(job.batches(0))
        terms = cid_objective(job, student)(student.encode(batch), job.source.encode(batch))
        totals[str(changes)] = {name: value.item() for name, value in terms.values.items()}
    plain = totals["{}"]
    differs = {key: {name for name in plain if name in found and found[name] != plain[name]} for key, found in totals.items()}
    assert differs["{'cluster_scale': 8.0}"] == {"cluster_classification", "cluster_distribution"}
    assert differs["{'teacher_cluster_scale': 8.0}"] == {"cluster_distribution"}
    assert differs["{'cluster_margin': 0.3}"] == {"cluster_classification"}
    assert differs["{'instance_scale': 5.0}"] == {"instance_discrimination"}
    assert set(totals["{'losses': 'contrastive:1'}"]) == {"contrastive"}


def test_a_student_that_cannot_work_is_refused_before_anything_is_computed(tiny, tmp_path):
    text = TINY["text_cfg"] | dict(width=16, heads=2)
    vit = dict(timm_model_name="test_vit3", timm_model_pretrained=False, timm_pool="", timm_proj="linear")
    mobile = image_tower("timm:mobilenetv3_small_050")
    for name, tower in (("vit", vit), ("mobile", mobile)):
        (tmp_path / f"{name}.json").write_text(json.dumps(TINY | dict(vision_cfg=tower, text_cfg=text)))
    for changes, message in (
        (dict(student=f"{tmp_path}/vit.json"), r"vit.json' takes no pictures of 32 pixels \(.*160.*\); .*: choose another image tower"),
        (dict(student=f"{tmp_path}/mobile.json", micro_batch=1), "mobile.json' cannot be trained on 1 picture of 32 pixels at once"),
        (dict(student="timm:resnet10t"), "no configuration 'timm:resnet10t'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            job_of(tiny, features=str(tmp_path / "store"), **changes)
        assert "\n" not in str(error.value)
        assert not Run(tiny["out"]).folder.exists() and not (tmp_path / "store").exists()
    train(job_of(tiny, student=f"{tmp_path}/mobile.json", micro_batch=8, steps=2))
    assert "visual.trunk.classifier.weight" in load_model(f"{tiny['out']}/student/student", "cpu").model.state_dict()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(threshold=1.9), "all images are one group"),
        (dict(removed_share=0.9999), "removed_share"),
        (dict(clusters=500), "there are 120 images"),
        (dict(clusters=100), "only 84 images are left"),
        (dict(crop_scale=0.5), "teacher_features='online'"),
        (dict(losses="cluster:1"), "cluster_classification"),
        (dict(inheritance="auto"), "'manual'"),
        (dict(cluster_margin=-1.0), "from 0 to 1.5"),
    ],
    ids=str,
)
def test_what_cannot_work_stops_with_a_line(changes, message, tiny):
    with pytest.raises(ValueError, match=message) as error:
        job = job_of(tiny, **changes)
        _ = job.balanced, job.clusters
    assert "\n" not in str(error.value) and not (Run(tiny["out"]).folder / "student").exists()


def test_a_threshold_below_every_distance_is_refused(tiny):
    nearest = job_of(tiny).linkage.distances[0]
    print("NEAREST", nearest)
    job = job_of(tiny, threshold=float(nearest) * 0.9, removed_share=0.0, out=tiny["out"] + "2")
    with pytest.raises(ValueError, match="nothing: the nearest two images are"):
        _ = job.balanced


def test_another_teachers_store_is_refused(tiny, tiny_teacher, tmp_path):
    teacher = load_model(tiny_teacher)
    other = new_model(teacher.config["model_cfg"], like=teacher, seed=9)
    save_model(other, tmp_path / "other")
    other = load_model(tmp_path / "other")
    report = inspect_shards(tiny["data"])
    fill(FeatureStore(report, store_key(other), tmp_path / "store"), other, progress=False)
    with pytest.raises(ValueError, match=r"holds features of the teacher .*other"):
        job_of(tiny, features=str(tmp_path / "store"))
    assert not Run(tiny["out"]).folder.exists(), "nothing is written"


def test_the_student_can_inherit(tiny, tmp_path):
    job = job_of(tiny, inheritance="manual")
    inherited, fresh = job.new_student().model.state_dict(), job.new_student(inherited=False).model.state_dict()
    rows = inherited["token_embedding.weight"]
    assert not torch.equal(rows, fresh["token_embedding.weight"])
    assert torch.equal(rows, job.teacher.model.state_dict()["token_embedding.weight"][:, : rows.shape[1]])


def test_the_command_line_starts_and_continues_it_in_two_processes(tiny):
    in_two_processes("ClipCid", tiny)


def test_linear_probes_on_every_label_set(tiny, tiny_teacher, scenes):
    train_pairs, val = load_pairs(tiny["data"]), load_pairs(tiny["val"])
    table = probe_table({"teacher": load_model(tiny_teacher)}, train_pairs, val)
    assert {"kind", "colour", "setting", "mean"} <= set(table.columns) and table.loc["teacher"].between(0, 1).all()
    assert table.loc["teacher", "mean"] == pytest.approx(table.drop(columns="mean").loc["teacher"].mean())
    part = val[:5]
    assert part.sets["colour"] == val.sets["colour"][:5] == val.labels[:5]


def test_snapshots_without_a_teacher_have_no_clusters(tiny):
    job = job_of(tiny, compare_scratch=True)
    train(job)
    found = {labels["stage"]: set(read_snapshot(path)[0]) for path, labels in kept_snapshots(job.run)}
    assert "clusters_student" in found["student"] and "clusters_student" not in found["scratch"]


@pytest.mark.parametrize("changes", [dict(cluster_positives=3), dict(cluster_positives=3, class_share=0.7, cluster_margin=0.3)], ids=str)
def test_several_positive_centres_have_mlcds_loss_in_a_job(changes, tiny, tmp_path):
    job = job_of(tiny, **changes)
    student, batch = job.new_student(), next(job.batches(0))
    with torch.no_grad():
        taught, seen = job.source.encode(batch), student.encode(batch)
        centers = job.clusters.centers
        cosines = (seen.image @ centers.T).double()
        near = (taught.image @ centers.T).topk(3, dim=1).indices.tolist()
    objective = cid_objective(job, student)
    objective.draw(11)
    found = objective(seen, taught)["cluster_classification"].item()
    sampled = set(range(6)) if "class_share" not in changes else {k for row in near for k in row}  # a batch has all but a few
    margin, losses = changes.get("cluster_margin", 0.0), []
    for k, own in enumerate(near):
        wrong = [np.exp(32 * cosines[k, c].item()) for c in sampled if c not in own]
        right = [np.exp(-32 * np.cos(np.arccos(cosines[k, c].item()) + margin)) for c in own]
        losses.append(np.log1p(sum(wrong)) + np.log1p(sum(right)))
    assert found == pytest.approx(np.mean(losses), rel=1e-4)
    train(job)
    lines = [line for line in lines_of(tiny["out"]) if "total" in line]
    assert len(lines) == 6 and lines[0]["cluster_classification"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_margins_beyond_the_far_side(tiny):
    "Three forms of ArcFace's margin, against numbers of one's own; they differ where an image lies on the far side"
    angles = np.deg2rad([20.0, 100.0, 165.0, 178.0])
    rows = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    centers = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    m, own = 0.4, torch.zeros(4, dtype=torch.long)
    forms = {
        "arcface": [np.cos(a + m) if a + m <= np.pi else np.cos(a) - m * np.sin(m) for a in angles],
        "flat": [np.cos(min(a + m, np.pi)) for a in angles],
        "cosine": [np.cos(a + m) for a in angles],
    }
    values = {}
    for form, cosines in forms.items():
        other = np.sin(angles)
        expected = np.mean([np.log(np.exp(4 * c) + np.exp(4 * o)) - 4 * c for c, o in zip(cosines, other, strict=True)])
        values[form] = cluster_classification(rows, centers, own, 4.0, m, beyond=form).item()
        assert values[form] == pytest.approx(expected, rel=1e-5)
        features = Features(rows, rows, torch.ones(()).double())
        terms = ClusterTerms(centers, 4.0, m, beyond=form)
        near = terms.assignment(rows)
        assert terms.classification(features, features) == cluster_classification(rows, centers, near, 4.0, m, beyond=form)
    assert values["arcface"] > values["flat"] > values["cosine"]
    job = job_of(tiny, margin_beyond="cosine", cluster_margin=1.5, steps=2)
    student = job.new_student()
    find = next(term for term in cid_objective(job, student).terms if term.name == "cluster_classification")
    rows = -job.clusters.centers[:2]  # on the far side of their own centres
    near = Features(job.clusters.centers[:2], job.clusters.centers[:2], torch.ones(()))
    expected = cluster_classification(rows, job.clusters.centers, torch.tensor([0, 1]), 32.0, 1.5, beyond="cosine")
    assert find.function(Features(rows, rows, torch.ones(())), near) == expected
    train(job)
    assert len([line for line in lines_of(tiny["out"]) if "total" in line]) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(cluster_positives=6), "cluster_positives=6 is not valid: there are clusters=6, and one of them must be wrong"),
        (dict(cluster_positives=8, clusters=0), "cluster_positives=8 is not valid: there are clusters=[2-8], and one of them"),
        (dict(cluster_positives=0), "at least 1"),
        (dict(margin_beyond="round"), "one of 'arcface', 'flat', 'cosine'"),
    ],
    ids=str,
)
def test_positives_and_margins_that_cannot_be(changes, message, tiny):
    with pytest.raises(ValueError, match=message):
        job_of(tiny, **changes)
    assert not Run(tiny["out"]).folder.exists()
