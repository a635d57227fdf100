"""Leases: never held twice, not by threads, processes or machines with other clocks; free again when they run out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from alcore.protocols import LeaseStore
from storage.memory import MemoryStore
from storage.store import MongoStore

NAMES = ["slot/a/0", "slot/a/1", "slot/a/2"]
ROUNDS = 15


def test_the_first_free_name_is_taken_until_none_is_left(store: Any) -> None:
    leases: LeaseStore = store
    assert [leases.take_lease(NAMES, f"owner {i}", 60) for i in range(4)] == [*NAMES, None]
    assert leases.held_leases("slot/a/") == {name: f"owner {i}" for i, name in enumerate(NAMES)}
    assert leases.held_leases("slot/b/") == leases.held_leases("slot/a/9") == {}
    leases.release_lease(NAMES[1], "owner 1")
    assert leases.take_lease(NAMES, "owner 0", 60) == NAMES[1]  # its own lease on the first is no free name either
    assert leases.take_lease([], "owner 5", 60) is None


def test_a_stranger_neither_renews_nor_releases(store: Any) -> None:
    assert store.take_lease(NAMES[:1], "mine", 60) == NAMES[0]
    store.release_lease(NAMES[0], "stranger")
    store.release_lease("never taken", "stranger")
    assert not store.renew_lease(NAMES[0], "stranger", 60)
    assert not store.renew_lease("never taken", "stranger", 60)
    assert store.held_leases("") == {NAMES[0]: "mine"}
    assert store.renew_lease(NAMES[0], "mine", 60)


def test_a_dead_holders_lease_is_taken_over_after_it_ran_out(store: Any) -> None:
    began = time.monotonic()
    assert store.take_lease(NAMES[:1], "dead", 0.4) == NAMES[0]
    while (taken := store.take_lease(NAMES[:1], "heir", 60)) is None:
        time.sleep(0.02)
    assert taken == NAMES[0]
    assert time.monotonic() - began > 0.35
    assert not store.renew_lease(NAMES[0], "dead", 60)
    store.release_lease(NAMES[0], "dead")
    assert store.held_leases("") == {NAMES[0]: "heir"}


def test_a_renewed_lease_does_not_run_out(store: Any) -> None:
    store.take_lease(NAMES[:1], "alive", 0.5)
    for _ in range(8):
        time.sleep(0.1)
        assert store.renew_lease(NAMES[0], "alive", 0.5)
        assert store.take_lease(NAMES[:1], "other", 60) is None


def test_what_ran_out_is_not_held_yet_its_owner_may_renew_it_while_nobody_has_it(store: Any) -> None:
    """A machine that slept finds its lease again, unless somebody took it."""
    store.take_lease(NAMES[:1], "sleeper", 0.05)
    time.sleep(0.1)
    assert store.held_leases("slot/") == {}
    assert store.renew_lease(NAMES[0], "sleeper", 60)
    assert store.held_leases("slot/") == {NAMES[0]: "sleeper"}


@pytest.mark.parametrize("name", ["a.b/$c", "ключ", "$$NOW", "^.*$"])
def test_names_and_owners_are_only_names(name: str, store: Any) -> None:
    assert store.take_lease([name], name, 60) == name
    assert store.held_leases(name[:1]) == {name: name}
    store.release_lease(name, name)
    assert store.held_leases("") == {}


def _take_turns(leases: Any, who: str, holds: list[tuple[str, float, float]]) -> None:
    for turn in range(ROUNDS):
        owner = f"{who}-{turn}"
        while (name := leases.take_lease(NAMES, owner, 30)) is None:
            time.sleep(0.001)
        began = time.monotonic()
        time.sleep(0.002)
        holds.append((name, began, time.monotonic()))
        leases.release_lease(name, owner)


def _threads(leases: Any, who: str, n_threads: int) -> list[tuple[str, float, float]]:
    holds: list[tuple[str, float, float]] = []
    with ThreadPoolExecutor(n_threads) as threads:
        for done in [threads.submit(_take_turns, leases, f"{who}-{i}", holds) for i in range(n_threads)]:
            done.result()
    return holds


def _check_never_twice(holds: list[tuple[str, float, float]], expected: int) -> None:
    assert len(holds) == expected
    assert {name for name, _, _ in holds} == set(NAMES)
    for name in NAMES:
        spans = sorted((began, ended) for held, began, ended in holds if held == name)
        overlaps = [(one, other) for one, other in itertools.pairwise(spans) if other[0] < one[1]]
        assert not overlaps, name


def test_threads_never_hold_one_name_twice(store: Any) -> None:
    _check_never_twice(_threads(store, "one", 12), 12 * ROUNDS)


def test_processes_never_hold_one_name_twice(new_mongo_store: Callable[..., MongoStore], embedded_uri: str) -> None:
    """The clock that intervals are compared by is the machine's, one for all processes."""
    database = new_mongo_store()._database.name
    root = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, embedded_uri, database, str(who)],
            env=os.environ | {"PYTHONPATH": root},
            stdout=subprocess.PIPE,
        )
        for who in range(4)
    ]
    holds = [hold for process in processes for hold in json.loads(process.communicate(timeout=120)[0])]
    _check_never_twice(holds, 4 * 4 * ROUNDS)


def test_many_who_ask_for_one_name_at_once_get_it_once(mongo_store: MongoStore) -> None:
    """The way labels will be claimed by key: all start at the same moment, on a name that nobody ever held."""
    for turn in range(20):
        gate = threading.Barrier(8)

        def claim(who: int, name: str = f"label/{turn}", gate: threading.Barrier = gate) -> str | None:
            gate.wait()
            return mongo_store.take_lease([name], str(who), 60)

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(claim, range(8)))
        assert [answer for answer in answers if answer] == [f"label/{turn}"]


class OneOwnerAName(RuleBasedStateMachine):
    """Any order of calls, held against the plainest book-keeping there is."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.book: dict[str, str] = {}

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=3), owner=st.sampled_from("abc"))
    def take(self, names: list[str], owner: str) -> None:
        expected = next((name for name in names if name not in self.book), None)
        assert self.store.take_lease(names, owner, 60) == expected
        if expected:
            self.book[expected] = owner

    @rule(name=st.sampled_from(NAMES), owner=st.sampled_from("abc"))
    def renew(self, name: str, owner: str) -> None:
        assert self.store.renew_lease(name, owner, 60) == (self.book.get(name) == owner)

    @rule(name=st.sampled_from(NAMES), owner=st.sampled_from("abc"))
    def release(self, name: str, owner: str) -> None:
        self.store.release_lease(name, owner)
        if self.book.get(name) == owner:
            del self.book[name]

    @invariant()
    def the_books_agree(self) -> None:
        assert self.store.held_leases("") == self.book


TestOneOwnerAName = OneOwnerAName.TestCase


if __name__ == "__main__":  # one of the processes of the test above
    address, database, who = sys.argv[1:]
    opened = MongoStore(address, database)
    print(json.dumps(_threads(opened, who, 4)))
    opened.close()
