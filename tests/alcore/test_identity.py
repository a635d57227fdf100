"""Content keys: equal exactly where the reference calculator would do the same work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from ase.constraints import FixAtoms
from hypothesis import given
from hypothesis import strategies as st

from alcore.identity import json_sha256, label_key, sha256_hex
from alcore.types import Structure


@pytest.fixture(scope="module")
def copper() -> Structure:
    return Structure.from_atoms(bulk("Cu", cubic=True))


def test_a_known_hash() -> None:
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_order_of_keys_does_not_matter_and_values_do() -> None:
    assert json_sha256({"a": 1, "b": {"c": 2, "d": 3}}) == json_sha256({"b": {"d": 3, "c": 2}, "a": 1})
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})


@given(st.floats(-4e-7, 4e-7), st.integers(0, 11))
def test_noise_below_a_microangstrom_is_the_same_geometry(copper: Structure, noise: float, place: int) -> None:
    base = copper.moved(np.round(copper.positions, 6))
    shift = np.zeros(12)
    shift[place] = noise
    assert label_key(base.moved(base.positions + shift.reshape(4, 3)), "f") == label_key(base, "f")
    shift[place] = 2e-6
    assert label_key(base.moved(base.positions + shift.reshape(4, 3)), "f") != label_key(base, "f")


def test_what_moves_the_energy_moves_the_key(copper: Structure) -> None:
    others = {
        "fingerprint": label_key(copper, "g"),
        "order": label_key(replace(copper, positions=copper.positions[[1, 0, 2, 3]]), "f"),
        "species": label_key(replace(copper, numbers=[29, 29, 29, 47]), "f"),  # type: ignore[arg-type]
        "cell": label_key(replace(copper, cell=copper.cell * 1.001), "f"),
        "pbc": label_key(replace(copper, pbc=[True, True, False]), "f"),  # type: ignore[arg-type]
        "charge": label_key(replace(copper, charge=1.0), "f"),
        "moments": label_key(replace(copper, magnetic_moments=np.ones(4)), "f"),
        "origin": label_key(copper.moved(copper.positions + 0.1), "f"),
        "copper": label_key(copper, "f"),
    }
    assert len(set(others.values())) == len(others)
    assert all(len(key) == 64 for key in others.values())


def test_what_does_not_move_the_energy_does_not(copper: Structure) -> None:
    atoms = copper.to_atoms()
    atoms.set_constraint(FixAtoms([0]))
    assert label_key(Structure.from_atoms(atoms), "f") == label_key(copper, "f")
    assert label_key(replace(copper, magnetic_moments=np.zeros(4)), "f") == label_key(copper, "f")
    assert label_key(copper.moved(copper.positions * -0.0 + copper.positions), "f") == label_key(copper, "f")
