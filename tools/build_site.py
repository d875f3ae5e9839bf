"""The website without Quarto: nbdev processes the notebooks, Sphinx lays out the pages. `make docs`, or run it with a folder.

`_quarto.yml` is the configuration of both builders: title, description, the sidebar with its sections and their order. What Sphinx reads
differently from Quarto is rewritten here, and what only a network could bring (scripts, fonts, formulas) comes from installed packages.
"""

import gc
import html
import json
import os
import re
import shutil
import sys
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from docutils import nodes
from fontTools.ttLib import TTFont
from pages import only_listed_pages, sections
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from vlkd_lab.sent_pages import mathml

ROOT = Path(__file__).parent.parent
LOOK = Path(__file__).parent / "site_look"  # styles, script and sidebar
PLOTLY = "application/vnd.plotly.v1+json"
OPTIONS = dict(
    extensions=["myst_nb", "build_site"],
    nb_execution_mode="off",
    nb_ipywidgets_js={},
    myst_enable_extensions=["dollarmath", "colon_fence", "attrs_block", "attrs_inline", "deflist"],
    myst_dmath_double_inline=True,
    myst_all_links_external=True,  # they are rewritten before, and checked after
    suppress_warnings=["myst.header", "misc.highlighting_failure"],
    html_theme="pydata_sphinx_theme",
    html_math_renderer="mathml",
    html_static_path=[str(LOOK / "site.css"), str(LOOK / "site.js")],
    html_favicon=str(LOOK / "favicon.svg"),
    html_context=dict(default_mode="auto"),
    html_css_files=["site.css"],
    html_js_files=["site.js"],
    html_sidebars={"**": ["pages.html"]},
    html_show_sourcelink=False,
    html_copy_source=False,
    html_show_sphinx=False,
    html_use_index=False,
    templates_path=[str(LOOK)],
    highlight_language="none",
    smartquotes=False,
    language="en",
)
THEME = dict(
    navbar_center=[],
    article_header_start=[],
    secondary_sidebar_items=["page-toc"],
    footer_start=[],
    footer_end=[],
    show_toc_level=2,
    pygments_light_style="a11y-high-contrast-light",
    pygments_dark_style="a11y-high-contrast-dark",
)


def page_name(notebook: str) -> str:
    "The page of a notebook, seen from nbs/: its folder and its name, without ending, as nbdev names it"
    from vlkd_lab.reference import page_of

    return page_of(notebook).removesuffix(".html")


def processed(root: Path) -> dict[str, nbformat.NotebookNode]:
    "Every notebook as nbdev processes it for a website, by its path; `nbdev_docs` hands the same ones to Quarto"
    from nbdev.serve import proc_nbs

    where = Path.cwd()
    try:
        os.chdir(root)  # nbdev reads the settings that it finds there
        with only_listed_pages(root):
            cache = Path(proc_nbs(force=True, n_workers=0))
    finally:
        os.chdir(where)
    return {path.relative_to(cache).as_posix(): nbformat.read(path, 4) for path in sorted(cache.rglob("*.ipynb"))}


# Pages for Sphinx


class Rewriter:
    "A processed notebook in the words of MyST, with links that hold in the built site"

    def __init__(self, root: Path, notebooks: set[str]):
        settings = (root / "settings.ini").read_text(encoding="utf-8")
        name = re.search(r"^repo = (.+)", settings, re.M)[1]
        user = re.search(r"^user = (.+)", settings, re.M)[1]
        self.root, self.notebooks, self.host = root, notebooks, f"https://{user}.github.io/{name}/"
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
        "Markdown as MyST reads it"
        source = re.sub(r"(?<!!)\]\(([^)\s]+)\)", lambda m: f"]({self.target(m[1], folder)})", source)
        source = re.sub(r"^(:{3,}) *\{\.callout-(\w+)[^}\n]*\}", r"\1{\2}", source, flags=re.M)
        return re.sub(r"\]\(([^)]+)\)\{[^}\n]*\}", r"](\1)", source)

    def code(self, cell: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
        "A code cell without directives, its plots as the site draws them; what is folded becomes text"
        found = dict(re.findall(r"^#\| *([\w-]+): *(.*)$", cell.source, re.M))
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        if found.get("code-fold") == "true":
            return nbformat.v4.new_markdown_cell(folded(source, found.get("code-summary", "Code").strip('"')))
        cell.source, cell.metadata = source, nbformat.NotebookNode()
        if found.get("echo") == "false":
            cell.metadata.tags = ["remove-input"]
        for output in cell.outputs:
            if PLOTLY in output.get("data", {}):
                output.data = nbformat.NotebookNode({"text/html": figure(output.data[PLOTLY])})
        return cell if source or cell.outputs else None

    def page(self, notebook: nbformat.NotebookNode, folder: Path) -> tuple[nbformat.NotebookNode, dict[str, str]]:
        "The page of a notebook in `folder`, and its front matter"
        first, *others = notebook.cells
        front = yaml.safe_load(first.source.strip().strip("-"))
        lead = f"# {front['title']}\n\n{{.lead}}\n{front['description']}"
        cells = [nbformat.v4.new_markdown_cell(self.text(lead, folder))]
        for cell in others:
            if cell.cell_type == "markdown" and not cell.source.startswith("<!--"):
                cells.append(nbformat.v4.new_markdown_cell(self.text(cell.source, folder)))
            elif cell.cell_type == "code" and (made := self.code(cell)):
                cells.append(made)
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        return nbformat.v4.new_notebook(cells=cells, metadata=kernel), front


def raw(text: str, words: str = "") -> str:
    "HTML that MyST leaves as it is"
    return f"``````{{raw}} html\n{words}\n{text}\n``````"


def folded(source: str, summary: str) -> str:
    shown = highlight(source, PythonLexer(), HtmlFormatter())
    return raw(f'<details class="source"><summary>{html.escape(summary)}</summary>{shown}</details>', ":class: no-search\n")


def figure(plot: dict) -> str:
    "A plot as site.js draws it"
    data = json.dumps(dict(data=plot["data"], layout=plot.get("layout", {}))).replace("</", "<\\/")
    height = plot.get("layout", {}).get("height", 450)
    return f'<div class="site-plot" style="height:{height}px"><script type="application/json">{data}</script></div>'


def names_page(root: Path, pages: set[str]) -> str:
    "Every public name of every module: what it is, and where it is described"
    from vlkd_lab.reference import library_entries, page_of_module

    rows, by_page = [], {Path(page).name: page for page in pages if page.startswith("library/")}
    for module, entries in library_entries(root / "vlkd_lab").items():
        page = Path(page_of_module(module)).stem
        for name, entry in entries.items():
            link = f"{by_page.get(page)}.html#{name.lower()}"
            told = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(entry.summary))
            place = f'<a href="{link}"><code>{name}</code></a>' if page in by_page else f"<code>{name}</code>"
            rows.append((name.lower(), f"<tr><td>{place}</td><td>{module}</td><td>{entry.kind}</td><td>{told}</td></tr>"))
    body = "".join(row for _, row in sorted(rows))
    head = "<thead><tr><th>name</th><th>module</th><th>kind</th><th>what it is</th></tr></thead>"
    table = f'<table class="names">{head}<tbody>{body}</tbody></table>'
    search = '<input class="names-filter form-control" type="search" placeholder="Part of a name or of a description" aria-label="Filter">'
    return f"# All names\n\n{{.lead}}\nThe {len(rows)} public names of the library.\n\n" + raw(search + table, ":class: no-search\n")


def write_sources(root: Path, folder: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    "The pages as Sphinx reads them; the sidebar: sections with page and title"
    notebooks = processed(root)
    listed = [one for _, pages in sections(root) for one in pages]
    if missing := set(notebooks) ^ set(listed):
        raise ValueError(f"_quarto.yml and nbs/ differ by {', '.join(sorted(missing))}: every notebook is listed once")
    if doubled := [one for one in listed if [page_name(x) for x in listed].count(page_name(one)) > 1]:
        raise ValueError(f"{' and '.join(doubled)} would be the same page: a page is named without the notebook's number")
    rewriter = Rewriter(root, set(notebooks))
    titles: dict[str, str] = {}
    shutil.copytree(root / "nbs" / "images", folder / "images")
    made = {}
    for name, notebook in notebooks.items():
        made[page_name(name)], front = rewriter.page(notebook, (root / "nbs" / name).parent)
        titles[page_name(name)] = front["title"]
    for page, file in list(rewriter.outside.items()):
        text = rewriter.text(file.read_text(encoding="utf-8"), file.parent)
        titles[page] = file.parent.name
        (folder / f"{page}.md").write_text(text, encoding="utf-8")
    (folder / "names.md").write_text(names_page(root, set(made)), encoding="utf-8")
    sidebar = [(title, [(page_name(one), titles[page_name(one)]) for one in listed]) for title, listed in sections(root)]
    titles["index"] = "Home"
    sidebar[0] = (sidebar[0][0], [(page, titles[page]) for page, _ in sidebar[0][1]])
    sidebar.append(("Reference", [("names", "All names"), *((page, titles[page]) for page in sorted(rewriter.outside))]))
    order = [page for _, pages in sidebar for page, _ in pages if page != "index"]
    made["index"].cells.append(nbformat.v4.new_markdown_cell("```{toctree}\n:hidden:\n\n" + "\n".join(order) + "\n```"))
    for page, notebook in made.items():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, folder / f"{page}.ipynb")
    return sidebar


# What Sphinx is taught


def visit_math(writer, node) -> None:
    writer.body.append(f'<span class="math">{mathml(node.astext(), "inline")}</span>')
    raise nodes.SkipNode


def visit_displaymath(writer, node) -> None:
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def quarto_anchors(app: Sphinx, document: nodes.document) -> None:
    "Headings have the anchors that Quarto gives them, so that one link serves both sites"
    from vlkd_lab.reference import anchor_of

    taken = {one for section in document.findall(nodes.section) for one in section["ids"]}
    for section in document.findall(nodes.section):
        anchor = anchor_of(section.next_node(nodes.title).astext())
        if anchor and (anchor in section["ids"] or anchor not in taken):
            section["ids"] = [anchor, *(one for one in section["ids"] if one != anchor)]
            taken.add(anchor)


def setup(app: Sphinx) -> dict:
    "Sphinx calls it: formulas, anchors, the sidebar"
    app.add_config_value("site_sections", [], "html")
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("doctree-read", quarto_anchors, priority=100)
    app.connect("html-page-context", lambda app, page, template, context, doctree: context.update(sections=app.config.site_sections))
    return dict(parallel_read_safe=True, parallel_write_safe=True)


def add_parts(out: Path) -> None:
    "plotly.js and a font for formulas, from the installed packages"
    import plotly
    import ziamath

    shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", out / "_static")
    font = TTFont(next(Path(ziamath.__file__).parent.glob("fonts/*Math*.ttf")))
    font.flavor = "woff"
    font.save(out / "_static" / "math.woff")
    (out / "_static" / "webpack-macros.html").unlink(missing_ok=True)  # a template of the theme


def add_players(root: Path, out: Path) -> None:
    "Time lines of runs, pages of their own that a guide shows in a frame"
    (out / "images").mkdir(exist_ok=True)
    for page in sorted((root / "nbs" / "images").glob("*.html")):
        shutil.copy(page, out / "images")


# The finished site, looked through


class _Page(HTMLParser):
    "Anchors, links and what a page loads by itself"

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, pairs: list) -> None:
        given = {name: value or "" for name, value in pairs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("next", "prev", "search", "canonical", "author", "index"):
            self.loaded.append(given.get("href", ""))
        elif "src" in given:
            self.loaded.append(given["src"])


def _broken_pictures(site: Path, pages: dict[str, _Page]) -> Iterator[str]:
    "Pictures, in files and within pages, that do not decode"
    held = [(f"a picture within {name}", b64decode(link.partition(",")[2])) for name, page in pages.items() for link in page.loaded
            if re.match(r"data:image/(png|jpeg|gif|webp);base64,", link)]
    held += [(path.name, path.read_bytes()) for path in site.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg", ".gif", ".webp")]
    for name, data in held:
        try:
            Image.open(BytesIO(data)).load()
        except OSError:
            yield f"{name} is broken"


def faults(site: Path) -> Iterator[str]:
    "What is wrong with a site: links, anchors and pictures that lead nowhere, and whatever it would load from elsewhere"
    pages = {path.relative_to(site).as_posix(): _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for name, page in pages.items():
        for link in page.loaded:
            if re.match(r"(https?:)?//", link):
                yield f"{name} loads {link}"
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "":
                if parts.scheme not in ("http", "https", "mailto", "data", ""):
                    yield f"{name} links to {link}"
                continue
            target = os.path.normpath(Path(name).parent / unquote(parts.path)) if parts.path else name
            if target.startswith("..") or parts.path.startswith("/") or not (site / target).is_file():
                yield f"{name} links to {link}, and there is no such file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name} links to {link}, and there is no such place"
    for path in site.rglob("*.css"):
        for link in re.findall(r"url\(['\"]?([^'\")]+)|@import +['\"]([^'\"]+)", path.read_text(encoding="utf-8")):
            link = "".join(link)
            inside = link.startswith(("data:", "#")) or (path.parent / urlsplit(link).path).is_file()
            if re.match(r"(https?:)?//", link) or not inside:
                yield f"{path.name} loads {link}"
    yield from _broken_pictures(site, pages)


def build(out: Path, root: Path = ROOT) -> None:
    "Build the site into `out`; RuntimeError with every warning and fault where there is one"
    for folder in (str(root), str(Path(__file__).parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    with tempfile.TemporaryDirectory() as temporary:
        source, made, warnings = Path(temporary, "source"), Path(temporary, "site"), StringIO()
        source.mkdir()
        sidebar = write_sources(root, source)
        website = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
        own = dict(project=website["title"], html_title=website["title"], site_sections=sidebar)
        own |= dict(html_theme_options=THEME | dict(logo=dict(text=website["title"])), html_short_title=website["title"])
        with docutils_namespace():
            app = Sphinx(source, None, made, Path(temporary, "trees"), "html", OPTIONS | own, None, warnings)
            app.build()
        add_parts(made)
        add_players(root, made)
        (made / ".nojekyll").touch()
        (made / ".buildinfo").unlink(missing_ok=True)
        shutil.rmtree(made / "_sources", ignore_errors=True)
        found = [*re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue()).splitlines(), *faults(made)]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    if found:
        raise RuntimeError("the site has faults:\n" + "\n".join(found[:40]))


if __name__ == "__main__":
    gc.disable()  # the pages' trees are needed to the end, and to search them for garbage took a tenth of the time
    sys.path.insert(0, str(Path(__file__).parent))
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve()
    build(out)
    print(f"The site is in {out.name}/: open {out.name}/index.html, or serve it with `python -m http.server -d {out.name}`")
