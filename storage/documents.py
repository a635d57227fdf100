"""What lies in MongoDB, as mongoengine documents.

Fields carry the names of the alcore types they hold, so a query reads like the vocabulary:
``GenerationDocument.objects(paths__error_to_verified_ev__gt=0.01)``. Arrays are compressed npy bytes. A field that a
document lacks gets its default and one that is not known here is left out, so what earlier and later al-loops wrote can
be read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mongoengine import (
    BooleanField,
    DateTimeField,
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

from alcore import types
from storage.fields import ArrayField, PlainField

REMOVED = " (removed)"
"""Behind the name of the run that computed a label, once there is no such run any more."""
SCHEMA_VERSION = 2
SCHEMA_COLLECTION = "schema"
BLOB_COLLECTION = "blobs"


class Part(EmbeddedDocument):
    """A part of a document."""

    meta: ClassVar[dict[str, Any]] = {"abstract": True, "strict": False}


class Kept(Document):
    """A document with a collection of its own; ``MongoStore`` makes the indexes."""

    meta: ClassVar[dict[str, Any]] = {"abstract": True, "strict": False, "auto_create_index": False}


class StructureDocument(Part):
    """``alcore.types.Structure``."""

    numbers = ArrayField(required=True)
    positions = ArrayField(required=True)
    cell = ArrayField(required=True)
    pbc = ArrayField(required=True)
    fixed = ArrayField(required=True)
    charge = FloatField(required=True)
    magnetic_moments = ArrayField()


class ExtremumDocument(Part):
    """``alcore.types.Extremum``."""

    kind = StringField(required=True)
    coordinate_ang = FloatField(required=True)
    energy_ev = FloatField(required=True)
    image = IntField(required=True)


class BarrierDocument(Part):
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


class ResidualDocument(Part):
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
    image = IntField()


class CalibrationDocument(Part):
    """``alcore.types.Calibration``."""

    factor = FloatField(required=True)
    astray = FloatField(default=types.Calibration.astray)  # older documents have none
    n_residuals = IntField(required=True)
    source = StringField(required=True)


class DecisionDocument(Part):
    """``alcore.types.Decision``."""

    stop = BooleanField(required=True)
    code = StringField(required=True)
    reason = StringField(required=True)


class PathDocument(Part):
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


class GenerationDocument(Kept):
    """``alcore.types.GenerationRecord``; ``dataset_size`` is the length of ``label_keys``, ``labels_by_status`` counts
    all labels so far, as they stood when it was saved.

    Bulky fields (``storage.files.BULKY``) that are long lie in GridFS, with their digest in place.
    """

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
    labels_by_status = PlainField()
    calibration = EmbeddedDocumentField(CalibrationDocument, required=True)
    surrogate = PlainField()
    seconds = PlainField()
    sitting = IntField()
    decision = EmbeddedDocumentField(DecisionDocument, required=True)
    meta: ClassVar[dict[str, Any]] = {
        "collection": "generations",
        "indexes": [
            {"fields": ["run", "index"], "unique": True},
            ("paths.error_to_verified_ev", "run"),
            ("paths.error_to_reference_ev", "run"),
            "decision.code",
            "paths.label_keys",
        ],
    }


class BandDocument(Kept):
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
    minima = ListField(IntField())
    meta: ClassVar[dict[str, Any]] = {
        "collection": "bands",
        "indexes": [{"fields": ["run", "generation", "path"], "unique": True}, "status"],
    }


class LabelDocument(Kept):
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
    meta: ClassVar[dict[str, Any]] = {
        "collection": "labels",
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


class StepDocument(Kept):
    """What one step of a generation that is not finished yet found (``alcore.steps``); it goes with its generation."""

    run = StringField(required=True)
    generation = IntField(required=True)
    name = StringField(required=True)
    content = PlainField(required=True)
    meta: ClassVar[dict[str, Any]] = {
        "collection": "steps",
        "indexes": [{"fields": ["run", "generation", "name"], "unique": True}],
    }


class SittingDocument(Part):
    """``alcore.types.Sitting``."""

    started = StringField(required=True)
    host = StringField()
    versions = PlainField()
    code_sha256 = StringField()
    settings_sha256 = StringField()
    changed = PlainField()


class RunDocument(Kept):
    """``alcore.types.RunRecord``."""

    name = StringField(primary_key=True)
    settings = PlainField()
    settings_sha256 = StringField()
    status = StringField(required=True)
    reason = StringField()
    sittings = EmbeddedDocumentListField(SittingDocument)
    started = StringField()
    finished = StringField()
    meta: ClassVar[dict[str, Any]] = {
        "collection": "runs",
        "indexes": ["-started", "status", "settings_sha256"],
    }


class ModelDocument(Kept):
    """A model; ``file`` is the id of its weights in the GridFS bucket of the same name."""

    sha256 = StringField(primary_key=True)
    file = ObjectIdField(required=True)
    size_bytes = IntField(required=True)
    description = PlainField()
    created = DateTimeField()
    meta: ClassVar[dict[str, Any]] = {"collection": "models", "indexes": ["created"]}


class LeaseDocument(Kept):
    """A name that ``owner`` holds until ``expires`` (the server's clock); ``token`` is new at each taking."""

    name = StringField(primary_key=True)
    owner = StringField(required=True)
    token = StringField(required=True)
    taken = DateTimeField(required=True)
    expires = DateTimeField(required=True)
    meta: ClassVar[dict[str, Any]] = {
        "collection": "leases",
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
