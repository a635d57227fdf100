"""How many labels run at once over all runs: a lease in the store for each calculation that runs.

The leases are the count, with a Prefect server or without. They are named ``label-slot/<pool>/<k>`` with k below the
limit; a pool is what calculations share: the cores of a machine, or a queueing system.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from alcore.protocols import LeaseStore
from alcore.types import Label, LabelRequest
from calculators.labeling import ExecutorLabeler, PoolClosedError, label_each
from flows.leases import LEASE_S, TELL_EVERY_S, Held, LeaseKeeper, Waiting, read_owner

if TYPE_CHECKING:
    from storage.durable import DurableStore

SETTLE_S = 0.2
"""A signal to all processes at once, as a cluster sends, may end a calculation just before this process hears of it."""

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

    Attributes:
        closed: set as soon as ``close`` is called.
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
        self.closed = threading.Event()
        self._labeler, self._run = labeler, run
        self._keeper = LeaseKeeper(leases, run=run, lease_s=lease_s)
        self._log = log or logger.warning
        self._prefix = f"label-slot/{pool}/"
        self._names = [f"{self._prefix}{k}" for k in range(limit)]
        self._workers = min(workers, limit)
        self._free_worker = threading.Semaphore(self._workers)
        self._turn = threading.Lock()  # one thread of this labeler asks the store at a time
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
        return self._keeper.n_held

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
        self.closed.set()
        try:
            self._labeler.close()
        finally:
            self._keeper.close()

    def _label_one(self, request: LabelRequest) -> Label:
        with self._free_worker, self._slot():
            (label,) = self._labeler.label([request])
        if not label.ok and self.closed.wait(SETTLE_S):
            raise PoolClosedError("labelling was stopped: a calculation that ended so has not failed")
        return label

    @contextmanager
    def _slot(self) -> Iterator[None]:
        held = self._take()
        try:
            yield
        finally:
            self._keeper.give_back(held)

    def _take(self) -> Held:
        """Waits for a slot."""
        with self._turn:
            waiting = Waiting(
                self._keeper, self._names, prefix=self._prefix, stop=self.closed, tell=self._tell, log=self._log
            )
            while not self.closed.is_set():
                if (held := waiting.turn()) is not None:
                    return held
        raise PoolClosedError("labelling was stopped: the workers were closed")

    def _tell(self, held: Mapping[str, str]) -> None:
        now = time.monotonic()
        if now - self._told < TELL_EVERY_S:
            return  # another thread has told so
        self._told = now
        mine = {one.owner for one in self._keeper.holding()}
        others = [read_owner(owner) for owner in held.values() if owner not in mine]
        runs = ", ".join(sorted({owner.run for owner in others if owner is not None} - {""}))
        what = "1 label of other runs is" if len(others) == 1 else f"{len(others)} labels of other runs are"
        who = f" ({runs})" if runs else ""
        self._log(f"waits: {what} being computed{who}, at most {self.limit} at once in {self.pool}")


def stop_labelling(labeler: BoundedLabeler, store: DurableStore) -> None:
    """Ends what ``labeler`` runs and whoever waits, for a slot, a label or the database: this process is to end."""
    labeler.closed.set()
    store.stop_waiting()
    labeler.close()
