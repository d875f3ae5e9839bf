"""Python processes that start in a second: forked from one that has imported the heavy libraries once.

`start` is `python WORDS` and `run` waits for it, in several processes if wanted, with the environment that torchrun gives each.
What torchrun itself does is left to the few tests that start it. It too has its processes forked, since PYTHON_EXEC says so, and may be
forked itself: `python` is an executable to start instead of `sys.executable`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import tempfile
from pathlib import Path

from warm_kernel import ask, connect

PATIENCE = 900  # seconds


class Process:
    """A program like `python WORDS` in a fork of the process that has the heavy libraries; what it prints is written to a file."""

    def __init__(self, words: tuple[str, ...], output: str, environment: dict[str, str], folder: str | None = None) -> None:
        where, owner = json.loads(os.environ["WARM_PROCESSES"])
        self._connection = connect(Path(where), owner)
        self.exitcode: int | None = None
        with open(os.devnull) as nothing, open(output, "a") as printed:
            files = [nothing.fileno(), printed.fileno(), printed.fileno()]
            environment = {**os.environ, **environment}
            self._answers = ask(self._connection, "program", list(words), folder or os.getcwd(), environment, files)
            self.pid = int(self._answers.readline())

    def join(self, seconds: float | None = None) -> None:
        """Wait for its end, or so long."""
        if self.exitcode is None and select.select([self._connection], [], [], seconds)[0]:
            self.exitcode = int(self._answers.readline() or -signal.SIGKILL)
            self._answers.close()
            self._connection.close()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        self.join(0)
        return self.exitcode is None

    def kill(self) -> None:
        """End it at once."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


def python() -> str:
    """An executable for `python WORDS` in a fork; it ends as the fork does, and hands SIGINT and SIGTERM on to it."""
    return str(Path(json.loads(os.environ["WARM_PROCESSES"])[0], "python"))


def start(*words: str, output: str = os.devnull, folder: str | None = None, **environment: str) -> Process:
    """A process like `python WORDS`."""
    return Process(words, output, environment, folder)


def run(*words: str, processes: int = 1, folder: str | None = None, **environment: str) -> None:
    """`python WORDS` to its end, or as many ranks of it; AssertionError with what they wrote if one fails."""
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as place:
        files = [f"{place}/{rank}" for rank in range(processes)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
        running = [start(*words, output=file, folder=folder, **environment, **rank) for file, rank in zip(files, ranks, strict=True)]
        for process in running:
            process.join(PATIENCE)
        codes = [process.exitcode for process in running]
        for process in running:
            process.kill()
        assert not any(codes) and None not in codes, f"exit codes {codes}\n" + "\n".join(Path(file).read_text()[-3000:] for file in files)
