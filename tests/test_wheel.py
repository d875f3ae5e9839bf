"""The package without its repository: built as a wheel, installed into a folder, used from somebody else's folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from pages import listed_pages

from vlkd_lab.reference import modules_of_package

ROOT = Path(__file__).parent.parent
MODULES = sorted(modules_of_package(ROOT / "vlkd_lab"))
JOB = "method=TinyCLIP stages=1 steps=2 batch_size=16 validate_pairs=16 device=cpu compare_scratch=false"
OWN = ("data=mine/train-{000000..000002}.tar", "val=mine/val-000000.tar")

NO_CACHES = "import sys\nsys.dont_write_bytecode = True\n"  # in the installation
TRAIN = NO_CACHES + 'import runpy\nrunpy.run_module("vlkd_lab.trainers", run_name="__main__", alter_sys=True)\n'
VISIT = NO_CACHES + f"MODULES = {MODULES}" + """
import importlib, json
from pathlib import Path
modules = [importlib.import_module(f"vlkd_lab.{name}") for name in MODULES]
from vlkd_lab import __version__, widgets
from vlkd_lab.data import find_sentences, find_shards, load_pairs
from vlkd_lab.methods.blip_training import find_blip
from vlkd_lab.export import export_student
from vlkd_lab.samples import cached_shards, shipped
from vlkd_lab.trainers import FitParameters, find_data, find_model
from vlkd_lab.verdicts import stored_results
still = widgets.attach("first").static()
export_student("first", "student", onnx=False)
here = sorted(path.name for path in Path().iterdir())
assert find_model("data_samples/teacher").config and find_blip("data_samples/blip").tasks and stored_results()["trials"]
val, train = find_shards(FitParameters().val), find_shards("data_samples/scenes/train-{000000..000003}.tar")
assert len(load_pairs(val, limit=9).keys) == 9 and find_shards("data_samples/scenes/train-*.tar") == train
generated = [*val, *train, *find_data("scenes:32"), shipped("data_samples/scenes/classes.txt"), shipped("data_samples/sentences.txt")]
find_sentences("data_samples/sentences.txt")
wrong = []
for call in (lambda: find_shards("data_samples/scenes/val-000009.tar"), lambda: find_model("data_samples/techer")):
    try:
        call()
    except (OSError, ValueError) as error:
        wrong.append(str(error))
Path(sys.argv[1]).write_text(json.dumps(dict(
    files=[module.__file__ for module in modules], version=__version__, static=sorted(path.name for path in widgets.STATIC.iterdir()),
    text=still.text, png=still.png[:8].hex(), here=here, wrong=wrong, teacher=str(shipped("data_samples/teacher")),
    generated=[str(path) for path in generated], after=sorted(path.name for path in Path().iterdir()))))
"""


RUN_COPIED = """
import json
from pathlib import Path
import vlkd_lab
from vlkd_lab.runs import RunWriter, run_table
with RunWriter(Path("runs/first")) as run:
    (run.folder / "config.json").write_text('{{"method": "TinyCLIP", "parameters": {{}}}}')
    run.log({{"stage": "stage-1", "step": 1, "total": 1.0}})
names = {{}}
for cell in json.loads(Path("{notebook}").read_text())["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), names)
told = dict(library=vlkd_lab.__file__, state=names["watched"].status()["state"], runs=list(run_table().index))
Path("{told}").write_text(json.dumps(told))
"""


def output_of(command, **options):
    "What a command printed; it must succeed"
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The folder into which a wheel was installed that was built from the source archive, as for a release"
    folder = tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns("scenes", "sentences.txt", "features", "__pycache__")
    for name in ("vlkd_lab", "data_samples"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=unneeded)
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "_quarto.yml"):
        shutil.copy(ROOT / name, folder / "source")
    (folder / "source" / "nbs").mkdir()
    for notebook in (ROOT / "nbs").glob("*.ipynb"):
        shutil.copy(notebook, folder / "source" / "nbs")
    (folder / "source" / "nbs" / "Untitled.ipynb").write_text("{")  # somebody's own
    output_of(["-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")])
    wheel = next(folder.glob("*.whl"))
    assert wheel.stat().st_size < 20e6
    output_of(["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "installed"), str(wheel)])
    shutil.rmtree(folder / "source")
    return folder / "installed"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Somebody's working folder below another project's root"
    project = tmp_path_factory.mktemp("project")
    (project / "settings.ini").write_text("[DEFAULT]\nlib_name = another_lab\n")
    (project / "work" / "mine").mkdir(parents=True)
    return project / "work"


@pytest.fixture(scope="module")
def visit(installed, work, scenes, tmp_path_factory):
    "What a job from the command line and a session with the installed package find there"
    for shard in scenes.glob("*.tar"):
        shutil.copy(shard, work / "mine")
    programs = tmp_path_factory.mktemp("programs")
    (programs / "train.py").write_text(TRAIN)
    (programs / "visit.py").write_text(VISIT)
    place = dict(folder=str(work), PYTHONPATH=str(installed), XDG_CACHE_HOME=str(work.parent / "cache"))
    before = contents(installed)
    forked.run(str(programs / "train.py"), "first", *OWN, *JOB.split(), **place)
    forked.run(str(programs / "visit.py"), str(programs / "told.json"), **place)
    assert contents(installed) == before, "nothing is written into the installation"
    return json.loads((programs / "told.json").read_text())


def test_every_module_imports_and_is_the_installed_one(installed, visit):
    assert all(installed / "vlkd_lab" in Path(file).parents for file in visit["files"]) and len(visit["files"]) == len(MODULES)
    assert visit["version"] == "0.1.0"
    assert visit["static"] == sorted(path.name for path in (ROOT / "vlkd_lab" / "static").iterdir() if path.is_file())


def test_a_job_runs_on_somebodys_shards_and_its_bench_is_a_picture(work, visit):
    config = json.loads((work / "first" / "config.json").read_text())
    assert config["parameters"]["teacher"] == "data_samples/teacher" and config["data"]["total"] == 120
    assert "step: 2" in visit["text"] and visit["png"] == b"\x89PNG\r\n\x1a\n".hex()
    assert (work / "student" / "open_clip_model.safetensors").exists()


def test_what_only_the_repository_has_is_packaged_or_generated_to_the_byte(installed, work, visit):
    cache = work.parent / "cache" / "vlkd_lab"
    assert Path(visit["teacher"]) == installed / "vlkd_lab" / "data_samples" / "teacher"
    assert len(visit["generated"]) > 8 and all(cache in Path(path).parents for path in visit["generated"])
    for name in ("scenes/classes.txt", "sentences.txt"):
        assert (cache / "data_samples-v1" / name).read_bytes() == (ROOT / "data_samples" / name).read_bytes()


def test_a_wrong_name_is_said_in_one_line(visit):
    shard, model = visit["wrong"]
    assert "val-000009.tar" in shard and "it holds" in shard and "\n" not in shard
    assert "data_samples/techer" in model and "\n" not in model


def test_the_working_folder_gets_what_was_asked_for_and_nothing_else(work, visit):
    assert visit["here"] == visit["after"] == ["first", "mine", "student"]
    assert {path.name for path in work.parent.iterdir()} == {"settings.ini", "work", "cache"}


def test_the_command_copies_notebooks_that_run_where_somebody_works(installed, work):
    scripts = (installed / "bin" / "vlkd-lab").read_text()
    assert "from vlkd_lab.commands import run_command" in scripts
    place = dict(folder=str(work), PYTHONPATH=str(installed), XDG_CACHE_HOME=str(work.parent / "cache"))
    forked.run("-c", NO_CACHES + "from vlkd_lab.commands import run_command; sys.exit(run_command(['notebooks', 'lab']))", **place)
    pages = {path.name for path in (ROOT / "nbs").glob("*.ipynb") if path in listed_pages()}
    assert {path.name for path in (work / "lab").iterdir()} == pages - {"index.ipynb", "gallery.ipynb"}
    told = work / "lab" / "told.json"
    run = NO_CACHES + RUN_COPIED.format(notebook="watch_run.ipynb", told=str(told))
    forked.run("-c", run, **place | dict(folder=str(work / "lab")))
    said = json.loads(told.read_text())
    assert said["library"].startswith(str(installed)) and "running" not in said["state"] and said["runs"] == ["runs/first"]
