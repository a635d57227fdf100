"""The committed example structures are what their README says, and their ground truths can be repeated."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.geometry import find_mic
from ase.io import read

sys.path.insert(0, str(Path(__file__).parent))

import build_structures
import ci_neb

SHIPPED = {
    "au_al100": (13, 8),
    "cu_vacancy": (31, 0),
    "cr_sb2te3": (41, 8),
    "nacl_vacancy": (63, 0),
    "al_hydrogen": (9, 0),
}
"""Atoms and fixed atoms of each hop."""


def ends(name: str) -> tuple[Atoms, Atoms]:
    initial, final = (read(build_structures.STRUCTURES / name / f) for f in build_structures.HOPS[name].files)
    return initial, final


def mic(initial: Atoms, final: Atoms) -> np.ndarray:
    return np.linalg.norm(find_mic(final.positions - initial.positions, initial.cell, initial.pbc)[0], axis=1)


@pytest.mark.parametrize("name", SHIPPED)
def test_ends_are_one_hop_apart(name: str) -> None:
    initial, final = ends(name)
    n_atoms, n_fixed = SHIPPED[name]
    assert len(initial) == n_atoms
    assert (initial.numbers == final.numbers).all()
    assert np.allclose(initial.cell, final.cell)
    assert (initial.pbc == final.pbc).all()
    for end in (initial, final):
        fixed = [i for constraint in end.constraints for i in constraint.index]
        assert len(fixed) == n_fixed
        assert end.calc is None  # no energies: the files cannot be taken for labels
    moved = np.sort(mic(initial, final))
    assert moved[-1] > 1.7  # one atom hops,
    assert moved[-2] < 0.8  # the others give way


GPAW_HOP = pytest.param(
    "al_hydrogen", marks=[pytest.mark.slow, pytest.mark.skipif(not find_spec("gpaw"), reason="gpaw is not installed")]
)


@pytest.mark.parametrize("name", ["au_al100", "cu_vacancy", GPAW_HOP])
def test_ends_are_relaxed(name: str) -> None:
    for end in ends(name):
        end.calc = build_structures.HOPS[name].calculator()
        assert np.linalg.norm(end.get_forces(), axis=1).max() < 0.01


@pytest.mark.parametrize("name", ["au_al100", "cu_vacancy"])
def test_builder_repeats_the_files(name: str, tmp_path: Path) -> None:
    build_structures.build(name, tmp_path)
    for file in build_structures.HOPS[name].files:
        again, shipped = read(tmp_path / file), read(build_structures.STRUCTURES / name / file)
        assert mic(shipped, again).max() < 1e-3


@pytest.mark.parametrize("name", ["au_al100", "cu_vacancy"])
def test_ground_truth_is_repeated_from_another_guess(name: str) -> None:
    """A committed barrier does not hang on the number of images or on the spring."""
    committed = json.loads(ci_neb.RESULTS.read_text())[name]
    spec = ci_neb.NebSpec(n_images=5, spring_ev_per_ang2=0.3)
    result, images = ci_neb.ci_neb(ends(name), build_structures.HOPS[name].calculator, spec)
    assert committed["converged"]
    assert result["converged"]
    assert result["barrier_ev"] == pytest.approx(committed["barrier_ev"], abs=1e-3)
    assert result["saddle_fmax_ev_per_ang"] < 0.02
    assert len(images) == 7


def test_extrema_do_not_depend_on_the_periodic_image() -> None:
    """ASE's own fit invents extrema where an image lies across a boundary."""
    initial, final = ends("au_al100")
    spec = ci_neb.NebSpec()
    _, images = ci_neb.ci_neb((initial, final), build_structures.emt, spec)
    expected = ci_neb.extrema(images)
    for image in images[3:]:
        image.positions[-1] += image.cell[0]
        image.calc = build_structures.emt()
    assert [e["kind"] for e in ci_neb.extrema(images)] == [e["kind"] for e in expected] == ["maximum"]
