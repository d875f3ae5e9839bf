"""Pages that run in this process, where JupyterLab would run them: all of them share what is imported."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMS = ("_repr_html_", "_repr_png_", "_repr_mimebundle_")  # in which a frontend asks for what a cell shows


def cells_of(path: Path, kind: str = "code") -> list[dict]:
    """The cells of a kind of a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def run_page(path: Path, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run a notebook's cells and draw what each shows; the names that they leave. Parameters replace those of the page, as papermill's do."""
    names: dict[str, Any] = {"__name__": "page"}
    for number, cell in enumerate(cells_of(path)):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        place = f"{path.stem}, cell {number}"
        exec(compile(tree, place, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            unknown = set(parameters or {}) - set(names)
            assert not unknown, f"{path.name} has no parameter {', '.join(unknown)}"
            names |= parameters or {}
        _draw(None if last is None else eval(compile(ast.Expression(last.value), place, "eval"), names))
    return names


def _draw(shown: Any) -> None:
    for form in FORMS:
        if callable(getattr(type(shown), form, None)):
            getattr(shown, form)()
