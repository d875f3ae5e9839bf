"""Kernels and programs that start in a moment: one process imports the heavy libraries once, and each of them is a fork of it.

A cold kernel spends seven seconds on importing PyTorch, open_clip and transformers, and the lessons are a hundred notebooks. Of the library
itself the lower floors may be imported with them; a fork that would find another copy of the library, as one in which a fault was planted,
imports its own. `offer_forks` writes a kernel named "warm" for nbclient and papermill, and tells `forked` where to
ask for a program; both connect to the process that forks, which is started by the first and ends with its owner or when its folder is removed.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import BinaryIO

HEAVY = """torch torchvision.transforms open_clip transformers transformers.models.clip.modeling_clip transformers.models.blip.modeling_blip
    transformers.models.auto.tokenization_auto accelerate webdataset pandas matplotlib.figure plotly.graph_objects plotly.io nbformat
    anywidget sklearn.cluster sklearn.linear_model scipy.sparse.csgraph scipy.stats jupyter_client.session zmq.eventloop.zmqstream psutil
    IPython.core.interactiveshell IPython.core.pylabtools IPython.core.magics""".split()
FLOORS = "vlkd_lab.widgets vlkd_lab.evaluation vlkd_lab.export vlkd_lab.transfer".split()  # and what they import; no method is among it
PATIENCE = 120  # seconds to wait for the process that forks


def kernel_spec(folder: Path, owner: str, name: str = "warm", first: Path | None = None) -> None:
    """Write a kernel below a folder that JUPYTER_PATH will name; its process ends when the owner's does.

    `first` is a folder that comes first on the kernel's path, for example one with another ipykernel.
    """
    command = [sys.executable, "-I", "-S", __file__, "kernel", str(folder), owner, "-f", "{connection_file}"]
    search = os.pathsep.join(filter(None, (first and str(first), os.environ.get("PYTHONPATH"))))
    spec = {"argv": command, "display_name": name, "language": "python", "env": {"PYTHONPATH": search} if first else {}}
    (folder / "kernels" / name).mkdir(parents=True)
    (folder / "kernels" / name / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")


def offer_forks(folder: Path, ipykernel6: Path | None = None, floors: bool = False) -> str:
    """Say in this process's environment where forks are to be had as long as it lives: kernels and programs of its own and of its children.

    With `floors` they begin with the library's lower floors imported, as this process would import them now. How the owner is named.
    """
    owner = f"{os.getpid()},floors" if floors else str(os.getpid())
    kernel_spec(folder, owner)
    if ipykernel6 is not None and ipykernel6.exists():
        kernel_spec(folder, owner, "warm6", ipykernel6)
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("JUPYTER_PATH"))))
    os.environ["WARM_PROCESSES"] = json.dumps([str(folder), owner])
    os.environ["PYTHON_EXEC"] = str(write_python(folder, owner))  # what torchrun starts its processes with
    return owner


def start_server(folder: Path, owner: str) -> None:
    """Start the process that forks if there is none, and wait until it listens."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "socket").exists():
            command = [sys.executable, __file__, "serve", str(folder), owner]
            with open(folder / "log", "w") as log:
                own = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}  # whoever asks first may stand in another copy
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=own)
            end = time.monotonic() + PATIENCE
            while not (folder / "socket").exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError((folder / "log").read_text())
                time.sleep(0.05)


def connect(folder: Path, owner: str) -> socket.socket:
    """A connection to the process that forks."""
    start_server(folder, owner)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "socket"))
    return connection


def launch(folder: Path, owner: str, kind: str, arguments: list[str]) -> int:
    """Have a kernel or a program forked, hand signals on to it, and wait for its end; what ends by a signal ends this process by it."""
    answers = ask(connect(folder, owner), kind, arguments, os.getcwd(), dict(os.environ), [0, 1, 2])
    process = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(process, number))
    status = int(answers.readline() or 1)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def write_python(folder: Path, owner: str) -> Path:
    """Write an executable that takes the place of `python WORDS`: it has a program forked and ends as that does."""
    file = folder / "python"
    words = "words = [word for word in sys.argv[1:] if word != '-u']"
    command = f"os.execv({sys.executable!r}, [{sys.executable!r}, '-I', '-S', {__file__!r}, 'program', {str(folder)!r}, {owner!r}, *words])"
    file.write_text(f"#!{sys.executable} -IS\nimport os, sys\n\n{words}\n{command}\n")
    file.chmod(0o755)
    return file


def ask(connection: socket.socket, kind: str, words: list[str], folder: str, environment: dict[str, str], files: list[int]) -> BinaryIO:
    """Ask for a kernel or a program with these standard files; a line will say its number, and at its end one its exit code."""
    request = json.dumps({"kind": kind, "words": words, "folder": folder, "environment": environment})
    socket.send_fds(connection, [request.encode() + b"\n"], files)
    return connection.makefile("rb", buffering=0)  # lines are read one by one, so that what comes can be waited for


def serve(folder: Path, owner: int, floors: bool) -> None:
    """Import the heavy libraries, and fork for every connection; a process whose asker is gone is killed."""
    import_heavy(FLOORS if floors else [])
    ends, end = os.pipe()
    os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "beside"))
    listener.listen(16)
    (folder / "beside").rename(folder / "socket")
    running: dict[socket.socket, int] = {}
    while folder.exists() and is_alive(owner):
        for ready in select.select([listener, ends, *running], [], [], 0.5)[0]:
            if ready is ends:
                os.read(ends, 4096)
            elif ready is listener:
                connection = listener.accept()[0]
                if process := fork(connection):
                    running[connection] = process
            else:
                os.kill(running[ready], signal.SIGKILL)
        for connection, process in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                del running[connection]
                with connection:
                    try:
                        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                    except OSError:  # nobody waits for it
                        pass
    for process in running.values():
        os.kill(process, signal.SIGKILL)


def import_heavy(floors: list[str]) -> None:
    """Import what takes long; tqdm chooses its bars and matplotlib its backend at its import, and both are to choose a notebook's."""
    gc.disable()  # imports leave no garbage, and to look for it took a third of their time
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel sets it
    sys.modules["rfc3987_syntax"] = None  # at its import it compiles grammars for a second, of addresses that nobody checks here
    inside, widgets = (importlib.import_module(name) for name in ("IPython", "ipywidgets"))
    assert widgets and inside.get_ipython() is None
    outside, inside.get_ipython = inside.get_ipython, lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
    sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")  # what new tqdm asks for; old asks for the configuration
    importlib.import_module("tqdm.auto")
    del sys.modules["ipykernel.zmqshell"]
    inside.get_ipython = outside
    for name in [*HEAVY, *floors]:
        importlib.import_module(name)
    assert "ipykernel" not in sys.modules, "which ipykernel it is, each kernel decides"
    gc.collect()
    gc.freeze()  # kernels share these objects, and need not search them
    gc.enable()


def is_alive(process: int) -> bool:
    """Whether a process is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def fork(connection: socket.socket) -> int | None:
    """Fork, and become the kernel or the program that is asked for; in the parent: its process number, None if the asker went away."""
    request, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not request.endswith(b"\n"):
        part = connection.recv(1 << 20)
        if not part:
            connection.close()
            return None
        request += part
    process = os.fork()
    if process:
        with contextlib.suppress(OSError):  # its asker went away, and it will be killed
            connection.sendall(b"%d\n" % process)
        for file in files:
            os.close(file)
        return process
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        become(files, **json.loads(request))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def become(files: list[int], kind: str, words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Take over an asker's folder, environment and standard files, and go on as ipykernel or as `python WORDS`."""
    os.setsid()
    for place, file in enumerate(files):
        os.dup2(file, place)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("JPY_PARENT_PID", None)  # its parent is not the launcher
    sys.path[:] = [*environment.get("PYTHONPATH", "").split(os.pathsep), *(path for path in sys.path if path != str(Path(__file__).parent))]
    forget_another_library()
    become_kernel(words) if kind == "kernel" else become_program(words)


def forget_another_library() -> None:
    """Forget the library's modules if this process would find them elsewhere."""
    if "vlkd_lab" in sys.modules:
        place = next(filter(None, (finder.find_spec("vlkd_lab", None) for finder in sys.meta_path)), None)
        if place is None or place.origin != sys.modules["vlkd_lab"].__file__:
            for name in [name for name in sys.modules if name.partition(".")[0] == "vlkd_lab"]:
                del sys.modules[name]


def become_kernel(words: list[str]) -> None:
    """Go on as a kernel."""
    sys.argv = ["ipykernel_launcher", *words]
    sys.modules["debugpy"] = None  # nobody debugs here, and importing it takes as long as all the rest of ipykernel
    importlib.import_module("ipykernel.kernelapp").launch_new_instance()


def become_program(words: list[str]) -> None:
    """Go on as `python WORDS`, words like -m MODULE, -c CODE or FILE; where RANKS names a folder, a rank of a job leaves its process number there."""
    if "RANKS" in os.environ and "RANK" in os.environ:
        Path(os.environ["RANKS"], os.environ["RANK"]).write_text(str(os.getpid()))
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
    threading._shutdown()  # waits for threads, as Python does at its end


if __name__ == "__main__":
    what, where, owner, *rest = sys.argv[1:]
    if what == "serve":
        sys.exit(serve(Path(where), int(owner.partition(",")[0]), "floors" in owner))
    sys.exit(launch(Path(where), owner, what, rest))
