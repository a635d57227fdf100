"""A run that ``al-loop export`` wrote, brought into a database: all of it or, where anything is wrong, nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alcore.errors import InputError
from alcore.identity import json_sha256, label_key
from alcore.plain import from_plain
from alcore.types import GenerationRecord, Label, RunRecord
from flows import export_format as form
from flows.export_format import Manifest, Watch
from flows.leases import LeaseKeeper
from flows.one_process import take_run
from flows.settings import NAME_PATTERN, unvouched

if TYPE_CHECKING:
    from storage.memory import MemoryStore
    from storage.store import MongoStore

    Store = MongoStore | MemoryStore

T = TypeVar("T")

DAMAGED = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError, InputError)
"""What goes wrong with records that al-loop did not write."""
AT_ONCE = 500
"""Labels that are held in memory."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did.

    Attributes:
        name: of the run.
        was_there: the very same run was there already, and nothing was done.
        n_generations, n_labels, n_models: of the run.
        n_known: labels of which the database had one.
    """

    name: str
    was_there: bool = False
    n_generations: int = 0
    n_labels: int = 0
    n_known: int = 0
    n_models: int = 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export whose files are whole and whose records can be read; ``name`` is what the run is to be called."""

    folder: Path
    manifest: Manifest
    name: str

    def run(self) -> RunRecord:
        """Its settings vouch for no model file here, whatever they did where it was exported."""

        def read(values: dict[str, Any]) -> RunRecord:
            found = from_plain(RunRecord, values)
            record = _storable(found, lambda store: store.save_run(found))
            _same_name(record.name, self.manifest.run)
            settings = unvouched(record.settings) | ({"name": self.name} if "name" in record.settings else {})
            if settings != record.settings:
                record = replace(record, settings=settings, settings_sha256=json_sha256(settings))
            record = replace(record, name=self.name)
            return _storable(record, lambda store: store.save_run(record))

        found = list(self._read(form.RUN, read))
        if len(found) != 1:
            raise InputError("must be one line", where=str(self.folder / form.RUN), mend="export again")
        return found[0]

    def generations(self) -> Iterator[GenerationRecord]:
        last = -1

        def read(values: dict[str, Any]) -> GenerationRecord:
            nonlocal last
            record = from_plain(GenerationRecord, values)
            _same_name(record.run, self.manifest.run)
            if record.index <= last:
                raise ValueError(f"generation {record.index} comes after {last}")
            if strange := [path.path for path in record.paths if not re.fullmatch(NAME_PATTERN, path.path)]:
                raise ValueError(f"{strange[0]!r} is no name of a hop")
            last = record.index
            record = replace(record, run=self.name)
            return _storable(record, lambda store: store.save_generation(record))

        return self._read(form.GENERATIONS, read)

    def labels(self) -> Iterator[tuple[Label, datetime | None]]:
        """Each with the time when it was first stored; those that the run itself computed are its own by any name."""

        def read(values: dict[str, Any]) -> tuple[Label, datetime | None]:
            label, created = from_plain(Label, values["label"]), values["created"]
            if label.key not in (label_key(label.structure, label.fingerprint), form.unproven_key(label)):
                raise ValueError(f"the key {label.key[:12]} is not that of its structure and calculator")
            if label.details.get("computed_by") == self.manifest.run:
                label = replace(label, details={**label.details, "computed_by": self.name})
            _storable(label, lambda store: store.save_label(label))
            return label, None if created is None else datetime.fromisoformat(created)

        return self._read(form.LABELS, read)

    def models(self) -> Iterator[tuple[Path, dict[str, object]]]:
        """File of the weights, and description."""

        def read(values: dict[str, Any]) -> tuple[Path, dict[str, object]]:
            sha256, description = values["sha256"], dict(values["description"])
            name = f"{form.WEIGHTS}/{sha256}.pt"
            if self.manifest.files.get(name) != sha256:
                raise ValueError(f"the weights {name} are not part of the export, or others")
            _storable(description, lambda store: store.save_model(b"", description))
            return self.folder / name, description

        return self._read(form.MODELS, read)

    def steps(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Generation, name and content of what an unfinished generation has found."""

        def read(values: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
            step = int(values["generation"]), str(values["name"]), dict(values["content"])
            return _storable(step, lambda store: store.save_step(self.name, *step))

        return self._read(form.STEPS, read)

    def count(self, name: str) -> int:
        """Lines of one of its files."""
        with (self.folder / name).open("rb") as file:
            return sum(1 for _ in file)

    def _read(self, name: str, made: Callable[[Any], T]) -> Iterator[T]:
        with (self.folder / name).open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    found = made(form.from_json(line))
                except DAMAGED as error:
                    raise InputError(
                        f"not what `al-loop export` writes: {' '.join(str(error).split())[:300]}",
                        where=f"{self.folder / name}: line {number}",
                        mend="export again",
                    ) from error
                yield found


def _same_name(name: str, expected: str) -> None:
    if name != expected:
        raise ValueError(f"it belongs to the run {name!r}, the manifest to {expected!r}")


def _storable(value: T, save: Callable[[MemoryStore], object]) -> T:
    """``value``, if a database takes it."""
    from storage.memory import MemoryStore

    save(MemoryStore())
    return value


def read_export(folder: str | Path, *, name: str | None = None, watch: Watch = form.unwatched) -> Export:
    """The export in a folder, checked as a whole; needs no database.

    Args:
        folder: the export.
        name: what to call the run; None: as it is called.
        watch: shows how far it is.

    Raises:
        InputError: a file is damaged, missing, or no part of it; or a newer al-loop wrote it.
    """
    from storage.documents import SCHEMA_VERSION

    folder = Path(folder)
    manifest = form.read_manifest(folder, SCHEMA_VERSION)
    if not re.fullmatch(NAME_PATTERN, name or manifest.run):
        where = "--name" if name else str(folder / form.MANIFEST)
        mend = "letters, digits, dots, dashes and underscores: --name NEW"
        raise InputError(f"{name or manifest.run!r} is no name of a run", where=where, mend=mend)
    form.check_files(folder, manifest, watch)
    export = Export(folder=folder, manifest=manifest, name=name or manifest.run)
    export.run()
    for records, file, what in (
        (export.generations(), form.GENERATIONS, "checking generations"),
        (export.labels(), form.LABELS, "checking labels"),
        (export.models(), form.MODELS, "checking models"),
        (export.steps(), form.STEPS, "checking steps"),
    ):
        for _ in zip(watch(range(export.count(file)), what), records, strict=True):
            pass
    return export


def import_run(
    store: Store,
    export: Export,
    *,
    watch: Watch = form.unwatched,
    log: Callable[[str], None] = lambda line: None,
) -> Imported:
    """Bring an export into a database. Labels that are there already stay as they are.

    The run's own record is written last: an import that is cut off has left no run, and can be done again.

    Args:
        store: where to.
        export: of ``read_export``.
        watch: shows how far it is.
        log: takes lines for a person.

    Raises:
        RunBusyError: a process works on a run of that name now.
        InputError: there is another run of that name.
    """
    with closing(LeaseKeeper(store, run=export.name)) as keeper:
        take_run(keeper, export.name, log)
        before = store.load_run(export.name)
        if before is None:
            return _write(store, export, watch)
        if not _is_same(store, before, export):
            raise InputError(
                f"there is another run named '{export.name}'", where=str(export.folder), mend="choose one: --name NEW"
            )
        return Imported(name=export.name, was_there=True)


def _write(store: Store, export: Export, watch: Watch) -> Imported:
    store.delete_run(export.name)  # what an import that was cut off has left
    sizes = {name: export.count(name) for name in form.RECORDS}
    for _, (file, description) in zip(watch(range(sizes[form.MODELS]), "storing models"), export.models(), strict=True):
        store.save_model(file.read_bytes(), description)
    n_known, labels = 0, export.labels()
    for _ in watch(range(0, sizes[form.LABELS], AT_ONCE), "storing labels"):
        n_known += _store_labels(store, list(islice(labels, AT_ONCE)), export.name)
    records = zip(watch(range(sizes[form.GENERATIONS]), "storing generations"), export.generations(), strict=True)
    for _, record in records:
        store.save_generation(record)
    for generation, name, content in export.steps():
        store.save_step(export.name, generation, name, content)
    store.save_run(export.run())
    return Imported(
        name=export.name,
        n_generations=sizes[form.GENERATIONS],
        n_labels=sizes[form.LABELS],
        n_known=n_known,
        n_models=sizes[form.MODELS],
    )


def _store_labels(store: Store, labels: Sequence[tuple[Label, datetime | None]], run: str) -> int:
    """Returns of how many the database had one: those stay, but for failed ones where a good one comes."""
    known = store.load_labels([label.key for label, _ in labels])
    for label, created in labels:
        here = known.get(label.key, label)
        store.save_label(label if label.ok else here, run, created)
    return len(known)


def _is_same(store: Store, before: RunRecord, export: Export) -> bool:
    """Whether the run that is there has the same record and the same generations."""
    imported = export.run()
    if (settings := unvouched(before.settings)) != before.settings:  # the run that was exported is here itself
        before = replace(before, settings=settings, settings_sha256=json_sha256(settings))
    if form.to_json(before) != form.to_json(imported):
        return False
    here = (store.load_generation(export.name, index) for index in store.generation_indices(export.name))
    pairs = zip_longest(here, export.generations())
    return all(None not in pair and form.to_json(pair[0]) == form.to_json(pair[1]) for pair in pairs)
