"""The inside of a worker process: a long-lived loop over jobs, each in its own folder with its output caught there."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from calculators.executors.processes import MARK, end_family

PARENT_POLL_S = 0.5
BACKSTOP_S = 60.0
"""The parent ends a late job. One that holds the interpreter while the parent is dead ends itself so much later."""
ENDING = threading.Event()
"""Set before all that this process started is ended: what it computes from then on is no answer."""


def main(descriptor: int, parent: int) -> None:
    """Serve jobs that come through the socket ``descriptor`` until the process ``parent`` closes it or dies."""
    os.set_inheritable(descriptor, False)  # a job's own children must not keep the connection open
    connection = Connection(descriptor)
    threading.Thread(target=watch_parent, args=(parent,), daemon=True).start()
    faulthandler.enable(all_threads=False)
    try:
        setup, argument = connection.recv()
        work = setup(argument)
    except BaseException as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", None))
    home = os.getcwd()
    with suppress(EOFError, ConnectionError):
        while True:
            folder, job, timeout_s = connection.recv()
            connection.send(("begun", None))
            with _inside(Path(folder), home, timeout_s):
                reply = _answer(work, job)
            connection.send(reply)


def _answer(work: Callable[[Any], Any], job: Any) -> tuple[str, Any]:
    try:
        return "done", work(job)
    except BaseException:
        return "raised", traceback.format_exc()


@contextmanager
def _inside(folder: Path, home: str, timeout_s: float) -> Iterator[None]:
    """Run in ``folder`` with stdout and stderr, those of child processes and Fortran too, in files there."""
    kept = [os.dup(1), os.dup(2)]
    for target, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, target)
        os.close(file)
    os.chdir(folder)
    faulthandler.dump_traceback_later(min(timeout_s + BACKSTOP_S, 1e7), exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a disk that is full must not cost the answer
                stream.flush()
        os.chdir(home)
        for target, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)


def watch_parent(parent: int) -> None:
    """End everything once the parent is gone, even killed; the kernel's parent-death signal would not do, because it
    comes at the end of the parent *thread* that started us, and spares our children."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    ENDING.set()
    end_family(os.getpid(), os.environ[MARK])
    os._exit(1)
