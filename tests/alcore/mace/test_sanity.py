"""Sanity of a trained model: sound ones and the reference itself pass, and each way of being broken is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read

from alcore.mace.models import freeze, trainable_copy
from alcore.mace.sanity import SanitySpec, calm_labels, contact_faults, faults, run_fault
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.training import TrainSpec, fine_tune
from alcore.neb import NebSpec, interpolate
from alcore.types import Dataset, EndpointPair, FloatArray, Label, Structure

SPEC = SanitySpec()
QUICK = replace(SPEC, n_steps=8)
"""Where runs are not the point."""
N_LABELS, EPOCHS = 3, 30
HOLE_ANG, HOLE_EV = 1.6, 3.0


@pytest.fixture(scope="module")
def dataset(au_pair: EndpointPair, label_of: Callable[..., Label]) -> Dataset:
    band = interpolate(au_pair, NebSpec(n_images=5))
    return Dataset(labels=tuple(label_of(au_pair.initial.moved(band[k])) for k in range(N_LABELS)))


@pytest.fixture(scope="module")
def trained(dataset: Dataset, untrained_model: Any) -> Any:
    return fine_tune(untrained_model, dataset, TrainSpec(epochs=EPOCHS), weights=np.ones(N_LABELS)).model


class Wrapped(torch.nn.Module):
    """A model with a term of its own over it: a function of each edge's length in Å, in eV."""

    def __init__(self, model: Any, pair_ev: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.pair_ev = model, pair_ev
        self.r_max, self.atomic_numbers = model.r_max, model.atomic_numbers

    def forward(self, graph: Mapping[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        out = dict(self.model(graph, training=True, compute_force=options.get("compute_force", True)))
        first, second = graph["edge_index"]
        gap = graph["positions"][second] - graph["positions"][first] + graph["shifts"]
        term = 0.5 * self.pair_ev(gap.norm(dim=1))
        extra = torch.zeros_like(out["energy"]).index_add(0, graph["batch"][first], term)
        if out.get("forces") is not None:
            (gradient,) = torch.autograd.grad(extra.sum(), graph["positions"], retain_graph=True)
            out["forces"] = out["forces"] - gradient
        return {**out, "energy": out["energy"] + extra}


def hole(length: torch.Tensor) -> torch.Tensor:
    """Far from any label, so that no error on labels tells of it."""
    return -HOLE_EV * torch.exp(-(((length - HOLE_ANG) / 0.15) ** 2))


def _changed(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The model with the last weights of its readouts changed."""
    twin = trainable_copy(model)
    with torch.no_grad():
        for readout in twin.readouts:
            last = readout.linear_2 if hasattr(readout, "linear_2") else readout.linear
            last.weight.copy_(change(last.weight))
    return freeze(twin)


def _relabelled(model: Any, label: Label) -> Label:
    energies, forces = MaceSurrogate(prior=model).evaluate(label.structure, label.structure.positions[None])
    return replace(label, energy_ev=float(energies[0]), forces=forces[0])


def _faults(model: Any, dataset: Dataset, spec: SanitySpec = QUICK, **more: Any) -> list[str]:
    return faults(model, dataset, spec, rng=np.random.default_rng(0), **more)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sound_model_passes(seed: int, trained: Any, dataset: Dataset) -> None:
    assert faults(trained, dataset, SPEC, before=trained, rng=np.random.default_rng(seed)) == []


def test_a_sound_model_passes_in_single_precision(trained: Any, dataset: Dataset) -> None:
    assert _faults(freeze(trainable_copy(trained).float()), dataset) == []


@pytest.mark.parametrize("system", ["au_al100", "al_hydrogen"])
def test_the_reference_itself_passes_run_and_contacts(system: str, emt: Any, label_of: Callable[..., Label]) -> None:
    """Also where an atom was squeezed in and nothing has relaxed: forces of some eV/Å."""
    atoms = read(Path(__file__).parents[3] / "config" / "structures" / system / "initial.extxyz")
    assert isinstance(atoms, Atoms)
    label = label_of(Structure.from_atoms(atoms))
    assert contact_faults(emt.evaluate, [label], SPEC) == []
    assert run_fault(emt.evaluate, label.structure, SPEC, np.random.default_rng(0)) == ""


def test_nothing_to_check_without_labels(trained: Any) -> None:
    assert _faults(trained, Dataset()) == []


def test_weights_that_are_not_numbers(trained: Any, dataset: Dataset) -> None:
    broken = _changed(trained, lambda w: w * float("nan"))
    assert _faults(broken, dataset) == [f"energies or forces of {N_LABELS} of {N_LABELS} labels are not finite"]
    assert _faults(trained, dataset, before=broken) == []


def test_a_model_that_forgot_its_labels(trained: Any, dataset: Dataset) -> None:
    """Readouts at zero again, as before any training: nothing is wrong but what it says of its labels."""
    found = _faults(_changed(trained, torch.zeros_like), dataset, before=trained)
    assert [line.split(" of ")[0].split(" are off")[0] for line in found[:1]] == ["energies"]
    assert any(line.startswith("regression: energies of 3 labels are off") for line in found)


def test_forces_alone_may_be_at_fault(trained: Any, dataset: Dataset, label_of: Callable[..., Label]) -> None:
    """One label: no relative energy to be wrong about."""
    far = dataset.labels[0].structure
    label = label_of(
        far.moved(far.positions + np.where(far.fixed, 0.0, 0.25 * np.sin(np.arange(far.fixed.size)).reshape(-1, 3)))
    )
    (line,) = (x for x in _faults(_changed(trained, torch.zeros_like), Dataset(labels=(label,))) if "labels" in x)
    assert line.startswith("forces of its own labels are off by")


def test_a_regression_within_the_limits_is_named(trained: Any, dataset: Dataset) -> None:
    """A model good enough by itself is still worse than the one before."""
    exact = Dataset(labels=tuple(_relabelled(trained, label) for label in dataset.labels))
    strict = replace(QUICK, regression_energy_ev=0.005)  # the labels spread little
    worse = _changed(trained, lambda w: 0.88 * w)
    assert not any("own labels" in line for line in _faults(worse, exact, strict))
    found = _faults(worse, exact, strict, before=trained)
    assert any(x.startswith("regression: energies of 3 labels are off") and x.endswith("before by 0") for x in found)
    assert _faults(trained, exact, strict, before=worse) == []


def test_labels_that_the_last_model_did_not_know_are_no_regression(trained: Any, dataset: Dataset) -> None:
    """What was wrong before may stay so: without a label that ``before`` reproduced there is nothing to lose."""
    nonsense = Dataset(labels=tuple(replace(x, forces=np.asarray(x.forces) + 3.0) for x in dataset.labels))
    assert not any("regression" in line for line in _faults(trained, nonsense, before=trained))


def test_a_hole_between_atoms_is_found(trained: Any, dataset: Dataset) -> None:
    found = _faults(Wrapped(trained, hole), dataset)
    assert len(found) == 2
    assert all("contact: energy falls by" in line for line in found)
    assert {line.split()[0] for line in found} == {"Al-Al", "Al-Au"}


def test_a_hole_that_was_there_before_is_no_reason_to_go_back(trained: Any, dataset: Dataset) -> None:
    before = Wrapped(trained, hole)
    assert _faults(Wrapped(trained, hole), dataset, before=before) == []


@pytest.mark.parametrize(("height_ev", "n_faults"), [(6.0, 2), (40.0, 0)])
def test_a_hole_behind_a_barrier_is_found_unless_it_is_out_of_reach(
    height_ev: float, n_faults: int, trained: Any, dataset: Dataset
) -> None:
    """The energy never falls below the start."""

    def bump(length: torch.Tensor) -> torch.Tensor:
        return height_ev * torch.exp(-(((length - 1.6) / 0.15) ** 2))

    found = _faults(Wrapped(trained, bump), dataset)
    assert len(found) == n_faults
    assert all("contact: energy falls by" in line for line in found)


def test_energies_that_are_not_numbers_at_contact_are_found(trained: Any, dataset: Dataset) -> None:
    found = _faults(Wrapped(trained, lambda length: 0.0 * torch.sqrt(length - 1.5)), dataset)
    assert [line.split(": ")[1] for line in found] == ["energies are not finite"] * 2


def test_a_run_into_a_collapse_is_found(dataset: Dataset) -> None:
    """Two atoms on a spring that is longer than it wants to be: the pair comes too close."""
    start = dataset.labels[0].structure

    def attracted(template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        gap = positions[:, -1] - positions[:, -2]
        forces = np.zeros_like(positions)
        forces[:, -1], forces[:, -2] = -gap, gap
        return 0.5 * (gap**2).sum(axis=1), forces

    assert "of their covalent radii's sum" in run_fault(attracted, start, SPEC, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("force", "why"), [(20.0, "moved 2."), (float("nan"), "moved nan"), (0.0, "total energy drifted by")]
)
def test_other_ways_a_run_fails(force: float, why: str, dataset: Dataset) -> None:
    start, calls = dataset.labels[0].structure, []

    def pushed(template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        calls.append(1)
        forces = np.zeros_like(positions)
        forces[:, -1, 2] = force  # Au leaves the surface
        rough = 0.0 if force else 0.2 * len(calls)  # an energy that the forces know nothing of
        return np.array([rough - np.nan_to_num(force) * positions[0, -1, 2]]), forces

    assert why in run_fault(pushed, start, SPEC, np.random.default_rng(0))
    assert len(calls) <= SPEC.n_steps + 1


def test_fixed_coordinates_stay_and_a_run_is_short(dataset: Dataset, emt: Any) -> None:
    start, seen = dataset.labels[0].structure, []

    def watched(template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        seen.append(positions[0].copy())
        energies, forces = emt.evaluate(template, positions)
        return energies, forces

    assert run_fault(watched, start, SPEC, np.random.default_rng(0)) == ""
    moved = np.array(seen) != start.positions
    assert not moved[:, start.fixed].any()
    assert moved[-1][~start.fixed].all()
    assert len(seen) == SPEC.n_steps + 1 <= 60
    held = Structure(**{**vars(start), "fixed": np.ones_like(start.fixed)})
    assert run_fault(watched, held, SPEC, np.random.default_rng(0)) == ""


def test_what_lies_under_the_model_counts_in_runs_and_contacts(trained: Any, dataset: Dataset) -> None:
    """The labels lack it; the potential that is followed has it."""
    repaired = MaceSurrogate(prior=trained).evaluate
    broken = Wrapped(trained, hole)
    assert len(_faults(broken, dataset)) == 2
    assert _faults(broken, dataset, backdrop=repaired) == []
    assert len(_faults(trained, dataset, backdrop=MaceSurrogate(prior=broken).evaluate)) == 2
    # the same of both, the last good model stands in for the model
    assert _faults(trained, dataset, before=trained, backdrop=MaceSurrogate(prior=broken).evaluate) == []


def test_runs_begin_at_the_lowest_label_of_each_composition(dataset: Dataset) -> None:
    other = replace(dataset.labels[0].structure, charge=1.0)
    lonely = replace(dataset.labels[0], structure=other, energy_ev=-1e5)
    lowest = min(dataset.labels, key=lambda label: label.energy_ev or 0.0)
    assert [label.key for label in calm_labels((lonely, *dataset.labels))] == [lowest.key, lonely.key]
    assert calm_labels((lonely, *dataset.labels))[0].structure.charge == 0.0
