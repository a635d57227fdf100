"""What a teacher says: asked in either way, cleaned of what cannot be learned, split into atoms and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from alcore.chemical_space import metals
from alcore.sampling import SampleSpec
from alcore.teaching import Answer, Limits, atomic_energies, sound_labels, teach
from alcore.types import Label, Structure

CALM = SampleSpec(squeezed_fraction=0.0, rattle_ang=(0.02, 0.1))


class EmtTeacher:
    """EMT as a batch teacher that is ``wrong`` about some structures, by their place."""

    name = "emt"

    def __init__(self, label_of: Callable[..., Label], wrong: dict[int, Answer | None] | None = None) -> None:
        self._label_of, self._wrong = label_of, wrong or {}

    def __call__(self, structures: Sequence[Structure]) -> list[Answer | None]:
        labels = [self._label_of(structure) for structure in structures]
        right: list[Answer | None] = [(float(x.energy_ev or 0.0), np.array(x.forces)) for x in labels]
        return [self._wrong.get(k, answer) for k, answer in enumerate(right)]


@pytest.fixture(scope="module")
def structures() -> list[Structure]:
    return metals(("Al", "Cu"), 30, np.random.default_rng(0), CALM)


def test_broken_labels_are_removed_and_counted(structures: list[Structure], label_of: Callable[..., Label]) -> None:
    sizes = [len(s) for s in structures]
    right = label_of(structures[4])
    wrong: dict[int, Answer | None] = {
        0: None,
        1: (float("nan"), np.zeros((sizes[1], 3))),
        2: (1.0, np.full((sizes[2], 3), np.inf)),
        3: (1.0, np.zeros((sizes[3] + 1, 3))),
        4: (float(right.energy_ev or 0.0) + 80.0 * sizes[4], np.array(right.forces)),
        5: (1.0, np.full((sizes[5], 3), 100.0)),
    }
    lessons = teach(structures, EmtTeacher(label_of, wrong))
    sound, removed = sound_labels(lessons.labels, Limits(max_force_ev_per_ang=60.0))
    assert [label.key for label in sound] == [label.key for label in lessons.labels[6:]]
    assert removed == {
        "crashed": 1,
        "not finite": 2,
        "no energy or forces": 1,
        "force out of bounds": 1,
        "energy out of bounds": 1,
    }


def test_atomic_energies_are_those_a_sum_of_atoms_was_made_of(structures: list[Structure]) -> None:
    own = {13: -3.5, 29: -1.25}
    labels = [
        Label(
            key=str(k),
            structure=s,
            status="ok",
            fingerprint="",
            calculator="",
            energy_ev=sum(own[int(z)] for z in s.numbers),
            forces=np.zeros((len(s), 3)),
        )
        for k, s in enumerate(structures)
    ]
    assert atomic_energies(labels, [13, 29]) == pytest.approx([-3.5, -1.25], abs=1e-9)


def test_a_labeler_teaches_as_well(
    structures: list[Structure], emt_labeler: type, label_of: Callable[..., Label]
) -> None:
    labeler = emt_labeler()
    by_labeler = teach(structures[:5], labeler)
    by_batch = teach(structures[:5], EmtTeacher(label_of))
    assert by_labeler.teacher == by_batch.teacher == "emt"
    assert by_labeler.fingerprint == "emt-in-process"
    assert [x.energy_ev for x in by_labeler.labels] == [x.energy_ev for x in by_batch.labels]
    assert len(labeler.calls) == 5
