"""The guide pages keep what they promise: they run, their commands would start, what they quote stands where they say."""

import inspect
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import open_clip
import pandas as pd
import pytest
from page_cells import cells_of, run_page
from pages import listed_pages
from papermill.cli import _resolve_type
from papermill.inspection import _infer_parameters, load_notebook_node

from vlkd_lab import corpus, stores, trackers
from vlkd_lab.engines import ENGINES
from vlkd_lab.export import reinforce
from vlkd_lab.losses import LOSSES
from vlkd_lab.methods import METHODS, all_losses
from vlkd_lab.methods.blip_training import BlipTraining
from vlkd_lab.methods.clip_cid import ClipCid
from vlkd_lab.methods.contrastive import Contrastive
from vlkd_lab.methods.dime_fm import DimeFm
from vlkd_lab.methods.dlip import Dlip
from vlkd_lab.methods.tinyclip import TinyCLIP
from vlkd_lab.models import model_config
from vlkd_lab.published import find_releases
from vlkd_lab.trainers import check_parameters, read_value

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path for path in listed_pages()}
METHOD_GUIDES = ["guide_tinyclip", "guide_clip_cid", "guide_dime_fm", "guide_dlip"]
GUIDES = ["getting_started", *METHOD_GUIDES, "bench", "run_folder", "full_scale", "add_a_loss", "add_a_method", "vocabulary"]
KINDS = dict(tinyclip=TinyCLIP, teacher=Contrastive, clip_cid=ClipCid, dime_fm=DimeFm, dlip=Dlip, blip=BlipTraining)


def cells(name, kind):
    return cells_of(PAGES[name], kind)


def prose(name):
    return "\n\n".join("".join(c["source"]) for c in cells(name, "markdown"))


def commands(name):
    "Every shell command of a page, as words"
    text = prose(name).replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(papermill nbs/|torchrun |python -m vlkd_lab)", line)]


@cache
def everything_said(name):
    "Prose, code and stored outputs of a page as text"
    shown = []
    for cell in cells(name, "code"):
        for output in cell.get("outputs", ()):
            shown += ["".join(output.get("text", ""))] + ["".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join([prose(name), *("".join(c["source"]) for c in cells(name, "code")), *shown])


def given_words(words):
    "-p NAME VALUE pairs, as papermill reads them"
    at = [k for k, word in enumerate(words) if word == "-p"]
    return {words[k + 1]: _resolve_type(words[k + 2]) for k in at}


def check_papermill(words):
    notebook = ROOT / words[1]
    assert notebook.exists(), words[1]
    given, at = given_words(words), [k for k, word in enumerate(words) if word == "-p"]
    assert len(words) == 3 + 3 * len(at), f"left over: {words}"
    kind = KINDS.get(notebook.stem.removeprefix("train_")) if notebook.stem.startswith("train_") else None
    if kind is None:
        known = {p.name: p.inferred_type_name for p in _infer_parameters(load_notebook_node(str(notebook)))}
        types = dict(int=int, float=(int, float), str=str, bool=bool)
        for name, value in given.items():
            assert name in known and isinstance(value, types[known[name]]), f"{notebook.stem} has no {name}={value!r}: {known}"
        return
    options = check_parameters(kind, given)
    if hasattr(options, "weights") and "self_similarity" not in getattr(options, "losses", ""):
        options.weights(), options.check_stored()
    if "tasks" in given or kind is Dlip:
        options.named_tasks()
    assert options.batch_size % options.processes == 0


def check_module(words):
    "torchrun … -m vlkd_lab.trainers FOLDER NAME=VALUE …, -m vlkd_lab.stores DATA TEACHER [SIDES], or another module's"
    module, *rest = words[words.index("-m") + 1 :]
    if module == "vlkd_lab.stores":
        assert 2 <= len(rest) <= 3
        for side in rest[2].split(",") if len(rest) == 3 else ():
            stores._read_as(side)
        return
    if module == "vlkd_lab.corpus":
        given = corpus._parser().parse_args(rest)
        assert given.construction in corpus.CONSTRUCTIONS and given.engine in ENGINES and given.count
        assert bool(given.teacher and given.images) == (given.construction == "grounded")
        return
    if module == "vlkd_lab.trackers":
        assert len(rest) == 2 and set(rest[1].split(",")) <= set(trackers.TRACKERS)
        return
    if module == "vlkd_lab.export.shards":
        settings = dict(setting.split("=") for setting in rest[3:])
        assert set(settings) <= set(inspect.signature(reinforce).parameters)
        assert (float(settings.get("crop_scale", 1)) < 1) == (int(settings.get("augmentations", 0)) > 0)
        return
    assert module == "vlkd_lab.trainers" and "=" not in rest[0]
    given = {name: read_value(value) for name, _, value in (word.partition("=") for word in rest[1:])}
    method = given.pop("method")
    assert method in METHODS
    options = check_parameters(METHODS[method].parameters, given)
    if getattr(options, "teacher_features", "") == "shards":
        options.check_stored()
        options.check_alone()
        assert options.weights()


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_would_start(name):
    for words in commands(name):
        check_papermill(words) if words[0] == "papermill" else check_module(words)
    assert commands(name) or name in ("run_folder", "add_a_loss", "vocabulary")


def test_a_wrong_command_would_be_noticed():
    for wrong in ("-p stagez 3", "-p stages three", "-p losses affinity=1", "stages=3", "-p batch_size 10 -p processes 3"):
        with pytest.raises((AssertionError, ValueError)):
            check_papermill(shlex.split(f"papermill nbs/train_tinyclip.ipynb out.ipynb {wrong}"))
    with pytest.raises(AssertionError):
        check_papermill(shlex.split("papermill nbs/watch_run.ipynb out.ipynb -p folder runs/b32"))
    with pytest.raises(ValueError):
        check_module(shlex.split("torchrun -m vlkd_lab.trainers runs/x method=TinyCLIP teachers=y"))


def check_models(words):
    "Teachers and students that need no network to be known exist by these names"
    given = given_words(words)
    name, _, tag = str(given.get("teacher", "")).partition("/")
    if tag and name != "Salesforce":
        assert tag in open_clip.list_pretrained_tags_by_model(name), given["teacher"]
    if given.get("student"):
        assert model_config(given["student"])["embed_dim"]


def test_models_named_in_commands_and_on_the_first_page_exist():
    for page in GUIDES:
        for words in commands(page):
            if words[0] == "papermill":
                check_models(words)
    table = next(line for line in prose("getting_started").splitlines() if line.startswith("| a published TinyCLIP"))
    assert all(len(find_releases(name)) == 1 for name in re.findall(r"`([^`]+)`", table))


@pytest.mark.parametrize("name", GUIDES)
def test_parameters_named_in_the_prose_exist(name):
    known = {field for kind in (*KINDS.values(), METHODS["MobileCLIP"].parameters) for field in kind.__dataclass_fields__}
    text = re.sub(r"```.*?```", "", prose(name), flags=re.S)
    said = re.findall(r"`([a-z]+(?:_[a-z]+)*)[ =]([\w.:,/ =-]+)`", text)
    others = {"make", "jupyter", "tail", "torchrun", "papermill", "pip", "python", "accelerate", "kill"}  # commands
    others |= {"scale", "needs_projection", "needs_teacher", "unpaired", "rng", "function", "run_folder"}  # arguments, fields of Term
    unknown = [f"{parameter} {value}" for parameter, value in said if parameter not in known | others | set(LOSSES)]
    assert not unknown, unknown
    for target in re.findall(r"`make (\w+)`|^make (\w+)", prose(name), flags=re.M):
        assert re.search(rf"^{''.join(target)}:", (ROOT / "Makefile").read_text(), flags=re.M), target


@pytest.mark.parametrize("name", GUIDES)
def test_links_and_pictures_are_there(name):
    text = prose(name)
    assert text.startswith("# ") and "\n> " in text[:300]
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", text):
        assert (PAGES[name].parent / target).exists(), target
    for path in re.findall(r"`(tests/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


NUMBER = r"(?<![\w.])\d+\.\d+(?![\w.]*\d)"


def quoted(name):
    "The measured part of a guide: the pages it quotes, and the numbers of each row of a table and of each part of a sentence"
    section = re.search(r"^## (What was measured|What it costs)\n(.*?)(?=^## |\Z)", prose(name), flags=re.S | re.M)[2]
    pages = [target for target in re.findall(r"\]\([\w./]*?(\w+)\.ipynb\)", section) if re.search("results|benchmark", target)]
    lines = re.sub(r"\]\([^)]*\)", "]", section).splitlines()
    parts = [part for line in lines for part in ([line] if line.startswith("|") else re.split(r"(?<=[.:;]) ", line))]
    return pages, [numbers for part in parts if (numbers := re.findall(NUMBER, part))]


@cache
def stated(page):
    "All numbers of a page in their order, and after them those of its tables read column by column"
    text = everything_said(page)
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.M)
    rows = [[line.strip("|").split("|") for line in table.splitlines()] for table in tables]
    columns = [" ".join(cells) for table in rows for cells in zip(*table, strict=False)]
    return [float(number) for number in re.findall(r"\d+\.\d+", "\n".join([text, *columns]))]


def stand_together(numbers, page):
    "Whether a page states all these numbers, which may be rounded, within a few numbers of each other"
    last = {}
    for place, value in enumerate(stated(page)):
        last |= {number: place for number in numbers if f"{value:.{len(number.split('.')[1])}f}" == number}
        if len(last) == len(set(numbers)) and place - min(last.values()) < 6 * len(numbers):
            return True
    return False


@pytest.mark.parametrize("name", [*METHOD_GUIDES, "bench"])
def test_quoted_numbers_stand_where_they_are_quoted_from(name):
    pages, parts = quoted(name)
    assert pages and sum(map(len, parts)) > 3
    missing = [numbers for numbers in parts if not any(stand_together(numbers, page) for page in pages)]
    assert not missing, f"{missing} stand together on none of {pages}"


def test_a_wrong_quotation_would_be_noticed():
    "Of the rows and sentences with three numbers and more, one number is changed in its last place: seldom is another quotation true"
    passed, changed = 0, 0
    for name in [*METHOD_GUIDES, "bench"]:
        pages, parts = quoted(name)
        for numbers in (part for part in parts if len(part) > 2):
            for place, number in enumerate(numbers):
                decimals = len(number.split(".")[1])
                wrong = [*numbers[:place], f"{float(number) + 2 * 10**-decimals:.{decimals}f}", *numbers[place + 1 :]]
                passed += any(stand_together(wrong, page) for page in pages)
                changed += 1
    assert changed > 50 and passed < 0.2 * changed, f"{passed} of {changed}"


def test_files_that_only_some_runs_have_are_written_by_the_library():
    library = "\n".join(path.read_text() for path in (ROOT / "vlkd_lab").rglob("*.py"))
    table = prose("run_folder").split("Other methods and events add:")[1].split("\n\n## ")[0]
    files = re.findall(r"`([\w/]+\.\w+)`", table)
    assert len(files) >= 7
    for file in files:
        assert f'"{Path(file).name}"' in library, file


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of its own, in whose nbs/ a page runs"
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "data_samples").symlink_to(ROOT / "data_samples")
    known = dict(all_losses())
    with plt.rc_context(), pd.option_context("display.max_colwidth", 50):
        yield tmp_path
    LOSSES.clear()
    LOSSES.update(known)
    METHODS._methods.pop("Sharp", None)
    sys.modules.pop("sharp_lab", None)


@pytest.mark.parametrize("name", GUIDES)
def test_the_page_runs(name, project, monkeypatch):
    folder = project / PAGES[name].parent.relative_to(ROOT)
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    names = run_page(PAGES[name])
    assert not list(project.glob("runs/*")), "a page leaves no run behind"
    if name == "add_a_method":
        assert METHODS["Sharp"].views and names["lines"] <= 80
    if name == "add_a_loss":
        assert {"affinity_mimicking", "self_similarity", "total"} <= set(names["lines"].columns) and names["shares"]
