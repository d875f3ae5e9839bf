"""A notebook as one HTML page: nothing is asked of a network, nothing of a stranger runs, the run can still be explored."""

import json
import re

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from test_timeline import HOSTILE, browser, open_file, until, write_moments  # noqa: F401 a fixture

from vlkd_lab.commands import run_command
from vlkd_lab.sent_pages import mathml, plotly_picture, write_page
from vlkd_lab.widgets import timeline

STRANGE = f"""<h1>{HOSTILE}</h1><style>@import url(https://example.org/a.css); p {{ color: red }}</style><link rel=stylesheet href=https://example.org/b.css>
<img src="https://example.org/c.png" alt="a cat"><img src=x srcset="https://example.org/d.png 2x" onerror="window.hacked=3">
<svg onload="window.hacked=4"><image href="https://example.org/e.png"/><use xlink:href="https://example.org/f.svg#a"/></svg>
<div style="background-image: url(https://example.org/g.png)" onclick="window.hacked=5">words</div><base href="https://example.org/">
<iframe src="https://example.org/h.html"></iframe><iframe srcdoc="<script>window.top.hacked=6</script>"></iframe><object data="https://example.org/i"></object>
<video poster="https://example.org/j.png" autoplay src="https://example.org/k.mp4"></video><form action="https://example.org/l"><button>send</button></form>
<a href="javascript:window.hacked=7">run</a><a href="https://example.org/there">there</a><a href="../guides/bench.ipynb">file</a><meta http-equiv=refresh content="0; url=https://example.org/m">"""


@pytest.fixture
def notebook(tmp_path):
    "An executed notebook with a time line, formulas, pictures, and strangers' outputs; its file"
    run = write_moments(tmp_path / "run")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "images" / "red.png")
    outside = tmp_path.parent / "outside.png"
    Image.new("RGB", (30, 20), "blue").save(outside)
    figure = go.Figure(go.Scatter(x=np.arange(4), y=np.arange(4.0) ** 2))
    pie = json.loads(go.Figure(go.Pie(values=[1, 2])).to_json())
    kind = "application/vnd.plotly.v1+json"
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "VBox()"}
    png = timeline(run.folder, live=False).static()._repr_mimebundle_()
    pixels = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    bundles = [
        png,
        {"text/html": STRANGE},
        {kind: json.loads(figure.to_json()), "text/html": "<script src=https://cdn.example.org/plotly.js></script>"},
        {kind: pie, "text/plain": "Figure()"},
        widget,
        widget | {"image/png": pixels},
        {"application/javascript": "window.hacked=8", "text/plain": "javascript"},
        {"text/latex": r"$\frac{a}{b}$"},
        {"text/markdown": f"**bold** {HOSTILE} ![c](https://example.org/n.png)"},
        {"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>window.hacked=9</script></svg>"},
    ]
    outputs = [new_output("display_data", bundle) for bundle in bundles]
    outputs += [new_output("stream", name="stderr", text=f"\r  0%\r 50%\r100% {HOSTILE}\n")]
    outputs += [new_output("error", ename="ValueError", evalue=HOSTILE, traceback=[f"\x1b[31m{HOSTILE}\x1b[0m"])]
    words = rf"""# A run {HOSTILE}

Its loss is $-\sum_j p_j \log q_j$, where $a < b$. Then $\nosuch{{x}}$ and

$$\mathcal{{L}} = \frac{{1}}{{2}}\left[x^2\right]$$

| term | weight |
|---|---|
| affinity | 1 |

![red](images/red.png) ![blue](../outside.png) ![far](https://example.org/o.png)"""
    cells = [new_markdown_cell(words), new_code_cell(f"x = 1  # {HOSTILE}\nprint(x)", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "out.ipynb")
    return tmp_path / "out.ipynb"


def test_a_page_asks_nothing_of_a_network_and_runs_nothing_of_strangers(notebook, browser):  # noqa: F811
    path = write_page(notebook)
    assert path == notebook.with_suffix(".html")
    text = path.read_text(encoding="utf-8")
    for wanted in ("src=\"http", "cdn", "mathjax", "require.js", "@import", "example.org/c", "example.org/n.png\"", "window.hacked=8"):
        assert wanted not in text.lower(), wanted
    page = open_file(browser, path)
    page.locator("iframe").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    assert page.requests == [] and not [error for error in page.errors if "Refused" not in error]
    hacked = [frame.evaluate("window.hacked") for frame in page.frames]
    assert hacked == [None, None], "the page and its time line"
    assert page.locator("a[href]").evaluate_all("all => all.map(a => a.getAttribute('href'))") == ["https://example.org/there"]
    page.locator("a", has_text="run").first.click()
    page.locator("div", has_text=re.compile("^words$")).first.click()
    assert page.evaluate("window.hacked") is None and page.url.startswith("file:")
    page.context.close()


def test_the_policy_alone_stops_what_a_stranger_would_run_or_load(notebook, browser, tmp_path):  # noqa: F811
    text = write_page(notebook).read_text(encoding="utf-8")
    assert text.count("</body>") == 1 + text.count("&lt;/body&gt;") or "</body>" in text
    head, _, tail = text.rpartition("</body>")
    missed = tmp_path / "missed.html"  # as if the cleaning had missed it
    missed.write_text(f"{head}{STRANGE}<script>window.hacked=10</script></body>{tail}", encoding="utf-8")
    page = open_file(browser, missed)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    page.context.close()


def test_what_a_notebook_says_is_readable(notebook, browser):  # noqa: F811
    page = open_file(browser, write_page(notebook))
    assert page.title().startswith("A run </script>")
    assert page.locator("math").count() == 4 and page.locator("code", has_text=r"\nosuch{x}").count() == 1
    assert page.locator("math mfrac").count() == 2 and page.locator(".formula math").first.get_attribute("display") == "block"
    assert page.locator("table td").all_inner_texts() == ["affinity", "1"]
    pictures = page.locator("img").evaluate_all("all => all.filter(i => i.naturalWidth).map(i => i.getAttribute('alt') ?? '')")
    assert "red" in pictures and "blue" not in pictures and "[picture: blue]" in page.inner_text("body"), "a file elsewhere stays there"
    assert page.inner_text("body").count("Left out: it shows in JupyterLab alone") == 2, "a pie, and a widget without a picture"
    code = page.locator("details.code")
    assert code.count() == 1 and not code.locator("pre").is_visible()
    code.locator("summary").click()
    assert "print(x)" in code.locator("pre").inner_text() and "<script>window.hacked=1</script>" in code.locator("pre").inner_text()
    assert "100%" in page.inner_text("body") and " 50%" not in page.inner_text("body"), "a progress bar is one line"
    page.context.close()


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 600)])
def test_the_time_line_in_a_page_can_be_gone_through(notebook, browser, scheme, width):  # noqa: F811
    page = open_file(browser, write_page(notebook), width, scheme)
    frame = page.frames[1]
    assert page.locator("iframe").get_attribute("sandbox") == "allow-scripts"
    frame.locator(".vlkd-bar input").focus()
    page.keyboard.press("Home")
    until(frame, "+document.querySelector('.vlkd-player').dataset.index === 0")
    frame.locator(".vlkd-play").click()
    until(frame, "+document.querySelector('.vlkd-player').dataset.index === 5")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 18, 18)"
    assert dark == (scheme == "dark")
    page.context.close()


def test_the_command_makes_a_page_and_says_what_is_wrong(notebook, tmp_path, capsys):
    target = tmp_path / "sent" / "page.html"
    assert run_command(["page", str(notebook), str(target), f"run={tmp_path / 'run'}"]) == 0
    assert target.read_text(encoding="utf-8").count("<iframe") == 2 and "MB, to be opened in any browser" in capsys.readouterr().out
    (tmp_path / "wrong.ipynb").write_text("{", encoding="utf-8")
    assert run_command(["page", str(tmp_path / "wrong.ipynb")]) == 1
    assert "is no notebook" in capsys.readouterr().err and not (tmp_path / "wrong.html").exists()
    assert run_command(["page", "a", "b", "c"]) == 2 and "run=RUN" in capsys.readouterr().err


def test_formulas_of_all_pages_can_be_translated():
    assert mathml(r"\|x\|_2 \le \mathbb{1}[i = j]", "inline").startswith("<math")
    with pytest.raises(ValueError, match="unknown to latex2mathml"):
        mathml(r"\nosuch{x}", "inline")


def test_plotly_figures_of_lines_points_and_heatmaps_are_drawn_and_others_are_not():
    heat = go.Figure(go.Heatmap(z=np.eye(3), zmin=0, zmax=1, colorscale="Viridis", showscale=False))
    assert plotly_picture(json.loads(heat.to_json())) is None or plotly_picture(json.loads(heat.to_json())).startswith("iVBOR")
    line = go.Figure(go.Scatter(x=np.arange(9), y=np.arange(9.0)))
    assert "bdata" in line.to_json() and plotly_picture(json.loads(line.to_json())).startswith("iVBOR")
    assert plotly_picture(json.loads(go.Figure(go.Bar(y=[1])).to_json())) is None and plotly_picture({}) is None
