"""alcore types <-> documents <-> BSON, losslessly: what comes back is what went in, arrays bit for bit.

Documents name their fields like the types do, so one recursion serves them all; only what differs is written out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from ase.symbols import Symbols
from bson import encode
from bson.errors import BSONError
from mongoengine import Document, EmbeddedDocument
from mongoengine.errors import ValidationError

from alcore import types
from alcore.errors import StoreError
from storage import documents

T = TypeVar("T")

EMBEDDED: Mapping[type, type[EmbeddedDocument]] = {
    types.Structure: documents.StructureDocument,
    types.Extremum: documents.ExtremumDocument,
    types.BarrierEstimate: documents.BarrierDocument,
    types.Residual: documents.ResidualDocument,
    types.Calibration: documents.CalibrationDocument,
    types.Decision: documents.DecisionDocument,
    types.PathRecord: documents.PathDocument,
    types.Sitting: documents.SittingDocument,
}
TYPES = {document: kind for kind, document in EMBEDDED.items()}


def run_to_document(run: types.RunRecord) -> documents.RunDocument:
    return _make(documents.RunDocument, _fields(run))


def run_from_document(document: documents.RunDocument) -> types.RunRecord:
    return _restore(types.RunRecord, document)


def label_to_document(label: types.Label) -> documents.LabelDocument:
    """Without ``runs`` and ``created``, which belong to the store."""
    symbols = Symbols(label.structure.numbers)
    fmax = None if label.forces is None or not len(label.forces) else label.structure.free_fmax(label.forces)
    searched = {
        "formula": symbols.get_chemical_formula(),
        "elements": sorted(set(symbols)),
        "n_atoms": len(label.structure),
        "fmax_ev_per_ang": fmax,
    }
    return _make(documents.LabelDocument, _fields(label) | searched)


def label_from_document(document: documents.LabelDocument) -> types.Label:
    return _restore(types.Label, document)


def generation_to_documents(
    record: types.GenerationRecord,
) -> tuple[documents.GenerationDocument, list[documents.BandDocument]]:
    """The generation's document and those of its bands."""
    generation = _make(documents.GenerationDocument, _fields(record) | {"dataset_size": len(record.label_keys)})
    place = {"run": record.run, "generation": record.index}
    bands = [
        _make(documents.BandDocument, _fields(path.band) | place | {"path": path.path})
        for path in record.paths
        if path.band is not None
    ]
    return generation, bands


def generation_from_documents(
    generation: documents.GenerationDocument, bands: Mapping[str, documents.BandDocument]
) -> types.GenerationRecord:
    """Args: ``bands`` by path.

    Raises:
        StoreError: a band is missing.
    """
    record = _restore(types.GenerationRecord, generation)
    paths = []
    for path, row in zip(record.paths, generation.paths, strict=True):
        if row.has_band and path.path not in bands:
            where = f"run {record.run}, generation {record.index}"
            raise StoreError(f"the band of path {path.path!r} is missing", where=where)
        band = _restore(types.Band, bands[path.path]) if row.has_band else None
        paths.append(dataclasses.replace(path, band=band))
    return dataclasses.replace(record, paths=tuple(paths))


def to_son(document: Document) -> dict[str, Any]:
    """The document as MongoDB stores it.

    Raises:
        StoreError: it holds something that cannot be stored.
    """
    try:
        document.validate(clean=False)
        son = dict(document.to_mongo())
        encode(son)
    except (ValidationError, BSONError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"cannot be stored: {error}", where=type(document).__name__) from error
    return son


def from_son(kind: type[T], son: Mapping[str, Any]) -> T:
    """The document of class ``kind`` that was stored as ``son``."""
    document: T = kind._from_son(dict(son))  # type: ignore[attr-defined]
    return document


def _make(kind: Callable[..., T], fields: Mapping[str, Any]) -> T:
    """A document with these values as they are: mongoengine would take them for values that come from the database."""
    return kind(**fields, __auto_convert=False)


def _fields(value: Any) -> dict[str, Any]:
    """The attributes; a band is left out, it has a document of its own."""
    names = [field.name for field in dataclasses.fields(value) if field.name != "band"]
    return {name: _encode(getattr(value, name)) for name in names}


def _encode(value: Any) -> Any:
    """An attribute as a document's field takes it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if type(value) in EMBEDDED:
        fields = _fields(value)
        if isinstance(value, types.PathRecord):
            fields["has_band"] = value.band is not None
        return _make(EMBEDDED[type(value)], fields)
    return value


def _restore(kind: type[T], document: Any) -> T:
    """The alcore object whose attributes are the document's fields; absent ones get their default."""
    names = [field.name for field in dataclasses.fields(kind) if field.name != "band"]  # type: ignore[arg-type]
    values = {name: _decode(getattr(document, name)) for name in names}
    return kind(**{name: value for name, value in values.items() if value is not None})


def _decode(value: Any) -> Any:
    if isinstance(value, EmbeddedDocument):
        return _restore(TYPES[type(value)], value)
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    return _unwrapped(value)


def _unwrapped(value: Any) -> Any:
    """Plain values without the dicts and lists that mongoengine puts in their place to watch for changes."""
    if isinstance(value, dict):
        return {key: _unwrapped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unwrapped(item) for item in value]
    return value
