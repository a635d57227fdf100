"""Whole runs in processes of their own: stopped, killed, started twice, and two at work on the same labels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import test_session as t

from flows import environment
from flows.leases import LEASE_S, is_dead, live_runs
from flows.session import open_record_store


def _wait(happened: Callable[[], bool], seconds: float = 90.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """``al-loop run`` in a process of its own; what it says is in ``out-<run file>`` and ``err-<run file>``."""
    started = []

    def run_it(file: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flows.cli", "run", str(file), "--no-server"]
        with (tmp_path / f"out-{file.stem}").open("w") as out, (tmp_path / f"err-{file.stem}").open("w") as err:
            started.append(subprocess.Popen(command, stdout=out, stderr=err, env=dict(os.environ)))
        return started[-1]

    yield run_it
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGINT, 130, "stopped by the user"), (signal.SIGTERM, 143, "stopped from outside (SIGTERM)")],
)
def test_a_signal_while_a_label_is_computed(
    number: int, code: int, reason: str, hop: Any, home: Path, tmp_path: Path, start: Any
) -> None:
    name = f"stopped-{code}"
    file, hang = hop.run_file(name, executor={"workers": 2}, **t.FIRST_TWO), hop.folder / f"hang-{name}"
    hang.touch()
    process = start(file)
    assert _wait(lambda: hop.calls(name) == 2), (tmp_path / f"err-{name}").read_text()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(number)
    assert process.wait(60) == code
    assert (tmp_path / f"err-{name}").read_text() == (
        f"stopped; nothing that was labelled is lost, go on with: al-loop run {file} --no-server\n"
    )
    assert not [worker for worker in workers if worker.is_running()]
    stopped = t.stored_run(name)
    assert (stopped.status, stopped.reason) == ("cancelled", reason)
    assert _leases() == {}
    hang.unlink()
    outcome = t.run(file)
    assert outcome.run.status == "budget_spent"
    assert outcome.generations[-1].n_reference_calls == 3


def _leases() -> dict[str, str]:
    with closing(open_record_store(None)) as store:
        return store.held_leases("")


def _live() -> set[str]:
    with closing(open_record_store(None)) as store:
        return live_runs(store)


def test_the_same_run_started_twice_and_killed(hop: Any, home: Path, tmp_path: Path, start: Any) -> None:
    file, hang = hop.run_file("twice", **t.FIRST_TWO), hop.folder / "hang-twice"
    hang.touch()
    first = start(file)
    assert _wait(lambda: hop.calls("twice") == 1), (tmp_path / "err-twice").read_text()
    refused = t.al_loop("run", file, "--no-server")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"run 'twice': process {first.pid} on {environment.host()} works on it now "
        "(wait for it or stop it, or choose another name (--name))\n"
    )
    assert t.al_loop("check", file).stderr == refused.stderr
    assert (first.poll(), hop.calls("twice"), _live()) == (None, 1, {"twice"})
    assert len(t.stored_run("twice").sittings) == 1

    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (t.stored_run("twice").status, _live()) == ("running", set())
    more = t.al_loop("check", file, "--set", "stop.max_labels=7").stdout.splitlines()
    assert "run         twice: exists (abandoned), begins anew" in more
    assert "changed     stop.max_labels was 60, is now 7" in more
    hang.unlink()
    began = time.monotonic()
    outcome = t.run(file)
    assert time.monotonic() - began < LEASE_S  # nothing was waited for
    assert outcome.generations[-1].n_reference_calls == 3
    assert hop.calls("twice") == 4  # the one in flight twice, no other
    assert _live() == set()
    assert all(is_dead(owner) for owner in _leases().values())  # its slot was not needed, and runs out by itself


@pytest.mark.slow
def test_what_another_run_computes_is_waited_for(hop: Any, home: Path, tmp_path: Path, start: Any) -> None:
    options = {"tag": "common", "executor": {"workers": 1, "timeout_s": 600}, **t.FIRST_TWO}
    ahead, behind = hop.run_file("ahead", **options), hop.run_file("behind", **options)
    hang = hop.folder / "hang-common"
    hang.touch()
    first = start(ahead)
    assert _wait(lambda: hop.calls("common") == 1), (tmp_path / "err-ahead").read_text()
    second = start(behind)
    said = tmp_path / "out-behind"
    line = f"it is being computed by 'ahead' (process {first.pid} on {environment.host()})"
    assert _wait(lambda: line in said.read_text()), (tmp_path / "err-behind").read_text()
    alive = [name.split("/")[0] for name, owner in _leases().items() if not is_dead(owner)]
    assert sorted(alive) == ["label", "label-slot", "run", "run"]
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == 130
    assert (t.stored_run("behind").status, hop.calls("common")) == ("cancelled", 1)
    second = start(behind)
    assert _wait(lambda: line in said.read_text()), (tmp_path / "err-behind").read_text()
    hang.unlink()
    assert [first.wait(120), second.wait(120)] == [3, 3]
    last = [t.stored_generations(name)[-1] for name in ("ahead", "behind")]
    assert hop.calls("common") == sum(record.n_reference_calls for record in last) == 3
    assert last[1].n_labels_reused >= 1
