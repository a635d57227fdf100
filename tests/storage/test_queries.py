"""What ``al-loop status`` and the README ask goes by indexes, and no document comes near MongoDB's limit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from bson import encode

from alcore import types
from storage import files, mapping, migrations, queries
from storage.documents import GenerationDocument
from storage.files import DOCUMENT_BYTES, outlined
from storage.store import MongoStore


def stages(plan: Any) -> set[str]:
    """Every stage anywhere in an explained plan, but of rejected ones."""
    if isinstance(plan, dict):
        own = {plan["stage"]} if isinstance(plan.get("stage"), str) else set()
        return own.union(*(stages(item) for key, item in plan.items() if key != "rejectedPlans"))
    return set().union(*(stages(item) for item in plan)) if isinstance(plan, list) else set()


OFF = {"$or": [{"paths.error_to_verified_ev": {"$gt": 0.01}}, {"paths.error_to_verified_ev": {"$lt": -0.01}}]}


@pytest.mark.parametrize(
    "command",
    [
        {"find": "generations", "filter": {"run": "r"}, "sort": {"index": 1}},
        {"find": "labels", "filter": {"formula": "Cu", "calculator": "emt", "fmax_ev_per_ang": {"$gt": 0.05}}},
        {"distinct": "generations", "key": "run", "query": OFF},
        {"aggregate": "generations", "pipeline": queries.last_generations("r"), "cursor": {}},
        {"aggregate": "generations", "pipeline": queries.last_generations(), "cursor": {}},
        {"find": "bands", "filter": {"run": "r"}},
        {"find": "steps", "filter": {"run": "r", "generation": 1, "name": "probe/hop"}},
        {"find": "generations", "filter": {"paths.label_keys": "a"}},
        {"aggregate": "labels", "pipeline": [{"$match": {"runs": "r"}}, {"$group": {"_id": "$status"}}], "cursor": {}},
    ],
)
def test_every_question_goes_by_an_index(mongo_store: MongoStore, records: Any, command: dict[str, Any]) -> None:
    for run in ("r", "s"):
        mongo_store.save_run(records.run(run))
        for index in range(3):
            mongo_store.save_generation(records.generation(run, index, error_ev=0.05 - 0.02 * index))
    for seed in range(3):
        mongo_store.save_label(records.label(seed), "r")
    used = stages(mongo_store.ask(lambda database: database.command("explain", command, verbosity="queryPlanner")))
    assert used & {"IXSCAN", "DISTINCT_SCAN"}
    assert "COLLSCAN" not in used


def test_rows_say_what_the_last_generations_know(store: Any, records: Any) -> None:
    good, odd, bad, given = (records.label(k, "crashed" if k == 2 else "ok") for k in range(4))
    for name, started in (("old", "2026-01-01"), ("new", "2026-02-01"), ("empty", "2026-01-15")):
        store.save_run(records.run(name, started=started, reason="why" if name == "new" else ""))
    for label in (good, odd, bad, given):
        store.save_label(label, "old")
    for index in range(3):
        kinds = {good.key: "initial", odd.key: "saddle", bad.key: "saddle", "never stored": "saddle"}
        changes = {"label_keys": (good.key, given.key), "kinds": kinds, "doubts": {odd.key: "odd"}}
        decision = types.Decision(stop=False, code="continue", reason=f"reason {index}")
        store.save_generation(records.generation("old", index, error_ev=0.05, decision=decision, **changes))
    store.save_generation(records.generation("new", 0))
    rows = store.run_rows()
    assert [row["name"] for row in rows] == ["new", "empty", "old"]
    assert [row["generations"] for row in rows] == [1, 0, 3]
    assert [row["reason"] for row in rows] == ["why", "", "reason 2"]
    old = rows[2]
    assert store.run_rows("old") == [old]
    assert old["labels"] == {"crashed": 1, "ok": 2, "rejected": 1}
    assert old["n_reference_calls"] == 4
    (path,) = old["paths"]
    assert path["barrier_forward_ev"] == pytest.approx(0.75)
    assert path["verified_barrier_ev"] == 0.7
    assert store.run_rows("none") == []


def test_what_a_bulky_generation_keeps_in_a_file_is_found(
    mongo_store: MongoStore, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and doubts are no longer in the document itself."""
    monkeypatch.setattr(files, "DOCUMENT_BYTES", 1)
    monkeypatch.setattr(files, "SMALL_BYTES", 10)
    good, odd = records.label(0, details={"computed_by": "s"}), records.label(1)
    asked = {"kinds": {odd.key: "saddle"}, "label_keys": (good.key,), "doubts": {odd.key: "odd"}}
    for name in ("r", "s"):
        mongo_store.save_run(records.run(name))
    for label in (good, odd):
        mongo_store.save_label(label, "r")
    mongo_store.save_generation(records.generation("r", 0, **asked))
    (son,) = mongo_store.ask(lambda database: list(database["generations"].find({"run": "r"})))
    assert "%bson" in son["doubts"]
    starts = [good.key[:16], odd.key[:16]]
    assert mongo_store.ask(lambda database: queries.settled_labels(database, "r", starts)) == {starts[0]}
    found = mongo_store.provenance("r")
    assert found is not None
    assert (set(found.labels), list(found.others)) == ({good.key, odd.key}, ["s"])
    assert "structure" not in found.labels[good.key]
    assert found.generations[0]["kinds"] == asked["kinds"]
    mongo_store.ask(lambda database: database["generations"].update_many({}, {"$unset": {"sitting": 1}}))
    mongo_store.ask(lambda database: migrations._count_labels(database, lambda: None))
    assert mongo_store.run_rows("r")[0]["labels"] == {"ok": 1, "rejected": 1}


def large_generation(
    records: Any, n_hops: int, n_atoms: int, n_labels: int, n_residuals: int
) -> types.GenerationRecord:
    rng = np.random.default_rng(0)
    keys = tuple(f"{k:064x}" for k in range(n_labels))
    atoms = records.structure(0, (29,) * n_atoms)
    one = records.generation("r", 0).paths[0]
    residuals = tuple(
        types.Residual(
            key=key,
            path="hop",
            kind="uncertain",
            generation=0,
            predicted_ev=0.1,
            labelled_ev=0.2,
            sigma_committee_ev=0.01,
            sigma_posterior_ev=0.02,
            sigma_ev=0.03,
            fmax_ev_per_ang=0.4,
            by_lead_ev={"prior": 0.1, "committee": 0.2},
        )
        for key in keys[:n_residuals]
    )
    paths = tuple(
        dataclasses.replace(
            one,
            path=f"hop-{k}",
            initial=atoms.moved(rng.normal(size=(n_atoms, 3))),
            final=atoms.moved(rng.normal(size=(n_atoms, 3))),
            band=None,
            label_keys=keys[:n_residuals],
            residuals=residuals,
        )
        for k in range(n_hops)
    )
    return records.generation("r", 0, paths=paths, label_keys=keys, kinds=dict.fromkeys(keys, "uncertain"))


def test_fifty_hops_of_two_hundred_atoms_stay_small(records: Any) -> None:
    son = mapping.to_son(mapping.generation_to_documents(large_generation(records, 50, 200, 2000, 11))[0])
    assert len(encode(son)) < DOCUMENT_BYTES / 2
    assert outlined(son, lambda data: pytest.fail("nothing has to go")) == son


def test_what_no_document_could_hold_is_stored_and_found(mongo_store: MongoStore, records: Any) -> None:
    record = large_generation(records, 60, 4500, 40_000, 300)
    (document, _) = mapping.generation_to_documents(record)
    whole = encode(mapping.to_son(document))
    assert len(whole) > 16 * 1024**2
    mongo_store.save_generation(record)
    size = [{"$project": {"n": {"$bsonSize": "$$ROOT"}}}]
    (row,) = mongo_store.ask(lambda database: list(database["generations"].aggregate(size)))
    assert row["n"] < DOCUMENT_BYTES
    (loaded,) = mongo_store.load_generations("r")
    assert encode(mapping.to_son(mapping.generation_to_documents(loaded)[0])) == whole
    (found,) = mongo_store.query(GenerationDocument, paths__error_to_verified_ev=None, run="r")
    assert found.dataset_size == 40_000
    step = {"inputs": "x", "result": [{"name": f"{k}" * 20, "values": list(range(200))} for k in range(11_000)]}
    assert len(encode(step)) > 16 * 1024**2
    mongo_store.save_step("r", 1, "probe/hop", step)
    assert mongo_store.load_step("r", 1, "probe/hop") == step
