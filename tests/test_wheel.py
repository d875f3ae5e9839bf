"""The package without its repository: built as a wheel, installed into a folder of its own, used from somebody else's folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in (ROOT / "vlkd_lab").glob("*.py") if not path.name.startswith("_"))


def said(command, **options):
    "What a command printed; it must succeed"
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The folder into which a wheel was installed that was built of the source archive, as for a release"
    folder = tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns("scenes", "sentences.txt", "features", "__pycache__")
    for name in ("vlkd_lab", "data_samples"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=unneeded)
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    said(["-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")])
    wheel = next(folder.glob("*.whl"))
    assert wheel.stat().st_size < 20e6
    said(["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "installed"), str(wheel)])
    shutil.rmtree(folder / "source")
    return folder / "installed"


@pytest.fixture
def elsewhere(installed, scenes, tmp_path):
    "A folder below another project's root, and what starts Python there with the installed package"
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = another_lab\n")
    (tmp_path / "work" / "mine").mkdir(parents=True)
    for shard in scenes.glob("*.tar"):
        shutil.copy(shard, tmp_path / "work" / "mine")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}

    def python(*command):
        return said(command, cwd=tmp_path / "work", env=environment)

    before = contents(installed)
    yield tmp_path / "work", python
    assert contents(installed) == before, "nothing is written into the installation"
    assert {path.name for path in tmp_path.iterdir()} <= {"settings.ini", "work", "cache"}


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_every_module_imports_and_is_the_installed_one(installed, elsewhere):
    _, python = elsewhere
    code = f"""import importlib, json, sys
modules = [importlib.import_module(f"vlkd_lab.{{name}}") for name in {MODULES}]
from vlkd_lab import __version__, widgets
static = sorted(path.name for path in widgets.STATIC.iterdir())
print(json.dumps([[module.__file__ for module in modules], __version__, static]))"""
    files, version, static = json.loads(python("-c", code))
    assert {Path(file).parent for file in files} == {installed / "vlkd_lab"} and version == "0.1.0"
    assert static == sorted(path.name for path in (ROOT / "vlkd_lab" / "static").iterdir() if path.is_file())


def test_a_job_runs_on_somebodys_shards_and_its_bench_is_a_picture(elsewhere):
    work, python = elsewhere
    options = "method=TinyCLIP stages=1 steps=2 batch_size=16 validate_pairs=16 device=cpu compare_scratch=false".split()
    python("-m", "vlkd_lab.trainers", "first", "data=mine/train-{000000..000002}.tar", "val=mine/val-000000.tar", *options)
    assert {path.name for path in work.iterdir()} == {"mine", "first"}, "the working folder has the run folder, and nothing else is new"
    config = json.loads((work / "first" / "config.json").read_text())
    assert config["parameters"]["teacher"] == "data_samples/teacher" and config["data"]["total"] == 120
    code = """import json
from vlkd_lab.widgets import attach
from vlkd_lab.export import export_student
still = attach("first").still()
print(json.dumps([still.text, still.png[:8].hex()]))
export_student("first", "student", onnx=False)"""
    text, start = json.loads(python("-c", code).splitlines()[0])
    assert "step: 2" in text and start == b"\x89PNG\r\n\x1a\n".hex()
    assert {path.name for path in work.iterdir()} == {"mine", "first", "student"}


def test_what_only_the_repository_has_is_packaged_or_generated_to_the_byte(installed, elsewhere):
    work, python = elsewhere
    code = """import json
from vlkd_lab.data import find_sentences, find_shards, load_pairs
from vlkd_lab.samples import cached_shards, shipped
from vlkd_lab.trainers import FitParameters, find_data, find_model
from vlkd_lab.dlip import find_blip
from vlkd_lab.verdicts import stored_results
assert find_model("data_samples/teacher").config and find_blip("data_samples/blip").tasks and stored_results()["trials"]
val = find_shards(FitParameters().val)
assert len(load_pairs(val, limit=9).keys) == 9
train = find_shards("data_samples/scenes/train-{000000..000003}.tar")
assert find_shards("data_samples/scenes/train-*.tar") == train and find_data("scenes:32")
find_sentences("data_samples/sentences.txt")
names = ("data_samples/teacher", "data_samples/scenes/classes.txt", "data_samples/sentences.txt")
wrong = []
for call in (lambda: find_shards("data_samples/scenes/val-000009.tar"), lambda: find_model("data_samples/techer")):
    try:
        call()
    except (OSError, ValueError) as error:
        wrong.append(str(error))
print(json.dumps([[str(path) for path in (*val, *train)], [str(shipped(name)) for name in names], wrong]))"""
    shards, (teacher, classes, sentences), wrong = json.loads(python("-c", code))
    cache = work.parent / "cache" / "vlkd_lab"
    assert Path(teacher) == installed / "vlkd_lab/data_samples/teacher"
    for path in (*shards, classes, sentences):
        assert cache in Path(path).parents
    for name in ("scenes/classes.txt", "sentences.txt"):
        assert (cache / "data_samples-v1" / name).read_bytes() == (ROOT / "data_samples" / name).read_bytes()
    assert {path.name for path in work.iterdir()} == {"mine"}, "generated data goes to the user's cache"
    assert "val-000009.tar" in wrong[0] and "it holds" in wrong[0] and "\n" not in wrong[0]
    assert "data_samples/techer" in wrong[1] and "\n" not in wrong[1]
