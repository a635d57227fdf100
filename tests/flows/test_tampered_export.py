"""Exports that were damaged, or that no export wrote: one line each, and no database is even asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from alcore.identity import json_sha256, label_key
from alcore.types import GenerationRecord, Label, PathRecord, RunRecord, Structure
from flows import export_format as form
from flows.cli import app
from flows.export import export_run
from flows.import_run import import_run, read_export
from storage.memory import MemoryStore


def al_loop(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Of a run with a label that is sound and one that failed, three generations, a model and a step."""
    store = MemoryStore()
    atom = Structure(
        numbers=np.array([29]),
        positions=np.zeros((1, 3)),
        cell=np.eye(3),
        pbc=np.ones(3, bool),
        fixed=np.zeros((1, 3), bool),
    )
    keys = [label_key(atom, "f"), label_key(atom, "g")]
    sound = Label(key=keys[0], structure=atom, status="ok", fingerprint="f", calculator="emt", energy_ev=-1.0)
    failed = Label(key=keys[1], structure=atom, status="crashed", fingerprint="g", calculator="emt")
    for label in (sound, failed):
        store.save_label(label, "hop")
    path = PathRecord(path="p", initial=atom, final=atom, label_keys=(sound.key, failed.key))
    for index, members in enumerate(([store.save_model(b"weights", {"generation": 0})], [], [])):
        store.save_generation(GenerationRecord(run="hop", index=index, paths=(path,), surrogate={"members": members}))
    store.save_step("hop", 3, "probe/p", {"result": [1.0]})
    values = {"name": "hop", "seed": 1}
    store.save_run(RunRecord(name="hop", settings=values, settings_sha256=json_sha256(values)))
    return export_run(store, "hop", tmp_path / "export")


def restamp(folder: Path, **changes: Any) -> None:
    """The manifest, made true again, with ``changes``; a value of None takes a key away."""
    values = json.loads((folder / form.MANIFEST).read_text()) | changes
    if "files" not in changes:
        names = [name for name in form.files_below(folder) if name != form.MANIFEST]
        values["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / form.MANIFEST).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def refused(folder: Path) -> str:
    """What the verb says; nothing is asked of a database before."""
    done = al_loop("import", folder, "--mongodb-uri", "mongodb://127.0.0.1:1")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    return done.stderr.removeprefix(f"{folder}").strip()


def names(folder: Path) -> list[str]:
    return sorted(form.files_below(folder))


def test_a_file_that_is_damaged_missing_or_a_link(exported: Path) -> None:
    for name in names(exported):
        if name == form.MANIFEST:
            continue
        file = exported / name
        kept = file.read_bytes()
        file.write_bytes(kept + b" ")
        assert refused(exported).startswith(f"/{name}: damaged, or changed since the export"), name
        file.unlink()
        assert refused(exported).startswith(f"/{name}: this file of the export is missing"), name
        elsewhere = exported.with_name("elsewhere")
        elsewhere.write_bytes(kept)
        file.symlink_to(elsewhere)
        assert refused(exported).startswith(f"/{name}: is a link"), name
        file.unlink()
        file.write_bytes(kept)
    read_export(exported)


def test_a_file_more_than_there_should_be(exported: Path) -> None:
    (exported / "weights" / "more.pt").write_bytes(b"")
    assert refused(exported) == "/weights/more.pt: this is no part of the export (remove it, or export again)"


@pytest.mark.parametrize("place", ["folder", "weights"])
def test_a_folder_that_is_a_link(place: str, exported: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    link = exported / place
    (exported / "weights").rename(moved) if place == "weights" else moved.mkdir()
    link.symlink_to(moved)
    assert refused(exported).startswith(f"/{place}: {'is a link' if place == 'weights' else 'this is no part'}")


def test_a_pipe_is_not_waited_for(exported: Path) -> None:
    (exported / "dataset.extxyz").unlink()
    os.mkfifo(exported / "dataset.extxyz")
    assert refused(exported).startswith("/dataset.extxyz: cannot be read")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "weights/../../secret"])
def test_a_manifest_that_reaches_out_of_its_folder(name: str, exported: Path) -> None:
    (exported.parent / "secret").write_text("")
    values = json.loads((exported / form.MANIFEST).read_text())["files"]
    restamp(exported, files={**values, name: hashlib.sha256(b"").hexdigest()})
    assert refused(exported) == f"/manifest.json: names {name!r}, which is not in this folder"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 2, "al_loop": "9.0"}, "/manifest.json: written by a newer al-loop (al-loop 9.0) (update al-loop)"),
        ({"schema_version": 1000}, "/manifest.json: written by a newer al-loop (al-loop 0.1.0) (update al-loop)"),
        ({"kind": "cake"}, "/manifest.json: this is a manifest of 'cake', not of 'al-loop run' (export again)"),
        ({"kind": None}, "/manifest.json: this is no manifest of an export (export again)"),
        ({"version": "1"}, "/manifest.json: this is no manifest of an export (export again)"),
        ({"files": ["run.json"]}, "/manifest.json: this is no manifest of an export (export again)"),
        ({"files": {"run.json": 3}}, "/manifest.json: this is no manifest of an export (export again)"),
        ({"files": {}}, "/manifest.json: does not name generations.jsonl (export again)"),
        ({"run": "../x"}, "/manifest.json: '../x' is no name of a run (letters, digits, dots, dashes and underscores"),
        ({"run": "hop-3"}, "/run.json: line 1: not what `al-loop export` writes: it belongs to the run 'hop', the man"),
    ],
)
def test_a_manifest_that_is_none(changes: dict[str, Any], expected: str, exported: Path) -> None:
    restamp(exported, **changes)
    assert refused(exported).startswith(expected)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\x00", "[" * 100_000])
def test_a_manifest_that_is_not_even_json(text: str, exported: Path) -> None:
    (exported / form.MANIFEST).write_text(text)
    assert refused(exported) == "/manifest.json: this is no manifest of an export (export again)"


def test_without_a_manifest(exported: Path) -> None:
    (exported / form.MANIFEST).unlink()
    assert refused(exported).startswith("/manifest.json: no such file")
    shutil.rmtree(exported)
    assert refused(exported).startswith(": no such folder")


def edited(file: Path, number: int, change: Callable[[dict[str, Any]], Any]) -> None:
    lines = file.read_text("utf-8").splitlines()
    values = json.loads(lines[number])
    change(values)
    lines[number] = json.dumps(values)
    file.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.mark.parametrize(
    ("name", "number", "change", "expected"),
    [
        ("labels.jsonl", 1, lambda v: v["label"].pop("key"), "a Label lacks key"),
        ("labels.jsonl", 1, lambda v: v["label"].update(energy_ev="much"), "cannot be stored"),
        ("labels.jsonl", 1, lambda v: v["label"].update(structure=3), "argument of type 'int'"),
        ("labels.jsonl", 1, lambda v: v.update(created="today"), "Invalid isoformat string"),
        ("labels.jsonl", 0, lambda v: v.pop("label"), "'label'"),
        ("labels.jsonl", 0, lambda v: v["label"].update(fingerprint="other"), "is not that of its structure"),
        ("generations.jsonl", 2, lambda v: v.update(index=0), "generation 0 comes after 1"),
        ("generations.jsonl", 0, lambda v: v["paths"][0].update(path="../p"), "'../p' is no name of a hop"),
        ("generations.jsonl", 0, lambda v: v.update(run="other"), "it belongs to the run 'other'"),
        ("generations.jsonl", 0, lambda v: v.update(paths=7), "int"),
        ("models.jsonl", 0, lambda v: v.update(sha256="f" * 64), "are not part of the export"),
        ("models.jsonl", 0, lambda v: v.update(sha256="../../x"), "not part of the export"),
        ("steps.jsonl", 0, lambda v: v.update(content=None), "NoneType"),
        ("run.json", 0, lambda v: v.update(settings=[]), "must be a mapping"),
    ],
)
def test_records_that_no_export_writes_leave_the_database_as_it_was(
    name: str, number: int, change: Callable[[dict[str, Any]], Any], expected: str, exported: Path
) -> None:
    edited(exported / name, number, change)
    restamp(exported)
    said = refused(exported)
    assert said.startswith(f"/{name}: line {number + 1}: not what `al-loop export` writes: ")
    assert expected in said


def test_a_foreign_run_cannot_vouch_for_a_model_that_runs_code(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    monkeypatch.setenv("AL_LOOP_HOME", str(tmp_path / "home"))
    file = tmp_path / "gift.model"
    torch.save(Trap(), file)
    store = MemoryStore()
    import_run(store, read_export(exported))
    record, run = store.load_generation("hop", 0), store.load_run("hop")
    assert record is not None
    assert run is not None
    model = {"foundation": str(file), "foundation_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    store.save_generation(replace(record, index=3))  # with a committee
    store.save_run(replace(run, settings={"name": "hop", "model": model}))  # as a database from elsewhere may hold it
    lines: list[str] = []
    export_run(store, "hop", tmp_path / "again", log=lines.append)
    assert not (tmp_path / "sprung").exists()
    assert "running the code inside it" in lines[-1]
    assert "trusted-models.txt" in lines[-1]


def test_nothing_is_ever_unpickled(exported: Path, tmp_path: Path) -> None:
    """Weights are bytes until a trainer asks for them, and then it reads weights alone."""
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    data = pickle.dumps(Trap())
    sha256 = hashlib.sha256(data).hexdigest()
    (old,) = (exported / form.WEIGHTS).iterdir()
    old.unlink()
    (exported / form.WEIGHTS / f"{sha256}.pt").write_bytes(data)
    (exported / "models").mkdir()
    (exported / "models" / "member-0.model").write_bytes(data)
    edited(exported / form.MODELS, 0, lambda values: values.update(sha256=sha256))
    restamp(exported)
    store = MemoryStore()
    import_run(store, read_export(exported))
    assert store.load_model(sha256) == data
    assert not (tmp_path / "sprung").exists()
