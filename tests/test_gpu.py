"`make test-gpu`: its checks run on a CPU, notice what is wrong, and fill the page's table"

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
gpu = pytest.importorskip("gpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gpu, "PAIRS", (64, 2304))
    monkeypatch.setattr(gpu, "JOB", dict(data="scenes:40", steps=2, batch_size=8))
    monkeypatch.setattr(gpu, "VARIANTS", {"bf16": gpu.VARIANTS["bf16"]})
    monkeypatch.setattr(gpu, "ROWS", [])
    monkeypatch.chdir(ROOT)


def test_the_checks_run_without_a_gpu_and_write_the_table(tmp_path):
    assert gpu.main([str(tmp_path / "table.json")]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    promises = " ".join(row["promise"] for row in table["rows"])
    assert all(word in promises for word in ("2,304 pairs: waits", "products in bf16", "products in tf32", "bf16", "on their way", "NCCL", "live views"))
    assert table["gpu"] is gpu.HAS_GPU and not any(row["holds"] is False for row in table["rows"])
    kept = json.loads((ROOT / "nbs" / "results" / "benchmark_gpu.json").read_text())
    assert set(kept) == set(table) and {"promise", "measured", "wanted", "holds"} == set(kept["rows"][0])


def test_what_does_not_hold_is_said(monkeypatch, tmp_path, capsys):
    loss = gpu.affinity_mimicking

    def wrong(student, teacher, tile=None):
        value = loss(student, teacher, tile=tile)
        return value * 1.01 if tile is None and value.item() >= 0 else value  # another value, and a wait

    monkeypatch.setattr(gpu, "affinity_mimicking", wrong)
    monkeypatch.setattr(gpu, "check_steps", lambda place: 1 / 0)
    monkeypatch.setattr(gpu, "check_views", lambda place: None)
    assert gpu.main([str(tmp_path / "table.json")]) == 1
    broken = [row["promise"] for row in json.loads((tmp_path / "table.json").read_text())["rows"] if row["holds"] is False]
    assert any("waits" in promise for promise in broken) and any("off the plain" in promise for promise in broken)
    assert any("ZeroDivisionError" in promise for promise in broken)
