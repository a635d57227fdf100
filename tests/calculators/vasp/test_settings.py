from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from pydantic import ValidationError

from alcore.errors import CalculatorError
from alcore.types import Label, Structure
from calculators.registry import resolve
from calculators.vasp.incar import canonical, parse_incar
from calculators.vasp.settings import VaspSettings

Run = Callable[..., Label]


@pytest.fixture
def in_poscar_order(mixed: Callable[..., Structure]) -> Callable[..., Structure]:
    """Al Al Cu Cu, as the folder's POTCAR has it."""

    def make(moments: Any = None) -> Structure:
        return Structure.from_atoms(mixed().to_atoms()[[1, 3, 0, 2]], magnetic_moments=moments)

    return make


def test_a_folder_is_taken_as_it_is(
    run: Run, inputs: Path, without_level: dict[str, Any], in_poscar_order: Callable[..., Structure]
) -> None:
    label = run(in_poscar_order(), folder=str(inputs), **without_level)
    assert label.ok, label.reason
    written = Path(label.folder)
    incar = {tag: canonical(value) for tag, value in parse_incar((written / "INCAR").read_text()).items()}
    assert (incar["ENCUT"], incar["LDAUU"], incar["MAGMOM"]) == (400, [0, 3.5], [1, 1, -0.5, -0.5])
    assert (written / "KPOINTS").read_text() == (inputs / "KPOINTS").read_text()
    assert (written / "POTCAR").read_text() == (inputs / "POTCAR").read_text()
    np.testing.assert_allclose(label.magnetic_moments, [0.9, 0.9, -0.45, -0.45], atol=1e-3)


def test_a_folder_s_atoms_are_sorted_as_its_potcar(
    run: Run, inputs: Path, mixed: Callable[..., Structure], without_level: dict[str, Any]
) -> None:
    incar = inputs / "INCAR"
    incar.write_text(
        "\n".join(line for line in incar.read_text().replace("\\\n", "").splitlines() if "MAG" not in line)
    )
    structure = mixed([1.0, 2.0, 3.0, 4.0])
    label = run(structure, folder=str(inputs), **without_level)
    atoms = structure.to_atoms()
    atoms.calc = EMT(asap_cutoff=False)
    np.testing.assert_allclose(label.forces, atoms.get_forces(), atol=2e-8)
    np.testing.assert_allclose(label.magnetic_moments, [0.9, 1.8, 2.7, 3.6], atol=1e-3)
    assert (Path(label.folder) / "POSCAR").read_text().splitlines()[5].split() == ["Al", "Cu"]


def test_what_a_folder_cannot_say_of_a_structure_is_refused(
    ready: Any,
    inputs: Path,
    mixed: Callable[..., Structure],
    without_level: dict[str, Any],
    in_poscar_order: Callable[..., Structure],
) -> None:
    resolved = resolve("vasp", ready(folder=str(inputs), **without_level))
    resolved.check_structure(in_poscar_order())
    for structure, message in (
        (mixed(), "MAGMOM does not fit: 4 moments for atoms in the order Al Cu"),
        (in_poscar_order([1.0, 1.0, 1.0, 1.0]), "are both given"),
        (Structure.from_atoms(bulk("Cu")), "it is for Al Cu, the structure has Cu"),
    ):
        with pytest.raises(CalculatorError, match=message):
            resolved.check_structure(structure)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("NSW = 99", "NSW = 99 would relax"),
        ("IBRION = 2", "IBRION = 2 would relax"),
        ("ISIF = 3; ICHARG = 11", "keeps a charge density"),
        ("ML_LMLFF = T", "a force field"),
        ("LSORBIT = .TRUE.", "non-collinear"),
        ("NELECT = 12", "the structure's charge sets it"),
        ("ALGO = G0W0", "no self-consistent ground state"),
    ],
)
def test_a_folder_that_relaxes_or_does_something_else_is_refused(
    ready: Any, inputs: Path, tags: str, message: str, without_level: dict[str, Any]
) -> None:
    (inputs / "INCAR").write_text(f"ENCUT = 400\n{tags}\n")
    with pytest.raises(CalculatorError, match=message):
        resolve("vasp", ready(folder=str(inputs), **without_level))


def test_every_file_of_a_folder_is_in_the_fingerprint(ready: Any, inputs: Path, without_level: dict[str, Any]) -> None:
    def fingerprint() -> str:
        return resolve("vasp", ready(folder=str(inputs), **without_level)).fingerprint

    start = fingerprint()
    (inputs / "INCAR").write_text((inputs / "INCAR").read_text().replace("encut", "ENCUT") + "NCORE = 8\nNELM = 9\n")
    assert fingerprint() == start
    seen = {start}
    for name, old, new in (("INCAR", "400", "401"), ("KPOINTS", "3 3 3", "3 3 4"), ("POTCAR", "295", "296")):
        (inputs / name).write_text((inputs / name).read_text().replace(old, new))
        seen.add(fingerprint())
    assert len(seen) == 4
    (inputs / "INCAR").unlink()
    with pytest.raises(CalculatorError, match=r"cannot read INCAR: No such file.*mend calculator\.settings\.folder"):
        fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encut": None}, "encut .* kspacing .* needed"),
        ({"kspacing": None}, "encut .* kspacing .* needed"),
        ({"kpts": [2, 2, 2]}, "say the same thing twice"),
        ({"xc": "PBX"}, "unknown functional PBX, known: lda"),
        ({"incar": {"nsw": 5}}, "NSW = 5 would relax"),
        ({"incar": {"MAGMOM": [1, 1]}}, "magnetic_moments set it"),
        ({"incar": {"LDAUU": [1, 1]}}, "order of the elements"),
        ({"incar": {"ENCUT": 300}}, "ENCUT is a setting of its own"),
        ({"folder": "/nowhere"}, "folder already says encut, kspacing, ediff, xc"),
        ({"version": "six"}, "six is no version"),
        ({"potcar_folder": "/nowhere"}, "/nowhere: there is no such folder of POTCAR files .*VASP_PP_PATH"),
        ({"potcar_set": "potpaw_PBE.99"}, "it has no folder potpaw_PBE.99"),
        ({"setups": {"Cu": "Cu_GW"}}, "there is no POTCAR Cu_GW for Cu"),
        ({"elements": ["Cu", "Au"]}, "there is no POTCAR Au for Au"),
        ({"command": "no-such-vasp"}, "no-such-vasp is not on this machine .*or set calculator.settings.version"),
    ],
)
def test_bad_settings_are_one_line_with_the_mend(ready: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CalculatorError, match=message) as caught:
        resolve("vasp", ready(**changes))
    assert "\n" not in str(caught.value)


def test_settings_are_frozen(ready: Any) -> None:
    checked = VaspSettings(**ready())
    with pytest.raises(ValidationError):
        checked.encut = 1.0  # type: ignore[misc]
