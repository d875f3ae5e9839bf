"A run that died in the middle of a line goes on, whichever of its files the line was for"

import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import lines_of, tiny_job

from vlkd_lab import trainers
from vlkd_lab.runs import Curves, Run, RunWriter, read_json_lines

HALF = {"metrics.jsonl": '{"stage": "student", "phase": "dis', "bad_samples.jsonl": '{"sample": "train-0000'}


@pytest.fixture
def damaged(scenes, tmp_path):
    "The scenes, of which two in each shard are no pictures"
    folder = tmp_path / "damaged"
    folder.mkdir()
    for shard in Path(scenes).glob("*.tar"):
        with tarfile.open(shard) as old, tarfile.open(folder / shard.name, "w") as new:
            pictures = 0
            for member in old:
                content = old.extractfile(member).read()
                if member.name.endswith((".jpg", ".png", ".webp")):
                    pictures += 1
                    if pictures in (3, 9) and shard.name.startswith("train"):
                        content = b"no picture"
                        member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("file", HALF)
def test_a_job_that_died_in_a_line_ends_as_if_undisturbed(file, damaged, tiny_teacher, tmp_path, killed_in_its_fourth_step):
    job = tiny_job(damaged, tiny_teacher, tmp_path / "whole", "Distil", steps=6, batch_size=16, max_bad_share=0.3, checkpoint_seconds=0)
    trainers.train(trainers.open_job("Distil", job))
    killed = job | dict(out=str(tmp_path / "killed"))
    known = []

    def half_a_line():
        known.extend(read_json_lines(tmp_path / "killed" / "bad_samples.jsonl"))
        with (tmp_path / "killed" / file).open("a") as lines:
            lines.write(HALF[file])

    killed_in_its_fourth_step(lambda: trainers.open_job("Distil", killed), half_a_line)
    assert known, "it has met damage before it dies"
    assert lines_of(killed["out"]) == lines_of(job["out"])
    for name in ("metrics.jsonl", "bad_samples.jsonl"):
        for line in (tmp_path / "killed" / name).read_text().splitlines():
            json.loads(line)
    named = [[line["sample"] for line in read_json_lines(Path(run) / "bad_samples.jsonl")] for run in (job["out"], killed["out"])]
    assert sorted(named[0]) == sorted(named[1]) and len(set(named[1])) == len(named[1]) >= len(known)


def test_lines_that_two_processes_ran_together_cost_nothing_else(tmp_path):
    "As an earlier version left them: it went on in the half line"
    (tmp_path / "metrics.jsonl").write_text('{"stage": "s", "step": 1, "total": 2.0}\n{"sta{"stage": "s", "step": 2}\n{"stage": "s", "step": 3, "total": 1.0}\n{"st')
    assert [line["step"] for line in Run(tmp_path).metrics()] == [1, 3]
    curves = Curves(Run(tmp_path))
    assert curves.read() == 2 and curves.column("s", "total").tolist() == [2.0, 1.0]
    with RunWriter(tmp_path) as run:
        run.log({"stage": "s", "step": 4, "total": 0.5})
    assert curves.read() == 1 and Run(tmp_path).metrics()[-1]["step"] == 4


@pytest.mark.parametrize("left", [b"", b"\n", b'{"a": 1}\n', b'{"a": 1}', b"\x00\x00\x00", b'{"a": 1}\n\xff\xfe'])
def test_a_file_that_ends_anyhow_goes_on_with_a_line_of_its_own(left, tmp_path):
    (tmp_path / "events.jsonl").write_bytes(left)
    assert len(read_json_lines(tmp_path / "events.jsonl")) == left.count(b"}\n"), "a line counts when it has its end"
    with RunWriter(tmp_path) as run:
        run.log({"b": 2}, file="events.jsonl")
        run.log({"b": 3}, file="events.jsonl")
    whole = [{"a": 1}] if left.startswith(b'{"a": 1}\n') else []
    assert read_json_lines(tmp_path / "events.jsonl") == [*whole, {"b": 2}, {"b": 3}]
