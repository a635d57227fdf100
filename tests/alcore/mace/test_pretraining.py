"""Pre-training on a quick teacher: what is learned, what is thrown out, what the file carries."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk

from alcore.errors import InputError, TrainingError
from alcore.mace.models import (
    Architecture,
    build_model,
    model_elements,
    open_foundation,
    trainable_copy,
    weights_sha256,
)
from alcore.mace.pretraining import Pretrained, PretrainSpec, learn, pretrain, prior_line
from alcore.mace.surrogate import MaceSurrogate
from alcore.sampling import SampleSpec, disturbed
from alcore.teaching import Answer, teach
from alcore.types import Label, Structure

SPEC = PretrainSpec(
    architecture=Architecture(channels=8), epochs=30, batch_size=3, validate_every=10, ema_decay=0.9, held_out=0.2
)
BRIEF = replace(SPEC, epochs=2, validate_every=1)
CALM = SampleSpec(squeezed_fraction=0.0, rattle_ang=(0.02, 0.1))
ELEMENTS = ("Al", "Cu")
ATOM_EV = -7.0
ENERGY_EV_PER_ATOM, FORCE_EV_PER_ANG = 0.1, 0.35
"""Held-out errors after a few seconds of training; see the figures beside the assertions."""


class EmtTeacher:
    """EMT as a batch teacher, with a zero of energy far from that of the atoms."""

    name = "emt"

    def __init__(self, label_of: Callable[..., Label]) -> None:
        self._label_of = label_of

    def __call__(self, structures: Sequence[Structure]) -> list[Answer | None]:
        labels = [self._label_of(structure) for structure in structures]
        return [(float(x.energy_ev or 0.0) + ATOM_EV * len(x.structure), np.array(x.forces)) for x in labels]


def alloys(count: int, seed: int) -> list[Structure]:
    """Random alloys of eight atoms, strained and rattled."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        atoms = bulk("Cu", "fcc", a=3.8, cubic=True) * (2, 1, 1)
        atoms.symbols[:] = rng.choice(ELEMENTS, size=8).tolist()
        found.append(disturbed(Structure.from_atoms(atoms), rng, CALM))
    return found


@pytest.fixture(scope="module")
def structures() -> list[Structure]:
    return alloys(40, 0)


@pytest.fixture(scope="module")
def student(structures: list[Structure], label_of: Callable[..., Label]) -> Pretrained:
    return pretrain(structures, EmtTeacher(label_of), SPEC, np.random.default_rng(0), "metals of two elements")


def _energies(model: object, structures: Sequence[Structure]) -> np.ndarray:
    surrogate = MaceSurrogate(prior=model)
    return np.array([surrogate.evaluate(s, s.positions[None])[0][0] for s in structures])


def test_the_learning_curve_goes_down_to_a_useful_error(student: Pretrained) -> None:
    curve = student.report.curve
    assert [point.epoch for point in curve] == [0, 10, 20, 30]
    assert curve[-1].loss < 0.3 * curve[0].loss
    assert student.report.energy_rmse_ev_per_atom < ENERGY_EV_PER_ATOM
    assert student.report.force_rmse_ev_per_ang < FORCE_EV_PER_ANG
    assert student.report.force_rmse_ev_per_ang < 0.6 * student.report.force_rms_ev_per_ang


def test_structures_it_never_saw_are_predicted_as_well(student: Pretrained, label_of: Callable[..., Label]) -> None:
    """Absolute energies included: the atoms' own energies are part of the model."""
    others = alloys(12, 99)
    truth = np.array([label_of(s).energy_ev + ATOM_EV * len(s) for s in others])
    per_atom = (_energies(student.model, others) - truth) / [len(s) for s in others]
    assert np.sqrt((per_atom**2).mean()) < 2 * ENERGY_EV_PER_ATOM


def test_atoms_never_fall_into_each_other(student: Pretrained) -> None:
    numbers, cell = [13, 29], 20 * np.eye(3)
    for first in numbers:
        places = np.zeros((5, 2, 3))
        places[:, 1, 2] = (0.4, 0.6, 0.8, 1.0, 1.2)
        pair = Structure(numbers=[first, 29], positions=places[0], cell=cell, pbc=[True] * 3, fixed=np.zeros((2, 3)))
        energies, forces = MaceSurrogate(prior=student.model).evaluate(pair, places)
        assert (np.diff(energies) < 0).all()
        assert (forces[:, 1, 2] > 0).all()


def test_the_same_seed_gives_the_same_weights(structures: list[Structure], label_of: Callable[..., Label]) -> None:
    lessons = teach(structures[:12], EmtTeacher(label_of))
    first, again, other = (
        weights_sha256(learn(lessons, BRIEF, np.random.default_rng(seed)).model) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_its_elements_are_those_of_the_structures(student: Pretrained) -> None:
    assert model_elements(student.model) == [13, 29]
    assert student.report.elements == ("Al", "Cu")


def test_the_file_opens_untrusted_with_the_same_energies_and_says_where_it_comes_from(
    student: Pretrained, structures: list[Structure], tmp_path: Path
) -> None:
    file = tmp_path / "prior.model"
    student.save(file)
    opened = open_foundation(str(file))  # nobody vouches for it
    assert opened.model is not student.model
    assert _energies(opened.model, structures[:6]) == pytest.approx(_energies(student.model, structures[:6]), abs=1e-8)
    told = json.loads(opened.model.pretraining)
    assert told == json.loads(file.with_suffix(".json").read_text())
    assert told["teacher"] == "emt"
    assert told["n_train"] + told["n_held_out"] == 40
    assert told["note"] == "metals of two elements"
    assert trainable_copy(opened.model).pretraining == opened.model.pretraining
    assert "40 structures (metals of two elements) labelled by emt" in student.report.line()
    assert prior_line(opened.model) == student.report.line()


@pytest.mark.parametrize("told", [None, "", "[1]", "{}", '{"n_train": "many"}'])
def test_a_model_that_does_not_say_where_it_comes_from_has_no_line(told: str | None, untrained_model: Any) -> None:
    model = trainable_copy(untrained_model)
    if told is not None:
        model.pretraining = told
    assert prior_line(model) == ""


def test_a_student_can_be_fine_tuned_and_is_frozen_until_then(student: Pretrained) -> None:
    assert not any(p.requires_grad for p in student.model.parameters())
    assert next(student.model.parameters()).dtype.itemsize == 8


def test_a_loss_that_is_not_finite_stops_the_training(
    structures: list[Structure], label_of: Callable[..., Label]
) -> None:
    lessons = teach(structures[:12], EmtTeacher(label_of))
    with pytest.raises(TrainingError, match="lower the learning rate"):
        learn(lessons, replace(BRIEF, force_weight=float("inf")), np.random.default_rng(0))


def test_too_few_sound_labels_are_refused(structures: list[Structure]) -> None:
    class Mute:
        name = "mute"

        def __call__(self, structures: Sequence[Structure]) -> list[Answer | None]:
            return [None for _ in structures]

    with pytest.raises(InputError, match="only 0 of 40 labels"):
        pretrain(structures, Mute(), SPEC, np.random.default_rng(0))


def test_going_on_from_a_student_starts_where_it_ended(
    student: Pretrained, structures: list[Structure], label_of: Callable[..., Label]
) -> None:
    lessons = teach(structures, EmtTeacher(label_of))
    gentle = replace(SPEC, epochs=3, learning_rate=0.001)
    further = learn(lessons, gentle, np.random.default_rng(5), start=student.model).report  # another draw
    assert further.began_from == weights_sha256(student.model)
    assert further.held_out_keys == student.report.held_out_keys
    assert further.curve[0].loss == pytest.approx(min(point.loss for point in student.report.curve), rel=1e-3)
    assert further.force_rmse_ev_per_ang <= student.report.force_rmse_ev_per_ang * 1.001
    with pytest.raises(InputError, match="knows other elements"):
        learn(lessons, gentle, np.random.default_rng(0), start=build_model([13, 29, 79], 0))
