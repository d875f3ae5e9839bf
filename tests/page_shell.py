"""Run the code cells of a notebook in this process, in an IPython shell that keeps what they show: `python page_shell.py NOTEBOOK SECONDS`.

It stands in for a kernel where a page asks nothing of one: cells run with IPython's rules, displays and results are formatted for all forms,
matplotlib draws into the page, and what is shown goes into the notebook's file. It ends at the first cell that fails or takes too long.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sys
from pathlib import Path

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config


class Stream(io.TextIOBase):
    """sys.stdout or sys.stderr, whose text becomes outputs of the cell that runs."""

    encoding = "utf-8"

    def __init__(self, shell: PageShell, name: str) -> None:
        self.shell, self.stream = shell, name

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        last = self.shell.outputs[-1] if self.shell.outputs else {}
        if text and last.get("name") == self.stream:
            last["text"] += text
        elif text:
            self.shell.outputs.append({"output_type": "stream", "name": self.stream, "text": text})
        return len(text)


def encoded(data: dict) -> dict:
    """Data of an output as a notebook's file has it."""
    return {form: base64.b64encode(value).decode() if isinstance(value, bytes) else value for form, value in data.items()}


class Results(DisplayHook):
    """Keeps the value of a cell's last expression in all its forms."""

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: dict, md_dict: dict | None = None) -> None:
        shown = {"data": encoded(format_dict), "metadata": md_dict or {}, "execution_count": self.prompt_count}
        self.shell.outputs.append({"output_type": "execute_result", **shown})

    def finish_displayhook(self) -> None:
        self._is_active = False


class Displays(DisplayPublisher):
    """Keeps what is displayed."""

    def publish(self, data: dict, metadata: dict | None = None, **_) -> None:
        self.shell.outputs.append({"output_type": "display_data", "data": encoded(data), "metadata": metadata or {}})

    def clear_output(self, wait: bool = False) -> None:
        self.shell.outputs.clear()


class PageShell(InteractiveShell):
    """IPython's shell, which keeps the outputs of the cell that runs."""

    displayhook_class = Results
    display_pub_class = Displays

    def __init__(self) -> None:
        self.outputs: list[dict] = []
        super().__init__(config=Config(HistoryManager={"enabled": False}, HistoryAccessor={"enabled": False}))
        self.display_formatter.active_types = self.display_formatter.format_types
        InteractiveShell._instance = self  # what get_ipython finds

    def enable_gui(self, gui: str | None = None) -> None:
        pass

    def _showtraceback(self, etype: type, evalue: BaseException, stb: list[str]) -> None:
        self.outputs.append({"output_type": "error", "ename": etype.__name__, "evalue": str(evalue), "traceback": stb})


def run_cell(shell: PageShell, source: str, seconds: int) -> list[dict]:
    """What a cell shows. An error is the last output; one that was raised while something was displayed counts."""
    shell.outputs = []
    signal.alarm(seconds)
    shell.run_cell(source, store_history=True)
    signal.alarm(0)
    return shell.outputs


def too_long(*_) -> None:
    raise TimeoutError("the cell took too long")


def run_page(path: Path, seconds: int) -> str:
    """Run a notebook and write what it shows into its file; the error of the cell that failed, if one did."""
    page = json.loads(path.read_text(encoding="utf-8"))
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel sets it
    signal.signal(signal.SIGALRM, too_long)
    shell, error = PageShell(), ""
    sys.stdout, sys.stderr = Stream(shell, "stdout"), Stream(shell, "stderr")
    code = [(number, cell) for number, cell in enumerate(page["cells"]) if cell["cell_type"] == "code"]
    for number, cell in code:
        source = "".join(cell["source"])
        cell["outputs"] = run_cell(shell, source, seconds)
        cell["execution_count"] = shell.execution_count - 1
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        if errors and "raises-exception" not in cell["metadata"].get("tags", []):
            trace = "\n".join(errors[-1]["traceback"])
            error = f"{path.name}, cell {number} failed:\n{source}\n{'-' * 20}\n{trace}"
            break
    path.write_text(json.dumps(page), encoding="utf-8")
    return error


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # a page sees what it sees in a kernel
    if failed := run_page(Path(sys.argv[1]), int(sys.argv[2])):
        sys.__stderr__.write(failed)
        sys.exit(1)
