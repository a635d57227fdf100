"""Ctrl-C and SIGTERM end a run alike: what threads wait for ends at once, and the main thread hears of it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a process that was asked to end."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: as a cluster, or ``kill``, asks a process to end."""


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises ``Terminated`` unless somebody else, such as Prefect, looks after it."""
    if not _is_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_call(close: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM also call ``close``, at once, in a thread of its own; their handlers stay as they are.

    Threads that wait for a label do not hear of a signal, and the main thread waits for them. A handler would be no
    place for ``close``: it may interrupt one that holds the very locks; and Prefect insists on its own.
    """
    if not _is_main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := ours.recv(64):
            if before != -1:
                with suppress(OSError):
                    os.write(before, numbers)
            if signal.SIGINT in numbers or signal.SIGTERM in numbers:
                close()

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        thread.join(timeout=5)
        if not thread.is_alive():
            ours.close()
