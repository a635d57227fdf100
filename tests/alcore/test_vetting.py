"""Which labels are believed beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk, molecule
from hypothesis import given
from hypothesis import strategies as st

from alcore.types import Label, Structure
from alcore.vetting import believed, vet

LabelOf = Callable[..., Label]


def _rattled(label_of: LabelOf, n: int, scale_ang: float = 0.05) -> list[Label]:
    labels = []
    for seed in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(scale_ang, seed=seed)
        labels.append(label_of(Structure.from_atoms(atoms)))
    return labels


def _lying(label: Label, by_ev: float = 1000.0) -> Label:
    assert label.energy_ev is not None
    return replace(label, energy_ev=label.energy_ev + by_ev)


@pytest.mark.parametrize("scale_ang", [0.001, 0.05, 0.4])
def test_honest_labels_are_all_believed(label_of: LabelOf, scale_ang: float) -> None:
    """0.4 Å brings atoms so near that energies differ by tens of eV: the forces there explain it."""
    assert vet(_rattled(label_of, 8, scale_ang)) == {}


@given(liars=st.sets(st.integers(0, 8), max_size=4), lies_ev=st.lists(st.sampled_from([-1e3, 1e3, 5e4]), min_size=9))
def test_a_minority_of_liars_is_found(label_of: LabelOf, liars: set[int], lies_ev: list[float]) -> None:
    labels = [_lying(label, lies_ev[k]) if k in liars else label for k, label in enumerate(_rattled(label_of, 9))]
    assert set(vet(labels)) == {labels[k].key for k in liars}


def test_one_against_one_nobody_is_believed(label_of: LabelOf) -> None:
    one, other = _rattled(label_of, 2)
    doubts = vet([one, _lying(other)])
    assert set(doubts) == {one.key, other.key}
    assert "1000 eV" in doubts[one.key]


def test_other_atoms_are_never_compared(label_of: LabelOf) -> None:
    far = label_of(Structure.from_atoms(molecule("H2O")))
    assert vet([*_rattled(label_of, 2), _lying(far, 1e5)]) == {}
    charged = replace(far, structure=replace(far.structure, charge=1.0), key="charged")
    assert vet([far, _lying(charged)]) == {}


def test_an_old_lie_is_not_forgotten_among_many_labels(label_of: LabelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the latest labels choose whom to believe; those before them are held against that."""
    monkeypatch.setattr("alcore.vetting.MOST_COMPARED", 4)
    first, *others = _rattled(label_of, 12)
    assert set(vet([_lying(first), *others])) == {first.key}
    assert vet([first, *others]) == {}


def test_a_single_label_has_nobody_to_contradict_it(label_of: LabelOf) -> None:
    assert vet(_rattled(label_of, 1)) == {}
    assert vet([]) == {}


def test_doubted_labels_are_rejected_and_failed_ones_keep_their_reason(label_of: LabelOf) -> None:
    good, bad = _rattled(label_of, 2)
    failed = replace(bad, status="crashed", reason="its own", energy_ev=None, forces=None)
    now = believed({"a": good, "b": failed}, {"a": "off", "b": "off"})
    assert (now["a"].status, now["a"].reason, now["a"].ok) == ("rejected", "off", False)
    assert (now["b"].status, now["b"].reason) == ("crashed", "its own")
    np.testing.assert_array_equal(now["a"].forces, good.forces)
