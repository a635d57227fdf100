"""Brings what waits in the spool to the database, in order, and knows whether the database is away."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from alcore.errors import StoreError, StoreUnreachableError
from alcore.plain import from_plain
from alcore.types import GenerationRecord, Label, RunRecord
from storage.faults import may_last, refuses_content
from storage.spool import REFUSED, EntryKind, Spool
from storage.store import MongoStore

T = TypeVar("T")

RETRY_S = 1.0
"""Pause between two attempts to reach a database that is away."""
LONGEST_PAUSE_S = 60.0
TELL_EVERY_S = 60.0
REVIVE_EVERY_S = (5.0, 60.0)
"""Pauses between two starts of the embedded server: at first, and at most."""
FORGIVEN_S = 300.0
"""A server that ran for so long is started again as fast as the first time."""
SETTLE_S = 3.0
"""So long after an outage no lease is taken: those whose leases ran out meanwhile deliver and renew first."""
CLOSE_S = 5.0
DOUBTED_TIMES, ASKED_TIMES = 300, 8
"""What fails so often with an error that may be for ever is put aside (a write), or raised (a question)."""


class Courier:
    """Delivers; while the database is away, a thread tries again until it is back.

    Args:
        store: the database.
        spool: where writes wait.
        revive: starts the server if it is ours and died; whether it did.
        log: takes lines for a person.
    """

    def __init__(
        self, store: MongoStore, spool: Spool, *, revive: Callable[[], bool], log: Callable[[str], None]
    ) -> None:
        self._store, self._spool, self._revive, self._log = store, spool, revive, log
        self._delivering = threading.Lock()
        self._lock = threading.Lock()
        self._here = threading.Event()
        self._here.set()
        self._answers = threading.Event()
        self._answers.set()
        self._stopped, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._why, self._settled = "", 0.0
        self._revive_at, self._revive_pause = 0.0, REVIVE_EVERY_S[0]
        self._releases: list[tuple[str, str]] = []
        self._finished: set[Path] = set()  # delivered or refused, but the disk does not let them go
        self._refused: dict[Path, StoreError] = {}  # for the writer, if it still waits for the answer
        self._doubted: Counter[Path] = Counter()
        self._told_disk = float("-inf")

    @property
    def answers(self) -> bool:
        """Whether the database did when it was last asked; what waits may not be delivered yet."""
        return self._answers.is_set()

    @property
    def away(self) -> bool:
        """Whether the database did not answer, or does again but has not yet all that waits."""
        return not self._here.is_set()

    def write(self, kind: EntryKind, content: Mapping[str, Any]) -> Path | None:
        """When this returns it is on disk, or in the database; a disk that is full as well is waited for.

        Returns:
            Where it waits; None if the database has it.

        Raises:
            StoreError: it cannot be stored anywhere, or the database refuses it (then it stays put aside).
            StoreUnreachableError: neither disk nor database took it until ``stop_waiting``.
        """
        while True:
            try:
                file = self._spool.put(kind, content)
            except TypeError as error:
                raise StoreError(f"cannot be stored: {error}", where=f"{kind} to be saved") from error
            except OSError as error:
                if self._write_directly(kind, content, error):
                    return None
                if self._stopped.wait(RETRY_S):
                    raise StoreUnreachableError(f"a {kind} could be written nowhere", where=self._place) from error
            else:
                self.attempt()
                self._raise_if_refused(file)
                return file if file.exists() and file not in self._finished else None

    def call(self, work: Callable[[], T], *, settle: bool = False) -> T:
        """What ``work`` gives, which needs the database: waits until that is there and has all that waited.

        Args:
            work: may be done several times.
            settle: leave others a moment after an outage.

        Raises:
            StoreError: the database refuses it.
            StoreUnreachableError: it was away when ``stop_waiting`` was called.
        """
        pause, asked = RETRY_S, 0
        while True:
            self._wait_for_it()
            if settle and (rest := self._settled - time.monotonic()) > 0:
                self._stopped.wait(rest)
            try:
                self.deliver()
                return work()
            except StoreUnreachableError as error:
                self.went_away(error)
                asked += may_last(error)
                if asked >= ASKED_TIMES:
                    raise
                self._stopped.wait(pause)  # it may answer everything but this
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def deliver(self) -> None:
        """All that waits, in order, then what is to be released.

        Raises:
            StoreUnreachableError: the database is away.
        """
        if self._spool.files() or self._releases:
            with self._delivering:
                if self.away or self._closed.is_set():
                    raise StoreUnreachableError(self._why or "closed", where=self._place)
                try:
                    self._deliver_all()
                except StoreUnreachableError as error:
                    self.went_away(error)
                    raise

    def attempt(self) -> bool:
        """``deliver`` where that is possible now; whether it was."""
        if self.away:
            return False
        try:
            self.deliver()
        except StoreUnreachableError:
            return False
        return True

    def release(self, name: str, owner: str) -> None:
        """Once all that was written before is delivered; a lease that is not released runs out by itself."""
        with self._lock:
            self._releases.append((name, owner))
        self.attempt()

    def went_away(self, error: StoreError) -> None:
        """Somebody found out; from now on a thread sees to it."""
        with self._lock:
            if self.away or self._closed.is_set():
                return
            self._why = error.message
            self._here.clear()
            self._answers.clear()
            self._thread = threading.Thread(target=self._tend, name="store-delivery", daemon=True)
            self._thread.start()

    def silent(self, error: StoreError) -> None:
        """It does not answer, whether that was known or not."""
        self._answers.clear()
        self.went_away(error)

    def stop_waiting(self) -> None:
        """Whoever waits for the database, or will, gets ``StoreUnreachableError``. Writes still go to disk."""
        self._stopped.set()

    def close(self) -> None:
        """One more attempt; says what still waits."""
        self._stopped.set()
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        if (self._spool.files() or self._releases) and self._delivering.acquire(timeout=CLOSE_S):
            try:
                self._store.ping()
                self._deliver_all()
            except StoreError as error:
                self._why = error.message
            finally:
                self._delivering.release()
        if (waiting := self._spool.count()) > len(self._finished):
            self._log(
                f"{_writes(waiting)} on disk in {self._spool.folder} for MongoDB at {self._place} ({self._why}): "
                "the next al-loop command that reaches it delivers them"
            )

    @property
    def _place(self) -> str:
        return self._store.address

    def _wait_for_it(self) -> None:
        while not self._here.wait(0.5):
            if self._stopped.is_set():
                raise StoreUnreachableError(f"MongoDB is away: {self._why}", where=self._place)

    def _raise_if_refused(self, file: Path) -> None:
        """Whoever delivered it: this thread, another, or another process."""
        error, aside = self._refused.pop(file, None), file.with_suffix(REFUSED)
        if error is None and not aside.exists():
            return
        said = "refused by another process" if error is None else error.message
        raise StoreError(f"{said} (kept as {aside})", where=self._place) from error

    def _write_directly(self, kind: EntryKind, content: Mapping[str, Any], disk: OSError) -> bool:
        """The disk does not take it; whether the database did."""
        said = f"{self._spool.folder} cannot be written ({disk.strerror or disk})"
        try:
            if self.away:
                raise StoreUnreachableError(self._why, where=self._place)
            self.deliver()
            hand_over(self._store, kind, content)
        except StoreUnreachableError as error:
            self.went_away(error)
            self._tell_disk(f"{said} and MongoDB at {self._place} does not answer: a {kind} waits in memory")
            return False
        self._tell_disk(f"{said}: what is to be stored goes to MongoDB directly, and has to wait while that is away")
        return True

    def _tell_disk(self, line: str) -> None:
        if time.monotonic() - self._told_disk >= TELL_EVERY_S:
            self._told_disk = time.monotonic()
            self._log(line)

    def _deliver_all(self) -> None:
        """For the holder of ``_delivering``."""
        for file in self._spool.files():
            if file not in self._finished:
                with self._spool.turn():
                    self._deliver_one(file)
        while self._releases:
            self._store.release_lease(*self._releases[0])
            del self._releases[0]

    def _deliver_one(self, file: Path) -> None:
        entry = self._spool.read(file)
        if entry is None:
            return
        try:
            hand_over(self._store, entry.kind, entry.content)
        except StoreError as error:
            self._doubted[file] += may_last(error)
            if not refuses_content(error) and self._doubted[file] < DOUBTED_TIMES:
                raise StoreUnreachableError(error.message, where=error.where) from error
            self._refuse(file, error)
        except (TypeError, ValueError, KeyError) as error:
            self._refuse(file, StoreError(f"{type(error).__name__}: {error}"))
        else:
            try:
                self._spool.done(file)
            except OSError:
                self._finished.add(file)

    def _refuse(self, file: Path, error: StoreError) -> None:
        self._refused[file] = error
        self._finished.add(file)
        self._spool.put_aside(file, REFUSED, error.message)

    def _tend(self) -> None:
        """Until the database is back."""
        began, told, waited = time.monotonic(), float("-inf"), 0
        while True:
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                waited = self._spool.count()
                self._log(
                    f"MongoDB at {self._place} does not answer ({self._why}); {_writes(waited)} on disk in "
                    f"{self._spool.folder}; waiting"
                )
            if self._closed.wait(RETRY_S):
                return
            waited = max(waited, self._spool.count())
            if self._is_back():
                break
        self._log(
            f"MongoDB at {self._place} answers again after {time.monotonic() - began:.0f} s; "
            f"{waited} write{'s' * (waited != 1)} delivered"
        )
        self._here.set()
        self.attempt()  # what was written since

    def _is_back(self) -> bool:
        answers = False
        try:
            self._revive_if_due()
            self._store.ping()
            self._answers.set()  # leases can be renewed while what waits, which may be much, is delivered
            answers = True
            with self._delivering:
                self._deliver_all()
        except StoreError as error:
            self._why = error.message
            return False
        except Exception as error:  # everybody waits for this thread
            self._why = f"{type(error).__name__}: {error}"
            return False
        finally:
            if not answers:
                self._answers.clear()
        self._settled = time.monotonic() + SETTLE_S
        return True

    def _revive_if_due(self) -> None:
        if (late := time.monotonic() - self._revive_at) < 0:
            return
        if late > FORGIVEN_S:
            self._revive_pause = REVIVE_EVERY_S[0]
        self._revive_at = time.monotonic() + self._revive_pause
        self._revive_pause = min(2 * self._revive_pause, REVIVE_EVERY_S[1])
        if self._revive():
            self._log("the embedded MongoDB had ended and was started again")


def hand_over(store: MongoStore, kind: EntryKind, content: Mapping[str, Any]) -> None:
    """One write, as the spool keeps it, done.

    Raises:
        StoreError: the database refuses it, or the run it belongs to went on without it.
        StoreUnreachableError: not now.
        TypeError: it lacks something.
    """
    match kind:
        case "run":
            run = from_plain(RunRecord, content)
            if not _is_known(store, run):
                store.save_run(run)
        case "label":
            store.save_label(from_plain(Label, content["label"]), content["run"])
        case "generation":
            record = from_plain(GenerationRecord, content)
            if len(_stored(store, record.run).sittings) > record.sitting + 1:
                raise _overtaken(store, record.run)
            store.save_generation(record)
        case "step":
            _stored(store, content["run"])
            store.save_step(content["run"], content["generation"], content["name"], content["content"])
        case "forget":
            store.forget_steps(content["run"], content["generation"])
        case "model":
            store.save_model(content["weights"], dict(content["description"]))


def _is_known(store: MongoStore, run: RunRecord) -> bool:
    """Whether the database has what came after it in the same sitting: a file that the disk did not let go.

    Raises:
        StoreError: the run went on elsewhere, was removed, or made anew; it must not become a mixture.
    """
    if run.finished or len(run.sittings) > 1:
        stored: RunRecord | None = _stored(store, run.name)
    else:
        stored = store.load_run(run.name)
    if stored is None:
        return False
    then, now = ([(sitting.started, sitting.host) for sitting in each.sittings] for each in (stored, run))
    if then != now[: len(then)]:
        raise _overtaken(store, run.name)
    return len(then) == len(now) and bool(stored.finished) and not run.finished


def _stored(store: MongoStore, name: str) -> RunRecord:
    """Raises:
    StoreError: there is no such run (any more).
    """
    stored = store.load_run(name)
    if stored is None:
        raise StoreError(f"there is no run '{name}', or no more", where=store.address)
    return stored


def _overtaken(store: MongoStore, name: str) -> StoreError:
    return StoreError(f"the run '{name}' has gone on without it since", where=store.address)


def _writes(n: int) -> str:
    return f"{n} write{'s wait' if n != 1 else ' waits'}"
