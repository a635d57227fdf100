"""ASE's ``Vasp`` with inputs made elsewhere: written as they are, and read back only if they are whole."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alcore.types import FloatArray
from calculators.vasp.incar import canonical, incar_text
from calculators.vasp.output import is_whole
from calculators.vasp.potcars import Potcar

if TYPE_CHECKING:
    from ase.calculators.vasp import Vasp

STDOUT = "vasp.out"


@dataclass(frozen=True, kw_only=True)
class VaspInputs:
    """All of one calculation but the atoms.

    Attributes:
        incar: tags in capitals, without MAGMOM.
        kpoints: text of KPOINTS, or None: no such file.
        potcars: in the order of POSCAR's elements, which is the order of the atoms too.
        moments: initial moments in μ_B in the structure's order, or None.
        ldau_luj: +U by element, as ASE takes it, or None.
    """

    incar: dict[str, Any]
    kpoints: str | None
    potcars: Sequence[Potcar]
    moments: FloatArray | None = None
    ldau_luj: Mapping[str, Mapping[Any, float]] | None = None


@cache
def _vasp_class() -> type[Vasp]:
    from ase.calculators.calculator import ReadError
    from ase.calculators.vasp import Vasp

    class SinglePoint(Vasp):
        """``inputs`` is set once it is made; everything is in the current folder."""

        inputs: VaspInputs
        exit_code: int | None = None

        def _make_sort(self, atoms: Any, special_setups: Any = ()) -> tuple[list[int], list[int]]:
            place = {potcar.element: k for k, potcar in enumerate(self.inputs.potcars)}
            order = sorted(range(len(atoms)), key=lambda i: place[atoms.symbols[i]])
            return order, sorted(range(len(order)), key=order.__getitem__)

        def initialize(self, atoms: Any) -> None:
            super().initialize(atoms)
            symbols = list(atoms.symbols)
            self.symbol_count = [(p.element, symbols.count(p.element)) for p in self.inputs.potcars]

        def _build_pp_list(self, atoms: Any, setups: Any = None, special_setups: Any = ()) -> list[str]:
            return []

        def write_potcar(self, suffix: str = "", directory: str = "./") -> None:
            Path(directory, f"POTCAR{suffix}").write_bytes(b"".join(potcar.data for potcar in self.inputs.potcars))

        def write_kpoints(self, atoms: Any = None, directory: str = "./", **_: Any) -> None:
            if self.inputs.kpoints is not None:
                Path(directory, "KPOINTS").write_text(self.inputs.kpoints, encoding="utf-8")

        def _run(self, command: Any = None, out: Any = None, directory: Any = None) -> tuple[int, str]:
            # ASE keeps the output in memory until the end, which a run that is ended never reaches.
            place = directory or self.directory
            pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            ended = subprocess.run(command, shell=True, check=False, cwd=place, **pipes)
            self.exit_code = ended.returncode
            return ended.returncode, f"see {STDOUT}"

        def read_results(self) -> None:
            # ASE takes what it finds in a file that was cut off, and leaves the rest of the forces zero.
            if not is_whole(self._indir("vasprun.xml")):
                raise ReadError("vasprun.xml is missing or cut off: VASP did not come to its end")
            super().read_results()
            if canonical(self.inputs.incar.get("ISPIN", 1)) != 2:  # ASE then says that all moments are zero
                self.results.pop("magmoms", None)
                self.results.pop("magmom", None)

        def read_convergence(self, lines: Any = None) -> None:
            """Says nothing: ASE believes older VASP's "EDIFF is reached"; the steps are counted afterwards."""

    return SinglePoint  # type: ignore[no-any-return]


def vasp_calculator(inputs: VaspInputs, command: str) -> Vasp:
    """An ASE calculator that runs ``command`` in the current folder.

    Args:
        inputs: what it writes.
        command: line of the shell.
    """
    typed = {"ISPIN": int, "LORBIT": int, "LUSE_VDW": bool}  # ASE decides by these
    known: dict[str, Any] = {
        tag.lower(): to(canonical(inputs.incar[tag])) for tag, to in typed.items() if tag in inputs.incar
    }
    if inputs.moments is not None:
        known["magmom"] = list(inputs.moments)
    if inputs.ldau_luj:
        known["ldau_luj"] = {element: dict(luj) for element, luj in inputs.ldau_luj.items()}
    custom = {tag: incar_text(value) for tag, value in inputs.incar.items() if tag not in typed}
    calculator = _vasp_class()(command=command, txt=STDOUT, pp="PBE", ignore_constraints=True, custom=custom, **known)
    calculator.inputs = inputs
    return calculator  # type: ignore[no-any-return]
