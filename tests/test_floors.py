"""A page put between two others gets its number, and whatever names the pages behind it follows."""

import json

import pytest
from floors import follow, new_stems, renumber


def notebook(path, *sources):
    kind = {"cell_type": "markdown", "metadata": {}}
    cells = [kind | {"id": f"c{k}", "source": [text]} for k, text in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells}, sort_keys=True, indent=1) + "\n")


@pytest.fixture
def project(tmp_path):
    notebook(tmp_path / "nbs" / "library" / "00_nouns.ipynb", "`01_runs` has [the rest](01_runs.ipynb#where)")
    notebook(tmp_path / "nbs" / "library" / "01_runs.ipynb", "runs")
    notebook(tmp_path / "nbs" / "library" / "methods.ipynb", "methods, after [nouns](00_nouns.ipynb)")
    said = "[runs](../library/01_runs.ipynb), [new](../library/methods.ipynb), 201_runs"
    notebook(tmp_path / "nbs" / "guides" / "a.ipynb", said)
    (tmp_path / "settings.ini").write_text("# 01_runs\n")
    (tmp_path / "data_samples").mkdir()
    (tmp_path / "data_samples" / "README.md").write_text("nbs/library/01_runs.ipynb\n")
    pages = [f"library/{name}.ipynb" for name in ("00_nouns", "methods", "01_runs")]
    section = {"section": "Library", "contents": pages}
    notebook(tmp_path / "nbs" / "index.ipynb", "the beginning")
    sidebar = {"contents": ["index.ipynb", "guides/a.ipynb", section]}
    (tmp_path / "_quarto.yml").write_text(json.dumps({"website": {"sidebar": sidebar}}))
    return tmp_path


def words(path):
    return json.loads(path.read_text())["cells"][0]["source"][0]


def test_a_page_between_two_others_moves_what_lies_behind(project):
    assert renumber(project) == {"methods": "01_methods", "01_runs": "02_runs"}
    library = project / "nbs" / "library"
    lying = sorted(path.name for path in library.iterdir())
    assert lying == ["00_nouns.ipynb", "01_methods.ipynb", "02_runs.ipynb"]
    assert words(library / "01_methods.ipynb") == "methods, after [nouns](00_nouns.ipynb)"
    assert words(library / "02_runs.ipynb") == "runs"
    assert words(library / "00_nouns.ipynb") == "`02_runs` has [the rest](02_runs.ipynb#where)"
    guide = words(project / "nbs" / "guides" / "a.ipynb")
    assert guide == "[runs](../library/02_runs.ipynb), [new](../library/01_methods.ipynb), 201_runs"
    assert (project / "settings.ini").read_text() == "# 02_runs\n"
    assert (project / "data_samples" / "README.md").read_text() == "nbs/library/02_runs.ipynb\n"
    assert renumber(project) == {}, "once is enough"


def test_names_that_change_places_are_not_taken_for_each_other(project):
    assert follow("01_runs, 02_runs", {"01_runs": "02_runs", "02_runs": "01_runs"}) == "02_runs, 01_runs"


def test_beyond_a_hundred_pages_all_numbers_have_three_digits():
    stems = new_stems([f"library/{number:02d}_page{number}.ipynb" for number in range(100)] + ["library/last.ipynb"])
    assert stems["00_page0"] == "000_page0" and stems["last"] == "100_last"
    assert sorted(stems.values()) == list(stems.values())
    assert new_stems(["library/000_page0.ipynb"]) == {"000_page0": "00_page0"}, "and two again, below"


def test_a_page_that_is_not_listed_is_refused_before_anything_moves(project):
    notebook(project / "nbs" / "library" / "03_extra.ipynb", "extra")
    with pytest.raises(ValueError, match="differ by 03_extra.ipynb"):
        renumber(project)
    assert (project / "nbs" / "library" / "methods.ipynb").exists()


def test_somebodys_own_notebook_is_left_out_and_named(project, capsys):
    mine = project / "nbs" / "library" / "Untitled.ipynb"
    mine.write_text("")
    (project / "nbs" / "half.ipynb").write_text('{"cells": [')
    assert renumber(project) == {"methods": "01_methods", "01_runs": "02_runs"}
    told = capsys.readouterr().out
    for path in ("nbs/half.ipynb", "nbs/library/Untitled.ipynb"):
        assert f"left out: {path}, which _quarto.yml does not list" in told
    assert mine.read_text() == ""
