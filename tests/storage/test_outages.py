"""Processes and servers that are killed in the middle of writing: what was acknowledged is in the database at last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from storage import courier
from storage.durable import DurableStore, open_durable_store
from storage.mongod import ensure_mongod, mongod_status, stop_mongod
from storage.store import MongoStore

CHECKOUT = Path(__file__).parents[2]
WRITER = """
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("makers", sys.argv[1])
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)
from storage.durable import open_durable_store
first, last, name = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
store = open_durable_store(None, Path(sys.argv[2]))
for n in range(first, last):
    store.save_label(makers.make_label(n), name)
    store.save_run(makers.make_run(name, reason=str(n), status="converged" if n == last - 1 else "running"))
    os.write(1, b"%d\\n" % n)
store.close()
"""


def writer(home: Path, first: int, last: int, name: str) -> subprocess.Popen[str]:
    """Says each number once it and its run are acknowledged; has done so once when this returns."""
    makers = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-c", WRITER, *map(str, (makers, home, first, last, name))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == f"{first}\n", process.stderr.read() if process.stderr else ""
    return process


def acknowledged(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.read().split()]


def kill_server(home: Path) -> None:
    if (pid := mongod_status(home).pid) is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def reopened(own_server: Path) -> Iterator[Callable[[], DurableStore]]:
    """The store as the next process opens it."""
    opened: list[DurableStore] = []

    def make() -> DurableStore:
        opened.append(open_durable_store(None, own_server))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.mark.parametrize("server_dies", [False, True])
def test_a_writer_killed_at_random_loses_nothing_it_had_acknowledged(
    server_dies: bool, own_server: Path, reopened: Callable[[], DurableStore], records: Any
) -> None:
    rng = np.random.default_rng(int(server_dies))
    ensure_mongod(own_server)
    done: list[int] = []
    for k in range(4):
        process = writer(own_server, 1000 * k, 1000 * (k + 1), f"run{k}")
        time.sleep(float(rng.uniform(0.05, 0.5)))
        if server_dies:
            kill_server(own_server)
            time.sleep(float(rng.uniform(0.0, 0.3)))
        process.send_signal(signal.SIGKILL)
        done += [1000 * k, *acknowledged(process)]
        process.wait()
        if server_dies:
            ensure_mongod(own_server)
    store = reopened()
    keys = [records.label(n).key for n in done]
    assert set(store.load_labels(keys)) == set(keys)
    assert (store.waiting, store.spool.count_aside()) == (0, 0)
    for k in range(4):
        run = store.load_run(f"run{k}")
        mine = [n for n in done if n // 1000 == k]
        assert run is not None
        assert int(run.reason) in (mine[-1], mine[-1] + 1), "the last that was acknowledged, or the one in flight"


def test_two_processes_write_while_the_server_is_killed_again_and_again(
    own_server: Path, reopened: Callable[[], DurableStore], records: Any
) -> None:
    ensure_mongod(own_server)
    processes = [writer(own_server, 1000 * k, 1000 * k + 80, f"run{k}") for k in range(2)]
    killed = 0
    while any(process.poll() is None for process in processes) and killed < 2:
        time.sleep(0.4)
        kill_server(own_server)
        killed += 1
    for process in processes:
        assert process.wait(120) == 0
        assert len(acknowledged(process)) == 79
    assert killed
    store = reopened()
    for k in range(2):
        run = store.load_run(f"run{k}")
        assert run is not None
        assert (run.status, run.reason) == ("converged", str(1000 * k + 79))
        assert store.count_labels_by_status(f"run{k}") == {"ok": 80}
    assert (store.waiting, store.spool.count_aside()) == (0, 0)


def test_a_writer_that_is_stopped_in_the_middle_holds_up_nobody(
    own_server: Path,
    reopened: Callable[[], DurableStore],
    records: Any,
    monkeypatch: pytest.MonkeyPatch,
    freeze: Callable[[int], None],
) -> None:
    monkeypatch.setattr("storage.spool.TURN_S", 1.0)
    ensure_mongod(own_server)
    process = writer(own_server, 0, 100_000, "stopped")
    try:
        for _ in range(5):
            freeze(process.pid)
            store = reopened()
            store.save_run(records.run("other"))
            assert store.load_run("other") is not None
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def full_disk_home(tmp_path: Path) -> Iterator[Path]:
    """A data folder whose database lies on a disk of 400 MB of its own."""
    home = tmp_path / "data"
    disk = home / "mongodb"
    disk.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    yield home
    with suppress(OSError):
        (disk / "filler").unlink()
    stop_mongod(home)
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_databases_disk_is_full_for_a_while(full_disk_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "REVIVE_EVERY_S", (0.5, 1.0))
    told: list[str] = []
    rng = np.random.default_rng(0)
    models = [rng.bytes(6_000_000) for _ in range(6)]
    with closing(open_durable_store(None, full_disk_home, log=told.append)) as store:
        disk = full_disk_home / "mongodb"
        with suppress(OSError), (disk / "filler").open("wb") as filler:
            while True:
                filler.write(bytes(1_000_000))
        names = [store.save_model(model, {}) for model in models]
        assert store.waiting > 0, "or the disk was not full"
        assert any("does not answer" in line for line in told)
        (disk / "filler").unlink()
        assert [store.load_model(name) for name in names] == models, "from where they wait"
        store.list_runs()
        assert store.waiting == 0
    with closing(MongoStore(ensure_mongod(full_disk_home))) as plain:
        assert [plain.load_model(name) for name in names] == models


def test_a_server_that_is_slow_to_come_back_ends_no_reader(
    own_server: Path, reopened: Callable[[], DurableStore], records: Any, freeze: Callable[[int], None]
) -> None:
    store = reopened()
    store.save_run(records.run("r"))
    pid = mongod_status(own_server).pid
    assert pid is not None
    process = psutil.Process(pid)
    freeze(pid)
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(store.load_run("r")))
    reader.start()
    time.sleep(6)
    process.resume()
    reader.join(90)
    assert [run.name for run in found] == ["r"]
