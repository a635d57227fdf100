"""A saddle that leaves its path is told from one that is refined, and from two humps that take turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from ase import Atoms

from alcore.barrier import estimate_barrier
from alcore.drift import drift
from alcore.types import Band, PathRecord, Residual, Structure

TOLERANCE_EV = 0.01
CELL_ANG = 12.0


def _record(side: float, top: int = 3, error_ev: float = 0.1, wrap: bool = False) -> PathRecord:
    """An atom that goes from x = 0 to 4 Å on an arc that bulges ``side`` Å in y; image ``top`` is the highest of 7."""
    x = np.linspace(0, 4, 7)
    places = np.zeros((7, 2, 3))
    places[:, 0, 0], places[:, 0, 1] = x, side * np.sin(np.pi * x / 4)
    places[:, 1] = [0.0, 6.0, 6.0]
    if wrap:
        places += [0.0, CELL_ANG, 0.0]
    atoms = Atoms("H2", positions=places[0], cell=[CELL_ANG] * 3, pbc=True)
    template = Structure.from_atoms(atoms)
    energies = 0.2 * np.sin(np.pi * x / 4)
    energies[top] += 0.3
    zeros = np.zeros(7)
    band = Band(
        path="hop",
        template=template,
        positions=places,
        energies_ev=energies,
        forces=np.zeros_like(places),
        sigma_committee_ev=zeros,
        sigma_posterior_ev=zeros,
        sigma_ev=zeros,
        coordinate_ang=x,
        status="converged",
    )
    residual = Residual(
        key="saddle",
        path="hop",
        kind="saddle",
        generation=1,
        predicted_ev=0.4 + error_ev,
        labelled_ev=0.4,
        sigma_committee_ev=0.0,
        sigma_posterior_ev=0.01,
        sigma_ev=0.01,
        fmax_ev_per_ang=0.2,
    )
    return PathRecord(
        path="hop",
        initial=template,
        final=band.structure(6),
        band=band,
        barrier=estimate_barrier(band),
        residuals=(residual,),
        saddle_key="saddle",
    )


def _sides(sides: Sequence[float]) -> list[PathRecord]:
    return [_record(side) for side in sides]


def test_a_jump_to_another_path_is_named_with_its_length() -> None:
    assert drift(_sides([0.7, -0.7]), TOLERANCE_EV) == "the saddle jumped 1.4 Å to another path"
    assert drift(_sides([0.7, -0.7, 0.7]), TOLERANCE_EV) == "the saddle jumped 1.4 Å to another path"


def test_two_paths_in_turns_are_named() -> None:
    told = "the band flips between two paths: give a band, or more images"
    assert drift(_sides([0.7, -0.7, 0.7, -0.7]), TOLERANCE_EV) == told
    assert drift(_sides([0.1, 0.7, -0.7, 0.7, -0.7]), TOLERANCE_EV) == told
    assert drift(_sides([0.7, -0.7, 2.1, -2.1]), TOLERANCE_EV).startswith("the saddle jumped")


@pytest.mark.parametrize(
    "records",
    [
        [],
        _sides([0.7]),
        _sides([0.7, 0.2]),  # refined
        _sides([0.7, -0.7, -0.7]),  # jumped once, and stays
        [_record(0.7), _record(-0.7, error_ev=0.005)],  # the second label confirms: it is the path
        [_record(0.7, error_ev=0.005), _record(-0.7)],
        [_record(0.3, top=2), _record(0.3, top=4)],  # two humps of one path
        [_record(0.7), _record(0.7, wrap=True)],  # the same place, one cell on
    ],
)
def test_what_is_no_drift(records: list[PathRecord]) -> None:
    assert drift(records, TOLERANCE_EV) == ""


def test_generations_without_a_saddle_between_do_not_hide_a_jump() -> None:
    first, last = _sides([0.7, -0.7])
    between = PathRecord(path="hop", initial=first.initial, final=first.final)
    assert drift([first, between, last], TOLERANCE_EV).startswith("the saddle jumped")
    assert drift([first, last, between], TOLERANCE_EV) == ""
