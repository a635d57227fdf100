"""The in-memory twin of ``MongoStore``: same behaviour, same mapping, nothing outlives it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bson import decode, encode

from alcore.errors import StoreError
from alcore.identity import sha256_hex
from alcore.types import GenerationRecord, Label, RunRecord
from storage import mapping, queries
from storage.documents import REMOVED, BandDocument, GenerationDocument, LabelDocument, RunDocument
from storage.fields import decode_plain, encode_plain
from storage.leases import MemoryLeases
from storage.provenance import Provenance, provenance_from_rows, rows_of_parts
from storage.uris import redact_tree

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""It has no clock: whatever is not said to be of another time is of this one."""


class MemoryStore(MemoryLeases):
    """``alcore.protocols.RecordStore`` that keeps the very bytes MongoDB would be sent; a ``LeaseStore``, too."""

    def __init__(self) -> None:
        super().__init__()
        self._runs: dict[str, bytes] = {}
        self._generations: dict[str, dict[int, tuple[bytes, list[bytes]]]] = {}
        self._labels: dict[str, tuple[bytes, set[str]]] = {}
        self._dates: dict[str, datetime] = {}
        self._models: dict[str, tuple[bytes, bytes]] = {}
        self._steps: dict[tuple[str, int, str], bytes] = {}

    def load_run(self, name: str) -> RunRecord | None:
        son = self._runs.get(name)
        return None if son is None else mapping.run_from_document(mapping.from_son(RunDocument, decode(son)))

    def save_run(self, run: RunRecord) -> None:
        clean = dataclasses.replace(run, settings=redact_tree(run.settings))
        self._runs[run.name] = encode(mapping.to_son(mapping.run_to_document(clean)))

    def list_runs(self) -> list[RunRecord]:
        documents = [mapping.from_son(RunDocument, decode(son)) for son in list(self._runs.values())]
        runs = [mapping.run_from_document(document) for document in documents]
        return sorted(runs, key=lambda run: (run.started, run.name), reverse=True)

    def delete_run(self, name: str) -> bool:
        """Forgets a run with its generations; its labels and models stay. Returns whether there was one."""
        with self._lock:
            self._generations.pop(name, None)
            for place in [place for place in self._steps if place[0] == name]:
                del self._steps[place]
            for key, (son, runs) in self._labels.items():
                label = decode(son)
                if name in self._runs and name in runs and label.get("details", {}).get("computed_by") == name:
                    label["details"]["computed_by"] = f"{name}{REMOVED}"
                    self._labels[key] = (encode(label), runs)
                runs.discard(name)
            return self._runs.pop(name, None) is not None

    def run_rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """A row a run (only ``name``'s), newest first (``storage.queries``)."""
        with self._lock:
            runs = [decode(son) for run, son in self._runs.items() if name in (None, run)]
            lasts = {run: decode(of_run[max(of_run)][0]) for run, of_run in self._generations.items() if of_run}
        return queries.rows_from_sons(runs, lasts)

    def load_generations(self, run: str) -> list[GenerationRecord]:
        with self._lock:
            stored = sorted(self._generations.get(run, {}).items())
        records = []
        for _, (generation, band_sons) in stored:
            bands = [mapping.from_son(BandDocument, decode(son)) for son in band_sons]
            document = mapping.from_son(GenerationDocument, decode(generation))
            records.append(mapping.generation_from_documents(document, {band.path: band for band in bands}))
        return records

    def save_generation(self, record: GenerationRecord) -> None:
        generation, bands = mapping.generation_to_documents(record)
        with self._lock:
            statuses = {key: decode(son)["status"] for key, (son, _) in self._labels.items()}
            son = mapping.to_son(generation)
            son["labels_by_status"] = queries.count_labels(son, statuses)
            stored = encode(son), [encode(mapping.to_son(band)) for band in bands]
            self._generations.setdefault(record.run, {})[record.index] = stored

    def generation_indices(self, run: str) -> list[int]:
        """In order."""
        with self._lock:
            return sorted(self._generations.get(run, {}))

    def load_generation(self, run: str, index: int) -> GenerationRecord | None:
        """One of ``load_generations``."""
        return next((record for record in self.load_generations(run) if record.index == index), None)

    def load_step(self, run: str, generation: int, name: str) -> dict[str, Any] | None:
        son = self._steps.get((run, generation, name))
        return None if son is None else decode_plain(decode(son)["content"])

    def save_step(self, run: str, generation: int, name: str, content: Mapping[str, Any]) -> None:
        self._steps[run, generation, name] = encode({"content": encode_plain(content)})

    def step_places(self, run: str) -> list[tuple[int, str]]:
        """Generation and name of every step that is remembered, in order."""
        with self._lock:
            return sorted((generation, name) for owner, generation, name in self._steps if owner == run)

    def forget_steps(self, run: str, generation: int) -> None:
        with self._lock:
            for place in [place for place in self._steps if place[0] == run and place[1] <= generation]:
                del self._steps[place]

    def load_labels(self, keys: Sequence[str]) -> dict[str, Label]:
        with self._lock:
            sons = {key: self._labels[key][0] for key in keys if key in self._labels}
        return {
            key: mapping.label_from_document(mapping.from_son(LabelDocument, decode(son))) for key, son in sons.items()
        }

    def save_label(self, label: Label, run: str = "", created: datetime | None = None) -> None:
        """The first ``ok`` label of a key stays for ever, but that one that was computed replaces one that was derived
        by symmetry; until there is one, the last failure is kept."""
        son = encode(mapping.to_son(mapping.label_to_document(label)))
        with self._lock:
            kept, runs = self._labels.get(label.key, (son, set()))
            self._dates.setdefault(label.key, created or EPOCH)
            if run:
                runs.add(run)
            old = decode(kept)
            replaced = label.ok and not label.derived_from and "equivalent_to" in old.get("details", {})
            self._labels[label.key] = (kept if old["status"] == "ok" and not replaced else son, runs)

    def count_labels_by_status(self, run: str | None = None) -> dict[str, int]:
        """How many labels there are (that ``run`` used), by status; statuses without any are absent."""
        with self._lock:
            stored = [decode(son)["status"] for son, runs in self._labels.values() if run is None or run in runs]
        return dict(sorted(Counter(stored).items()))

    def label_dates(self, run: str) -> dict[str, datetime]:
        """When each label that ``run`` asked for, or was given, was first stored, by key; it has no clock."""
        with self._lock:
            return {key: self._dates[key] for key in sorted(self._labels) if run in self._labels[key][1]}

    def provenance(self, run: str, generation: int | None = None) -> Provenance | None:
        """Where the barriers of ``generation`` (None: the last) came from; None without such a run."""
        with self._lock:
            runs = {name: decode(son) for name, son in self._runs.items()}
            generations = [decode(son) for _, (son, _) in sorted(self._generations.get(run, {}).items())]
            labels = {
                key: {**decode(son), "runs": sorted(runs), "created": self._dates[key]}
                for key, (son, runs) in self._labels.items()
            }
            models = {
                sha256: {"_id": sha256, "size_bytes": len(data), "description": decode(description)}
                for sha256, (data, description) in self._models.items()
            }
        parts = {"runs": runs, "labels": labels, "models": models}
        return provenance_from_rows(rows_of_parts(run, generation, generations=generations, **parts))

    def save_model(self, weights: bytes, description: dict[str, object]) -> str:
        try:
            described = encode(encode_plain(description))
        except TypeError as error:
            raise StoreError(f"cannot be stored: {error}", where="description of a model") from error
        sha256 = sha256_hex(weights)
        self._models.setdefault(sha256, (bytes(weights), described))
        return sha256

    def load_model(self, sha256: str) -> bytes:
        try:
            return self._models[sha256][0]
        except KeyError:
            raise StoreError(f"nothing with sha256 {sha256!r} is stored", where="models") from None

    def describe_model(self, sha256: str) -> dict[str, Any] | None:
        """What was stored with the model of that id; None if there is none."""
        return decode_plain(decode(self._models[sha256][1])) if sha256 in self._models else None

    def close(self) -> None:
        """Nothing to do: what it remembers goes with it."""
