"""How many labels run at once over all runs: a lease in the store for each calculation that runs.

The leases are the count, with a Prefect server or without. They are named ``label-slot/<pool>/<k>`` with k below the
limit; a pool is what calculations share: the cores of a machine, or a queueing system.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

from alcore.errors import StoreError
from alcore.protocols import LeaseStore
from alcore.types import Label, LabelRequest
from calculators.labeling import ExecutorLabeler, PoolClosedError, label_each
from flows import environment, processes

LEASE_S = 60.0
RENEWALS_A_LEASE = 4
RETRY_S = 2.0
"""After a renewal that failed, the next try comes so soon."""
PAUSES_S = (0.05, 1.0)
"""How long to wait before asking again for a slot: first, and at most."""
TELL_AFTER_S, TELL_EVERY_S = 1.0, 60.0

logger = logging.getLogger(__name__)


class BoundedLabeler:
    """A ``Labeler`` (``alcore.protocols``) that holds one lease for each calculation of ``labeler`` that runs.

    Args:
        labeler: does the work.
        leases: the store that all runs share.
        pool: what the limit is about: ``local-<host>``, ``queue-<system>``.
        limit: how many labels of this pool may run at once. Runs that state other limits each keep to their own.
        workers: how many of them at most are this labeler's.
        lease_s: a lease runs out so long after its owner died; it is renewed four times as often.
        run: who holds them, for a person who waits.
        log: takes lines for a person; None: the module's logger.
    """

    def __init__(
        self,
        labeler: ExecutorLabeler,
        leases: LeaseStore,
        *,
        pool: str,
        limit: int,
        workers: int = 1,
        lease_s: float = LEASE_S,
        run: str = "",
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.pool, self.limit = pool, limit
        self._labeler, self._leases, self._lease_s, self._run = labeler, leases, lease_s, run
        self._log = log or logger.warning
        self._prefix = f"label-slot/{pool}/"
        self._names = [f"{self._prefix}{k}" for k in range(limit)]
        self._workers = min(workers, limit)
        self._free_worker = threading.Semaphore(self._workers)
        self._turn = threading.Lock()  # one thread of this labeler asks the store at a time
        self._lock = threading.Lock()
        self._held: dict[str, str] = {}
        self._heart: threading.Thread | None = None
        self._closed = threading.Event()
        self._told = float("-inf")

    @property
    def name(self) -> str:
        return self._labeler.name

    @property
    def fingerprint(self) -> str:
        return self._labeler.fingerprint

    @property
    def running(self) -> int:
        """Labels of this labeler that are being computed now."""
        return len(self._held)

    def label(self, requests: Sequence[LabelRequest], on_done: Callable[[Label], None] | None = None) -> list[Label]:
        """As ``ExecutorLabeler.label``, each as soon as there is a slot for it.

        Raises:
            StoreError: the store cannot be asked for a slot.
            AlLoopError: ``close`` was called meanwhile, or what ``ExecutorLabeler.label`` raises.
        """
        return label_each(requests, self._label_one, self._workers, on_done=on_done, stop=self.close)

    def tidy(self, label: Label) -> None:
        """This label is believed and stored: what is left of its calculation on disk may go."""
        self._labeler.tidy(label)

    def close(self) -> None:
        """End what runs, and what waits for a slot; no lease is left. May be called twice."""
        self._closed.set()
        try:
            self._labeler.close()
        finally:
            if self._heart is not None:
                self._heart.join(timeout=5)
            for name, owner in self._holding():
                self._give_back(name, owner)

    def _label_one(self, request: LabelRequest) -> Label:
        with self._free_worker, self._slot():
            (label,) = self._labeler.label([request])
            return label

    @contextmanager
    def _slot(self) -> Iterator[None]:
        owner = _owner(self._run)
        name = self._take(owner)
        with self._lock:
            self._held[name] = owner
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat, name="label-leases", daemon=True)
                self._heart.start()
        try:
            yield
        finally:
            self._give_back(name, owner)

    def _take(self, owner: str) -> str:
        """Waits for a slot; its name."""
        with self._turn:
            began, pause = time.monotonic(), PAUSES_S[0]
            while not self._closed.is_set():
                if name := self._leases.take_lease(self._names, owner, self._lease_s):
                    return name
                held = self._leases.held_leases(self._prefix)
                if not self._bury(held):
                    self._tell(held, began)
                    self._closed.wait(pause)
                    pause = min(1.5 * pause, PAUSES_S[1])
        raise PoolClosedError("labelling was stopped: the workers were closed")

    def _bury(self, held: Mapping[str, str]) -> bool:
        """Free at once what dead processes of this machine hold, as after a kill; whether there was any."""
        dead = [(name, owner) for name, owner in held.items() if _is_dead(owner)]
        for name, owner in dead:
            self._leases.release_lease(name, owner)
        return bool(dead)

    def _tell(self, held: Mapping[str, str], began: float) -> None:
        now = time.monotonic()
        if now - began < TELL_AFTER_S or now - self._told < TELL_EVERY_S or len(held) < self.limit:
            return
        self._told = now
        mine = {owner for _, owner in self._holding()}
        others = [owner for owner in held.values() if owner not in mine]
        runs = ", ".join(sorted({owner.split("|", 5)[-1] for owner in others} - {""}))
        what = "1 label of other runs is" if len(others) == 1 else f"{len(others)} labels of other runs are"
        who = f" ({runs})" if runs else ""
        self._log(f"waits: {what} being computed{who}, at most {self.limit} at once in {self.pool}")

    def _holding(self) -> list[tuple[str, str]]:
        with self._lock:
            return list(self._held.items())

    def _give_back(self, name: str, owner: str) -> None:
        with self._lock:
            if self._held.get(name) != owner:
                return  # done already, or lost
            del self._held[name]
        try:
            self._leases.release_lease(name, owner)
        except StoreError as error:  # it runs out by itself; the label is what counts
            logger.info("the lease %s is not released: %s", name, error)

    def _beat(self) -> None:
        """Renews what is held. What fails is tried again: a store that is away must not end a calculation."""
        pause = self._lease_s / RENEWALS_A_LEASE
        wait = pause
        while not self._closed.wait(wait):
            wait = pause
            for name, owner in self._holding():
                try:
                    kept = self._leases.renew_lease(name, owner, self._lease_s)
                except StoreError as error:
                    logger.info("the lease %s is not renewed: %s", name, error)
                    wait = min(pause, RETRY_S)
                    continue
                with self._lock:
                    if not kept and self._held.get(name) == owner:  # the store was away for longer than a lease
                        del self._held[name]
                        logger.warning("the lease %s was lost; its calculation goes on", name)


@cache
def _machine() -> str:
    """What a pid is unique in: this boot of this machine and, in containers, this pid namespace; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _owner(run: str) -> str:
    """Who holds a lease: unique, and enough to see whether the process still lives. The run comes last."""
    created = psutil.Process().create_time()
    return f"{uuid.uuid4().hex}|{environment.host()}|{_machine()}|{os.getpid()}|{created:.2f}|{run}"


def _is_dead(owner: str) -> bool:
    """Whether the owner was a process of this very machine that is no more; False where that cannot be known."""
    with suppress(ValueError):
        _, _, machine, pid, created, _ = owner.split("|", 5)
        return bool(machine) and machine == _machine() and processes.find({"pid": pid, "created": created}) is None
    return False
