"""A reference calculator that goes wrong for a quarter of all structures: the loop converges all the same."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest

from alcore.runner import PlainRunner
from flows.report import barrier_summary
from flows.runfile import load_run_file
from flows.session import RunOutcome, run_session

FAULTY = '''
import hashlib, time
from pathlib import Path
import numpy as np
from ase.calculators.emt import EMT

FAULTS = ("raise", "nan", "hang", "lie", "once")

class Faulty(EMT):
    """EMT, but for a quarter of all structures, told apart by a hash of their positions, something goes wrong."""

    def __init__(self, fault, salt):
        super().__init__()
        self.fault, self.salt, self.here = fault, salt, Path(__file__).parent

    def calculate(self, atoms=None, properties=("energy",), system_changes=("positions",)):
        super().calculate(atoms, properties, system_changes)
        digest = hashlib.sha256(self.salt.encode() + np.rint(atoms.positions * 1e6).astype("<i8").tobytes()).digest()
        if digest[0] >= 64:
            return
        fault = FAULTS[digest[1] % len(FAULTS)] if self.fault == "any" else self.fault
        seen = self.here / f"{fault}-{digest.hex()[:12]}"
        again = seen.exists()
        seen.touch()
        with (self.here / f"faults-{self.salt}").open("a") as faults:
            faults.write(fault + "\\n")
        if fault == "raise" or (fault == "once" and not again):
            raise RuntimeError("the licence server bit me")
        if fault == "nan":
            self.results["forces"] = np.full_like(self.results["forces"], np.nan)
        if fault == "hang":
            time.sleep(3600)
        if fault == "lie":
            for energy in ("energy", "free_energy"):
                self.results[energy] += 1000.0

def calculator(fault, salt):
    return Faulty(fault, salt)
'''

STATUS = {"raise": "crashed", "nan": "rejected", "hang": "timeout", "lie": "rejected", "once": "crashed"}


def salt_that_spoils(file: Path, fault: str) -> str:
    """A salt with which this structure is in the faulty quarter, so that something goes wrong in every run."""
    positions = np.rint(ase.io.read(file).positions * 1e6).astype("<i8").tobytes()
    salts = (f"{fault}-{k}" for k in itertools.count())
    return next(salt for salt in salts if hashlib.sha256(salt.encode() + positions).digest()[0] < 64)


def run_with(fault: str, hop: Any, home: Path) -> tuple[RunOutcome, list[str]]:
    """The outcome, and the faults that really happened, in order."""
    (hop.folder / "faulty.py").write_text(FAULTY)
    salt = salt_that_spoils(hop.folder / "initial.extxyz", fault)
    reference = {"name": "ase", "factory": "faulty:calculator", "settings": {"fault": fault, "salt": salt}}
    file = hop.run_file(f"faulty-{fault}", calculator=reference, executor={"workers": 2, "timeout_s": 4})
    outcome = run_session(load_run_file(file), runner=PlainRunner({"label": 2}))
    faults = hop.folder / f"faults-{salt}"
    return outcome, faults.read_text().split() if faults.exists() else []


@pytest.mark.parametrize(
    "fault",
    ["any", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("raise", "nan", "hang", "lie", "once"))],
)
def test_it_converges_learns_no_bad_label_and_lists_every_failure(fault: str, hop: Any, home: Path) -> None:
    outcome, faults = run_with(fault, hop, home)
    assert faults, "nothing went wrong: the test shows nothing"
    assert outcome.run.status == "converged", outcome.run.reason
    learned = outcome.generations[-1].label_keys
    assert all(outcome.labels[key].ok for key in learned)
    summary = json.loads(json.dumps(barrier_summary(outcome.run, outcome.generations, outcome.labels)))
    failures = summary["failures"]
    assert sorted(row["status"] for row in failures) == sorted(STATUS[fault] for fault in faults)
    assert summary["n_reference_calls"] == len(learned) + len(failures)
    for row in failures:
        assert row["reason"]
        assert (Path(row["folder"]) / "input.extxyz").is_file(), "files of a failure are kept"
    energies = [outcome.labels[key].energy_ev for key in learned]
    assert max(energies) - min(energies) < 5.0
