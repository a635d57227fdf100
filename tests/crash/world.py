"""A data folder with everything that lives on it: what a user can call, what can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import slow_emt
from bson import decode
from bson.errors import BSONError

from calculators.outcomes import OUTCOME, folder_name
from calculators.registry import resolve
from storage.spool import DIGEST_BYTES

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
MARK = "CRASH_TEST_WORLD"
"""Environment variable that everything started here inherits; its value is the world's folder."""
RUN = "crash"
SHORT = {"sane_energy_ev": 10.0, "sane_force_ev_per_ang": 10.0}
"""Trainings too short for members that could be used: they are taken as they are."""
COMMAND_LIMIT_S = 240.0
LEAVES_WITHIN_S = 30.0
"""A process that is asked to end does so within this."""


def run_settings(label_s: float) -> dict[str, Any]:
    """The run: a hop whose committee is trained twice, confirmed by the reference after six generations."""
    structures = CHECKOUT / "config" / "structures" / "au_al100"
    ends = {name: str(structures / f"{name}.extxyz") for name in ("initial", "final")}
    return {
        "name": RUN,
        "paths": [{"name": "hop", **ends}],
        "calculator": {
            "name": "ase",
            "factory": "slow_emt:calculator",
            "settings": {"seconds": label_s},
            "path": str(HERE),
        },
        "executor": {"kind": "local", "workers": 2, "max_running": 2, "timeout_s": 600},
        "model": {"committee": 2, "options": {"fresh_epochs": 2, "warm_epochs": 1, "first_labels": 4, **SHORT}},
        "neb": {"n_images": 5},
        "select": {"labels_per_generation": 2},
        "stop": {
            "max_generations": 8,
            "max_labels": 30,
            "barrier_tolerance_ev": 0.003,
            "saddle_fmax_ev_per_ang": 0.02,
        },
        "seed": 3,
    }


class World:
    """Everything of one run and its services lies below ``folder``.

    Attributes:
        folder: of the world.
        home: al-loop's data folder.
        run_file: what is run.
        log: the calculator's.
    """

    def __init__(self, folder: Path, label_s: float) -> None:
        self.folder = folder.resolve()
        self.home, self.log = self.folder / "home", self.folder / "calculations.log"
        self.run_file = self.folder / "run.yaml"
        self.folder.mkdir(parents=True)
        settings = run_settings(label_s)
        self.run_file.write_text(json.dumps(settings, indent=1))
        calculator = {key: value for key, value in settings["calculator"].items() if key != "name"}
        self.fingerprint = resolve("ase", calculator).fingerprint
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AL_LOOP_MONGODB", "PREFECT_", "PYIRON"))}
        self._environment = kept | {
            "AL_LOOP_HOME": str(self.home),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": str(CHECKOUT),
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
            "COLUMNS": "200",
            MARK: str(self.folder),
            slow_emt.LOG: str(self.log),
            slow_emt.FINGERPRINT: self.fingerprint,
        }

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """``al-loop ARGUMENTS`` in a process group of its own; what it says is appended to ``said.txt``."""
        with (self.folder / "said.txt").open("ab") as out:
            out.write(f"$ al-loop {' '.join(arguments)}\n".encode())
            out.flush()
            return subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
            )

    def call(self, *arguments: str, program: str = "") -> subprocess.CompletedProcess[str]:
        """``al-loop ARGUMENTS``, or those of another program, waited for."""
        return subprocess.run(
            [*([program] if program else [sys.executable, "-m", "flows.cli"]), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self._environment,
            check=False,
            timeout=COMMAND_LIMIT_S,
        )

    def status(self) -> str:
        """The run's status as ``al-loop status --json`` tells it, "" if there is no such run yet."""
        done = self.call("status", RUN, "--json")
        if done.returncode == 2 and "no run named" in done.stderr:
            return ""
        if done.returncode:
            raise RuntimeError(f"al-loop status: exit {done.returncode}: {done.stderr}")
        (row,) = json.loads(done.stdout)
        return str(row["status"])

    def processes(self) -> dict[str, list[psutil.Process]]:
        """What lives here now, by what it is: ``run``, ``label``, ``mongod``, ``flow``, ``worker``, ``server``,
        ``other``."""
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                variables = process.environ()
                if variables.get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(_role(process.cmdline(), variables), []).append(process)
        return found

    def kept_on_disk(self, keys: Sequence[str]) -> set[str]:
        """Those of ``keys`` whose answer lies on the disk, outside the database: in the folder of its calculation, or
        in the spool."""
        folders = {file.parent.name for file in (self.home / "calculations").rglob(OUTCOME)}
        waiting = {_label_of(file) for file in self.spooled()}
        return {key for key in keys if key in waiting or any(name.startswith(folder_name(key)) for name in folders)}

    def spooled(self) -> list[Path]:
        """Files that wait in the spool, or were put aside there."""
        return [file for file in (self.home / "spool").rglob("*-*.*") if not file.name.endswith(".tmp")]

    def end(self) -> None:
        """Kills whatever is left, services too."""
        kill([p for group in self.processes().values() for p in group], signal.SIGKILL, at_once=True)


def _label_of(file: Path) -> str:
    """The label that a file of the spool holds, or ""."""
    with suppress(OSError, BSONError):
        return str(decode(file.read_bytes()[DIGEST_BYTES:])["content"].get("key", ""))
    return ""


def _role(command: Sequence[str], variables: Mapping[str, str]) -> str:
    words = " ".join(command)
    if command and Path(command[0]).name.startswith("mongod"):
        return "mongod"
    if "calculators.executors.worker" in words or "calculators.job" in words:
        return "label"
    if "flows.cli run" in words:
        return "run"
    if "worker start" in words:
        return "worker"
    if "server start" in words or "prefect.server" in words:
        return "server"
    return "flow" if "PREFECT__FLOW_RUN_ID" in variables else "other"


def kill(processes: Sequence[psutil.Process], number: int, *, at_once: bool) -> None:
    """Sends ``number`` to all; ``at_once``: they are stopped first, so that none sees another one die, as in a power
    cut."""
    if at_once:
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)
    # Not psutil's wait: it would take a child's exit code away from whoever started it.
    deadline = time.monotonic() + LEAVES_WITHIN_S
    while any(lives(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def lives(process: psutil.Process) -> bool:
    """Whether the process runs; one that only waits for its parent to hear of its end does not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
