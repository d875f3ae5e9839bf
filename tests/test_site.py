"""The website: built once from a copy of the project, looked through file by file, and opened in a browser that reaches nothing else."""

import ast
import functools
import html
import http.server
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from build_site import Rewriter, _Page, faults, figure, mathml, page_name, sections, write_sources
from fastcore.docments import docments
from filelock import FileLock
from jupyter_page import CHROMIUM_ARGUMENTS, find_chromium
from pages import listed_pages
from playwright.sync_api import expect, sync_playwright

from vlkd_lab.reference import anchor_of, library_entries, modules_of_package, page_of_module

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = {page_name(page.relative_to(NBS).as_posix()): page for page in sorted(listed_pages())}
MODULES = modules_of_package(ROOT / "vlkd_lab")
expect.set_options(timeout=120_000)  # milliseconds; test processes share the cores


def copy_of_the_project(folder: Path) -> Path:
    "What a website is made of"
    for name in ("nbs", "vlkd_lab"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "_quarto.yml", "README.md", "LICENSE", "data_samples/README.md", "tools/build_site.py", "tools/pages.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "tools" / "site_look", folder / "tools" / "site_look")
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The built site; test processes share it. The builder refuses a site with faults"
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "site.lock"):
        project = shared / "project"
        if not (project / "said").exists():
            shutil.rmtree(project, ignore_errors=True)
            command = [sys.executable, "tools/build_site.py", "_docs"]
            done = subprocess.run(command, cwd=copy_of_the_project(project), capture_output=True, text=True, timeout=900)
            (project / "said").write_text(json.dumps([done.returncode, done.stdout + done.stderr[-5000:]]))
        code, said = json.loads((project / "said").read_text())
    assert code == 0, said
    assert "_docs/index.html" in said
    return project / "_docs"


@pytest.fixture(scope="session")
def pages(site):
    "Page, as the site's root sees it -> its text"
    return {path.relative_to(site).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def markdown(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


# What is there


def test_nbdev_processes_every_notebook(site):
    cache = site.parent / "_proc"
    processed = {path.relative_to(cache): path for path in cache.rglob("*.ipynb")}
    assert set(processed) == {path.relative_to(NBS) for path in NOTEBOOKS.values()}
    assert (site.parent / "_proc" / "images").is_dir() and (site.parent / "_proc" / "_quarto.yml").exists(), "Quarto needs them there"
    pages = set()
    for where, path in processed.items():
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        assert first.startswith("---\ntitle: '") and "\ndescription: '" in first, path.name
        pages.add((where.parent / re.search(r"output-file: '(.+)\.html'", first)[1]).as_posix())  # Quarto sees it from the page's folder
    assert pages == set(NOTEBOOKS), "both builders serve the same addresses"


def test_nbdev_docs_hands_the_same_pages_to_quarto(tmp_path):
    "With a stand-in for Quarto that notes what it is given: nbdev's own command runs to its end and leaves the site where it belongs"
    project, programs = copy_of_the_project(tmp_path / "project"), tmp_path / "programs"
    programs.mkdir()
    (programs / "quarto").write_text("#!/bin/sh\nmkdir -p _docs && ls *.ipynb */*.ipynb images/*.png _quarto.yml > _docs/given\n")
    (programs / "quarto").chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    command = [sys.executable, "-c", "from nbdev.quarto import nbdev_docs; nbdev_docs(n_workers=0)"]
    done = subprocess.run(command, cwd=project, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    given = (project / "_docs" / "given").read_text().split()
    assert {path.relative_to(NBS).as_posix() for path in NOTEBOOKS.values()} | {"_quarto.yml", "images/bench.png"} <= set(given)
    assert yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["project"] == {"type": "website", "output-dir": "_docs"}


def test_every_notebook_is_a_page_and_every_page_is_in_every_sidebar(pages):
    wanted = set(NOTEBOOKS)
    assert wanted | {"names", "data_samples_readme", "search"} <= set(pages)
    listed = [page_name(one) for _, names in sections(ROOT) for one in names]
    for page in wanted:
        sidebar = re.search(r'<nav class="site-pages.*?</nav>', pages[page], re.S)[0]
        seen = [link if link != "#" else Path(page).name for link in re.findall(r'href="([^"]*)"', sidebar)]
        links = [os.path.normpath(Path(page).parent / link).removesuffix(".html") for link in seen]
        assert links[: len(listed)] == listed, f"the sidebar of {page} has not the order of _quarto.yml"
        assert sidebar.count("aria-current") == 1


def test_what_stands_below_a_title_is_kept(pages):
    for page, path in NOTEBOOKS.items():
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        rest = "".join(first).partition("\n\n")[2]
        for words in re.findall(r"[A-Za-z][a-z]+ [a-z]+ [a-z]+ [a-z]+", rest)[:3]:
            assert words in re.sub(r"\s+", " ", pages[page]), f"{page}: {words}"


def test_the_site_has_no_faults_and_no_paths_of_this_machine(site, pages):
    assert list(faults(site)) == []
    for name, text in pages.items():
        for path in (str(ROOT), str(site.parent), str(Path.home() / "."), "/source/"):
            assert path == "/" or path not in text, f"{name} names {path}"
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 40e6


def test_links_of_the_readme_hold_in_the_site(site):
    links = re.findall(r"\]\(((?!https?:|#)[^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    home = _Page((site / "index.html").read_text(encoding="utf-8"))
    for link in links:
        if link.endswith(".ipynb"):
            assert page_name(link.removeprefix("nbs/")) + ".html" in home.links
        elif link.endswith(".md"):
            assert link.removesuffix(".md").replace("/", "_").lower() + ".html" in home.links
        else:
            assert any(Path(loaded).name == Path(link).name for loaded in home.loaded), link


# Names


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_its_place(module, pages):
    exported = next(n.value for n in ast.parse(MODULES[module].read_text(encoding="utf-8")).body
                    if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")
    page = f"library/{page_of_module(module)}"
    anchors, index = _Page(pages[page.removesuffix(".html")]).anchors, _Page(pages["names"]).links
    for name in library_entries(ROOT / "vlkd_lab")[module].keys() & set(ast.literal_eval(exported)):
        assert name.lower() in anchors, f"{module} does not describe {name}"
        assert f"{page}#{name.lower()}" in index, f"{module}.{name} is not in the list of names"


@pytest.mark.parametrize("module", ["losses", "balancing", "inheritance"])
def test_parameters_are_described_as_fastcore_reads_them(module, pages):
    library = import_module(f"vlkd_lab.{module}")
    text = re.sub(r'<a href="[^"]*">|</a>', "", pages[f"library/{module}"])
    for name in library.__all__:
        thing = getattr(library, name)
        if not inspect.isfunction(inspect.unwrap(thing)):
            continue
        start = text.index(f'id="{name.lower()}"')
        entry = text[start : text.index('<details class="source"', start)]
        for parameter, said in docments(inspect.unwrap(thing), full=True).items():
            shown = "<i>returns</i>" if parameter == "return" else f"{parameter}</code>"
            if said["docment"]:
                assert shown in entry, f"{name}: {parameter}"
                words = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(said["docment"], quote=False))
                assert words in entry, f"{name}: {words}"


# Formulas and plots


def test_every_formula_is_drawn(pages):
    for page, path in NOTEBOOKS.items():
        text = re.sub(r"```.*?```|`[^`\n]+`", "", markdown(path), flags=re.S)
        wanted = len(re.findall(r"\$\$.+?\$\$|(?<![\\$])\$[^$\n]+\$(?!\$)", text, re.S))
        drawn = re.findall(r"<math.*?</math>", pages[page], re.S)
        assert len(drawn) == wanted, page
        assert not any("\\" in one or "merror" in one for one in drawn), page


def test_a_formula_with_an_unknown_command_is_refused():
    assert "<mfrac>" in mathml(r"\frac12 \mathbb 1", "inline")
    with pytest.raises(ValueError, match="notacommand"):
        mathml(r"\notacommand{x}", "inline")


def test_plots_are_drawn_by_one_plotly_that_lies_in_the_site(site, pages):
    assert [path.relative_to(site).as_posix() for path in site.rglob("*plotly*")] == ["_static/plotly.min.js"]
    with_plots = {name for name, text in pages.items() if '<div class="site-plot"' in text}
    stored = {page for page, path in NOTEBOOKS.items() if '"application/vnd.plotly.v1+json": {' in path.read_text(encoding="utf-8")}
    assert with_plots == stored and "library/balance_explorer" in with_plots
    loaded = {link for text in pages.values() for link in _Page(text).loaded}
    assert not any("plotly.min.js" in link for link in loaded), "only site.js loads it, where it is needed"
    assert "</script>" not in figure({"data": [{"name": "</script>"}]}).removesuffix("</script></div>")


# What is refused


@pytest.mark.parametrize("body, said", [
    ('<a href="none.html">x</a>', "no such file"),
    ('<a href="#none">x</a>', "no such place"),
    ('<a href="other.html#none">x</a>', "no such place"),
    ('<a href="/other.html">x</a>', "no such file"),
    ('<a href="../outside.html">x</a>', "no such file"),
    ('<img src="none.png">', "no such file"),
    ('<img src="broken.png">', "broken"),
    ('<img src="data:image/png;base64,AAAA">', "broken"),
    ('<script src="https://example.org/x.js"></script>', "loads https://example.org"),
    ('<link rel="stylesheet" href="//example.org/x.css">', "loads //example.org"),
    ('<a href="javascript:alert(1)">x</a>', "links to javascript"),
])
def test_faults_are_found(tmp_path, body, said):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "other.html").write_text('<p id="here">x</p>')
    (tmp_path / "page.html").write_text('<a href="other.html#here">x</a><a href="https://example.org">x</a>')
    before = [one for one in faults(tmp_path) if "broken.png" not in one]
    (tmp_path / "page.html").write_text(body)
    assert before == [] and any(said in one for one in faults(tmp_path))


def test_a_style_that_loads_a_font_from_elsewhere_is_a_fault(tmp_path):
    (tmp_path / "a.css").write_text('@import "https://example.org/b.css"; p { background: url(none.svg) }')
    assert len(list(faults(tmp_path))) == 2


@pytest.mark.parametrize("listed, said", [("", "differ by library/extra.ipynb"), ("library/extra.ipynb", "the same page")])
def test_a_notebook_that_is_not_listed_or_would_be_the_same_page_is_refused(tmp_path, monkeypatch, listed, said):
    names = ["index.ipynb", "library/05_extra.ipynb", *([listed] if listed else [])]
    (tmp_path / "_quarto.yml").write_text(json.dumps({"website": {"sidebar": {"contents": names}}}))
    (tmp_path / "settings.ini").write_text("repo = lab\nuser = somebody\n")
    notebooks = dict.fromkeys(["index.ipynb", "library/05_extra.ipynb", "library/extra.ipynb"])
    monkeypatch.setattr("build_site.processed", lambda root: notebooks)
    with pytest.raises(ValueError, match=said):
        write_sources(tmp_path, tmp_path)


def test_links_are_rewritten_to_pages(tmp_path):
    (tmp_path / "settings.ini").write_text("repo = lab\nuser = somebody\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("# Data")
    rewriter = Rewriter(tmp_path, {"library/10_losses.ipynb", "index.ipynb"})
    given = "[`b`](https://somebody.github.io/lab/library/losses.html#b) [d](http://e.org)"
    at_home = f"[a](library/10_losses.ipynb#tile) {given} [c](../data/README.md)"
    wanted = "[a](library/losses.html#tile) [`b`](library/losses.html#b) [d](http://e.org) [c](data_readme.html)"
    assert rewriter.text(at_home, tmp_path / "nbs") == wanted and list(rewriter.outside) == ["data_readme"]
    in_a_guide = f"[a](../library/10_losses.ipynb#tile) {given} [c](../../data/README.md)"
    wanted = "[a](../library/losses.html#tile) [`b`](../library/losses.html#b) [d](http://e.org) [c](../data_readme.html)"
    assert rewriter.text(in_a_guide, tmp_path / "nbs" / "guides") == wanted
    in_the_library = "[a](10_losses.ipynb) [`b`](https://somebody.github.io/lab/library/losses.html#b)"
    assert rewriter.text(in_the_library, tmp_path / "nbs" / "library") == "[a](losses.html) [`b`](losses.html#b)"
    assert rewriter.text("[a](../nbs/library/10_losses.ipynb)", tmp_path / "data") == "[a](library/losses.html)"
    assert rewriter.text("::: {.callout-note}\nx\n:::", tmp_path) == ":::{note}\nx\n:::"
    assert anchor_of("Many GPUs, one folder") == "many-gpus-one-folder"


# In a browser


@pytest.fixture(scope="module")
def served(site):
    "The address of the site below a path of its own, as a project's page has it"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def translate_path(self, path):
            return super().translate_path(path.removeprefix("/lab")) if path.startswith("/lab/") else str(site / "no-such-file")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/lab/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if find_chromium() is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def open_site(browser, served):
    "A page of the site in a window of a size; whatever it asks of another host, and every error, fails the test"
    contexts, wrong = [], []

    def open_page(name, width=1400, scheme="light", **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **settings)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith((served, "data:", "blob:")) else None)
        page.on("response", lambda answer: wrong.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(served + name)
        contexts.append(context)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def test_one_finds_ones_way_by_clicking(open_site):
    page = open_site("index.html")
    page.locator(".site-pages a", has_text="Getting started").click()
    expect(page).to_have_url(re.compile("getting_started.html$"))
    page.locator(".site-pages summary", has_text="Library").click()
    page.locator(".site-pages a", has_text=re.compile(r"^losses\.pairs$")).click()
    expect(page.locator("h1")).to_contain_text("losses.pairs")
    expect(page.locator(".site-pages .current")).to_be_in_viewport()
    page.locator("#pst-secondary-sidebar a", has_text=re.compile("^affinity_mimicking$")).click()
    expect(page.locator("section#affinity_mimicking > h3")).to_be_in_viewport()
    page.locator("section#affinity_mimicking table.parameters a", has_text="Features").first.click()
    expect(page).to_have_url(re.compile("features.html#features$"))
    page.locator("a.right-next").click()
    expect(page.locator("h1")).to_contain_text("samples")
    page.locator(".site-pages a", has_text="The lab bench").click()
    expect(page).to_have_url(re.compile("/lab/guides/bench.html$"))
    picture = page.locator("article img").first
    assert picture.evaluate("e => e.complete && e.naturalWidth > 0"), "images/ lies beside the page's folder"


def test_search_finds_names_and_words(open_site):
    page = open_site("guides/guide_tinyclip.html")
    page.locator(".search-button-field").first.click()
    page.keyboard.type("affinity_mimicking")
    page.keyboard.press("Enter")
    page.locator("#search-results ul.search a", has_text="affinity_mimicking").first.wait_for()
    page.locator('#search-results a[href*="losses_pairs.html"]').first.click()
    expect(page).to_have_url(re.compile("losses_pairs.html"))
    page = open_site("search.html?q=quarantine")
    found = page.locator("#search-results li", has=page.locator('a[href*="sources.html"]')).first
    expect(found).to_contain_text("quarantine of bad samples")
    assert "import" not in found.inner_text(), "folded sources are no words of a page"


def test_the_list_of_names_can_be_filtered(open_site):
    page = open_site("names.html")
    page.locator(".names-filter").fill("gradient_share")
    shown = page.locator("table.names tbody tr:visible")
    expect(shown.first).to_contain_text("gradient_share")
    assert shown.count() < 10
    shown.first.locator("a").click()
    expect(page).to_have_url(re.compile("losses_objective.html#gradient_share$"))


def test_formulas_are_drawn_with_the_sites_own_font(open_site):
    page = open_site("library/losses_tiles.html")
    page.wait_for_function("[...document.fonts].some(face => face.family.includes('Site Math') && face.status === 'loaded')")
    sizes = page.evaluate("[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect()).map(box => [box.width, box.height])")
    assert len(sizes) > 10 and all(width > 3 and height > 5 for width, height in sizes)
    fraction = page.locator("div.math mfrac").first.bounding_box()
    assert fraction["height"] > 1.5 * page.locator("div.math mi").first.bounding_box()["height"], "numerator over denominator"


def test_plots_are_drawn_and_follow_the_colour_mode(open_site):
    page = open_site("library/balance_explorer.html")
    plot = page.locator(".site-plot").first
    plot.scroll_into_view_if_needed()
    expect(plot.locator(".main-svg").first).to_be_visible()
    assert plot.locator("path.js-line").first.bounding_box()["width"] > 100
    colour = "() => getComputedStyle(document.querySelector('.site-plot .xtick text')).fill"
    light = page.evaluate(colour)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"light => ({colour})() !== light", arg=light)
    around = plot.evaluate("e => getComputedStyle(e.closest('.text_html')).backgroundColor")
    assert around == "rgba(0, 0, 0, 0)", "light words on a dark page"


def test_the_page_follows_the_system_until_told_otherwise(open_site):
    background = "() => getComputedStyle(document.body).backgroundColor"
    light, dark = open_site("index.html").evaluate(background), open_site("index.html", scheme="dark").evaluate(background)
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 600 and sum(map(int, re.findall(r"\d+", dark)[:3])) < 150
    page = open_site("library/losses.html")
    page.locator("#pst-header .theme-switch-button:visible").click()
    page.locator(".theme-change-button[data-mode=dark]:visible").click()
    page.wait_for_function(f"dark => ({background})() === dark", arg=dark)
    page.locator(".site-pages a", has_text="Home").click()
    page.wait_for_url("**/index.html")  # and for its load
    assert page.evaluate(background) == dark, "it is remembered"


def test_outputs_made_for_white_paper_stay_readable_in_the_dark(open_site):
    page = open_site("results/dlip_results.html", scheme="dark")
    paper = "e => getComputedStyle(e).backgroundColor"
    assert page.locator(".cell_output img").first.evaluate(paper) == "rgb(255, 255, 255)"
    words, ground = page.locator(".cell_output table.dataframe td").first.evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(e.closest('tr')).backgroundColor]")
    assert abs(sum(map(int, re.findall(r"\d+", words)[:3])) - sum(map(int, re.findall(r"\d+", ground)[:3]))) > 350


WIDTHS = """() => {
    const found = [];
    for (let e = document.querySelector('h1'); e; e = e.parentElement) found.push([e.tagName, e.scrollWidth - e.clientWidth]);
    return found; }"""


def test_no_page_is_wider_than_a_narrow_screen(open_site, served, pages):
    "Scripts, which take most of a page's time, run where they draw: in pages with plots"
    still = open_site("index.html", width=375, java_script_enabled=False)
    drawn = open_site("index.html", width=375)
    for name in pages:
        still.goto(f"{served}{name}.html")
        looked_at = [still]
        if still.locator(".site-plot").count():
            drawn.goto(f"{served}{name}.html")
            looked_at.append(drawn)
        for page in looked_at:
            assert [one for one in page.evaluate(WIDTHS) if one[1] > 1] == [], f"{name}: what holds the text can be scrolled sideways"
    page = open_site("library/losses.html", width=375)
    page.locator(".primary-toggle").click()
    page.locator("#pst-primary-sidebar-modal .site-pages a", has_text="Home").click()
    expect(page).to_have_url(re.compile("index.html$"))
