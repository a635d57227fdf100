"""What nothing refers to any more: found, and removed so that nothing can be lost that a run needs, while others write.

What is looked for is old (``Garbage.before``), because a model is stored a moment before the generation that names it;
and whoever stores something again makes it young again (``storage.files``), which the removal of each notices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from bson import ObjectId
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from gridfs import GridFSBucket
from pymongo.database import Database

from storage.documents import BLOB_COLLECTION
from storage.files import FileShelf, inlined
from storage.queries import keys_of_generation

DIGEST = re.compile(rb"[0-9a-f]{64}")
SHELVES = {"models": "models", "large arrays": BLOB_COLLECTION}
BLOBS_IN = ("generations", "bands", "labels", "steps")
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of things that nothing needs.

    Attributes:
        kind: for a person.
        count: how many.
        size_mb: what they take, uncompressed.
        remove: removes those that still are not needed; how many that were.
    """

    kind: str
    count: int
    size_mb: float
    remove: Callable[[], int]


class Garbage:
    """Looks for what nothing in ``database`` needs.

    Args:
        database: of an open store.
        live_since: since when somebody works on any run now, or None: nothing younger is touched.
        min_age_s: nothing is touched that is younger than this, either.
    """

    def __init__(self, database: Database[Any], live_since: datetime | None, min_age_s: float) -> None:
        self._database = database
        now = database.client.admin.command("hello")["localTime"]
        self.before: datetime = min(live_since or now, now) - timedelta(seconds=min_age_s)

    def findings(self, labels: bool) -> list[Finding]:
        """All kinds, those too of which there is nothing; ``labels``: also those that no run refers to."""
        steps = self._dead_steps()
        found = [self._steps(steps)]  # first: what they refer to goes with them
        found += [self._shelf(kind, shelf, steps) for kind, shelf in SHELVES.items()]
        found += [self._half_uploaded(shelf) for shelf in SHELVES.values()]
        found += [self._leases()]
        return found + ([self._labels()] if labels else [])

    def _raw(self, collection: str, wanted: Mapping[str, Any], fields: Mapping[str, Any] | None = None) -> Any:
        raw = self._database[collection].with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
        return raw.find(wanted, fields)

    def _shelf(self, kind: str, shelf: str, dead_steps: list[Any]) -> Finding:
        """Entries first, references after: a reference that is made in between has made its entry young."""
        used = {"$ifNull": ["$used", {"$toDate": "$file"}]}
        old = {"$expr": {"$lt": [used, self.before]}}
        entries = {e["_id"]: e for e in self._database[shelf].find(old, {"file": 1, "size_bytes": 1})}
        needed = self._digests(shelf, dead_steps) if entries else set()
        loose = [entry for sha256, entry in entries.items() if sha256 not in needed]

        def remove() -> int:
            bucket, removed = GridFSBucket(self._database, bucket_name=shelf), 0
            for entry in loose:  # what was stored again meanwhile is young, and stays
                if self._database[shelf].delete_one({"_id": entry["_id"], "file": entry["file"], **old}).deleted_count:
                    bucket.delete(entry["file"])
                    removed += 1
            return removed

        return Finding(kind=kind, count=len(loose), size_mb=_mb(loose), remove=remove)

    def _digests(self, shelf: str, dead_steps: list[Any]) -> set[str]:
        """Every digest in what could refer to something on ``shelf``: rather too many than one too few."""
        found: set[bytes] = set()
        for collection in BLOBS_IN:
            of_step = {"_id": {"$nin": dead_steps}} if collection == "steps" else {}
            only = {"surrogate": 1} if (collection, shelf) == ("generations", "models") else None
            if shelf == "models" and collection in ("bands", "labels"):
                continue
            for document in self._raw(collection, of_step, only):
                raw = bytes(document.raw)
                if shelf == "models" or b"%blob\0" in raw or b"%bson\0" in raw:
                    found.update(DIGEST.findall(raw))
        return {digest.decode() for digest in found}

    def _half_uploaded(self, shelf: str) -> Finding:
        """Files and chunks in GridFS that no entry names; an upload in progress is young."""
        files, chunks = self._database[f"{shelf}.files"], self._database[f"{shelf}.chunks"]
        young = ObjectId.from_datetime(self.before)
        sizes = {file["_id"]: file["length"] for file in files.find({"_id": {"$lt": young}}, {"length": 1})}
        group: list[dict[str, Any]] = [{"$sort": {"files_id": 1, "n": 1}}, {"$group": {"_id": "$files_id"}}]
        ids = {row["_id"] for row in chunks.aggregate([{"$match": {"files_id": {"$lt": young}}}, *group])} | set(sizes)
        loose = sorted(ids - {entry["file"] for entry in self._database[shelf].find({}, {"file": 1})}) if ids else []
        n_bytes = sum(sizes.get(file, 0) for file in loose)
        whole = {"$group": {"_id": None, "n": {"$sum": {"$binarySize": "$data"}}}}
        for row in chunks.aggregate([{"$match": {"files_id": {"$in": [i for i in loose if i not in sizes]}}}, whole]):
            n_bytes += row["n"]

        def remove() -> int:
            gone = 0
            for file in loose:
                if self._database[shelf].find_one({"file": file}, {"_id": 1}) is None:
                    files.delete_one({"_id": file})
                    chunks.delete_many({"files_id": file})
                    gone += 1
            return gone

        return Finding(kind=f"uploads cut off ({shelf})", count=len(loose), size_mb=n_bytes / MB, remove=remove)

    def _dead_steps(self) -> list[Any]:
        """Ids of steps of generations that are stored as a whole, or of runs that are not there."""
        steps = list(self._database["steps"].find({}, {"run": 1, "generation": 1}))
        names = sorted({step["run"] for step in steps})
        runs = {run["_id"] for run in self._database["runs"].find({"_id": {"$in": names}}, {"_id": 1})}
        last = {name: self._last_generation(name) for name in names}
        young = ObjectId.from_datetime(self.before)
        return [
            step["_id"]
            for step in steps
            if step["generation"] <= last[step["run"]] or (step["run"] not in runs and step["_id"] < young)
        ]

    def _last_generation(self, run: str) -> int:
        last = self._database["generations"].find_one({"run": run}, {"index": 1}, sort=[("index", -1)])
        return -1 if last is None else int(last["index"])

    def _steps(self, dead: list[Any]) -> Finding:
        sizes = [len(step.raw) for step in self._raw("steps", {"_id": {"$in": dead}})]

        def remove() -> int:
            return int(self._database["steps"].delete_many({"_id": {"$in": dead}}).deleted_count)

        return Finding(
            kind="steps of generations that are done", count=len(dead), size_mb=sum(sizes) / MB, remove=remove
        )

    def _leases(self) -> Finding:
        """One that has just run out may still be its owner's."""
        out = {"expires": {"$lt": self.before}}
        sizes = [len(lease.raw) for lease in self._raw("leases", out)]

        def remove() -> int:
            return int(self._database["leases"].delete_many(out).deleted_count)

        return Finding(kind="leases that ran out", count=len(sizes), size_mb=sum(sizes) / MB, remove=remove)

    def _labels(self) -> Finding:
        """Of no run by their own word, and named by no generation either."""
        loose = {"runs": {"$in": [[], None]}, "created": {"$lt": self.before}}
        sizes = {label["_id"]: len(label.raw) for label in self._raw("labels", loose)}
        named: set[str] = set()
        if sizes:
            blobs, names = FileShelf(self._database, BLOB_COLLECTION), ("kinds", "label_keys", "paths.label_keys")
            for generation in self._database["generations"].find({}, dict.fromkeys(names, 1)):
                named |= keys_of_generation(inlined(generation, blobs.get))
        keys = sorted(set(sizes) - named)

        def remove() -> int:
            return int(self._database["labels"].delete_many({"_id": {"$in": keys}, **loose}).deleted_count)

        return Finding(
            kind="labels of no run", count=len(keys), size_mb=sum(sizes[key] for key in keys) / MB, remove=remove
        )


def _mb(entries: Collection[Mapping[str, Any]]) -> float:
    return float(sum(entry.get("size_bytes", 0) for entry in entries) / MB)
