"""Any registered calculator as a teacher for pre-training, asked in this process."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alcore.teaching import Answer
from alcore.types import Structure
from calculators import chgnet
from calculators.attempts import climb
from calculators.base import ResolvedCalculator
from calculators.checks import reject_reason

_LOG = logging.getLogger(__name__)

RETRIES = 2
"""Rungs of a calculator's ladder that are climbed for a structure."""
CHGNET_BATCH = 4
"""Structures at once: on one core, larger batches are slower."""


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """A ``BatchTeacher`` (``alcore.teaching``).

    Attributes:
        name: of the calculator.
        fingerprint: of code, version and settings; answers of two fingerprints never meet.
        ask: gives an answer for each structure, in order; None where there is none.
        batch_size: structures worth asking about at once.
    """

    name: str
    fingerprint: str
    ask: Callable[[Sequence[Structure]], list[Answer | None]]
    batch_size: int = 1

    def __call__(self, structures: Sequence[Structure]) -> list[Answer | None]:
        answers: list[Answer | None] = []
        for start in range(0, len(structures), self.batch_size):
            answers += self.ask(structures[start : start + self.batch_size])
        return answers


def make_teacher(resolved: ResolvedCalculator) -> InProcess:
    """The calculator as a teacher; what is slow to load is loaded here."""
    resolved.entry.warm_up(resolved.settings)
    if resolved.entry is chgnet.ENTRY:
        batches, size = _ChgnetBatches(resolved), CHGNET_BATCH
        return InProcess(name=resolved.name, fingerprint=resolved.fingerprint, ask=batches, batch_size=size)
    return InProcess(name=resolved.name, fingerprint=resolved.fingerprint, ask=_OneByOne(resolved))


class _OneByOne:
    """Each structure in a folder of its own, which is removed; each reason for having no answer is told once."""

    def __init__(self, resolved: ResolvedCalculator) -> None:
        self._resolved = resolved
        self._told: set[str] = set()

    def __call__(self, structures: Sequence[Structure]) -> list[Answer | None]:
        return [self._ask(structure) for structure in structures]

    def _ask(self, structure: Structure) -> Answer | None:
        with tempfile.TemporaryDirectory(prefix="al-loop-teacher-") as folder, contextlib.chdir(Path(folder)):
            found = climb(self._resolved, RETRIES, structure)
        # how large forces may be is for whoever learns to say
        why = found.reason or found.status if found.status != "ok" else reject_reason(structure, found, np.inf)
        if why is None:
            return found.energy_ev, np.asarray(found.forces, dtype=float)
        if why not in self._told:
            _LOG.warning("%s has no answer for a structure: %s", self._resolved.name, why)
            self._told.add(why)
        return None


class _ChgnetBatches:
    def __init__(self, resolved: ResolvedCalculator) -> None:
        from pymatgen.io.ase import AseAtomsAdaptor

        self._model: Any = resolved.entry.make(resolved.settings).model  # type: ignore[attr-defined]
        self._model.graph_converter.set_isolated_atom_response("error")  # else it warns, and answers
        self._convert: Any = AseAtomsAdaptor.get_structure

    def __call__(self, batch: Sequence[Structure]) -> list[Answer | None]:
        try:
            crystals = [self._convert(structure.to_atoms()) for structure in batch]
            found = self._model.predict_structure(crystals, task="ef", batch_size=len(batch))
        except Exception:  # one structure it refuses (an isolated atom) fails its whole batch
            return [None] if len(batch) == 1 else [answer for one in batch for answer in self([one])]
        results = [found] if isinstance(found, dict) else found
        return [(float(r["e"]) * len(s), np.asarray(r["f"], dtype=float)) for r, s in zip(results, batch, strict=True)]
