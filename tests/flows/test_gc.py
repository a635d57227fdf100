"""``al-loop gc``: whatever the store holds, nothing that a run needs is removed, and all that none needs is."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bson import ObjectId
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from typer.testing import CliRunner

from alcore import types
from alcore.errors import InputError, RunBusyError
from alcore.identity import label_key
from flows.cli import app
from flows.gc import collect, findings
from flows.leases import RUN_PREFIX, LeaseKeeper
from storage import mapping
from storage.fields import pack_array
from storage.mongod import ensure_mongod
from storage.store import MongoStore

ALL = -5.0
"""An age that everything has."""
RUNS = ("one", "two")


@pytest.fixture
def new_store(loop_home: Path) -> Iterator[Callable[[], MongoStore]]:
    uri = ensure_mongod(loop_home)
    opened: list[MongoStore] = []

    def make() -> MongoStore:
        opened.append(MongoStore(uri, f"gc_{uuid.uuid4().hex}"))
        return opened[-1]

    yield make
    with MongoClient[Any](uri) as client:
        for store in opened:
            client.drop_database(store.ask(lambda database: database.name))
            store.close()


@pytest.fixture
def store(new_store: Callable[[], MongoStore]) -> MongoStore:
    return new_store()


def structure(seed: int, n_atoms: int = 3) -> types.Structure:
    return types.Structure(
        numbers=np.full(n_atoms, 29),
        positions=np.random.default_rng(seed).normal(size=(n_atoms, 3)),
        cell=4.0 * np.eye(3),
        pbc=np.array([True] * 3),
        fixed=np.zeros((n_atoms, 3), bool),
    )


def label(seed: int, status: types.LabelStatus = "ok", folder: str = "") -> types.Label:
    atoms = structure(seed)
    known = {"energy_ev": -1.0, "forces": np.zeros((3, 3))} if status == "ok" else {}
    return types.Label(
        key=label_key(atoms, "f"),
        structure=atoms,
        status=status,
        fingerprint="f",
        calculator="emt",
        folder=folder,
        **known,
    )


def run(name: str, status: Any = "converged") -> types.RunRecord:
    sitting = types.Sitting(started="2026-01-01T00:00:00+00:00")
    return types.RunRecord(name=name, settings={}, settings_sha256="0", status=status, sittings=(sitting,))


def generation(name: str, index: int, seed: int, members: list[str], keys: tuple[str, ...]) -> types.GenerationRecord:
    """Its band is so large that its arrays lie in GridFS."""
    rng, n_atoms = np.random.default_rng(seed), 2000
    shape, flat = (5, n_atoms, 3), np.zeros(5)
    band = types.Band(
        path="hop",
        template=structure(seed, n_atoms),
        positions=rng.normal(size=shape),
        forces=np.zeros(shape),
        energies_ev=flat,
        sigma_committee_ev=flat,
        sigma_posterior_ev=flat,
        sigma_ev=flat,
        coordinate_ang=flat,
        status="converged",
    )
    path = types.PathRecord(path="hop", initial=structure(0), final=structure(1), band=band, label_keys=keys[-1:])
    kinds = dict.fromkeys(keys, "saddle")
    return types.GenerationRecord(
        run=name, index=index, paths=(path,), label_keys=keys, kinds=kinds, surrogate={"members": members}
    )


def rows(found: Any) -> dict[str, int]:
    return {finding.kind: finding.count for finding in found}


def stored(record: types.GenerationRecord) -> list[Any]:
    document, bands = mapping.generation_to_documents(record)
    return [mapping.to_son(document), *(mapping.to_son(band) for band in bands)]


def save_runs(
    store: MongoStore, of_runs: dict[str, list[Any]], models: list[bytes]
) -> tuple[list[types.GenerationRecord], dict[str, types.Label]]:
    """What was drawn, as runs: their generations, and their labels by key."""
    records: list[types.GenerationRecord] = []
    labels: dict[str, types.Label] = {}
    for name, drawn in of_runs.items():
        store.save_run(run(name))
        for index, (seed, members, key) in enumerate(drawn):
            used = [label(key), label(key + 10, "crashed")]
            for one in used:
                store.save_label(one, name)
                labels[one.key] = one
            record = generation(
                name, index, seed, [store.save_model(models[m], {}) for m in members], (used[0].key, used[1].key)
            )
            store.save_generation(record)
            records.append(record)
    return records, labels


draws = st.tuples(st.integers(0, 3), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2))


@settings(
    max_examples=6,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # an example takes long enough that shrinking would never end
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    of_runs=st.dictionaries(st.sampled_from(RUNS), st.lists(draws, max_size=3), max_size=2),
    steps=st.lists(st.tuples(st.sampled_from([*RUNS, "gone"]), st.integers(0, 4), st.integers(0, 3)), max_size=4),
    loose_models=st.sets(st.integers(0, 6)),
    loose_blobs=st.sets(st.integers(0, 5)),
    uploads=st.integers(0, 2),
    free_labels=st.sets(st.integers(20, 23)),
    with_labels=st.booleans(),
)
def test_nothing_that_a_run_needs_goes_and_all_else_does(
    new_store: Callable[[], MongoStore],
    tmp_path: Path,
    of_runs: dict[str, list[Any]],
    steps: list[Any],
    loose_models: set[int],
    loose_blobs: set[int],
    uploads: int,
    free_labels: set[int],
    with_labels: bool,
) -> None:
    store = new_store()
    models = [f"weights {k}".encode() for k in range(7)]
    for k in loose_models:
        store.save_model(models[k], {})
    for k in loose_blobs:  # three of them are just what a generation's band holds
        band = generation("x", 0, k, [], ()).paths[0].band
        assert band is not None
        store._blobs.put(pack_array(band.positions), {})
    records, labels = save_runs(store, of_runs, models)
    for name, index, seed in steps:
        store.save_step(
            name,
            index,
            "probe/hop",
            {"inputs": "x", "result": {"a": np.full(50_000, seed)}, "n": np.random.default_rng(seed).bytes(200_000)},
        )
    for k in free_labels:
        store.save_label(label(k))
    for _ in range(uploads):
        store._models._bucket.upload_from_stream("cut off", bytes(300_000))
        store.ask(lambda database: database["blobs.chunks"].insert_one({"files_id": ObjectId(), "n": 0, "data": b"x"}))

    before = {(r.run, r.index): stored(r) for name in of_runs for r in store.load_generations(name)}
    count = {name: len(drawn) for name, drawn in of_runs.items()}
    for finding in findings(store, tmp_path, labels=with_labels, min_age_s=ALL):
        assert finding.remove() == finding.count

    after = {(r.run, r.index): stored(r) for name in of_runs for r in store.load_generations(name)}
    assert str(after) == str(before)
    needed = {sha256 for record in records for sha256 in record.surrogate["members"]}
    assert {store.load_model(sha256)[:7] for sha256 in needed} <= {b"weights"}
    assert store.ask(lambda database: set(database["models"].distinct("_id"))) == needed
    for name, index, _ in steps:
        kept = store.load_step(name, index, "probe/hop")
        if name in of_runs and index >= count[name]:
            assert kept is not None
            assert kept["inputs"] == "x"
        else:
            assert kept is None
    assert set(store.load_labels(list(labels))) == set(labels)
    free = [label(k).key for k in free_labels if label(k).key not in labels]
    assert len(store.load_labels(free)) == (0 if with_labels else len(free))
    left = rows(findings(store, tmp_path, labels=with_labels, min_age_s=ALL))
    assert set(left.values()) == {0}
    n_blobs = store.ask(lambda database: database["blobs"].count_documents({}))
    assert store.ask(lambda database: database["blobs.files"].count_documents({})) == n_blobs
    assert store.ask(lambda database: len(database["models.chunks"].distinct("files_id"))) == len(needed)


def test_what_is_young_stays(store: MongoStore, tmp_path: Path) -> None:
    """A model is stored a moment before the generation that names it."""
    store.save_model(b"new", {})
    store._blobs.put(b"new", {})
    store._models._bucket.upload_from_stream("in progress", bytes(10))
    assert set(rows(findings(store, tmp_path, labels=True)).values()) == {0}
    assert rows(findings(store, tmp_path, min_age_s=ALL))["models"] == 1


def test_what_is_stored_again_between_look_and_removal_stays(store: MongoStore, tmp_path: Path) -> None:
    sha256 = store.save_model(b"old", {})
    store.ask(
        lambda database: database["models"].update_one({}, [{"$set": {"used": {"$subtract": ["$used", 7200_000]}}}])
    )
    (models,) = [finding for finding in findings(store, tmp_path) if finding.kind == "models"]
    assert models.count == 1
    assert store.save_model(b"old", {}) == sha256  # a run that found the same weights again
    assert models.remove() == 0
    assert store.load_model(sha256) == b"old"


def test_an_unfinished_run_keeps_what_is_younger_than_its_sitting(store: MongoStore, tmp_path: Path) -> None:
    store.save_model(b"not named yet", {})
    store.save_run(run("one", "running"))
    assert rows(findings(store, tmp_path, min_age_s=ALL))["models"] == 0
    _, said = collect(store, tmp_path)
    assert "run 'one' is not finished" in said


@pytest.mark.parametrize(
    ("started", "kept"), [("", "2026-01-02"), ("long ago", "2026-01-02"), ("2026-01-01", "2026-01-01")]
)
def test_a_sitting_that_does_not_say_when_it_began(started: str, kept: str, store: MongoStore, tmp_path: Path) -> None:
    """As in the sitting that older databases are given, or in another's export."""
    odd = dataclasses.replace(run("odd", "running"), sittings=(types.Sitting(started=started),))
    later = dataclasses.replace(run("later", "running"), sittings=(types.Sitting(started="2026-01-02T00:00:00+00:00"),))
    store.save_run(odd)
    store.save_run(later)
    _, said = collect(store, tmp_path)
    assert f"nothing younger than {kept} 00:00" in said


def test_a_lease_that_ran_out_long_ago_goes(store: MongoStore, tmp_path: Path) -> None:
    assert store.take_lease(["a"], "me", 0.001)
    assert store.take_lease(["b"], "me", 60)
    assert rows(findings(store, tmp_path))["leases that ran out"] == 0
    (leases,) = [f for f in findings(store, tmp_path, min_age_s=-1.0) if f.kind == "leases that ran out"]
    assert leases.remove() == 1
    assert store.held_leases("") == {"b": "me"}


@pytest.fixture
def folders(store: MongoStore, tmp_path: Path) -> Callable[[], set[str]]:
    """Folders of calculations of two runs, old ones; tells which are left."""
    home = tmp_path / "calculations"
    good, bad, doubted = label(1), label(2, "crashed"), label(3)
    for name in RUNS:
        store.save_run(run(name))
        for one in (good, bad, doubted):
            store.save_label(one, name)
        record = generation(name, 0, 0, [], (good.key, bad.key, doubted.key))
        store.save_generation(dataclasses.replace(record, doubts={doubted.key: "odd"}))
        for key in (good.key[:16], good.key[:16] + "-2", bad.key[:16], doubted.key[:16], label(4).key[:16], "jobs"):
            (home / name / key).mkdir(parents=True)
            (home / name / key / "out").write_text("x")
    (home / "unknown" / good.key[:16]).mkdir(parents=True)
    names = {
        key[:16]: word
        for key, word in [(good.key, "good"), (bad.key, "bad"), (doubted.key, "doubted"), (label(4).key, "not stored")]
    }
    for path in home.rglob("*"):
        os.utime(path, (1e9, 1e9))

    def left() -> set[str]:
        found = {path.relative_to(home) for path in home.glob("*/*")}
        return {f"{path.parent}/{names.get(path.name[:16], path.name)}{path.name[16:]}" for path in found}

    return left


def test_folders_of_stored_labels_go_and_no_other(
    store: MongoStore, tmp_path: Path, folders: Callable[[], set[str]]
) -> None:
    before = folders()
    keeper = LeaseKeeper(store, run="two")
    assert keeper.take([f"{RUN_PREFIX}two"])
    done, _ = collect(store, tmp_path, yes=True)
    assert {kind: count for kind, count, _ in done}["folders of finished calculations"] == 2
    assert before - folders() == {"one/good", "one/good-2"}
    keeper.close()
    (fresh,) = tmp_path.glob("calculations/two/*-2")
    (fresh / "out").write_text("still written")
    collect(store, tmp_path, yes=True)
    assert before - folders() == {"one/good", "one/good-2", "two/good"}


def test_a_whole_run_goes_and_others_keep_what_they_share(
    store: MongoStore, tmp_path: Path, folders: Callable[[], set[str]]
) -> None:
    shared = store.save_model(b"shared", {})
    for name in RUNS:
        store.save_generation(generation(name, 0, 7, [shared], (label(1).key,)))
    seen, _ = collect(store, tmp_path, run="one")
    assert [row[1] for row in seen] == [2, 1]
    assert len(store.load_generations("one")) == 1
    keeper = LeaseKeeper(store, run="one")
    assert keeper.take([f"{RUN_PREFIX}one"])
    with pytest.raises(RunBusyError, match=r"works on it now \(wait for it or stop it\)"):
        collect(store, tmp_path, run="one", yes=True)
    keeper.close()
    collect(store, tmp_path, run="one", yes=True)
    assert store.load_run("one") is None
    assert store.count_labels_by_status("one") == {}
    assert {name.split("/")[0] for name in folders()} == {"two", "unknown"}
    assert store.held_leases(RUN_PREFIX) == {}
    assert rows(findings(store, tmp_path, min_age_s=ALL))["models"] == 0
    assert store.load_generations("two")[0].paths[0].band is not None
    with pytest.raises(InputError, match="no run named 'one'"):
        collect(store, tmp_path, run="one", yes=True)


def test_what_a_cut_off_import_left_goes_without_a_run_record(
    store: MongoStore, tmp_path: Path, folders: Callable[[], set[str]]
) -> None:
    for index in range(2):
        store.save_generation(generation("left", index, 7, [], (label(1).key,)))
    store.save_label(label(1), "left")
    assert [row[1] for row in collect(store, tmp_path, run="left")[0]] == [2, 0]
    done, _ = collect(store, tmp_path, run="left", yes=True)
    assert [row[1] for row in done] == [2, 0]
    assert store.load_generations("left") == []
    store.save_step("left", 0, "probe/hop", {"result": 1})
    assert collect(store, tmp_path, run="left", yes=True)[0][0][1] == 1
    assert store.step_places("left") == []
    with pytest.raises(InputError, match="no run named 'left'"):
        collect(store, tmp_path, run="left", yes=True)
    assert {name.split("/")[0] for name in folders()} == {*RUNS, "unknown"}


def test_a_run_with_jobs_in_a_queue_stays(store: MongoStore, tmp_path: Path) -> None:
    executor = {"kind": "pyiron", "queue": "slurm"}
    store.save_run(dataclasses.replace(run("one"), settings={"executor": executor}))
    jobs = [tmp_path / "calculations" / "one" / "jobs" / f"label_{k}_hdf5" / f"label_{k}" for k in range(4)]
    for job in jobs:
        job.mkdir(parents=True)
        (job / "job.json").write_text("{}")
    (jobs[0] / "outcome.npz").write_bytes(b"")
    (jobs[1] / "error.txt").write_text("it crashed")
    for yes in (False, True):
        with pytest.raises(
            InputError, match=r"run 'one': 2 jobs of it in the queue slurm .*`al-loop cancel one` first"
        ):
            collect(store, tmp_path, run="one", yes=yes)
    assert jobs[3].exists()
    assert store.load_run("one") is not None
    for job in jobs[2:]:
        (job / "outcome.npz").write_bytes(b"")
    collect(store, tmp_path, run="one", yes=True)
    assert not jobs[0].exists()


def test_the_verb_shows_and_removes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MongoClient[Any](ensure_mongod(home)) as client:
        client.drop_database("al_loop")
    store = MongoStore(ensure_mongod(home))
    store.save_model(b"of no use", {})
    store.ask(
        lambda database: database["models"].update_one({}, [{"$set": {"used": {"$subtract": ["$used", 7200_000]}}}])
    )
    shown = CliRunner().invoke(app, ["gc"])
    assert "nothing was removed; --yes does it" in shown.stdout
    assert CliRunner().invoke(app, ["gc", "--json"]).stdout.count('"count": 1') == 1
    done = CliRunner().invoke(app, ["gc", "--yes"])
    assert done.exit_code == 0
    assert store.ask(lambda database: database["models"].count_documents({})) == 0
    assert CliRunner().invoke(app, ["gc", "--run", "none"]).exit_code == 2
    store.close()
