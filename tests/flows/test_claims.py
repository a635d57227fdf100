"""One label once: many threads and processes ask for the same keys, and each is computed by one of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alcore.errors import AlLoopError
from alcore.identity import label_key
from alcore.protocols import Claims
from alcore.types import Label, LabelStatus, Structure
from flows.claims import LabelClaims
from flows.leases import LeaseKeeper
from storage.memory import MemoryStore
from storage.store import MongoStore, open_store

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = "x|node7|another boot|42|0.0||theirs"


def structure(k: int) -> Structure:
    return Structure(
        numbers=np.array([29]),
        positions=np.full((1, 3), 0.1 * k),
        cell=4.0 * np.eye(3),
        pbc=np.ones(3, dtype=bool),
        fixed=np.zeros((1, 3), dtype=bool),
    )


def key(k: int) -> str:
    return label_key(structure(k), "f")


def make_label(k: int, status: LabelStatus = "ok", who: str = "") -> Label:
    known: dict[str, Any] = {"energy_ev": -float(k), "forces": np.zeros((1, 3))} if status == "ok" else {}
    return Label(
        key=key(k),
        structure=structure(k),
        fingerprint="f",
        calculator="emt",
        status=status,
        details={"computed_by": who},
        **known,
    )


class Asker:
    """What a run does for a label; every computation leaves a line in ``folder/computed``."""

    def __init__(self, store: Any, folder: Path, *, run: str = "", lease_s: float = 60.0) -> None:
        self.store, self.folder, self.run = store, folder, run
        self.said: list[str] = []
        self.stop = threading.Event()
        self.keeper = LeaseKeeper(store, run=run, lease_s=lease_s)
        self.claims = LabelClaims(self.keeper, store, stop=self.stop, log=self.said.append)

    def label(self, k: int, seconds: float = 0.01, status: LabelStatus = "ok", computed: bool = False) -> Label:
        typed: Claims = self.claims
        with typed.claim(key(k), computed=computed) as others:
            if others is not None:
                return others
            with (self.folder / "computed").open("a") as lines:
                lines.write(f"{k} {self.run}\n")
            end = time.monotonic() + seconds
            while time.monotonic() < end or (self.folder / f"hang-{self.run}").exists():
                time.sleep(0.005)
            label = make_label(k, status, self.run)
            self.store.save_label(label)
            return label

    def close(self) -> None:
        self.stop.set()
        self.keeper.close()


def computed(folder: Path) -> list[str]:
    file = folder / "computed"
    return file.read_text().splitlines() if file.exists() else []


def wait_until(happened: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def store(home: Path) -> Iterator[MongoStore]:
    """The real one, shared with other modules; what a test leaves is gone."""
    opened = open_store(None, home)
    for name in ("leases", "labels"):
        opened._database[name].delete_many({})
    yield opened
    for name in ("leases", "labels"):
        opened._database[name].delete_many({})
    opened.close()


OTHER_PROCESS = """
import random, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_claims as t
from flows.session import open_record_store
folder, run, keys = Path(sys.argv[2]), sys.argv[3], [int(k) for k in sys.argv[4].split(",")]
asker = t.Asker(open_record_store(None), folder, run=run, lease_s=float(sys.argv[5]))
random.Random(run).shuffle(keys)
(folder / f"ready-{run}").touch()
while (folder / "wait").exists():
    t.time.sleep(0.005)
with t.ThreadPoolExecutor(4) as threads:
    labels = list(threads.map(asker.label, keys))
assert [label.key for label in labels] == [t.key(k) for k in keys]
asker.close()
asker.store.close()
"""


class Others:
    """Processes that ask for labels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, run: str, keys: list[int], lease_s: float = 60.0) -> subprocess.Popen[str]:
        arguments = [str(Path(__file__).parent), str(self.folder), run, ",".join(map(str, keys)), str(lease_s)]
        command = [sys.executable, "-c", OTHER_PROCESS, *arguments]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started.append(process)
        return process


@pytest.fixture
def others(tmp_path: Path) -> Iterator[Others]:
    processes = Others(tmp_path)
    yield processes
    for process in processes.started:
        process.kill()
        process.communicate()


def test_threads_of_several_runs_compute_every_label_once(store: MongoStore, tmp_path: Path) -> None:
    keys = list(range(12))
    with ExitStack() as stack:
        askers = [stack.enter_context(closing(Asker(store, tmp_path, run=f"run-{i}"))) for i in range(4)]
        with ThreadPoolExecutor(16) as threads:
            asked = [(asker, k) for asker in askers for k in random.Random(asker.run).sample(keys, len(keys))]
            labels = list(threads.map(lambda both: both[0].label(both[1]), asked))
    assert sorted(int(line.split()[0]) for line in computed(tmp_path)) == keys
    assert {label.key for label in labels} == {key(k) for k in keys}
    assert len(labels) == 48
    assert store.held_leases("") == {}


def test_who_wants_it_computed_is_not_given_an_image(store: MongoStore, tmp_path: Path) -> None:
    with closing(Asker(store, tmp_path, run="one")) as asker:
        store.save_label(replace(make_label(0), details={"equivalent_to": key(1)}))
        assert asker.label(0).derived_from == key(1)
        assert computed(tmp_path) == []
        assert asker.label(0, computed=True).details == {"computed_by": "one"}
        assert asker.label(0, computed=True).details == {"computed_by": "one"}
        assert computed(tmp_path) == ["0 one"]


def test_processes_compute_every_label_once(store: MongoStore, tmp_path: Path, others: Others) -> None:
    keys = list(range(15))
    (tmp_path / "wait").touch()
    processes = [others.start(f"run-{i}", keys) for i in range(3)]
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    (tmp_path / "wait").unlink()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert sorted(int(line.split()[0]) for line in computed(tmp_path)) == keys
    assert len({line.split()[1] for line in computed(tmp_path)}) > 1, "they shared the work"
    assert all(label.ok for label in store.load_labels([key(k) for k in keys]).values())
    assert store.held_leases("") == {}


def test_who_waits_says_for_whom_and_gets_the_label(store: MongoStore, tmp_path: Path) -> None:
    with (
        closing(Asker(store, tmp_path, run="first")) as first,
        closing(Asker(store, tmp_path, run="second")) as second,
        ThreadPoolExecutor(2) as threads,
    ):
        (tmp_path / "hang-first").touch()
        mine = threads.submit(first.label, 1)
        wait_until(lambda: computed(tmp_path) == ["1 first"])
        waiting = threads.submit(second.label, 1)
        wait_until(lambda: bool(second.said))
        (owner,) = store.held_leases("label/").values()
        pid, host = owner.split("|")[3], owner.split("|")[1]
        assert second.said == [
            f"waits for label {key(1)[:6]}: it is being computed by 'first' (process {pid} on {host})"
        ]
        assert store.held_leases("label-slot/") == {}
        (tmp_path / "hang-first").unlink()
        assert waiting.result(60).details["computed_by"] == mine.result(60).details["computed_by"] == "first"
    assert computed(tmp_path) == ["1 first"]


def test_a_failure_is_not_inherited(store: MongoStore, tmp_path: Path) -> None:
    with (
        closing(Asker(store, tmp_path, run="first")) as first,
        closing(Asker(store, tmp_path, run="second")) as second,
        ThreadPoolExecutor(2) as threads,
    ):
        (tmp_path / "hang-first").touch()
        failing = threads.submit(first.label, 2, 0.0, "crashed")
        wait_until(lambda: computed(tmp_path) == ["2 first"])
        waiting = threads.submit(second.label, 2)
        wait_until(lambda: bool(second.said))
        (tmp_path / "hang-first").unlink()
        assert failing.result(60).status == "crashed"
        assert waiting.result(60).ok
    assert computed(tmp_path) == ["2 first", "2 second"]


def test_a_label_that_is_stored_while_its_lease_stays_is_taken_at_once(store: MongoStore, tmp_path: Path) -> None:
    """Its owner died, or lost the database, between the two."""
    store.take_lease([f"label/{key(3)}"], ELSEWHERE, 600)
    with closing(Asker(store, tmp_path, run="mine")) as asker, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(asker.label, 3)
        wait_until(lambda: bool(asker.said))
        assert not waiting.done()
        store.save_label(make_label(3))
        assert waiting.result(60).ok
    assert computed(tmp_path) == []


def test_the_claim_of_a_killed_process_is_taken_over_at_once(store: MongoStore, tmp_path: Path, others: Others) -> None:
    (tmp_path / "hang-killed").touch()
    other = others.start("killed", [4])
    wait_until(lambda: computed(tmp_path) == ["4 killed"])
    with closing(Asker(store, tmp_path, run="mine")) as asker, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(asker.label, 4)
        wait_until(lambda: bool(asker.said))
        other.send_signal(signal.SIGKILL)
        other.wait()
        began = time.monotonic()
        assert waiting.result(60).ok
        assert time.monotonic() - began < asker.keeper.lease_s / 2  # its lease has not run out by then
    assert computed(tmp_path) == ["4 killed", "4 mine"]
    assert store.held_leases("") == {}


def test_the_claim_of_a_dead_machine_is_taken_over_once_its_lease_ran_out(store: MongoStore, tmp_path: Path) -> None:
    store.take_lease([f"label/{key(5)}"], ELSEWHERE, 2.0)
    with closing(Asker(store, tmp_path, run="mine")) as asker:
        began = time.monotonic()
        assert asker.label(5).ok
        assert time.monotonic() - began > 1.5
    assert computed(tmp_path) == ["5 mine"]


def test_a_claim_is_held_for_many_times_its_length(store: MongoStore, tmp_path: Path) -> None:
    with (
        closing(Asker(store, tmp_path, run="first", lease_s=1.0)) as first,
        closing(Asker(store, tmp_path, run="second", lease_s=1.0)) as second,
        ThreadPoolExecutor(2) as threads,
    ):
        mine = threads.submit(first.label, 6, 4.0)
        wait_until(lambda: computed(tmp_path) == ["6 first"])
        assert threads.submit(second.label, 6).result(60).details["computed_by"] == "first"
        assert mine.result(60).ok
    assert computed(tmp_path) == ["6 first"]


def test_stop_ends_the_waiting(store: MongoStore, tmp_path: Path) -> None:
    store.take_lease([f"label/{key(7)}"], ELSEWHERE, 600)
    with closing(Asker(store, tmp_path, run="mine")) as asker, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(asker.label, 7)
        wait_until(lambda: bool(asker.said))
        asker.stop.set()
        with pytest.raises(AlLoopError, match="labelling was stopped"):
            waiting.result(10)
        assert asker.claims.held() == {key(7)}
    assert computed(tmp_path) == []
    assert list(store.held_leases("")) == [f"label/{key(7)}"]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_fails_no_two_ever_compute_the_same_at_once(seed: int, tmp_path: Path) -> None:
    """Askers that fail, raise, or lose their leases, at random; at any time at most one holder computes a key."""
    store, rng, lock = MemoryStore(), random.Random(seed), threading.Lock()
    inside: dict[int, int] = {}
    computed_ok: list[int] = []
    plans = [(asker, k, rng.choice(["ok", "ok", "failed", "raise"])) for asker in range(6) for k in range(8)]
    rng.shuffle(plans)
    askers = [Asker(store, tmp_path, run=str(i)) for i in range(6)]

    def work(plan: tuple[int, int, str]) -> None:
        index, k, what = plan
        try:
            with askers[index].claims.claim(key(k)) as others:
                if others is not None:
                    assert others.ok
                    return
                with lock:
                    inside[k] = inside.get(k, 0) + 1
                    assert inside[k] == 1
                try:
                    time.sleep(0.002)
                    if what == "raise":
                        raise ValueError(k)
                    store.save_label(make_label(k, "ok" if what == "ok" else "crashed"))
                    if what == "ok":
                        computed_ok.append(k)
                finally:
                    with lock:
                        inside[k] -= 1
        except ValueError:
            pass

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(work, plans))
    for asker in askers:
        asker.close()
    assert sorted(computed_ok) == sorted({k for _, k, what in plans if what == "ok"})  # what was good is good for all
    assert store.held_leases("") == {}
