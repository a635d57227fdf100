"""A run goes from one database to another as files, whole or not at all, and is gone on with there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from alcore.errors import InputError, RunBusyError
from alcore.identity import json_sha256, label_key
from alcore.types import GenerationRecord, Label, PathRecord, RunRecord, Structure
from flows import export_format as form
from flows.cli import app
from flows.export import export_run
from flows.import_run import import_run, read_export
from flows.leases import new_owner
from flows.session import open_record_store
from storage.memory import MemoryStore
from storage.mongod import ensure_mongod, stop_mongod
from storage.store import MongoStore

SHORT = {"sane_energy_ev": 10.0, "sane_force_ev_per_ang": 10.0}
"""Trainings too short for members that could be used: they are taken as they are."""
STRATEGIES = Path(__file__).parents[1] / "storage" / "test_mapping.py"


def _strategies() -> Any:
    """Those of records as odd as they can be; the tests beside them are not collected here."""
    spec = importlib.util.spec_from_file_location("mapping_strategies", STRATEGIES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


odd = _strategies()


def al_loop(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def contents(folder: Path, *, but: str = "models/") -> dict[str, bytes]:
    """All files but the ``.model`` ones: TorchScript counts its classes, so one process never writes the same twice."""
    return {name: (folder / name).read_bytes() for name in form.files_below(folder) if not name.startswith(but)}


def assert_same_run(one: Any, other: Any, name: str) -> None:
    """All that the stores hold of a run is the same, bit for bit."""
    odd.assert_identical(other.load_run(name), one.load_run(name))
    records = one.load_generations(name)
    odd.assert_identical(other.load_generations(name), records)
    keys = list(one.label_dates(name))
    assert other.label_dates(name) == one.label_dates(name)
    odd.assert_identical(other.load_labels(keys), one.load_labels(keys))
    for member in {member for record in records for member in record.surrogate.get("members", ())}:
        assert other.load_model(member) == one.load_model(member)
        odd.assert_identical(other.describe_model(member), one.describe_model(member))
    places = one.step_places(name)
    assert other.step_places(name) == places
    for place in places:
        odd.assert_identical(other.load_step(name, *place), one.load_step(name, *place))


# --- records as odd as they can be ------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> SimpleNamespace:
    records = []
    for index in range(draw(st.sampled_from([0, 2]))):
        record = draw(odd.generations())
        paths = [
            dataclasses.replace(path, path=f"p{k}", band=path.band and dataclasses.replace(path.band, path=f"p{k}"))
            for k, path in enumerate(record.paths)
        ]
        records.append(dataclasses.replace(record, run="odd", index=index, paths=tuple(paths)))
    drawn = draw(st.lists(odd.labels(), max_size=3))
    keyed = [dataclasses.replace(label, key=label_key(label.structure, label.fingerprint)) for label in drawn]
    known = {label.key: label for label in keyed}
    return SimpleNamespace(
        run=RunRecord(
            name="odd", settings={"name": "odd"}, settings_sha256="0", sittings=tuple(draw(st.lists(odd.sittings)))
        ),
        generations=records,
        labels=list(known.values()),
        description=draw(odd.mappings),
        step=draw(odd.mappings),
    )


@given(runs())
@settings(max_examples=25)
def test_whatever_a_run_holds_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, run: Any) -> None:
    store, other, folder = MemoryStore(), MemoryStore(), tmp_path_factory.mktemp("odd")
    member = store.save_model(b"weights", run.description)
    for record in run.generations:
        members = [member] if record.index == 0 else []
        store.save_generation(dataclasses.replace(record, surrogate={**record.surrogate, "members": members}))
    for label in run.labels:
        if label.status == "ok" and label.energy_ev is None:
            label = dataclasses.replace(label, energy_ev=0.0)  # noqa: PLW2901 - a sound label has an energy
        store.save_label(label, "odd")
    store.save_step("odd", 9, "probe/p0", run.step)
    store.save_run(run.run)
    export_run(store, "odd", folder / "one")
    import_run(other, read_export(folder / "one"))
    assert_same_run(store, other, "odd")
    export_run(other, "odd", folder / "two")
    assert contents(folder / "two") == contents(folder / "one")


# --- between two databases --------------------------------------------------------------------------------------------


@pytest.fixture
def databases(loop_home: Path) -> Iterator[Callable[[], MongoStore]]:
    """Opens databases of a real server that are empty, and dropped afterwards."""
    opened: list[MongoStore] = []

    def make() -> MongoStore:
        opened.append(MongoStore(ensure_mongod(loop_home), f"import_{os.getpid()}_{len(opened)}"))
        return opened[-1]

    yield make
    for store in opened:
        store._client.drop_database(store._database.name)
        store.close()


def atom(letter: str) -> Structure:
    return Structure(
        numbers=np.array([29]),
        positions=np.full((1, 3), float(ord(letter))),
        cell=np.eye(3),
        pbc=np.ones(3, bool),
        fixed=np.zeros((1, 3), bool),
    )


A, B, C = (label_key(atom(letter), "f") for letter in "abc")


def labelled(letter: str, **changes: Any) -> Label:
    values = {"status": "ok", "energy_ev": -1.5, "forces": np.ones((1, 3)), "details": {"computed_by": "hop"}} | changes
    key = label_key(atom(letter), "f")
    return Label(key=key, structure=atom(letter), fingerprint="f", calculator="emt", **values)


def fill(store: MongoStore | MemoryStore, name: str = "hop") -> None:
    labels = [labelled("a"), labelled("b"), labelled("c", status="crashed", energy_ev=None, forces=None)]
    for label in labels:
        store.save_label(label, name)
    member = store.save_model(b"weights", {"generation": 0})
    structure = labels[0].structure
    path = PathRecord(path="p", initial=structure, final=structure, label_keys=tuple(label.key for label in labels))
    for index, members in enumerate(([member], [member], [])):
        record = GenerationRecord(run=name, index=index, paths=(path,), surrogate={"members": members})
        store.save_generation(record)
    store.save_step(name, 3, "probe/p", {"result": [1.0]})
    values = {"name": name, "seed": 1}
    store.save_run(RunRecord(name=name, settings=values, settings_sha256=json_sha256(values), started="2026"))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    store = MemoryStore()
    fill(store)
    return export_run(store, "hop", tmp_path / "export")


def test_between_two_databases(databases: Callable[[], MongoStore], tmp_path: Path) -> None:
    store, other = databases(), databases()
    fill(store)
    export_run(store, "hop", tmp_path / "one")
    done = import_run(other, read_export(tmp_path / "one"))
    assert (done.n_generations, done.n_labels, done.n_known, done.n_models) == (3, 3, 0, 1)
    assert_same_run(store, other, "hop")
    assert contents(export_run(other, "hop", tmp_path / "two")) == contents(tmp_path / "one")


def test_the_very_same_run_changes_nothing(exported: Path) -> None:
    store = MemoryStore()
    import_run(store, read_export(exported))
    before = contents(export_run(store, "hop", exported.with_name("before")))
    done = import_run(store, read_export(exported))
    assert (done.was_there, done.n_labels) == (True, 0)
    assert contents(export_run(store, "hop", exported.with_name("after"))) == before


def test_another_run_of_that_name_is_refused_and_another_name_is_not(exported: Path) -> None:
    store = MemoryStore()
    fill(store)
    record = store.load_generation("hop", 2)
    assert record is not None
    store.save_generation(dataclasses.replace(record, n_reference_calls=7))
    with pytest.raises(InputError, match=r"there is another run named 'hop' \(choose one: --name NEW\)"):
        import_run(store, read_export(exported))
    import_run(store, read_export(exported, name="hop-2"))
    assert [run.name for run in store.list_runs()] == ["hop-2", "hop"]
    there = store.load_generation("hop", 2)
    assert there is not None
    assert there.n_reference_calls == 7


def test_a_new_name_is_there_throughout(exported: Path) -> None:
    store = MemoryStore()
    import_run(store, read_export(exported, name="new"))
    run = store.load_run("new")
    assert run is not None
    assert (run.settings["name"], run.settings_sha256) == ("new", json_sha256(run.settings))
    assert {record.run for record in store.load_generations("new")} == {"new"}
    assert store.step_places("new") == [(3, "probe/p")]
    assert list(store.label_dates("new")) == sorted([A, B, C])
    labels = store.load_labels([A])
    assert labels[A].details["computed_by"] == "new", "or the run would count its own labels as reused"
    assert not store.load_generations("hop")


def test_labels_that_are_there_stay(databases: Callable[[], MongoStore], exported: Path) -> None:
    store = databases()
    store.save_label(labelled("a", energy_ev=-7.0), "other")
    store.save_label(labelled("b", status="crashed", energy_ev=None, forces=None, reason="here"), "other")
    store.save_label(labelled("c", status="timeout", energy_ev=None, forces=None, reason="here"), "other")
    done = import_run(store, read_export(exported))
    assert (done.n_labels, done.n_known) == (3, 3)
    labels = store.load_labels([A, B, C])
    assert labels[A].energy_ev == -7.0
    assert labels[B].status == "ok", "a good label takes the place of one that failed"
    assert labels[C].status == "timeout"
    assert set(store.label_dates("hop")) == set(labels)


def test_while_a_process_works_on_a_run_of_that_name(exported: Path) -> None:
    store = MemoryStore()
    store.take_lease(["run/hop"], new_owner("hop"), 60)
    with pytest.raises(RunBusyError, match=r"^run 'hop': process \d+ on .* works on it now \(.*--name"):
        import_run(store, read_export(exported))
    assert import_run(store, read_export(exported, name="new")).n_labels == 3


def test_after_an_import_that_was_killed_the_next_need_not_wait(exported: Path) -> None:
    store = MemoryStore()
    *who, _, _ = new_owner("hop").split("|")
    store.take_lease(["run/hop"], "|".join([*who, "1.00", "hop"]), 60)  # a process of this machine that is no more
    assert import_run(store, read_export(exported)).n_labels == 3


def test_labels_of_an_unknown_calculator_travel_too(exported: Path) -> None:
    """Brought along in a file that did not say who made them: they have keys of their own."""
    store, other = MemoryStore(), MemoryStore()
    fill(store)
    label = labelled("z")
    store.save_label(dataclasses.replace(label, key=label_key(label.structure, "f, unproven")), "hop")
    import_run(other, read_export(export_run(store, "hop", exported.with_name("unproven"))))
    assert_same_run(store, other, "hop")


def test_an_imported_run_vouches_for_no_model_file(exported: Path) -> None:
    store, other = MemoryStore(), MemoryStore()
    fill(store)
    values = {
        "name": "hop",
        "model": {"foundation": "a.model", "foundation_sha256": "e" * 64, "committee": 2},
        "calculator": {"name": "mace", "settings": {"model": "b.model", "sha256": "d" * 64}},
    }
    store.save_run(RunRecord(name="hop", settings=values, settings_sha256=json_sha256(values)))
    out = export_run(store, "hop", exported.with_name("vouched"))
    text = (out / "run.yaml").read_text()
    assert "a.model" in text
    assert "b.model" in text
    assert "e" * 64 not in text
    assert "d" * 64 not in text
    assert import_run(store, read_export(out)).was_there, "the run that was exported"
    import_run(other, read_export(out))
    run = other.load_run("hop")
    assert run is not None
    assert run.settings == {
        "name": "hop",
        "model": {"foundation": "a.model", "committee": 2},
        "calculator": {"name": "mace", "settings": {"model": "b.model"}},
    }
    assert run.settings_sha256 == json_sha256(run.settings)
    assert import_run(other, read_export(out)).was_there
    values["model"]["committee"] = 3  # type: ignore[index]
    store.save_run(RunRecord(name="hop", settings=values, settings_sha256=json_sha256(values)))
    with pytest.raises(InputError, match="there is another run"):
        import_run(store, read_export(out))


def test_an_import_that_was_cut_off_is_done_again(
    exported: Path, databases: Callable[[], MongoStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, left = databases(), MemoryStore()
    fill(left)
    record = left.load_generation("hop", 2)
    assert record is not None
    store.save_generation(dataclasses.replace(record, index=9))  # of another export, cut off before
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_run(store, read_export(exported))
    assert store.load_run("hop") is None
    import_run(store, read_export(exported))
    assert store.generation_indices("hop") == [0, 1, 2]
    assert contents(export_run(store, "hop", exported.with_name("again"))) == contents(exported)


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of another machine, with a database of its own."""
    home = tmp_path_factory.mktemp("other-home")
    ensure_mongod(home)
    yield home
    stop_mongod(home)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero-shot", "naive"])
def test_a_run_is_gone_on_with_in_another_database(
    strategy: str, hop: Any, home: Path, other_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"travels-{strategy}"
    model = {
        "strategy": strategy,
        "committee": 2,
        "options": {"epochs": 1, "fresh_epochs": 1, "warm_epochs": 1, **SHORT},
    }
    n_first, n_then = (7, 9) if strategy == "naive" else (3, 4)  # the committee is trained on 6 labels, and again on 8
    file = hop.run_file(name, model=model, stop={"max_labels": n_first, "barrier_tolerance_ev": 1e-9})
    more = ["--no-server", "--set", f"stop.max_labels={n_then}"]
    assert al_loop("run", file, "--no-server").exit_code == 3
    assert hop.calls(name) == n_first
    result = al_loop("export", name, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout.strip(), result.stderr) == (0, str(tmp_path / "out"), "")
    shown, asked = al_loop("show", name, "--json").stdout, al_loop("show", name, "--provenance", "--json")

    assert al_loop("run", file, *more).exit_code == 3, "the original goes on, to compare"
    assert hop.calls(name) == n_then
    with closing(open_record_store(None)) as store:
        expected = store.load_generations(name)

    monkeypatch.setenv("AL_LOOP_HOME", str(other_home))
    result = al_loop("import", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    first, second = result.stdout.splitlines()
    assert first.endswith(f" {n_first} labels, {2 if strategy == 'naive' else 0} models")
    assert second == f"go on with: al-loop run {tmp_path / 'out' / 'run.yaml'}"
    assert al_loop("show", name, "--json").stdout == shown
    assert al_loop("show", name, "--provenance", "--json").stdout.count("stored_at") == n_first
    then, now = json.loads(asked.stdout), json.loads(al_loop("show", name, "--provenance", "--json").stdout)
    for values in (then, now):
        for described in values["models"].values():
            described.pop("created")
    assert now == then, "with the times at which the labels were computed there"
    assert al_loop("report", name, "-o", tmp_path / "report").exit_code == 0
    again = al_loop("import", tmp_path / "out")
    assert (again.exit_code, again.stdout) == (0, f"run '{name}' is there already, the very same: nothing changed\n")

    result = al_loop("run", tmp_path / "out" / "run.yaml", *more)
    assert result.exit_code == 3, result.output
    assert hop.calls(name) == 2 * n_then - n_first, (
        "only labels that the first database did not have when it was exported"
    )
    with closing(open_record_store(None)) as store:
        found = store.load_generations(name)
    assert [record.label_keys for record in found] == [record.label_keys for record in expected]
    for one, other in zip(found, expected, strict=True):
        odd.assert_identical(one.paths, other.paths)
        odd.assert_identical(one.surrogate, other.surrogate)
    assert found[-1].n_reference_calls == n_then
    result = al_loop("import", tmp_path / "out")
    assert result.exit_code == 2
    assert f"there is another run named '{name}' (choose one: --name NEW)" in result.stderr
    assert al_loop("import", tmp_path / "out", "--name", f"{name}-again").stdout.startswith(f"run '{name}-again': ")
    assert json.loads(al_loop("show", f"{name}-again", "--json").stdout)["n_reference_calls"] == n_first
