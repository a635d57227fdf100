"""One process a run: the lease ``run/<name>`` is held as long as somebody works on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from alcore.errors import RunBusyError
from alcore.protocols import LeaseStore, StepName, StepRunner, T
from flows.leases import RUN_PREFIX, Held, LeaseKeeper, Owner, is_dead, read_owner

LOOK_S = 1.0
MARGIN_S = 2.0
OTHER_NAME = "wait for it or stop it, or choose another name (--name)"


class RunLease:
    """That this process, and no other, works on the run."""

    def __init__(self, keeper: LeaseKeeper, held: Held) -> None:
        self._keeper, self._held = keeper, held

    def check(self, *, ask: bool = False) -> None:
        """Args:
            ask: the store, now; else what the last heartbeat said counts.

        Raises:
            RunBusyError: the store was away for so long that another process has taken the run over.
        """
        if not self.is_ours(ask=ask):
            raise RunBusyError(
                "another process has taken this run over while the database was away; this one ends",
                where=f"run '{self._held.name.removeprefix(RUN_PREFIX)}'",
                mend="nothing is lost: the other goes on",
            )

    def is_ours(self, *, ask: bool = False) -> bool:
        """Whether ``check`` would not raise."""
        return self._keeper.confirm(self._held) if ask else not self._held.lost


class OneProcess:
    """A ``StepRunner`` (``alcore.protocols``) that begins no step of a run which another process has taken over."""

    def __init__(self, runner: StepRunner, lease: RunLease) -> None:
        self._runner, self._lease = runner, lease

    def generation(self, index: int) -> AbstractContextManager[None]:
        return self._runner.generation(index)

    def map(self, step: StepName, generation: int, names: Sequence[str], work: Callable[[str], T]) -> list[T]:
        def ours(name: str) -> T:
            self._lease.check(ask=step == "record")
            return work(name)

        return self._runner.map(step, generation, names, ours)


def take_run(keeper: LeaseKeeper, name: str, log: Callable[[str], None], mend: str = OTHER_NAME) -> RunLease:
    """From now on no other process works on the run ``name``.

    One that holds it on another machine may have died there: it is waited for as long as a lease lasts.

    Raises:
        RunBusyError: another process works on it.
    """
    lease = f"{RUN_PREFIX}{name}"
    end: float | None = None
    while (held := keeper.take([lease])) is None:
        owner = keeper.others([lease], lease).get(lease)
        if owner is None:
            continue
        who = read_owner(owner)
        if end is None:
            end = time.monotonic() + keeper.lease_s + MARGIN_S
            if who is None or not who.is_here:
                log(f"waits up to {keeper.lease_s:g} s for run '{name}': {_whose(who)} works on it, or has died")
        if (who is not None and who.is_here) or time.monotonic() > end:
            raise _busy(name, who, mend)
        time.sleep(min(LOOK_S, keeper.lease_s / 4))
    return RunLease(keeper, held)


def refuse_busy(store: LeaseStore, name: str) -> None:
    """Raises:
    RunBusyError: a process of this machine works on the run ``name`` now.
    """
    who = at_work(store, name)
    if who is not None and who.is_here:
        raise _busy(name, who)


def at_work(store: LeaseStore, name: str) -> Owner | None:
    """Who works on the run ``name`` now, if anybody; on another machine it may have died within the last minute."""
    lease = f"{RUN_PREFIX}{name}"
    owner = store.held_leases(lease).get(lease)
    return None if owner is None or is_dead(owner) else read_owner(owner)


def _busy(name: str, who: Owner | None, mend: str = OTHER_NAME) -> RunBusyError:
    return RunBusyError(f"{_whose(who)} works on it now", where=f"run '{name}'", mend=mend)


def _whose(who: Owner | None) -> str:
    return "another process" if who is None else str(who)
