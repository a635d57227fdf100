"""What an older al-loop wrote, brought to the schema of today: once, when its database is opened.

Every step finds by itself what is not done yet, and the version is raised when a step is through: a process that is
killed at any point leaves a database that the next one goes on with. A lease lets one process do it while others wait.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any

from pymongo import IndexModel, UpdateOne
from pymongo.database import Database
from pymongo.errors import OperationFailure

from alcore.errors import StoreError
from storage.documents import BLOB_COLLECTION, DOCUMENTS, SCHEMA_COLLECTION, SCHEMA_VERSION
from storage.files import FileShelf, inlined
from storage.leases import MongoLeases
from storage.queries import count_labels, keys_of_generation, statuses_of

LEASE = "schema"
LEASE_S = 60.0
PAUSE_S = 0.2
BATCH = 500
INDEX_OPTIONS = ("unique", "expireAfterSeconds")
INDEX_NOT_FOUND, NAMESPACE_NOT_FOUND = 27, 26

logger = logging.getLogger(__name__)

Migration = Callable[[Database[Any], Callable[[], None]], None]


def bring_up_to_date(database: Database[Any], leases: MongoLeases, where: str) -> None:
    """Returns once ``database`` is of today's schema. A new one is marked as such.

    Args:
        database: any.
        leases: of that database.
        where: its server, for messages.

    Raises:
        StoreError: it is of a newer schema.
    """
    schema = database[SCHEMA_COLLECTION]
    schema.update_one({"_id": "al_loop"}, {"$setOnInsert": {"version": SCHEMA_VERSION}}, upsert=True)
    owner, told = uuid.uuid4().hex, False
    while (version := _version(database)) != SCHEMA_VERSION:
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"database {database.name} has schema version {version}, this al-loop knows {SCHEMA_VERSION}",
                where=where,
                mend="update al-loop, or use another database",
            )
        if leases.take_lease([LEASE], owner, LEASE_S):
            try:
                _migrate(database, leases, owner)
            finally:
                leases.release_lease(LEASE, owner)
            continue
        if not told:
            logger.warning("database %s: waits for another process that brings it to today's schema", database.name)
            told = True
        time.sleep(PAUSE_S)


def make_indexes(database: Database[Any]) -> None:
    """Those that the documents declare and that are not there."""
    for document in DOCUMENTS:
        specs = document._meta["index_specs"]
        indexes = [IndexModel(spec["fields"], **{k: spec[k] for k in INDEX_OPTIONS if k in spec}) for spec in specs]
        database[document._get_collection_name()].create_indexes(indexes)


def _version(database: Database[Any]) -> int:
    return int((database[SCHEMA_COLLECTION].find_one({"_id": "al_loop"}) or {})["version"])


def _migrate(database: Database[Any], leases: MongoLeases, owner: str) -> None:
    """All steps that are left, in order."""
    while (version := _version(database)) < SCHEMA_VERSION:
        logger.warning("database %s: brought from schema %d to %d, once", database.name, version, version + 1)
        MIGRATIONS[version](database, lambda: _hold(leases, owner))
        database[SCHEMA_COLLECTION].update_one({"_id": "al_loop"}, {"$max": {"version": version + 1}})


def _hold(leases: MongoLeases, owner: str) -> None:
    """Others do the same meanwhile if the lease is lost: that costs time, nothing else."""
    leases.renew_lease(LEASE, owner, LEASE_S)


def _sittings(database: Database[Any], alive: Callable[[], None]) -> None:
    """1 to 2: a run's ``versions`` are those of its first sitting, which made all generations; what ``al-loop status``
    shows of labels stands in the generations; indexes that others have replaced go."""
    first = {
        "started": {"$ifNull": ["$started", ""]},
        "versions": {"$ifNull": ["$versions", {}]},
        "settings_sha256": {"$ifNull": ["$settings_sha256", ""]},
    }
    database["runs"].update_many(
        {"sittings": {"$exists": False}}, [{"$set": {"sittings": [first]}}, {"$unset": "versions"}]
    )
    alive()
    _count_labels(database, alive)
    for index in ("label_keys_1", "paths.error_to_verified_ev_1", "paths.error_to_reference_ev_1"):
        try:
            database["generations"].drop_index(index)
        except OperationFailure as error:
            if error.code not in (INDEX_NOT_FOUND, NAMESPACE_NOT_FOUND):
                raise


def _count_labels(database: Database[Any], alive: Callable[[], None]) -> None:
    names = {"run": 1, "kinds": 1, "label_keys": 1, "paths.label_keys": 1, "doubts": 1}
    todo = database["generations"].find({"sitting": {"$exists": False}}, names).sort("run", 1)
    writes = []
    blobs = FileShelf(database, BLOB_COLLECTION)
    for _, group in groupby(todo, key=lambda son: son["run"]):
        generations = [inlined(son, blobs.get) for son in group]
        statuses = statuses_of(database, {key for son in generations for key in keys_of_generation(son)})
        for son in generations:
            counts = count_labels(son, statuses)
            writes.append(UpdateOne({"_id": son["_id"]}, {"$set": {"sitting": 0, "labels_by_status": counts}}))
        if len(writes) >= BATCH:
            database["generations"].bulk_write(writes, ordered=False)
            alive()
            writes = []
    if writes:
        database["generations"].bulk_write(writes, ordered=False)


MIGRATIONS: Mapping[int, Migration] = MappingProxyType({1: _sittings})
"""What brings a database of that schema to the next one. Each may be broken off anywhere and begun again."""
