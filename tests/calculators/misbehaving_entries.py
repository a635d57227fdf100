"""Calculators as a plug-in would bring them, one that keeps every promise and others that break one each.

``HONEST`` is EMT behind a make-believe program: it counts the steps of an SCF, may stop at its limit or crash, and
takes charge and moments. Tests offer these as entry points ``misbehaving_entries:<NAME>``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT
from pydantic import Field

from alcore.types import Structure
from calculators import emt
from calculators.base import CalculatorEntry, CalculatorSettings, Inspection, Retry

OUTPUT = "scf.json"


class Settings(CalculatorSettings):
    max_steps: int = Field(20, ge=1, description="steps of the SCF at most")
    needs: int = Field(7, description="steps that this structure needs")
    needs_gentle: int | None = Field(None, description="steps it needs with gentle mixing; null: as many")
    gentle: bool = Field(False, description="gentle mixing, or not")
    memory_gb: float = Field(8.0, description="memory in GB; the program dies below 4")
    cutoff_ev: float = Field(400.0, description="cutoff in eV: moves the energy")
    inspection_fails: bool = Field(False, description="the output cannot be read")
    hangs_gently: bool = Field(False, description="with gentle mixing it never comes back")
    lost_folder: bool = Field(False, description="a failure leaves another folder the current one")


Effect = Callable[["Program", Any], None]


class Program(EMT):
    """EMT with the manners of a program; ``effect(self, atoms)`` comes last."""

    def __init__(self, settings: Settings, charge: float, effect: Effect | None) -> None:
        super().__init__()
        self.settings, self.charge, self.effect = settings, charge, effect

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        s = self.settings
        if s.gentle and s.hangs_gently:
            subprocess.run(["sleep", NAP_S], check=True)
        if s.memory_gb < 4:
            if s.lost_folder:
                os.chdir("/")
            raise MemoryError("out of memory")
        needs = s.needs_gentle if s.gentle and s.needs_gentle else s.needs
        Path(OUTPUT).write_text(json.dumps({"steps": min(needs, s.max_steps), "converged": needs <= s.max_steps}))
        super().calculate(atoms, properties, system_changes)
        moments = atoms.get_initial_magnetic_moments()
        self.add(7.0 * self.charge + 0.01 * float(np.abs(moments).sum()))
        self.results["magmoms"], self.results["magmom"] = moments, float(moments.sum())
        if self.effect is not None:
            self.effect(self, atoms)

    def add(self, energy_ev: float) -> None:
        self.results["energy"] = self.results["free_energy"] = self.results["energy"] + energy_ev


def maker(effect: Effect | None = None) -> Callable[..., Program]:
    def make(settings: Settings, structure: Structure | None = None) -> Program:
        return Program(settings, structure.charge if structure is not None else 0.0, effect)

    return make


def inspect(settings: Settings, calculator: Program) -> Inspection:
    if settings.inspection_fails:
        raise ValueError("line 1 is not\nwhat was expected")
    said = json.loads(Path(OUTPUT).read_text())
    reason = "" if said["converged"] else f"the SCF stopped at its limit of {settings.max_steps} steps"
    notes = {"gap_ev": np.float64(0.5), "kpoints": np.arange(3), "attempts": "not mine"}
    return Inspection(
        electronic_steps=np.int64(said["steps"]),  # type: ignore[arg-type]  # as a parser may give it
        converged=np.bool_(said["converged"]),  # type: ignore[arg-type]
        reason=reason,
        code_version="1.0.2",
        notes=notes,
    )


def facts(settings: Settings) -> dict[str, Any]:
    return {"code": "program", "version": "1.0", "cutoff_ev": settings.cutoff_ev}


def changed(**changes: Any) -> Callable[[Settings], Settings]:
    return lambda settings: settings.model_copy(update=changes)


HONEST = CalculatorEntry(
    name="HONEST",
    description="keeps every promise",
    settings_model=Settings,
    make=maker(),
    unavailable=lambda settings: None,
    fingerprint_facts=facts,
    elements=lambda settings: emt.elements(emt.EmtSettings()),
    takes_charge=True,
    inspect=inspect,
    retries=(
        Retry(name="more memory", change=changed(memory_gb=16.0), after=("crashed",)),
        Retry(name="3x the steps", change=lambda s: s.model_copy(update={"max_steps": 3 * s.max_steps})),
        Retry(name="gentle mixing", change=changed(gentle=True), after=("unconverged", "crashed")),
    ),
    sabotage={"unconverged": changed(max_steps=1), "crashed": changed(memory_gb=1.0)},
)


def variant(name: str, effect: Effect | None = None, **changes: Any) -> CalculatorEntry:
    """Without sabotage, which costs a worker's start each, unless it says so."""
    return replace(HONEST, **{"name": name, "make": maker(effect), "sabotage": {}} | changes)


def _scale(calculator: Program, atoms: Any) -> None:
    calculator.results["forces"] = 1.2 * calculator.results["forces"]


def _move(calculator: Program, atoms: Any) -> None:
    atoms.positions[1] += 0.05


def _raise(calculator: Program, atoms: Any) -> None:
    raise RuntimeError("no licence")


def _spring(calculator: Program, atoms: Any) -> None:
    """Between the first two atoms of the file: an order that means something."""
    vector = atoms.positions[1] - atoms.positions[0]
    calculator.add(0.25 * float(vector @ vector))
    forces = calculator.results["forces"].copy()
    forces[0] += 0.5 * vector
    forces[1] -= 0.5 * vector
    calculator.results["forces"] = forces


def _egg_box(calculator: Program, atoms: Any) -> None:
    calculator.add(0.1 * float(np.cos(atoms.positions).sum()))
    calculator.results["forces"] = calculator.results["forces"] + 0.1 * np.sin(atoms.positions)


def _dice(calculator: Program, atoms: Any) -> None:
    calculator.add(random.random())


def _forget_charge(calculator: Program, atoms: Any) -> None:
    calculator.add(-7.0 * calculator.charge)


def _forget_moments(calculator: Program, atoms: Any) -> None:
    calculator.add(-0.01 * float(np.abs(atoms.get_initial_magnetic_moments()).sum()))
    calculator.results["magmoms"] = np.zeros(len(atoms))


def _cannot_be_charged(calculator: Program, atoms: Any) -> None:
    if calculator.charge:
        raise RuntimeError("odd number of electrons")


def _leave_a_child(calculator: Program, atoms: Any) -> None:
    subprocess.Popen(["sleep", NAP_S])


NAP_S = "314.159"
"""A length of sleep that nobody else on this machine sleeps."""
AS_A_DAEMON = f"env -i setsid sleep {NAP_S} >/dev/null 2>&1 & echo $!"
"""Out of the family, without its environment: what a daemon does."""


def _leave_a_daemon(calculator: Program, atoms: Any) -> None:
    subprocess.run(AS_A_DAEMON, shell=True, check=True, stdout=subprocess.DEVNULL)


def _run_detached(calculator: Program, atoms: Any) -> None:
    """Ends what it started, if it is allowed to get there."""
    said = subprocess.run(AS_A_DAEMON, shell=True, check=True, capture_output=True, text=True)
    subprocess.run(["sleep", "0.4"], check=True)
    os.kill(int(said.stdout), signal.SIGKILL)


def _no_facts(settings: Settings) -> dict[str, Any]:
    return facts(settings) | {"run": uuid.uuid4().hex}


VARIANTS = {
    entry.name: entry
    for entry in (
        variant("SCALED", _scale),
        variant("MOVES", _move),
        variant("RAISES", _raise),
        variant("ORDERED", _spring),
        variant("EGG_BOX", _egg_box),
        variant("DICE", _dice),
        variant("CHARGE_IGNORED", _forget_charge),
        variant("CHARGE_CRASHES", _cannot_be_charged),
        variant("CHARGE_REFUSED", refuse=lambda settings, structure: "neutral only" if structure.charge else None),
        variant("MOMENTS_IGNORED", _forget_moments),
        variant("CHILD_LEFT", _leave_a_child),
        variant("DAEMON_LEFT", _leave_a_daemon),
        variant("DETACHED", _run_detached),
        variant("KEY_MOVES", fingerprint_facts=_no_facts),
        variant("KEY_ODD", fingerprint_facts=lambda settings: facts(settings) | {"path": Path()}),
        variant("RUNG_MOVES", retries=(Retry(name="lower cutoff", change=changed(cutoff_ev=300.0)), *HONEST.retries)),
        variant("RUNG_RAISES", retries=(Retry(name="no such key", change=lambda s: s.nothing), *HONEST.retries)),
        variant("NO_STEPS", inspect=lambda settings, calculator: Inspection()),
        variant("HIDES_UNCONVERGED", inspect=lambda s, c: Inspection(electronic_steps=7), sabotage=HONEST.sabotage),
        variant("CRASH_IS_OK", sabotage={"crashed": changed(memory_gb=4.0)}),
        variant("SABOTAGE_RAISES", sabotage={"crashed": lambda s: s.nothing}),
    )
}
globals().update(VARIANTS)
NAMES = ("HONEST", *VARIANTS)


def make_honest() -> CalculatorEntry:
    """An entry point may name a function, too."""
    return replace(HONEST, name="MADE")


def no_entry() -> str:
    return "not an entry"


def exits() -> CalculatorEntry:
    raise SystemExit("not here")
