"""The services under bad conditions: two at once, damaged files, killed parts, full and closed disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from alcore.errors import InputError, StoreError
from flows import environment, processes
from flows import services as services_module
from storage.documents import SCHEMA_COLLECTION
from storage.mongod import ensure_mongod, mongod_status, stop_mongod
from storage.store import open_store

CODE = (
    "from flows import deployment, services\n"
    "deployment.ENTRYPOINTS = {{'al-loop': 'tiny_flow:tiny'}}\n"
    "services.{verb}(lambda line: print(line, flush=True))\n"
)


def state() -> dict[str, Any]:
    return dict(json.loads((environment.data_dir() / "services.json").read_text()))


def running(home: Path) -> dict[str, list[int]]:
    """The pids of each service of a data folder; each should be there once."""
    found: dict[str, list[int]] = {"server": [], "worker": [], "mongod": []}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(home / "mongodb" / "db") in words:
            found["mongod"].append(process.pid)
    for process in processes.with_variable("PREFECT_HOME", str(home / "prefect")):
        words = process.cmdline()
        if words[1:3] == ["-m", "prefect"] and words[3:5] in (["server", "start"], ["worker", "start"]):
            found[words[3]].append(process.pid)
    return found


def start(module_folder: Path, verb: str) -> subprocess.Popen[str]:
    """``up`` or ``down`` in a process that is not waited for."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(module_folder)])
    command = [sys.executable, "-c", CODE.format(verb=verb)]
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        stop_mongod(place)
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_two_ups_at_once_leave_one_set(services: Any, module_folder: Path) -> None:
    home = environment.data_dir()
    one = {name: len(pids) for name, pids in running(home).items()}
    assert one == {"server": 1, "worker": 1, "mongod": 1}
    worker = processes.find(state()["worker"])
    assert worker is not None
    worker.send_signal(signal.SIGKILL)
    worker.wait(30)
    both = [start(module_folder, "up") for _ in range(2)]
    said = [process.communicate(timeout=280)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {name: len(pids) for name, pids in running(home).items()} == one
    assert processes.find(state()["worker"]) is not None


def test_a_damaged_file_of_pids_costs_nothing(services: Any) -> None:
    """Half-written or gone: who runs is found by what the processes carry, not started a second time."""
    home = environment.data_dir()
    file, before, pids = home / "services.json", state(), running(home)
    try:
        for damaged in (file.read_text()[: len(file.read_text()) // 2], "[]", "", "\0\0"):
            file.write_text(damaged)
            found = services_module._load(home)
            assert (found["server"]["pid"], found["worker"]["pid"]) == (
                before["server"]["pid"],
                before["worker"]["pid"],
            )
            assert found["port"] == before["port"]
        services.call("up")
        assert running(home) == pids
    finally:
        file.write_text(json.dumps(before, indent=1))


def test_a_pid_that_another_program_has_now_is_neither_believed_nor_ended(services: Any) -> None:
    """After a restart of the machine: pids of services.json belong to others, its lock file lies about."""
    home = environment.data_dir()
    file, before = home / "services.json", state()
    worker = processes.find(before["worker"])
    assert worker is not None
    other = subprocess.Popen(["sleep", "600"])
    try:
        processes.stop([worker])
        stale = {"pid": other.pid, "created": before["worker"]["created"], "ticks": 1, "boot": "another"}
        file.write_text(json.dumps(before | {"worker": stale}))
        assert (home / "services.lock").exists()
        services.call("up")
        assert other.poll() is None
        assert state()["worker"]["pid"] != other.pid
        assert processes.find(state()["worker"]) is not None
    finally:
        other.kill()
        other.wait()


def test_a_clock_that_jumped_does_not_hide_a_service() -> None:
    """psutil's time of creation moves with the clock; the kernel's count of ticks since the boot does not."""
    me = {"pid": os.getpid(), **processes.identity(psutil.Process())}
    assert processes.find({**me, "created": me["created"] + 86_400}) is not None
    assert processes.find({**me, "ticks": me["ticks"] + 1}) is None
    assert processes.find({**me, "boot": "an earlier one"}) is None
    for damaged in (
        {"pid": "x", "created": 1},
        {"pid": os.getpid()},
        {"pid": os.getpid(), "created": "noon"},
        {"pid": -1},
    ):
        assert processes.find(damaged) is None


def test_a_start_in_the_middle_of_a_power_cut_leaves_no_half_port(tmp_path: Path) -> None:
    home = tmp_path / "mongodb"
    (home / "db").mkdir(parents=True)
    for name in ("port.new", "key.new"):
        (home / name).write_text("12")
    (home / "lock").write_text("")
    (home / "db" / "mongod.lock").write_text(f"{os.getpid()}\n")
    try:
        assert ensure_mongod(tmp_path)
        assert os.stat(home / "key").st_mode & 0o777 == 0o600
    finally:
        stop_mongod(tmp_path)


def test_a_data_folder_that_cannot_be_written_is_one_line(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=1m,ro")
    for ask in (lambda: services_module._locked(place).__enter__(), lambda: ensure_mongod(place)):
        with pytest.raises(InputError, match=r"(?i)read-only file system") as caught:
            ask()
        assert str(place) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=256k")
    (place / "services.json").write_text('{"port": 4242}')
    filler = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while os.write(filler, b"0" * 4096):
            pass
    os.close(filler)
    with pytest.raises(InputError, match="No space left on device") as caught, services_module._locked(place) as known:
        services_module._save(place, known | {"more": "x" * 5000})
    assert "free space there" in str(caught.value)
    assert json.loads((place / "services.json").read_text()) == {"port": 4242}
    with pytest.raises(StoreError) as told:
        ensure_mongod(place)
    assert "\n" not in str(told.value)
    assert "space" in str(told.value).lower()


def test_a_database_of_a_newer_version_is_one_line(tmp_path: Path) -> None:
    try:
        store = open_store(None, tmp_path)
        store._database[SCHEMA_COLLECTION].update_one({"_id": "al_loop"}, {"$set": {"version": 99}})
        store.close()
        with pytest.raises(StoreError, match=r"schema version 99, this al-loop knows \d+ \(update al-loop") as caught:
            open_store(None, tmp_path)
        assert "\n" not in str(caught.value)
    finally:
        stop_mongod(tmp_path)


@pytest.mark.slow
def test_files_of_the_future_are_read_as_they_are(services: Any) -> None:
    home = environment.data_dir()
    before = running(home)
    far = 4_000_000_000
    for name in ("services.json", "services.lock", "mongodb/port", "mongodb/lock", "mongodb/key"):
        os.utime(home / name, (far, far))
    services.call("up")
    assert running(home) == before


@pytest.mark.slow
def test_the_servers_port_was_taken_while_it_was_down(services: Any, module_folder: Path) -> None:
    """Another port is taken, and the worker polls there."""
    import socket

    home, before = environment.data_dir(), state()
    server = processes.find(before["server"])
    assert server is not None
    processes.stop([server], grace_s=0)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", before["port"]))
        other.listen()
        services.call("up")
    after = state()
    assert after["port"] != before["port"]
    assert {name: len(pids) for name, pids in running(home).items()} == {"server": 1, "worker": 1, "mongod": 1}
    worker = processes.find(after["worker"])
    assert worker is not None
    assert worker.environ()["PREFECT_API_URL"].endswith(f":{after['port']}/api")


@pytest.mark.slow
def test_up_without_its_database_starts_what_it_can(services: Any) -> None:
    """The server of a user's own that is down is told by the run, not by ``up``."""
    uri = "mongodb://me:s3cret@127.0.0.1:9/?serverSelectionTimeoutMS=200"
    said = services.call("up", AL_LOOP_MONGODB_URI=uri)
    assert "s3cret" not in said
    with pytest.raises(StoreError, match="MongoDB cannot be reached") as caught:
        open_store(uri, environment.data_dir())
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_mongod_status_of_nothing_is_nothing(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    assert not mongod_status(tmp_path).running


def test_a_server_of_somebody_elses_is_not_taken_for_ours(services: Any) -> None:
    """Two that start at once may ask for one port: who gets it answers, and the other must look for another port."""
    server, port = processes.find(state()["server"]), state()["port"]
    assert server is not None
    assert services_module._healthy(port)
    assert services_module._listens(server, port)
    assert not services_module._listens(psutil.Process(), port)
