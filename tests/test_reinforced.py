"Rows in the shards: what teachers said of augmented pictures and of captions trains a student without them, and strangers' files do no harm."

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, lines_of, tar
from PIL import Image
from shared import in_two_processes

from vlkd_lab.data import Augmentation, augmented, raw_samples
from vlkd_lab.evaluation import compare, finish
from vlkd_lab.export import export_student
from vlkd_lab.models import load_model, new_model, save_model
from vlkd_lab.runs import Run
from vlkd_lab.trainers import open_job, train

STEPS = [[[0, 0.0], [6, 0.27]], [[3, -20.3], [13, 0.0]], None, [[1, 0.09], [11, 178.5]]]  # of RandAugment


@pytest.fixture(scope="session")
def two_widths(tmp_path_factory, tiny_teacher):
    "Two teachers of width 16 and 24, with the tokenizer of the first"
    like = load_model(tiny_teacher)
    wide = new_model(like.config["model_cfg"] | dict(embed_dim=24), like=like, seed=8)
    wide.model.logit_scale.data.fill_(3.0)
    return str(tiny_teacher), str(save_model(wide, tmp_path_factory.mktemp("wide") / "wide"))


def augmentations_of(number, width, height):
    "Four of a picture, in the public sets' form"
    rng = np.random.default_rng(number)
    entries = []
    for steps in STEPS:
        tall, wide = (int(rng.integers(side // 2, side + 1)) for side in (height, width))
        top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
        entries.append([[top, left, tall, wide], steps])
    return entries


@torch.no_grad()
def rows_of(teachers, image, entries, texts):
    "What teachers say of a picture's augmentations and of its captions, joined"
    pictures, captions = [], []
    for teacher in teachers:
        size = teacher.image_shape[::-1]
        seen = []
        for box, steps in entries:
            one = augmented(image, Augmentation(tuple(box), tuple(map(tuple, steps or ()))), size)
            seen.append(teacher.preprocess(one))
        pictures.append(teacher.encode_image(torch.stack(seen)).float())
        captions.append(teacher.encode_text(teacher.tokenizer(list(texts))).float())
    return torch.cat(pictures, 1), torch.cat(captions, 1)


def npz(**arrays):
    np.savez_compressed(out := io.BytesIO(), **arrays)
    return out.getvalue()


def packed(content):
    torch.save(content, out := io.BytesIO())
    return gzip.compress(out.getvalue())


def reinforced(scenes, folder, names, in_bfloat16=False, spoil=lambda number, fields: fields):
    "The scenes' shards in the layout of the public sets, with rows of the named teachers"
    teachers = [load_model(name) for name in names]
    folder.mkdir()
    number = 0
    for path in sorted(Path(scenes).glob("train-*.tar")):
        members = []
        for sample in raw_samples(path):
            image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            text = sample["txt"].decode().splitlines()[0]
            written = [f"{text}, it seems", f"something like {text}"]
            entries = augmentations_of(number, *image.size)
            rows, words = rows_of(teachers, image, entries, [text, *written])
            fields = {
                "jpg": sample["jpg"],
                "txt": text.encode(),
                "url.txt": b"https://example.org/picture.jpg",
                "json": json.dumps({"uid": f"{number:032x}"}).encode(),
                "syn.json": json.dumps({"syn_text": written}).encode(),
                "paug.json": json.dumps({"param_aug": json.dumps(entries)}).encode(),
            }
            if in_bfloat16:
                fields["pth.gz"] = packed({"image_emb": rows.bfloat16(), "text_emb": words.bfloat16()})
            else:
                fields["npz"] = npz(image_emb=rows.numpy(), text_emb=words.numpy())
            fields = spoil(number, fields)
            members += [(f"{number:09d}.{name}", content) for name, content in fields.items()]
            number += 1
        tar(folder / path.name, members)
    return folder


@pytest.fixture(scope="session")
def public(scenes, two_widths, tmp_path_factory):
    "Shards with rows of two teachers, 40 wide"
    return reinforced(scenes, tmp_path_factory.mktemp("public") / "npz", two_widths)


@pytest.fixture
def parameters(scenes, public, two_widths, tmp_path):
    "Of a job that takes a second"

    def of(out="run", **changes):
        common = dict(data=str(public), val=f"{scenes}/val-000000.tar", device="cpu", out=str(tmp_path / out))
        common |= dict(steps=3, batch_size=8, warmup=1, validate_every=3, validate_pairs=16, probe_pairs=4)
        common |= dict(teacher_features="shards", compare_scratch=False, losses="affinity_mimicking=1")
        return common | dict(teacher="", student=two_widths[0], teacher_widths="16,24") | changes

    return of


def run_of(given, method="Distil"):
    train(open_job(method, given))
    return Run(given["out"])


def totals(folder, name="total"):
    return [line[name] for line in lines_of(folder) if name in line and "step" in line]


def test_a_job(parameters):
    run = run_of(parameters())
    print(totals(run.folder), run.config()["reinforced"])
