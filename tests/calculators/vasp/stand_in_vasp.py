"""A program that behaves as VASP does, with the numbers of ASE's EMT: vasp.6.4.2 20Jul23 (build of a test) complex

Reads INCAR, KPOINTS, POSCAR and POTCAR in the current folder and writes OUTCAR, OSZICAR, vasprun.xml and CONTCAR.
TOTEN is EMT's energy, which its forces are the gradient of; energy(sigma->0) differs from it by a made-up entropy.
The charge shifts the energy by 3 eV/e; the moments given at the start stay on their atoms at 90 %.
A word in INCAR's SYSTEM makes it misbehave: never, stubborn, old, crash, silent, cut, hang.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read
from ase.units import GPa

BOX = "-----------------------------------------------------------------------------"
VERSION = "vasp.6.4.2 20Jul23 (build of a test) complex"


def bug(text: str, code: int = 1) -> None:
    """VASP's error box, and the end."""
    print(f" {BOX}\n|     EEEEEEE  RRRRRR   RRRRRR   OOOOOOO  RRRRRR      ###     ###     ###       |")
    for line in text.splitlines():
        print(f"|     {line:<70}  |")
    print(f"|       ---->  I REFUSE TO CONTINUE WITH THIS SICK JOB ... BYE!!! <----       |\n {BOX}", flush=True)
    sys.exit(code)


def read_incar() -> dict[str, str]:
    if not Path("INCAR").exists():
        bug("No INCAR found, STOPPING")
    lines = [line.split("#")[0].split("!")[0] for line in Path("INCAR").read_text().splitlines()]
    return {k.strip().upper(): v.strip() for k, _, v in (line.partition("=") for line in lines if "=" in line)}


def read_potcar() -> list[dict[str, Any]]:
    if not Path("POTCAR").exists():
        bug("ERROR: there must be 1 or 3 items on line 2 of POTCAR: file not found")
    sets = []
    for text in Path("POTCAR").read_text().split("End of Dataset")[:-1]:
        title = re.search(r"TITEL\s*=\s*(.*)", text)[1].strip()  # type: ignore[index]
        zval = float(re.search(r"ZVAL\s*=\s*([\d.]+)", text)[1])  # type: ignore[index]
        enmax = float(re.search(r"ENMAX\s*=\s*([\d.]+)", text)[1])  # type: ignore[index]
        element = re.split("[_.]", title.split()[1])[0]
        sets.append({"title": title, "zval": zval, "enmax": enmax, "element": element})
    return sets


def mesh(incar: dict[str, str], atoms: Atoms) -> tuple[str, list[int]]:
    if Path("KPOINTS").exists():
        lines = Path("KPOINTS").read_text().splitlines()
        return lines[2].strip(), [int(n) for n in lines[3].split()]
    lengths = 2 * np.pi * np.linalg.norm(np.linalg.inv(atoms.cell.array).T, axis=1)
    return "Gamma", [max(1, int(np.ceil(b / float(incar.get("KSPACING", 0.5))))) for b in lengths]


def moments(incar: dict[str, str], n: int) -> np.ndarray:
    if incar.get("ISPIN", "1") != "2":
        return np.zeros(n)
    if "MAGMOM" not in incar:
        return np.ones(n)
    listed: list[float] = []
    for word in incar["MAGMOM"].split():
        count, star, value = word.partition("*")
        listed += [float(value)] * int(count) if star else [float(word)]
    if len(listed) != n:
        bug(f"Error reading item MAGMOM from file INCAR: {len(listed)} values for {n} ions")
    return np.array(listed)


def cycle(incar: dict[str, str], final: float, word: str) -> list[float]:
    """The energy after each electronic step."""
    nelm, ediff = int(incar.get("NELM", 60)), float(incar.get("EDIFF", 1e-4))
    rate = {"A": 0.15, "F": 0.35}.get(incar.get("ALGO", "N").upper()[0], 0.25)
    if word == "never" or (word == "stubborn" and incar.get("ALGO", "N").upper()[0] != "A"):
        rate = 0.9999
    energies = [final + 30.0]
    while len(energies) < nelm:
        energies.append(final + (energies[-1] - final) * -rate)
        if abs(energies[-1] - energies[-2]) < ediff:
            energies[-1] = final
            break
    return energies


def v(values: Any, digits: int = 8) -> str:
    return "<v>" + " ".join(f"{float(x):16.{digits}f}" for x in values) + " </v>"


def varray(name: str, rows: Any) -> str:
    return f'<varray name="{name}" >\n' + "\n".join(v(row) for row in rows) + "\n</varray>"


def crystal(atoms: Atoms) -> str:
    reciprocal = np.linalg.inv(atoms.cell.array).T
    return (
        f'<crystal>\n{varray("basis", atoms.cell.array)}\n<i name="volume">{atoms.get_volume():16.8f}</i>\n'
        f"{varray('rec_basis', reciprocal)}\n</crystal>\n{varray('positions', atoms.get_scaled_positions(wrap=False))}"
    )


def energies_xml(toten: float, entropy: float, tag: str = "energy") -> str:
    sigma0 = toten + entropy / 2
    return (
        f'<{tag}>\n<i name="e_fr_energy">{toten:16.8f}</i>\n<i name="e_wo_entrp">{toten + entropy:16.8f}</i>\n'
        f'<i name="e_0_energy">{sigma0:16.8f}</i>\n</{tag}>'
    )


def bands_xml(spins: int) -> str:
    sets = "".join(
        f'<set comment="spin {s + 1}"><set comment="kpoint 1"><r> -5.0 1.0 </r><r> 3.0 0.0 </r></set></set>'
        for s in range(spins)
    )
    head = "<dimension dim='1'>band</dimension><dimension dim='2'>kpoint</dimension><dimension dim='3'>spin</dimension>"
    return f"<eigenvalues><array>{head}<field>eigene</field><field>occ</field><set>{sets}</set></array></eigenvalues>"


def parameters_xml(run: dict[str, Any]) -> str:
    incar, potcars = run["incar"], run["potcars"]
    number = [("ENMAX", "", incar.get("ENCUT", max(p["enmax"] for p in potcars))), ("NELECT", "", run["nelect"])]
    number += [("NELM", "int", incar.get("NELM", 60)), ("EDIFF", "", incar.get("EDIFF", 1e-4))]
    number += [("ISMEAR", "int", incar.get("ISMEAR", 1)), ("SIGMA", "", incar.get("SIGMA", 0.2))]
    number += [("ISPIN", "int", incar.get("ISPIN", 1)), ("NSW", "int", 0), ("IBRION", "int", -1), ("NBANDS", "int", 2)]
    return "\n".join(f'<i{f" type={t!r}" if t else ""} name="{n}">{x}</i>' for n, t, x in number)


def xml_head(run: dict[str, Any]) -> str:
    atoms, incar, potcars = run["atoms"], run["incar"], run["potcars"]
    tags = "\n".join(f'<i type="string" name="{k}">{x}</i>' for k, x in incar.items() if k in ("PREC", "ALGO"))
    symbols = atoms.get_chemical_symbols()
    kinds = {p["element"]: k + 1 for k, p in enumerate(potcars)}
    rows = "".join(f"<rc><c>{s:<2}</c><c>{kinds[s]:4d}</c></rc>\n" for s in symbols)
    types = "".join(
        f"<rc><c>{symbols.count(p['element']):4d}</c><c>{p['element']:<2}</c><c>1.0</c><c>{p['zval']}</c>"
        f"<c> {p['title']} </c></rc>\n"
        for p in potcars
    )
    kind, counts = run["mesh"]
    return f"""<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
<generator>
<i name="program" type="string">vasp </i>
<i name="version" type="string">6.4.2  </i>
<i name="subversion" type="string">20Jul23 (build of a test) complex</i>
<i name="platform" type="string">LinuxGNU </i>
<i name="date" type="string">2026 11 22 </i>
<i name="time" type="string">10:00:00 </i>
</generator>
<incar>
{tags}
</incar>
<kpoints>
<generation param="{kind}">
<v type="int" name="divisions">{" ".join(map(str, counts))}</v>
<v name="usershift">0.0 0.0 0.0</v>
</generation>
{varray("kpointlist", [[0, 0, 0]])}
{varray("weights", [[1.0]])}
</kpoints>
<parameters>
<separator name="electronic" >
{parameters_xml(run)}
</separator>
</parameters>
<atominfo>
<atoms>{len(atoms)}</atoms>
<types>{len(potcars)}</types>
<array name="atoms" >
<dimension dim="1">ion</dimension>
<field type="string">element</field><field type="int">atomtype</field>
<set>
{rows}</set>
</array>
<array name="atomtypes" >
<dimension dim="1">type</dimension>
<field type="int">atomspertype</field><field type="string">element</field><field>mass</field>
<field>valence</field><field type="string">pseudopotential</field>
<set>
{types}</set>
</array>
</atominfo>
<structure name="initialpos" >
{crystal(atoms)}
</structure>
<calculation>
"""


def xml_tail(run: dict[str, Any], energies: list[float]) -> str:
    atoms, spins = run["atoms"], int(run["incar"].get("ISPIN", 1))
    levels = "".join(
        f'<set comment="spin {s + 1}"><r> -6.0 0.0 0.0 </r><r> 4.0 0.5 1.0 </r></set>' for s in range(spins)
    )
    fields = "<field>energy</field><field>total</field><field>integrated</field>"
    dos = f"<array><dimension dim='1'>gridpoints</dimension>{fields}<set>{levels}</set></array>"
    stress = -run["stress"] / GPa * 10
    return f"""<structure>
{crystal(atoms)}
</structure>
{varray("forces", run["forces"])}
{varray("stress", stress)}
{energies_xml(energies[-1], run["entropy"])}
{bands_xml(spins)}
<dos><i name="efermi">      0.50000000 </i><total>{dos}</total></dos>
</calculation>
<structure name="finalpos" >
{crystal(atoms)}
</structure>
</modeling>
"""


def outcar_head(run: dict[str, Any]) -> str:
    incar = run["incar"]
    titles = "\n".join(f" POTCAR:    {p['title']}\n   TITEL  = {p['title']}" for p in run["potcars"])
    return f""" {VERSION}

 executed on             LinuxGNU date 2026.11.22  10:00:00
{titles}
   NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands    NBANDS=      2
   total plane-waves  NPLWV =    1000


{"-" * 104}


 k-point   1 :   0.0000 0.0000 0.0000  plane waves:     500

 maximum and minimum number of plane-waves per node :       500      500

   ISPIN  =      {incar.get("ISPIN", 1)}    spin polarized calculation?
   NELM   =    {incar.get("NELM", 60)};   NELMIN=  2; NELMDL= -5     # of ELM steps
   EDIFF  = {float(incar.get("EDIFF", 1e-4)):.1E}   stopping-criterion for ELM
   NSW    =      {incar.get("NSW", 0)}    number of steps for IOM
   IBRION =     -1    ionic relax: 0-MD 1-quasi-New 2-CG
   NELECT = {run["nelect"]:12.4f}    total number of electrons
"""


def outcar_step(k: int, now: float, before: float, run: dict[str, Any]) -> str:
    return f"""
--------------------------------------- Iteration      1({k:4d})  ---------------------------------------

  total energy-change (2. order) :{now - before:.7E}  ({now - before:.7E})
 number of electron  {run["nelect"]:13.7f} magnetization  {run["moments"].sum():13.7f}
  free energy    TOTEN  = {now:18.8f} eV
"""


def outcar_tail(run: dict[str, Any], energies: list[float], said: str) -> str:
    atoms, toten = run["atoms"], energies[-1]
    table = "\n".join(
        "".join(f"{x:13.5f}" for x in [*position, *force])
        for position, force in zip(atoms.positions, run["forces"], strict=True)
    )
    local = "\n".join(
        f"{i + 1:5d}" + "".join(f"{x:9.3f}" for x in (0.0, 0.0, m, m)) for i, m in enumerate(run["moments"])
    )
    kbar = " ".join(f"{x:10.5f}" for x in (-run["stress"] / GPa * 10)[[0, 1, 2, 0, 1, 2], [0, 1, 2, 1, 2, 0]])
    magnetization = (
        f"\n magnetization (x)\n\n# of ion       s       p       d       tot\n{'-' * 42}\n{local}\n{'-' * 42}\n"
        f"tot  {0:9.3f}{0:9.3f}{sum(run['moments']):9.3f}{sum(run['moments']):9.3f}\n"
        if run["incar"].get("ISPIN") == "2"
        else ""
    )
    return f"""
------------------------ aborting loop {said} ----------------------------------------

 E-fermi :   0.5000     XC(G=0):  -1.0000     alpha+bet : -1.0000
{magnetization}
  in kB   {kbar}
  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)
  ---------------------------------------------------
  free  energy   TOTEN  = {toten:18.8f} eV

  energy  without entropy= {toten + run["entropy"]:16.8f}  energy(sigma->0) = {toten + run["entropy"] / 2:16.8f}

 POSITION                                       TOTAL-FORCE (eV/Angst)
 -----------------------------------------------------------------------------------
{table}
 -----------------------------------------------------------------------------------

 General timing and accounting informations for this job:
 ========================================================

                  Total CPU time used (sec):        1.000
                         Elapsed time (sec):        1.000
"""


def compute(incar: dict[str, str]) -> dict[str, Any]:
    potcars = read_potcar()
    if not Path("POSCAR").exists():
        bug("ERROR: there is no POSCAR file")
    atoms: Any = read("POSCAR", format="vasp")
    species = list(dict.fromkeys(atoms.get_chemical_symbols()))
    if [p["element"] for p in potcars] != species:
        bug(f"ERROR: the elements of POSCAR ({' '.join(species)}) and of POTCAR differ, or come in another order")
    zvals = {p["element"]: p["zval"] for p in potcars}
    neutral = sum(zvals[s] for s in atoms.get_chemical_symbols())
    nelect = float(incar.get("NELECT", neutral))
    atoms.calc = EMT(asap_cutoff=False)
    energy = float(atoms.get_potential_energy()) + 3.0 * (neutral - nelect)
    entropy = 0.0 if incar.get("ISMEAR") == "-5" else 0.02 * len(atoms) * (1 + np.tanh(energy))
    return {
        "atoms": atoms,
        "incar": incar,
        "potcars": potcars,
        "mesh": mesh(incar, atoms),
        "nelect": nelect,
        "energy": energy,
        "entropy": entropy,
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(voigt=False),
        "moments": 0.9 * moments(incar, len(atoms)),
    }


def main() -> None:
    incar = read_incar()
    word = incar.get("SYSTEM", "").lower()
    print(f" running on    1 total cores\n {VERSION}", flush=True)
    if word == "hang":
        subprocess.run(["sleep", "600"], check=False)
    run = compute(incar)
    energies = cycle(incar, run["energy"], word)
    with Path("OUTCAR").open("w") as outcar, Path("vasprun.xml").open("w") as xml, Path("OSZICAR").open("w") as oszicar:
        outcar.write(outcar_head(run))
        xml.write(xml_head(run))
        for k, (before, now) in enumerate(zip([0.0, *energies], energies, strict=False), start=1):
            outcar.write(outcar_step(k, now, before, run))
            xml.write(f"<scstep>\n{energies_xml(now, run['entropy'])}\n</scstep>\n")
            oszicar.write(f"DAV: {k:3d} {now:20.12E} {now - before:14.5E}\n")
            if word in ("crash", "silent") and k == 3:
                break
        for file in (outcar, xml, oszicar):
            file.flush()
        if word in ("crash", "silent"):
            bug("ZBRENT: fatal error in bracketing\nLAPACK: Routine ZPOTRF failed! 1 3 1", 1 if word == "crash" else 0)
        tail = xml_tail(run, energies)
        if word == "cut":
            xml.write(tail[: tail.index("</varray>", tail.index('"forces"')) - 90])
            xml.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        short = len(energies) == int(incar.get("NELM", 60))
        said = "EDIFF was not reached (unconverged)" if short and word != "old" else "because EDIFF is reached"
        outcar.write(outcar_tail(run, energies, said))
        xml.write(tail)
        oszicar.write(f"   1 F= {energies[-1]:.8E} E0= {energies[-1] + run['entropy'] / 2:.8E}  d E =0.000000E+00\n")
    Path("CONTCAR").write_text(Path("POSCAR").read_text())


if __name__ == "__main__":
    main()
