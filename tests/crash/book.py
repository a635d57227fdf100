"""What the database shows of a run from outside, and whether anything of it ever went back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from bson import encode
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern
from world import RUN

from alcore.plain import to_plain
from flows import processes
from storage.mongod import mongod_status
from storage.store import MongoStore

DATABASE = "al_loop"
OF_THE_PROCESS = ("seconds", "sitting")
"""Of a generation record: what a run that was interrupted need not have the same."""
CALM = ("converged", "budget_spent")


class Book:
    """Reads what is on the server's disk for good (read concern ``majority``); never writes, starts nothing."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._client: MongoClient[Any] | None = None
        self._seen: dict[tuple[str, Any], bytes] = {}
        self.gone_back: list[str] = []

    def events(self) -> dict[str, int]:
        """How much there is of everything, to see that something has just happened; empty while nobody answers."""
        try:
            base = self._database()
            run = base["runs"].find_one({"_id": RUN}, {"status": 1, "sittings.started": 1}) or {}
            return {
                "sittings": len(run.get("sittings", [])),
                "probes": base["steps"].count_documents({"name": {"$regex": "^probe"}}),
                "members": base["steps"].count_documents({"name": {"$regex": "^train"}}),
                "labels": base["labels"].count_documents({}),
                "generations": base["generations"].count_documents({}),
                "finished": int(run.get("status") in CALM),
            }
        except (PyMongoError, ConnectionError):
            return {}

    def look(self) -> set[str] | None:
        """Notes everything that must stay as it is; keys of the good labels, None if nobody answers."""
        try:
            base = self._database()
            generations = {("generation", son["index"]): encode(son) for son in base["generations"].find()}
            bands = {("band", (son["generation"], son["path"])): encode(son) for son in base["bands"].find()}
            fields = {"status": 1, "energy_ev": 1, "forces": 1}
            labels = {("label", son["_id"]): encode(son) for son in base["labels"].find({"status": "ok"}, fields)}
        except (PyMongoError, ConnectionError):
            return None
        now = generations | bands | labels
        for thing, content in self._seen.items():
            if now.get(thing) != content:
                self.gone_back.append(f"{thing[0]} {thing[1]} is {'changed' if thing in now else 'gone'}")
        self._seen = now
        return {key for kind, key in labels if kind == "label"}

    def leases(self) -> tuple[list[str], list[str]]:
        """Names of leases that did not run out yet: of processes that live, and of dead ones."""
        held = self._database()["leases"].find({"$expr": {"$gt": ["$expires", "$$NOW"]}})
        living, dead = [], []
        for son in held:
            (living if _lives(son["owner"]) else dead).append(son["_id"])
        return living, dead

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _database(self) -> Any:
        status = mongod_status(self._home)
        if not status.running or status.port is None:
            self.close()
            raise ConnectionError
        if self._client is None:
            limits = {"serverSelectionTimeoutMS": 300, "connectTimeoutMS": 300, "socketTimeoutMS": 2000}
            self._client = MongoClient(status.uri, directConnection=True, **limits)
        return self._client.get_database(DATABASE, read_concern=ReadConcern("majority"))


def _lives(owner: str) -> bool:
    """Whether the process that an owner's words name is alive; what cannot be read counts as alive."""
    for part, created in zip(owner.split("|"), owner.split("|")[1:], strict=False):
        if part.isdigit():
            try:
                return processes.find({"pid": part, "created": created}) is not None
            except ValueError:
                return psutil.pid_exists(int(part))
    return True


def result(uri: str) -> dict[str, Any]:
    """Everything that a run of the same seed has to have the same, as plain values."""
    store = MongoStore(uri)
    try:
        records = store.load_generations(RUN)
        keys = sorted({key for record in records for key in record.kinds})
        labels = store.load_labels(keys)
    finally:
        store.close()
    generations = [{k: v for k, v in to_plain(r).items() if k not in OF_THE_PROCESS} for r in records]
    measured = {
        key: {"status": label.status, "energy_ev": label.energy_ev, "forces": label.forces}
        for key, label in labels.items()
    }
    return {"generations": generations, "labels": measured}


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Places where two results are not the same, bit for bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if list(one) != list(other) and sorted(one) != sorted(other):
            return [f"{place}: {sorted(set(one) ^ set(other))}"]
        return [line for key in one for line in differences(one[key], other[key], f"{place}.{key}".lstrip("."))]
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)}"]
        return [
            line for k, (a, b) in enumerate(zip(one, other, strict=True)) for line in differences(a, b, f"{place}.{k}")
        ]
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        same = one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
        return [] if same else [f"{place}: arrays"]
    return [] if one == other or (one != one and other != other) else [f"{place}: {one!r:.60} and {other!r:.60}"]
