"""Fits a surrogate's correction to labels: rows of the regression, residuals of every model, priors of the scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from alcore.barrier import label_fmax
from alcore.correction import HyperPriors, LogNormal, Observations, fit_correction
from alcore.dataset import composition_groups
from alcore.mace.features import calm_basis, make_features
from alcore.mace.network import ElasticNetwork, lattice_wraps, network_key
from alcore.mace.surrogate import Known, MaceSurrogate, atoms_key, free_coordinates
from alcore.protocols import Potential
from alcore.types import Dataset, FloatArray, Label, Structure, frozen_array

CorrectionName = Literal["none", "blr", "gp", "blr+gp"]
DEFAULT: CorrectionName = "blr+gp"

LOOSE_FORCE_EV_PER_ANG = 1.0
"""A label whose largest reference force is this is fitted with twice the noise of one at rest."""
COLLAPSED_EV_PER_ANG = 10.0
"""Above this force the noise grows with its cube: atoms that nearly touch say that they should not, and no more."""
NETWORK_SCALE_STD = 0.5
"""How far the scale of the elastic network may well be from 1."""
CALM_TRAINED, CALM_UNTRAINED = 0.9, 0.5
"""Share of the forces in the size of the random features' weights (``features.calm_basis``), over a trained prior and
an untrained one: with one label on a path the largest force error near the saddle was 0.9 and 1.7 times the prior's own
(2.0 and 3.4 with a share of 0); a larger share over an untrained prior learns less from the second label."""
N_CALM = 3
"""Geometries over which those forces are taken."""
AT_REST_EV_PER_ANG = 0.1
"""Labels whose forces are below this are of end states: they say nothing of how far off a model may be elsewhere."""
N_TELLING = 2
"""Other labels from which on the evidence sets the hyper-parameters: one alone is explained by too many of them."""
PRECISION = LogNormal(median=30.0, spread=0.3)
"""Of the random features' weights, eV⁻². Looser ones explain one label by forces of several eV/Å beside it, stiffer
ones leave too much to g, which cannot tell one environment from another."""
HELD_ALIKE_ANG = 1e-3
"""A file's rounding of places."""
KERNEL_AMPLITUDE = LogNormal(median=0.5, spread=0.5)
"""Of g in eV, beside the random features or alone."""
KERNEL_LENGTH = LogNormal(median=1.5, spread=0.3)
"""Of g in Å."""


def make_surrogate(
    prior: Any,
    samples: Sequence[Structure],
    rng: np.random.Generator,
    *,
    per_element: int = 256,
    correction: CorrectionName = DEFAULT,
    networks: Mapping[bytes, ElasticNetwork] | None = None,
) -> MaceSurrogate:
    """A surrogate without labels, its features standardised on ``samples`` (rattled starting bands); ``networks`` is
    None for a prior that has been trained."""
    bare = MaceSurrogate(prior=prior, networks=networks or {})
    if "blr" not in correction:
        return bare
    descriptors = np.concatenate([bare.descriptors(s, s.positions[None]) for s in samples])
    numbers = np.concatenate([s.numbers for s in samples])
    features = make_features(descriptors, numbers, rng, per_element=per_element, like=bare.like)
    rough = replace(bare, features=features, networks={})
    chosen = [samples[k] for k in np.unique(np.linspace(0, len(samples) - 1, N_CALM).round().astype(int))]
    forces = [rough.feature_rows(sample)[1][~sample.fixed.ravel()] for sample in chosen]
    basis = calm_basis(np.concatenate(forces), CALM_UNTRAINED if networks is not None else CALM_TRAINED)
    return replace(bare, features=replace(features, basis=bare.like.new_tensor(basis)))


def hyper_priors(correction: CorrectionName) -> HyperPriors:
    """What is known of the correction before any label."""
    if "gp" not in correction:
        return HyperPriors(precision=PRECISION)
    return HyperPriors(precision=PRECISION, amplitude_ev=KERNEL_AMPLITUDE, length_ang=KERNEL_LENGTH)


def with_correction(surrogate: MaceSurrogate, dataset: Dataset, correction: CorrectionName = DEFAULT) -> MaceSurrogate:
    """The same models with the correction fitted to ``dataset``; sigmas rest on the frozen prior's residuals alone."""
    if correction == "none" or not len(dataset):
        return replace(surrogate, correction=None, known={})
    rows = dict(surrogate.rows)
    for label in dataset.labels:
        if label.key not in rows:
            rows[label.key] = surrogate.feature_rows(label.structure)
    energies, forces = model_residuals(surrogate, dataset.labels)
    hosts = _by_host(dataset.labels)
    homes = [_home([dataset.labels[place].structure for place in places]) for _, places in hosts]
    n_random = len(next(iter(rows.values()))[0]) - bool(surrogate.networks)
    scales = [NETWORK_SCALE_STD] * bool(surrogate.networks)
    fitted = fit_correction(
        [_observations(dataset.labels, *host, rows, home) for host, home in zip(hosts, homes, strict=True)],
        energies,
        [np.stack([forces[p][:, ~host.fixed.ravel()] for p in places], axis=1) for host, places in hosts],
        precisions=np.concatenate([np.full(n_random, np.nan), np.array(scales) ** -2.0]),
        priors=hyper_priors(correction),
        informed=sum((label_fmax(label) or 0.0) > AT_REST_EV_PER_ANG for label in dataset.labels) >= N_TELLING,
    )
    known = {
        atoms_key(host): Known(local=local, home_ang=home)
        for (host, _), local, home in zip(hosts, fitted.local, homes, strict=False)
    }
    return replace(surrogate, correction=fitted, rows=rows, known=known)


def _by_host(labels: Sequence[Label]) -> list[tuple[Structure, list[int]]]:
    """Labels of the same atoms to move, as a structure of theirs and their places among all.

    A frame that the user brings along may hold no atom, though it is of a host that holds some: it belongs to those
    labels where the atoms that they hold lie alike.
    """
    hosts: list[tuple[Structure, list[int]]] = []
    for place in sorted(range(len(labels)), key=lambda k: -int(labels[k].structure.fixed.sum())):
        structure = labels[place].structure
        mine = next((places for host, places in hosts if _is_of(structure, host)), None)
        if mine is None:
            hosts.append((structure, [place]))
        else:
            mine.append(place)
    return [(host, sorted(places)) for host, places in hosts]


def _is_of(structure: Structure, host: Structure) -> bool:
    if atoms_key(structure) == atoms_key(host):
        return True
    unheld = network_key(structure) == network_key(host) and not structure.fixed.any() and not host.fixed.all()
    return unheld and bool(np.all(np.abs(structure.positions - host.positions)[host.fixed] < HELD_ALIKE_ANG))


def _home(structures: Sequence[Structure]) -> FloatArray:
    """Middle of the places of each atom in Å, ``(n_atoms, 3)``: one that hops half a cell must not flip."""
    first, positions = structures[0], np.stack([structure.positions for structure in structures])
    # an atom a little beyond half a cell has hopped; one that was wrapped lies further
    positions = positions - lattice_wraps(positions, first.positions, first.cell, first.pbc, beyond=0.75)
    return np.asarray((positions.min(axis=0) + positions.max(axis=0)) / 2)


def _observations(
    labels: Sequence[Label],
    template: Structure,
    places: Sequence[int],
    rows: Mapping[str, tuple[FloatArray, FloatArray]],
    home_ang: FloatArray,
) -> Observations:
    mine = [labels[place] for place in places]
    free = ~template.fixed.ravel()
    return Observations(
        place=np.array(places),
        coordinates=free_coordinates(template, np.stack([label.structure.positions for label in mine]), home_ang),
        energy=np.stack([rows[label.key][0] for label in mine]),
        forces=np.stack([rows[label.key][1][free] for label in mine]),
        groups=composition_groups(labels)[list(places)],
        looseness=np.array([looseness_of(label) for label in mine]),
    )


def looseness_of(label: Label) -> float:
    """Factor on the noise of a label: a geometry far from any path need not be reproduced as well as one on it."""
    fmax = label_fmax(label) or 0.0
    return 1.0 + fmax / LOOSE_FORCE_EV_PER_ANG * max(1.0, fmax / COLLAPSED_EV_PER_ANG) ** 2


def model_residuals(surrogate: MaceSurrogate, labels: Sequence[Label]) -> tuple[FloatArray, list[FloatArray]]:
    """Label minus each bare model (the prior, then the members) with the network under it: energies
    ``(n_models, n_labels)`` in eV, forces ``(n_models, 3 n_atoms)`` of each label in eV/Å."""
    models = [
        replace(surrogate, prior=model, members=(), lead="prior", correction=None, known={})
        for model in (surrogate.prior, *surrogate.members)
    ]
    left = [[left_over(model, label) for model in models] for label in labels]
    energies = np.array([[energy for energy, _ in row] for row in left]).T
    return energies, [np.stack([force.ravel() for _, force in row]) for row in left]


def left_over(potential: Potential, label: Label) -> tuple[float, FloatArray]:
    """Label minus potential: energy in eV and forces ``(n_atoms, 3)`` in eV/Å."""
    energy, force = potential.evaluate(label.structure, label.structure.positions[None])
    assert label.energy_ev is not None and label.forces is not None
    return label.energy_ev - float(energy[0]), label.forces - force[0]


def without_network(surrogate: MaceSurrogate, dataset: Dataset) -> Dataset:
    """What MACE itself has to learn: the labels minus the elastic network."""
    learned = []
    for label in dataset.labels:
        energy, forces = _network_terms(surrogate, label.structure)
        assert label.energy_ev is not None and label.forces is not None
        learned.append(replace(label, energy_ev=label.energy_ev - energy, forces=frozen_array(label.forces - forces)))
    return Dataset(labels=tuple(learned))


def _network_terms(surrogate: MaceSurrogate, structure: Structure) -> tuple[float, FloatArray]:
    network = surrogate.networks.get(network_key(structure))
    if network is None:
        return 0.0, np.zeros(structure.positions.shape)
    positions = torch.tensor(structure.positions[None], requires_grad=True)
    energy = network.energies(positions)
    (gradient,) = torch.autograd.grad(energy.sum(), positions)
    return float(energy[0].detach()), -np.asarray(gradient[0].numpy())
