"""A record store that loses nothing while MongoDB is away: a write is on disk first, and delivered when it can be."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alcore.errors import StoreError, StoreUnreachableError
from alcore.identity import sha256_hex
from alcore.plain import from_plain, to_plain
from alcore.types import GenerationRecord, Label, RunRecord
from storage.courier import Courier
from storage.mongod import mongod_status, revive_mongod
from storage.spool import EntryKind, Spool, spool_name
from storage.store import MongoStore, open_store
from storage.uris import address, redact_tree

logger = logging.getLogger(__name__)


class DurableStore:
    """``RecordStore`` and ``LeaseStore`` (``alcore.protocols``) over MongoDB and a spool.

    Writes do not fail because the database is away: they wait in the spool, and this process goes on. Reads and leases
    need the database: they wait until it is back, because nothing else tells what other runs have done. What this
    process itself wrote it can read meanwhile. All else that a ``MongoStore`` can do waits likewise.

    Args:
        store: the database.
        spool: where writes wait.
        revive: starts the server if it is ours and died; whether it did.
        log: takes lines for a person.
    """

    def __init__(
        self,
        store: MongoStore,
        spool: Spool,
        *,
        revive: Callable[[], bool] = lambda: False,
        log: Callable[[str], None] = logger.warning,
    ) -> None:
        self.mongo, self.spool = store, spool
        self._courier = Courier(store, spool, revive=revive, log=log)
        self._lock = threading.Lock()
        self._mine: dict[tuple[Any, ...], Path] = {}  # what this process wrote and nobody has delivered
        self._generations: set[tuple[str, int]] = set()
        self._steps: set[tuple[str, int, str]] = set()
        if waiting := spool.count() + spool.count_aside():
            self._courier.attempt()
            if (delivered := waiting - spool.count() - spool.count_aside()) > 0:
                log(f"{delivered} writes that had waited on disk in {spool.folder} are in the database now")

    def __getattr__(self, name: str) -> Any:
        """What else the database can do, once it is there."""
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self.mongo, name)
        if not callable(method):
            return method
        return lambda *args, **kwargs: self._courier.call(lambda: method(*args, **kwargs))

    @property
    def waiting(self) -> int:
        """Writes that wait for the database."""
        return self.spool.count()

    def stop_waiting(self) -> None:
        """Whoever waits for the database, or will, gets ``StoreUnreachableError``: this process is to end. Writes still
        go to disk."""
        self._courier.stop_waiting()

    def close(self) -> None:
        """Delivers what can be delivered now, and says what still waits."""
        self._courier.close()
        self.mongo.close()

    # writes

    def save_run(self, run: RunRecord) -> None:
        """Credentials of an address in ``settings`` are struck out; they are needed nowhere."""
        self._write(("run",), dataclasses.replace(run, settings=redact_tree(run.settings)))

    def save_label(self, label: Label, run: str = "") -> None:
        """The first ``ok`` label of a key stays for ever; until there is one, the last failure is kept."""
        self._write(("label", label.key), {"label": label, "run": run})

    def save_generation(self, record: GenerationRecord) -> None:
        """All of it or nothing."""
        self._write(("generation",), record)
        with self._lock:
            self._generations.add((record.run, record.index))

    def save_model(self, weights: bytes, description: dict[str, object]) -> str:
        sha256 = sha256_hex(weights)
        self._write(("model", sha256), {"weights": weights, "description": description})
        return sha256

    def save_step(self, run: str, generation: int, name: str, content: Mapping[str, Any]) -> None:
        with self._lock:
            self._steps.add((run, generation, name))
        whole = {"run": run, "generation": generation, "name": name, "content": content}
        self._write(("step", run, generation, name), whole)

    def forget_steps(self, run: str, generation: int) -> None:
        """After all that was saved before."""
        self._write(("forget",), {"run": run, "generation": generation})

    # reads

    def load_run(self, name: str) -> RunRecord | None:
        return self._courier.call(lambda: self.mongo.load_run(name))

    def list_runs(self) -> list[RunRecord]:
        return self._courier.call(self.mongo.list_runs)

    def load_generations(self, run: str) -> list[GenerationRecord]:
        return self._courier.call(lambda: self.mongo.load_generations(run))

    def load_labels(self, keys: Sequence[str]) -> dict[str, Label]:
        if self._courier.away:
            found = {key: self._waiting("label", key) for key in dict.fromkeys(keys)}
            labels = {key: from_plain(Label, held["label"]) for key, held in found.items() if held is not None}
            if len(labels) == len(found):
                return labels
        return self._courier.call(lambda: self.mongo.load_labels(keys))

    def load_model(self, sha256: str) -> bytes:
        if self._courier.away and (held := self._waiting("model", sha256)) is not None:
            return bytes(held["weights"])
        return self._courier.call(lambda: self.mongo.load_model(sha256))

    def load_step(self, run: str, generation: int, name: str) -> dict[str, Any] | None:
        """Without the database it is known that a generation this process itself came to has no other steps."""
        if self._courier.away:
            if (held := self._waiting("step", run, generation, name)) is not None:
                return dict(held["content"])
            with self._lock:
                if (run, generation - 1) in self._generations and (run, generation, name) not in self._steps:
                    return None
        return self._courier.call(lambda: self.mongo.load_step(run, generation, name))

    # leases

    def take_lease(self, names: Sequence[str], owner: str, seconds: float) -> str | None:
        """Waits while the database is away, and then until the others have renewed or delivered."""
        tried = False

        def take() -> str | None:
            nonlocal tried
            if tried:  # the answer was lost, perhaps not the lease
                held = self.mongo.held_leases(os.path.commonprefix(list(names)))  # noqa: RUF071 - of letters
                if mine := next((name for name in names if held.get(name) == owner), None):
                    return mine
            tried = True
            return self.mongo.take_lease(names, owner, seconds)

        return self._courier.call(take, settle=True)

    def renew_lease(self, name: str, owner: str, seconds: float) -> bool:
        """Never waits for a database that is away, nor for what it has to be given: a heart has to beat.

        Raises:
            StoreUnreachableError: it is.
        """
        if not self._courier.answers:
            raise StoreUnreachableError("MongoDB is away", where=self.mongo.address)
        try:
            return self.mongo.renew_lease(name, owner, seconds)
        except StoreUnreachableError as error:
            self._courier.silent(error)
            raise

    def release_lease(self, name: str, owner: str) -> None:
        """Never waits; done once all that was written before is delivered, so that the next owner finds it."""
        self._courier.release(name, owner)

    def held_leases(self, prefix: str) -> dict[str, str]:
        return self._courier.call(lambda: self.mongo.held_leases(prefix))

    # within

    def _write(self, key: tuple[Any, ...], value: Any) -> None:
        kind: EntryKind = key[0]
        try:
            plain = to_plain(value)
        except TypeError as error:
            raise StoreError(f"cannot be stored: {error}", where=f"{kind} to be saved") from error
        file = self._courier.write(kind, plain)
        if len(key) > 1:
            with self._lock:
                self._mine.pop(key, None)
                if file is not None:
                    self._mine[key] = file

    def _waiting(self, *key: Any) -> Mapping[str, Any] | None:
        """What this process wrote last under that key, if it still waits."""
        with self._lock:
            file = self._mine.get(key)
        entry = None if file is None else self.spool.read(file)
        if entry is None:
            with self._lock:
                self._mine.pop(key, None)
        return None if entry is None else entry.content


def open_durable_store(
    uri: str | None, data_dir: Path, database: str = "al_loop", log: Callable[[str], None] | None = None
) -> DurableStore:
    """The store at ``uri``; None: on the embedded server of ``data_dir``, started if need be, and again if it dies.

    Raises:
        InputError: the data folder cannot be written.
        StoreError: no server there, it refuses us, or its data are of a newer schema.
    """
    tell = log or logger.warning
    store = open_store(uri, data_dir, database)
    try:
        spool = Spool(spool_folder(uri, data_dir, database), tell)
        spool.check()
        embedded = _is_embedded(uri, data_dir)
        revive = (lambda: _revive(data_dir, tell)) if embedded else (lambda: False)
        return DurableStore(store, spool, revive=revive, log=tell)
    except BaseException:
        store.close()
        raise


def spool_folder(uri: str | None, data_dir: Path, database: str = "al_loop") -> Path:
    """Where writes wait for one database: each has its own, so that none ever gets what was meant for another."""
    place = "embedded" if uri is None or _is_embedded(uri, data_dir) else _place(uri)
    return data_dir / "spool" / spool_name(place, database)


def _is_embedded(uri: str | None, data_dir: Path) -> bool:
    return uri is None or _place(uri) == f"127.0.0.1:{mongod_status(data_dir).port}"


def _place(uri: str) -> str:
    """Its address; this machine has one name."""
    return re.sub(r"(^|,)localhost:", r"\g<1>127.0.0.1:", address(uri))


def _revive(data_dir: Path, log: Callable[[str], None]) -> bool:
    if mongod_status(data_dir).running:
        return False
    if not revive_mongod(data_dir):
        log("the embedded MongoDB was stopped on purpose: `al-loop up` starts it, and this goes on")
        return False
    return True
