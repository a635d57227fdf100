"""Two ways to run al-loop, and what a user does with each after a crash."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import psutil
from world import RUN, World, lives

from storage.mongod import mongod_status

FINISHED = (0, 3)
"""Exit codes of a run that came to its end."""
PICK_UP_S = 40.0
"""A worker polls every two seconds, and a flow takes some to begin; no more than this on a busy machine."""


class User(Protocol):
    """Starts a run, sees whether it goes on, puts right what was killed."""

    targets: dict[str, int]
    """What to kill (roles joined by ``+``; ``everything``), and how often."""

    def start(self) -> None:
        """The run goes on if it does not already."""
        ...

    def runs(self) -> bool:
        """Whether a process works on the run, or will soon."""
        ...

    def mend(self) -> None:
        """Starts services again that the run needs."""
        ...

    def finished(self) -> bool:
        """Whether the run is over and said so."""
        ...

    def leave(self) -> None:
        """Stops the services."""
        ...


class Foreground:
    """``al-loop run --no-server``, in a terminal."""

    targets = {"run": 5, "run+label": 1, "mongod": 2, "label": 1, "run+mongod": 2, "everything": 2}  # noqa: RUF012

    def __init__(self, world: World) -> None:
        self._world = world
        self._process: subprocess.Popen[bytes] | None = None
        self.exits: list[int] = []

    def start(self) -> None:
        if not self.runs():
            self._process = self._world.start("run", str(self._world.run_file), "--no-server")

    def runs(self) -> bool:
        if self._process is not None and (code := self._process.poll()) is not None:
            self.exits.append(code)
            self._process = None
        return self._process is not None

    def mend(self) -> None:
        if not mongod_status(self._world.home).running:
            self._world.status()  # whoever looks starts it

    def finished(self) -> bool:
        return not self.runs() and bool(self.exits) and self.exits[-1] in FINISHED

    def leave(self) -> None:
        self._world.call("down")


class Deployed:
    """``al-loop up`` and ``prefect deployment run``."""

    targets = {  # noqa: RUF012
        "flow": 4,
        "worker": 2,
        "server": 2,
        "mongod": 2,
        "label": 1,
        "flow+worker": 2,
        "flow+server": 1,
        "server+mongod": 1,
        "everything": 3,
    }

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked = float("-inf")
        self._flow: psutil.Process | None = None

    def start(self) -> None:
        self.mend()
        if self.runs():
            return
        program = str(Path(sys.executable).with_name("prefect"))
        words = ("deployment", "run", "al-loop/al-loop", "--param", f"config={self._world.run_file}")
        done = self._world.call(*words, "--param", f"name={RUN}", program=program)
        if done.returncode:
            raise RuntimeError(f"prefect deployment run: {done.stderr or done.stdout}")
        self._asked = time.monotonic()

    def runs(self) -> bool:
        if self._flow is None or not lives(self._flow):
            self._flow = next(iter(self._world.processes().get("flow", [])), None)
        if self._flow is not None:
            self._asked = float("-inf")
            return True
        return time.monotonic() - self._asked < PICK_UP_S

    def mend(self) -> None:
        alive = self._world.processes()
        if not {"mongod", "server", "worker"} <= set(alive):
            done = self._world.call("up")
            if done.returncode:
                raise RuntimeError(f"al-loop up: exit {done.returncode}: {done.stderr}")

    def finished(self) -> bool:
        return not self.runs() and self._world.status() in ("converged", "budget_spent")

    def leave(self) -> None:
        done = self._world.call("down")
        if done.returncode:
            raise RuntimeError(f"al-loop down: exit {done.returncode}: {done.stderr}")
