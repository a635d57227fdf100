"""A run as files: exact records that ``al-loop import`` reads, and data, models and a run file for other programs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.io import write
from ase.stress import voigt_6_to_full_3x3_stress

from alcore.endpoints import read_band
from alcore.errors import AlLoopError, InputError
from alcore.identity import POSITION_DECIMALS
from alcore.protocols import RecordStore
from alcore.types import GenerationRecord, Label, RunRecord, Structure
from alcore.vetting import believed
from flows import __version__, wiring
from flows import export_format as form
from flows.export_format import Manifest, Watch
from flows.runfile import dump_values
from flows.settings import unvouched
from flows.status import load_run

if TYPE_CHECKING:
    from storage.memory import MemoryStore
    from storage.store import MongoStore

    Store = MongoStore | MemoryStore

HEAD = "Default"
"""The head on which MACE trains frames that name no other."""
UNREADABLE = (pickle.UnpicklingError, RuntimeError, KeyError, ValueError, EOFError)
"""What torch says of bytes that are not the weights of this model."""
DATA = "data/0.extxyz"
AT_ONCE = 500
"""Labels that are held in memory."""


@dataclass
class _Seen:
    """What the generations say of the rest of the run.

    Attributes:
        first, last: generations, if there are any.
        asked: path of every label that was asked for, by key, in order.
        members: ids of all models, in order.
    """

    first: GenerationRecord | None = None
    last: GenerationRecord | None = None
    asked: dict[str, str] = field(default_factory=dict)
    members: dict[str, None] = field(default_factory=dict)

    def add(self, record: GenerationRecord) -> None:
        self.first, self.last = self.first or record, record
        for path in record.paths:
            for key in path.label_keys:
                self.asked.setdefault(key, path.path)
        self.members |= dict.fromkeys(map(str, record.surrogate.get("members") or ()))

    def keys(self) -> list[str]:
        """Of all labels, those the user brought along first, then as they were asked for."""
        known = [*self.last.label_keys, *self.last.kinds] if self.last else []
        return list(dict.fromkeys([*(key for key in known if key not in self.asked), *self.asked]))


def export_run(
    store: Store,
    name: str,
    folder: str | Path,
    *,
    watch: Watch = form.unwatched,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a run into a folder: all records exactly, weights as stored, and what other programs read.

    Args:
        store: where the run is.
        name: its name.
        folder: where to; made if need be. The files of an earlier export there are replaced.
        watch: shows how far it is.
        log: takes lines for a person: what is not as it could be.

    Returns:
        The folder.

    Raises:
        InputError: there is no run of that name, or the folder cannot be written.
    """
    run = load_run(store, name)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_earlier(folder)
        written = _Writer(folder)
        written.lines(form.RUN, [run])
        seen = _write_generations(store, name, written, watch)
        _write_labels(store, name, seen, written, watch)
        _write_models(store, seen, written, watch, log)
        _write_steps(store, name, written)
        _write_run_file(store, run, seen.first, written, log)
        written.files += _readable_models(store, run, seen.last, folder, log)
        _close(written, name)
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}", where=str(error.filename or folder)
        ) from error
    others = (file for file in form.files_below(folder) if file not in {form.MANIFEST, *written.files})
    if (other := next(others, None)) is not None:
        log(f"{folder / other} is no part of the export: `al-loop import` wants a folder that holds nothing else")
    return folder


class _Writer:
    """Writes into a folder, and remembers what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []

    def place(self, name: str) -> Path:
        """Where a file of that name goes; what was there is gone, so that no link is followed."""
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        self.files.append(name)
        return file

    def lines(self, name: str, values: Iterable[Any]) -> None:
        """One JSON value a line."""
        with self.place(name).open("w", encoding="utf-8", newline="\n") as file:
            for value in values:
                file.write(form.to_json(value) + "\n")


def _remove_earlier(folder: Path) -> None:
    """An export that is there already goes, its manifest first: one that is cut off must not look whole."""
    from storage.documents import SCHEMA_VERSION

    with suppress(InputError):  # none, or none of ours
        names = form.read_manifest(folder, SCHEMA_VERSION).files
        (folder / form.MANIFEST).unlink()
        for name in names:
            if form.is_inside(name) and form.first_link(folder, name) is None:
                (folder / name).unlink(missing_ok=True)
    (folder / form.MANIFEST).unlink(missing_ok=True)


def _close(written: _Writer, name: str) -> None:
    from storage.documents import SCHEMA_VERSION

    files = {file: form.sha256_of(written.folder / file) for file in sorted(written.files)}
    manifest = Manifest(run=name, al_loop=__version__, schema_version=SCHEMA_VERSION, files=files)
    form.write_manifest(written.folder, manifest)


def _write_generations(store: Store, name: str, written: _Writer, watch: Watch) -> _Seen:
    seen = _Seen()

    def records() -> Iterator[GenerationRecord]:
        for index in watch(store.generation_indices(name), "writing generations"):
            record = store.load_generation(name, index)
            if record is not None:
                seen.add(record)
                yield record

    written.lines(form.GENERATIONS, records())
    return seen


def _write_labels(store: Store, name: str, seen: _Seen, written: _Writer, watch: Watch) -> None:
    """Every label as it is stored, by key; and those that are believed as frames, in the order they were asked for."""
    dates = store.label_dates(name)
    keys = sorted({*dates, *seen.keys()})

    def entries() -> Iterator[dict[str, Any]]:
        for label in _labels(store, keys, watch, "writing labels"):
            date = dates.get(label.key)
            yield {"label": label, "created": None if date is None else _utc(date)}

    written.lines(form.LABELS, entries())
    kinds, doubts = (seen.last.kinds, seen.last.doubts) if seen.last else ({}, {})
    with written.place("dataset.extxyz").open("w", encoding="utf-8") as file:
        for stored in _labels(store, seen.keys(), watch, "writing frames"):
            label = believed({stored.key: stored}, doubts)[stored.key]
            if not label.ok or label.forces is None:
                continue
            path, kind = seen.asked.get(label.key), kinds.get(label.key, "unknown")
            write(file, labelled_atoms(label, "data" if path is None else f"{path}-{kind}"), format="extxyz")


def _labels(store: Store, keys: Sequence[str], watch: Watch, what: str) -> Iterator[Label]:
    """Those of ``keys`` that are stored, a few at a time."""
    for start in watch(range(0, len(keys), AT_ONCE), what):
        yield from store.load_labels(keys[start : start + AT_ONCE]).values()


def _utc(date: datetime) -> str:
    """MongoDB's times have no zone: they are UTC."""
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).isoformat()


def _write_models(store: Store, seen: _Seen, written: _Writer, watch: Watch, log: Callable[[str], None]) -> None:
    """The weights of every committee, byte by byte as they are stored; their sha256 is their name."""
    entries = []
    for sha256 in watch(sorted(seen.members), "writing models"):
        description = store.describe_model(sha256)
        if description is None:
            log(f"the weights {sha256[:12]} of an earlier committee are in the database no more")
            continue
        written.place(f"{form.WEIGHTS}/{sha256}.pt").write_bytes(store.load_model(sha256))
        entries.append({"sha256": sha256, "description": description})
    written.lines(form.MODELS, entries)


def _write_steps(store: Store, name: str, written: _Writer) -> None:
    places = store.step_places(name)
    written.lines(
        form.STEPS,
        (
            {"generation": generation, "name": step, "content": store.load_step(name, generation, step)}
            for generation, step in places
        ),
    )


def _write_run_file(
    store: Store, run: RunRecord, first: GenerationRecord | None, written: _Writer, log: Callable[[str], None]
) -> None:
    """The run file as resolved; end states, bands and labels that were brought along lie beside it, so that the run can
    be gone on with anywhere. It vouches for no model file."""
    ends = {path.path: path for path in first.paths} if first else {}
    changed: dict[str, Any] = {}
    paths = []
    for number, path in enumerate(run.settings.get("paths") or ()):
        record, moved = ends.get(path.get("name")), dict(path)
        for side in ("initial", "final"):
            if record is not None and path.get(side) is not None:
                moved[side] = f"endpoints/{number}-{side}.traj"  # exact, as extxyz is not
                write(written.place(moved[side]), getattr(record, side).to_atoms(), format="traj")
        if path.get("band") is not None:
            moved["band"] = _write_band(path["band"], number, written, log)
        paths.append(moved)
    if "paths" in run.settings:
        changed["paths"] = paths
    if run.settings.get("data") and first is not None:
        changed["data"] = _write_data(store, first, written)
    foundation = str((run.settings.get("model") or {}).get("foundation") or "")
    if foundation.endswith(".model"):
        log(f"run.yaml names {foundation}, which is no part of the export: elsewhere, set model.foundation to its copy")
    written.place("run.yaml").write_text(dump_values({**unvouched(run.settings), **changed}), encoding="utf-8")


def _write_band(file: str, number: int, written: _Writer, log: Callable[[str], None]) -> str:
    """The starting band beside the run file, if its own file is still there; returns the path that names it."""
    try:
        frames = read_band(Path(file), f"paths.{number}.band")
    except InputError as error:
        log(f"run.yaml names a band that is no part of the export: {error}")
        return file
    copied = f"endpoints/{number}-band.traj"
    write(written.place(copied), frames, format="traj")
    return copied


def _write_data(store: Store, first: GenerationRecord, written: _Writer) -> list[str]:
    """The labels that the user brought along, as one file; those that were asked for too are known anyway."""
    keys = [key for key, kind in first.kinds.items() if kind == "data"]
    if not keys:
        return []
    with written.place(DATA).open("w", encoding="utf-8") as file:
        for label in _labels(store, keys, form.unwatched, "writing data"):
            write(file, labelled_atoms(label, "data"), format="extxyz")
    return [DATA]


def labelled_atoms(label: Label, config_type: str) -> Atoms:
    """A sound label with the keys MACE reads (eV, eV/Å, eV/Å³)."""
    atoms = _atoms(label.structure)
    atoms.info |= {
        "REF_energy": label.energy_ev,
        "config_type": config_type,
        "head": HEAD,
        "calculator": label.calculator,
        "fingerprint": label.fingerprint,
        "key": label.key,
    }
    if label.key == form.unproven_key(label):
        del atoms.info["fingerprint"]  # or whoever reads it would take it for the calculator's own
    atoms.arrays["REF_forces"] = np.asarray(label.forces)
    if label.stress is not None:
        atoms.info["REF_stress"] = voigt_6_to_full_3x3_stress(label.stress)
    return atoms


def _atoms(structure: Structure) -> Atoms:
    """Rounded as content keys round, so that the eight decimals of the file have the same key when they are read."""
    atoms = structure.moved(structure.positions.round(POSITION_DECIMALS)).to_atoms()
    if structure.magnetic_moments is not None:
        atoms.set_initial_magnetic_moments(structure.magnetic_moments.round(POSITION_DECIMALS))
    return atoms


def _readable_models(
    store: RecordStore,
    run: RunRecord,
    last: GenerationRecord | None,
    folder: Path,
    log: Callable[[str], None],
) -> list[str]:
    """The last committee as ``.model`` files, if it can be made into them here."""
    try:
        return (
            [] if last is None else [f"models/{file.name}" for file in save_models(store, run, last, folder / "models")]
        )
    except (AlLoopError, *UNREADABLE) as error:
        log(f"no .model files, the weights alone: {error}")
        return []


def save_models(store: RecordStore, run: RunRecord, last: GenerationRecord, folder: Path) -> list[Path]:
    """The committee as ``.model`` files, which ``mace.calculators.MACECalculator`` reads; none before it was trained.

    The store keeps weights alone. What they are the weights of is the foundation model, or the small MACE of the
    elements that stand among them. Only the user's own list vouches for a model that runs code: the run may be foreign.

    Raises:
        ModelError: the foundation model cannot be loaded any more.
        StoreError: the weights are not there any more.
    """
    members: Sequence[str] = last.surrogate.get("members") or ()
    if not members:
        return []
    import torch

    from alcore.mace.models import build_model, load_foundation, with_weights

    model: Mapping[str, Any] = run.settings.get("model") or {}
    weights = [store.load_model(sha256) for sha256 in members]
    if model.get("foundation") and model.get("strategy") != "scratch":
        base = load_foundation(model["foundation"], trust=wiring.model_trust(None))
    else:
        numbers = torch.load(io.BytesIO(weights[0]), weights_only=True)["atomic_numbers"]
        base = build_model(numbers.tolist(), seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"member-{i}.model" for i in range(len(weights))]
    for file, data in zip(files, weights, strict=True):
        file.unlink(missing_ok=True)
        torch.save(with_weights(base, data), file)
    return files
