"""What lies in MongoDB, as mongoengine documents.

Fields carry the names of the alcore types they hold, so a query reads like the vocabulary:
``GenerationDocument.objects(paths__error_to_verified_ev__gt=0.01)``. Arrays are compressed npy bytes.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from bson import Binary, Int64
from mongoengine import (
    BooleanField,
    DateTimeField,
    DictField,
    Document,
    EmbeddedDocument,
    EmbeddedDocumentField,
    EmbeddedDocumentListField,
    FloatField,
    IntField,
    ListField,
    ObjectIdField,
    StringField,
)
from mongoengine.base import BaseField
from numpy.typing import NDArray

SCHEMA_VERSION = 2
SCHEMA_COLLECTION = "schema"
BLOB_COLLECTION = "blobs"
INT64 = 2**63
ESCAPES = {"%": "%25", ".": "%2E", "$": "%24", "\0": "%00"}


def pack_array(array: NDArray[Any]) -> bytes:
    """Compressed bytes that keep shape, dtype and every bit. Objects are refused with ValueError."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array, order="C"), allow_pickle=False)
    return zlib.compress(buffer.getvalue())


def unpack_array(packed: bytes) -> NDArray[Any]:
    """The read-only array that was packed."""
    array: NDArray[Any] = np.load(io.BytesIO(zlib.decompress(packed)), allow_pickle=False)
    array.setflags(write=False)
    return array


def encode_plain(value: Any) -> Any:
    """Plain values (what JSON has, plus bytes, numpy scalars and arrays, and ints of any size) as BSON takes them.

    Keys are escaped, so what starts with ``%`` here was never a user's key. Tuples become lists.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | float | str | bytes):
        return value
    if isinstance(value, int):
        return value if -INT64 <= value < INT64 else {"%int": str(value)}
    if isinstance(value, np.ndarray):
        return {"%npy": Binary(pack_array(value))}
    if isinstance(value, list | tuple):
        return [encode_plain(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("only strings can be keys")
        return {_escape(key): encode_plain(item) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__} is no plain value")


def decode_plain(value: Any) -> Any:
    """Undoes ``encode_plain``."""
    if isinstance(value, list):
        return [decode_plain(item) for item in value]
    if isinstance(value, Mapping):
        if "%int" in value:
            return int(value["%int"])
        if "%npy" in value:
            return unpack_array(value["%npy"])
        return {_unescape(key): decode_plain(item) for key, item in value.items()}
    return int(value) if isinstance(value, Int64) else value


def _escape(key: str) -> str:
    return "".join(ESCAPES.get(character, character) for character in key)


def _unescape(key: str) -> str:
    for character, escaped in reversed(ESCAPES.items()):  # "%25" last, or it would make new escapes
        key = key.replace(escaped, character)
    return key


class ArrayField(BaseField):
    """A numpy array of any shape and dtype."""

    def to_mongo(self, value: Any) -> Any:
        return Binary(pack_array(value))

    def to_python(self, value: Any) -> Any:
        return unpack_array(value) if isinstance(value, bytes) else value

    def validate(self, value: Any) -> None:
        if not isinstance(value, np.ndarray):
            self.error("must be a numpy array")


class PlainField(BaseField):
    """A mapping of plain values; its entries can be queried (``surrogate__strategy="multihead"``)."""

    def to_mongo(self, value: Any) -> Any:
        return encode_plain(value)

    def to_python(self, value: Any) -> Any:
        return decode_plain(value)

    def validate(self, value: Any) -> None:
        if not isinstance(value, Mapping):
            self.error("must be a mapping")

    def lookup_member(self, member_name: str) -> DictField:
        """How mongoengine finds the entry in a query."""
        return DictField(db_field=member_name)


class StructureDocument(EmbeddedDocument):
    """``alcore.types.Structure``."""

    numbers = ArrayField(required=True)
    positions = ArrayField(required=True)
    cell = ArrayField(required=True)
    pbc = ArrayField(required=True)
    fixed = ArrayField(required=True)
    charge = FloatField(required=True)
    magnetic_moments = ArrayField()


class ExtremumDocument(EmbeddedDocument):
    """``alcore.types.Extremum``."""

    kind = StringField(required=True)
    coordinate_ang = FloatField(required=True)
    energy_ev = FloatField(required=True)
    image = IntField(required=True)


class BarrierDocument(EmbeddedDocument):
    """``alcore.types.BarrierEstimate``."""

    forward_ev = FloatField(required=True)
    reverse_ev = FloatField(required=True)
    reaction_energy_ev = FloatField(required=True)
    spline_forward_ev = FloatField(required=True)
    sigma_ev = FloatField(required=True)
    sigma_committee_ev = FloatField(required=True)
    sigma_posterior_ev = FloatField(required=True)
    saddle_image = IntField(required=True)
    extrema = EmbeddedDocumentListField(ExtremumDocument)


class ResidualDocument(EmbeddedDocument):
    """``alcore.types.Residual``."""

    key = StringField(required=True)
    path = StringField(required=True)
    kind = StringField(required=True)
    generation = IntField(required=True)
    predicted_ev = FloatField(required=True)
    labelled_ev = FloatField(required=True)
    sigma_committee_ev = FloatField(required=True)
    sigma_posterior_ev = FloatField(required=True)
    sigma_ev = FloatField(required=True)
    fmax_ev_per_ang = FloatField(required=True)
    by_lead_ev = PlainField()


class CalibrationDocument(EmbeddedDocument):
    """``alcore.types.Calibration``."""

    factor = FloatField(required=True)
    n_residuals = IntField(required=True)
    source = StringField(required=True)


class DecisionDocument(EmbeddedDocument):
    """``alcore.types.Decision``."""

    stop = BooleanField(required=True)
    code = StringField(required=True)
    reason = StringField(required=True)


class PathDocument(EmbeddedDocument):
    """``alcore.types.PathRecord`` without its band, which is a ``BandDocument`` if ``has_band``."""

    path = StringField(required=True)
    initial = EmbeddedDocumentField(StructureDocument, required=True)
    final = EmbeddedDocumentField(StructureDocument, required=True)
    has_band = BooleanField(required=True)
    barrier = EmbeddedDocumentField(BarrierDocument)
    label_keys = ListField(StringField())
    residuals = EmbeddedDocumentListField(ResidualDocument)
    initial_label = StringField()
    final_label = StringField()
    initial_fmax_ev_per_ang = FloatField()
    final_fmax_ev_per_ang = FloatField()
    saddle_key = StringField()
    verified_barrier_ev = FloatField()
    saddle_fmax_ev_per_ang = FloatField()
    error_to_verified_ev = FloatField()
    error_to_reference_ev = FloatField()
    barrier_std_ev = FloatField()
    decision = EmbeddedDocumentField(DecisionDocument, required=True)


class GenerationDocument(Document):
    """``alcore.types.GenerationRecord``; ``dataset_size`` is the length of ``label_keys``."""

    run = StringField(required=True)
    index = IntField(required=True)
    paths = EmbeddedDocumentListField(PathDocument)
    label_keys = ListField(StringField())
    dataset_size = IntField(required=True)
    n_reference_calls = IntField(required=True)
    n_labels_reused = IntField(required=True)
    kinds = PlainField()
    calls_by_kind = PlainField()
    doubts = PlainField()
    calibration = EmbeddedDocumentField(CalibrationDocument, required=True)
    surrogate = PlainField()
    seconds = PlainField()
    sitting = IntField()
    decision = EmbeddedDocumentField(DecisionDocument, required=True)
    meta = {  # noqa: RUF012 - mongoengine's way
        "collection": "generations",
        "auto_create_index": False,
        "indexes": [
            {"fields": ["run", "index"], "unique": True},
            "paths.error_to_verified_ev",
            "paths.error_to_reference_ev",
            "decision.code",
            "label_keys",
        ],
    }


class BandDocument(Document):
    """``alcore.types.Band`` of one path in one generation."""

    run = StringField(required=True)
    generation = IntField(required=True)
    path = StringField(required=True)
    template = EmbeddedDocumentField(StructureDocument, required=True)
    positions = ArrayField(required=True)
    energies_ev = ArrayField(required=True)
    forces = ArrayField(required=True)
    sigma_committee_ev = ArrayField(required=True)
    sigma_posterior_ev = ArrayField(required=True)
    sigma_ev = ArrayField(required=True)
    coordinate_ang = ArrayField(required=True)
    status = StringField(required=True)
    reason = StringField()
    climbing_image = IntField()
    fmax_ev_per_ang = FloatField()
    n_steps = IntField()
    meta = {  # noqa: RUF012
        "collection": "bands",
        "auto_create_index": False,
        "indexes": [{"fields": ["run", "generation", "path"], "unique": True}, "status"],
    }


class LabelDocument(Document):
    """``alcore.types.Label`` with its structure, and what one would look for it by.

    ``fmax_ev_per_ang`` is the largest force on an atom that may move, ``elements`` the sorted symbols, ``formula`` in
    Hill's order, ``runs`` every run that used it, ``created`` (UTC) when it was first stored.
    """

    key = StringField(primary_key=True)
    structure = EmbeddedDocumentField(StructureDocument, required=True)
    status = StringField(required=True)
    fingerprint = StringField(required=True)
    calculator = StringField(required=True)
    energy_ev = FloatField()
    forces = ArrayField()
    stress = ArrayField()
    magnetic_moments = ArrayField()
    reason = StringField()
    folder = StringField()
    seconds = FloatField()
    reused = BooleanField()
    details = PlainField()
    formula = StringField(required=True)
    elements = ListField(StringField())
    n_atoms = IntField(required=True)
    fmax_ev_per_ang = FloatField()
    runs = ListField(StringField())
    created = DateTimeField()
    meta = {  # noqa: RUF012
        "collection": "labels",
        "auto_create_index": False,
        "indexes": [
            ("formula", "calculator", "fmax_ev_per_ang"),
            "elements",
            ("fingerprint", "status"),
            ("runs", "status"),
            ("calculator", "status"),
            ("status", "created"),
            "energy_ev",
            "created",
        ],
    }


class StepDocument(Document):
    """What one step of a generation that is not finished yet found (``alcore.steps``); it goes with its generation."""

    run = StringField(required=True)
    generation = IntField(required=True)
    name = StringField(required=True)
    content = PlainField(required=True)
    meta = {  # noqa: RUF012
        "collection": "steps",
        "auto_create_index": False,
        "indexes": [{"fields": ["run", "generation", "name"], "unique": True}],
    }


class SittingDocument(EmbeddedDocument):
    """``alcore.types.Sitting``."""

    started = StringField(required=True)
    host = StringField()
    versions = PlainField()
    code_sha256 = StringField()
    settings_sha256 = StringField()
    changed = PlainField()


class RunDocument(Document):
    """``alcore.types.RunRecord``."""

    name = StringField(primary_key=True)
    settings = PlainField()
    settings_sha256 = StringField()
    status = StringField(required=True)
    reason = StringField()
    sittings = EmbeddedDocumentListField(SittingDocument)
    started = StringField()
    finished = StringField()
    meta = {  # noqa: RUF012
        "collection": "runs",
        "auto_create_index": False,
        "indexes": ["-started", "status", "settings_sha256"],
    }


class ModelDocument(Document):
    """A model; ``file`` is the id of its weights in the GridFS bucket of the same name."""

    sha256 = StringField(primary_key=True)
    file = ObjectIdField(required=True)
    size_bytes = IntField(required=True)
    description = PlainField()
    created = DateTimeField()
    meta = {"collection": "models", "auto_create_index": False, "indexes": ["created"]}  # noqa: RUF012


class LeaseDocument(Document):
    """A name that ``owner`` holds until ``expires`` (the server's clock); ``token`` is new at each taking."""

    name = StringField(primary_key=True)
    owner = StringField(required=True)
    token = StringField(required=True)
    taken = DateTimeField(required=True)
    expires = DateTimeField(required=True)
    meta = {  # noqa: RUF012
        "collection": "leases",
        "auto_create_index": False,
        "indexes": [{"fields": ["expires"], "expireAfterSeconds": 24 * 3600}],
    }


DOCUMENTS = (
    RunDocument,
    GenerationDocument,
    BandDocument,
    StepDocument,
    LabelDocument,
    ModelDocument,
    LeaseDocument,
)
