"""What goes into the database comes out of it, bit for bit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import numpy as np
import pytest
from bson import decode, encode
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alcore import types
from alcore.errors import StoreError
from storage import mapping
from storage.documents import (
    BandDocument,
    CalibrationDocument,
    GenerationDocument,
    LabelDocument,
    RunDocument,
)
from storage.fields import decode_plain, encode_plain, pack_array, unpack_array

floats = st.floats()  # inf, nan and -0.0 too
optional_floats = st.none() | floats
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
counts = st.integers(0, 2**40)
keys = st.text("0123456789abcdef", min_size=4, max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts | hnp.arrays(np.float64, (2, 2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts | st.sampled_from(["a.b", "$x", "%int", "%2E", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)
mappings = st.dictionaries(texts, plain, max_size=3)


def arrays(*shape: int) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.float64, shape)


@st.composite
def structures(draw: st.DrawFn, n_atoms: int | None = None) -> types.Structure:
    n = draw(st.integers(1, 3)) if n_atoms is None else n_atoms
    return types.Structure(
        numbers=draw(hnp.arrays(np.int64, n, elements=st.integers(1, 118))),
        positions=draw(arrays(n, 3)),
        cell=draw(arrays(3, 3)),
        pbc=draw(hnp.arrays(np.bool_, 3)),
        fixed=draw(hnp.arrays(np.bool_, (n, 3))),
        charge=draw(floats),
        magnetic_moments=draw(st.none() | arrays(n)),
    )


@st.composite
def labels(draw: st.DrawFn) -> types.Label:
    structure = draw(structures())
    n = len(structure)
    return types.Label(
        key=draw(keys),
        structure=structure,
        status=draw(st.sampled_from(get_args(types.LabelStatus))),
        fingerprint=draw(keys),
        calculator=draw(texts),
        energy_ev=draw(optional_floats),
        forces=draw(st.none() | arrays(n, 3)),
        stress=draw(st.none() | arrays(6)),
        magnetic_moments=draw(st.none() | arrays(n)),
        reason=draw(texts),
        folder=draw(texts),
        seconds=draw(floats),
        reused=draw(st.booleans()),
        details=draw(mappings),
    )


@st.composite
def bands(draw: st.DrawFn, path: str) -> types.Band:
    n_images, template = draw(st.integers(2, 4)), draw(structures())
    shape = (n_images, len(template), 3)
    profiles = ("energies_ev", "sigma_committee_ev", "sigma_posterior_ev", "sigma_ev", "coordinate_ang")
    return types.Band(
        path=path,
        template=template,
        positions=draw(arrays(*shape)),
        forces=draw(arrays(*shape)),
        **{name: draw(arrays(n_images)) for name in profiles},
        status=draw(st.sampled_from(["converged", "max_steps", "guarded"])),
        reason=draw(texts),
        climbing_image=draw(st.none() | st.integers(0, 3)),
        fmax_ev_per_ang=draw(floats),
        n_steps=draw(counts),
        minima=draw(st.lists(st.integers(1, 3), max_size=2).map(tuple)),
    )


extrema = st.builds(
    types.Extremum, kind=st.sampled_from(["minimum", "maximum"]), coordinate_ang=floats, energy_ev=floats, image=counts
)
barriers = st.builds(
    types.BarrierEstimate,
    **dict.fromkeys(
        (
            "forward_ev", "reverse_ev", "reaction_energy_ev", "spline_forward_ev",
            "sigma_ev", "sigma_committee_ev", "sigma_posterior_ev",
        ),
        floats,
    ),
    saddle_image=counts,
    extrema=st.lists(extrema, max_size=2).map(tuple),
)  # fmt: skip
residuals = st.builds(
    types.Residual,
    key=keys, path=texts, kind=st.sampled_from(get_args(types.LabelKind)), generation=counts, predicted_ev=floats,
    labelled_ev=floats, sigma_committee_ev=floats, sigma_posterior_ev=floats, sigma_ev=floats, fmax_ev_per_ang=floats,
    by_lead_ev=st.dictionaries(texts, floats, max_size=2), image=st.none() | counts,
)  # fmt: skip
decisions = st.builds(types.Decision, stop=st.booleans(), code=st.sampled_from(get_args(types.StopCode)), reason=texts)
label_keys = st.lists(keys, max_size=3).map(tuple)


@st.composite
def paths(draw: st.DrawFn, name: str) -> types.PathRecord:
    optional = (
        "initial_fmax_ev_per_ang", "final_fmax_ev_per_ang", "verified_barrier_ev", "saddle_fmax_ev_per_ang",
        "error_to_verified_ev", "error_to_reference_ev", "barrier_std_ev",
    )  # fmt: skip
    return types.PathRecord(
        path=name,
        initial=draw(structures()),
        final=draw(structures()),
        band=draw(st.none() | bands(name)),
        barrier=draw(st.none() | barriers),
        label_keys=draw(label_keys),
        residuals=draw(st.lists(residuals, max_size=2).map(tuple)),
        **{name: draw(st.just("") | keys) for name in ("initial_label", "final_label", "saddle_key")},
        **{name: draw(optional_floats) for name in optional},
        decision=draw(decisions),
    )


@st.composite
def generations(draw: st.DrawFn) -> types.GenerationRecord:
    names = draw(st.lists(texts, min_size=1, max_size=2, unique=True))
    return types.GenerationRecord(
        run=draw(texts),
        index=draw(counts),
        paths=tuple(draw(paths(name)) for name in names),
        label_keys=draw(label_keys),
        n_reference_calls=draw(counts),
        n_labels_reused=draw(counts),
        kinds=draw(st.dictionaries(keys, st.sampled_from(get_args(types.LabelKind)), max_size=2)),
        calls_by_kind=draw(st.dictionaries(texts, counts, max_size=3)),
        calibration=draw(st.builds(types.Calibration, factor=floats, astray=floats, n_residuals=counts, source=texts)),
        surrogate=draw(mappings),
        seconds=draw(st.dictionaries(texts, floats, max_size=3)),
        decision=draw(decisions),
    )


def assert_identical(left: Any, right: Any, where: str = "") -> None:
    """Same types, same values, arrays and floats bit for bit."""
    assert type(left) is type(right), where
    if dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_identical(getattr(left, field.name), getattr(right, field.name), f"{where}.{field.name}")
    elif isinstance(left, np.ndarray):
        assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes()), where
    elif isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_identical(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, tuple | list):
        assert len(left) == len(right), where
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_identical(one, other, f"{where}[{i}]")
    elif isinstance(left, float) and math.isnan(left):
        assert math.isnan(right), where
    else:
        assert repr(left) == repr(right), where


def through_bson(kind: Any, document: Any) -> Any:
    return mapping.from_son(kind, decode(encode(mapping.to_son(document))))


@given(labels())
def test_a_label_comes_back_as_it_went_in(label: types.Label) -> None:
    document = through_bson(LabelDocument, mapping.label_to_document(label))
    assert_identical(mapping.label_from_document(document), label)


@given(generations())
def test_a_generation_comes_back_as_it_went_in(record: types.GenerationRecord) -> None:
    generation, band_documents = mapping.generation_to_documents(record)
    stored_bands = [through_bson(BandDocument, band) for band in band_documents]
    back = mapping.generation_from_documents(
        through_bson(GenerationDocument, generation), {band.path: band for band in stored_bands}
    )
    assert_identical(back, record)


sittings = st.builds(
    types.Sitting,
    started=texts, host=texts, versions=st.dictionaries(texts, texts, max_size=3), code_sha256=keys,
    settings_sha256=keys, changed=mappings,
)  # fmt: skip


@given(st.builds(
    types.RunRecord,
    name=texts, settings=mappings, settings_sha256=keys, status=st.sampled_from(["running", "converged", "failed"]),
    reason=texts, sittings=st.lists(sittings, max_size=2).map(tuple), started=texts, finished=texts,
))  # fmt: skip
def test_a_run_comes_back_as_it_went_in(run: types.RunRecord) -> None:
    assert_identical(mapping.run_from_document(through_bson(RunDocument, mapping.run_to_document(run))), run)


@given(mappings)
def test_plain_values_survive_whatever_their_keys(values: dict[str, Any]) -> None:
    assert_identical(decode_plain(decode(encode({"v": encode_plain(values)}))["v"]), values)


@given(
    hnp.arrays(st.sampled_from([np.float64, np.float32, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0))
)
def test_arrays_keep_shape_type_and_bits(array: Any) -> None:
    back = unpack_array(pack_array(array))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert not back.flags.writeable


def test_every_attribute_has_a_field() -> None:
    """A field that is added to an alcore type must not be lost on its way."""
    pairs = [*mapping.EMBEDDED.items(), (types.Label, LabelDocument), (types.RunRecord, RunDocument)]
    pairs += [(types.GenerationRecord, GenerationDocument), (types.Band, BandDocument)]
    for kind, document in pairs:
        names = {field.name for field in dataclasses.fields(kind)} - {"band"}
        assert names <= set(document._fields), kind


def test_numpy_numbers_are_taken_as_numbers() -> None:
    run = types.RunRecord(name="r", settings={"a": np.float64(0.5), "b": np.int64(3), "c": (1, 2)}, settings_sha256="")
    back = mapping.run_from_document(through_bson(RunDocument, mapping.run_to_document(run)))
    assert_identical(back.settings, {"a": 0.5, "b": 3, "c": [1, 2]})


@pytest.mark.parametrize("value", [object(), {1: 2}, np.array([object()]), "\ud800"])
def test_what_cannot_be_stored_is_refused_in_one_line(value: Any) -> None:
    run = types.RunRecord(name="r", settings={"odd": value}, settings_sha256="")
    with pytest.raises(StoreError, match="cannot be stored"):
        mapping.to_son(mapping.run_to_document(run))


def test_a_calibration_stored_before_bands_astray_had_a_factor_reads_with_the_default() -> None:
    son = {"factor": 1.5, "n_residuals": 3, "source": "its own"}
    document = mapping.from_son(CalibrationDocument, son)
    assert document.astray == types.Calibration.astray
