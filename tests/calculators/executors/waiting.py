"""``python waiting.py FOLDER SYSTEM KEY FACTORY_SETTINGS``: labels one structure through pyiron, until it is killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ase.build import bulk

from alcore.types import Candidate, LabelRequest, Structure
from calculators.executors.queues import QueueSpec
from calculators.pyiron_labeling import PyironLabeler
from calculators.registry import resolve


def main(folder: str, system: str, key: str, settings: str) -> None:
    here = str(Path(__file__).parent)
    resolved = resolve("ase", {"factory": "counting:counted", "settings": json.loads(settings), "path": here})
    candidate = Candidate(path="hop", kind="data", image=0, structure=Structure.from_atoms(bulk("Cu", cubic=True)))
    queue = QueueSpec(system=system, walltime_s=600, poll_s=0.5, grace_s=3) if system else None
    labeler = PyironLabeler(resolved, Path(folder), 1, queue=queue, timeout_s=300)
    print(labeler.label([LabelRequest(key=key, candidate=candidate, generation=0)])[0].status, flush=True)
    labeler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
