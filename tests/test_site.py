"""The website: built once from a copy of the project, looked through file by file, and opened in a browser that reaches nothing else."""

import ast
import configparser
import functools
import html
import http.server
import inspect
import json
import os
import re
import shutil
import threading
from importlib import import_module
from pathlib import Path

import forked
import job_outputs
import nbformat
import pytest
import yaml
from build_site import write_sources
from fastcore.docments import docments
from filelock import FileLock
from jupyter_page import CHROMIUM_ARGUMENTS, find_chromium
from pages import listed_pages, sections
from playwright.sync_api import expect, sync_playwright
from site_checks import Page, faults, reading_faults
from site_names import names_in_use, public_names
from site_pages import Rewriter, figure, outputs_first, page_name, with_alt, words_for_output

from vlkd_lab.reference import anchor_of, library_entries, modules_of_package, page_of_module
from vlkd_lab.sent_pages import mathml

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = {page_name(page.relative_to(NBS).as_posix()): page for page in sorted(listed_pages())}
MODULES = modules_of_package(ROOT / "vlkd_lab")
expect.set_options(timeout=25_000)  # milliseconds; test processes share the cores


def copy_of_the_project(folder: Path) -> Path:
    "What a website is made of"
    for name in ("nbs", "vlkd_lab"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "_quarto.yml", "README.md", "LICENSE", "data_samples/README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
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
            printed = copy_of_the_project(project) / "printed"
            builder = forked.start(str(project / "tools" / "build_site.py"), "_docs", output=str(printed), folder=str(project))
            builder.join(900)
            (project / "said").write_text(json.dumps([builder.exitcode, printed.read_text()[-5000:]]))
        code, said = json.loads((project / "said").read_text())
    assert code == 0, said
    assert "_docs/index.html" in said
    return project / "_docs"


@pytest.fixture(scope="session")
def pages(site):
    "Page, as the site's root sees it -> its text"
    return {path.relative_to(site).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


@pytest.fixture(scope="session")
def parsed(pages):
    "Page -> what it has, each read once"
    return {name: Page(text) for name, text in pages.items()}


def settings() -> dict[str, str]:
    "settings.ini, its values filled in"
    read = configparser.ConfigParser()
    read.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(read["DEFAULT"])


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
    forked.run("-c", "from nbdev.quarto import nbdev_docs; nbdev_docs(n_workers=0)", folder=str(project), PATH=path)
    given = (project / "_docs" / "given").read_text().split()
    assert {path.relative_to(NBS).as_posix() for path in NOTEBOOKS.values()} | {"_quarto.yml", "images/bench.png"} <= set(given)
    assert yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["project"] == {"type": "website", "output-dir": "_docs"}


def test_every_notebook_is_a_page_and_every_page_is_in_every_sidebar(pages):
    wanted = set(NOTEBOOKS)
    assert set(pages) == wanted | {"names", "data_samples_readme", "search", "images/timeline"}
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


def test_the_site_names_no_paths_of_this_machine_and_is_small(site, pages):
    "That it has no faults is what the builder looks for before it ends"
    for name, text in pages.items():
        for path in (str(ROOT), str(site.parent), str(Path.home() / "."), "/source/"):
            assert path == "/" or path not in text, f"{name} names {path}"
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 45e6


def test_links_of_the_readme_hold_in_the_site(site):
    links = re.findall(r"\]\(((?!https?:|#)[^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    home = Page((site / "index.html").read_text(encoding="utf-8"))
    for link in links:
        if link.endswith(".ipynb"):
            assert page_name(link.removeprefix("nbs/")) + ".html" in home.links
        elif link.endswith(".md"):
            assert link.removesuffix(".md").replace("/", "_").lower() + ".html" in home.links
        else:
            assert any(Path(loaded).name == Path(link).name for loaded in home.loaded), link


# Names


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_its_place(module, parsed):
    exported = next(n.value for n in ast.parse(MODULES[module].read_text(encoding="utf-8")).body
                    if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")
    page = f"library/{page_of_module(module)}"
    anchors, index = parsed[page.removesuffix(".html")].anchors, parsed["names"].links
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


def test_plots_are_drawn_by_one_plotly_that_lies_in_the_site(site, pages, parsed):
    assert [path.relative_to(site).as_posix() for path in site.rglob("*plotly*")] == ["_static/plotly.min.js"]
    with_plots = {name for name, text in pages.items() if '<div class="site-plot"' in text}
    stored = {page for page, path in NOTEBOOKS.items() if '"application/vnd.plotly.v1+json": {' in path.read_text(encoding="utf-8")}
    assert with_plots == stored and "library/balance_explorer" in with_plots
    loaded = {link for page in parsed.values() for link in page.loaded}
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
        page.set_default_timeout(25_000)
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


def test_search_answers_while_one_types(open_site):
    page = open_site("guides/guide_tinyclip.html")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator(".search-button-field").first.click()
    page.keyboard.type("affinity_mimicking")
    first = page.locator("#search-list li").first
    expect(first).to_contain_text("affinity_mimicking")
    expect(first).to_contain_text("function · vlkd_lab.losses")
    expect(first.locator(".excerpt")).to_contain_text("Cross-entropy from the teacher's image-text affinities")
    expect(page.locator("#pst-search-dialog [role=status]")).to_contain_text("result")
    assert {Path(url).name for url in asked} - {"logo.svg"} == {"search_index.js"}, "nothing else is loaded, and no other page"
    page.keyboard.press("ArrowDown")
    expect(first).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("losses_pairs.html#affinity_mimicking$"))


def test_search_has_a_page_of_its_own(open_site):
    page = open_site("guides/guide_tinyclip.html")
    page.locator(".search-button-field").first.click()
    page.keyboard.type("quarantine")
    page.keyboard.press("Enter")  # nothing is chosen
    expect(page).to_have_url(re.compile("search.html[?]q=quarantine$"))
    found = page.locator("#search-page-list li", has=page.locator('a[href*="sources.html"]')).first
    expect(found).to_contain_text("quarantine of bad samples")
    page.locator(".search-page input").fill("nothing-has-this-word")
    expect(page.locator(".search-page [role=status]")).to_contain_text("Nothing has all of")
    assert page.locator(".search-page li").count() == 0


def test_every_name_is_the_first_thing_that_its_search_finds(open_site, site):
    page = open_site("index.html")
    page.evaluate("siteSearch.load()")
    names = [each for each in public_names(site.parent, set(NOTEBOOKS)) if each.kind != "method"]
    found = page.evaluate("names => names.map(name => siteSearch.find(name, 1)[0]?.[3])", [each.name for each in names])
    assert len(names) > 1000 and {each.name: place for each, place in zip(names, found, strict=True) if place != each.address} == {}
    methods = page.evaluate("siteSearch.find('Run.control', 3).map(entry => entry[3])")
    assert methods[0] == "library/runs.html#run.control"
    words = page.evaluate("siteSearch.find('learning rate slider', 40).map(entry => entry[3])")
    assert "guides/bench.html#what-every-control-does" in words, "all words of a heading's text, in any order"
    kept = page.evaluate("window.siteIndex.map(entry => entry[4]).join(' ')")
    assert "import annotations" not in kept, "folded code is no text of a page"


def test_search_and_pictures_work_from_a_disk(site, browser):
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto((site / "guides" / "guide_tinyclip.html").as_uri())
    page.keyboard.press("Control+k")
    page.keyboard.type("gradient_share")
    expect(page.locator("#search-list li").first).to_contain_text("gradient_share")
    context.close()


def test_the_list_of_names_can_be_filtered(open_site):
    page = open_site("names.html")
    shown = page.locator("table.names tbody tr:visible")
    assert shown.count() == page.locator("table.names tr:not(.inner)").count() - 1 < 400, "first what pages for users use"
    page.locator(".names-filter").fill("tiled_cross_entropy")
    expect(shown.first).to_contain_text("tiled_cross_entropy")
    assert shown.count() < 10, "a search looks through all"
    page.locator(".names-filter").fill("")
    page.locator(".names-all").check()
    assert shown.count() > 1000
    page.locator(".names-filter").fill("gradient_share")
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


IN_THE_SHELL = """async name => {
    // the text of another page in the frame of this one, which saves its styles being read again; scripts do not run
    const text = await (await fetch(name)).text();
    const other = new DOMParser().parseFromString(text, 'text/html').querySelector('article');
    const article = document.querySelector('article');
    for (const element of other.querySelectorAll('[src]')) {
        const address = new URL(element.getAttribute('src'), new URL(name, location.href));
        element.setAttribute('src', address.href);
        element.removeAttribute('loading');
    }
    article.replaceWith(document.adoptNode(other));
    await Promise.all([...other.querySelectorAll('img')].map(picture => picture.decode().catch(() => null)));
    const found = [];
    for (let e = document.querySelector('h1'); e; e = e.parentElement) found.push([e.tagName, e.scrollWidth - e.clientWidth]);
    return found; }"""


def test_no_page_is_wider_than_a_narrow_screen(open_site, pages):
    shell = open_site("search.html", width=375)
    for name in pages:
        if name not in ("search", "images/timeline"):
            wider = [one for one in shell.evaluate(IN_THE_SHELL, f"{name}.html") if one[1] > 1]
            assert wider == [], f"{name}: what holds the text can be scrolled sideways"


def test_a_drawn_plot_is_no_wider_than_a_narrow_screen(open_site, pages):
    page = open_site("library/balance_explorer.html", width=375)
    page.locator(".site-plot .main-svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page = open_site("library/losses.html", width=375)
    page.locator(".primary-toggle").click()
    page.locator("#pst-primary-sidebar-modal .site-pages a", has_text="Home").click()
    expect(page).to_have_url(re.compile("index.html$"))


# What people show to each other


def test_links_to_sources_lead_to_files_of_the_repository(parsed):
    told = settings()
    repository, branch = told["git_url"], told["branch"]
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert (website["repo-url"], website["repo-branch"], website["repo-subdir"]) == (repository, branch, told["nbs_path"])
    at_colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
    starts = {"Open in Colab": f"{at_colab}/blob/{branch}/", "Source": f"{repository}/blob/{branch}/", "Edit": f"{repository}/edit/{branch}/",
              "Module": f"{repository}/blob/{branch}/"}  # fmt: skip
    for name, path in NOTEBOOKS.items():
        links = {link.text_content().strip(): link.get("href") for link in parsed[name].tree.xpath("//nav[@class='page-links']/a")}
        place = path.relative_to(ROOT).as_posix()
        has_code = any(cell["cell_type"] == "code" for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
        wanted = {words: starts[words] + place for words in ("Source", "Edit", *(["Open in Colab"] if has_code else []))}
        if name.startswith("library/"):
            modules = [file for module, file in MODULES.items() if page_of_module(module) == f"{Path(name).name}.html"]
            for module in modules:
                wanted["Module"] = starts["Module"] + module.relative_to(ROOT).as_posix()
            assert modules or name == "library/trainers_main", "what Python runs, and nobody imports"
        assert links == wanted, name
        assert all((ROOT / link.removeprefix(starts[words])).is_file() for words, link in links.items()), name
    readme = parsed["data_samples_readme"].tree.xpath("//nav[@class='page-links']/a/@href")
    assert f"{repository}/blob/{branch}/data_samples/README.md" in readme


def test_quartos_pages_can_be_searched_edited_and_opened_in_colab():
    "Quarto's own options, which need no page of ours; a link to Colab is one for the whole site there"
    told = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    website, html = told["website"], told["format"]["html"]
    assert website["search"]["location"] == "sidebar" and website["sidebar"]["search"] is True
    assert {"source", "edit", "issue"} <= set(website["repo-actions"]) and website["page-navigation"]
    link = next(link["href"] for link in html["other-links"] if link["text"] == "Open in Colab")
    start = website["repo-url"].replace("https://github.com", "https://colab.research.google.com/github") + f"/blob/{website['repo-branch']}/"
    assert link.startswith(start) and (ROOT / link.removeprefix(start)).is_file()


def test_version_and_logo_are_on_every_page(site, parsed):
    version = settings()["version"]
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert website["page-footer"]["left"] == f"{website['title']} {version}", "Quarto's pages"
    for name, page in parsed.items():
        if name != "images/timeline":
            assert page.tree.xpath("string(//header//*[@class='site-version'])") == version, name
            assert f"{website['title']} {version}" in page.tree.xpath("string(//footer//*[@class='site-footer'])"), name
            logos = page.tree.xpath("//header//a[contains(@class, 'logo')]//img/@src") + page.tree.xpath("//link[@rel='icon']/@href")
            assert len(logos) >= 2 and {Path(logo).name for logo in logos} == {"logo.svg"}, name
    assert (site / "_static" / "logo.svg").read_text() == (NBS / website["favicon"]).read_text()


PAPERS = {"tinyclip": "2309.12314", "clip_cid": "2408.09441", "dime_fm": "2303.18232", "dlip": "2308.12956"}


def test_papers_are_linked(parsed):
    for method, number in PAPERS.items():
        address = f"https://arxiv.org/abs/{number}"
        for name in ("index", f"guides/guide_{method}", f"train_{method}"):
            assert address in parsed[name].links, f"{name} does not link to {number}"
    for name, page in parsed.items():
        for text in page.tree.xpath("//article//text()[contains(., 'arXiv')]"):
            is_code = text.getparent().xpath("ancestor-or-self::*[self::code or self::pre or self::a or self::script]")
            assert is_code or not re.search(r"arXiv:? *\d{4}\.\d{5}", text), f"{name}: {text[:80]}"


def test_results_show_what_came_out_before_the_code(parsed):
    results = [name for name in NOTEBOOKS if name.startswith("results/")]
    for name in results:
        code = parsed[name].tree.xpath("//article//div[contains(@class, 'cell_input')]")
        assert code == [], f"{name}: code that is not folded"
    claims = parsed["results/claims"].tree
    shown = claims.xpath("//article//*[self::table or self::details or self::pre]")
    assert shown[0].tag == "table" and shown[1].tag == "details" and len(shown[0].xpath(".//tr")) == 20, "19 claims, and no code before"
    assert "holds (3 of 3 seeds)" in shown[0].text_content()


def test_code_of_neighbours_is_folded_behind_their_outputs():
    first, second = nbformat.v4.new_code_cell("a = 1"), nbformat.v4.new_code_cell("a + 1")
    second.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"})]
    text = nbformat.v4.new_markdown_cell("Words")
    made = outputs_first([text, first, second])
    assert made[:2] == [text, second] and second.metadata.tags == ["remove-input"]
    assert len(made) == 3 and "Code (2 lines)" in made[2].source and made[2].source.count("<details") == 1


def test_the_gallery_shows_pages_by_pictures(site, parsed):
    tree = parsed["gallery"].tree
    links = tree.xpath("//article//li//a[img]")
    assert len(links) >= 12
    for link in links:
        picture = link.find("img")
        file = site / picture.get("src")
        assert file.is_file() and file.stat().st_size < 60_000, "a thumbnail"
        assert len(picture.get("alt")) > 30 and len(link.xpath("string(ancestor::li)").strip()) > 20
        assert link.get("href").partition("#")[0].removesuffix(".html") in NOTEBOOKS
    shown = {Path(picture).stem.removesuffix("-small") for picture in tree.xpath("//article//li//a/img/@src")}
    assert shown == {path.stem for path in (NBS / "images").glob("*.png")}, "every picture of the pages"


def test_the_list_of_names_is_what_the_modules_say_is_public(parsed):
    rows = parsed["names"].tree.xpath("//table[contains(@class, 'names')]/tbody/tr")
    listed = {row.xpath("string(td[1])"): row for row in rows}
    public = {}
    for module, path in MODULES.items():
        for name in library_entries(ROOT / "vlkd_lab")[module].keys() & exported_names(path):
            public[name] = module
    assert set(listed) == set(public) and len(rows) == len(listed)
    for name in ("affinity_mimicking", "Run", "attach", "TinyCLIP", "near_duplicates", "load_model"):
        place = listed[name].xpath("string(td[2])")
        assert hasattr(import_module(place), name), f"{name} cannot be imported from {place}"
    assert listed["affinity_mimicking"].xpath("string(td[2])") == "vlkd_lab.losses", "from the face of a package, not from its module"
    outer = {name for name, row in listed.items() if row.get("class") != "inner"}
    for_users = [path for name, path in NOTEBOOKS.items() if not name.startswith("library/")]
    assert outer == names_in_use(for_users) & set(public) and {"Run", "attach", "load_model"} <= outer


def exported_names(path: Path) -> set[str]:
    "A module's __all__"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_names_in_use_are_those_that_pages_import_or_speak_of(tmp_path):
    def page(name, *cells):
        (tmp_path / name).write_text(json.dumps({"cells": [{"cell_type": kind, "source": [text]} for kind, text in cells]}))
        return tmp_path / name

    words = ("markdown", "`attach(3)` and `alpha_beta`, `word`, `a b`")
    train = page("train.ipynb", ("code", "from vlkd_lab.runs import Run\nfrom os import sep\nuseful = 3\n%time x"), words)
    guide = page("guide.ipynb", ("markdown", "```python\nfrom vlkd_lab.a import b\n```\n`fusion.export_blip`"))
    assert names_in_use([train, guide]) == {"Run", "attach", "alpha_beta", "b", "export_blip"}


def test_job_pages_show_their_last_run(parsed):
    for name in job_outputs.JOBS:
        copy, note = job_outputs.kept_copy(name), parsed[name].tree.xpath("string(//*[contains(@class, 'of-the-outputs')])")
        outputs = parsed[name].tree.xpath("//article//div[contains(@class, 'cell_output')]")
        if copy is None:
            assert bool(outputs) != (f"make outputs NAMES={name}" in note), name
        else:
            assert copy.metadata.run.date in note and len(outputs) > 3, name
    for method in PAPERS:
        page = parsed[f"train_{method}"].tree
        assert len(page.xpath("//article//div[contains(@class, 'cell_output')]//img")) >= 3, f"{method}: curves, data and scores"
        assert page.xpath("//article//div[contains(@class, 'cell_output')]//table"), method
        assert page.xpath("//article//iframe[@srcdoc]"), f"{method}: the film of the run"


@pytest.mark.parametrize("name", job_outputs.JOBS)
def test_executed_copies_are_small_and_say_how_they_were_made(name):
    copy = job_outputs.kept_copy(name)
    if copy is None:
        pytest.skip("it has not been run for the site")
    path = job_outputs.COPIES / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size <= job_outputs.MOST and "widget-view" not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert set(copy.metadata.run) == {"version", "date", "parameters"}
    assert not any(output.output_type == "error" for cell in copy.cells if cell.cell_type == "code" for output in cell.outputs)


def test_an_output_belongs_to_the_code_that_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(job_outputs, "COPIES", tmp_path)
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    shown = nbformat.v4.new_output("execute_result", {"text/plain": "3", "image/png": png, "application/vnd.x+json": {}}, execution_count=1)
    progress = nbformat.v4.new_output("stream", name="stderr", text="50 %")
    injected = nbformat.v4.new_code_cell("steps = 2", metadata={"tags": ["injected-parameters"]})
    cells = [injected, nbformat.v4.new_code_cell("1 + 2", outputs=[progress, shown], metadata={"papermill": {}}), nbformat.v4.new_code_cell("old()")]
    job_outputs.keep("train_dlip", nbformat.v4.new_notebook(cells=cells), {"steps": 2})
    copy = job_outputs.kept_copy("train_dlip")
    assert job_outputs.code_of(copy) == ["1 + 2", "old()"] and set(copy.cells[0].outputs[0].data) == {"text/plain", "image/png"}
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 2"), nbformat.v4.new_code_cell("new()")])
    note = job_outputs.add_outputs("train_dlip", page)
    assert len(page.cells[0].outputs) == 1 and page.cells[1].outputs == []
    assert "`steps=2`, and else the parameters below." in note and note.endswith("1 cell has changed since, and shows none.")
    assert job_outputs.add_outputs("index", page) == job_outputs.add_outputs("train_blip", page) == "", "no job, and one with outputs of its own"
    bare = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 2")])
    assert "make outputs NAMES=train_blip" in job_outputs.add_outputs("train_blip", bare)
    assert not job_outputs.is_current("train_dlip")


@pytest.mark.parametrize("text, said", [("{home}/runs/a", "name "), ("x" * 1_400_000, "at most 1,300,000")])
def test_outputs_that_are_too_large_or_name_this_machine_are_not_kept(tmp_path, monkeypatch, text, said):
    monkeypatch.setattr(job_outputs, "COPIES", tmp_path / "copies")
    output = nbformat.v4.new_output("stream", name="stdout", text=text.format(home=Path.home()))
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    with pytest.raises(ValueError, match=said):
        job_outputs.keep("train_dlip", executed, {})
    assert not (tmp_path / "copies").exists()


def test_jobs_are_run_that_are_named_or_have_changed(monkeypatch):
    run = []
    monkeypatch.setattr(job_outputs, "execute", lambda name, parameters: run.append(name) or Path(__file__))
    monkeypatch.setattr(job_outputs, "is_current", lambda name: name != "train_dlip")
    job_outputs.main([])
    job_outputs.main(["train_clip_cid", "train_tinyclip"])
    assert run == ["train_dlip", "train_clip_cid", "train_tinyclip"]
    with pytest.raises(SystemExit, match="no job notebook is called train_x: there are train_clip_cid"):
        job_outputs.main(["train_x"])


# For every reader


@pytest.mark.parametrize("body, said", [
    ("<main><h1>x</h1><h1>y</h1></main>", "has 2 titles"),
    ("<main><p>x</p></main>", "has 0 titles"),
    ("<main><h1>x</h1><h3>y</h3></main>", "goes from h1 to h3"),
    ("<main><h1>x</h1><article><img src='a.png' alt=' '></article></main>", "a picture without words"),
    ("<main><h1>x</h1><img src='a.png'></main>", "a picture without words"),
    ("<main><h1>x</h1><button><i></i></button></main>", "a button without words"),
    ("<main><h1>x</h1><a href='x.html'></a></main>", "a a without words"),
    ("<main><h1>x</h1><input></main>", "a input without words"),
    ("<main><h1>x</h1><iframe src='a.html'></iframe></main>", "a frame without a title"),
])
def test_what_readers_miss_is_found(body, said):
    head = "<head><title>x</title><meta name='description' content='x'><meta name='viewport' content='x'></head>"
    good = "<main><h1>x</h1><h2>y</h2><button aria-label='z'></button><img alt='w' src='a.png'></main>"
    assert list(reading_faults({"a.html": Page(f"<html lang='en'>{head}<body>{good}</body></html>")})) == []
    found = list(reading_faults({"a.html": Page(f"<html lang='en'>{head}<body>{body}</body></html>")}))
    assert len(found) == 1 and found[0].startswith("a.html ") and said in found[0]
    bare = list(reading_faults({"a.html": Page(f"<html><body>{good}</body></html>")}))
    assert [one.partition(" ")[2] for one in bare] == ["does not say its language", "has no title", "has no description", "has no viewport"]


def test_pictures_get_the_words_that_lead_to_them():
    assert words_for_output("Losses", "## Losses\n\nFirst.\n\nEvery `term` of the [loss](a.html): a panel. More.") == "Losses: Every term of the loss: a panel."
    assert words_for_output("Losses", "## Losses") == "Losses" and words_for_output("", "") == "Output"
    assert len(words_for_output("Losses", "word " * 100)) < 230
    shown = with_alt('<img src="a"><img src="b" alt=""><img alt="own" src="c">', "Curves: <x>")
    assert shown.count('alt="Curves: &lt;x&gt;"') == 2 and shown.count('alt="own"') == 1


CONTRAST = """() => {
    // text that stands on its own ground with too little contrast, each pair of colours once
    const number = colour => (colour.match(/[\\d.]+/g) ?? []).map(Number);
    const over = (top, under) => { const a = top[3] ?? 1; return [0, 1, 2].map(k => top[k] * a + under[k] * (1 - a)); };
    const light = colour => { const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const found = new Map();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text = walker.nextNode(); text; text = walker.nextNode()) {
        const element = text.parentElement;
        if (!text.data.trim() || element.closest('svg, script, style, noscript, dialog:not([open]), math') || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
        const above = [];
        let opacity = 1;
        for (let e = element; e; e = e.parentElement) {
            const style = getComputedStyle(e);
            above.push(number(style.backgroundColor));
            opacity *= Number(style.opacity);
        }
        const ground = above.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
        const style = getComputedStyle(element);
        const ink = number(style.color);
        const shown = over([...ink.slice(0, 3), (ink[3] ?? 1) * opacity], ground);
        const [high, low] = [light(shown), light(ground)].sort((a, b) => b - a);
        const ratio = (high + 0.05) / (low + 0.05);
        const isLarge = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && Number(style.fontWeight) >= 700);
        if (ratio < (isLarge ? 3 : 4.5)) found.set(`${shown.map(Math.round)} on ${ground.map(Math.round)}`, `${ratio.toFixed(2)} ${text.data.trim().slice(0, 40)}`);
    }
    return [...found];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(open_site, served, scheme):
    page = open_site("index.html", scheme=scheme)
    for name in ("index", "names", "train_tinyclip", "results/claims", "library/losses_pairs"):
        page.goto(f"{served}{name}.html")
        page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        page.evaluate("document.querySelectorAll('button.copy').forEach(e => { e.style.opacity = 1; })")
        assert page.evaluate(CONTRAST) == [], f"{name}, {scheme}"


def test_code_is_copied(open_site):
    page = open_site("guides/guide_tinyclip.html", permissions=["clipboard-read", "clipboard-write"])
    blocks = page.locator("article div.highlight")
    assert blocks.count() > 2 and page.locator("article div.highlight > button.copy").count() == blocks.count()
    block = blocks.nth(1)
    block.hover()
    block.locator("button.copy").click()
    expect(block.locator("button.copy")).to_have_attribute("aria-label", "Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied and copied == block.locator("pre").inner_text().rstrip("\n")


TARGETS = """() => [...document.querySelectorAll('header button, header a, .page-links a, button.copy, .site-pages a, .prev-next-footer a')]
    .filter(e => e.checkVisibility()).map(e => [e.textContent.trim(), e.getBoundingClientRect()])
    .filter(([, box]) => box.width < 24 || box.height < 24).map(([words, box]) => `${words} ${box.width}×${box.height}`)"""


def test_buttons_are_large_enough_for_a_thumb(open_site):
    page = open_site("guides/guide_tinyclip.html", width=375, has_touch=True)
    assert page.evaluate(TARGETS) == []


def test_a_page_weighs_little(site, pages, browser, served):
    "What is loaded before one searches or comes to a plot; a page as it lies there"
    heavy = {name: len(text) for name, text in pages.items() if len(text) > 1_500_000}
    assert heavy == {}
    context = browser.new_context()
    page, sizes = context.new_page(), {}
    page.on("response", lambda answer: sizes.update({answer.url.removeprefix(served): int(answer.headers.get("content-length", 0))}))
    page.goto(f"{served}getting_started.html", wait_until="networkidle")
    context.close()
    assert not [name for name in sizes if "search_index" in name or "plotly" in name]
    assert sum(sizes.values()) < 2_500_000, sizes
    assert (site / "_static" / "search_index.js").stat().st_size < 2_000_000


def test_the_film_of_a_run_plays_on_its_page(open_site):
    page = open_site("guides/bench.html")
    frame = page.locator("article iframe")
    frame.scroll_into_view_if_needed()
    inside = page.frame_locator("article iframe")
    play, slider = inside.locator("button").first, inside.locator("input[type=range]").first
    expect(play).to_be_visible()
    page.wait_for_function("() => { const f = document.querySelector('article iframe'); return f.clientHeight >= f.contentDocument.body.offsetHeight; }")
    slider.evaluate("e => { e.value = e.min; e.dispatchEvent(new Event('input', { bubbles: true })); }")
    before = int(slider.input_value())
    play.click()
    page.wait_for_function("before => Number(document.querySelector('article iframe').contentDocument.querySelector('input[type=range]').value) > before + 1", arg=before)
    ground = "() => getComputedStyle(document.querySelector('article iframe').contentDocument.body).color"
    light = page.evaluate(ground)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"light => ({ground})() !== light", arg=light)
