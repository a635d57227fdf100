"""Plain values and back: nothing changes on the way, and what an earlier al-loop wrote can still be read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alcore.plain import from_plain, plain_sha256, to_plain
from alcore.probe import Probe
from alcore.types import Band, Calibration, Candidate, Decision, PathRecord, Residual, RunRecord, Sitting, Structure

numbers = st.floats(allow_nan=False)
words = st.text(max_size=5)


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    n = draw(st.integers(1, 3))
    places = draw(st.lists(numbers, min_size=3 * n, max_size=3 * n))
    return Structure(
        numbers=np.full(n, 13),
        positions=np.reshape(places, (n, 3)),
        cell=np.eye(3),
        pbc=np.array([True, False, True]),
        fixed=np.zeros((n, 3), dtype=bool),
        charge=draw(numbers),
        magnetic_moments=draw(st.one_of(st.none(), st.just(np.full(n, 0.1)))),
    )


@st.composite
def probes(draw: st.DrawFn) -> Probe:
    atoms = draw(structures())
    values = np.array(draw(st.lists(numbers, min_size=3, max_size=3)))
    band = Band(
        path=draw(words),
        template=atoms,
        positions=np.stack([atoms.positions] * 3),
        energies_ev=values,
        forces=np.stack([atoms.positions] * 3),
        sigma_committee_ev=values,
        sigma_posterior_ev=values,
        sigma_ev=values,
        coordinate_ang=values,
        status="guarded",
        climbing_image=draw(st.one_of(st.none(), st.integers(0, 2))),
    )
    candidate = Candidate(path=draw(words), kind="saddle", image=1, structure=atoms)
    return Probe(candidates=(candidate,) * draw(st.integers(0, 2)), band=draw(st.sampled_from([None, band])))


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@given(probes())
def test_a_probe_comes_back_bit_for_bit(probe: Probe) -> None:
    back = from_plain(Probe, to_plain(probe))
    assert alike(to_plain(back), to_plain(probe))
    assert isinstance(back.candidates, tuple)
    assert all(isinstance(candidate.structure, Structure) for candidate in back.candidates)


def test_nested_records_keep_their_types() -> None:
    atoms = Structure(
        numbers=np.array([13]), positions=np.zeros((1, 3)), cell=np.eye(3), pbc=np.ones(3, bool), fixed=np.zeros((1, 3))
    )
    residual = Residual(
        key="k", path="hop", kind="saddle", generation=2, predicted_ev=0.5, labelled_ev=0.4,
        sigma_committee_ev=0.1, sigma_posterior_ev=0.2, sigma_ev=0.3, fmax_ev_per_ang=0.01, by_lead_ev={"prior": 0.5},
    )  # fmt: skip
    record = PathRecord(path="hop", initial=atoms, final=atoms, label_keys=("a", "b"), residuals=(residual,))
    back = from_plain(PathRecord, to_plain(record))
    assert back.residuals == (residual,)
    assert back.label_keys == ("a", "b")
    assert back.decision == Decision(stop=False, code="continue", reason="")
    run = RunRecord(name="r", settings={"neb": {"n_images": 5}}, settings_sha256="s", sittings=(Sitting(started="t"),))
    assert from_plain(RunRecord, json.loads(json.dumps(to_plain(run)))).sittings == run.sittings


def test_what_an_earlier_al_loop_wrote_gets_defaults_and_what_a_later_one_added_is_left_out() -> None:
    assert from_plain(Calibration, {"factor": 3.0, "colour": "red"}) == Calibration(factor=3.0)
    with pytest.raises(TypeError, match="a Decision lacks code, reason"):
        from_plain(Decision, {"stop": True})


def test_what_is_not_plain_is_refused() -> None:
    @dataclass
    class Odd:
        model: object

    with pytest.raises(TypeError, match="a object is no plain value"):
        to_plain(Odd(model=object()))


def test_the_hash_sees_every_bit_of_an_array() -> None:
    long = np.linspace(0.0, 1.0, 5000)
    other = long.copy()
    other[2500] = np.nextafter(other[2500], 2.0)
    same = {"atoms": [long.copy()], "name": "hop"}
    assert plain_sha256({"name": "hop", "atoms": (long,)}) == plain_sha256(same)
    hashes = [plain_sha256({"atoms": [array], "name": "hop"}) for array in (long, other, long.reshape(50, 100))]
    assert len(set(hashes)) == 3
