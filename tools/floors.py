"""Number the library's notebooks in the order in which `_quarto.yml` lists them: `make floors`.

To put a page between two others, write its line where it belongs (`library/NAME.ipynb`, under any number or none) and
run this. Files are renamed; the list, links, commands and names in every notebook and in data_samples/README.md follow.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from pages import left_out, listed_pages, unlisted_notebooks

ROOT = Path(__file__).parent.parent


def new_stems(listed: list[str]) -> dict[str, str]:
    "File name without ending -> the same with the number of its place in the list"
    stems = [Path(page).stem for page in listed]
    digits = max(2, len(str(len(stems) - 1)))  # the same for all, so that names sort as their numbers do
    return {stem: f"{number:0{digits}d}_{_without_number(stem)}" for number, stem in enumerate(stems)}


def _without_number(stem: str) -> str:
    return re.sub(r"^[0-9]+_", "", stem)


def _has_number(stem: str) -> bool:
    return stem != _without_number(stem)


def follow(text: str, stems: Mapping[str, str]) -> str:
    "A text with the new names; a page that has no number yet is known by its file name alone"
    numbered = "|".join(re.escape(stem) for stem in filter(_has_number, stems))
    if numbered:
        text = re.sub(rf"\b({numbered})\b", lambda m: stems[m[1]], text)
    bare = "|".join(re.escape(stem) for stem in stems if not _has_number(stem))
    if bare:
        text = re.sub(rf"(?<![\w])({bare})(?=\.ipynb)", lambda m: stems[m[1]], text)
    return text


def follow_in_notebook(path: Path, stems: Mapping[str, str]) -> None:
    "Change the cells of a notebook that name a page; outputs stay, and a file in which nothing changes"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    before = ["".join(cell["source"]) for cell in notebook["cells"]]
    after = [follow(text, stems) for text in before]
    if after != before:
        for cell, text in zip(notebook["cells"], after, strict=True):
            cell["source"] = text.splitlines(keepends=True)
        written = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False)  # as nbdev writes it
        path.write_text(written + "\n", encoding="utf-8")


def renumber(root: Path) -> dict[str, str]:
    "Make files and texts of a project agree with its list; the names that changed"
    website = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    sections = [item for item in website["sidebar"]["contents"] if isinstance(item, dict)]
    listed = next(item["contents"] for item in sections if item["section"] == "Library")
    library = root / "nbs" / "library"
    wrong = {Path(page).name for page in listed if not (root / "nbs" / page).exists() or listed.count(page) > 1}
    strangers = unlisted_notebooks(root)
    wrong |= {path.name for path in strangers if path.parent == library and _has_number(path.stem)}
    if wrong:
        names = ", ".join(sorted(wrong))
        raise ValueError(f"_quarto.yml and nbs/library/ differ by {names}: every notebook is listed once")
    print("".join(f"{line}\n" for line in left_out(root)), end="")
    stems = {old: new for old, new in new_stems(listed).items() if old != new}
    for old in stems:  # out of the way first: a new name may be another's old one
        (library / f"{old}.ipynb").rename(library / f"{old}.moved")
    for old, new in stems.items():
        (library / f"{old}.moved").rename(library / f"{new}.ipynb")
    if stems:
        pages = [page for page in listed_pages(root) if page.parent != library]
        pages += [library / f"{stems.get(Path(page).stem, Path(page).stem)}.ipynb" for page in listed]
        for path in pages:
            follow_in_notebook(path, stems)
        for path in (root / "_quarto.yml", root / "settings.ini", root / "data_samples" / "README.md"):
            path.write_text(follow(path.read_text(encoding="utf-8"), stems), encoding="utf-8")
    return stems


if __name__ == "__main__":
    try:
        changed = renumber(ROOT)
    except ValueError as error:
        sys.exit(str(error))
    print("\n".join(f"{old} -> {new}" for old, new in changed.items()) or "every number is that of its place")
