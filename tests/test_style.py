"""The counter of `tools/style.py` on sources whose counts are known."""

import subprocess
import sys
from pathlib import Path

from style import Counts, by_module, count, table

ROOT = Path(__file__).parent.parent
PLANTED = '''
"""A docstring of
two lines.

"""

# a comment is no code, however long it is: ------------------------------------------------------------------
a, b = 1, 2
c, d = divmod(7, 2)  # what a function returns is no tuple that is written out
e = f, g = 3, 4
(h, i), j = (5, 6), 7
squares = [x * x for x in range(3)]
pairs = {x: [y for y in range(x)] for x in range(3)}
deep = {x for x in (y for y in [z for z in "abc"])}
options = {}
options |= {"a": 1}
options |= dict(b=2)
flags = 1 | 2
flags ^= 1
wide = "-----------------------------------------------------------------------------------------------"
edge = "------------------------------------------------------------------------------------------"
'''


def test_each_thing_of_a_planted_source_is_counted():
    assert count(PLANTED) == Counts(code=17, wide=1, tuples=3, comprehensions=6, nested=3, merges=2)


def test_lines_of_exactly_100_columns_are_not_wide():
    line = "x = '" + "-" * 94 + "'"
    assert len(line) == 100
    assert count(line).wide == 0
    assert count(line + " ").code == count(line + "  ").code == 1
    assert count("y" + line).wide == 1


def test_the_table_gives_rates_per_thousand_lines_and_the_whole():
    half = Counts(code=250, wide=5, tuples=1, comprehensions=2, nested=1)
    rows = [line.split() for line in table({"one": half, "two": Counts(code=750, merges=3)}).splitlines()[1:]]
    assert rows == [
        ["one", "250", "2.0%", "4.0", "8.0", "4.0", "0.0"],
        ["two", "750", "0.0%", "0.0", "0.0", "0.0", "4.0"],
        ["total", "1000", "0.5%", "1.0", "2.0", "1.0", "3.0"],
    ]


def test_a_row_a_module_a_package_is_one_and_the_index_is_none(tmp_path):
    for name, text in {"a.py": "x = 1\n", "p/b.py": "x, y = 1, 2\n", "p/__init__.py": "z = 1\n", "_modidx.py": "d = 1\n"}.items():
        path = tmp_path / "vlkd_lab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert by_module(tmp_path) == {"a": Counts(code=1), "p": Counts(code=2, tuples=1)}


def test_the_command_prints_the_table_of_files(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED, encoding="utf-8")
    command = [sys.executable, ROOT / "tools" / "style.py", "planted.py"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == table({"planted.py": count(PLANTED)}).splitlines()
