"""An interpreter for tests that has imported everything before it starts: `python()` is used in the place of
`sys.executable`.

Importing torch, transformers and ours takes a process longer than what most tests let it do. One process per
test worker imports them once; each command is a fork of it, with its own arguments, working directory,
environment, files and exit status, and can be killed like any other. Not for what measures all memory of a
process rather than its growth, reads warnings of imports, or sets variables that are read while a library
loads: those take `sys.executable`.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("trainers", "train_single_gpu", "lotto", "extract_masks", "eval_model_all", "plot_runs")

# Stands for the command's process: same signals in, same exit status out.
CLIENT = """#!{executable} -ISB
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
files = array.array("i", [0, 1, 2])
server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(request)
pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
if os.WIFSIGNALED(status):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""


def python() -> str:
    """Path of the interpreter; the first call starts the process behind it, which ends with this one."""
    if not _started:
        _started.append(_start())
    folder, _ = _started[0]
    return str(folder / "python")


def stop() -> None:
    """End the process behind `python()`, if there is one; conftest.py calls it at the end of a session."""
    while _started:
        folder, server = _started.pop()
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


_started: list[tuple[Path, subprocess.Popen]] = []  # at most one


def _start() -> tuple[Path, subprocess.Popen]:
    folder = Path(tempfile.mkdtemp(prefix="prepared"))
    client = folder / "python"
    client.write_text(CLIENT.format(executable=sys.executable, address=str(folder / "socket")))
    client.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    command = [sys.executable, str(Path(__file__)), str(listener.fileno())]
    # the log level is what a command of several processes sets before it loads torch, which reads it once
    variables = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # its standard input ends when this process does
    server = subprocess.Popen(
        command, cwd=ROOT, env=variables, pass_fds=[listener.fileno()], stdin=subprocess.PIPE
    )
    listener.close()
    return folder, server


def serve(listener: socket.socket) -> None:
    """Answer each connection in a fork of this process, until standard input ends."""
    sys.path[0] = str(ROOT)
    for name in MODULES:
        __import__(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answering = set()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        answering -= {pid for pid in answering if os.waitpid(pid, os.WNOHANG)[0]}
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        pid = os.fork()
        if pid == 0:
            listener.close()
            answer(connection)
            os._exit(0)
        answering.add(pid)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Run one command in a fork, and tell its number and its status; kill it if nobody waits for that."""
    header, extra, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    files = array.array("i", extra[0][2])
    content = connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL)
    pid = os.fork()
    if pid == 0:
        connection.close()
        run(*json.loads(content), files)
    connection.sendall(pid.to_bytes(8, "big"))
    ended = os.pidfd_open(pid)
    if connection in select.select([connection, ended], [], [])[0]:  # who waited was killed
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(status.to_bytes(8, "big"))


def run(arguments: list[str], folder: str, environment: dict[str, str], files: array.array) -> None:
    """What `python ARGUMENTS` does: -u, then a script, -m with a module or -c with code; never returns."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # read long ago
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    added = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    arguments = [word for word in arguments if word != "-u"] if arguments[0] == "-u" else arguments
    code = 0
    try:
        if arguments[0] == "-m":
            sys.path[:1] = [folder, *added]
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.path[:1] = ["", *added]
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path[:1] = [str(Path(arguments[0]).resolve().parent), *added]
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
