"""What a label costs beyond its calculation: ``python tests/benchmarks/label_overhead.py [local] [pyiron] [slurm]``.

EMT takes milliseconds, so nearly all of the wall time is the way there and back. ``slurm`` needs a SLURM that answers.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ase.build import bulk

from alcore.identity import label_key
from alcore.types import Candidate, Label, LabelRequest, Structure
from calculators.executors.queues import QueueSpec
from calculators.labeling import ExecutorLabeler, LocalLabeler
from calculators.pyiron_labeling import PyironLabeler
from calculators.registry import resolve

EMT = resolve("emt")
EXECUTORS: dict[str, tuple[int, Callable[[Path], ExecutorLabeler]]] = {
    "local": (100, lambda folder: LocalLabeler(EMT, folder)),
    "pyiron": (5, lambda folder: PyironLabeler(EMT, folder, queue=None)),
    "slurm": (
        5,
        lambda folder: PyironLabeler(EMT, folder, queue=QueueSpec(system="slurm", walltime_s=300, poll_s=1)),
    ),
}
"""How many labels are timed after the first, and the executor."""


def request(seed: int) -> LabelRequest:
    """A label of four rattled Cu atoms."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    structure = Structure.from_atoms(atoms)
    candidate = Candidate(path="benchmark", kind="data", image=0, structure=structure)
    return LabelRequest(key=label_key(structure, EMT.fingerprint), candidate=candidate, generation=0)


def calculation_s(label: Label) -> float:
    """Seconds of the calculation itself."""
    return float(sum(attempt["seconds"] for attempt in label.details["attempts"]))


def overheads_s(n: int, make: Callable[[Path], ExecutorLabeler]) -> list[float]:
    """Wall time less calculation, of ``n`` labels one after the other and one before them that warms up."""
    found = []
    with tempfile.TemporaryDirectory(prefix="al-loop-benchmark-") as folder, make(Path(folder)) as labeler:
        for seed in range(n + 1):
            asked = request(seed)
            began = time.perf_counter()
            (label,) = labeler.label([asked])
            found.append(time.perf_counter() - began - calculation_s(label))
            labeler.tidy(label)
            assert label.ok, label.reason
    return found


def main() -> None:
    print("| executor | first label | later labels: median | worst |\n|---|---|---|---|")
    for name in sys.argv[1:] or ["local", "pyiron"]:
        first, *later = overheads_s(*EXECUTORS[name])
        print(f"| {name} | {first:.2f} s | {1e3 * statistics.median(later):.0f} ms | {1e3 * max(later):.0f} ms |")


if __name__ == "__main__":
    main()
