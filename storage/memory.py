"""The in-memory twin of ``MongoStore``: same behaviour, same mapping, nothing outlives it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bson import decode, encode

from alcore.errors import StoreError
from alcore.identity import sha256_hex
from alcore.types import GenerationRecord, Label, RunRecord
from storage import mapping
from storage.documents import BandDocument, GenerationDocument, LabelDocument, RunDocument, decode_plain, encode_plain
from storage.leases import MemoryLeases
from storage.uris import redact_tree


class MemoryStore(MemoryLeases):
    """``alcore.protocols.RecordStore`` that keeps the very bytes MongoDB would be sent; a ``LeaseStore``, too."""

    def __init__(self) -> None:
        super().__init__()
        self._runs: dict[str, bytes] = {}
        self._generations: dict[str, dict[int, tuple[bytes, list[bytes]]]] = {}
        self._labels: dict[str, tuple[bytes, set[str]]] = {}
        self._models: dict[str, bytes] = {}
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
            for _, runs in self._labels.values():
                runs.discard(name)
            return self._runs.pop(name, None) is not None

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
        stored = encode(mapping.to_son(generation)), [encode(mapping.to_son(band)) for band in bands]
        with self._lock:
            self._generations.setdefault(record.run, {})[record.index] = stored

    def load_step(self, run: str, generation: int, name: str) -> dict[str, Any] | None:
        son = self._steps.get((run, generation, name))
        return None if son is None else decode_plain(decode(son)["content"])

    def save_step(self, run: str, generation: int, name: str, content: Mapping[str, Any]) -> None:
        self._steps[run, generation, name] = encode({"content": encode_plain(content)})

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

    def save_label(self, label: Label, run: str = "") -> None:
        """The first ``ok`` label of a key stays for ever; until there is one, the last failure is kept."""
        son = encode(mapping.to_son(mapping.label_to_document(label)))
        with self._lock:
            kept, runs = self._labels.get(label.key, (son, set()))
            if run:
                runs.add(run)
            self._labels[label.key] = (kept if decode(kept)["status"] == "ok" else son, runs)

    def count_labels_by_status(self, run: str | None = None) -> dict[str, int]:
        """How many labels there are (that ``run`` used), by status; statuses without any are absent."""
        with self._lock:
            stored = [decode(son)["status"] for son, runs in self._labels.values() if run is None or run in runs]
        return dict(sorted(Counter(stored).items()))

    def save_model(self, weights: bytes, description: dict[str, object]) -> str:
        try:
            encode_plain(description)
        except TypeError as error:
            raise StoreError(f"cannot be stored: {error}", where="description of a model") from error
        sha256 = sha256_hex(weights)
        self._models.setdefault(sha256, bytes(weights))
        return sha256

    def load_model(self, sha256: str) -> bytes:
        try:
            return self._models[sha256]
        except KeyError:
            raise StoreError(f"nothing with sha256 {sha256!r} is stored", where="models") from None

    def close(self) -> None:
        """Nothing to do: what it remembers goes with it."""
