"""A database that al-loop wrote with schema 1 (``data/schema-1.bson.xz``), opened by the al-loop of today."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient, monitoring
from pymongo.database import Database

from alcore.identity import sha256_hex
from storage import migrations
from storage.documents import SCHEMA_VERSION
from storage.fields import unpack_array
from storage.leases import MongoLeases
from storage.store import MongoStore

CHECKOUT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("make_dump", Path(__file__).with_name("make_dump.py"))
assert _spec is not None
assert _spec.loader is not None
make_dump = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_dump)
DUMP = make_dump.DATA / "schema-1.bson.xz"

NewOld = Callable[[], Database[Any]]


@pytest.fixture(scope="module")
def dumped() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = make_dump.read_dump(DUMP)
    return found


@pytest.fixture
def new_old(embedded_uri: str) -> Iterator[NewOld]:
    """Makes databases as they were with schema 1."""
    names: list[str] = []
    with MongoClient[Any](embedded_uri) as client:

        def make() -> Database[Any]:
            names.append(f"old_{uuid.uuid4().hex}")
            make_dump.restore_dump(DUMP, client[names[-1]])
            return client[names[-1]]

        yield make
        for name in names:
            client.drop_database(name)


def contents(database: Database[Any]) -> dict[str, list[dict[str, Any]]]:
    """All there is, leases aside."""
    kept = sorted(set(database.list_collection_names()) - {"leases"})
    found = {name: list(database[name].find().sort("_id", 1)) for name in kept}
    return {name: documents for name, documents in found.items() if documents}


def test_all_that_was_kept_with_schema_1_is_read_today(
    new_old: NewOld, embedded_uri: str, dumped: dict[str, list[dict[str, Any]]]
) -> None:
    old = new_old()
    assert old["schema"].find_one() == {"_id": "al_loop", "version": 1}
    store = MongoStore(embedded_uri, old.name)
    assert old["schema"].find_one() == {"_id": "al_loop", "version": SCHEMA_VERSION}
    for son in dumped["runs"]:
        run = store.load_run(son["_id"])
        assert run is not None
        assert (run.status, run.reason, run.started, run.finished) == tuple(
            son[name] for name in ("status", "reason", "started", "finished")
        )
        assert run.settings_sha256 == son["settings_sha256"]
        (sitting,) = run.sittings
        assert (sitting.started, sitting.settings_sha256) == (son["started"], son["settings_sha256"])
        assert sitting.versions == {name.replace("%2E", "."): version for name, version in son["versions"].items()}
        rows = {row["index"]: row for row in dumped["generations"] if row["run"] == run.name}
        generations = store.load_generations(run.name)
        assert [record.index for record in generations] == sorted(rows)
        for record in generations:
            row = rows[record.index]
            assert record.sitting == 0
            assert record.label_keys == tuple(row["label_keys"])
            assert record.n_reference_calls == row["n_reference_calls"]
            assert record.decision.code == row["decision"]["code"]
            (path,), (then,) = record.paths, row["paths"]
            assert (path.barrier.forward_ev if path.barrier else None) == then.get("barrier", {}).get("forward_ev")
            for band in [b for b in dumped["bands"] if (b["run"], b["generation"]) == (run.name, record.index)]:
                assert path.band is not None
                assert np.array_equal(path.band.positions, unpack_array(band["positions"]))
    labels = store.load_labels([son["_id"] for son in dumped["labels"]])
    for son in dumped["labels"]:
        label = labels[son["_id"]]
        assert (label.status, label.energy_ev) == (son["status"], son.get("energy_ev"))
        assert label.reason == son.get("reason", "")
        assert np.array_equal(label.structure.positions, unpack_array(son["structure"]["positions"]))
    assert {label.status for label in labels.values()} == {"ok", "crashed"}
    for son in dumped["models"]:
        assert sha256_hex(store.load_model(son["_id"])) == son["_id"]
    rows_now = {row["name"]: row for row in store.run_rows()}
    assert rows_now["quickstart"]["labels"] == {"ok": 8}
    assert rows_now["stopped"]["labels"] == {"ok": 5}
    assert "label_keys_1" not in old["generations"].index_information()
    store.close()


class Killed(BaseException):
    """The process ends here."""


class KillBefore(monitoring.CommandListener):
    """Ends the process before its ``nth`` write."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name in ("update", "insert", "delete", "findAndModify", "dropIndexes"):
            self.left -= 1
            if self.left < 0:
                raise Killed

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def migrated(database: Database[Any]) -> None:
    migrations.bring_up_to_date(database, MongoLeases(database["leases"]), "here")


def test_killed_at_any_write_the_next_process_goes_on_to_the_same(
    new_old: NewOld, embedded_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LEASE_S", 0.05)  # what a dead process held
    monkeypatch.setattr(migrations, "BATCH", 1)
    unbroken = new_old()
    migrated(unbroken)
    expected = contents(unbroken)
    kills, version = 0, 1
    for nth in range(50):
        old = new_old()
        with MongoClient[Any](embedded_uri, event_listeners=[(dying := KillBefore(nth))]) as client:
            try:
                migrated(client[old.name])
            except Killed:
                kills += 1
            version = (old["schema"].find_one() or {})["version"]
        migrated(old)
        assert contents(old) == expected
        if dying.left >= 0:
            break
    assert version == SCHEMA_VERSION
    assert kills >= 6


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(done=st.sets(st.integers(0, 10)), runs=st.sets(st.sampled_from(["quickstart", "stopped"])))
def test_half_done_is_brought_to_the_same(new_old: NewOld, done: set[int], runs: set[str]) -> None:
    """Any set of documents may be through already: a server orders writes as it likes."""
    whole, old = new_old(), new_old()
    migrated(whole)
    for run in runs:
        old["runs"].replace_one({"_id": run}, whole["runs"].find_one({"_id": run}) or {})
    sons = list(whole["generations"].find().sort("_id", 1))
    for k in done & set(range(len(sons))):
        old["generations"].replace_one({"_id": sons[k]["_id"]}, sons[k])
    migrated(old)
    assert contents(old) == contents(whole)


def test_two_processes_that_open_it_at_once_migrate_once(new_old: NewOld, embedded_uri: str) -> None:
    old = new_old()
    opened = f"MongoStore({embedded_uri!r}, {old.name!r})"
    code = f"from storage.store import MongoStore; print(len({opened}.list_runs()))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in both]
    assert [out.decode().split() for out, _ in answers] == [["2"], ["2"]], answers
    said = "".join(error.decode() for _, error in answers)
    assert said.count("brought from schema 1 to 2") == 1, said


def test_it_waits_for_the_one_who_migrates(
    new_old: NewOld, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = new_old()
    leases = MongoLeases(old["leases"])
    assert leases.take_lease([migrations.LEASE], "another", 60)

    def wait(seconds: float) -> None:
        """Meanwhile the other one has finished."""
        assert (old["schema"].find_one() or {})["version"] == 1
        old["schema"].update_one({}, {"$set": {"version": SCHEMA_VERSION}})

    monkeypatch.setattr(migrations.time, "sleep", wait)
    with caplog.at_level(logging.WARNING):
        migrated(old)
    assert caplog.text.count("waits for another process") == 1
    assert old["generations"].count_documents({"sitting": {"$exists": True}}) == 0


def test_fields_of_a_later_al_loop_do_not_keep_one_from_reading(new_old: NewOld, embedded_uri: str) -> None:
    old = new_old()
    store = MongoStore(embedded_uri, old.name)
    before = store.load_generations("quickstart")
    old["runs"].update_many({}, {"$set": {"mood": "good", "sittings.0.chair": 4}})
    old["labels"].update_many({}, {"$set": {"isotopes": [1], "structure.isotopes": [1]}})
    new = {"weather": {"a": 1}, "paths.$[].colour": "red", "decision.by": "a vote", "calibration.of": 3}
    old["generations"].update_many({}, {"$set": new})
    old["generations"].update_many({"paths.barrier": {"$exists": True}}, {"$set": {"paths.$[].barrier.zpe_ev": 0.1}})
    old["bands"].update_many({}, {"$set": {"stress": b"1", "template.isotopes": [1]}})
    run = store.load_run("quickstart")
    assert run is not None
    assert run.status == "converged"
    after = store.load_generations("quickstart")
    assert [r.decision for r in after] == [r.decision for r in before]
    assert len(store.load_labels(before[-1].label_keys)) == len(before[-1].label_keys)
    assert store.run_rows()[0]["labels"] == {"ok": 5}
    store.close()
