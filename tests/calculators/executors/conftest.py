from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ase.build import bulk

from alcore.types import Candidate, LabelRequest, Structure
from calculators.base import ResolvedCalculator
from calculators.executors.queues import QueueSpec
from calculators.pyiron_labeling import PyironLabeler
from calculators.registry import resolve

HERE = Path(__file__).parent
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
CONFIGURATION = """
ClusterName=al-loop-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _path_with_sbin() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class _Cluster:
    """munged, slurmctld and slurmd of our own, on free ports, all files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.configuration = folder, folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(host=host, ports=_free_ports(2), folder=self.folder)
        self.configuration.write_text(text)
        places = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munged.pid"}
        places |= {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munged.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={place}" for name, place in places.items()))
        self._wait(places["socket"].exists)
        self._daemon("slurmctld", "-D", "-i", "-f", str(self.configuration))
        self._daemon("slurmd", "-D", "-N", host, "-f", str(self.configuration))
        self._wait(self._idle)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            environment = os.environ | {"PATH": _path_with_sbin(), "SLURM_CONF": str(self.configuration)}
            self._daemons.append(
                subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            )

    def _idle(self) -> bool:
        command = ["sinfo", "--noheader", "--format=%t"]
        environment = os.environ | {"SLURM_CONF": str(self.configuration)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=30)
        return done.stdout.strip() == "idle"

    def _wait(self, ready: Callable[[], bool], limit_s: float = 60.0) -> None:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            for daemon in self._daemons:
                if daemon.poll() is not None:
                    name = str(daemon.args[0])  # type: ignore[index]
                    said = (self.folder / f"{name}.out").read_text().strip().splitlines()
                    pytest.skip(f"{name} does not run here: {said[-1] if said else daemon.returncode}")
            if ready():
                return
            time.sleep(0.1)
        pytest.skip(f"SLURM was not ready within {limit_s:g} s")

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(daemon.pid).children(recursive=True)
                daemon.terminate()
                with suppress(subprocess.TimeoutExpired):
                    daemon.wait(10)
                for process in (*children, psutil.Process(daemon.pid)):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            daemon.wait()


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Path]:
    """The configuration of a real SLURM of one node, started here."""
    import tempfile

    if missing := [tool for tool in TOOLS if shutil.which(tool, path=_path_with_sbin()) is None]:
        pytest.skip(f"SLURM is not installed here: no {', '.join(missing)} (Debian: slurm-wlm, munge)")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons are started as root here")
    folder = Path(tempfile.mkdtemp(prefix="al-slurm-", dir="/tmp"))  # a socket's path must be short
    folder.chmod(0o755)
    cluster = _Cluster(folder)
    try:
        cluster.start()
        yield cluster.configuration
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm(slurm_cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands speak to the cluster of the tests."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster))
    return slurm_cluster


@dataclass(frozen=True)
class Waiting:
    """Another process that labels one structure with ``counting.counted``, and the same question for this one.

    ``counts`` has a line for each time that the calculation has begun; it goes on while there is a file ``hold``.
    """

    folder: Path
    system: str
    key: str = "0123456789abcdef" * 4

    @property
    def counts(self) -> Path:
        return self.folder / "counts"

    @property
    def hold(self) -> Path:
        return self.folder / "hold"

    @property
    def settings(self) -> dict[str, Any]:
        return {"file": str(self.counts), "hold": str(self.hold)}

    def resolved(self) -> ResolvedCalculator:
        return resolve("ase", {"factory": "counting:counted", "settings": self.settings, "path": str(HERE)})

    def request(self) -> LabelRequest:
        structure = Structure.from_atoms(bulk("Cu", cubic=True))
        candidate = Candidate(path="hop", kind="data", image=0, structure=structure)
        return LabelRequest(key=self.key, candidate=candidate, generation=0)

    def labeler(self, **more: Any) -> PyironLabeler:
        queue = QueueSpec(system=self.system, walltime_s=600, poll_s=0.5, grace_s=3) if self.system else None
        return PyironLabeler(self.resolved(), self.folder / "run", 1, **{"queue": queue, "timeout_s": 300.0} | more)

    def n_begun(self) -> int:
        return len(self.counts.read_text().splitlines()) if self.counts.exists() else 0

    def start_and_kill(self, when: Callable[[], bool]) -> None:
        """Start the other process, and kill it as soon as ``when``."""
        self.hold.touch()
        place = str(self.folder / "run")
        command = [sys.executable, str(HERE / "waiting.py"), place, self.system, self.key, json.dumps(self.settings)]
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[2])}
        process = subprocess.Popen(command, env=environment)
        try:
            _wait_until(lambda: when() or process.poll() is not None)
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()


def _wait_until(happened: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """``wait_until(happened)`` asks until it did."""
    return _wait_until


@pytest.fixture
def waiting(tmp_path: Path) -> Callable[[str], Waiting]:
    """``waiting(system)``: see ``Waiting``."""
    return lambda system: Waiting(tmp_path, system)


@dataclass(frozen=True)
class FakeSlurm:
    """Commands that keep their state in ``folder``; a test says there how they shall behave."""

    folder: Path

    def tell(self, name: str, text: str = "") -> None:
        """Make the file ``name`` that the commands look for (see ``fake_slurm.py``)."""
        (self.folder / name).write_text(text)

    def calls(self, program: str) -> int:
        """How often ``program`` was called."""
        log = self.folder / f"{program}.calls"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def fake_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "bin").mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {HERE / "fake_slurm.py"} {name} {folder} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    yield FakeSlurm(folder)
    for job in folder.glob("job-*"):
        with suppress(psutil.Error, ValueError):
            leader = psutil.Process(int(job.read_text().split("|")[0]))
            for process in (*leader.children(recursive=True), leader):
                process.kill()
