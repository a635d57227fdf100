"""The embedded server, for real: one a folder, whatever happens to it."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure

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


def test_other_users_of_the_machine_are_kept_out(own_server: Path) -> None:
    """They reach the loopback, but neither the data without the key, nor the key."""
    umask = os.umask(0)
    try:
        uri = ensure_mongod(own_server)
    finally:
        os.umask(umask)
    status = mongod_status(own_server)
    assert status.uri == uri
    for command in ({"find": "labels"}, {"listCollections": 1}, {"insert": "labels", "documents": [{}]}):
        with (
            MongoClient("127.0.0.1", status.port, directConnection=True) as outsider,
            pytest.raises(OperationFailure, match="requires authentication"),
        ):
            outsider.al_loop.command(command)
    home = own_server / "mongodb"
    key = (home / "key").read_text().strip()
    assert len(key) == 64
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (own_server, home, home / "db", home / "key")}
    assert modes == {own_server.name: 0o700, "mongodb": 0o700, "db": 0o700, "key": 0o600}
    assert key not in " ".join(psutil.Process(status.pid).cmdline())
    assert key not in (home / "mongod.log").read_text()


def test_a_database_of_before_there_was_a_key_goes_on(own_server: Path, records: Any) -> None:
    """While the server of an older version runs it is used as it is; the next start asks for the key."""
    old = f"{own_server}/mongodb/db"
    Path(old).mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (own_server / "mongodb" / "port").write_text(f"{port}\n")
    words = ["--fork", "--dbpath", old, "--logpath", f"{own_server}/mongodb/mongod.log", "--port", str(port)]
    command = [str(mongod.find_mongod()), *words, "--bind_ip", "127.0.0.1", "--nounixsocket", "--replSet", "rs0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    store = open_store(None, own_server)
    store.save_label(records.label())
    store.close()
    assert "@" not in mongod_status(own_server).uri
    assert stop_mongod(own_server)
    store = open_store(None, own_server)
    assert "@" in mongod_status(own_server).uri
    assert store.count_labels_by_status(None) == {"ok": 1}
    store.close()
    (own_server / "mongodb" / "key").unlink()
    with pytest.raises(StoreError, match=r"the file with its key is gone .*al-loop down"):
        ensure_mongod(own_server)
    stop_mongod(own_server)
    store = open_store(None, own_server)  # with a new key
    assert store.count_labels_by_status(None) == {"ok": 1}
    store.close()


def test_a_start_that_was_killed_before_we_were_let_in_is_finished(own_server: Path) -> None:
    ensure_mongod(own_server)
    port = mongod_status(own_server).port
    assert port is not None
    system = mongod._client(own_server / "mongodb", port)
    system.admin.command("dropUser", mongod.USER)
    system.close()
    with MongoClient(ensure_mongod(own_server)) as client:
        assert client.al_loop.labels.find_one() is None
