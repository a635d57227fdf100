"""The embedded server, for real: one a folder, whatever happens to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient

from alcore.errors import StoreError
from storage import mongod
from storage.mongod import ensure_mongod, mongod_status, stop_mongod
from storage.store import open_store

STARTER = (
    "import sys, pathlib; from storage.mongod import ensure_mongod; print(ensure_mongod(pathlib.Path(sys.argv[1])))"
)
ROOT = Path(__file__).parents[2]


def servers_on(data_dir: Path) -> list[int]:
    folder = str(data_dir / "mongodb" / "db")
    return [process.pid for process in psutil.process_iter(["cmdline"]) if folder in (process.info["cmdline"] or [])]


def kill(data_dir: Path) -> None:
    pid = mongod_status(data_dir).pid
    assert pid is not None
    process = psutil.Process(pid)
    os.kill(pid, signal.SIGKILL)
    process.wait(30)


def test_two_starters_at_once_make_one_server_that_outlives_them(own_server: Path) -> None:
    starters = [
        subprocess.Popen([sys.executable, "-c", STARTER, str(own_server)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    uris = {starter.communicate(timeout=120)[0].strip() for starter in starters}
    assert [starter.returncode for starter in starters] == [0, 0, 0]
    status = mongod_status(own_server)
    assert status.running
    assert uris == {status.uri}
    assert servers_on(own_server) == [status.pid]
    assert os.getsid(status.pid or 0) not in {starter.pid for starter in starters} | {os.getsid(0)}


def test_life_of_a_server(own_server: Path, records: Any) -> None:
    """Started, killed, stopped, started: same port, nothing acknowledged is lost, nothing but the loopback listens."""
    assert mongod_status(own_server) == mongod.MongodStatus(running=False, pid=None, port=None, uri="")
    assert not own_server.exists()
    assert stop_mongod(own_server) is False
    uri = ensure_mongod(own_server)
    assert ensure_mongod(own_server) == uri
    first = mongod_status(own_server)
    listening = {c.laddr for c in psutil.Process(first.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", first.port)}

    store = open_store(None, own_server)
    for seed in range(20):
        store.save_label(records.label(seed), "r")
    kill(own_server)
    store.close()
    assert not mongod_status(own_server).running
    assert ensure_mongod(own_server) == uri
    second = mongod_status(own_server)
    assert second.port == first.port
    assert second.pid != first.pid
    store = open_store(None, own_server)
    assert store.count_labels_by_status("r") == {"ok": 20}
    store.close()

    assert stop_mongod(own_server) is True
    assert servers_on(own_server) == []
    assert stop_mongod(own_server) is False
    assert mongod_status(own_server) == mongod.MongodStatus(running=False, pid=None, port=first.port, uri="")


def test_a_folder_can_move_to_another_port(own_server: Path, records: Any) -> None:
    """What to do when its port is taken: the file with the port is deleted, the data stay."""
    store = open_store(None, own_server)
    store.save_label(records.label())
    store.close()
    stop_mongod(own_server)
    port = mongod_status(own_server).port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        with pytest.raises(StoreError, match=f"port {port} .* is taken .*delete this file"):
            ensure_mongod(own_server)
        (own_server / "mongodb" / "port").unlink()
        store = open_store(None, own_server)
    assert store.count_labels_by_status(None) == {"ok": 1}
    store.close()
    assert mongod_status(own_server).port != port


def test_a_stale_pid_of_another_program_is_not_believed(own_server: Path) -> None:
    (own_server / "mongodb" / "db").mkdir(parents=True)
    (own_server / "mongodb" / "db" / "mongod.lock").write_text(f"{os.getpid()}\n")
    (own_server / "mongodb" / "port").write_text("no number")
    assert not mongod_status(own_server).running
    assert stop_mongod(own_server) is False
    with MongoClient(ensure_mongod(own_server)) as client:
        assert client.admin.command("ping")["ok"] == 1


def test_a_damaged_database_is_told_with_the_line_that_matters(own_server: Path) -> None:
    ensure_mongod(own_server)
    stop_mongod(own_server)
    (own_server / "mongodb" / "db" / "WiredTiger.turtle").write_bytes(b"garbage")
    (own_server / "mongodb" / "db" / "WiredTiger.wt").write_bytes(b"garbage")
    with pytest.raises(StoreError, match=r"MongoDB died at its start: .*(WiredTiger|Wired|corrupt)") as caught:
        ensure_mongod(own_server)
    assert str(own_server / "mongodb" / "mongod.log") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_the_mend(
    own_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "mongod"
    words = "mongod: error while loading shared libraries: libcurl.so.4: cannot open shared object file: No such file"
    program.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 127\n")
    program.chmod(0o755)
    monkeypatch.setattr(mongod, "find_mongod", lambda: program)
    with pytest.raises(StoreError, match=r"libcurl\.so\.4.*apt-get install libcurl4"):
        ensure_mongod(own_server)


def test_no_server_program_is_told_with_the_mend(own_server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongod.importlib.metadata, "distributions", list)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(StoreError, match=r"no MongoDB server .*pip install"):
        ensure_mongod(own_server)


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep a database here"):
        ensure_mongod(tmp_path / "file")


def test_a_read_only_folder_is_an_input_error(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    data_dir.chmod(0o555)
    if os.geteuid() == 0:  # whom no permission stops: proc is read-only for everyone
        data_dir = Path("/proc/self")
    with pytest.raises(StoreError, match="cannot keep a database here"):
        ensure_mongod(data_dir)
