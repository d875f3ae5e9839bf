"""The faults that `make faults` plants still stand where their files say, and the runner notices what it should."""

import faults
import nbformat
import pytest

EXPECTED = {"losses", "gates", "trainers", "widgets", "inheritance", "balancing", "features", "runs"}


def test_the_files_are_found():
    assert EXPECTED <= {path.stem for path in faults.FILES}


@pytest.mark.parametrize("path", faults.FILES, ids=lambda path: path.stem)
def test_every_fault_can_be_planted(path):
    planned = faults.read_faults(path)
    assert len(planned) >= 8 and len({fault.reason for fault in planned}) == len(planned)
    for fault in planned:
        assert fault.reason and fault.pages and fault.tests and fault.old != fault.new
        for test in fault.tests:
            assert (faults.ROOT / test.partition("::")[0]).exists(), test
        changed = faults.planted(fault)
        assert len(changed) == 2, "a module and the page that it comes from"
        for file, text in changed.items():
            assert text != file.read_text(encoding="utf-8")


MODULE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
LESSON = "assert double(3) == 6\ntry: half('a')\nexcept TypeError as error: print('refused')"
TEST = "from vlkd_lab.numbers import half\n\n\ndef test_half():\n    assert half(4) == 2\n"
FILE = """
modules = ["numbers"]
pages = ["numbers"]
tests = ["tests/test_numbers.py"]

[[fault]]
reason = "it triples"
old = "return 2 * x"
new = "return 3 * x"

[[fault]]
reason = "it takes a third"
old = "return x / 2"
new = "return x / 3"

[[fault]]
reason = "it takes words"
old = "return x / 2"
new = "return x if isinstance(x, str) else x / 2"

[[fault]]
reason = "it doubles in another way"
old = "return 2 * x"
new = "return x + x"
"""


@pytest.fixture
def small_project(tmp_path, monkeypatch):
    "A project with a module of two functions, its page and its test"
    cells = [nbformat.v4.new_code_cell(source) for source in ("#| default_exp numbers", "#| export\n" + MODULE, LESSON)]
    cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="refused\n")]
    for folder in ("vlkd_lab", "nbs/library", "tests", "data_samples"):
        (tmp_path / folder).mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs" / "library" / "07_numbers.ipynb")
    (tmp_path / "vlkd_lab" / "__init__.py").touch()
    (tmp_path / "vlkd_lab" / "numbers.py").write_text(MODULE)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "tests" / "test_numbers.py").write_text(TEST)
    (tmp_path / "numbers.toml").write_text(FILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return tmp_path


def test_a_page_a_test_or_nothing_notices(small_project):
    before = {path: path.read_bytes() for path in small_project.rglob("*.*") if path.is_file()}
    noticed = {fault.reason: notice for fault, notice, _ in faults.run_faults(small_project / "numbers.toml", small_project)}
    assert noticed == {
        "it triples": "page",
        "it takes a third": "test",
        "it takes words": "page",
        "it doubles in another way": "nothing",
    }
    left = {path: path.read_bytes() for path in before}
    assert left == before, "what was planted is taken away"


def test_a_fault_that_is_not_there_and_a_page_that_fails_anyway_are_errors(small_project):
    fault = faults.read_faults(small_project / "numbers.toml")[0]
    with pytest.raises(ValueError, match="stands 2 times"):
        faults.planted(faults.replace(fault, old="return "), small_project)
    with pytest.raises(ValueError, match="0 notebooks are called numbres"):
        faults.page_file("numbres", small_project)
    page = faults.page_file("numbers", small_project)
    page.write_text(page.read_text().replace("== 6", "== 7"))
    with pytest.raises(RuntimeError, match="numbers fails without any fault: .*assert double"):
        list(faults.run_faults(small_project / "numbers.toml", small_project))


def test_a_wrong_name_is_refused():
    with pytest.raises(SystemExit, match="no fault file is called lossez; there are .*losses"):
        faults.main(["lossez"])
