from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk

from alcore.errors import CalculatorError
from alcore.types import Label, Structure
from calculators.registry import resolve
from calculators.vasp import entry as vasp
from calculators.vasp.incar import canonical, facts_of, parse_incar
from calculators.vasp.presets import PRESETS, preset_facts, preset_inputs
from calculators.vasp.settings import VaspSettings

Run = Callable[..., Label]
PUBLISHED = {  # of FeO: ENCUT in eV, ISMEAR, functional, +U of Fe in eV, whether the k-points stand in KPOINTS
    "MPtrj": (520, -5, {}, 5.3, True),
    "OMat24": (520, -5, {}, 5.3, True),
    "MatPES-PBE": (680, 0, {"GGA": "PE"}, None, False),
    "MatPES-r2SCAN": (680, 0, {"METAGGA": "R2SCAN"}, None, False),
}
pymatgen = pytest.mark.skipif(not find_spec("pymatgen"), reason="pymatgen is not installed")


def skip_without(preset: str) -> None:
    if why := vasp.preset_unavailable(preset):
        pytest.skip(why)


def fe_o(moments: Any = None) -> Structure:
    """O Fe O Fe ..., an order that pymatgen's own sorting would change."""
    atoms = bulk("FeO", "rocksalt", a=4.3, cubic=True)[[1, 0, 3, 2, 5, 4, 7, 6]]
    return Structure.from_atoms(atoms, magnetic_moments=moments)


@pymatgen
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_published_recipe_in_the_structure_s_order(preset: str) -> None:
    skip_without(preset)
    made = preset_inputs(preset, fe_o())
    encut, ismear, functional, u_ev, kpoints = PUBLISHED[preset]
    facts = facts_of(made.incar)
    assert (facts["ENCUT"], facts["ISMEAR"], facts["ISPIN"]) == (encut, ismear, 2)
    assert {tag: facts[tag] for tag in ("GGA", "METAGGA") if tag in facts} == functional
    assert facts.get("LDAUU") == (None if u_ev is None else [0.0, u_ev])  # O comes first
    assert (made.kpoints is not None, "KSPACING" in facts) == (kpoints, not kpoints)
    assert made.moments is not None
    assert made.moments.tolist() == [0.6, 5.0] * 4


@pymatgen
@pytest.mark.parametrize("preset", PRESETS)
def test_a_structure_s_moments_stay_on_their_atoms(preset: str) -> None:
    skip_without(preset)
    moments = [0.0, 4.0, 0.1, -4.0, 0.2, 4.0, 0.3, -4.0]
    given = preset_inputs(preset, fe_o(moments)).moments
    assert given is not None
    assert given.tolist() == moments


@pymatgen
def test_a_mesh_does_not_change_because_atoms_are_symmetric() -> None:
    atoms = bulk("Cu", cubic=True) * (1, 1, 2)
    ideal = preset_inputs("MPtrj", Structure.from_atoms(atoms)).kpoints
    atoms.rattle(0.05, seed=0)
    assert ideal == preset_inputs("MPtrj", Structure.from_atoms(atoms)).kpoints


@pymatgen
def test_omat24_keeps_its_own_potcars_and_leaves_pymatgen_s_sets_alone() -> None:
    skip_without("OMat24")
    from pymatgen.io.vasp import sets

    assert vasp.names(VaspSettings(preset="OMat24"))["W"] == "W_sv"
    assert vasp.library(VaspSettings(preset="OMat24")).releases == ("54",)
    assert Path(sets.MODULE_DIR).parts[-3:] == ("pymatgen", "io", "vasp")


@pymatgen
@pytest.mark.parametrize(("preset", "folder"), [("MPtrj", "potpaw_PBE"), ("MatPES-r2SCAN", "potpaw_PBE.64")])
def test_a_preset_runs_as_a_single_point(
    run: Run,
    tmp_path: Path,
    preset: str,
    folder: str,
    put_potcars: Callable[..., Path],
    mixed: Callable[..., Structure],
    without_level: dict[str, Any],
) -> None:
    put_potcars(tmp_path / "pp" / folder, "Cu_pv", "Al")
    level = without_level
    label = run(mixed(), preset=preset, potcar_folder=str(tmp_path / "pp"), **level)
    assert label.ok, label.reason
    incar = parse_incar((Path(label.folder) / "INCAR").read_text())
    assert {tag: canonical(incar[tag]) for tag in ("NSW", "IBRION", "ISIF", "ISPIN", "LCHARG")} == {
        "NSW": 0,
        "IBRION": -1,
        "ISIF": 2,
        "ISPIN": 2,
        "LCHARG": False,
    }
    assert "Cu_pv" in label.details["calculator"]["potcars"]["Cu"]
    np.testing.assert_allclose(label.magnetic_moments, 0.9 * 0.6, atol=1e-3)


@pymatgen
def test_presets_differ_and_an_override_shows(
    ready: Any, tmp_path: Path, put_potcars: Callable[..., Path], without_level: dict[str, Any]
) -> None:
    for release in ("potpaw_PBE", "potpaw_PBE.54", "potpaw_PBE.64"):
        put_potcars(tmp_path / release, "Cu_pv")
    presets = [preset for preset in PRESETS if not vasp.preset_unavailable(preset)]
    base = ready(**without_level, potcar_folder=str(tmp_path))

    def fingerprint(preset: str, **changes: Any) -> str:
        return resolve("vasp", {**base, "preset": preset, **changes}).fingerprint

    plain = fingerprint("MPtrj")
    assert len({fingerprint(preset) for preset in presets}) == len(presets)
    assert fingerprint("MPtrj", nelm=500, algo="All", incar={"NCORE": 4}) == plain
    assert resolve("vasp", {**base, "preset": "MPtrj", "ismear": 0}).facts["overrides"] == {"ISMEAR": 0.0}
    assert preset_facts("MPtrj")["set"] == "pymatgen.io.vasp.sets.MPStaticSet"
    with pytest.raises(CalculatorError, match="preset MPtrj already says xc"):
        fingerprint("MPtrj", xc="PBE")


@pymatgen
def test_a_preset_does_not_take_another_release_s_potcars(ready: Any, without_level: dict[str, Any]) -> None:
    with pytest.raises(CalculatorError, match=r"it holds no POTCAR .* in one of potpaw_PBE\.64"):
        resolve("vasp", ready(**without_level, preset="MatPES-PBE"))


def test_a_preset_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calculators.vasp.presets.find_spec", lambda name: None)
    mend = r"pip install pymatgen fairchem-data-omat"
    assert (why := vasp.preset_unavailable("OMat24")) is not None
    assert mend in why
