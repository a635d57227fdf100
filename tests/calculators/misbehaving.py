"""Factories of calculators that fail, lie and hang, named by tests as ``misbehaving:<function>``."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, SCFError, all_changes
from ase.calculators.emt import EMT


class Spoiled(EMT):
    """EMT, then ``spoil(self, atoms)``."""

    def __init__(self, spoil: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._spoil = spoil

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self._spoil(self, atoms)


def honest() -> Calculator:
    return EMT()


def named_in(file: str) -> Calculator:
    """The calculator whose name stands in ``file`` when the label is made."""
    calculator: Calculator = globals()[Path(file).read_text()]()
    return calculator


def raises() -> Calculator:
    raise RuntimeError("no licence\nand more")


def exits() -> Calculator:
    sys.exit("a calculator must not end the worker")


def scf() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        raise SCFError("gave up")

    return Spoiled(spoil)


def says_unconverged() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        raise ValueError("SCF did not converge in 60 steps")

    return Spoiled(spoil)


def silent_unconverged() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.converged = False  # as ASE's Vasp does

    return Spoiled(spoil)


def nan() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.results["forces"] = calculator.results["forces"] * np.nan

    return Spoiled(spoil)


def nan_energy() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.results["energy"] = calculator.results["free_energy"] = float("nan")

    return Spoiled(spoil)


def wrong_shape() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.results["forces"] = calculator.results["forces"][:-1]

    return Spoiled(spoil)


def moves() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        atoms.positions[1] += 0.05

    return Spoiled(spoil)


def moves_its_own() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.atoms.positions[0] += 0.05

    return Spoiled(spoil)


def strains() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        atoms.set_cell(atoms.cell.array * 1.01)

    return Spoiled(spoil)


def reorders() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        atoms.numbers[:] = atoms.numbers[::-1].copy()

    return Spoiled(spoil)


def explodes() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.results["forces"] = calculator.results["forces"] + 1000.0

    return Spoiled(spoil)


def two_energies() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.results["energy"] = calculator.results["free_energy"] + 1.0  # extrapolated to zero smearing

    return Spoiled(spoil)


def inconsistent() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.results["forces"] = 1.2 * calculator.results["forces"]

    return Spoiled(spoil)


def hangs(pid_file: str, child: str = "plain") -> Calculator:
    """Starts ``sleep`` (which may leave the session, or lose its environment) and waits for it for ever."""
    command = ["env", "-i", "/bin/sleep", "300"] if child == "bare" else ["sleep", "300"]
    process = subprocess.Popen(command, start_new_session=child == "session")
    Path(pid_file).write_text(f"{os.getpid()} {process.pid}")
    process.wait()
    return EMT()


def hangs_in_c() -> Calculator:
    """Waits for ever in C without letting go of the interpreter."""
    ctypes.PyDLL(None).sleep(300)
    return EMT()


def dies(pid_file: str) -> Calculator:
    process = subprocess.Popen(["sleep", "300"], start_new_session=True)
    Path(pid_file).write_text(f"{os.getpid()} {process.pid}")
    print("the licence server bit me", file=sys.stderr, flush=True)
    os._exit(3)


def killed(times: int, begun: str, number: int = signal.SIGKILL) -> Calculator:
    """Its process is killed from outside the first ``times`` times; each begin is a letter in ``begun``."""
    with Path(begun).open("a") as file:
        file.write("b")
    if len(Path(begun).read_text()) <= times:
        os.kill(os.getpid(), number)
        time.sleep(60)
    return EMT()


def segfaults() -> Calculator:
    ctypes.string_at(0)
    return EMT()


def environment() -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        raise RuntimeError(f"{[os.environ.get(v) for v in variables]} in {os.getcwd()}")

    return Spoiled(spoil)


def writes() -> Calculator:
    Path("scratch.dat").write_text("left behind")
    subprocess.run(["echo", "said by a child"], check=True)
    return EMT()


def slow(seconds: float) -> Calculator:
    time.sleep(seconds)
    return EMT()


def charged(charge: float = 0.0) -> Calculator:
    def spoil(calculator: Any, atoms: Any) -> None:
        calculator.results["energy"] = calculator.results["free_energy"] = 7.0 * charge

    return Spoiled(spoil)


def hoards(megabytes: int, seconds: float = 300.0, child: bool = False) -> Calculator:
    """Holds that much memory, itself or in a child, for so long."""
    if child:
        program = f"import time; held = b'x' * {megabytes * 10**6}; time.sleep({seconds})"
        subprocess.run([sys.executable, "-c", program], check=True)
        return EMT()
    held = b"x" * (megabytes * 10**6)
    time.sleep(seconds)
    assert held
    return EMT()
