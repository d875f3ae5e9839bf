"""What is promised of GPUs, shown on one in at most ten minutes: python tools/gpu.py [FILE.json].

Without a GPU the same checks run on the CPU, small: that shows that they run, and nothing about a GPU.
"""

import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from vlkd_lab import data, trainers
from vlkd_lab.features import Features
from vlkd_lab.losses import PRODUCT_TYPES, affinity_mimicking, products_in
from vlkd_lab.models import load_model
from vlkd_lab.pixels import as_floats
from vlkd_lab.runs import Run, watch
from vlkd_lab.waits import count_waits

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
PAIRS = (8192, 16384, 32768, 65536) if HAS_GPU else (256, 2304)
TILE = None if HAS_GPU else 128  # of the check of products; None: as it is chosen
PLAIN_UP_TO = 16384  # pairs whose plain form is tried: three matrices of 1 GB
JOB = dict(data="scenes:4096", steps=60, batch_size=512) if HAS_GPU else dict(data="scenes:200", steps=4, batch_size=16)
LIMIT = 540  # seconds, after which no further check begins
ROWS: list[dict] = []


def row(promise, measured, wanted="", holds=None):
    """One line of the table; `holds` is None where nothing was promised."""
    ROWS.append({"promise": promise, "measured": measured, "wanted": wanted, "holds": holds})
    mark = {True: "yes", False: "NO", None: ""}[holds]
    print(f"{promise:<72} {measured:>22} {wanted:>14} {mark:>4}", flush=True)


def settled():
    """Wait for the device, so that a clock says something."""
    if HAS_GPU:
        torch.cuda.synchronize()


@contextmanager
def waits():
    """How often the block waits for its device: the driver's own count, or where it would on a GPU."""
    found = [0]
    if not HAS_GPU:
        with count_waits() as places:
            yield found
        found[0] = places.total()
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found[0] = sum("synchronizing" in str(warning.message) for warning in said)


def pairs_of(count, noise, seed, width=512):
    """Unit features whose texts resemble their images."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(count, width, generator=random)
    text = image + noise * torch.randn(count, width, generator=random)
    parts = [F.normalize(part, dim=1).to(DEVICE).requires_grad_() for part in (image, text)]
    return Features(*parts, torch.tensor(50.0, device=DEVICE).requires_grad_())


def pass_of(student, teacher, tile):
    """One forward and backward pass: value, gradients, seconds, peak bytes, waits."""
    settled()
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with waits() as found:
        value = affinity_mimicking(student, teacher, tile=tile)
        gradients = torch.autograd.grad(value, (student.image, student.text, student.scale))
    settled()
    seconds = time.perf_counter() - start
    return value.item(), gradients, seconds, torch.cuda.max_memory_allocated() if HAS_GPU else 0, found[0]


def check_losses():
    """The tiled loss against the plain one: numbers, time, memory, waits."""
    for count in PAIRS:
        student, teacher = pairs_of(count, 5.0, 0), pairs_of(count, 4.0, 1)
        pass_of(student, teacher, None)  # what is made once
        value, got, seconds, peak, found = pass_of(student, teacher, None)
        row(f"loss of {count:,} pairs: waits of a forward and backward pass", str(found), "0", found == 0)
        row(f"loss of {count:,} pairs: seconds, peak GB", f"{seconds:.3f}, {peak / 1e9:.2f}")
        if count > PLAIN_UP_TO:
            continue
        pass_of(student, teacher, 0)
        plain, wanted, plain_seconds, plain_peak, _ = pass_of(student, teacher, 0)
        off = max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, wanted, strict=True))
        holds = abs(value - plain) <= 1e-5 * abs(plain) and off <= 1e-3
        row(f"loss of {count:,} pairs: gradients off the plain form's by at most", f"{off:.1e}", "1e-3", holds)
        ratio = f"{seconds / plain_seconds:.2f}, {peak / max(plain_peak, 1):.2f}"
        row(f"loss of {count:,} pairs: seconds and memory, tiled / plain", ratio)


MOST_OFF = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 3e-2}  # of the length of a gradient


def check_products():
    """What the types of products cost and save: gradients against float64 in the plain form, seconds against fp32's."""
    count, times = PAIRS[0], {}
    student, teacher = pairs_of(count, 5.0, 0), pairs_of(count, 4.0, 1)
    exact = [Features(*(part.detach().double() for part in vars(model).values())) for model in (student, teacher)]
    exact[0] = Features(*(part.requires_grad_() for part in vars(exact[0]).values()))
    _, wanted, *_ = pass_of(*exact, 0)
    for name in PRODUCT_TYPES:
        with products_in(name):
            pass_of(student, teacher, TILE)  # what is made once
            _, got, times[name], _, found = pass_of(student, teacher, TILE)
        off = max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got[:2], wanted[:2], strict=True))
        place = f"loss of {count:,} pairs, products in {name}"
        holds = off <= MOST_OFF[name] and not found
        row(f"{place}: gradients off float64's by at most, waits", f"{off:.1e}, {found}", f"{MOST_OFF[name]:.0e}, 0", holds)
        row(f"{place}: seconds, and over fp32's", f"{times[name]:.4f}, {times[name] / times['fp32']:.2f}")


def job(folder, **changes):
    """A job's totals, its median seconds a step, and its last validation's mean recall."""
    given = dict(teacher="data_samples/teacher", inheritance="manual", compare_scratch=False, warmup=5, probe_pairs=64)
    given |= dict(validate_every=JOB["steps"], validate_pairs=200, checkpoint_seconds=600, workers=4 if HAS_GPU else 0)
    method = changes.pop("method", "Distil")
    trainers.train(trainers.open_job(method, JOB | given | changes | {"out": str(folder)}))
    lines = [line for line in Run(folder).metrics() if "total" in line]
    later = lines[len(lines) // 3 :]
    return [line["total"] for line in lines], statistics.median(line["seconds"] for line in later)


VARIANTS = {
    "bf16": (dict(precision="bf16"), 0.05),
    "fp16": (dict(precision="fp16"), 0.05),
    "a bf16 teacher": (dict(teacher_precision="bf16"), 0.02),
    "losses in bf16": (dict(loss_precision="bf16"), 0.01),
    "channels_last": (dict(channels_last=True), 0.01),
    "checkpoint_activations": (dict(checkpoint_activations=True), 0.01),
    "micro_batch of a quarter": (dict(micro_batch=JOB["batch_size"] // 4), 0.01),
    "compile": (dict(compile=True), 0.02) if HAS_GPU else (dict(compile=True, compile_backend="aot_eager"), 0.02),
}


def check_steps(folder):
    """The same job under every setting that must change nothing but speed and memory."""
    first, seconds = job(folder / "fp32")
    row("a step in fp32: seconds", f"{seconds:.4f}")
    for name, (changes, most) in VARIANTS.items():
        if HAS_GPU:
            torch.cuda.reset_peak_memory_stats()
        totals, own = job(folder / name.replace(" ", "-"), **changes)
        off = abs(totals[0] - first[0]) / abs(first[0])
        row(f"{name}: first loss off fp32's by", f"{off:.3%}", f"{most:.0%}", off <= most)
        row(f"{name}: last loss, and fp32's", f"{totals[-1]:.3f}, {first[-1]:.3f}")
        peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if HAS_GPU else ""
        row(f"{name}: seconds a step / fp32's", f"{own / seconds:.2f}{peak}")


def check_views(folder):
    """A job that somebody watches."""
    _, alone = job(folder / "alone")
    ended = threading.Event()

    def look():
        while not ended.wait(0.3):
            if (folder / "watched").exists():
                watch(Run(folder / "watched"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    _, watched = job(folder / "watched")
    ended.set()
    watcher.join()
    row("live views: seconds a step, watched / not", f"{watched / alone:.3f}", "1.05", watched <= 1.05 * alone if HAS_GPU else None)


def check_travel():
    """Batches that travel while a step runs, against batches that are waited for."""
    size = 256 if HAS_GPU else 8
    teacher = load_model("data_samples/teacher", device=DEVICE)
    view = data.View(teacher.preprocess, teacher.tokenizer)
    report = data.inspect_shards(trainers.find_data("scenes:2000" if HAS_GPU else "scenes:200"), progress=False)
    batches = list(islice(data.PairStream(report, view, size).batches(), 8)) * (8 if HAS_GPU else 1)
    weight = torch.randn(4096 if HAS_GPU else 64, 4096 if HAS_GPU else 64, device=DEVICE)
    times = {}
    ways = {
        "warm-up": lambda: (batch.to(DEVICE) for batch in batches),
        "waited for": lambda: (batch.to(DEVICE) for batch in batches),
        "ahead": lambda: data.ahead(data.pinned(iter(batches)), DEVICE),
    }
    for name, sent in ways.items():
        settled()
        start = time.perf_counter()
        for batch in sent():
            as_floats(batch.image).sum()
            weight = F.normalize(weight @ weight, dim=1)
        settled()
        times[name] = time.perf_counter() - start
    ratio = times["ahead"] / times["waited for"]
    row("batches on their way: seconds, ahead / waited for", f"{ratio:.2f}", "1.00", ratio <= 1.02 if HAS_GPU else None)


def check_ranks(folder):
    """Two GPUs give what one gives."""
    count = torch.cuda.device_count() if HAS_GPU else 0
    if count < 2:
        return row("two processes under NCCL", "there is one GPU" if HAS_GPU else "there is no GPU")
    one, _ = job(folder / "one")
    two, _ = job(folder / "two", processes=2)
    off = abs(one[-1] - two[-1]) / abs(one[-1])
    row("two processes under NCCL: last loss off one's by", f"{off:.2%}", "1%", off <= 0.01)


def main(arguments):
    """Run the checks, print the table, and write it where that is asked for."""
    start = time.monotonic()
    name = torch.cuda.get_device_name() if HAS_GPU else f"no GPU: {os.cpu_count()} CPU cores, sizes that a CPU can do"
    about = {"device": name, "torch": torch.__version__, "gpu": HAS_GPU}
    print(f"{name}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checks = [check_losses, check_products, check_travel, lambda: check_steps(place), lambda: check_ranks(place), lambda: check_views(place)]
        for check in checks:
            if time.monotonic() - start > LIMIT:
                row("a check that was left out: the time was up", "")
                continue
            try:
                check()
            except Exception as error:  # the others still say something
                row(f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", "failed", "", False)
    about |= {"seconds": round(time.monotonic() - start), "rows": ROWS}
    if arguments:
        Path(arguments[0]).write_text(json.dumps(about, indent=1) + "\n")
    broken = [line["promise"] for line in ROWS if line["holds"] is False]
    print(f"{len(ROWS)} lines in {about['seconds']} s; not held: {len(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
