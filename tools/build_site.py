"""The website without Quarto: nbdev processes the notebooks, Sphinx lays out the pages. `make docs`, or run it with a folder.

`_quarto.yml` is the configuration of both builders: title, description, the sidebar with its sections and their order. What Sphinx reads
differently from Quarto is rewritten here, and what only a network could bring (scripts, fonts, formulas) comes from installed packages.
Outputs of job notebooks are those of their executed copies (job_outputs.py); the search and the list of names have files of their own.
"""

import gc
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import nbformat
import yaml
from docutils import nodes
from fontTools.ttLib import TTFont
from job_outputs import add_outputs, version
from pages import only_listed_pages, sections
from site_checks import faults, read_pages, reading_faults
from site_names import PublicName, names_page, public_names
from site_pages import Code, Rewriter, make_thumbnails, page_name, plain, raw, setting
from site_search import search_index, sections_of
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from vlkd_lab.sent_pages import mathml

ROOT = Path(__file__).parent.parent
LOOK = Path(__file__).parent / "site_look"  # styles, script and sidebar
LOGO = str(ROOT / "nbs" / "images" / "logo.svg")
LICENCES = {"apache2": "Apache-2.0", "mit": "MIT", "bsd3": "BSD-3-Clause"}  # nbdev's word -> the licence's name
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
    html_static_path=[str(LOOK / name) for name in ("site.css", "site.js", "search.js")] + [LOGO],
    html_favicon=LOGO,
    html_css_files=["site.css"],
    html_js_files=["site.js", "search.js"],
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
    navbar_start=["navbar-logo", "site-version"],
    article_header_start=["page-links"],
    secondary_sidebar_items=["page-toc"],
    footer_start=["site-footer"],
    footer_end=[],
    show_toc_level=2,
    pygments_light_style="a11y-high-contrast-light",
    pygments_dark_style="a11y-high-contrast-dark",
)


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


@dataclass
class Sources:
    "What the pages' sources leave for their frame"

    sidebar: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)  # sections with page and title
    about: dict[str, dict] = field(default_factory=dict)  # page -> section, description and links
    names: list[PublicName] = field(default_factory=list)


def links_of(
    root: Path,
    place: str,  # of the page's source, seen from the project's root
    module: str = "",  # that the page exports, likewise
    has_code: bool = False,  # something to run elsewhere
) -> list[tuple[str, str, str]]:  # words, address, explanation
    "The links from a page to its source"
    where = f"{setting(root, 'user')}/{setting(root, 'repo')}"
    branch = setting(root, "branch")
    links = []
    if has_code:
        colab = f"https://colab.research.google.com/github/{where}/blob/{branch}/{place}"
        links.append(("Open in Colab", colab, f"In Colab, first: %pip install git+https://github.com/{where}"))
    links.append(("Source", f"https://github.com/{where}/blob/{branch}/{place}", "The file that this page is made of"))
    if module:
        links.append(("Module", f"https://github.com/{where}/blob/{branch}/{module}", "The module that this page exports"))
    links.append(("Edit", f"https://github.com/{where}/edit/{branch}/{place}", "Suggest a change"))
    return links


def modules_by_page(root: Path) -> dict[str, str]:  # page -> file, seen from the project's root
    "The module of each page of the library"
    from vlkd_lab.reference import modules_of_package, page_of_module

    modules = modules_of_package(root / "vlkd_lab")
    return {f"library/{Path(page_of_module(name)).stem}": path.relative_to(root).as_posix() for name, path in modules.items()}


def check_listed(notebooks: set[str], listed: list[str]) -> None:
    "ValueError where a notebook is not listed, or two would be the same page"
    if missing := notebooks ^ set(listed):
        raise ValueError(f"_quarto.yml and nbs/ differ by {', '.join(sorted(missing))}: every notebook is listed once")
    pages = [page_name(one) for one in listed]
    if doubled := [one for one in listed if pages.count(page_name(one)) > 1]:
        raise ValueError(f"{' and '.join(doubled)} would be the same page: a page is named without the notebook's number")


SEARCH_PAGE = """# Search

{.lead}
Names of the library, pages and headings that hold all words.

""" + raw(
    '<div class="search-page"><input class="form-control" type="search" aria-label="Search" placeholder="Words or a name"'
    ' autocomplete="off" spellcheck="false"></div><noscript><p>The search needs JavaScript; <a href="names.html">the names</a>'
    " are listed without.</p></noscript>"
)


def write_sources(root: Path, folder: Path) -> Sources:
    "The pages as Sphinx reads them"
    notebooks = processed(root)
    check_listed(set(notebooks), [one for _, pages in sections(root) for one in pages])
    rewriter = Rewriter(root, set(notebooks))
    sources, titles = Sources(), {"names": "Names"}
    shutil.copytree(root / "nbs" / "images", folder / "images")
    make_thumbnails(folder / "images")
    modules = modules_by_page(root)
    pages = {}
    for name, notebook in notebooks.items():
        page = page_name(name)
        note = add_outputs(page, notebook)
        pages[page], front = rewriter.page(notebook, (root / "nbs" / name).parent, note)
        titles[page] = front["title"]
        has_code = any(cell.cell_type == "code" for cell in notebook.cells)
        links = links_of(root, f"nbs/{name}", modules.get(page, ""), has_code)
        sources.about[page] = dict(description=plain(front["description"]), links=links)
    for page, file in list(rewriter.outside.items()):
        text = rewriter.text(file.read_text(encoding="utf-8"), file.parent)
        titles[page] = file.parent.name
        place = file.relative_to(root).as_posix()
        sources.about[page] = dict(description=f"What lies in {file.parent.name}/", links=links_of(root, place))
        (folder / f"{page}.md").write_text(text, encoding="utf-8")
    sources.names = public_names(root, set(pages))
    (folder / "names.md").write_text(names_page(sources.names), encoding="utf-8")
    (folder / "search.md").write_text(SEARCH_PAGE, encoding="utf-8")
    sources.about["names"] = dict(description="The public names of the library, and where to import them from", links=[])
    sources.about["search"] = dict(description="Search the names, pages and headings", links=[])
    titles["index"] = "Home"
    for section, listed in sections(root):
        sources.sidebar.append((section, [(page_name(one), titles[page_name(one)]) for one in listed]))
    sources.sidebar.append(("Reference", [(page, titles[page]) for page in ("names", *sorted(rewriter.outside))]))
    for section, listed in sources.sidebar:
        for page, _ in listed:
            sources.about[page]["section"] = section
    order = [page for _, listed in sources.sidebar for page, _ in listed if page != "index"]
    pages["index"].cells.append(nbformat.v4.new_markdown_cell("```{toctree}\n:hidden:\n\n" + "\n".join([*order, "search"]) + "\n```"))
    for page, notebook in pages.items():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, folder / f"{page}.ipynb")
    return sources


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


def keep_sections(app: Sphinx, document: nodes.document, page: str) -> None:
    "The text of every heading, for the search"
    app.site_pages[page] = sections_of(document)


def prepare(app: Sphinx) -> None:
    "What a builder is told before it begins; the site has a search of its own"
    app.builder.search = False
    app.builder.highlighter.formatter = Code


def frame(app: Sphinx, page: str, template: str, context: dict, document) -> None:
    "What the templates around a page's text show"
    nothing = dict(description=app.config.project, links=[])
    context.update(sections=app.config.site_sections, about=app.config.site_about.get(page, nothing))
    if page == "search":
        context.update(prev=None, next=None)


def setup(app: Sphinx) -> dict:
    "Sphinx calls it: formulas, anchors, the frame around a page"
    app.site_pages = {}
    app.add_config_value("site_sections", [], "html")
    app.add_config_value("site_about", {}, "html")
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("doctree-read", quarto_anchors, priority=100)
    app.connect("doctree-resolved", keep_sections)
    app.connect("html-page-context", frame)
    app.connect("builder-inited", prepare)
    return dict(parallel_read_safe=True, parallel_write_safe=False)


def add_parts(out: Path) -> None:
    "plotly.js and a font for formulas, from the installed packages"
    import plotly
    import ziamath

    shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", out / "_static")
    font = TTFont(next(Path(ziamath.__file__).parent.glob("fonts/*Math*.ttf")))
    font.flavor = "woff"
    font.save(out / "_static" / "math.woff")
    (out / "_static" / "webpack-macros.html").unlink(missing_ok=True)  # a template of the theme
    for path in (out / "_static").rglob("*.map"):  # of its scripts, for those who write them
        path.unlink()


def add_players(root: Path, out: Path) -> None:
    "Time lines of runs, pages of their own that a guide shows in a frame"
    (out / "images").mkdir(exist_ok=True)
    for page in sorted((root / "nbs" / "images").glob("*.html")):
        shutil.copy(page, out / "images")


def settings_of(root: Path, sources: Sources) -> dict:
    "What Sphinx is told of this site, beside OPTIONS"
    website = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    title = website["title"]
    repository = f"https://github.com/{setting(root, 'user')}/{setting(root, 'repo')}"
    look = THEME | dict(logo=dict(text=title, image_light="logo.svg", image_dark="logo.svg", alt_text=""))
    licence = LICENCES.get(setting(root, "license"), setting(root, "license"))
    shown = dict(default_mode="auto", repository=repository, licence=licence, site_title=title)
    own = dict(project=title, html_title=title, html_short_title=title, version=version(root), release=version(root))
    own |= dict(html_theme_options=look, html_context=shown)
    return OPTIONS | own | dict(site_sections=sources.sidebar, site_about=sources.about)


def build(out: Path, root: Path = ROOT) -> None:
    "Build the site into `out`; RuntimeError with every warning and fault where there is one"
    for folder in (str(root), str(Path(__file__).parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    with tempfile.TemporaryDirectory() as temporary:
        source, made, warnings = Path(temporary, "source"), Path(temporary, "site"), StringIO()
        source.mkdir()
        sources = write_sources(root, source)
        with docutils_namespace():
            app = Sphinx(source, None, made, Path(temporary, "trees"), "html", settings_of(root, sources), None, warnings)
            app.build()
        index = search_index(sources.names, app.site_pages)
        (made / "_static" / "search_index.js").write_text(index, encoding="utf-8")
        add_parts(made)
        add_players(root, made)
        (made / ".nojekyll").touch()
        (made / ".buildinfo").unlink(missing_ok=True)
        shutil.rmtree(made / "_sources", ignore_errors=True)
        pages = read_pages(made)
        own_pages = {name: page for name, page in pages.items() if not name.startswith("images/")}
        said = re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue()).splitlines()
        found = [*said, *faults(made, pages), *reading_faults(own_pages)]
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
