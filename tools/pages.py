"""The project's notebooks are those that `_quarto.yml` lists; what else lies beside them is its owner's, and is left out.

`python tools/pages.py` names what is left out; `python tools/pages.py export` writes the library without it (`make export`).
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import yaml

ROOT = Path(__file__).parent.parent


def sections(root: Path = ROOT) -> list[tuple[str, list[str]]]:
    "Title and notebooks of each section of the sidebar; pages above the first section have the title `Start`"
    website = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    found: list[tuple[str, list[str]]] = []
    for item in website["sidebar"]["contents"]:
        if isinstance(item, dict) and "section" in item:
            found.append((item["section"], [_address(one) for one in item["contents"]]))
            continue
        if not found:
            found.append(("Start", []))
        found[-1][1].append(_address(item))
    return found


def _address(entry: str | dict) -> str:
    return entry["href"] if isinstance(entry, dict) else entry


def listed_pages(root: Path = ROOT, folder: str = "") -> list[Path]:
    "The notebooks that `_quarto.yml` lists, in its order; of one folder of nbs/, if it is named"
    if not (root / "_quarto.yml").exists():  # a small project of a test
        return sorted((root / "nbs" / folder).rglob("*.ipynb"))
    names = [name for _, notebooks in sections(root) for name in notebooks]
    return [root / "nbs" / name for name in names if name.startswith(folder)]


def unlisted_notebooks(root: Path = ROOT) -> list[Path]:
    "Notebooks below nbs/ that are none of the project's pages"
    lying = set((root / "nbs").rglob("*.ipynb")) - set(listed_pages(root))
    hidden = (".", "_")
    return sorted(path for path in lying if not any(part.startswith(hidden) for part in path.relative_to(root).parts))


def left_out(root: Path = ROOT) -> list[str]:  # empty: nothing
    "A line for each notebook that is left out"
    return [f"left out: {path.relative_to(root)}, which _quarto.yml does not list" for path in unlisted_notebooks(root)]


@contextmanager
def only_listed_pages(root: Path = ROOT) -> Iterator[None]:
    "While the block runs, nbdev sees the project's pages alone; what is left out is printed"
    import nbdev.doclinks
    import nbdev.serve

    print("".join(f"{line}\n" for line in left_out(root)), end="", flush=True)
    strangers = {path.resolve() for path in unlisted_notebooks(root)}
    with ExitStack() as stack:
        for module in (nbdev.doclinks, nbdev.serve):
            find = module.nbglob

            def pages_of(*words, find=find, **settings):
                return find(*words, **settings).filter(lambda path: Path(path).resolve() not in strangers)

            stack.enter_context(patch.object(module, "nbglob", pages_of))
        yield


def export(root: Path = ROOT) -> None:
    "What nbdev_export does, of the project's pages"
    from nbdev.doclinks import nbdev_export

    with only_listed_pages(root):
        nbdev_export()


if __name__ == "__main__":
    if sys.argv[1:] == ["export"]:
        export()
    else:
        print("\n".join(left_out()) or "nbs/ holds the project's pages alone")
