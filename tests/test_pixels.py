"Pictures travel as bytes: the same floats bit for bit, a byte for each value of a pixel, and jobs that end with the same weights"

import io
import pickle
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import same_weights, tar
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms as T

from vlkd_lab import data as D
from vlkd_lab import trainers
from vlkd_lab.data import stream as stream_room
from vlkd_lab.data import travel
from vlkd_lab.features import Batch
from vlkd_lab.pixels import Pixels
from vlkd_lab.runs import Run
from vlkd_lab.trainers import open_job


def clip(size, **settings):
    return image_transform_v2(PreprocessCfg(size=size, **settings), is_train=False)


HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PREPROCESSINGS = {
    "CLIP": clip(16),
    "SigLIP": clip(16, resize_mode="squash", **HALF),
    "bilinear": clip(20, interpolation="bilinear"),
    "longest side": clip(16, resize_mode="longest", **HALF),
    "not square": clip((12, 20), resize_mode="squash"),
    "no deviation": T.Compose([T.Resize((16, 16)), T.ToTensor()]),
}
RANDOM = T.Compose([T.RandomResizedCrop(16, (0.5, 1.0)), T.ToTensor()])


def codes(captions):
    return torch.tensor([[ord(letter) % 256 for letter in caption.ljust(24)[:24]] for caption in captions])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "Three shards of twelve pictures of noise each, wide, high and square"
    folder = tmp_path_factory.mktemp("noise")
    sizes = [(24, 40), (40, 24), (16, 16), (30, 31)]
    for shard in range(3):
        members = []
        for k in range(12):
            noise = np.random.default_rng(12 * shard + k).integers(0, 256, (*sizes[k % 4], 3), dtype=np.uint8)
            Image.fromarray(noise).save(out := io.BytesIO(), "jpeg")
            members += [(f"{k:03d}.jpg", out.getvalue()), (f"{k:03d}.txt", f"noise {shard} {k}".encode())]
        tar(folder / f"{shard}.tar", members)
    return D.inspect_shards(folder, progress=False)


def former_floats(preprocess, levels):
    "What readers handed over before: the batch's bytes as floats, times the gain, plus the shift, in single precision"
    fast = D.FastPreprocess(preprocess)
    product = levels.numpy().astype(np.float32) * fast.gain.numpy()
    return torch.from_numpy(product.astype(np.float32) + fast.shift.numpy())


def kept(batch, name="image"):
    return vars(batch)[name]


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_floats_of_bytes_are_those_that_readers_made_bit_for_bit(shards, name):
    preprocess = PREPROCESSINGS[name]
    view = D.View(preprocess, codes)
    for batches in (D.PairStream(shards, view, 9).batches(), D.read_once(shards, view, 9), D.load_pairs(shards).batches(view, 9)):
        batch = next(batches)
        pixels = kept(batch)
        assert isinstance(pixels, Pixels) and pixels.levels.dtype == torch.uint8 and batch.image.dtype == torch.float32
        assert torch.equal(batch.image, former_floats(preprocess, pixels.levels))
    pairs = D.load_pairs(shards)
    for row in range(9):
        picture = pairs.pil(row)
        assert torch.allclose(batch.image[row], preprocess(picture), atol=1e-5), "what the model's own transform says"
        assert torch.equal(batch.image[row], D.FastPreprocess(preprocess)([picture])[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("settings", [{}, dict(crop_scale=0.5), dict(crop_scale=0.5, crops=2)], ids=["whole", "crops", "numbered"])
def test_any_number_of_readers_with_and_without_a_cache_hand_over_the_same_bytes(shards, settings):
    teacher = [D.View(PREPROCESSINGS["SigLIP"], codes), D.View(PREPROCESSINGS["CLIP"], None), D.View(PREPROCESSINGS["bilinear"], None)]
    stream = D.PairStream(shards, D.View(PREPROCESSINGS["CLIP"], codes), 5, teacher=teacher, shuffle=6, seed=2, **settings)
    for workers in (0, 1, 3):
        by_cache = []
        for cache_mb in (256, 0):
            batches = replace(stream, workers=workers, cache_mb=cache_mb).batches()
            by_cache.append(list(islice(batches, 15)))  # two epochs
        for batch, other in zip(*by_cache, strict=True):
            assert batch.keys == other.keys and torch.equal(batch.image, other.image)
            pictures = [kept(batch), kept(batch, "teacher_image"), kept(batch, "further")[1][0]]
            assert all(one.levels.dtype == torch.uint8 for one in pictures) and kept(batch, "further")[0][0] is None
            floats = [batch.image, batch.teacher_image, batch.further[1][0]]
            for k, name in enumerate(("CLIP", "SigLIP", "bilinear")):
                assert torch.equal(floats[k], former_floats(PREPROCESSINGS[name], pictures[k].levels)), name
            assert batch.for_teacher(1).image is batch.image and batch.for_teacher(2).image.shape[-1] == 20


def test_a_reader_hands_over_a_byte_for_each_value_of_a_pixel(shards):
    view = D.View(clip(64), codes)
    batch = next(D.PairStream(shards, view, 8, workers=2).batches())
    assert batch.image.shape == (8, 3, 64, 64), "read, and still sent as bytes"
    text = batch.text.numel() * 8
    for sent in (batch, batch.for_teacher(), batch.first(8), batch.replace(captions=())):
        assert 1 <= (len(pickle.dumps(sent)) - text) / batch.image.numel() < 1.05
    again = pickle.loads(pickle.dumps(batch))
    assert again.keys == batch.keys and torch.equal(again.image, batch.image)


def test_what_is_not_provably_affine_stays_as_its_transform_makes_it(shards):
    batch = next(D.PairStream(shards, D.View(RANDOM, codes), 4, teacher=D.View(PREPROCESSINGS["CLIP"], None)).batches())
    assert isinstance(kept(batch), torch.Tensor) and kept(batch).dtype == torch.float32 and kept(batch) is batch.image
    assert isinstance(kept(batch, "teacher_image"), Pixels)
    texts = next(D.PairStream(shards, D.View(None, codes), 4).batches())
    assert texts.image.shape == (4, 0) and texts.to("meta").text.device.type == "meta"


def test_a_batch_of_bytes_is_used_like_one_of_floats(shards):
    batch = next(D.PairStream(shards, D.View(PREPROCESSINGS["CLIP"], codes), 6).batches())
    plain = batch.each(lambda tensor: tensor)
    assert isinstance(kept(plain), torch.Tensor) and torch.equal(plain.image, batch.image)
    relabelled = replace(batch, labels=(1,) * 6)  # dataclasses' own
    assert relabelled.labels == (1,) * 6 and torch.equal(relabelled.image, batch.image)
    with pytest.raises(AttributeError):
        batch.image = plain.image
    with pytest.raises(TypeError, match="image"):
        Batch(text=batch.text)
    few = batch.first(2)
    assert torch.equal(few.image, plain.image[:2]) and len(few) == 2 and few.keys == batch.keys[:2]
    assert batch.image is batch.image and batch.to("cpu").image is batch.image, "computed once"
    with torch.inference_mode():
        sent = pickle.loads(pickle.dumps(batch)).image
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (weight * sent).sum().backward()
    assert torch.allclose(weight.grad.flatten(), plain.image.sum((0, 2, 3)))


# Jobs


def jobs(scenes, tiny_teacher, tiny_blip):
    pairs = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", device="cpu")
    common = pairs | dict(steps=3, batch_size=8, warmup=1, validate_every=3, validate_pairs=16, probe_pairs=4, compare_scratch=False)
    of_two_towers = common | dict(teacher=str(tiny_teacher))
    return {
        "TinyCLIP": of_two_towers | dict(stages=1, gate_share=0.4, target_sparsity=0.3),
        "Distil": of_two_towers | dict(micro_batch=3, crop_scale=0.6, workers=1),
        "ClipCid": of_two_towers | dict(map_images=12, clusters=4, teacher_features="online"),
        "DimeFm": of_two_towers | dict(sentences=f"{scenes}/train-000000.tar", sentence_batch=6, image_size=16),
        "Dlip": common | dict(teacher=str(tiny_blip), student="image:1x16, text:1x16", image_size=16, micro_batch=3, queue=16),
    }


@pytest.mark.parametrize("method", ["TinyCLIP", "Distil", "ClipCid", "DimeFm", "Dlip"])
def test_a_job_ends_with_the_weights_that_floats_from_the_readers_gave(method, scenes, tiny_teacher, tiny_blip, tmp_path, monkeypatch):
    given = jobs(scenes, tiny_teacher, tiny_blip)[method]
    given = {name: value for name, value in given.items() if name != "features"}
    column = D.FastPreprocess.column
    seen = []

    def as_before(preprocess, pictures):
        seen.append(column(preprocess, pictures))
        return seen[-1].floats

    trainers.train(open_job(method, given | dict(out=str(tmp_path / "bytes"))))
    monkeypatch.setattr(D.FastPreprocess, "column", as_before)
    trainers.train(open_job(method, given | dict(out=str(tmp_path / "floats"))))
    assert seen and all(isinstance(one, Pixels) for one in seen)
    stage = "stage-1" if method == "TinyCLIP" else "student"
    for folder in ("bytes", "floats"):
        if stage != "student":
            (tmp_path / folder / stage).rename(tmp_path / folder / "student")
    assert same_weights(tmp_path / "bytes", tmp_path / "floats")
    first, second = ([line["total"] for line in Run(tmp_path / folder).metrics() if "total" in line] for folder in ("bytes", "floats"))
    assert first == second and len(first) >= 3


# On the way to a GPU, with stand-ins


class Streams:
    "Stand-ins for CUDA's streams that write down what happens"

    def __init__(self, monkeypatch):
        self.events, self.inside = [], ["main"]
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.named("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.named("main"))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.read_by(tensor, stream))

    def named(self, name):
        stream = type("Stream", (), {})()
        stream.name = name
        stream.wait_stream = lambda other: self.events.append(f"{name} waits for {other.name}")
        return stream

    @contextmanager
    def on(self, stream):
        self.inside.append(stream.name)
        yield
        self.inside.pop()

    def read_by(self, tensor, stream):
        self.events.append(f"{str(tensor.dtype).removeprefix('torch.')} is read by {stream.name}")


def test_the_next_batch_travels_while_the_present_one_is_worked_on(shards, monkeypatch):
    streams = Streams(monkeypatch)
    stream = D.PairStream(shards, D.View(PREPROCESSINGS["CLIP"], codes), 4, teacher=D.View(PREPROCESSINGS["SigLIP"], None))
    undisturbed = list(islice(stream.batches(), 3))
    to = Batch.to

    def sent(batch, device, non_blocking=True):
        assert isinstance(kept(batch), Pixels) and non_blocking
        streams.events.append(f"copy {batch.keys[0]} on {streams.inside[-1]}")
        return to(batch, device, non_blocking)

    monkeypatch.setattr(Batch, "to", sent)
    arrived = []
    for batch in travel._sent_ahead(iter(undisturbed), torch.device("meta")):
        arrived.append(batch)
        streams.events.append(f"step {batch.keys[0]}")
    assert [batch.keys for batch in arrived] == [batch.keys for batch in undisturbed]
    assert all(kept(batch).levels.device.type == "meta" and batch.image.device.type == "meta" for batch in arrived)
    first, second, third = (batch.keys[0] for batch in undisturbed)
    reads = ["uint8 is read by main", "int64 is read by main", "uint8 is read by main"]
    assert streams.events == [
        f"copy {first} on side", "main waits for side", *reads, f"copy {second} on side", f"step {first}",
        "main waits for side", *reads, f"copy {third} on side", f"step {second}",
        "main waits for side", *reads, f"step {third}",
    ]  # fmt: skip


def test_an_error_of_the_readers_waits_until_the_batches_before_it_were_worked_on(monkeypatch):
    Streams(monkeypatch)

    def readers():
        yield from (Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4)) for _ in range(2))
        raise ValueError("the shard was changed")

    worked_on = []
    with pytest.raises(ValueError, match="the shard was changed"):
        for batch in travel._sent_ahead(readers(), torch.device("meta")):
            worked_on.append(batch)
    assert len(worked_on) == 2


def test_on_the_cpu_nothing_is_read_before_it_is_needed():
    read = []

    def readers():
        for number in range(5):
            read.append(number)
            yield Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4))

    batches = D.ahead(readers(), "cpu")
    assert read == []
    next(batches)
    assert read == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_where_there_is_a_gpu_bytes_come_to_lie_in_pinned_memory(shards, workers, monkeypatch):
    stream = D.PairStream(shards, D.View(PREPROCESSINGS["CLIP"], codes), 4, workers=workers)
    assert not workers or not stream_room._loader(stream, 0).pin_memory
    plain = next(stream.batches())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not workers or stream_room._loader(stream, 0).pin_memory
    pinned = []

    def pin(tensor):
        pinned.append(tensor.dtype)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    if workers == 0:
        batch = next(stream.batches())
    else:  # as the loader's thread does
        from torch.utils.data._utils.pin_memory import pin_memory

        batch = pin_memory(plain)
    assert pinned == [torch.uint8, torch.int64] and isinstance(batch, Batch) and torch.equal(batch.image, plain.image)
