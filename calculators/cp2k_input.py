"""CP2K's input file, made with ASE's own input tree: the user's template, what the settings say, and the structure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from alcore.errors import CalculatorError

if TYPE_CHECKING:
    from ase import Atoms

    from calculators.cp2k import Cp2kSettings

DFT, SUBSYS = "FORCE_EVAL/DFT", "FORCE_EVAL/SUBSYS"
SCF, XC = f"{DFT}/SCF", f"{DFT}/XC"
OT_STEPS = 20
"""Steps of orbital transformation before the preconditioner is made anew."""
DISPERSION_CUTOFF_ANG = 20.0
FUNCTIONALS = {"LDA": "PADE", "PBE": "PBE", "BLYP": "BLYP", "BP": "BP", "TPSS": "TPSS"}
PBE_LIKE = {"PBEsol": "PBESOL", "revPBE": "REVPBE"}


def template_lines(template: str) -> list[str]:
    """The user's template without comments, blank lines and indentation."""
    lines = (" ".join(re.split("[#!]", line, maxsplit=1)[0].split()) for line in template.splitlines())
    return [line for line in lines if line]


def settings_tree(settings: Cp2kSettings, files: tuple[str, str, str]) -> Any:
    """All of the input that does not depend on the structure.

    Args:
        settings: the calculator's.
        files: paths of the basis sets, the pseudopotentials, and D3's parameters.
    Raises:
        CalculatorError: the template is not whole, or says what only a setting may say.
    """
    from ase.calculators.cp2k import parse_input

    lines = template_lines(settings.inp)
    opened = sum(line.startswith("&") - 2 * line.upper().startswith("&END") for line in lines)
    if opened:
        raise CalculatorError(f"inp leaves {opened} sections open", where="calculator.settings.inp")
    root = parse_input("\n".join(lines))
    try:
        for path, line in (*_plain(settings, files), *_electronic(settings), *_physics(settings, files[2])):
            root.add_keyword(path, line)
    except Exception as error:  # ASE raises nothing more special
        mend = "leave it out of inp: the calculator's settings say it"
        raise CalculatorError(str(error), where="calculator.settings.inp", mend=mend) from error
    return root


def _plain(settings: Cp2kSettings, files: tuple[str, str, str]) -> list[tuple[str, str]]:
    return [
        ("GLOBAL", "PROJECT cp2k"),
        ("GLOBAL", "RUN_TYPE ENERGY_FORCE"),
        ("GLOBAL", "PRINT_LEVEL LOW"),
        ("FORCE_EVAL", "METHOD QUICKSTEP"),
        ("FORCE_EVAL/PRINT/FORCES", "_SECTION_PARAMETERS_ ON"),
        ("FORCE_EVAL/PRINT/FORCES", "NDIGITS 12"),
        (DFT, f"BASIS_SET_FILE_NAME {files[0]}"),
        (DFT, f"POTENTIAL_FILE_NAME {files[1]}"),
        (f"{DFT}/MGRID", f"CUTOFF {settings.cutoff_ry:g}"),
        (f"{DFT}/MGRID", f"REL_CUTOFF {settings.rel_cutoff_ry:g}"),
        (f"{DFT}/QS", f"EPS_DEFAULT {settings.eps_default:g}"),
        (f"{SCF}/PRINT/RESTART", "_SECTION_PARAMETERS_ OFF"),
    ]


def _electronic(settings: Cp2kSettings) -> list[tuple[str, str]]:
    lines = [(SCF, f"EPS_SCF {settings.eps_scf:g}")]
    if settings.algorithm == "ot":
        inner = min(OT_STEPS, settings.max_scf)
        outer = max(1, -(-settings.max_scf // inner))
        return [
            *lines,
            (SCF, f"MAX_SCF {inner}"),
            (f"{SCF}/OUTER_SCF", f"MAX_SCF {outer - 1}"),
            (f"{SCF}/OUTER_SCF", f"EPS_SCF {settings.eps_scf:g}"),
            (f"{SCF}/OT", f"MINIMIZER {settings.ot_minimizer}"),
            (f"{SCF}/OT", "PRECONDITIONER FULL_SINGLE_INVERSE"),
        ]
    lines += [
        (SCF, f"MAX_SCF {settings.max_scf}"),
        (f"{SCF}/DIAGONALIZATION", "ALGORITHM STANDARD"),
        (f"{SCF}/MIXING", f"METHOD {settings.mixing_method}"),
        (f"{SCF}/MIXING", f"ALPHA {settings.mixing_alpha:g}"),
    ]
    if settings.added_mos:
        both = f" {settings.added_mos}" if settings.uks else ""
        lines.append((SCF, f"ADDED_MOS {settings.added_mos}{both}"))
    if settings.smearing_k:
        lines.append((f"{SCF}/SMEAR", "METHOD FERMI_DIRAC"))
        lines.append((f"{SCF}/SMEAR", f"ELECTRONIC_TEMPERATURE [K] {settings.smearing_k:g}"))
        if settings.multiplicity:  # without it, smearing lets the total moment go where it wants
            lines.append((f"{SCF}/SMEAR", f"FIXED_MAGNETIC_MOMENT {settings.multiplicity - 1}"))
    return lines


def _physics(settings: Cp2kSettings, parameters: str) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if settings.xc:
        if settings.xc in PBE_LIKE:
            lines.append((f"{XC}/XC_FUNCTIONAL/PBE", f"PARAMETRIZATION {PBE_LIKE[settings.xc]}"))
        else:
            lines.append((f"{XC}/XC_FUNCTIONAL", f"_SECTION_PARAMETERS_ {FUNCTIONALS[settings.xc]}"))
    if settings.grid:
        lines.append((f"{DFT}/KPOINTS", "SCHEME MONKHORST-PACK {} {} {}".format(*settings.grid)))
    if settings.uks:
        lines += [(DFT, "UKS T"), (f"{DFT}/PRINT/MULLIKEN", "_SECTION_PARAMETERS_ ON")]
    if settings.dispersion:
        pairs = f"{XC}/VDW_POTENTIAL/PAIR_POTENTIAL"
        lines += [
            (f"{XC}/VDW_POTENTIAL", "POTENTIAL_TYPE PAIR_POTENTIAL"),
            (pairs, f"TYPE {'DFTD3' if settings.dispersion == 'D3' else 'DFTD3(BJ)'}"),
            (pairs, f"PARAMETER_FILE_NAME {parameters}"),
            (pairs, f"REFERENCE_FUNCTIONAL {settings.xc}"),
            (pairs, f"R_CUTOFF [angstrom] {DISPERSION_CUTOFF_ANG:g}"),
        ]
    return lines


def add_structure(root: Any, settings: Cp2kSettings, atoms: Atoms, charge: int, multiplicity: int | None) -> str:
    """The whole input as text. ``root`` is changed.

    Args:
        root: of ``settings_tree``.
        settings: the calculator's.
        atoms: the structure; its initial moments start a spin-polarised calculation.
        charge: total charge in e.
        multiplicity: 2S+1, or None for the lowest.
    """
    from ase.calculators.cp2k import InputSection

    axes = "".join(axis for axis, periodic in zip("XYZ", atoms.pbc, strict=True) if periodic)
    solver = {"XYZ": "PERIODIC", "": "MT"}.get(axes, "ANALYTIC")
    lines = [(f"{SUBSYS}/CELL", f"PERIODIC {axes or 'NONE'}")]
    lines += [(f"{SUBSYS}/CELL", _numbers(name, vector)) for name, vector in zip("ABC", atoms.cell.array, strict=True)]
    lines += [(f"{DFT}/POISSON", f"PERIODIC {axes or 'NONE'}"), (f"{DFT}/POISSON", f"POISSON_SOLVER {solver}")]
    lines += [(DFT, f"CHARGE {charge}")] if charge else []
    lines += [(DFT, f"MULTIPLICITY {multiplicity}")] if multiplicity else []
    if axes == "XYZ":
        lines.append(("FORCE_EVAL", "STRESS_TENSOR ANALYTICAL"))
        lines.append(("FORCE_EVAL/PRINT/STRESS_TENSOR", "_SECTION_PARAMETERS_ ON"))
    for path, line in lines:
        root.add_keyword(path, line)
    moments = atoms.get_initial_magnetic_moments() if settings.uks else np.zeros(len(atoms))
    kinds: dict[tuple[str, float], str] = {}
    for symbol, moment, position in zip(atoms.symbols, moments, atoms.positions, strict=True):
        alike = sum(known == symbol for known, _ in kinds)
        kind = kinds.setdefault((symbol, float(moment)), f"{symbol}{alike + 1}" if settings.uks else symbol)
        root.add_keyword(f"{SUBSYS}/COORD", _numbers(kind, position), unique=False)
    for (symbol, moment), kind in kinds.items():
        section = InputSection("KIND", kind)
        section.keywords += [f"ELEMENT {symbol}", f"BASIS_SET {settings.basis_of(symbol)}"]
        section.keywords += [f"POTENTIAL {settings.potential_of(symbol)}"]
        section.keywords += [f"MAGNETIZATION {moment:g}"] if moment else []
        root.get_subsection(SUBSYS).subsections.append(section)
    return "\n".join(root.write()) + "\n"


def _numbers(name: str, vector: Any) -> str:
    return name + "".join(f" {value:.12f}" for value in vector)
