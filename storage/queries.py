"""Questions that the store answers without loading whole runs, each of them by an index.

Rows are plain values for a person or a program; what a generation holds is in ``storage.documents``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pymongo.database import Database

from storage.documents import BLOB_COLLECTION
from storage.files import FileShelf, inlined

KEYS_PER_QUERY = 5000
OF_RUN = ("status", "reason", "started", "finished")
OF_GENERATION = ("run", "index", "labels_by_status", "n_reference_calls", "n_labels_reused", "decision")
OF_PATH = ("path", "barrier.forward_ev", "barrier_std_ev", "verified_barrier_ev", "decision")


def run_rows(database: Database[Any], name: str | None = None) -> list[dict[str, Any]]:
    """One row a run (only ``name``'s), newest first: its record's state, and what its last generation says."""
    runs = list(database["runs"].find({} if name is None else {"_id": name}, dict.fromkeys(OF_RUN, 1)))
    lasts = {son["run"]: son for son in database["generations"].aggregate(last_generations(name))}
    return rows_from_sons(runs, lasts)


def last_generations(name: str | None = None) -> list[dict[str, Any]]:
    """The aggregation, over the generations, that gives the last one of each run (of ``name``) in brief."""
    brief = dict.fromkeys([*OF_GENERATION, *(f"paths.{field}" for field in OF_PATH)], 1)
    if name is not None:
        return [{"$match": {"run": name}}, {"$sort": {"index": -1}}, {"$limit": 1}, {"$project": brief}]
    first = {"$group": {"_id": "$run", "last": {"$first": "$$ROOT"}}}  # a jump from run to run in the index
    return [{"$sort": {"run": -1, "index": -1}}, first, {"$replaceRoot": {"newRoot": "$last"}}, {"$project": brief}]


def rows_from_sons(runs: Iterable[Mapping[str, Any]], lasts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``run_rows``.

    Args:
        runs: documents of runs.
        lasts: the last generation's document of each run that has one, by the run's name.
    """
    rows = [_row(run, lasts.get(run["_id"])) for run in runs]
    return sorted(rows, key=lambda row: (row["started"], row["name"]), reverse=True)


def _row(run: Mapping[str, Any], last: Mapping[str, Any] | None) -> dict[str, Any]:
    last = last or {}
    return {
        "name": run["_id"],
        "status": run["status"],
        "reason": run.get("reason") or last.get("decision", {}).get("reason", ""),
        "generations": last["index"] + 1 if last else 0,
        "labels": last.get("labels_by_status") or {},
        "n_reference_calls": last.get("n_reference_calls", 0),
        "n_labels_reused": last.get("n_labels_reused", 0),
        "paths": [
            {
                "name": path["path"],
                "barrier_forward_ev": (path.get("barrier") or {}).get("forward_ev"),
                "barrier_std_ev": path.get("barrier_std_ev"),
                "verified_barrier_ev": path.get("verified_barrier_ev"),
                "decision": path["decision"]["code"],
            }
            for path in last.get("paths", [])
        ],
        "started": run.get("started", ""),
        "finished": run.get("finished", ""),
    }


def settled_labels(database: Database[Any], run: str, beginnings: Collection[str]) -> set[str]:
    """Those of ``beginnings`` (of label keys) whose label is stored, ``ok``, and no generation of ``run`` doubts it."""
    blobs = FileShelf(database, BLOB_COLLECTION)
    sons_of_run = database["generations"].find({"run": run}, {"doubts": 1})
    doubted = {key for son in sons_of_run for key in inlined(son, blobs.get).get("doubts", {})}
    found = set()
    for start in beginnings:
        wanted = {"_id": {"$gte": start, "$lt": start + "g"}}  # keys are hexadecimal
        sons = list(database["labels"].find(wanted, {"status": 1}))
        if sons and all(son["status"] == "ok" and son["_id"] not in doubted for son in sons):
            found.add(start)
    return found


def run_bytes(database: Database[Any], name: str) -> int:
    """What a run, its generations, bands and steps take, uncompressed and without what lies in GridFS."""
    size = [{"$group": {"_id": None, "n": {"$sum": {"$bsonSize": "$$ROOT"}}}}]
    places = {"runs": {"_id": name}} | {place: {"run": name} for place in ("generations", "bands", "steps")}
    rows = (database[place].aggregate([{"$match": wanted}, *size]) for place, wanted in places.items())
    return sum(int(row["n"]) for found in rows for row in found)


def with_label_counts(database: Database[Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """A generation's document with ``labels_by_status``: how many labels it knows, by their status now."""
    counts = count_labels(generation, statuses_of(database, keys_of_generation(generation)))
    return {**generation, "labels_by_status": counts}


def keys_of_generation(son: Mapping[str, Any]) -> set[str]:
    """Every label asked for, or given, up to this generation."""
    own = (key for path in son.get("paths", []) for key in path.get("label_keys", []))
    return {*son.get("kinds", {}), *son.get("label_keys", []), *own}


def statuses_of(database: Database[Any], keys: Collection[str]) -> dict[str, str]:
    """The status of those that are stored."""
    wanted: Sequence[str] = sorted(keys)
    found: dict[str, str] = {}
    for start in range(0, len(wanted), KEYS_PER_QUERY):
        some = {"_id": {"$in": wanted[start : start + KEYS_PER_QUERY]}}
        found |= {son["_id"]: son["status"] for son in database["labels"].find(some, {"status": 1})}
    return found


def count_labels(son: Mapping[str, Any], statuses: Mapping[str, str]) -> dict[str, int]:
    """``labels_by_status`` of a generation's document, given the status of labels by key; doubted: ``rejected``."""
    doubts = son.get("doubts", {})
    known = [(key, statuses[key]) for key in keys_of_generation(son) if key in statuses]
    counts = Counter("rejected" if status == "ok" and key in doubts else status for key, status in known)
    return dict(sorted(counts.items()))
