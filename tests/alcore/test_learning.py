"""Judging a potential by labels it has not seen, and nested subsets of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from alcore.errors import InputError
from alcore.learning import judge, nested_subsets
from alcore.mace.models import build_model
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.training import TrainSpec, fine_tune
from alcore.protocols import Potential
from alcore.types import Dataset, FloatArray, Label, Structure

EXACT = 1e-10
LEARNED_SHARE = 0.5
"""Of the error before training that may be left on unseen frames; 0.21 of forces and 0.29 of energies were seen."""


def rattled_frames(crystal: Atoms, count: int, seed: int) -> list[Structure]:
    rng = np.random.default_rng(seed)
    structure = Structure.from_atoms(crystal)
    return [structure.moved(structure.positions + rng.normal(scale=0.1, size=(len(crystal), 3))) for _ in range(count)]


@pytest.fixture(scope="module")
def copper(label_of: Callable[..., Label]) -> list[Label]:
    return [label_of(frame) for frame in rattled_frames(bulk("Cu", cubic=True), 20, 0)]


@pytest.fixture(scope="module")
def gold(label_of: Callable[..., Label]) -> list[Label]:
    return [label_of(frame) for frame in rattled_frames(bulk("Au").repeat(2), 2, 1)]


@dataclass
class Wrong:
    """EMT with an energy shift an atom of each composition, a stretched energy, and a force in x too much."""

    emt: Potential
    shift_ev_per_atom: dict[int, float]
    stretch: float = 1.0
    force_ev_per_ang: float = 0.0

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        energies, forces = self.emt.evaluate(template, positions)
        shift = sum(self.shift_ev_per_atom.get(int(z), 0.0) for z in template.numbers)
        return self.stretch * energies + shift, forces + np.array([self.force_ev_per_ang, 0.0, 0.0])


def energies(labels: Sequence[Label]) -> FloatArray:
    return np.array([label.energy_ev for label in labels])


def test_the_reference_itself_has_no_error(emt: Potential, copper: list[Label], gold: list[Label]) -> None:
    found = judge(emt, [*copper, *gold])
    assert found.force_rmse_ev_per_ang == pytest.approx(0.0, abs=EXACT)
    assert found.energy_rmse_ev_per_atom == pytest.approx(0.0, abs=EXACT)
    assert found.n_labels == len(copper) + len(gold)


def test_absolute_energies_of_compositions_do_not_count(emt: Any, copper: list[Label], gold: list[Label]) -> None:
    shifted = judge(Wrong(emt, {29: 3.0, 79: -70.0}), [*copper, *gold])
    assert shifted.energy_rmse_ev_per_atom == pytest.approx(0.0, abs=EXACT)


def test_relative_energies_count_by_atom(emt: Any, copper: list[Label], gold: list[Label]) -> None:
    found = judge(Wrong(emt, {}, stretch=1.5), [*copper, *gold])
    per_atom = [0.5 * (energies(part) - energies(part).mean()) / len(part[0].structure) for part in (copper, gold)]
    assert found.energy_rmse_ev_per_atom == pytest.approx(np.sqrt(np.mean(np.concatenate(per_atom) ** 2)))
    assert found.energy_rmse_ev_per_atom > 1e-3
    assert found.force_rmse_ev_per_ang == pytest.approx(0.0, abs=EXACT)


def test_force_errors_are_by_component_and_atom(emt: Any, copper: list[Label], gold: list[Label]) -> None:
    for labels in (copper, gold, [*copper, *gold]):
        found = judge(Wrong(emt, {}, force_ev_per_ang=0.3), labels)
        assert found.force_rmse_ev_per_ang == pytest.approx(0.3 / np.sqrt(3))


def test_a_label_alone_of_its_composition_says_nothing_of_energies(
    emt: Any, copper: list[Label], gold: list[Label]
) -> None:
    wrong = Wrong(emt, {}, stretch=1.5)
    assert np.isnan(judge(wrong, gold[:1]).energy_rmse_ev_per_atom)
    both, one = judge(wrong, [*copper, gold[0]]), judge(wrong, copper)
    assert both.energy_rmse_ev_per_atom == pytest.approx(one.energy_rmse_ev_per_atom)


def test_there_must_be_something_to_judge_by(emt: Potential, copper: list[Label]) -> None:
    for labels in ([], [replace(copper[0], forces=None)], [replace(copper[0], energy_ev=None)]):
        with pytest.raises(InputError, match="nothing to judge by"):
            judge(emt, labels)


def test_what_was_learned_shows_on_unseen_labels(copper: list[Label]) -> None:
    start = build_model([29], 0)
    seen, unseen = Dataset(labels=tuple(copper[:6])), copper[12:]
    learned = fine_tune(start, seen, TrainSpec(epochs=40), weights=np.ones(6)).model
    before, after = (judge(MaceSurrogate(prior=model), unseen) for model in (start, learned))
    assert after.force_rmse_ev_per_ang < LEARNED_SHARE * before.force_rmse_ev_per_ang
    assert after.energy_rmse_ev_per_atom < LEARNED_SHARE * before.energy_rmse_ev_per_atom


def test_subsets_are_nested_and_repeatable(copper: list[Label]) -> None:
    dataset = Dataset(labels=tuple(copper))
    found = nested_subsets(dataset, [8, 2, 20], seed=3)
    again = nested_subsets(dataset, [8, 2, 20], seed=3)
    keys = [[label.key for label in subset.labels] for subset in found]
    assert [len(part) for part in keys] == [8, 2, 20]
    assert keys == [[label.key for label in subset.labels] for subset in again]
    assert keys[1] == keys[0][:2]
    assert keys[0] == keys[2][:8]
    assert sorted(keys[2]) == sorted(label.key for label in copper)
    other = nested_subsets(dataset, [8], seed=4)[0]
    assert [label.key for label in other.labels] != keys[0]


@pytest.mark.parametrize("size", [0, -1, 21])
def test_a_subset_larger_than_the_set_is_refused(copper: list[Label], size: int) -> None:
    with pytest.raises(InputError, match="no subset"):
        nested_subsets(Dataset(labels=tuple(copper)), [4, size], seed=0)
