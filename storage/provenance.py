"""Where a barrier came from, asked of MongoDB in one query: run, generations, labels, models, and whoever helped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bson import Int64
from pymongo.database import Database

from storage.fields import decode_plain

Stages = list[dict[str, Any]]

HEAVY_OF_PATH = ("initial", "final")
KEYS_PER_QUERY = 5000
KEYS_OF_GENERATION = ("kinds", "label_keys")
KEYS_OF_PATH = ("initial_label", "final_label", "saddle_key")
HEAVY_OF_LABEL = ("structure", "forces", "stress", "magnetic_moments")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known of how one generation's barriers came about, as plain values without structures and arrays.

    Attributes:
        run: ``alcore.types.RunRecord``.
        generations: ``GenerationRecord`` of this one and all before it, in order; without their bands.
        labels: all labels this generation knows, failed ones too, by key: ``Label`` with ``formula``, ``n_atoms``,
            ``fmax_ev_per_ang`` and ``created``.
        models: every model these generations name and the store has, by sha256: ``size_bytes``, ``description``
            (what made it) and ``created``.
        others: the other runs that computed some of the labels, by name, as ``run``.
    """

    run: dict[str, Any]
    generations: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)


def provenance_stages(run: str, generation: int | None) -> Stages:
    """The aggregation, over the collection of runs: one row for each thing, ``part`` says what it is.

    Rows instead of one nested document, which 16 MB would bound. Needs MongoDB 4.4 or later.

    Args:
        run: its name.
        generation: index of the latest generation that counts; None: all.
    """
    mine: dict[str, Any] = {"run": run} | ({} if generation is None else {"index": {"$lte": generation}})
    last: Stages = [{"$match": mine}, {"$sort": {"index": -1}}, {"$limit": 1}]
    asked = {"$map": {"input": {"$objectToArray": {"$ifNull": ["$kinds", {}]}}, "in": "$$this.k"}}
    lists = ["$label_keys", *(f"$paths.{name}" for name in KEYS_OF_PATH)]
    keys = {"$setUnion": [asked, *({"$cond": [{"$isArray": name}, name, []]} for name in lists)]}
    labels: Stages = [*last, {"$project": {"keys": keys}}, *_joined("labels", "keys")]
    helpers: Stages = [{"$group": {"_id": "$details.computed_by"}}, {"$match": {"_id": {"$nin": [None, run]}}}]
    members: Stages = [{"$match": mine}, {"$unwind": "$surrogate.members"}, {"$group": {"_id": "$surrogate.members"}}]
    light: Stages = [{"$unset": [f"paths.{name}" for name in HEAVY_OF_PATH]}, {"$sort": {"index": 1}}]
    return [
        {"$match": {"_id": run}},
        {"$set": {"part": "run"}},
        *_also("generations", "generation", [{"$match": mine}, *light]),
        *_also("generations", "label", [*labels, {"$unset": list(HEAVY_OF_LABEL)}]),
        *_also("generations", "model", [*members, *_joined("models", "_id")]),
        *_also("generations", "other", [*labels, *helpers, *_joined("runs", "_id")]),
    ]


def find_rows(
    database: Database[Any], run: str, generation: int | None, inlined: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """What ``provenance_stages`` finds, and what it cannot see: the labels that a generation names only in a file.

    Args:
        database: of an open store.
        run: its name.
        generation: index of the latest generation that counts; None: all.
        inlined: brings back what of a document lies in a file.
    """
    found = list(database["runs"].aggregate(provenance_stages(run, generation)))
    rows = [inlined(row) for row in found]
    mine = [k for k, row in enumerate(rows) if row["part"] == "generation"]
    last = max(mine, key=lambda k: rows[k]["index"], default=None)
    if last is None or all(found[last].get(name) == rows[last].get(name) for name in KEYS_OF_GENERATION):
        return rows
    missing = sorted(_keys(rows[last]) - {row["_id"] for row in rows if row["part"] == "label"})
    without = dict.fromkeys(HEAVY_OF_LABEL, 0)
    for start in range(0, len(missing), KEYS_PER_QUERY):
        wanted = {"_id": {"$in": missing[start : start + KEYS_PER_QUERY]}}
        rows += [{**inlined(label), "part": "label"} for label in database["labels"].find(wanted, without)]
    named = {row.get("details", {}).get("computed_by") for row in rows if row["part"] == "label"}
    others = sorted(named - {None, run} - {row["_id"] for row in rows if row["part"] == "other"})
    rows += [{**other, "part": "other"} for other in database["runs"].find({"_id": {"$in": others}})]
    return rows


def _keys(generation: Mapping[str, Any]) -> set[str]:
    """Of the labels that count for a generation's barriers."""
    own = {path.get(name) for path in generation.get("paths", []) for name in KEYS_OF_PATH}
    return ({*generation.get("kinds", {}), *generation.get("label_keys", [])} | own) - {None}


def _joined(collection: str, keys: str) -> Stages:
    """The documents of ``collection`` whose id stands in the field ``keys``, each a row of its own."""
    lookup = {"from": collection, "localField": keys, "foreignField": "_id", "as": "found"}
    return [{"$lookup": lookup}, {"$unwind": "$found"}, {"$replaceRoot": {"newRoot": "$found"}}]


def _also(collection: str, part: str, stages: Stages) -> Stages:
    return [{"$unionWith": {"coll": collection, "pipeline": [*stages, {"$set": {"part": part}}]}}]


def provenance_from_rows(rows: Iterable[Mapping[str, Any]]) -> Provenance | None:
    """What ``provenance_stages`` found; None if there is no such run."""
    parts: dict[str, list[dict[str, Any]]] = {"run": [], "generation": [], "label": [], "model": [], "other": []}
    for row in rows:
        values = {name: value for name, value in row.items() if name not in ("part", "file", "used")}
        parts[row["part"]].append(_plain(values))
    if not parts["run"]:
        return None

    def by_id(part: str, name: str) -> dict[str, dict[str, Any]]:
        named = ({name: row.pop("_id"), **row} for row in parts[part])
        return {row[name]: row for row in sorted(named, key=lambda row: str(row[name]))}

    generations = sorted(parts["generation"], key=lambda row: row["index"])
    return Provenance(
        run=next(iter(by_id("run", "name").values())),
        generations=[{name: value for name, value in row.items() if name != "_id"} for row in generations],
        labels=by_id("label", "key"),
        models=by_id("model", "sha256"),
        others=by_id("other", "name"),
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of BSON: escaped keys as they were, times as ISO 8601 to the second in UTC."""

    def dated(value: Any) -> Any:
        if isinstance(value, datetime):
            return value.isoformat(timespec="seconds").removesuffix("+00:00") + "+00:00"
        if isinstance(value, Int64):
            return int(value)
        if isinstance(value, Mapping):
            return {key: dated(item) for key, item in value.items()}
        return [dated(item) for item in value] if isinstance(value, list) else value

    decoded: dict[str, Any] = decode_plain(dated(values))
    return decoded


def rows_of_parts(
    run: str,
    generation: int | None,
    *,
    runs: Mapping[str, Mapping[str, Any]],
    generations: Sequence[Mapping[str, Any]],
    labels: Mapping[str, Mapping[str, Any]],
    models: Mapping[str, Mapping[str, Any]],
) -> Iterable[dict[str, Any]]:
    """The same rows from documents in memory: what ``provenance_stages`` means, in Python."""

    def light(row: Mapping[str, Any], heavy: Sequence[str]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in heavy}

    if run in runs:
        yield {**runs[run], "part": "run"}
    mine = [g for g in generations if g["run"] == run and (generation is None or g["index"] <= generation)]
    for row in mine:
        yield {**row, "paths": [light(path, HEAVY_OF_PATH) for path in row.get("paths", [])], "part": "generation"}
    keys = _keys(mine[-1]) if mine else set()
    found = [labels[key] for key in keys if key in labels]
    for label in found:
        yield {**light(label, HEAVY_OF_LABEL), "part": "label"}
    for sha256 in {member for row in mine for member in row.get("surrogate", {}).get("members", [])} & set(models):
        yield {**models[sha256], "part": "model"}
    for name in {label.get("details", {}).get("computed_by") for label in found} - {run}:
        if name in runs:
            yield {**runs[name], "part": "other"}
