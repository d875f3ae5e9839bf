"""Python processes that start in a second: forked from one that has imported the heavy libraries once.

`start` is `python WORDS` and `run` waits for it, in several processes if wanted, with the environment that torchrun gives each.
What torchrun itself does is left to the few tests that start it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from warm_kernel import HEAVY

PATIENCE = 900  # seconds
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(HEAVY)


def become(words: list[str], environment: Mapping[str, str], errors: str) -> None:
    """Go on as `python WORDS`; what goes to standard error is written to a file."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.environ.update(environment)
    run_as_main, first = (runpy.run_module, 1) if words[0] == "-m" else (runpy.run_path, 0)
    sys.argv = words[first:]
    run_as_main(words[first], run_name="__main__", **({"alter_sys": True} if first else {}))


def start(*words: str, errors: str = os.devnull, **environment: str) -> BaseProcess:
    """A process like `python WORDS`."""
    process = FORKS.Process(target=become, args=(list(words), environment, errors))
    process.start()
    return process


def run(*words: str, processes: int = 1) -> None:
    """`python WORDS` to its end, or as many ranks of it; AssertionError with what they wrote if one fails."""
    environment = {}
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{rank}" for rank in range(processes)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
        running = [start(*words, errors=file, **environment, **rank) for file, rank in zip(files, ranks, strict=True)]
        for process in running:
            process.join(PATIENCE)
        codes = [process.exitcode for process in running]
        for process in running:
            process.kill()
        assert not any(codes) and None not in codes, f"exit codes {codes}\n" + "\n".join(Path(file).read_text()[-3000:] for file in files)
