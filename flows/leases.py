"""Names held in the store over all runs and machines: who holds one, whether it still lives, and one heartbeat for all.

``run/<name>`` is held by the process that works on a run (``one_process``), ``label/<key>`` by the one that computes a
label (``claims``), ``label-slot/<pool>/<k>`` by a calculation that runs (``bounded``).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from alcore.errors import StoreError, StoreUnreachableError
from alcore.protocols import LeaseStore
from flows import environment, processes

LEASE_S = 60.0
RENEWALS_A_LEASE = 4
RETRY_S = 1.0
"""After a renewal that failed, the next try comes so soon."""
GRACE_S = 5 * RETRY_S
"""After the store was away its leases have run out; so long those who live have, to renew theirs before others take."""
SLOW_S = 1.0
"""A store that takes so long to answer was away."""
PAUSES_S = (0.05, 1.0)
"""How long to wait before asking again for a name: first, and at most."""
TELL_AFTER_S, TELL_EVERY_S = 1.0, 60.0
RUN_PREFIX = "run/"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lease.

    Attributes:
        host: name of the machine, for a person.
        machine: what ``pid`` is unique in (``this_machine``); "" if unknown.
        pid: the process.
        created, ticks: when it started: by the clock, which may jump, and since the boot (None if unknown).
        run: what it works on, for a person.
    """

    host: str
    machine: str
    pid: int
    created: float
    ticks: int | None
    run: str

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this very machine; False where that cannot be known."""
        return bool(self.machine) and self.machine == this_machine()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def this_machine() -> str:
    """What a pid is unique in: this boot of this machine and, in containers, this pid namespace; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def new_owner(run: str) -> str:
    """A name for this process as owner of one lease: unique, and enough to see whether the process still lives."""
    mine = processes.identity(psutil.Process())
    born = f"{mine['created']:.2f}|{mine.get('ticks', '')}"
    return f"{uuid.uuid4().hex}|{environment.host()}|{this_machine()}|{os.getpid()}|{born}|{run}"


def read_owner(owner: str) -> Owner | None:
    """What ``new_owner`` wrote, or None if it was somebody else."""
    with suppress(ValueError):
        _, host, machine, pid, created, ticks, run = owner.split("|", 6)
        born = int(ticks) if ticks else None
        return Owner(host=host, machine=machine, pid=int(pid), created=float(created), ticks=born, run=run)
    return None


def is_dead(owner: str) -> bool:
    """Whether the owner was a process of this very machine that is no more; False where that cannot be known."""
    who = read_owner(owner)
    if who is None or not who.is_here:
        return False
    remembered: dict[str, object] = {"pid": who.pid, "created": who.created}
    if who.ticks is not None:
        remembered |= {"ticks": who.ticks, "boot": who.machine.partition("/")[0]}
    return processes.find(remembered) is None


def live_runs(store: LeaseStore) -> set[str]:
    """Names of the runs that somebody works on now."""
    held = store.held_leases(RUN_PREFIX)
    return {name.removeprefix(RUN_PREFIX) for name, owner in held.items() if not is_dead(owner)}


class Held:
    """One lease that is held: its ``name``, its ``owner``, and whether it was ``lost`` to somebody else."""

    def __init__(self, name: str, owner: str) -> None:
        self.name, self.owner = name, owner
        self.lost = False


class LeaseKeeper:
    """Holds leases, any number of them, and renews all from one thread; threads may share it.

    A store that is away ends nothing: when it is back, a lease that ran out meanwhile is taken again if it is free.

    Args:
        store: keeps the leases.
        run: on what this process works, for a person who waits.
        lease_s: a lease runs out so long after its owner died; it is renewed four times as often.
    """

    def __init__(self, store: LeaseStore, *, run: str = "", lease_s: float = LEASE_S) -> None:
        self.store, self.run, self.lease_s = store, run, lease_s
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._unsure: set[str] = set()  # it was asked for them, and no answer came: nobody holds what they may have
        self._heart: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def n_held(self) -> int:
        """Leases that are held now; lost ones do not count."""
        return sum(not held.lost for held in self.holding())

    def holding(self) -> list[Held]:
        """All that was taken and not given back."""
        with self._lock:
            return list(self._held.values())

    def take(self, names: Sequence[str]) -> Held | None:
        """The first of ``names`` that is free, now held; None if there is none.

        Raises:
            StoreError: the store cannot be asked.
        """
        owner = new_owner(self.run)
        try:
            name = self.store.take_lease(names, owner, self.lease_s)
        except StoreError:
            self._unsure.add(owner)
            raise
        if name is None:
            return None
        held = Held(name, owner)
        with self._lock:
            self._held[owner] = held
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._heart.start()
        return held

    def others(self, names: Sequence[str], prefix: str) -> dict[str, str]:
        """Owners of those of ``names`` that are held; what dead processes of this machine held is freed on the way.

        Raises:
            StoreError: the store cannot be asked.
        """
        wanted = set(names)
        held = {name: owner for name, owner in self.store.held_leases(prefix).items() if name in wanted}
        dead = [name for name, owner in held.items() if owner in self._unsure or is_dead(owner)]
        for name in dead:
            self.store.release_lease(name, held.pop(name))
        return held

    def confirm(self, held: Held) -> bool:
        """Whether ``held`` is still ours: asked now, or, of a store that is away, as far as is known."""
        with suppress(StoreError):
            self._renew(held)
        return not held.lost

    def give_back(self, held: Held) -> None:
        """Does nothing if it was lost or given back. One that the store does not take back runs out by itself."""
        with self._lock:
            if self._held.pop(held.owner, None) is None or held.lost:
                return
        try:
            self.store.release_lease(held.name, held.owner)
        except StoreError as error:
            logger.info("the lease %s is not released: %s", held.name, error)

    def close(self) -> None:
        """Gives back all that is held. May be called twice."""
        self._closed.set()
        if self._heart is not None:
            self._heart.join(timeout=5)
        for held in self.holding():
            self.give_back(held)

    def _beat(self) -> None:
        """Renews what is held. What fails is tried again: a store that is away must not end what the lease is for."""
        pause = self.lease_s / RENEWALS_A_LEASE
        wait = pause
        while not self._closed.wait(wait):
            wait = pause
            for held in self.holding():
                try:
                    self._renew(held)
                except StoreError as error:
                    logger.info("the lease %s is not renewed: %s", held.name, error)
                    wait = min(pause, RETRY_S)
                    if isinstance(error, StoreUnreachableError):
                        break  # nor would the others be

    def _renew(self, held: Held) -> None:
        if held.lost or self.store.renew_lease(held.name, held.owner, self.lease_s):
            return
        if not self._is_ours(held):  # given back meanwhile
            return
        if self.store.take_lease([held.name], held.owner, self.lease_s) is None:
            held.lost = True
            logger.warning("the lease %s was lost: another process took it while the store was away", held.name)
        elif not self._is_ours(held):
            self.store.release_lease(held.name, held.owner)

    def _is_ours(self, held: Held) -> bool:
        with self._lock:
            return held.owner in self._held


class Waiting:
    """Asks for one of several names until there is one.

    Args:
        keeper: shall hold it.
        names: any of them will do.
        prefix: of all of them.
        stop: ends the waiting.
        tell: hears of the owners of what is held, after a second and then once a minute.
        log: takes lines for a person.
    """

    def __init__(
        self,
        keeper: LeaseKeeper,
        names: Sequence[str],
        *,
        prefix: str,
        stop: threading.Event,
        tell: Callable[[Mapping[str, str]], None],
        log: Callable[[str], None],
    ) -> None:
        self._keeper, self._names, self._prefix, self._stop = keeper, names, prefix, stop
        self._tell, self._log = tell, log
        self._began, self._told = time.monotonic(), float("-inf")
        self._pause = PAUSES_S[0]
        self._look_first = False

    def turn(self) -> Held | None:
        """Tries once; without success, waits a little longer each time. None as well when ``stop`` is set.

        Raises:
            StoreError: the store refuses; one that does not answer now is waited for.
        """
        asked = time.monotonic()
        try:
            held = self._keeper.others(self._names, self._prefix) if self._look_first else {}
            away = time.monotonic() - asked > SLOW_S
            if not away and len(held) < len(self._names):
                if (lease := self._keeper.take(self._names)) is not None:
                    return lease
                if not self._look_first:
                    held = self._keeper.others(self._names, self._prefix)
            if len(held) == len(self._names):
                self._say(lambda: self._tell(held))
        except StoreUnreachableError as error:
            away, cause = True, str(error)
            self._say(lambda: self._log(f"waits for the database: {cause}"))
        self._look_first = True
        if away:
            self._stop.wait(min(GRACE_S, self._keeper.lease_s))
        elif len(held) == len(self._names):
            self._stop.wait(self._pause)
            self._pause = min(1.5 * self._pause, PAUSES_S[1])
        return None

    def _say(self, line: Callable[[], None]) -> None:
        now = time.monotonic()
        if now - self._began >= TELL_AFTER_S and now - self._told >= TELL_EVERY_S:
            self._told = now
            line()
