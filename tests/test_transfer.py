import io
import json
import math
import random
import tarfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vlkd_lab.data import Pairs, load_pairs
from vlkd_lab.evaluation import Classes, accuracy, classifier, encode_pairs, predict, probe_table
from vlkd_lab.models import load_model, new_model
from vlkd_lab.samples import HEADLINE, LABEL_SETS, SHIFTS
from vlkd_lab.transfer import (
    LabelledSet,
    Transfer,
    plot_transfer,
    robustness_table,
    scene_sets,
    shard_sets,
    shifted,
    transfer,
    zero_shot_table,
)


@pytest.fixture(scope="module")
def val(scenes):
    return load_pairs(f"{scenes}/val-000000.tar")


@pytest.fixture(scope="module")
def models(tiny_teacher):
    teacher = load_model(tiny_teacher, "cpu")
    return {"teacher": teacher, "student": new_model(teacher.config["model_cfg"], like=teacher, seed=7)}


def photographs(width, height, count=3, grey=False):
    "Smooth random pictures without labels"
    seen = []
    for k in range(count):
        coarse = np.random.default_rng(k).integers(0, 256, (4, 4) if grey else (4, 4, 3), dtype=np.uint8)
        seen.append(np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert("RGB")))
    return Pairs(tuple(seen), ("a",) * count, (None,) * count, tuple(f"s/{k}" for k in range(count)))


def by_hand(vlm, labelled):
    "Zero-shot accuracy, one picture after the other"
    rows, right, known = classifier(vlm, labelled.classes), 0, 0
    for k, label in enumerate(labelled.labels):
        if label is not None:
            said = predict(encode_pairs(vlm, labelled.pairs[[k]]).image, rows).item()
            right, known = right + (said == label), known + 1
    return right / known


def test_scenes_carry_eight_sets(val):
    sets = scene_sets(val)
    assert list(sets) == list(LABEL_SETS) and len(sets) == 8
    assert sets[HEADLINE].labels == val.labels and sets["kind"].classes.names == LABEL_SETS["kind"].names
    alone = val[[k for k, label in enumerate(val.sets["relation"]) if label is None]]
    assert set(sets) - set(scene_sets(alone)) == {"relation", "second kind"}
    with pytest.raises(ValueError, match="'mood'.*kind, colour"):
        scene_sets(replace(val, sets={"mood": val.labels}))
    with pytest.raises(ValueError, match="'size'.*label 2 of .*0 to 1"):
        scene_sets(replace(val, sets={"size": (0, 2, *[1] * 46)}))


def test_a_labelled_set_refuses_labels_that_do_not_fit(val):
    names = Classes(("a", "b", "c"))
    for labels, words in (((0,), "1 labels for 48"), ((None,) * 48, "none of its 48"), ((-1,) * 48, "label -1 of val.*0 to 2")):
        with pytest.raises(ValueError, match=words):
            LabelledSet(val, labels, names)
    with pytest.raises(ValueError, match="none of its 0 pairs"):
        LabelledSet(val[[]], (), names)


def _write(folder, classes, labels):
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for k, label in enumerate(labels):
            picture = io.BytesIO()
            Image.new("RGB", (20, 30), (9 * k, 0, 90)).save(picture, "PNG")
            members = {"png": picture.getvalue(), "txt": b"words"} | ({} if label is None else {"cls": str(label).encode()})
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{k:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    if classes:
        (folder / "classes.txt").write_text("\n".join(classes))
    return folder


def test_own_data_sets(tmp_path):
    good = _write(tmp_path / "good", ["cat", "dog"], [0, 1, None])
    (good / "templates.txt").write_text("my {}")
    found = shard_sets({"pets": good, "again": good / "a.tar"}, limit=2)
    assert found["pets"].labels == found["again"].labels == (0, 1)
    assert found["pets"].classes == Classes(("cat", "dog"), ("my {}",)) and list(found) == ["pets", "again"]
    assert shard_sets({"pets": good})["pets"].labels == (0, 1, None)
    for name, classes, labels, words in (
        ("birds", [], [0], "'birds': no classes.txt"),
        ("cars", ["a", "b"], [0, 2], "'cars': label 2 of a/001 .*0 to 1"),
        ("maps", ["a"], [None, None], "'maps': none of its 2 pairs has a label"),
    ):
        with pytest.raises(ValueError, match=words):
            shard_sets({name: _write(tmp_path / name, classes, labels)})


def test_zero_shot_is_the_slow_one(models, val):
    sets = scene_sets(val)
    sets = {name: sets[name] for name in ("kind", "relation")} | {"few": LabelledSet(val[:9], val.labels[:9], sets["colour"].classes)}
    table = zero_shot_table(models, sets)
    assert list(table.index) == ["teacher", "student"] and list(table.columns) == ["kind", "relation", "few", "mean"]
    for name, vlm in models.items():
        slow = [by_hand(vlm, labelled) for labelled in sets.values()]
        assert table.loc[name].tolist() == pytest.approx([*slow, sum(slow) / 3])
    many = LabelledSet(val[[*range(48)] * 6], sets["kind"].labels * 6, sets["kind"].classes)
    assert zero_shot_table(models, {"many": many})["many"].tolist() == table["kind"].tolist(), "more pictures than are seen at once"


def test_shared_pictures_are_seen_once_a_model(models, val):
    seen, sets = [], scene_sets(val) | {"few": LabelledSet(val[:9], val.labels[:9], scene_sets(val)["colour"].classes)}
    spies = [vlm.model.visual.register_forward_hook(lambda part, given, rows: seen.append(len(rows))) for vlm in models.values()]
    zero_shot_table(models, sets), robustness_table(models, sets, ("grey",))
    [spy.remove() for spy in spies]
    assert sum(seen) == 2 * (48 + 9) * (1 + 2)


def test_modes_are_restored_part_by_part(models, val):
    network, sets, during = models["student"].model, {"size": scene_sets(val)["size"]}, []
    network.train(), network.visual.ln_post.eval()
    before = [part.training for part in network.modules()]
    spy = network.visual.register_forward_hook(lambda *_: during.append(network.training))
    transfer(models, val, val, sets, shifts=("grey",))
    assert during and not any(during) and [part.training for part in network.modules()] == before
    fault = network.visual.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zero_shot_table(models, sets)
    assert [part.training for part in network.modules()] == before
    spy.remove(), fault.remove(), network.eval()


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_depends_on_seed_key_and_name_alone(val, shift):
    changed = shifted(val[:6], shift)
    for image, key, row in zip(changed.images, changed.keys, range(6), strict=True):
        assert (image == np.asarray(SHIFTS[shift](val.pil(row), random.Random(f"0/{key}/{shift}")))).all()
    backwards = shifted(val[[5, 3, 1]], shift)
    assert all((a == changed.images[k]).all() for a, k in zip(backwards.images, (5, 3, 1), strict=True))
    assert replace(changed, images=val[:6].images) == val[:6]
    chancy = shift not in ("sketch", "grey", "jpeg")
    other_key = shifted(replace(val[:1], keys=("other",)), shift)
    assert all((a.images[0] != changed.images[0]).any() == chancy for a in (shifted(val[:1], shift, seed=1), other_key))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (300, 20), (3, 7), (1, 1)])
def test_pictures_of_any_format(shift, size):
    for grey in (False, True):
        pairs = photographs(*size, grey=grey)
        changed = shifted(pairs, shift)
        assert all(image.shape == (size[1], size[0], 3) and image.dtype == np.uint8 for image in changed.images)
        if shift == "grey":
            assert all((image == image[..., :1]).all() for image in changed.images)
            assert not grey or all((a == b).all() for a, b in zip(changed.images, pairs.images, strict=True))


@pytest.mark.parametrize("size", [(40, 160), (160, 40)])
def test_lengths_follow_the_shorter_side(size):
    pairs = photographs(*size, count=12)
    lying = replace(pairs, images=tuple(image.transpose(1, 0, 2) for image in pairs.images))
    for a, b in zip(shifted(pairs, "blur").images, shifted(lying, "blur").images, strict=True):
        assert (a.transpose(1, 0, 2) == b).all(), "a picture on its side is blurred just as much"
    left, top = (size[0] - 40) // 2, (size[1] - 40) // 2
    for image, there in zip(pairs.images, shifted(pairs, "covered").images, strict=True):
        where = np.argwhere((image != there).any(axis=2))
        assert len(where) > 40 and (where >= (top, left)).all() and (where < (top + 40, left + 40)).all()


def test_robustness_is_the_slow_one(models, val):
    sets = {name: scene_sets(val)[name] for name in ("size", "setting")}
    table = robustness_table(models, sets, ("noise", "grey", "noise"), seed=5)
    assert list(table.columns) == ["unshifted", "noise", "grey", "average", "kept"]
    for name, vlm in models.items():
        slow = {"unshifted": val, "noise": shifted(val, "noise", 5), "grey": shifted(val, "grey", 5)}
        slow = {k: np.mean([by_hand(vlm, replace(labelled, pairs=pairs)) for labelled in sets.values()]) for k, pairs in slow.items()}
        assert table.loc[name, list(slow)].to_dict() == pytest.approx(slow)
        assert table.loc[name, "average"] == pytest.approx((slow["noise"] + slow["grey"]) / 2)
        assert table.loc[name, "kept"] == pytest.approx((slow["noise"] + slow["grey"]) / 2 / slow["unshifted"])
    none = robustness_table(models, sets, ())
    assert list(none.columns) == ["unshifted", "average", "kept"] and none["average"].isna().all()


def test_all_of_it(models, val, scenes):
    train = load_pairs(f"{scenes}/train-000000.tar")
    result = transfer(models, val, train, shifts=("jpeg",))
    pd.testing.assert_frame_equal(result.zero_shot, zero_shot_table(models, scene_sets(val)))
    pd.testing.assert_frame_equal(result.linear_probe, probe_table(models, train, val))
    pd.testing.assert_frame_equal(result.robustness, robustness_table(models, scene_sets(val), ("jpeg",)))
    stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert stored["zero_shot"]["student"]["kind"] == result.zero_shot.loc["student", "kind"] and set(stored["robustness"]) == set(models)
    assert transfer(models, val, shifts=()).linear_probe is None


def test_pairs_that_are_no_scenes(models, val):
    plain, names = replace(val, sets={}), Classes(LABEL_SETS[HEADLINE].names)
    own = transfer(models, plain, plain, classes=names, shifts=())
    assert list(own.zero_shot.columns) == list(own.linear_probe.columns) == ["class", "mean"]
    assert len(transfer(models, val, classes=names, shifts=()).zero_shot.columns) == 9, "scenes have more than their class"
    rows = classifier(models["student"], names)
    assert own.zero_shot.loc["student", "class"] == accuracy(predict(encode_pairs(models["student"], val).image, rows), val.labels)
    with pytest.raises(ValueError, match="known are kind"):
        transfer(models, plain)
    with pytest.raises(ValueError, match="train has none, val has 'kind'"):
        transfer(models, val, replace(plain, labels=(None,) * 48))


def test_nothing_is_encoded_when_something_is_wrong(val):
    sets, broken = scene_sets(val), {"m": None}
    for call, words in (
        (lambda: zero_shot_table({}, sets), "0 models and 8"),
        (lambda: zero_shot_table(broken, {}), "1 models and 0"),
        (lambda: zero_shot_table(broken, {"mean": sets["kind"]}), "'mean'"),
        (lambda: robustness_table(broken, sets, ("noise", "rain")), "'rain'.*noise, blur"),
        (lambda: transfer(broken, val, shifts=("rain",)), "'rain'"),
        (lambda: shifted(val, "rain"), "'rain'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_broken_model_scores_nan_and_spoils_no_other(models, val, tiny_teacher):
    broken = load_model(tiny_teacher, "cpu")
    with torch.no_grad():
        broken.model.visual.proj.fill_(math.nan)
    both = {"broken": broken, "teacher": models["teacher"]}
    result = transfer(both, val, val, shifts=("grey",))
    for table in result.tables.values():
        assert table.loc["broken"].isna().all() and table.loc["teacher"].notna().all()
    assert result.to_json()["robustness"]["broken"]["kept"] == "nan" and "—" in result._repr_html_() and "nan" not in result._repr_html_()
    assert plot_transfer(result) and plot_transfer(transfer({"broken": broken}, val, val, shifts=()))


def test_names_show_as_themselves():
    names = ["<script>alert(1)</script>", "$\\frac{$ & co", "\u202eevil"]
    table = pd.DataFrame(0.25, index=names, columns=["<img src=x onerror=alert(1)>", "$x_", "mean"])
    robust = pd.DataFrame(0.5, index=names, columns=["unshifted", "noise", "average", "kept"])
    result = Transfer(table, None, robust)
    page, figure = result._repr_html_(), plot_transfer(result)
    assert "<script" not in page and "<img" not in page and "\u202e" not in page and "&lt;script&gt;" in page
    assert page.count("25.0%") == 9 and page.count("50.0%") == 12 and page.count("<h4>") == 2
    figure.savefig(io.BytesIO())
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == names[:2] and len(figure.axes) == 2
    assert all(len(axis.lines) >= 4 for axis in figure.axes)
