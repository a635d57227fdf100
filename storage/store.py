"""The record store on MongoDB."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pymongo
from bson.errors import BSONError
from mongoengine import Document
from mongoengine.queryset import QuerySet
from pymongo import MongoClient, ReadPreference
from pymongo.client_session import ClientSession
from pymongo.database import Database
from pymongo.errors import (
    ConfigurationError,
    DuplicateKeyError,
    InvalidName,
    InvalidURI,
    PyMongoError,
)

from alcore.errors import StoreError
from alcore.types import GenerationRecord, Label, RunRecord
from storage import mapping, queries
from storage.documents import (
    BLOB_COLLECTION,
    REMOVED,
    BandDocument,
    GenerationDocument,
    LabelDocument,
    LeaseDocument,
    ModelDocument,
    RunDocument,
    StepDocument,
)
from storage.faults import store_error
from storage.fields import decode_plain, encode_plain
from storage.files import FileShelf, inlined, outlined
from storage.leases import MongoLeases
from storage.migrations import bring_up_to_date, make_indexes
from storage.mongod import ensure_mongod
from storage.provenance import Provenance, find_rows, provenance_from_rows
from storage.uris import address, redact_tree, redact_uri

P = ParamSpec("P")
R = TypeVar("R")

UNREACHABLE_MS = 4000
HUNG_MS = 30_000
"""A server that says nothing for so long in the middle of a command hangs; one that merely is slow must not fail."""
HEARTBEAT_MS = 5_000
ATOMIC_S = 60.0
"""The driver alone would try a transaction again and again for two minutes."""
PREPARE_S = 3600.0
"""Building an index on many documents takes its time."""
KEYS_PER_QUERY = 5000


def open_store(uri: str | None, data_dir: Path, database: str = "al_loop") -> MongoStore:
    """The store at ``uri``; None: on the embedded server of ``data_dir``, started if need be.

    Raises:
        StoreError: no server there, it refuses us, or its data are of a newer schema.
    """
    return MongoStore(uri or ensure_mongod(data_dir), database)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _guarded(
    method: Callable[Concatenate[MongoStore, P], R],
) -> Callable[Concatenate[MongoStore, P], R]:
    """Makes every error of the driver a ``StoreError`` that names the server."""

    @functools.wraps(method)
    def guarded(self: MongoStore, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except PyMongoError as error:
            raise store_error(error, self.address) from error
        except BSONError as error:
            raise StoreError(f"cannot be stored: {error}", where=self.address) from error

    return guarded  # type: ignore[return-value]  # self may be passed by name there: nobody does


class MongoStore:
    """``RecordStore`` and ``LeaseStore`` (``alcore.protocols``) on MongoDB.

    Several may be open in one process; threads may share one.

    Args:
        uri: address of the server.
        database: name of the database.
        now: the clock (UTC) behind ``created``.

    Raises:
        StoreError: no server there (within some 5 s), it refuses us, or its data are of a newer schema.
    """

    def __init__(self, uri: str, database: str = "al_loop", now: Callable[[], datetime] = _utc_now) -> None:
        self.address = address(uri)
        self._now = now
        try:
            self._client: MongoClient[Any] = MongoClient(
                uri,
                serverSelectionTimeoutMS=UNREACHABLE_MS,
                connectTimeoutMS=UNREACHABLE_MS,
                socketTimeoutMS=HUNG_MS,
                heartbeatFrequencyMS=HEARTBEAT_MS,
                w="majority",
                journal=True,  # acknowledged is on disk
                appname="al-loop",
            )
            self._database = self._client[database]
        except (InvalidURI, InvalidName, ConfigurationError, ValueError):  # its words may quote the password
            raise StoreError(
                f"no valid MongoDB address, or no valid database name ({database})",
                where=redact_uri(uri),
                mend="mongodb://[user:password@]host[:port]/[?options], special characters in the password escaped",
            ) from None
        self._models = FileShelf(self._database, "models")
        self._blobs = FileShelf(self._database, BLOB_COLLECTION)
        self._leases = MongoLeases(self._collection(LeaseDocument))
        try:
            self._prepare()
        except BaseException:
            self._client.close()
            raise

    @_guarded
    def _prepare(self) -> None:
        """Brings an older schema up to date and makes the indexes."""
        hello = self._client.admin.command("hello")  # first: nobody waits an hour for a server that is not there
        self._has_transactions = "setName" in hello or hello.get("msg") == "isdbgrid"
        with pymongo.timeout(PREPARE_S):
            bring_up_to_date(self._database, self._leases, self.address)
            make_indexes(self._database)

    @_guarded
    def ping(self) -> None:
        """Returns if the server answers and takes writes.

        Raises:
            StoreUnreachableError: not now.
        """
        with pymongo.timeout(UNREACHABLE_MS / 1000):
            self._client.admin.command("ping", read_preference=ReadPreference.PRIMARY)

    def query(self, kind: type[Document], **filters: Any) -> Any:
        """mongoengine's query set over this very store (``kind.objects`` needs a global connection)."""
        return QuerySet(kind, self._collection(kind))(**filters)

    @_guarded
    def ask(self, question: Callable[[Database[Any]], R]) -> R:
        """What ``storage.queries`` and ``storage.garbage`` ask."""
        return question(self._database)

    # runs

    @_guarded
    def load_run(self, name: str) -> RunRecord | None:
        son = self._collection(RunDocument).find_one({"_id": name})
        return None if son is None else mapping.run_from_document(mapping.from_son(RunDocument, son))

    @_guarded
    def save_run(self, run: RunRecord) -> None:
        """Credentials of an address in ``settings`` are struck out; they are needed nowhere."""
        clean = dataclasses.replace(run, settings=redact_tree(run.settings))
        son = mapping.to_son(mapping.run_to_document(clean))
        self._collection(RunDocument).replace_one({"_id": run.name}, son, upsert=True)

    @_guarded
    def list_runs(self) -> list[RunRecord]:
        sons = self._collection(RunDocument).find().sort([("started", -1), ("_id", -1)])
        return [mapping.run_from_document(mapping.from_son(RunDocument, son)) for son in sons]

    @_guarded
    def delete_run(self, name: str) -> bool:
        """Forgets a run with its generations and bands; its labels and models stay, other runs may use them.

        Returns whether there was one.
        """

        def work(session: ClientSession | None) -> bool:
            for kind in (GenerationDocument, BandDocument, StepDocument):
                self._collection(kind).delete_many({"run": name}, session=session)
            labels = self._collection(LabelDocument)
            was_there = bool(self._collection(RunDocument).delete_one({"_id": name}, session=session).deleted_count)
            if was_there:  # a new run of that name has not computed them
                mine = {"runs": name, "details.computed_by": name}
                labels.update_many(mine, {"$set": {"details.computed_by": f"{name}{REMOVED}"}}, session=session)
            labels.update_many({"runs": name}, {"$pull": {"runs": name}}, session=session)
            return was_there

        return self._atomically(work)

    # generations

    @_guarded
    def run_rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """A row a run (only ``name``'s), newest first (``storage.queries``)."""
        return queries.run_rows(self._database, name)

    @_guarded
    def load_generations(self, run: str) -> list[GenerationRecord]:
        bands: dict[int, dict[str, BandDocument]] = {}
        generations = list(self._collection(GenerationDocument).find({"run": run}).sort("index", 1))
        for son in self._collection(BandDocument).find({"run": run}):
            bands.setdefault(son["generation"], {})[son["path"]] = mapping.from_son(BandDocument, self._inlined(son))
        documents = [mapping.from_son(GenerationDocument, self._inlined(son)) for son in generations]
        return [mapping.generation_from_documents(document, bands.get(document.index, {})) for document in documents]

    @_guarded
    def save_generation(self, record: GenerationRecord) -> None:
        """All of it or nothing; on a server without transactions bands come first, the generation makes them count."""
        generation, bands = mapping.generation_to_documents(record)
        generation_son = self._outlined(queries.with_label_counts(self._database, mapping.to_son(generation)))
        band_sons = [self._outlined(mapping.to_son(band)) for band in bands]
        paths = [son["path"] for son in band_sons]
        place = {"run": record.run, "generation": record.index}

        def work(session: ClientSession | None) -> None:
            collection = self._collection(BandDocument)
            for son in band_sons:
                collection.replace_one({**place, "path": son["path"]}, son, upsert=True, session=session)
            self._collection(GenerationDocument).replace_one(
                {"run": record.run, "index": record.index}, generation_son, upsert=True, session=session
            )
            collection.delete_many({**place, "path": {"$nin": paths}}, session=session)

        self._atomically(work)

    # steps

    @_guarded
    def load_step(self, run: str, generation: int, name: str) -> dict[str, Any] | None:
        son = self._collection(StepDocument).find_one({"run": run, "generation": generation, "name": name})
        if son is None:
            return None
        content: dict[str, Any] = decode_plain(self._inlined(son["content"]))
        return content

    @_guarded
    def save_step(self, run: str, generation: int, name: str, content: Mapping[str, Any]) -> None:
        place = {"run": run, "generation": generation, "name": name}
        son = place | {"content": self._outlined(encode_plain(content))}
        self._collection(StepDocument).replace_one(place, son, upsert=True)

    @_guarded
    def forget_steps(self, run: str, generation: int) -> None:
        self._collection(StepDocument).delete_many({"run": run, "generation": {"$lte": generation}})

    # labels

    @_guarded
    def load_labels(self, keys: Sequence[str]) -> dict[str, Label]:
        labels = {}
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), KEYS_PER_QUERY):
            for son in self._collection(LabelDocument).find({"_id": {"$in": wanted[start : start + KEYS_PER_QUERY]}}):
                label = mapping.label_from_document(mapping.from_son(LabelDocument, self._inlined(son)))
                labels[label.key] = label
        return {key: labels[key] for key in wanted if key in labels}

    @_guarded
    def save_label(self, label: Label, run: str = "", created: datetime | None = None) -> None:
        """The first ``ok`` label of a key stays for ever, but that one that was computed replaces one that was derived
        by symmetry; until there is one, the last failure is kept.

        ``created`` (UTC; None: now) is when it was first stored, anywhere; of one that is here already it changes
        nothing."""
        son = self._outlined(mapping.to_son(mapping.label_to_document(label)))
        key = son.pop("_id")
        son.pop("runs")
        absent = {name: "" for name in LabelDocument._fields if name not in {*son, "key", "runs", "created"}}
        update: dict[str, Any] = {"$set": son, "$unset": absent, "$setOnInsert": {"created": created or self._now()}}
        joined = {"$addToSet": {"runs": run}} if run else {}
        if not run:
            update["$setOnInsert"]["runs"] = []
        collection = self._collection(LabelDocument)
        worse: list[dict[str, Any]] = [{"status": {"$ne": "ok"}}]
        if label.ok and not label.derived_from:
            worse.append({"details.equivalent_to": {"$exists": True}})
        while True:
            try:  # one atomic step; the filter misses a label that stays, whose key then refuses the insert
                collection.update_one({"_id": key, "$or": worse}, update | joined, upsert=True)
                return
            except DuplicateKeyError:
                stays = collection.find_one({"_id": key, "$nor": worse}, {"_id": 1})
                if stays is not None:  # else another process was faster: once more
                    if joined:
                        collection.update_one({"_id": key}, joined)
                    return

    @_guarded
    def count_labels_by_status(self, run: str | None = None) -> dict[str, int]:
        """How many labels there are (that ``run`` used), by status; statuses without any are absent."""
        stages: list[Mapping[str, Any]] = [{"$match": {} if run is None else {"runs": run}}]
        stages += [{"$group": {"_id": "$status", "n": {"$sum": 1}}}, {"$sort": {"_id": 1}}]
        return {row["_id"]: row["n"] for row in self._collection(LabelDocument).aggregate(stages)}

    # models

    @_guarded
    def save_model(self, weights: bytes, description: dict[str, object]) -> str:
        try:
            entry = {"description": encode_plain(description), "created": self._now()}
        except TypeError as error:
            raise StoreError(f"cannot be stored: {error}", where="description of a model") from error
        return self._models.put(weights, entry)

    @_guarded
    def load_model(self, sha256: str) -> bytes:
        return self._models.get(sha256)

    @_guarded
    def describe_model(self, sha256: str) -> dict[str, Any] | None:
        """What was stored with the model of that id; None if there is none."""
        son = self._collection(ModelDocument).find_one({"_id": sha256}, {"description": 1})
        return None if son is None else decode_plain(son.get("description", {}))

    # what a run consists of

    @_guarded
    def provenance(self, run: str, generation: int | None = None) -> Provenance | None:
        """Where the barriers of ``generation`` (None: the last) came from, in one query; None without such a run."""
        return provenance_from_rows(find_rows(self._database, run, generation, self._inlined))

    @_guarded
    def generation_indices(self, run: str) -> list[int]:
        """In order."""
        sons = self._collection(GenerationDocument).find({"run": run}, {"_id": 0, "index": 1}).sort("index", 1)
        return [int(son["index"]) for son in sons]

    @_guarded
    def load_generation(self, run: str, index: int) -> GenerationRecord | None:
        """One of ``load_generations``."""
        son = self._collection(GenerationDocument).find_one({"run": run, "index": index})
        if son is None:
            return None
        sons = self._collection(BandDocument).find({"run": run, "generation": index})
        bands = [mapping.from_son(BandDocument, self._inlined(band)) for band in sons]
        document = mapping.from_son(GenerationDocument, self._inlined(son))
        return mapping.generation_from_documents(document, {band.path: band for band in bands})

    @_guarded
    def label_dates(self, run: str) -> dict[str, datetime]:
        """When each label that ``run`` asked for, or was given, was first stored (UTC), by key."""
        sons = self._collection(LabelDocument).find({"runs": run}, {"created": 1}).sort("_id", 1)
        return {son["_id"]: son["created"] for son in sons}

    @_guarded
    def step_places(self, run: str) -> list[tuple[int, str]]:
        """Generation and name of every step that is remembered, in order."""
        sons = self._collection(StepDocument).find({"run": run}, {"generation": 1, "name": 1})
        return sorted((int(son["generation"]), str(son["name"])) for son in sons)

    # leases

    @_guarded
    def take_lease(self, names: Sequence[str], owner: str, seconds: float) -> str | None:
        return self._leases.take_lease(names, owner, seconds)

    @_guarded
    def renew_lease(self, name: str, owner: str, seconds: float) -> bool:
        """One that ran out but that nobody took meanwhile is still its owner's."""
        return self._leases.renew_lease(name, owner, seconds)

    @_guarded
    def release_lease(self, name: str, owner: str) -> None:
        self._leases.release_lease(name, owner)

    @_guarded
    def held_leases(self, prefix: str) -> dict[str, str]:
        return self._leases.held_leases(prefix)

    def close(self) -> None:
        self._client.close()

    # within

    def _collection(self, kind: type[Document]) -> Any:
        return self._database[kind._get_collection_name()]

    def _atomically(self, work: Callable[[ClientSession | None], R]) -> R:
        """Does ``work`` in a transaction where the server has them (a stand-alone one has not)."""
        if not self._has_transactions:
            return work(None)
        with pymongo.timeout(ATOMIC_S), self._client.start_session() as session:
            return session.with_transaction(work)

    def _outlined(self, son: Any) -> Any:
        """``son`` with what is large in it in GridFS."""
        return outlined(son, lambda data: self._blobs.put(data, {}))

    def _inlined(self, son: Any) -> Any:
        """Undoes ``_outlined``."""
        return inlined(son, self._blobs.get)
