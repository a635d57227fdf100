"""What only a real server shows: queries, transactions, refusals."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mongoengine import Q, connect, disconnect
from pymongo import MongoClient

from alcore.errors import StoreError
from storage.documents import (
    SCHEMA_VERSION,
    BandDocument,
    GenerationDocument,
    LabelDocument,
    ModelDocument,
    RunDocument,
)
from storage.store import MongoStore, open_store

NewStore = Callable[..., MongoStore]


def test_readme_query_barrier_error_over_generations(mongo_store: MongoStore, records: Any) -> None:
    errors = [None, 0.08, -0.02, 0.004]
    for index, error in enumerate(errors):
        mongo_store.save_generation(records.generation("cu-vacancy", index, error))
    rows = [
        (generation.index, generation.dataset_size, path.barrier.forward_ev, path.error_to_verified_ev)
        for generation in mongo_store.query(GenerationDocument, run="cu-vacancy").order_by("index")
        for path in generation.paths
    ]
    assert rows == [(i, 2, 0.7 + (error or 0.0), error) for i, error in enumerate(errors)]


def test_readme_query_labels_of_a_formula(mongo_store: MongoStore, records: Any) -> None:
    fast, slow = records.label(0, fmax=0.2), records.label(1, fmax=0.01)
    other = records.label(2, fmax=0.3, calculator="tblite")
    for label in (fast, slow, other):
        mongo_store.save_label(label, "cu-vacancy")
    found = mongo_store.query(LabelDocument, formula="AlCu2", calculator="emt", fmax_ev_per_ang__gt=0.05)
    assert [document.key for document in found] == [fast.key]
    assert found[0].fmax_ev_per_ang == pytest.approx(0.2)
    assert found[0].structure.positions.tobytes() == fast.structure.positions.tobytes()
    assert mongo_store.query(LabelDocument, elements="Al", runs="cu-vacancy", status="ok").count() == 3


def test_readme_query_runs_beyond_a_tolerance(mongo_store: MongoStore, records: Any) -> None:
    for run, error in [("good", 0.004), ("high", 0.05), ("low", -0.05), ("unverified", None)]:
        mongo_store.save_generation(records.generation(run, 0, error))
    off = Q(paths__error_to_verified_ev__gt=0.01) | Q(paths__error_to_verified_ev__lt=-0.01)
    assert sorted(mongo_store.query(GenerationDocument).filter(off).distinct("run")) == ["high", "low"]


def test_documents_can_be_queried_through_a_connection_of_ones_own(
    embedded_uri: str, mongo_store: MongoStore, records: Any
) -> None:
    mongo_store.save_run(records.run("r", status="converged", settings={"model": {"strategy": "naive"}}))
    connect(mongo_store._database.name, host=embedded_uri, uuidRepresentation="standard")
    try:
        assert [run.name for run in RunDocument.objects(settings__model__strategy="naive")] == ["r"]
    finally:
        disconnect()


def test_a_label_remembers_when_it_was_first_stored(new_mongo_store: NewStore, records: Any) -> None:
    times = iter(datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2))
    store = new_mongo_store(now=lambda: next(times))
    store.save_label(records.label(status="crashed"))
    store.save_label(records.label())
    (found,) = store.query(LabelDocument, created__lt=datetime(2026, 1, 2, tzinfo=UTC))
    assert (found.created, found.status) == (datetime(2026, 1, 1), "ok")  # noqa: DTZ001 - MongoDB gives UTC without a zone


def test_saving_twice_leaves_the_database_as_it_was(mongo_store: MongoStore, records: Any) -> None:
    def save() -> dict[str, Any]:
        mongo_store.save_run(records.run("r"))
        mongo_store.save_generation(records.generation("r", 0))
        mongo_store.save_label(records.label(), "r")
        mongo_store.save_label(records.label(5, "crashed"), "r")
        mongo_store.save_model(b"weights", {"epochs": 1})
        database = mongo_store._database
        return {name: list(database[name].find().sort("_id", 1)) for name in sorted(database.list_collection_names())}

    assert save() == save()


def test_a_generation_is_saved_whole_or_not_at_all(mongo_store: MongoStore, records: Any) -> None:
    """The band is written first; then the generation is refused."""
    mongo_store._database.command("collMod", "generations", validator={"index": {"$lt": 1}})
    mongo_store.save_generation(records.generation("r", 0))
    with pytest.raises(StoreError, match="failed validation"):
        mongo_store.save_generation(records.generation("r", 1))
    assert mongo_store.query(BandDocument, run="r").distinct("generation") == [0]
    assert [record.index for record in mongo_store.load_generations("r")] == [0]


def test_without_transactions_a_half_saved_generation_does_not_count(
    new_mongo_store: NewStore, standalone_uri: str, records: Any
) -> None:
    store = new_mongo_store(standalone_uri)
    store._database.command("collMod", "generations", validator={"index": {"$lt": 1}})
    with pytest.raises(StoreError, match="failed validation"):
        store.save_generation(records.generation("r", 1))
    assert store.load_generations("r") == []


def test_an_upload_that_was_cut_off_is_no_model(mongo_store: MongoStore) -> None:
    weights = bytes(300_000)
    mongo_store._models._bucket.upload_from_stream("left by a killed process", weights)
    sha256 = mongo_store.save_model(weights, {"epochs": 1})
    assert mongo_store.load_model(sha256) == weights
    (found,) = mongo_store.query(ModelDocument, description__epochs=1)
    assert (found.sha256, found.size_bytes) == (sha256, 300_000)
    mongo_store._database["models.chunks"].update_many({}, {"$set": {"data": b"x"}})
    with pytest.raises(StoreError):
        mongo_store.load_model(sha256)


def test_stores_in_one_process_do_not_mix(
    new_mongo_store: NewStore, embedded_uri: str, standalone_uri: str, records: Any
) -> None:
    one, other = new_mongo_store(embedded_uri), new_mongo_store(standalone_uri)
    one.save_label(records.label(), "r")
    assert other.query(LabelDocument).count() == 0
    assert one.query(LabelDocument).count() == 1


def test_a_newer_schema_is_refused(new_mongo_store: NewStore) -> None:
    store = new_mongo_store()
    store._database["schema"].update_one({"_id": "al_loop"}, {"$inc": {"version": 1}})
    with pytest.raises(StoreError, match=f"schema version {SCHEMA_VERSION + 1}.*update al-loop"):
        new_mongo_store()


def test_every_declared_index_exists(mongo_store: MongoStore) -> None:
    indexes = mongo_store._database["labels"].index_information().values()
    assert [("formula", 1), ("calculator", 1), ("fmax_ev_per_ang", 1)] in [index["key"] for index in indexes]
    generations = mongo_store._database["generations"].index_information().values()
    assert any(index["key"] == [("run", 1), ("index", 1)] and index.get("unique") for index in generations)


def test_an_unreachable_server_is_named_without_credentials(tmp_path: Path) -> None:
    with socket.socket() as nobody:  # bound, but nobody listens
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(StoreError) as caught:
            open_store(f"mongodb://ann:s3cret@127.0.0.1:{port}/?replicaSet=x", tmp_path)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "cannot be reached" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dies_under_the_store_is_a_store_error(mongo_store: MongoStore) -> None:
    """The connection is closed under it, as when the server goes; the error is ours."""
    proxy = MongoStore.__new__(MongoStore)
    proxy.address = "127.0.0.1:1"
    proxy._database = MongoClient("127.0.0.1", 1, serverSelectionTimeoutMS=50)["x"]
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1: MongoDB cannot be reached"):
        proxy.load_run("r")


@pytest.mark.parametrize(
    "uri",
    [
        "mongo://ann:s3cret@host",
        "mongodb://ann:s3cret@host:port",
        "mongodb://ann:s3c/ret@host:27017",
        "mongodb://ann:s3c@ret@host",
        "mongodb://",
    ],
)
def test_a_malformed_address_is_refused_without_its_password(uri: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no valid MongoDB address") as caught:
        open_store(uri, tmp_path)
    assert "s3c" not in str(caught.value)
    assert caught.value.__suppress_context__  # nor does the traceback say it


def test_a_bad_database_name_is_refused(embedded_uri: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="a/b"):
        open_store(embedded_uri, tmp_path, "a/b")


def test_a_missing_band_is_said(mongo_store: MongoStore, records: Any) -> None:
    mongo_store.save_generation(records.generation("r", 0))
    mongo_store.query(BandDocument).delete()
    with pytest.raises(StoreError, match="band of path 'hop' is missing"):
        mongo_store.load_generations("r")


def test_paths_of_one_generation_keep_their_own_bands(mongo_store: MongoStore, records: Any) -> None:
    record = records.generation("r", 0)
    second = dataclasses.replace(record.paths[0], path="back", band=records.band("back", n_images=7))
    mongo_store.save_generation(dataclasses.replace(record, paths=(record.paths[0], second)))
    (loaded,) = mongo_store.load_generations("r")
    assert [(path.path, len(path.band.positions)) for path in loaded.paths if path.band] == [("hop", 5), ("back", 7)]
