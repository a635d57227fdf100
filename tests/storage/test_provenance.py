"""From a barrier back to what made it, in one query; the store in memory gives the same answer as MongoDB."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pymongo import monitoring

from alcore.types import Sitting
from storage.memory import MemoryStore
from storage.store import MongoStore

Store = MongoStore | MemoryStore


def fill(store: Store, records: SimpleNamespace) -> SimpleNamespace:
    """Run ``b`` of two generations that uses two labels of run ``a`` and one of its own, and a model a generation."""
    foreign = [records.label(k, details={"computed_by": "a", "generation": k}) for k in (0, 1)]
    own = records.label(2, details={"computed_by": "b", "generation": 1, "a.b": {"$x": 2**70}})
    failed = records.label(3, status="crashed", details={"computed_by": "b", "generation": 1})
    unrelated = records.label(4, details={"computed_by": "c", "generation": 0})
    for label in foreign:
        store.save_label(label, "a")
    for label in (*foreign, own, failed):
        store.save_label(label, "b")
    store.save_label(unrelated, "c")
    models = [store.save_model(weights, {"generation": k}) for k, weights in enumerate((b"first", b"second", b"other"))]
    keys = [label.key for label in (*foreign, own)]
    first = records.generation("b", 0, label_keys=(keys[0],), kinds={keys[0]: "initial"})
    second = records.generation("b", 1, label_keys=tuple(keys), kinds={own.key: "saddle", failed.key: "uncertain"})
    path = dataclasses.replace(second.paths[0], saddle_key=own.key, initial_label=keys[0], final_label=keys[1])
    store.save_generation(dataclasses.replace(first, surrogate={"members": models[:1]}))
    store.save_generation(dataclasses.replace(second, paths=(path,), surrogate={"members": [models[1], "f" * 64]}))
    store.save_generation(records.generation("a", 0, surrogate={"members": models[2:]}))
    sittings = (Sitting(started="2026-01-01T00:00:00+00:00", host="here", versions={"al-loop": "0.1.0"}),)
    for name in "abc":
        store.save_run(records.run(name, sittings=sittings, settings={"seed": 3, "a.b": {"$x": 1}}))
    return SimpleNamespace(keys=keys, failed=failed.key, models=models)


def test_a_barrier_knows_what_made_it(store: Store, records: SimpleNamespace) -> None:
    made = fill(store, records)
    found = store.provenance("b")
    assert found is not None
    assert (found.run["name"], found.run["settings"]) == ("b", {"seed": 3, "a.b": {"$x": 1}})
    assert found.run["sittings"][0]["versions"] == {"al-loop": "0.1.0"}
    assert [row["index"] for row in found.generations] == [0, 1]
    assert found.generations[1]["paths"][0]["barrier"]["forward_ev"] == 0.7
    assert set(found.labels) == {*made.keys, made.failed}
    assert found.labels[made.keys[2]]["details"]["a.b"] == {"$x": 2**70}
    assert [found.labels[key]["details"]["computed_by"] for key in made.keys] == ["a", "a", "b"]
    assert found.labels[made.keys[0]]["runs"] == ["a", "b"]
    assert {sha256: model["description"] for sha256, model in found.models.items()} == {
        made.models[0]: {"generation": 0},
        made.models[1]: {"generation": 1},
    }
    assert list(found.others) == ["a"], "b did it, and c has no part in it"
    assert found.others["a"]["sittings"][0]["host"] == "here"


def test_an_earlier_barrier_knows_nothing_of_what_came_later(store: Store, records: SimpleNamespace) -> None:
    made = fill(store, records)
    found = store.provenance("b", 0)
    assert found is not None
    assert [row["index"] for row in found.generations] == [0]
    assert (list(found.labels), list(found.models)) == ([made.keys[0]], [made.models[0]])


def test_the_same_answer_from_memory_as_from_mongodb(mongo_store: MongoStore, records: SimpleNamespace) -> None:
    memory = MemoryStore()
    fill(memory, records)
    fill(mongo_store, records)

    def undated(store: Store) -> Any:
        found = dataclasses.asdict(store.provenance("b"))  # type: ignore[call-overload]
        for row in [*found["labels"].values(), *found["models"].values()]:
            row.pop("created", None)
        return found

    assert undated(memory) == undated(mongo_store)


def test_no_run_no_provenance(store: Store, records: SimpleNamespace) -> None:
    assert store.provenance("b") is None
    store.save_run(records.run("b"))
    found = store.provenance("b")
    assert found is not None
    assert (found.generations, found.labels, found.models, found.others) == ([], {}, {}, {})


def test_it_is_one_query(new_mongo_store: Callable[..., MongoStore], records: SimpleNamespace) -> None:
    commands: list[str] = []

    class Listener(monitoring.CommandListener):
        def started(self, event: monitoring.CommandStartedEvent) -> None:
            commands.append(event.command_name)

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    listener = Listener()
    monitoring.register(listener)
    try:
        store = new_mongo_store()
    finally:
        monitoring._LISTENERS.command_listeners.remove(listener)
    fill(store, records)
    commands.clear()
    assert store.provenance("b") is not None
    assert commands == ["aggregate"]


def test_structures_and_arrays_stay_where_they_are(store: Store, records: SimpleNamespace) -> None:
    made = fill(store, records)
    found = store.provenance("b")
    assert found is not None
    assert not {"structure", "forces", "stress"} & set(found.labels[made.keys[0]])
    assert not {"initial", "final", "band"} & set(found.generations[1]["paths"][0])


@pytest.mark.parametrize("index", [0, 1])
def test_generations_can_be_read_one_by_one(store: Store, records: SimpleNamespace, index: int) -> None:
    fill(store, records)
    whole = store.load_generations("b")[index]
    assert store.generation_indices("b") == [0, 1]
    one = store.load_generation("b", index)
    assert one is not None
    assert (one.label_keys, one.surrogate) == (whole.label_keys, whole.surrogate)
    assert one.paths[0].band is not None
    assert whole.paths[0].band is not None
    assert one.paths[0].band.forces.tobytes() == whole.paths[0].band.forces.tobytes()
    assert store.load_generation("b", 7) is None
