"""Drive a real JupyterLab in a headless Chromium, for browser tests of notebooks with widgets.

Typical use::

    with JupyterServer(folder) as server, open_page(server) as page:
        page.open("example.ipynb")
        page.run_cell(0)
        assert "42" in page.output_text(0)
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, Locator, sync_playwright
from playwright.sync_api import Page as BrowserPage

CHROMIUM_ARGUMENTS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --enable-precise-memory-info""".split()

PATIENCE = 120  # seconds for whatever is waited for: enough for a machine that is busy; what is there is taken at once

# User settings of JupyterLab: every cell is in the DOM, and neither news nor update dialogs appear.
SETTINGS: dict[str, dict[str, Any]] = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
}

# Defines `panel`, the notebook panel of the path `path`, in the functions below.
FIND_PANEL = """const panel = window.jupyterapp &&
    [...jupyterapp.shell.widgets('main')].find(w => w.context && w.content?.widgets && w.context.path === path);"""

IS_READY = f"""path => {{ {FIND_PANEL}
    const context = panel?.sessionContext, kernel = context?.session?.kernel;
    return Boolean(panel?.context.isReady && context.isReady && kernel?.connectionStatus === 'connected' &&
        kernel.status === 'idle' && panel.content.widgets.length && panel.content.widgets.every(cell => cell.inViewport)); }}"""

START_CELL = f"""([path, index]) => {{ {FIND_PANEL}
    const cell = panel.content.widgets[index];
    if (!cell) throw new Error(`the notebook has no cell ${{index}}`);
    jupyterapp.shell.activateById(panel.id);
    panel.content.deselectAll();
    panel.content.activeCellIndex = index;
    cell.pendingRuns = (cell.pendingRuns ?? 0) + 1;
    jupyterapp.commands.execute('notebook:run-cell')
        .then(good => {{ cell.lastRunGood = good; }}, () => {{ cell.lastRunGood = false; }})
        .finally(() => {{ cell.pendingRuns -= 1; }}); }}"""

CELL_IS_DONE = f"""([path, index]) => {{ {FIND_PANEL}
    const cell = panel.content.widgets[index];
    return !cell.pendingRuns && !cell.node.querySelector('.jp-InputPrompt')?.textContent.includes('*'); }}"""

OPEN_NOTEBOOK = "path => { jupyterapp.commands.execute('docmanager:open', {path}); }"

CLOSE_ALL = "() => { for (const widget of [...(window.jupyterapp?.shell.widgets('main') ?? [])]) widget.dispose(); }"

CELL_WAS_GOOD = f"([path, index]) => {{ {FIND_PANEL} return Boolean(panel.content.widgets[index].lastRunGood); }}"

KERNEL_EVAL = f"""async ([path, code, timeout]) => {{ {FIND_PANEL}
    const future = panel.sessionContext.session.kernel.requestExecute(
        {{code, store_history: false, allow_stdin: false, stop_on_error: false}});
    let text = '';
    future.onIOPub = message => {{
        if (message.header.msg_type === 'stream' && message.content.name === 'stdout') text += message.content.text; }};
    const late = new Promise((_, reject) => setTimeout(() => reject(new Error('the kernel did not answer in time')), timeout));
    const reply = await Promise.race([future.done, late]);
    if (reply.content.status !== 'ok') throw new Error((reply.content.traceback ?? [reply.content.status]).join('\\n'));
    return text; }}"""


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_notebook(path: Path, cells: list[str], kernel: str = "python3") -> None:
    """Write a notebook of code cells that asks for the given kernel."""
    code = [{"cell_type": "code", "id": f"cell-{number}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
            for number, source in enumerate(cells)]
    metadata = {"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}}
    path.write_text(json.dumps({"cells": code, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")


class JupyterServer:
    """A JupyterLab server on a free local port, with settings of its own; a context manager.

    `environment` is added to the environment of the server and its kernels. `kernels` maps the name of an extra kernel to
    a folder that comes first on that kernel's PYTHONPATH, for example one filled by `pip install --target`. `settings` maps
    a JupyterLab plugin, such as "apputils-extension/kernels-settings", to user settings for it.
    """

    def __init__(self, root: Path, environment: Mapping[str, str] | None = None, kernels: Mapping[str, Path] | None = None,
                 settings: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.root = Path(root).resolve()
        self.environment = dict(environment or {})
        self.kernels = dict(kernels or {})
        self.settings = {**SETTINGS, **(settings or {})}
        self.token = secrets.token_hex(16)
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> JupyterServer:
        self._home = Path(tempfile.mkdtemp(prefix="jupyter-page-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, **self.environment}
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR",
                     "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR"):
            (self._home / name).mkdir()
            environment[name] = str(self._home / name)
        for name, values in self.settings.items():
            file = self._home / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values), encoding="utf-8")
        for name, folder in self.kernels.items():
            search = os.pathsep.join(filter(None, (str(Path(folder).resolve()), environment.get("PYTHONPATH"))))
            spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": name,
                    "language": "python", "env": {"PYTHONPATH": search}}
            file = self._home / "JUPYTER_DATA_DIR" / "kernels" / name / "kernel.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--expose-app-in-browser",
                   "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
                   f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.root}",
                   "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
                   "--LabApp.extension_manager=readonly"]
        with (self._home / "log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait_until_up(PATIENCE)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server and its kernels; whatever is still there after a polite request is killed."""
        assert self._process is not None
        try:
            family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        try:
            self.request("/api/shutdown", "POST")
        except OSError:
            self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in psutil.wait_procs(family, 3)[1]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        shutil.rmtree(self._home, ignore_errors=True)

    def request(self, path: str, method: str = "GET") -> bytes:
        """The answer of the server's REST interface, for example of "/api/kernels"."""
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=PATIENCE) as answer:
            return answer.read()

    def end_kernels(self) -> None:
        """End every notebook's kernel, so that the next notebook has the machine to itself."""
        for session in json.loads(self.request("/api/sessions")):
            self.request(f"/api/sessions/{session['id']}", "DELETE")

    def log(self) -> str:
        """What the server and its kernels have written so far."""
        return (self._home / "log").read_text(encoding="utf-8", errors="replace")

    def _wait_until_up(self, timeout: float) -> None:
        assert self._process is not None
        end = time.monotonic() + timeout
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self.request("/api/status")
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log()[-3000:]}")


class Page:
    """One JupyterLab tab in the browser; `browser_page` is Playwright's own page, for anything not offered here."""

    def __init__(self, browser_page: BrowserPage, server: JupyterServer) -> None:
        self.browser_page = browser_page
        self.server = server
        self.notebook = ""
        self.console_errors: list[str] = []
        self._developer_tools = browser_page.context.new_cdp_session(browser_page)
        browser_page.on("console", lambda message: self.console_errors.append(message.text) if message.type == "error" else None)
        browser_page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        browser_page.on("dialog", lambda dialog: dialog.accept())  # "leave the page?" before a reload

    def open(self, notebook: str, timeout: float = PATIENCE) -> None:
        """Open a notebook (a path below the server's root) and wait until it can be used; whatever else is open is closed.

        The first one loads JupyterLab, which takes seconds; the next ones open in it.
        """
        self.notebook = notebook
        if self.browser_page.url.startswith(f"{self.server.url}/lab"):
            self.close_all()
            self.browser_page.evaluate(OPEN_NOTEBOOK, notebook)
        else:
            self.browser_page.goto(f"{self.server.url}/lab/tree/{urllib.parse.quote(notebook)}?reset&token={self.server.token}")
        self._wait(IS_READY, notebook, timeout)

    def close_all(self) -> None:
        """Close every document without saving it; kernels live on."""
        self.browser_page.evaluate(CLOSE_ALL)

    def reload(self, timeout: float = PATIENCE) -> None:
        """Reload the browser's page; the kernel lives on. What was not saved of the notebook is lost."""
        self.browser_page.reload()
        self._wait(IS_READY, self.notebook, timeout)

    def run_cell(self, index: int, wait: bool = True, timeout: float = PATIENCE) -> bool | None:
        """Run a cell (counted from 0, all cells). With `wait`, tell at its end whether it ran without an error."""
        self.browser_page.evaluate(START_CELL, [self.notebook, index])
        return self.wait_cell(index, timeout) if wait else None

    def wait_cell(self, index: int, timeout: float = PATIENCE) -> bool:
        """Wait until a cell that was started has ended, and tell whether it ran without an error."""
        self._wait(CELL_IS_DONE, [self.notebook, index], timeout)
        return self.browser_page.evaluate(CELL_WAS_GOOD, [self.notebook, index])

    def cell(self, index: int) -> Locator:
        """The index-th cell of the notebook."""
        return self.browser_page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell").nth(index)

    def output(self, index: int) -> Locator:
        """The output area of a cell."""
        return self.cell(index).locator(".jp-Cell-outputArea")

    def output_text(self, index: int) -> str:
        """The visible text of a cell's output; empty where there is none."""
        output = self.output(index)
        return output.inner_text().strip() if output.count() else ""

    def kernel_eval(self, code: str, timeout: float = PATIENCE) -> str:
        """Run code in the notebook's kernel, outside any cell, and return what it printed. It waits behind a running cell."""
        return self.browser_page.evaluate(KERNEL_EVAL, [self.notebook, code, timeout * 1000])

    def save(self) -> None:
        """Save the notebook."""
        self.browser_page.evaluate(f"async path => {{ {FIND_PANEL} await panel.context.save(); }}", self.notebook)

    def screenshot(self, path: Path | str, locator: Locator | None = None) -> None:
        """Save a picture of the page, or of one element."""
        (locator or self.browser_page).screenshot(path=str(path))

    def heap(self) -> int:
        """The bytes of the JavaScript heap in use, after a garbage collection."""
        self._developer_tools.send("HeapProfiler.collectGarbage")
        return int(self._developer_tools.send("Runtime.getHeapUsage")["usedSize"])

    def _wait(self, function: str, argument: object, timeout: float) -> None:
        self.browser_page.wait_for_function(function, arg=argument, timeout=timeout * 1000, polling=50)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium of its own, closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(server: JupyterServer, browser: Browser | None = None) -> Iterator[Page]:
    """A page for the given server, in a window of a browser, by default of a new one; at the end it is closed and its kernels are ended."""
    with nullcontext(browser) if browser else open_browser() as running:
        context = running.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(PATIENCE * 1000)
        try:
            yield Page(context.new_page(), server)
        finally:
            context.close()
            server.end_kernels()
