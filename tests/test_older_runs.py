"Runs of earlier versions are found, continued and forked as what they were"

import json

import pytest
from conftest import tiny_job

from vlkd_lab.methods import METHODS
from vlkd_lab.runs import Run, rewind
from vlkd_lab.trainers import LATER, check_parameters, forked_parameters, main, open_job, out_folder, train

FOLDERS = {  # where a job without `out` lay before the parameters in LATER came, as far as those have another default
    "BlipTraining": "bliptraining-8c25bad2",
    "ClipCid": "clipcid-64df3271",
    "Contrastive": "contrastive-7d5a1410",
    "DimeFm": "dimefm-0c6fe530",
    "Distil": "distil-417ef0b1",
    "Dlip": "dlip-f24181f5",
    "SigLIP": "siglip-5c4a2fa1",
    "TinyCLIP": "tinyclip-8a6666e4",
}
OTHERWISE = {  # those whose default is another now, with what stands for the earlier one
    "CLIP-KD": ("clipkd-9ee5b1da", dict(raw_projection=False)),
    "CLIP-RD": ("cliprd-28e945c6", dict(raw_projection=False)),
}


@pytest.mark.parametrize("method", [*FOLDERS, *OTHERWISE])
def test_a_run_without_a_folder_of_its_own_lies_where_it_lay(method):
    folder, given = OTHERWISE.get(method) or (FOLDERS[method], {})
    assert out_folder(check_parameters(METHODS[method].parameters, given)).name == folder


@pytest.fixture
def earlier(scenes, tiny_teacher, tmp_path):
    "A run of CLIP-KD whose config.json lacks what came later"
    (tmp_path / "student.json").write_text(
        json.dumps(
            dict(
                embed_dim=12,
                vision_cfg=dict(layers=1, width=32, head_width=16, patch_size=16, image_size=32),
                text_cfg=dict(context_length=24, vocab_size=300, width=32, heads=2, layers=1),
            )
        )
    )
    given = dict(student=str(tmp_path / "student.json"), raw_projection=False, losses="contrastive=1, feature_mimicking=10")
    job = open_job("CLIP-KD", tiny_job(scenes, tiny_teacher, tmp_path / "run", "CLIP-KD", **given))
    train(job)
    config = job.run.config()
    config["parameters"] = {name: value for name, value in config["parameters"].items() if name not in LATER}
    (job.run.folder / "config.json").write_text(json.dumps(config))
    return job.run


def test_the_command_line_and_a_fork_take_an_earlier_run_for_what_it_was(earlier):
    main([str(earlier.folder), "steps=5"])
    assert [line["step"] for line in earlier.metrics() if "total" in line] == [1, 2, 3, 4, 5]
    after, changed = forked_parameters(earlier.config(), dict(learning_rate=5e-4))
    assert after["raw_projection"] is False and list(changed) == ["learning_rate"]


def test_a_fork_takes_no_value_that_a_recipe_would_change_back():
    config = {"method": "TinyCLIP", "parameters": dict(recipe="published", steps=50)}
    with pytest.raises(ValueError, match="cannot be in this fork: with recipe='published' it becomes 0.0001"):
        forked_parameters(config, dict(learning_rate=1e-3))
    assert forked_parameters(config, dict(learning_rate=2e-3))[0]["learning_rate"] == 2e-3
    with pytest.raises(ValueError, match="learning_rate_floor=1 is not valid"):
        forked_parameters({"method": "Distil", "parameters": {}}, dict(learning_rate_floor=1.0))


def test_lines_in_one_end_neither_a_rewind_nor_a_fork(tmp_path):
    lines = ['{"stage": "stage-1", "step": 1}', '{"stage": "stage-2", "step": 1}', '{"sta{"stage": "stage-1", "step": 2}', '{"stage": "stage-2", "step": 2}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    rewind(Run(tmp_path), 1, "stage-1")
    assert [(line["stage"], line["step"]) for line in Run(tmp_path).metrics()] == [("stage-1", 1), ("stage-2", 1), ("stage-2", 2)]
