"""Spin states that jump along a band."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk

from alcore.spin import path_jumps, spin_jumps
from alcore.types import Band, Label, Structure

N_IMAGES = 5


@pytest.fixture
def band() -> Band:
    """Atom 0 of four walks 2 Å along x in five images."""
    template = Structure.from_atoms(bulk("Cr", "fcc", a=3.6, cubic=True))
    positions = np.repeat(template.positions[None], N_IMAGES, axis=0)
    positions[:, 0, 0] += np.linspace(0, 2.0, N_IMAGES)
    zeros = np.zeros(N_IMAGES)
    return Band(
        path="hop",
        template=template,
        positions=positions,
        energies_ev=zeros,
        forces=np.zeros_like(positions),
        sigma_committee_ev=zeros,
        sigma_posterior_ev=zeros,
        sigma_ev=zeros,
        coordinate_ang=np.linspace(0, 2.0, N_IMAGES),
        status="converged",
    )


def _label(band: Band, image: int, moments: list[float] | None, offset_ang: float = 0.0) -> Label:
    structure = band.structure(image)
    return Label(
        key=f"{image}-{offset_ang}",
        structure=structure.moved(structure.positions + offset_ang),
        status="ok",
        fingerprint="f",
        calculator="c",
        energy_ev=0.0,
        forces=np.zeros((4, 3)),
        magnetic_moments=None if moments is None else np.array(moments),
    )


def test_a_flipped_electron_is_a_jump_and_is_named(band: Band) -> None:
    labels = [
        _label(band, 4, [1.0, 0.1, 0, 0]),
        _label(band, 0, [3.0, 0.1, 0, 0]),
        _label(band, 2, [2.9, 0.1, 0, 0]),
    ]
    (jump,) = spin_jumps(band, labels)
    assert (jump.before, jump.after, jump.atom) == ("2-0.0", "4-0.0", 0)
    assert jump.coordinates_ang == (1.0, 2.0)
    assert "+2.90 → +1.00 μ_B" in str(jump)


def test_moments_that_drift_are_no_jump(band: Band) -> None:
    assert spin_jumps(band, [_label(band, k, [3.0 - 0.1 * k, 0, 0, 0]) for k in range(N_IMAGES)]) == []


def test_the_mirror_image_is_the_same_state(band: Band) -> None:
    assert spin_jumps(band, [_label(band, 0, [3.0, -1, 0, 0]), _label(band, 1, [-3.0, 1, 0, 0])]) == []
    (jump,) = spin_jumps(band, [_label(band, 0, [3.0, -1, 0, 0]), _label(band, 1, [3.0, 1, 0, 0])])
    assert jump.atom == 1


def test_labels_far_from_the_band_failed_or_without_moments_say_nothing(band: Band) -> None:
    here = _label(band, 0, [3.0, 0, 0, 0])
    far = _label(band, 2, [0.0, 0, 0, 0], offset_ang=1.0)
    failed = replace(_label(band, 3, [0.0, 0, 0, 0]), status="rejected")
    assert spin_jumps(band, [here, far, failed, _label(band, 4, None)]) == []
    assert path_jumps(None, [here.key], {here.key: here}) == []


def test_of_one_place_the_nearest_label_counts(band: Band) -> None:
    near, farther = _label(band, 1, [3.0, 0, 0, 0]), _label(band, 1, [0.0, 0, 0, 0], offset_ang=0.05)
    assert spin_jumps(band, [_label(band, 0, [3.0, 0, 0, 0]), farther, near]) == []
