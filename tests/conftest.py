"""Every test session has its own folders and its own services, and leaves none of them behind.

What is set here is set before any test module is imported, so that numpy and torch see the thread limits and nothing
ever finds the user's own runs, labels or Prefect profile.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# inherited by whatever a test starts, so that nothing else can be mistaken for it
SESSION_VARIABLE = "AL_LOOP_TEST_SESSION"
SESSION_FOLDER = Path(tempfile.mkdtemp(prefix="al-loop-test-")).resolve()


def isolate() -> None:
    """Point every folder al-loop and its services write to below ``SESSION_FOLDER``, and limit threads."""
    for name in list(os.environ):
        if name.startswith(("AL_LOOP_", "PREFECT_", "PYIRON")):
            del os.environ[name]
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    os.environ[SESSION_VARIABLE] = str(SESSION_FOLDER)
    os.environ.update(
        AL_LOOP_HOME=str(SESSION_FOLDER / "al-loop"),
        PREFECT_HOME=str(SESSION_FOLDER / "prefect"),
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        DO_NOT_TRACK="1",
        MPLBACKEND="Agg",
        MPLCONFIGDIR=str(SESSION_FOLDER / "matplotlib"),
    )


def import_gpaw_as_users_do() -> None:
    """GPAW switches to a debug mode where it sees pytest: it then changes numpy's ``empty`` and error handling for the
    whole process, and what breaks is somewhere else."""
    if find_spec("gpaw"):
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "pytest"}
        import gpaw

        assert not gpaw.debug
        sys.modules.update(hidden)


isolate()
import_gpaw_as_users_do()
# A shell ignores Ctrl-C for what it starts in the background, and children inherit that; the tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("al-loop", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("al-loop")


def _stands_still(thread: Path) -> bool:
    try:
        return thread.read_text().rpartition(")")[2].split()[0] in "TZX"
    except OSError:  # it ended
        return True


def _freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while not all(_stands_still(thread) for thread in Path(f"/proc/{pid}").glob("task/*/stat")):
        time.sleep(0.001)


@pytest.fixture
def freeze() -> Callable[[int], None]:
    """Stops a process until ``SIGCONT``; returns when all its threads stand still. The signal alone may be late: a
    busy server still answers what it was asked after it was sent."""
    return _freeze


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End servers that a broken test left running, then remove the session's folder."""
    from flows import processes

    # pytest-xdist's workers carry their controller's environment; they end what they started themselves
    is_controller = getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput")
    if not is_controller:
        processes.stop(processes.with_variable(SESSION_VARIABLE, str(SESSION_FOLDER)))
    shutil.rmtree(SESSION_FOLDER, ignore_errors=True)
