"""What keeps the tree literate: the rules of style that a machine can check."""

import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import yaml
from pages import listed_pages
from papermill.inspection import _infer_parameters, load_notebook_node
from readme import readme

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(listed_pages())
MODULES = sorted(listed_pages(folder="library/"))
JOBS = [p for p in NOTEBOOKS if p.name.startswith("train_")]
BENCH = [p for p in NOTEBOOKS if p.name.startswith(("watch_", "explore_", "export_", "claims"))]
ROOMS = {  # what may lie in nbs/ and in its folders
    ".": r"index|getting_started|gallery|train_\w+|export_student|watch_run|explore_\w+",
    "guides": r"guide_\w+|add_a_\w+|bench|run_folder|full_scale|reliability|curation|vocabulary",
    "results": r"\w+_results|benchmark_\w+|ablation_\w+|claims",
    "library": r"\d+_\w+",  # the number is the floor
}


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def exported(path):
    return [source(c) for c in cells(path) if re.match(r"#\|\s*exports?\b", source(c))]


def module_of(path):
    "The module that a notebook exports, seen from the package; None: it exports none"
    names = [m[1] for c in cells(path) if (m := re.match(r"#\|\s*default_exp (\S+)", source(c)))]
    return names[0].removesuffix(".__init__") if names else None


FLOOR = {module_of(path): int(path.stem.partition("_")[0]) for path in MODULES}


def floor_of(name):
    "The floor of a module, or of what is in it, seen from the package; a package without a page has its highest room's"
    rooms = [floor for module, floor in FLOOR.items() if module and module.startswith(f"{name}.")]
    if name in FLOOR or not rooms:
        return FLOOR[name] if name in FLOOR else floor_of(name.rpartition(".")[0])
    return max(rooms)


# Rooms


def test_every_notebook_lies_in_its_room():
    assert {path.parent.relative_to(NBS).as_posix() for path in NOTEBOOKS} == set(ROOMS)
    for path in NOTEBOOKS:
        room = path.parent.relative_to(NBS).as_posix()
        assert re.fullmatch(ROOMS[room], path.stem), f"{path.stem} does not belong into nbs/{room}"
        exports = module_of(path) is not None or bool(exported(path))
        assert exports == (room == "library"), f"{path.stem}: what exports lies in library/, and nothing else does"


def test_no_two_library_notebooks_share_a_number_a_module_or_a_page():
    names = [path.stem.partition("_") for path in MODULES]
    for kind in ([number for number, _, _ in names], [module_of(p) for p in MODULES], [name for _, _, name in names]):
        assert sorted(set(kind)) == sorted(kind)


def test_the_sidebar_follows_from_the_folders():
    listed = {"Start": []}
    for item in yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]:
        if isinstance(item, str):
            listed["Start"].append(item)
        else:
            listed[item["section"]] = item["contents"]
    lying = {path.relative_to(NBS).as_posix() for path in NOTEBOOKS if path.exists()}
    assert list(listed) == ["Start", "Guides", "Jobs", "Results", "The bench", "Library"]
    assert listed["Library"] == [f"library/{path.name}" for path in MODULES], "the library stands in the order of its numbers"
    of_section = {
        "Start": r"(index|getting_started|gallery)\.ipynb",
        "Guides": r"guides/.+",
        "Jobs": r"(train_|export_)\w+\.ipynb",
        "Results": r"results/.+",
        "The bench": r"(watch_|explore_)\w+\.ipynb",
    }
    for section, name in of_section.items():
        assert sorted(listed[section]) == sorted(one for one in lying if re.fullmatch(name, one)), section
    assert sorted(one for pages in listed.values() for one in pages) == sorted(lying)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_commands_and_names_of_notebooks_are_those_of_today(path):
    text = "\n".join(source(c) for c in cells(path, "markdown"))
    for target in re.findall(r"\]\(((?!https?:|#)[^)\s#]+)", text):
        assert (path.parent / target).exists(), target
    for command in re.findall(r"\bnbs/[\w/]+\.ipynb", text):
        assert (ROOT / command).exists(), command
    assert set(re.findall(r"\b\d\d\d?_[a-z]\w+", text)) <= {p.stem for p in MODULES}


def test_commands_of_other_files_name_notebooks_that_are_there():
    for path in (ROOT / "Makefile", ROOT / "README.md", ROOT / "data_samples" / "README.md"):
        for name in re.findall(r"(?<!\.\./)\bnbs/[\w/]+\.ipynb", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


# Notebooks


@pytest.mark.parametrize("path", JOBS + BENCH, ids=lambda p: p.stem)
def test_a_job_has_one_parameters_cell_that_papermill_reads_line_by_line(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in source(tagged[0]).splitlines() if line.strip()]
    assert all(re.fullmatch(r"\w+: (int|float|str|bool) = .+  # .+", line) for line in lines), lines
    found = {p.name: p for p in _infer_parameters(load_notebook_node(str(path)))}
    assert list(found) == [line.split(":")[0] for line in lines] and len(found) <= 16
    assert all(p.help and p.inferred_type_name in ("int", "float", "str", "bool") for p in found.values())


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.stem)
def test_a_job_shows_its_bench_once_and_waits_with_it(path):
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert sum("attach(" in cell for cell in cells) == 1 and cells.count("bench = attach(job.run.folder)\nbench") == 1
    assert cells.count("when_trained(training, bench)") == 1 and sum(line == "bench" for cell in cells for line in cell.splitlines()) == 1


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.stem)
def test_a_jobs_defaults_are_those_of_its_parameters_class(path):
    from vlkd_lab.methods.blip_training import BlipTraining
    from vlkd_lab.methods.clip_cid import ClipCid
    from vlkd_lab.methods.contrastive import Contrastive
    from vlkd_lab.methods.dime_fm import DimeFm
    from vlkd_lab.methods.dlip import Dlip
    from vlkd_lab.methods.tinyclip import TinyCLIP

    kinds = dict(tinyclip=TinyCLIP, teacher=Contrastive, clip_cid=ClipCid, dime_fm=DimeFm, dlip=Dlip, blip=BlipTraining)
    kind = kinds.get(path.stem.removeprefix("train_"), TinyCLIP)  # train_method: of the method that it names
    tagged = next(c for c in cells(path) if "parameters" in c["metadata"].get("tags", []))
    names: dict = {}
    exec(source(tagged), names)
    names.pop("__builtins__"), names.pop("__annotations__", None)
    defaults = kind()
    own = {"train_teacher": {"steps"}, "train_method": {"method", "settings"}}.get(path.stem, set())
    assert {k: v for k, v in names.items() if k not in own} == {k: getattr(defaults, k) for k in names if k not in own}


@pytest.mark.parametrize("path", JOBS + BENCH, ids=lambda p: p.stem)
def test_a_job_defines_no_long_function(path):
    for cell in cells(path):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 6, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_exported_cells_are_short(path):
    for text in exported(path):
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#|")]
        assert len(text.splitlines()) <= 56 and len(lines) <= 55, f"{len(lines)} lines: {lines[0]} {lines[1]}"
        assert not [line for line in lines if len(line) > 110], "lines of more than 110 columns"


def imported(text):
    "The modules of the lab that a source imports, seen from the package; a string that names one is an import"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (one.name.removeprefix("vlkd_lab.") for one in node.names if one.name.startswith("vlkd_lab."))
        elif isinstance(node, ast.ImportFrom) and node.module == "vlkd_lab":
            yield from (one.name for one in node.names if one.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlkd_lab."):
            package = node.module.removeprefix("vlkd_lab.")
            rooms = [f"{package}.{one.name}" for one in node.names]
            yield from (room if room in FLOOR else package for room in rooms)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"vlkd_lab\.[a-z_.]+(:\w+)?", str(node.value)):
            yield node.value.partition(":")[0].removeprefix("vlkd_lab.")




@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_down(path):
    module = module_of(path)
    names = {name for text in exported(path) for name in imported(text)} - {module}
    assert not {name for name in names if floor_of(name) >= FLOOR[module]}


def test_every_form_of_an_import_is_noticed():
    forms = {
        "from vlkd_lab.runs import Run": "runs",
        "import vlkd_lab.runs": "runs",
        "def f():\n    from vlkd_lab import (\n  data,\n  runs)": "runs",
        "home = 'vlkd_lab.runs'": "runs",
        "from vlkd_lab.methods import dlip": "methods.dlip",
        "open = 'vlkd_lab.methods.dlip:METHOD'": "methods.dlip",
    }
    assert floor_of("runs.Run") == FLOOR["runs"], "a name in a module is as high as the module"
    assert all(module in set(imported(text)) for text, module in forms.items())
    assert not set(imported("import vlkd_lab\nfrom vlkd_lab import __version__\n'vlkd_lab.runs is a module'"))


def public_names(text):
    "The functions and classes that a cell defines and that others may use"
    return [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]


def is_face(path):
    "Whether a page is that of a package and defines nothing itself"
    texts = exported(path)
    is_package = any(re.match(r"#\|\s*default_exp \S+\.__init__", source(c)) for c in cells(path))
    return is_package and not any(public_names(text) for text in texts)


FACES = [path for path in MODULES if is_face(path)]


@pytest.mark.parametrize("path", FACES, ids=lambda p: p.stem)
def test_the_face_of_a_package_has_exactly_the_public_names_of_its_rooms(path):
    package = import_module(f"vlkd_lab.{module_of(path)}")
    rooms = [import_module(f"{package.__name__}.{room.name}") for room in iter_modules(package.__path__)]
    names = [name for room in rooms for name in room.__all__]
    assert sorted(names) == sorted(set(names)), "a name of two rooms"
    assert sorted(reexported(exported(path), package.__name__)) == sorted(names)
    for room in rooms:
        assert all(getattr(package, name) is getattr(room, name) for name in room.__all__)


def reexported(texts, package):
    "The names that a face imports from its rooms"
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}."):
                assert all(one.asname is None for one in node.names)
                yield from (one.name for one in node.names)


def test_a_face_that_forgets_a_name_would_be_noticed():
    text = "from vlkd_lab.data.views import View, Crops\nfrom vlkd_lab.project import project_root"
    assert list(reexported([text], "vlkd_lab.data")) == ["View", "Crops"]
    assert "04_data" in {re.sub(r"^\d+", "04", path.stem) for path in FACES}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_public_name_is_used_in_a_visible_cell(path):
    names = [name for text in exported(path) for name in public_names(text)]
    assert not set(names) - used_in_lessons(), "no visible example of these"


def test_a_public_name_has_one_meaning():
    "No two modules define the same public name, whatever their faces hand on"
    homes = {}
    for path in MODULES:
        for text in exported(path):
            for name in [*public_names(text), *constants(text)]:
                homes.setdefault(name, set()).add(module_of(path))
    assert len(homes) > 800 and not {name: modules for name, modules in homes.items() if len(modules) > 1}


def constants(text):
    "The public names that a cell assigns"
    targets = [target for node in ast.parse(text).body if isinstance(node, ast.Assign) for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")]


@cache
def used_in_lessons():
    "What the cells use that a reader sees and that are no part of the library, of all pages"
    return {name for path in NOTEBOOKS for text in lessons(cells(path)) for name in used_names(text)}


def lessons(code_cells):
    "Sources of the cells that are neither exported nor hidden"
    return [source(c) for c in code_cells if not re.match(r"#\|\s*(export|exports|exporti|hide|default_exp)\b", source(c))]


def used_names(text):
    "Names and attributes of some code; what stands in a string or behind a def or an import is no use"
    nodes = list(ast.walk(ast.parse(_plain(text))))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def _plain(text):
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("%", "!")))


def test_a_name_without_a_lesson_would_be_noticed():
    def code(text):
        return {"cell_type": "code", "source": [text]}

    exported_use = code("#| export\ndef other():\n    return useful(3)")
    hidden_use, word = code("#| hide\nassert useful(3)"), code("print('useful')\n# useful\nfrom a import useful")
    assert lessons([exported_use, hidden_use, word]) == [source(word)]
    assert "useful" not in used_names(source(word))
    assert "useful" in used_names("%timeit 3\nassert losses.useful(3)") and "useful" in used_names("useful(3)")
    assert public_names("def useful(): pass\nclass _Own: pass\nLIMIT = 3") == ["useful"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_page_opens_in_the_usual_order(path):
    everything = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = source(everything[0])
    assert first.startswith("# ") and "\n> " in first, "a title and a > line"
    assert any(source(c).startswith("#| default_exp") for c in everything[:4])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_small_and_whole(path):
    stored = [c.get("outputs", []) for c in cells(path)]
    assert sum(len(json.dumps(o)) for o in stored) < 100_000
    assert not any(o["output_type"] == "error" for outputs in stored for o in outputs)
    ids = [c["id"] for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert len(set(ids)) == len(ids)
    text = path.read_text(encoding="utf-8")
    assert "/work/" not in text and "/root/" not in text and "/home/" not in text, "a path of one machine"
    assert "widget-view" not in text and "widget-state" not in text, "widget state is kept out of notebooks"


def test_nbdev_clean_keeps_the_parameters_tag(tmp_path):
    for path in [*JOBS, ROOT / "settings.ini"]:
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-c", "from nbdev.clean import nbdev_clean; import sys; nbdev_clean(sys.argv[1])"]
    for path in JOBS:
        subprocess.run([*command, path.name], cwd=tmp_path, check=True, capture_output=True)
        assert any("parameters" in c["metadata"].get("tags", []) for c in cells(tmp_path / path.name))


def test_the_exported_library_is_what_the_notebooks_say(tmp_path):
    for name in ("nbs", "settings.ini", "setup.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "vlkd_lab").mkdir()
    shutil.copy(ROOT / "vlkd_lab" / "__init__.py", tmp_path / "vlkd_lab")
    (tmp_path / "tools").mkdir()
    for name in ("tools/pages.py", "_quarto.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "tools/pages.py", "export"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    fresh, kept = (
        {p.relative_to(root).as_posix(): p.read_text() for p in (root / "vlkd_lab").rglob("*.py")}
        for root in (tmp_path, ROOT)
    )
    assert set(fresh) == set(kept)
    for name, text in fresh.items():
        assert text == kept[name], f"{name}: run `make export`"


def test_ruff_is_clean():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "vlkd_lab", "tests", "tools"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_requirements_stand_in_one_place():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert "torch>=2.11" in settings["DEFAULT"]["requirements"].split()
    assert not (ROOT / "requirements.txt").exists() and "install_requires=[" not in (ROOT / "setup.py").read_text()
    wanted = {"AnswerDotAI": "fastcore<2"}
    assert wanted["AnswerDotAI"] in settings["DEFAULT"]["dev_requirements"].split()


def test_the_readme_is_the_index_notebook():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make readme`"
    for target in re.findall(r"\]\(((?!https?:|#)[^)]+)\)", readme()):
        assert (ROOT / target).exists(), target


def test_importing_the_trainers_leaves_the_slow_libraries_alone():
    code = "import sys, vlkd_lab.trainers; print([m for m in ('open_clip', 'transformers', 'matplotlib', 'plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_words_about_one_machine():
    for path in [*ROOT.glob("*.*"), *ROOT.glob("tests/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("data_samples/*.md"), ROOT / "Makefile"]:
        if path.is_file() and path.suffix != ".ipynb" and path.name not in ("test_guards.py", ".git"):  # a work tree has a file .git
            assert not re.search(r"/work/|/root/|pypi\.org|extra-index-url", path.read_text(encoding="utf-8")), path
