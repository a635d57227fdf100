"""Leases: names that one owner holds for a while, over all runs, processes and machines that share the store.

A lease that is not renewed runs out by itself, so nothing stays taken when its owner dies. Time is the server's,
because the clocks of the machines need not agree.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pymongo import ReturnDocument, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import DuplicateKeyError

FIRST_AT_ONCE = 1000
"""Names looked up in one query."""
LAST_CHARACTER = "\U0010ffff"


class MongoLeases:
    """``alcore.protocols.LeaseStore`` on one collection, a document a name; raises the driver's errors.

    Args:
        collection: of ``LeaseDocument``.
    """

    def __init__(self, collection: Collection[Any]) -> None:
        self._leases = collection
        # Not waited for until it is on disk: a crash of the server that undoes it only makes a lease run out.
        self._lightly = collection.with_options(write_concern=WriteConcern(w=1, j=False))

    def take_lease(self, names: Sequence[str], owner: str, seconds: float) -> str | None:
        for start in range(0, len(names), FIRST_AT_ONCE):
            some = names[start : start + FIRST_AT_ONCE]
            held = {son["_id"] for son in self._leases.find({"_id": {"$in": list(some)}} | HELD, {"_id": 1})}
            for name in some:
                if name not in held and self._take(name, owner, seconds):
                    return name
        return None

    def _take(self, name: str, owner: str, seconds: float) -> bool:
        """One atomic step: the document becomes ours if it was free; ``token`` tells this taking from any other."""
        token = uuid.uuid4().hex
        free = {"$lte": [{"$ifNull": ["$expires", "$$NOW"]}, "$$NOW"]}
        ours = {"owner": {"$literal": owner}, "token": token, "taken": "$$NOW", "expires": _after(seconds)}
        update = [{"$set": {key: {"$cond": [free, value, f"${key}"]} for key, value in ours.items()}}]
        while True:
            with suppress(DuplicateKeyError):  # two inserted the name at once; the other one has it now
                found = self._leases.find_one_and_update(
                    {"_id": name}, update, projection={"token": 1}, upsert=True, return_document=ReturnDocument.AFTER
                )
                return bool(found and found["token"] == token)

    def renew_lease(self, name: str, owner: str, seconds: float) -> bool:
        """One that ran out but that nobody took meanwhile is still its owner's."""
        done = self._lightly.update_one({"_id": name, "owner": owner}, [{"$set": {"expires": _after(seconds)}}])
        return done.matched_count == 1

    def release_lease(self, name: str, owner: str) -> None:
        self._lightly.delete_one({"_id": name, "owner": owner})

    def held_leases(self, prefix: str) -> dict[str, str]:
        names = {"_id": {"$gte": prefix, "$lt": prefix + LAST_CHARACTER}}
        return {son["_id"]: son["owner"] for son in self._leases.find(names | HELD).sort("_id", 1)}


HELD = {"$expr": {"$gt": ["$expires", "$$NOW"]}}


def _after(seconds: float) -> dict[str, Any]:
    return {"$add": ["$$NOW", max(1, round(1000 * seconds))]}


class MemoryLeases:
    """The same inside one process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._leases: dict[str, tuple[str, float]] = {}

    def take_lease(self, names: Sequence[str], owner: str, seconds: float) -> str | None:
        with self._lock:
            now = time.monotonic()
            for name in names:
                if name not in self._leases or self._leases[name][1] <= now:
                    self._leases[name] = (owner, now + seconds)
                    return name
        return None

    def renew_lease(self, name: str, owner: str, seconds: float) -> bool:
        with self._lock:
            holder, _ = self._leases.get(name, (None, 0.0))
            if holder == owner:
                self._leases[name] = (owner, time.monotonic() + seconds)
            return holder == owner

    def release_lease(self, name: str, owner: str) -> None:
        with self._lock:
            if self._leases.get(name, (None, 0.0))[0] == owner:
                del self._leases[name]

    def held_leases(self, prefix: str) -> dict[str, str]:
        with self._lock:
            now = time.monotonic()
            held = {name: owner for name, (owner, end) in self._leases.items() if end > now and name.startswith(prefix)}
        return dict(sorted(held.items()))
