"""The public names of the library for the site: a page that lists them, and what the search knows of them."""

import ast
import html
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pages import listed_pages
from site_pages import raw


@dataclass(frozen=True)
class PublicName:
    "A name of the library, as its users know it"

    name: str  # with its class, where it is a method
    module: str  # that one imports it from, seen from the package: a package's face where that hands it on
    kind: str  # function, class, method or value
    address: str  # where it is described, seen from the site's root; empty: nowhere
    summary: str
    is_used: bool = False  # on a page for users: any that is not of the library


@lru_cache
def handed_on(folder: Path) -> dict[str, set[str]]:  # package, such as losses -> names that one imports from it
    "The names that the packages within a package import from their own modules"
    names: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*/__init__.py")):
        package = path.parent.name
        imports = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        names[package] = set()
        for node in imports:
            if node.level or (node.module or "").startswith(f"{folder.name}.{package}."):
                names[package] |= {each.name for each in node.names}
    return names


def _parsed(source: str) -> ast.Module:
    "Some code; empty where it is no Python"
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return ast.Module([], [])


def _imported(source: str) -> set[str]:
    "What some code imports from the library"
    names: set[str] = set()
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlkd_lab"):
            names |= {each.name for each in node.names}
    return names


def _said(words: str) -> set[str]:
    "The name that words set as code speak of: a call, a name with the module before it, or one that only code can have"
    names: set[str] = set()
    for node in _parsed(words).body:
        shown = node.value if isinstance(node, ast.Expr) else None
        is_call = isinstance(shown, ast.Call)
        shown = shown.func if is_call else shown
        if isinstance(shown, ast.Attribute):
            names.add(shown.attr)
        elif isinstance(shown, ast.Name) and (is_call or "_" in shown.id):
            names.add(shown.id)
    return names


def names_in_use(
    notebooks: list[Path],  # pages that are not of the library
) -> set[str]:
    "What notebooks import from the library or speak of"
    names: set[str] = set()
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                names |= _imported(source)
                continue
            for block in re.findall(r"```python\n(.*?)```", source, re.S):
                names |= _imported(block)
            for words in re.findall(r"`([^`\n]+)`", source):
                names |= _said(words)
    return names


def public_names(
    root: Path,  # of the project
    pages: set[str],  # seen from the site's root, without ending
) -> list[PublicName]:  # by the alphabet; methods behind their class
    "What the library's modules say is public, and the methods of its classes"
    from vlkd_lab.reference import library_entries, page_of_module

    library = root / "vlkd_lab"
    for_users = [path for path in listed_pages(root) if path.parent.name != "library"]
    in_use, faces = names_in_use(for_users), handed_on(library)
    found = []
    for module, entries in library_entries(library).items():
        page = f"library/{Path(page_of_module(module)).stem}"
        face = module.partition(".")[0]
        for name, entry in entries.items():
            place = f"{page}.html#{name.lower()}" if page in pages else ""
            home = face if name in faces.get(face, ()) else module
            found.append(PublicName(name, home, entry.kind, place, entry.summary, name in in_use))
            for method in entry.methods:
                full = f"{name}.{method.name}"
                place = f"{page}.html#{full.lower()}" if page in pages else ""
                found.append(PublicName(full, home, "method", place, method.summary))
    return sorted(found, key=lambda each: (each.name.lower(), each.name))


def names_page(
    names: list[PublicName],  # as `public_names` finds them
) -> str:  # Markdown
    "A table of the names: first those that jobs, guides and results use, on request and in a search all of them"
    listed = [each for each in names if each.kind != "method"]
    rows = []
    for each in listed:
        told = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(each.summary))
        code = f"<code>{each.name}</code>"
        place = f'<a href="{each.address}">{code}</a>' if each.address else code
        kept = "" if each.is_used else ' class="inner"'
        module = f"<code>vlkd_lab.{each.module}</code>"
        rows.append(f"<tr{kept}><td>{place}</td><td>{module}</td><td>{each.kind}</td><td>{told}</td></tr>")
    head = "<thead><tr><th>name</th><th>import it from</th><th>kind</th><th>what it is</th></tr></thead>"
    table = f'<table class="names">{head}<tbody>{"".join(rows)}</tbody></table>'
    used = sum(each.is_used for each in listed)
    look = (
        '<div class="names-search"><input class="names-filter form-control" type="search" aria-label="Filter"'
        ' placeholder="Part of a name or of a description">'
        f'<label><input class="names-all" type="checkbox"> all {len(listed):,}, also those that only the library uses</label></div>'
    )
    lead = (
        f"The {used} names that jobs, guides and results use, and where to import them from. "
        f"A search below looks through all {len(listed):,} public names of the library."
    )
    return f"# Names\n\n{{.lead}}\n{lead}\n\n" + raw(look + table, ":class: no-search\n")
