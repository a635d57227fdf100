"""Who holds a name, and one heartbeat for all that is held: over threads, processes, and a store that goes away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from alcore.errors import RunBusyError, StoreUnreachableError
from flows import one_process
from flows.leases import Held, LeaseKeeper, Waiting, is_dead, live_runs, new_owner, read_owner, this_machine
from flows.one_process import take_run
from flows.session import open_record_store
from storage.memory import MemoryStore
from storage.mongod import mongod_status, stop_mongod
from storage.store import MongoStore, open_store

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = "x|node7|another boot|42|0.0||theirs"


def wait_until(happened: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def store(home: Path) -> Iterator[MongoStore]:
    """The real one; what an earlier test left held is gone."""
    opened = open_store(None, home)
    opened._database["leases"].delete_many({})
    yield opened
    opened.close()


HOLDER = """
import sys, time
from flows.leases import LeaseKeeper
from flows.session import open_record_store
held = LeaseKeeper(open_record_store(None), run="other").take([sys.argv[1]])
print(held.owner, flush=True)
time.sleep(600)
"""


@pytest.fixture
def start_holder() -> Iterator[Callable[[str], tuple[subprocess.Popen[str], str]]]:
    """Another process that holds a name; it, and as whom it does."""
    started = []

    def start(name: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", HOLDER, name]
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Away(MemoryStore):
    """A store that does not answer while ``away`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.away = threading.Event()
        self.asked = 0

    def _ask(self) -> None:
        self.asked += 1
        if self.away.is_set():
            raise StoreUnreachableError("MongoDB cannot be reached", where="nowhere")

    def take_lease(self, names: object, owner: str, seconds: float) -> str | None:
        self._ask()
        return super().take_lease(names, owner, seconds)  # type: ignore[arg-type]

    def renew_lease(self, name: str, owner: str, seconds: float) -> bool:
        self._ask()
        return super().renew_lease(name, owner, seconds)

    def release_lease(self, name: str, owner: str) -> None:
        self._ask()
        super().release_lease(name, owner)

    def held_leases(self, prefix: str) -> dict[str, str]:
        self._ask()
        return super().held_leases(prefix)


# --- who it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["", "nonsense", "a|b||1|0||r", "a|b|other machine|1|0.0|7|r", "a|b|c|d|e|f|g"])
def test_only_processes_of_this_very_machine_are_ever_taken_for_dead(owner: str) -> None:
    assert not is_dead(owner)


def test_owners_are_unique_tell_who_they_are_and_are_alive() -> None:
    owners = {new_owner("a|run with bars") for _ in range(100)}
    assert len(owners) == 100
    assert not any(is_dead(owner) for owner in owners)
    mine = owners.pop()
    who = read_owner(mine)
    assert who is not None
    assert (who.run, who.pid, who.machine) == ("a|run with bars", os.getpid(), this_machine())
    assert str(who) == f"process {os.getpid()} on {who.host}"
    assert who.is_here == bool(this_machine())
    if sys.platform == "linux":
        assert is_dead(re.sub(rf"\|{os.getpid()}\|", "|4194304|", mine))  # no pid is that large


def test_runs_that_somebody_works_on(
    store: MongoStore, start_holder: Callable[[str], tuple[subprocess.Popen[str], str]]
) -> None:
    holder, owner = start_holder("run/killed")
    with closing(LeaseKeeper(store, run="mine")) as keeper:
        take_run(keeper, "mine", print)
        store.take_lease(["run/far"], ELSEWHERE, 60)
        keeper.take(["label/no-run"])
        assert live_runs(store) == {"killed", "mine", "far"}
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert is_dead(owner)
        assert live_runs(store) == {"mine", "far"}
        assert "run/killed" in store.held_leases("run/")  # to look changes nothing
    assert live_runs(store) == {"far"}


# --- the heartbeat ----------------------------------------------------------------------------------------------------


def test_one_thread_keeps_any_number_of_leases_for_many_times_their_length(store: MongoStore) -> None:
    names = [f"name/{k}" for k in range(50)]
    with closing(LeaseKeeper(store, lease_s=1.5)) as keeper, closing(LeaseKeeper(store)) as thief:
        held = [keeper.take([name]) for name in names]
        assert all(held)
        assert sum(thread.name == "leases" for thread in threading.enumerate()) == 1
        end = time.monotonic() + 3.5
        while time.monotonic() < end:
            assert thief.take(names) is None
        assert keeper.n_held == 50
        keeper.give_back(held[7])  # type: ignore[arg-type]
        assert (thief.take(names) or Held("", "")).name == "name/7"
    assert store.held_leases("") == {}
    assert not any(thread.name == "leases" for thread in threading.enumerate())


def test_a_lease_that_ran_out_while_the_store_was_away_is_held_again() -> None:
    store = Away()
    with closing(LeaseKeeper(store, lease_s=0.4)) as keeper:
        held = keeper.take(["a"])
        other = keeper.take(["b"])
        assert held is not None
        assert other is not None
        store.away.set()
        seen = store.asked
        wait_until(lambda: store.asked >= seen + 6)
        time.sleep(0.5)
        with store._lock:  # as the index that clears old leases does
            del store._leases["a"]
        store.away.clear()
        wait_until(lambda: set(store.held_leases("")) == {"a", "b"})
        assert store.held_leases("") == {"a": held.owner, "b": other.owner}
        assert not held.lost
        assert keeper.confirm(held)


def test_a_lease_that_another_took_meanwhile_is_lost_and_stays_the_others(caplog: pytest.LogCaptureFixture) -> None:
    store = Away()
    with closing(LeaseKeeper(store, lease_s=0.4)) as keeper:
        held = keeper.take(["a"])
        assert held is not None
        store._leases["a"] = ("another", time.monotonic() + 60)
        wait_until(lambda: held.lost)
        assert keeper.n_held == 0
        assert not keeper.confirm(held)
        keeper.give_back(held)
    assert store.held_leases("") == {"a": "another"}
    assert "the lease a was lost" in caplog.text


def test_a_lease_whose_taking_got_no_answer_is_not_waited_for() -> None:
    class Deaf(MemoryStore):
        answers = False

        def take_lease(self, names: object, owner: str, seconds: float) -> str | None:
            name = super().take_lease(names, owner, seconds)  # type: ignore[arg-type]
            if not self.answers:
                raise StoreUnreachableError("the connection was closed")
            return name

    store = Deaf()
    with closing(LeaseKeeper(store)) as keeper:
        with pytest.raises(StoreUnreachableError):
            keeper.take(["a"])
        store.answers = True
        assert keeper.take(["a"]) is None
        assert keeper.others(["a"], "a") == {}
        assert keeper.take(["a"]) is not None


@pytest.mark.slow
def test_a_database_that_stands_still_for_longer_than_a_lease_takes_nothing_from_the_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mongod is stopped for twice a lease, while another waits for the very name."""
    monkeypatch.setenv("AL_LOOP_HOME", str(tmp_path / "data"))
    try:
        with closing(open_record_store(None)) as store, closing(open_record_store(None)) as theirs:
            server = psutil.Process(mongod_status(tmp_path / "data").pid)
            stop = threading.Event()
            with closing(LeaseKeeper(store, lease_s=6)) as keeper, closing(LeaseKeeper(theirs, lease_s=6)) as rival:
                held = keeper.take(["a"])
                assert held is not None
                waiting = Waiting(rival, ["a"], prefix="a", stop=stop, tell=lambda owners: None, log=lambda line: None)
                got: list[Held | None] = []

                def wait() -> None:
                    while not stop.is_set():
                        if (lease := waiting.turn()) is not None:
                            got.append(lease)
                            return

                thread = threading.Thread(target=wait)
                thread.start()
                time.sleep(1.0)
                server.suspend()
                time.sleep(12)
                server.resume()
                wait_until(lambda: store.held_leases("a") == {"a": held.owner})
                time.sleep(8)  # longer than a lease
                assert store.held_leases("a") == {"a": held.owner}
                assert (held.lost, got) == (False, [])
                keeper.give_back(held)
                wait_until(lambda: bool(got))
                stop.set()
                thread.join()
    finally:
        stop_mongod(tmp_path / "data")


# --- the waiting ------------------------------------------------------------------------------------------------------


def test_a_store_that_is_away_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.leases.TELL_AFTER_S", 0.0)
    monkeypatch.setattr("flows.leases.GRACE_S", 0.05)
    store, stop, said = Away(), threading.Event(), list[str]()
    store.away.set()
    with closing(LeaseKeeper(store)) as keeper:
        waiting = Waiting(keeper, ["a"], prefix="a", stop=stop, tell=lambda owners: None, log=said.append)
        assert [waiting.turn() for _ in range(3)] == [None] * 3
        assert said == ["waits for the database: nowhere: MongoDB cannot be reached"]
        store.away.clear()
        assert waiting.turn() is not None


# --- one process a run ------------------------------------------------------------------------------------------------


def test_a_run_is_taken_once_on_this_machine(
    store: MongoStore, start_holder: Callable[[str], tuple[subprocess.Popen[str], str]]
) -> None:
    holder, owner = start_holder("run/busy")
    who = read_owner(owner)
    assert who is not None
    with closing(LeaseKeeper(store)) as keeper:
        told = (
            f"run 'busy': process {holder.pid} on {who.host} works on it now "
            r"\(wait for it or stop it, or choose another name \(--name\)\)"
        )
        began = time.monotonic()
        with pytest.raises(RunBusyError, match=f"^{told}$"):
            take_run(keeper, "busy", print)
        with pytest.raises(RunBusyError, match=f"^{told}$"):
            one_process.refuse_busy(store, "busy")
        take_run(keeper, "busy-2", print)  # the name of another one only begins like this
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        one_process.refuse_busy(store, "busy")
        take_run(keeper, "busy", print)
        assert time.monotonic() - began < keeper.lease_s / 2  # nothing was waited for
    assert live_runs(store) == set()


@pytest.mark.parametrize("alive", [False, True])
def test_a_run_of_another_machine_is_waited_for_as_long_as_a_lease(
    alive: bool, store: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_process, "MARGIN_S", 0.3)
    stop, said = threading.Event(), list[str]()
    store.take_lease(["run/far"], ELSEWHERE, 1.0)

    def renew() -> None:
        while alive and not stop.wait(0.2):
            store.renew_lease("run/far", ELSEWHERE, 1.0)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with closing(LeaseKeeper(store, lease_s=1.0)) as keeper:
            if alive:
                with pytest.raises(RunBusyError, match="process 42 on node7 works on it now"):
                    take_run(keeper, "far", said.append)
            else:
                take_run(keeper, "far", said.append)
    finally:
        stop.set()
        thread.join()
    assert said == ["waits up to 1 s for run 'far': process 42 on node7 works on it, or has died"]


def test_a_run_that_was_lost_begins_no_further_step() -> None:
    from alcore.runner import PlainRunner

    store = MemoryStore()
    with closing(LeaseKeeper(store)) as keeper:
        lease = take_run(keeper, "lost", print)
        runner = one_process.OneProcess(PlainRunner(), lease)
        assert runner.map("probe", 0, ["a", "b"], str.upper) == ["A", "B"]
        store._leases["run/lost"] = ("another", time.monotonic() + 60)
        assert runner.map("train", 0, ["a"], str.upper) == ["A"]  # nobody has heard of it yet
        with pytest.raises(RunBusyError, match="another process has taken this run over"):
            runner.map("record", 0, ["lost"], str.upper)  # before anything is written, the store is asked
        with pytest.raises(RunBusyError):
            runner.map("probe", 1, ["a"], str.upper)
        assert not lease.is_ours()
    assert store.held_leases("") == {"run/lost": "another"}


def test_a_clock_that_jumps_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil reckons a start time from the clock of today."""
    mine = new_owner("run")
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: real(process) + 3600.0)
    assert not is_dead(mine)
