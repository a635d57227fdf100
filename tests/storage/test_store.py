"""One behaviour, three stores: in memory, on the embedded replica set, on a stand-alone server."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from alcore.errors import StoreError
from alcore.identity import sha256_hex
from alcore.protocols import RecordStore


@pytest.fixture
def same() -> Any:
    """Compares two alcore objects by the bytes they are stored as."""
    from bson import encode

    from storage import mapping

    def compare(left: Any, right: Any) -> bool:
        def stored(record: Any) -> list[bytes]:
            if hasattr(record, "paths"):
                generation, bands = mapping.generation_to_documents(record)
                return [encode(mapping.to_son(document)) for document in (generation, *bands)]
            to_document = mapping.label_to_document if hasattr(record, "key") else mapping.run_to_document
            return [encode(mapping.to_son(to_document(record)))]

        return stored(left) == stored(right)

    return compare


def test_an_empty_store_knows_nothing(store: RecordStore) -> None:
    assert store.load_run("none") is None
    assert store.list_runs() == []
    assert store.load_generations("none") == []
    assert store.load_labels(["none"]) == {}
    assert store.load_labels([]) == {}
    with pytest.raises(StoreError, match="nothing with sha256"):
        store.load_model("0" * 64)


def test_runs_are_replaced_by_name_and_listed_newest_first(store: RecordStore, same: Any, records: Any) -> None:
    store.save_run(records.run("old", started="2026-01-01T00:00:00+00:00"))
    store.save_run(records.run("new", started="2026-02-01T00:00:00+00:00"))
    finished = records.run("old", status="converged", finished="2026-03-01T00:00:00+00:00", reason="done")
    store.save_run(finished)
    store.save_run(finished)
    assert [run.name for run in store.list_runs()] == ["new", "old"]
    loaded = store.load_run("old")
    assert same(loaded, finished)


def test_credentials_in_settings_are_not_stored(store: RecordStore, records: Any) -> None:
    settings = {"store": {"mongodb_uri": "mongodb://ann:s3cret@db.example:27017/x?tls=true"}, "images": [5]}
    store.save_run(records.run("r", settings=settings))
    loaded = store.load_run("r")
    assert loaded is not None
    assert loaded.settings == {"store": {"mongodb_uri": "mongodb://***@db.example:27017/x?tls=true"}, "images": [5]}


def test_generations_come_back_in_order_with_their_bands(store: RecordStore, same: Any, records: Any) -> None:
    saved = [records.generation("r", index, error_ev=0.05) for index in (0, 2, 1)]
    for record in [*saved, records.generation("other", 0)]:
        store.save_generation(record)
    loaded = store.load_generations("r")
    assert [record.index for record in loaded] == [0, 1, 2]
    assert same(loaded[1], saved[2])
    assert loaded[1].paths[0].band is not None
    assert np.array_equal(loaded[1].paths[0].band.positions, records.band("hop").positions)


def test_saving_a_generation_again_replaces_all_of_it(store: RecordStore, same: Any, records: Any) -> None:
    record = records.generation("r", 0)
    store.save_generation(record)
    store.save_generation(record)
    assert len(store.load_generations("r")) == 1
    bandless = dataclasses.replace(record, paths=(dataclasses.replace(record.paths[0], band=None, barrier=None),))
    store.save_generation(bandless)
    (loaded,) = store.load_generations("r")
    assert same(loaded, bandless)
    assert loaded.paths[0].band is None


def test_labels_are_found_by_key_in_the_order_asked(store: RecordStore, same: Any, records: Any) -> None:
    saved = [records.label(seed) for seed in range(3)]
    for label in saved:
        store.save_label(label)
    keys = [saved[2].key, "absent", saved[0].key, saved[2].key]
    loaded = store.load_labels(keys)
    assert list(loaded) == [saved[2].key, saved[0].key]
    assert same(loaded[saved[2].key], saved[2])
    assert not loaded[saved[0].key].forces.flags.writeable


@pytest.mark.parametrize("status", ["unconverged", "crashed", "timeout", "rejected"])
def test_an_ok_label_is_never_replaced(store: RecordStore, same: Any, status: Any, records: Any) -> None:
    good = records.label()
    store.save_label(good)
    store.save_label(records.label(status=status, reason="scf"))
    store.save_label(records.label(energy_ev=17.0))
    assert same(store.load_labels([good.key])[good.key], good)


def test_a_computed_label_replaces_a_derived_one_and_never_the_reverse(
    store: RecordStore, same: Any, records: Any
) -> None:
    """What follows by symmetry stands in for a calculation until there is one."""
    derived = records.label(energy_ev=1.0, details={"equivalent_to": "another"})
    again = records.label(energy_ev=2.0, details={"equivalent_to": "a third"})
    crashed = records.label(status="crashed")
    first, second = records.label(energy_ev=3.0), records.label(energy_ev=4.0)
    for label, stays in (
        (crashed, crashed),
        (derived, derived),
        (again, derived),
        (crashed, derived),
        (first, first),
        (derived, first),
        (second, first),
        (crashed, first),
    ):
        store.save_label(label, "r")
        assert same(store.load_labels([label.key])[label.key], stays)
    assert store.count_labels_by_status("r") == {"ok": 1}


def test_a_failure_is_replaced_wholly(store: RecordStore, same: Any, records: Any) -> None:
    rejected = records.label(status="rejected", energy_ev=1.0, forces=np.ones((3, 3)), stress=np.ones(6), reason="huge")
    crashed, good = records.label(status="crashed"), records.label()
    for label in (rejected, crashed, good):
        store.save_label(label, "r")
        assert same(store.load_labels([label.key])[label.key], label)
    assert store.count_labels_by_status("r") == {"ok": 1}


def test_labels_are_counted_by_the_runs_that_used_them(store: Any, records: Any) -> None:
    for seed, status in enumerate(["ok", "ok", "crashed"]):
        store.save_label(records.label(seed, status), "one")
    store.save_label(records.label(0), "two")
    store.save_label(records.label(0), "two")
    store.save_label(records.label(3))
    assert store.count_labels_by_status(None) == {"crashed": 1, "ok": 3}
    assert store.count_labels_by_status("one") == {"crashed": 1, "ok": 2}
    assert store.count_labels_by_status("two") == {"ok": 1}
    assert store.count_labels_by_status("three") == {}


def test_models_are_known_by_their_content(store: RecordStore) -> None:
    weights = np.random.default_rng(0).bytes(1_000_000)  # several GridFS chunks
    sha256 = store.save_model(weights, {"strategy": "naive", "epochs": 3})
    assert sha256 == sha256_hex(weights) == store.save_model(weights, {"strategy": "naive", "epochs": 3})
    assert store.load_model(sha256) == weights
    assert store.load_model(store.save_model(b"", {})) == b""
    with pytest.raises(StoreError, match="cannot be stored"):
        store.save_model(b"x", {"module": object()})


def test_a_deleted_run_leaves_its_labels(store: Any, records: Any) -> None:
    label = records.label()
    for name in ("one", "two"):
        store.save_run(records.run(name))
        store.save_generation(records.generation(name, 0))
        store.save_label(label, name)
    assert store.delete_run("one") is True
    assert store.delete_run("one") is False
    assert [run.name for run in store.list_runs()] == ["two"]
    assert store.load_generations("one") == []
    assert len(store.load_generations("two")) == 1
    assert store.count_labels_by_status("one") == {}
    assert store.count_labels_by_status("two") == {"ok": 1}


def test_what_a_deleted_run_computed_is_not_the_next_one_s_of_that_name(store: Any, records: Any) -> None:
    store.save_run(records.run("one"))
    mine, borrowed = records.label(1, details={"computed_by": "one"}), records.label(2, details={"computed_by": "two"})
    for label in (mine, borrowed):
        store.save_label(label, "one")
    store.delete_run("one")
    found = store.load_labels([mine.key, borrowed.key])
    assert [found[label.key].details["computed_by"] for label in (mine, borrowed)] == ["one (removed)", "two"]


def test_a_large_band_is_stored_like_a_small_one(store: RecordStore, same: Any, records: Any) -> None:
    """Two arrays of 8.6 MB each: no document could hold them."""
    big = records.band("hop", n_images=12, n_atoms=30_000)
    record = records.generation("r", 0)
    record = dataclasses.replace(record, paths=(dataclasses.replace(record.paths[0], band=big),))
    store.save_generation(record)
    (loaded,) = store.load_generations("r")
    assert loaded.paths[0].band is not None
    assert loaded.paths[0].band.positions.tobytes() == big.positions.tobytes()
    assert loaded.paths[0].band.forces.tobytes() == big.forces.tobytes()


def test_many_threads_agree_on_one_label(store: Any, same: Any, records: Any) -> None:
    """Whoever comes when: the ok label wins, and every run is noted."""
    good, bad = records.label(), records.label(status="crashed")
    barrier = threading.Barrier(8)

    def save(i: int) -> None:
        barrier.wait()
        store.save_label(good if i == 3 else bad, f"run{i}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(8)))
    assert same(store.load_labels([good.key])[good.key], good)
    assert [store.count_labels_by_status(f"run{i}") for i in range(8)] == [{"ok": 1}] * 8
