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
from alcore.teaching import Answer, Lessons, teach
from alcore.types import Label, Structure

SPEC = PretrainSpec(
    architecture=Architecture(channels=8), epochs=15, batch_size=3, validate_every=5, ema_decay=0.9, held_out=0.2
)
BRIEF = replace(SPEC, epochs=2, validate_every=1)
CALM = SampleSpec(squeezed_fraction=0.0, rattle_ang=(0.02, 0.1))
ELEMENTS = ("Al", "Cu")
ATOM_EV = -7.0
ENERGY_EV_PER_ATOM, FORCE_EV_PER_ANG = 0.01, 0.12
"""Held-out errors after a few seconds of training: 0.004 and 0.05 are found, 0.018 and 0.40 before."""


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
    assert [point.epoch for point in curve] == [0, 5, 10, 15]
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
    lessons = teach(structures[:6], EmtTeacher(label_of))
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


ODD = [None, "", "[1]", "{}", '{"n_train": "many"}', "[" * 100_000]


@pytest.mark.parametrize("told", ODD, ids=range(len(ODD)))
def test_a_model_that_does_not_say_where_it_comes_from_has_no_line(told: str | None, untrained_model: Any) -> None:
    model = trainable_copy(untrained_model)
    if told is not None:
        model.pretraining = told
    assert prior_line(model) == ""


def test_the_line_of_a_foreign_file_cannot_break_out_of_its_line(untrained_model: Any) -> None:
    told = {"n_train": 3, "n_held_out": 1, "note": "a\n\x1b[31mb", "teacher": "t\r"}
    model = trainable_copy(untrained_model)
    model.pretraining = json.dumps({**told, "energy_rmse_ev_per_atom": 0.002, "force_rmse_ev_per_ang": 0.1})
    line = "pre-trained on 4 structures (a  [31mb) labelled by t ; held-out errors 2.0 meV/atom, 100 meV/Å"
    assert prior_line(model) == line
    model.pretraining = json.dumps({**told, "energy_rmse_ev_per_atom": 10**400, "force_rmse_ev_per_ang": 0.1})
    assert prior_line(model) == ""


def test_a_student_can_be_fine_tuned_and_is_frozen_until_then(student: Pretrained) -> None:
    assert not any(p.requires_grad for p in student.model.parameters())
    assert next(student.model.parameters()).dtype.itemsize == 8


def test_a_loss_that_is_not_finite_stops_the_training(
    structures: list[Structure], label_of: Callable[..., Label]
) -> None:
    lessons = teach(structures[:6], EmtTeacher(label_of))
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
    short = replace(gentle, architecture=Architecture(channels=8, r_max_ang=4.0))
    with pytest.raises(InputError, match=r"has a cutoff of 5 Å, not 4 Å \(set the architecture's r_max_ang to 5\)"):
        learn(lessons, short, np.random.default_rng(0), start=student.model)


def _held_out_errors(model: Any, labels: Sequence[Label]) -> tuple[np.ndarray, np.ndarray]:
    surrogate = MaceSurrogate(prior=model)
    energy, force = [], []
    for label in labels:
        energies, forces = surrogate.evaluate(label.structure, label.structure.positions[None])
        energy.append((energies[0] - label.energy_ev) / len(label.structure))
        force.append(forces[0] - label.forces)
    return np.array(energy), np.concatenate(force)


def _huber(error: np.ndarray, delta: float) -> np.ndarray:
    return np.where(np.abs(error) < delta, error**2 / 2, delta * (np.abs(error) - delta / 2))


class Spring:
    """Two atoms attract each other, the same at every distance."""

    name = "spring"
    pull_ev_per_ang = 5.0

    def __call__(self, structures: Sequence[Structure]) -> list[Answer | None]:
        arms = [structure.positions[1] - structure.positions[0] for structure in structures]
        lengths = [float(np.linalg.norm(arm)) for arm in arms]
        forces = [self.pull_ev_per_ang * arm / length for arm, length in zip(arms, lengths, strict=True)]
        return [(self.pull_ev_per_ang * r, np.array([f, -f])) for r, f in zip(lengths, forces, strict=True)]


def dimers(distances: Sequence[float]) -> list[Structure]:
    dimer = Structure(
        numbers=[29, 29], positions=np.zeros((2, 3)), cell=20 * np.eye(3), pbc=[True] * 3, fixed=np.zeros((2, 3))
    )
    return [dimer.moved(np.array([[0, 0, 0], [0, 0, r]])) for r in distances]


@pytest.fixture(scope="module")
def pulled() -> Lessons:
    return teach(dimers(np.linspace(1.5, 2.6, 12).tolist()), Spring())


def test_anchors_keep_close_pairs_apart_as_the_pair_repulsion_does(pulled: Lessons) -> None:
    """With a teacher that knows nothing of repulsion."""
    close = dimers([0.3, 0.7, 0.8, 1.0])

    def force(model: Any) -> np.ndarray:
        surrogate = MaceSurrogate(prior=model)
        return np.array([surrogate.evaluate(pair, pair.positions[None])[1][0, 1, 2] for pair in close])

    spec = replace(SPEC, epochs=10, learning_rate=0.03)
    with_anchors, without = (
        force(learn(pulled, replace(spec, anchors_per_pair=count), np.random.default_rng(0)).model)
        - force(build_model([29], 0))
        for count in (12, 0)
    )
    assert np.abs(with_anchors).max() < 3  # 1.5 eV/Å at 0.3 Å, where the repulsion is 12000
    assert np.abs(without)[0] > 30  # 440
    assert np.abs(without)[1:].max() > 3  # 6.2
    assert (np.abs(with_anchors)[1:] < 1).all()  # 0.5


def test_weights_are_averaged_as_slowly_as_asked(pulled: Lessons) -> None:
    """An average that forgets nothing stays at the weights of the first step."""
    start, *slow = learn(pulled, replace(BRIEF, ema_decay=1.0), np.random.default_rng(0)).report.curve
    assert slow[0].loss == slow[1].loss != start.loss
    _, *quick = learn(pulled, replace(BRIEF, ema_decay=0.0), np.random.default_rng(0)).report.curve
    assert quick[0].loss != quick[1].loss


def test_the_best_weights_are_kept_not_the_last(pulled: Lessons) -> None:
    """Their Huber loss is recomputed from the model; errors far beyond the threshold are among them."""
    spec = replace(BRIEF, epochs=6, learning_rate=0.3, ema_decay=0.0)
    found = learn(pulled, spec, np.random.default_rng(0))
    losses = [point.loss for point in found.report.curve]
    assert found.report.best_epoch == losses.index(min(losses)) < 6
    held_out = [label for label in pulled.labels if label.key in found.report.held_out_keys]
    energy, force = _held_out_errors(found.model, held_out)
    expected = spec.energy_weight * _huber(energy, spec.energy_huber_ev_per_atom).mean()
    expected += spec.force_weight * _huber(force, spec.force_huber_ev_per_ang).mean()
    assert (np.abs(force) > 5 * spec.force_huber_ev_per_ang).any()
    assert min(losses) == pytest.approx(expected, rel=1e-3)
    assert losses[-1] != pytest.approx(expected, rel=0.02)
    assert np.sqrt((force**2).mean()) == pytest.approx(found.report.force_rmse_ev_per_ang, rel=1e-3)
    assert np.sqrt((energy**2).mean()) == pytest.approx(found.report.energy_rmse_ev_per_atom, rel=1e-3)
