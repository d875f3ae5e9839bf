"""Count what makes code hard to read, per 1,000 lines of code (lines that are neither blank nor a comment).

    python tools/style.py                  every module of vlkd_lab, and the whole
    python tools/style.py FILE.py ...      these files, and all of them together
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Counts:
    """What stands in a source; docstrings are code."""

    code: int = 0  # lines
    wide: int = 0  # lines of code over 100 columns
    tuples: int = 0  # assignments of a written-out tuple to a tuple of names
    comprehensions: int = 0  # those inside others included
    nested: int = 0  # comprehensions inside another one
    merges: int = 0  # |=

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def code_lines(text: str) -> set[int]:
    """The numbers of the lines that hold code."""
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            numbers.update(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return {number for number in numbers if lines[number - 1].strip()}


def count(text: str) -> Counts:
    """The counts of a Python source."""
    lines = text.splitlines()
    numbers = code_lines(text)
    nodes = list(ast.walk(ast.parse(text)))
    tuples = [
        node
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    ]
    comprehensions = [node for node in nodes if isinstance(node, COMPREHENSIONS)]
    nested = {id(part) for node in comprehensions for part in ast.walk(node) if part is not node}
    merges = [node for node in nodes if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr)]
    return Counts(
        code=len(numbers),
        wide=sum(len(lines[number - 1]) > 100 for number in numbers),
        tuples=len(tuples),
        comprehensions=len(comprehensions),
        nested=sum(id(node) in nested for node in comprehensions),
        merges=len(merges),
    )


def by_module(root: Path = ROOT) -> dict[str, Counts]:
    """The counts of every module of the package, a package inside it as one; nbdev's index is left out."""
    rows: dict[str, Counts] = {}
    for path in sorted((root / "vlkd_lab").rglob("*.py")):
        if path.name != "_modidx.py":
            name = path.relative_to(root / "vlkd_lab").parts[0].removesuffix(".py")
            rows[name] = rows.get(name, Counts()) + count(path.read_text(encoding="utf-8"))
    return rows


def table(rows: dict[str, Counts]) -> str:
    """A row a module and the total: lines of code, the share of wide ones, and the rest per 1,000 lines."""
    lines = [f"{'':<24}{'code':>7}{'> 100':>8}{'tuples':>9}{'compr.':>9}{'nested':>9}{'|=':>9}"]
    for name, c in {**rows, "total": sum(rows.values(), Counts())}.items():
        size = max(c.code, 1)
        rates = [1000 * value / size for value in (c.tuples, c.comprehensions, c.nested, c.merges)]
        lines.append(f"{name:<24}{c.code:>7}{c.wide / size:>8.1%}" + "".join(f"{rate:>9.1f}" for rate in rates))
    return "\n".join(lines)


def main(files: list[str]) -> None:
    """Print the table of some files, or of the package."""
    rows = {name: count(Path(name).read_text(encoding="utf-8")) for name in files}
    print(table(rows if files else by_module()))


if __name__ == "__main__":
    main(sys.argv[1:])
