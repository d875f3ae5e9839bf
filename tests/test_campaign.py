"The campaign of hostile input and crashes, a short form of it; `make campaign` is the long one"

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TRIES = {"values": 40, "shards": 200, "folders": 18, "crashes": 3}


def run_campaign(out, *words):
    command = [sys.executable, str(ROOT / "tests" / "campaign"), *words, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=900)


@pytest.fixture(scope="module")
def campaign_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("campaign")


@pytest.mark.parametrize("kind", TRIES)
def test_what_is_hostile_is_used_or_refused_by_its_name(kind, campaign_folder):
    done = run_campaign(campaign_folder, kind, "--tries", str(TRIES[kind]), "--minutes", "10")
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert f"{kind}: {TRIES[kind]} tries" in done.stdout


def test_a_fault_is_found_and_named(campaign_folder, monkeypatch):
    "A campaign that calls everything well would find nothing"
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "campaign"))
    from tries import Try, Wrong, attempt

    def raises(error):
        def do(folder):
            raise error

        return do

    def ends(folder):
        os._exit(3)

    def takes_long(folder):
        import time

        time.sleep(60)

    def takes_much(folder):
        bytearray(1 << 34)

    cases = {
        "unclear": raises(KeyError("embed_dim")),
        "lost": raises(Wrong("lost", "00000003")),
        "died": ends,
        "hang": takes_long,
        "memory": takes_much,
        "right": lambda folder: (folder / "x").write_text("fine"),
    }
    for verdict, do in cases.items():
        line = attempt(Try("none", verdict, do, ("steps",)), campaign_folder / "try", seconds=4)
        assert line["verdict"] == verdict, line
    assert attempt(Try("none", "not named", raises(ValueError("no")), ("steps",)), campaign_folder / "try")["verdict"] == "unclear"
