"""What an export is made of: exact JSON, a manifest that holds, files that other programs read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alcore.errors import InputError
from alcore.identity import label_key
from alcore.types import GenerationRecord, Label, PathRecord, RunRecord, Structure
from flows import export_format as form
from flows.export import export_run
from storage.memory import MemoryStore

texts = st.text(max_size=8) | st.sampled_from(["%float", "%array", "%%", "\u2028", "a\nb", ""])
arrays = hnp.arrays(
    st.sampled_from([np.float64, np.float32, np.int64, np.uint8, np.bool_, np.dtype(">f8"), np.dtype("U3")]),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=8) | arrays | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    """Equal in type and value, floats and arrays bit for bit, and keys in the same order."""
    if isinstance(left, np.ndarray):
        known = isinstance(right, np.ndarray) and not right.flags.writeable
        return known and (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(one, other) for one, other in zip(left, right, strict=True))
    return type(left) is type(right) and repr(left) == repr(right)


@given(plain)
def test_plain_values_come_back_as_they_went_in(value: Any) -> None:
    line = form.to_json(value)
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert same(value, form.from_json(line.encode()))


@pytest.mark.parametrize(
    "line",
    [
        "NaN",
        "{",
        '{"%array": {"dtype": "|O", "shape": [1], "values": [1]}}',
        '{"%array": {"dtype": "<f8", "shape": [3], "values": [1.0]}}',
        '{"%array": {"dtype": "<i8", "shape": [1], "values": [1e999]}}',
        '{"%array": {"dtype": "<f8", "shape": [1], "base64": "?"}}',
        '{"%array": 3}',
        '{"%bytes": "?"}',
        '{"%float": {}}',
        "[" * 100_000,
        b"\xff",
    ],
)
def test_what_no_export_writes_is_refused(line: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        form.from_json(line)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:x", "a\\b", "", ".", "./x", "a//b", "x\0", "a/"])
def test_a_path_that_leaves_the_folder_is_none(name: str) -> None:
    assert not form.is_inside(name)
    assert form.is_inside("weights/ab.pt")


def labelled(x: float, **changes: Any) -> Label:
    atoms = Structure(
        numbers=[29, 29],  # type: ignore[arg-type]
        positions=np.array([[0.0, 0, 0], [2.5 + x, 0, 0]]),
        cell=6 * np.eye(3),
        pbc=np.ones(3, bool),
        fixed=np.zeros((2, 3), bool),
    )
    known = {"status": "ok", "energy_ev": -1.0 - x, "forces": np.full((2, 3), x)} | changes
    return Label(key=label_key(atoms, "f"), structure=atoms, fingerprint="f", calculator="emt", **known)


@pytest.fixture
def store() -> MemoryStore:
    """A run of four labels: two asked for, one brought along, one that failed; and one that is not believed."""
    store = MemoryStore()
    labels = [labelled(k / 10) for k in range(3)]
    failed, doubted = labelled(0.3, status="crashed", energy_ev=None, forces=None), labelled(0.4)
    for label in (*labels, failed, doubted):
        store.save_label(label, "hop")
    path = PathRecord(
        path="path",
        initial=labels[0].structure,
        final=labels[1].structure,
        label_keys=(labels[1].key, labels[0].key, failed.key, doubted.key),
    )
    kinds = dict(zip([x.key for x in (*labels, failed)], ["initial", "final", "data", "saddle"], strict=True))
    keys = tuple(label.key for label in labels)
    doubts = {doubted.key: "it is odd"}
    record = GenerationRecord(run="hop", index=0, paths=(path,), label_keys=keys, kinds=kinds, doubts=doubts)
    store.save_generation(record)
    member = store.save_model(b"first", {"generation": 0})
    store.save_generation(dataclasses.replace(record, index=1, surrogate={"members": [member]}))
    store.save_generation(dataclasses.replace(record, index=2, surrogate={"members": []}))
    settings = {"name": "hop", "paths": [{"name": "path", "initial": "/elsewhere/a.xyz", "final": "b.xyz"}]}
    store.save_run(RunRecord(name="hop", settings=settings, settings_sha256="0"))
    store.save_step("hop", 3, "probe/path", {"result": np.arange(3.0)})
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in form.files_below(folder)}


def test_the_frames_are_those_that_are_believed_in_the_order_they_were_asked_for(
    store: MemoryStore, tmp_path: Path
) -> None:
    export_run(store, "hop", tmp_path / "out")
    frames = ase.io.read(tmp_path / "out" / "dataset.extxyz", ":")
    assert [frame.info["config_type"] for frame in frames] == ["data", "path-final", "path-initial"]
    assert [frame.info["REF_energy"] for frame in frames] == [-1.2, -1.1, -1.0]


def test_every_label_is_there_with_all_it_holds(store: MemoryStore, tmp_path: Path) -> None:
    export_run(store, "hop", tmp_path / "out")
    lines = [form.from_json(line) for line in (tmp_path / "out" / form.LABELS).read_text("utf-8").splitlines()]
    assert len(lines) == 5
    assert [line["label"]["key"] for line in lines] == sorted(line["label"]["key"] for line in lines)
    assert sorted(line["label"]["status"] for line in lines) == ["crashed", "ok", "ok", "ok", "ok"]
    (weights,) = (tmp_path / "out" / form.WEIGHTS).iterdir()
    assert weights.read_bytes() == b"first"
    (step,) = (tmp_path / "out" / form.STEPS).read_text("utf-8").splitlines()
    assert form.from_json(step)["content"]["result"].tolist() == [0.0, 1.0, 2.0]


def test_the_run_file_names_end_states_that_lie_beside_it(store: MemoryStore, tmp_path: Path) -> None:
    out = export_run(store, "hop", tmp_path / "out")
    text = (out / "run.yaml").read_text("utf-8")
    assert "elsewhere" not in text
    assert "initial: endpoints/0-initial.traj" in text
    end = Structure.from_atoms(ase.io.read(out / "endpoints" / "0-final.traj"))
    assert end.positions.tobytes() == labelled(0.1).structure.positions.tobytes()


def test_the_manifest_names_every_file(store: MemoryStore, tmp_path: Path) -> None:
    out = export_run(store, "hop", tmp_path / "out")
    manifest = form.read_manifest(out, 99)
    assert set(manifest.files) == set(contents(out)) - {form.MANIFEST}
    form.check_files(out, manifest)


def test_exported_again_it_is_the_same(store: MemoryStore, tmp_path: Path) -> None:
    first = contents(export_run(store, "hop", tmp_path / "first"))
    assert contents(export_run(store, "hop", tmp_path / "second")) == first


def test_an_earlier_export_goes_but_nothing_else(store: MemoryStore, tmp_path: Path) -> None:
    out = export_run(store, "hop", tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    (weights,) = (out / form.WEIGHTS).iterdir()
    for index in (1, 2):
        record = store.load_generation("hop", index)
        assert record is not None
        store.save_generation(dataclasses.replace(record, surrogate={}))
    lines: list[str] = []
    export_run(store, "hop", out, log=lines.append)
    assert not weights.exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert len(lines) == 1
    assert "notes.txt is no part of the export" in lines[0]


def test_a_manifest_cannot_make_an_export_remove_what_is_elsewhere(store: MemoryStore, tmp_path: Path) -> None:
    out = export_run(store, "hop", tmp_path / "out")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("mine")
    (out / "linked").symlink_to(tmp_path / "folder")
    values = json.loads((out / form.MANIFEST).read_text())
    values["files"] |= {"../precious": "0", "linked/precious": "0"}
    (out / form.MANIFEST).write_text(json.dumps(values))
    export_run(store, "hop", out)
    assert (tmp_path / "precious").exists()
    assert (tmp_path / "folder" / "precious").exists()


def test_an_export_that_is_cut_off_does_not_look_whole(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_run(store, "hop", tmp_path / "out")
    monkeypatch.setattr(store, "step_places", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(store, "hop", out)
    with pytest.raises(InputError, match=r"manifest.json: no such file"):
        form.read_manifest(out, 99)


def test_a_folder_that_cannot_be_written_is_one_line(store: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: "):
        export_run(store, "hop", tmp_path / "file" / "out")


def test_weights_that_torch_cannot_read_are_exported_as_they_are(store: MemoryStore, tmp_path: Path) -> None:
    record = store.load_generation("hop", 2)
    assert record is not None
    member = store.save_model(b"no weights", {})
    store.save_generation(dataclasses.replace(record, surrogate={"members": [member]}))
    lines: list[str] = []
    out = export_run(store, "hop", tmp_path / "out", log=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("no .model files, the weights alone: ")
    assert (out / form.WEIGHTS / f"{member}.pt").read_bytes() == b"no weights"


def test_weights_that_were_removed_are_told_of(store: MemoryStore, tmp_path: Path) -> None:
    record = store.load_generation("hop", 1)
    assert record is not None
    store.save_generation(dataclasses.replace(record, surrogate={"members": ["e" * 64]}))
    lines: list[str] = []
    out = export_run(store, "hop", tmp_path / "out", log=lines.append)
    assert lines == ["the weights eeeeeeeeeeee of an earlier committee are in the database no more"]
    assert (out / form.MODELS).read_text() == ""
