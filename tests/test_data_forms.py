"A job on data of many forms: it trains, sees the right pixels and texts, and names what is bad"

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vlkd_lab import trainers
from vlkd_lab.data import PairStream, View, find_images, find_sentences, inspect_shards, raw_samples
from vlkd_lab.evaluation import find_classes
from vlkd_lab.methods.clip_cid import ClipCid, open_clip_cid
from vlkd_lab.methods.contrastive import Contrastive, open_contrastive, read_captions
from vlkd_lab.methods.dime_fm import DimeFm, open_dime_fm
from vlkd_lab.methods.tinyclip import TinyCLIP, open_tinyclip
from vlkd_lab.runs import Run
from vlkd_lab.trainers import check_parameters, find_data, train

SIDE, COUNT = 32, 14


def value(k):
    "The grey of picture number k"
    return 10 + 15 * k


def plain(k):
    return Image.new("RGB", (SIDE, SIDE), (value(k),) * 3)


def sixteen(k):
    return Image.fromarray(np.full((SIDE, SIDE), value(k) * 257, np.uint16))


def clear(k):
    "Black with the opacity that leaves the grey on white; elsewhere colours that must not be seen"
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255 - value(k)))
    image.paste((255, 0, 0, 0), (0, 0, SIDE, 4))
    return image


def turned(k):
    "White above, stored sideways"
    image = plain(k)
    image.paste("white", (0, 0, SIDE, 4))
    return image.transpose(Image.Transpose.ROTATE_90)


def saved(image, kind="png", **options):
    image.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
MAKERS = {"16 bits": sixteen, "transparent": clear, "EXIF": turned}


def members(form):
    "Members of COUNT good samples, the last but one bad"
    make = MAKERS.get(form, plain)
    for k in range(COUNT):
        key = f"p.{k}.v2" if form == "dots" else f"{k:05d}"
        data = saved(make(k), exif=EXIF) if form == "EXIF" else saved(make(k))
        yield f"{key}.png", b"no picture" if k == COUNT - 2 else data
        yield f"{key}.txt", f"number {k}".encode()
        if form == "dots":
            yield f"{key}.seg.png", b"another file"


def write_tars(folder, form):
    files = list(members(form))
    if form == "apart":
        files = sorted(files, key=lambda member: member[0][-3:])
    if form == "returning":
        files += [files[0], ("00001.txt", b"another text")]
    with tarfile.open(folder / ("a.tar.gz" if form == "compressed" else "a.tar"), "w:gz" if form == "compressed" else "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(folder)


def write_loose(folder, form):
    for k in range(COUNT):
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / f"p.{k}.png").write_bytes(b"no picture" if k == COUNT - 2 else saved(plain(k)))
        if form == "folder":
            (folder / "deep" / f"p.{k}.txt").write_text(f"number {k}")
    (folder / "classes.txt").write_text("dark\nbright\n")
    if form == "folder":
        return str(folder)
    path = folder / ("t.tsv" if form == "TSV" else "t.csv")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if form == "TSV" else ",")
        writer.writerows([["filepath", "title"], *([f"deep/p.{k}.png", f"number {k}"] for k in range(COUNT))])
    return str(path)


TARS = ["dots", "16 bits", "transparent", "EXIF", "apart", "returning", "compressed"]
FORMS = [*TARS, "folder", "CSV", "TSV"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("lib_name = vlkd_lab\n")
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(here, form):
    return (write_tars if form in TARS else write_loose)(here / "set", form)


@pytest.fixture
def batches(monkeypatch):
    "The batches that a job's steps were given"
    given, step = [], trainers.take_step
    monkeypatch.setattr(trainers.loop, "take_step", lambda loop, batch: given.append(batch) or step(loop, batch))
    return given


def assert_pixels(batch, form, preprocess):
    for image, caption in zip(batch.image, batch.captions, strict=True):
        k = int(caption.removeprefix("number "))
        expected = turned(k).transpose(Image.Transpose.ROTATE_270) if form == "EXIF" else plain(k)
        if form == "transparent":
            expected.paste("white", (0, 0, SIDE, 4))
        assert (image - preprocess(expected)).abs().max() < 0.02, (form, k)


@pytest.mark.parametrize("form", FORMS)
def test_a_job_trains_on_it_and_sees_what_it_should(here, form, tiny_teacher, batches):
    where = write(here, form)
    given = dict(data=where, val=where, teacher=str(tiny_teacher), inheritance="none", losses="affinity_mimicking=1", stages=1)
    given |= dict(steps=3, batch_size=6, device="cpu", out=str(here / "run"), max_bad_share=0.5, validate_pairs=12, validate_every=9)
    job = open_tinyclip(check_parameters(TinyCLIP, given | dict(compare_scratch=False)))
    train(job)
    run = Run(here / "run")
    assert len([line for line in run.metrics() if "total" in line]) == 3
    assert sorted({caption for batch in batches for caption in batch.captions})[0] == "number 0"
    for batch in batches:
        assert_pixels(batch, form, job.teacher.preprocess)
    bad = {line["sample"].split("/")[-1]: line["reason"] for line in map(json.loads, open(run.folder / "bad_samples.jsonl"))}
    key = f"p.{COUNT - 2}" + ".v2" * (form == "dots") if form not in TARS[1:] else f"{COUNT - 2:05d}"
    assert "no JPEG" in bad.pop(key) and list(bad) == ["00001"] * (form == "returning")
    kinds = {"dots": {"seg.png": COUNT}, "returning": {"second files of one name": 2}, "folder": {"txt without a picture": 1}}
    assert json.loads((run.folder / "config.json").read_text())["data"]["total"] == COUNT
    assert inspect_shards(where).ignored == kinds.get(form, {})


@pytest.mark.parametrize("form", ["dots", "CSV", "folder"])
def test_two_readers_see_the_same_samples(here, form):
    (here / "more").mkdir()
    others = (write_tars if form in TARS else write_loose)(here / "more", form)
    report = inspect_shards([write(here, form), others])
    assert len(report.usable) == 2
    view = View(_to_tensor, _codes)
    seen = []
    for workers in (0, 2):
        stream = iter(PairStream(report, view, 4, workers=workers, seed=3).batches())
        seen.append({key for _ in range(14) for key in next(stream).keys})
    assert len(seen[0]) == len(seen[1]) == 2 * (COUNT - 1)


def _to_tensor(image):
    return torch.from_numpy(np.array(image).transpose(2, 0, 1)).float() / 255


def _codes(texts):
    return torch.tensor([[len(text)] for text in texts])


@pytest.mark.parametrize("form", ["CSV", "folder", "dots"])
def test_a_teacher_is_trained_from_nothing_on_it(here, form):
    where = write(here, form)
    assert read_captions(find_data(where))[:2] == ["number 0", "number 1"] and len(read_captions(find_data(where), most=5)) == 5
    given = dict(data=where, val=where, steps=2, batch_size=6, image_size=SIDE, vocabulary=300, device="cpu", max_bad_share=0.5,
                 validate_pairs=12, out=str(here / "run"))  # fmt: skip
    job = open_contrastive(check_parameters(Contrastive, given))
    train(job)
    assert (here / "run" / "teacher" / "student").is_dir()
    said = "validation shards are trained on, such as"
    assert said in job.about_data and any(said in warning for warning in job.run.status()["warnings"])


def test_validation_takes_every_form_of_data_and_other_scenes(here):
    for form in ("folder", "CSV", "TSV"):
        (here / form).mkdir()
        where = write_loose(here / form, form)
        assert find_classes(where).names == ("dark", "bright"), "beside the table, in the folder"
        assert find_data(where, held_out=True) == find_data(where), "files are what they are"
        assert inspect_shards(find_data(where, find_images)).total == COUNT == inspect_shards(find_data(where, find_sentences)).total
    pictures = [{sample for part in find_data("scenes:16", held_out=held_out) for sample in _jpegs(part)} for held_out in (False, True)]
    assert len(pictures[0]) == len(pictures[1]) == 16 and not pictures[0] & pictures[1]
    assert find_classes("scenes:16").names[0] == "red"
    with pytest.raises(ValueError, match="val='scenes:few' is not valid"):
        find_data("scenes:few", held_out=True)


def _jpegs(part):
    return [sample["jpg"] for sample in raw_samples(part)]


@pytest.mark.parametrize("form", ["CSV", "folder", "dots"])
def test_the_other_methods_take_it(here, form, tiny_teacher):
    where = write(here, form)
    common = dict(data=where, val=where, teacher=str(tiny_teacher), steps=2, batch_size=6, device="cpu", max_bad_share=0.5)
    common |= dict(validate_pairs=12, compare_scratch=False, warmup=1)
    cid = check_parameters(ClipCid, common | dict(clusters=3, removed_share=0.0, threshold=0.0, out=str(here / "cid")))
    train(open_clip_cid(cid))
    dime = check_parameters(DimeFm, common | dict(sentences=where, sentence_batch=6, out=str(here / "dime"), probe_pairs=4))
    job = open_dime_fm(dime)
    assert job.sentence_report.total == COUNT and job.report.total == COUNT
    train(job)
    for name in ("cid", "dime"):
        assert len([line for line in Run(here / name).metrics() if "total" in line]) == 2
