"""Whole runs in whose middle MongoDB is killed, hangs, or is away; a data folder that cannot be written."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from alcore.runner import PlainRunner
from alcore.types import GenerationRecord, Label, RunRecord
from flows.cli import app
from flows.runfile import load_run_file
from flows.session import open_record_store, run_session
from storage.durable import spool_folder
from storage.mongod import ensure_mongod, mongod_status, stop_mongod
from storage.spool import Spool

SHORT = {"stop": {"max_generations": 2}}


def al_loop(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder with a server of this test's own, which the test may treat badly."""
    home = tmp_path / "home"
    monkeypatch.setenv("AL_LOOP_HOME", str(home))
    ensure_mongod(home)
    yield home
    with suppress(psutil.Error, TypeError):
        psutil.Process(mongod_status(home).pid).resume()
    stop_mongod(home)


def signal_server(home: Path, number: int) -> None:
    pid = mongod_status(home).pid
    assert pid is not None
    os.kill(pid, number)


def wait(happened: Callable[[], object], seconds: float = 90.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(0.05)
    return False


Trouble = Callable[[Path], None]


def killed(home: Path) -> None:
    signal_server(home, signal.SIGKILL)


def hanging(home: Path) -> None:
    signal_server(home, signal.SIGSTOP)
    pid = mongod_status(home).pid
    subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {pid}"])


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [killed, hanging])
def test_a_run_goes_on_through_an_outage(
    trouble: Trouble, hop: Any, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each generation but the last; nothing is computed twice, nothing is lost."""
    for limit in ("UNREACHABLE_MS", "HUNG_MS", "HEARTBEAT_MS"):
        monkeypatch.setattr(f"storage.store.{limit}", 1000)
    name = f"outage-{trouble.__name__}"
    lines: list[str] = []
    struck: list[int] = []

    def strike(run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label]) -> None:
        if run.status == "running" and len(struck) < 2:
            struck.append(generations[-1].index)
            trouble(own_home)

    outcome = run_session(
        load_run_file(hop.run_file(name, **SHORT)),
        runner=PlainRunner({"label": 1}),
        on_generation=strike,
        log=lines.append,
    )
    assert struck == [0, 1]
    assert any("does not answer" in line for line in lines)
    assert any("answers again" in line for line in lines)
    with closing(open_record_store(None)) as store:
        run, generations = store.load_run(name), store.load_generations(name)
        found = store.load_labels(list(outcome.labels))
        assert (store.waiting, store.spool.count_aside()) == (0, 0)
    assert run is not None
    assert run.status == outcome.run.status == "budget_spent"
    assert [record.index for record in generations] == [0, 1, 2]
    assert set(found) == set(outcome.labels)
    assert hop.calls(name) == generations[-1].n_reference_calls == len(found)


@pytest.mark.slow
def test_a_label_that_is_done_while_mongodb_is_away_waits_on_disk_and_status_tells(
    hop: Any, own_home: Path, tmp_path: Path
) -> None:
    """A server that cannot be started again at the end of a long label; then Ctrl-C; then all is back."""
    file, hang = hop.run_file("away", **SHORT), hop.folder / "hang-away"
    hang.touch()
    command = [sys.executable, "-m", "flows.cli", "run", str(file), "--no-server"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=dict(os.environ))
    folder = spool_folder(None, own_home)
    try:
        assert wait(lambda: hop.calls("away") == 1), (tmp_path / "err").read_text()
        (own_home / "mongodb" / "port").rename(own_home / "port")  # nor can it be started again
        (own_home / "mongodb").rename(own_home / "elsewhere")
        (own_home / "mongodb").write_text("")
        killed_pid = int((own_home / "elsewhere" / "db" / "mongod.lock").read_text())
        os.kill(killed_pid, signal.SIGKILL)
        hang.unlink()
        assert wait(lambda: any("-label" in path.name for path in Spool(folder).files())), (
            tmp_path / "out"
        ).read_text()
        assert wait(lambda: "does not answer" in (tmp_path / "out").read_text())
        shown = al_loop("status")
        assert shown.exit_code == 2
        waits, error = shown.stderr.strip().splitlines()
        assert waits.endswith(f"on disk in {folder}")
        assert "cannot keep a database here" in error
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, (tmp_path / "err").read_text()
        assert (tmp_path / "err").read_text().startswith("stopped; nothing that was labelled is lost")
        assert "the next al-loop command that reaches it delivers them" in (tmp_path / "out").read_text()
    finally:
        process.kill()
        process.wait()
        (own_home / "mongodb").unlink(missing_ok=True)
        (own_home / "elsewhere").rename(own_home / "mongodb")
        (own_home / "port").rename(own_home / "mongodb" / "port")
    asked = hop.calls("away")
    (row,) = json.loads(al_loop("status", "--json").stdout)
    assert row["status"] == "cancelled"
    assert Spool(folder).count() == 0
    outcome = run_session(load_run_file(file), runner=PlainRunner({"label": 1}))
    assert hop.calls("away") == outcome.generations[-1].n_reference_calls == len(outcome.labels) >= asked


def test_a_read_only_data_folder_is_one_line_at_once(
    hop: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri, disk = ensure_mongod(home), tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    try:
        monkeypatch.setenv("AL_LOOP_HOME", str(disk))
        for place in ("null", uri):
            with caplog.at_level(logging.CRITICAL):
                result = al_loop(
                    "run", hop.run_file("readonly", **SHORT), "--no-server", "--set", f"store.mongodb_uri={place}"
                )
            assert (result.exit_code, result.stdout) == (2, "")
            assert result.stderr.count("\n") == 1
            assert "Read-only file system" in result.stderr
            assert str(disk) in result.stderr
        assert hop.calls("readonly") == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
