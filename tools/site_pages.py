"""A processed notebook in the words of Sphinx: links, folded code, plots, thumbnails, and words for pictures."""

import html
import json
import os
import re
from pathlib import Path

import nbformat
import yaml
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from pygments.token import Name, Punctuation, Text, Whitespace

PLOTLY = "application/vnd.plotly.v1+json"
THUMBNAIL = (560, 350)  # pixels, about twice what they are shown at
LONGEST_ALT = 220  # characters


def page_name(notebook: str) -> str:
    "The page of a notebook, seen from nbs/: its folder and its name, without ending, as nbdev names it"
    from vlkd_lab.reference import page_of

    return page_of(notebook).removesuffix(".html")


def setting(root: Path, name: str) -> str:
    "A value of settings.ini"
    text = (root / "settings.ini").read_text(encoding="utf-8")
    return re.search(rf"^{name} = (.+)", text, re.M)[1].strip()


def raw(text: str, words: str = "") -> str:
    "HTML that MyST leaves as it is"
    return f"``````{{raw}} html\n{words}\n{text}\n``````"


class Code(HtmlFormatter):
    "Code without marks around names, punctuation and blanks, which have the colour of what surrounds them: a quarter of all pages"

    def format_unencoded(self, tokensource, outfile) -> None:
        "Write tokens, those of no colour of their own as plain text"
        plain = (Name, Punctuation, Whitespace)
        super().format_unencoded(((Text if kind in plain else kind, text) for kind, text in tokensource), outfile)


def folded(source: str, summary: str) -> str:
    "A cell's code behind its summary; the search leaves it out"
    shown = highlight(source, PythonLexer(), Code())
    return raw(f'<details class="source"><summary>{html.escape(summary)}</summary>{shown}</details>', ":class: no-search\n")


def figure(plot: dict) -> str:
    "A plot as site.js draws it"
    data = json.dumps(dict(data=plot["data"], layout=plot.get("layout", {}))).replace("</", "<\\/")
    height = plot.get("layout", {}).get("height", 450)
    return f'<div class="site-plot" style="height:{height}px"><script type="application/json">{data}</script></div>'


def plain(markdown: str) -> str:
    "Markdown without its marks"
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"\s+", " ", re.sub(r"[*`$]|\{[^}\n]*\}", "", text)).strip()


def words_for_output(heading: str, text: str) -> str:
    "What stands in for a picture that a cell has drawn: the sentence that leads to it, and the heading above"
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip() and not re.match(r"\s*(#|\||```|:::|- )", part)]
    sentences = re.split(r"(?<=[.!?]) +", plain(paragraphs[-1])) if paragraphs else []
    words = f"{heading}: {sentences[0]}" if sentences and heading else heading or "".join(sentences[:1]) or "Output"
    if len(words) > LONGEST_ALT:
        words = words[:LONGEST_ALT].rsplit(" ", 1)[0] + " …"
    return words.rstrip(":")


def with_alt(text: str, alt: str) -> str:
    "HTML whose pictures have words; those that have none get `alt`"
    text = re.sub(r"(<img [^>]*?) *alt=([\"'])\2", r"\1", text)
    named = f'<img alt="{html.escape(alt)}" '
    return re.sub(r"<img (?![^>]*\balt=)", lambda m: named, text)


def make_thumbnails(pictures: Path) -> None:
    "Beside every picture NAME.png its upper part, small, as NAME-small.png"
    for path in sorted(pictures.glob("*.png")):
        picture = Image.open(path).convert("RGB")
        part = picture.crop((0, 0, picture.width, min(picture.height, picture.width * THUMBNAIL[1] // THUMBNAIL[0])))
        part.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
        part.quantize(64, dither=Image.Dither.NONE).save(path.with_name(f"{path.stem}-small.png"), optimize=True)


class Rewriter:
    "A processed notebook in the words of MyST, with links that hold in the built site"

    def __init__(self, root: Path, notebooks: set[str]):
        self.root = root
        self.notebooks = notebooks
        self.host = f"https://{setting(root, 'user')}.github.io/{setting(root, 'repo')}/"
        self.outside: dict[str, Path] = {}  # page -> a file of the project beside the notebooks that some page links to

    def target(self, link: str, folder: Path) -> str:
        "Where a link of a text that lies in `folder` leads, seen from the folder of its page"
        if link.startswith(self.host):
            return self.seen_from(folder, link.removeprefix(self.host))
        if re.match(r"[a-z]+:|#", link):
            return link
        path, _, anchor = link.partition("#")
        file = Path(os.path.normpath(folder / path))
        anchor = f"#{anchor}" if anchor else ""
        notebook = Path(os.path.relpath(file, self.root / "nbs")).as_posix()
        if notebook in self.notebooks:
            return self.seen_from(folder, page_name(notebook) + ".html" + anchor)
        if file.suffix == ".md" and file.exists():
            page = "_".join(file.relative_to(self.root).with_suffix("").parts).lower()
            self.outside[page] = file
            return self.seen_from(folder, page + ".html" + anchor)
        return link

    def seen_from(self, folder: Path, address: str) -> str:
        "An address of the site, seen from the page of a text in `folder`; what lies beside the notebooks is a page at the root"
        notebooks = self.root / "nbs"
        place = folder.relative_to(notebooks) if folder.is_relative_to(notebooks) else Path()
        return Path(os.path.relpath(address, place)).as_posix()

    def text(self, source: str, folder: Path) -> str:
        "Markdown as MyST reads it; a picture that is itself a link is shown by its thumbnail"
        source = re.sub(r"\[!\[([^\]]*)\]\(([^)\s]*images/[\w-]+)\.png\)\]\(", r"[![\1](\2-small.png)](", source)
        source = re.sub(r"(?<!!)\]\(([^)\s]+)\)", lambda m: f"]({self.target(m[1], folder)})", source)
        source = re.sub(r"^(:{3,}) *\{\.callout-(\w+)[^}\n]*\}", r"\1{\2}", source, flags=re.M)
        return re.sub(r"\]\(([^)]+)\)\{[^}\n]*\}", r"](\1)", source)

    def code(self, cell: nbformat.NotebookNode, alt: str = "Output") -> nbformat.NotebookNode | None:  # None: nothing is left
        "A code cell without directives, its plots as the site draws them; what is folded becomes text"
        found = dict(re.findall(r"^#\| *([\w-]+): *(.*)$", cell.source, re.M))
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        if found.get("code-fold") == "true":
            return nbformat.v4.new_markdown_cell(folded(source, found.get("code-summary", "Code").strip('"')))
        alt = found.get("fig-alt", alt).strip('"')
        cell.source = source
        cell.metadata = nbformat.from_dict({"mystnb": {"image": {"alt": alt}}})
        if found.get("echo") == "false":
            cell.metadata.tags = ["remove-input"]
        for output in cell.outputs:
            if PLOTLY in output.get("data", {}):
                output.data = nbformat.NotebookNode({"text/html": figure(output.data[PLOTLY])})
            elif "text/html" in output.get("data", {}):
                output.data["text/html"] = with_alt(output.data["text/html"], alt)
        return cell if source or cell.outputs else None

    def page(
        self,
        notebook: nbformat.NotebookNode,  # as nbdev processes it
        folder: Path,  # of the notebook
        note: str = "",  # Markdown, below the line
    ) -> tuple[nbformat.NotebookNode, dict[str, str]]:
        "The page of a notebook, and its front matter"
        first, *others = notebook.cells
        front = yaml.safe_load(first.source.strip().strip("-"))
        lead = f"# {front['title']}\n\n{{.lead}}\n{front['description']}"
        if note:
            lead += f"\n\n{{.of-the-outputs}}\n{note}"
        cells = [nbformat.v4.new_markdown_cell(self.text(lead, folder))]
        heading, text = front["title"], ""
        for cell in others:
            if cell.cell_type == "markdown" and not cell.source.startswith("<!--"):
                heading = ([heading] + re.findall(r"^#+ +(.+)$", cell.source, re.M))[-1]
                text = cell.source
                cells.append(nbformat.v4.new_markdown_cell(self.text(cell.source, folder)))
            elif cell.cell_type == "code":
                made = self.code(cell, words_for_output(plain(heading), text))
                if made:
                    cells.append(made)
        if front.get("code-fold"):
            cells = outputs_first(cells)
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        return nbformat.v4.new_notebook(cells=cells, metadata=kernel), front


def outputs_first(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    "Of code cells that follow one another first the outputs, then the code of all of them, folded"
    shown: list[nbformat.NotebookNode] = []
    sources: list[str] = []
    for cell in [*cells, None]:
        if cell is not None and cell.cell_type == "code":
            sources.append(cell.source)
            cell.metadata.tags = ["remove-input"]
            if cell.outputs:
                shown.append(cell)
            continue
        if sources:
            lines = sum(source.count("\n") + 1 for source in sources)
            words = f"Code ({lines} line{'s' if lines > 1 else ''})"
            shown.append(nbformat.v4.new_markdown_cell(folded("\n\n".join(sources), words)))
            sources = []
        if cell is not None:
            shown.append(cell)
    return shown
