"""The surrogate: a committee of MACE models plus the closed-form correction on the frozen prior's node features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from alcore.barrier import label_fmax
from alcore.correction import Correction, Design, fit_correction
from alcore.dataset import composition_groups
from alcore.mace.features import RandomFeatures, element_index, invariant_columns, make_features
from alcore.mace.graphs import batch_graph
from alcore.mace.models import model_elements
from alcore.mace.network import ElasticNetwork, network_key
from alcore.protocols import Potential
from alcore.types import CommitteePrediction, Dataset, FloatArray, Label, Structure, frozen_array

LOOSE_FORCE_EV_PER_ANG = 1.0
"""A label whose largest reference force is this is fitted with twice the noise of one at rest."""
MAX_PRECISION, UNTRAINED_MAX_PRECISION = 100.0, 20.0
"""Of the correction's weights, over a foundation model and over an untrained one."""
MIN_PRECISION = 10.0
"""1/√10, or 0.3 eV, is what one atom's energy may well be off by. Without this bound the evidence explains forces that
come from beyond the model's reach by weights of 30 eV, and bands fall into wells that are not there. Measured on pw.x
labels of a vacancy in Al, two seeds: the error of the next label's forces, relative to those forces, is 4.3 without a
bound and 1.2, 0.85, 0.76, 0.70 with 1, 3, 10, 20."""
NETWORK_WEIGHTS = (1.0, 0.5, 0.2, 0.0)
"""How much of the elastic network may hold. It tells every single atom apart, the features only environments, so what
it gets wrong cannot be corrected: it has to go as labels come."""
MAX_BATCH_ATOMS = 3000
"""Atoms in one batch of the Jacobian; bounds its memory to a few hundred MB for small models."""


Lead = Literal["prior", "committee"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MaceSurrogate:
    """Energy = model + φ·w, where φ comes from the prior's trunk, which never learns.

    Every model (the prior and each fine-tuned member) has a posterior mean w of its own, fitted to what it leaves
    unexplained; the posterior covariance is common and rests on the prior's residuals. The surface that relaxations
    follow is led by the frozen prior, or by the committee's mean once that predicts better.

    Attributes:
        prior: the starting model, frozen.
        members: the fine-tuned committee; empty until the first fine-tuning.
        lead: which surface relaxations follow.
        features: random features on the prior's descriptors, or None for no correction.
        correction: None before the first label, or without correction; its weights' rows are the prior, then the
            members.
        rows: features and Jacobian of each label seen so far, by key (they depend on the frozen trunk only, so they
            stay true).
        networks: what is known of each set of atoms before any label, under every model (``network.ElasticNetwork``).
        network_weight: how much of it still holds; the evidence of the labels decides.
        notes: how it was made, for ``describe``.
    """

    prior: Any
    members: tuple[Any, ...] = ()
    lead: Lead = "prior"
    features: RandomFeatures | None = None
    correction: Correction | None = None
    rows: Mapping[str, tuple[FloatArray, FloatArray]] = field(default_factory=dict)
    networks: Mapping[bytes, ElasticNetwork] = field(default_factory=dict)
    network_weight: float = 1.0
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the model's type and device."""
        return next(iter(self.prior.parameters()))

    def describe(self) -> dict[str, Any]:
        """Plain values: which surface leads and what the correction's evidence found, besides ``notes``."""
        found: dict[str, Any] = {**self.notes, "lead": self.lead, "n_members": len(self.members)}
        found["network_weight"] = self.network_weight if self.networks else 0.0
        if self.correction is not None:
            found["correction"] = {
                "precision": self.correction.precision,
                "force_noise_ev_per_ang": self.correction.force_noise_ev_per_ang,
                "log_evidence": self.correction.log_evidence,
                "n_features": int(self.correction.weights.shape[1]),
            }
        return found

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Energies in eV ``(n_images,)`` and forces in eV/Å ``(n_images, n_atoms, 3)`` of the leading surface."""
        graph = self._graph(template, positions)
        leaders = self.members if self.lead == "committee" else (self.prior,)
        energies, phi = self._forward(graph, leaders, template, len(positions))
        weights = self._weights()
        lead = energies.mean(dim=0)
        if weights is not None:
            lead = lead + phi @ (weights[1:].mean(dim=0) if self.lead == "committee" else weights[0])
        return _numpy(lead), self._forces(lead, graph)

    def predict(self, template: Structure, positions: FloatArray) -> CommitteePrediction:
        """Leading energies and forces, every member, and the posterior covariance relative to the first geometry."""
        graph = self._graph(template, positions)
        energies, phi = self._forward(graph, (self.prior, *self.members), template, len(positions))
        weights = self._weights()
        if weights is not None:
            energies = energies + weights @ phi.T
        by_lead = {"prior": energies[0]}
        if self.members:
            by_lead["committee"] = energies[1:].mean(dim=0)
        forces = self._forces(by_lead[self.lead], graph)
        anchored = _numpy(phi - phi[:1])
        covariance = (
            np.zeros((len(positions),) * 2) if self.correction is None else self.correction.energy_covariance(anchored)
        )
        return CommitteePrediction(
            energies_ev=_numpy(by_lead[self.lead]),
            forces=forces,
            members_ev=_numpy(energies[1:]),
            by_lead_ev={name: _numpy(values) for name, values in by_lead.items()},
            covariance_ev2=covariance,
            lead=self.lead,
        )

    def posterior_sigma(self, template: Structure, positions: FloatArray) -> FloatArray:
        """The correction's sigma of each energy relative to the first in eV, ``(n_images,)``; zero without one."""
        if self.correction is None:
            return np.zeros(len(positions))
        with torch.no_grad():
            feats = self.prior(self._graph(template, positions), compute_force=False)["node_feats"]
            phi = _numpy(self._phi(feats, template, len(positions)))
        return np.sqrt(np.maximum(np.diag(self.correction.energy_covariance(phi - phi[:1])), 0.0))

    def _graph(self, template: Structure, positions: FloatArray) -> dict[str, torch.Tensor]:
        return batch_graph(
            template,
            positions,
            elements=model_elements(self.prior),
            r_max_ang=float(self.prior.r_max),
            dtype=self.like.dtype,
            device=self.like.device,
        )

    def _weights(self) -> torch.Tensor | None:
        return None if self.correction is None else self.like.new_tensor(self.correction.weights)

    def _forward(
        self, graph: dict[str, torch.Tensor], models: Sequence[Any], template: Structure, n_images: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bare energies ``(n_models, n_images)`` and features ``(n_images, n_features)``, graphs shared."""
        phi, energies = self.like.new_zeros((n_images, 0)), []
        seen_prior = False
        for model in models:
            out = model(graph, compute_force=False)
            energies.append(out["energy"])
            if model is self.prior and self.features is not None:
                phi, seen_prior = self._phi(out["node_feats"], template, n_images), True
        if self.features is not None and not seen_prior and self.correction is not None:
            phi = self._phi(self.prior(graph, compute_force=False)["node_feats"], template, n_images)
        return torch.stack(energies) + self._host(template, graph, n_images), phi

    def _host(self, template: Structure, graph: dict[str, torch.Tensor], n_images: int) -> torch.Tensor:
        """Energy of the elastic network under every model, ``(n_images,)``; zero where these atoms have none."""
        network = self.networks.get(network_key(template))
        if network is None:
            return self.like.new_zeros(n_images)
        return self.network_weight * network.energies(graph["positions"].reshape(n_images, -1, 3))

    @staticmethod
    def _forces(energies: torch.Tensor, graph: dict[str, torch.Tensor]) -> FloatArray:
        (gradient,) = torch.autograd.grad(energies.sum(), graph["positions"])
        return -_numpy(gradient).reshape(len(energies), -1, 3)

    def _phi(self, node_feats: torch.Tensor, template: Structure, n_images: int) -> torch.Tensor:
        assert self.features is not None
        descriptors = node_feats[:, invariant_columns(self.prior)]
        nodes = self.features.of_nodes(
            descriptors, element_index(template, self.features, n_images).to(self.like.device)
        )
        return nodes.reshape(n_images, len(template), -1).sum(dim=1)

    def descriptors(self, template: Structure, positions: FloatArray) -> FloatArray:
        """The prior's invariant node descriptors, ``(n_images * n_atoms, n_descriptors)``."""
        with torch.no_grad():
            feats = self.prior(self._graph(template, positions), compute_force=False)["node_feats"]
        return _numpy(feats[:, invariant_columns(self.prior)])

    def feature_rows(self, structure: Structure) -> tuple[FloatArray, FloatArray]:
        """φ ``(n_features,)`` and −∂φ/∂x ``(3 n_atoms, n_features)`` of one structure.

        The Jacobian of the descriptors comes first, column by column as forward derivatives (by differentiating the
        backward pass, which is linear in its seed, once more): 3 n_atoms of them, however many features there are.
        """
        assert self.features is not None
        graph = self._graph(structure, structure.positions[None])
        descriptors = self.prior(graph, compute_force=False)["node_feats"][:, invariant_columns(self.prior)]
        seed = torch.zeros_like(descriptors, requires_grad=True)
        (gradient,) = torch.autograd.grad(descriptors, graph["positions"], grad_outputs=seed, create_graph=True)
        n_atoms = len(structure)
        directions = torch.eye(3 * n_atoms, dtype=self.like.dtype, device=self.like.device).reshape(-1, n_atoms, 3)
        chunk = max(1, MAX_BATCH_ATOMS // n_atoms)
        blocks = element_index(structure, self.features, 1).to(self.like.device)
        rows = []
        for start in range(0, 3 * n_atoms, chunk):
            (jacobian,) = torch.autograd.grad(
                gradient, seed, grad_outputs=directions[start : start + chunk], is_grads_batched=True, retain_graph=True
            )
            rows.append(self.features.derivative(descriptors.detach(), jacobian, blocks))
        phi = self.features.of_nodes(descriptors.detach(), blocks).sum(dim=0)
        return _numpy(phi), -_numpy(torch.cat(rows))


def _numpy(tensor: torch.Tensor) -> FloatArray:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)


def make_surrogate(
    prior: Any,
    samples: Sequence[Structure],
    rng: np.random.Generator,
    *,
    per_element: int = 256,
    correct: bool = True,
    networks: Mapping[bytes, ElasticNetwork] | None = None,
) -> MaceSurrogate:
    """A surrogate without labels, its features standardised on ``samples`` (rattled starting bands)."""
    bare = MaceSurrogate(prior=prior, networks=networks or {})
    if not correct:
        return bare
    descriptors = np.concatenate([bare.descriptors(s, s.positions[None]) for s in samples])
    numbers = np.concatenate([s.numbers for s in samples])
    return replace(bare, features=make_features(descriptors, numbers, rng, per_element=per_element, like=bare.like))


def with_correction(surrogate: MaceSurrogate, dataset: Dataset) -> MaceSurrogate:
    """The same models with the correction fitted to ``dataset``; sigmas rest on the frozen prior's residuals alone."""
    if surrogate.features is None or not len(dataset):
        kept = surrogate.network_weight if surrogate.features is not None else 0.0  # nothing could correct the network
        return replace(surrogate, correction=None, network_weight=kept)
    rows = dict(surrogate.rows)
    for label in dataset.labels:
        if label.key not in rows:
            rows[label.key] = surrogate.feature_rows(label.structure)
    free = [np.flatnonzero(~label.structure.fixed.ravel()) for label in dataset.labels]
    loose = np.array([1.0 + (label_fmax(label) or 0.0) / LOOSE_FORCE_EV_PER_ANG for label in dataset.labels])
    design = Design(
        energy=np.array([rows[label.key][0] for label in dataset.labels]),
        groups=composition_groups(dataset.labels),
        forces=np.concatenate([rows[label.key][1][mask] for label, mask in zip(dataset.labels, free, strict=True)]),
        energy_looseness=loose,
        force_looseness=np.repeat(loose, [len(mask) for mask in free]),
    )
    energies, forces = model_residuals(surrogate, dataset.labels, free)
    host_energy, host_force = _network_rows(surrogate, dataset.labels, free)
    fits = {
        weight: fit_correction(
            design,
            (left_energy := energies - weight * host_energy),
            (left_force := forces - weight * host_force),
            left_energy[0],
            left_force[0],
            min_precision=MIN_PRECISION,
            max_precision=UNTRAINED_MAX_PRECISION if surrogate.networks else MAX_PRECISION,
        )
        for weight in (NETWORK_WEIGHTS if surrogate.networks else (0.0,))
    }
    weight = max(fits, key=lambda w: fits[w].log_evidence)
    return replace(surrogate, correction=fits[weight], rows=rows, network_weight=weight)


def model_residuals(
    surrogate: MaceSurrogate, labels: Sequence[Label], free: Sequence[Any]
) -> tuple[FloatArray, FloatArray]:
    """Label minus each bare model (the prior, then the members), no network under it: energies ``(n_models, n_labels)``
    in eV, free forces ``(n_models, n_rows)`` in eV/Å."""
    energies, forces = [], []
    for model in (surrogate.prior, *surrogate.members):
        alone = MaceSurrogate(prior=model)
        left = [left_over(alone, label) for label in labels]
        energies.append([energy for energy, _ in left])
        forces.append(np.concatenate([force.ravel()[mask] for (_, force), mask in zip(left, free, strict=True)]))
    return np.array(energies), np.array(forces)


def left_over(potential: Potential, label: Label) -> tuple[float, FloatArray]:
    """Label minus potential: energy in eV and forces ``(n_atoms, 3)`` in eV/Å."""
    energy, force = potential.evaluate(label.structure, label.structure.positions[None])
    assert label.energy_ev is not None and label.forces is not None
    return label.energy_ev - float(energy[0]), label.forces - force[0]


def without_network(surrogate: MaceSurrogate, dataset: Dataset) -> Dataset:
    """What MACE itself has to learn: the labels minus what still holds of the elastic network."""
    learned = []
    for label in dataset.labels:
        energy, forces = _network_terms(surrogate, label.structure)
        assert label.energy_ev is not None and label.forces is not None
        weight = surrogate.network_weight
        bare = replace(
            label, energy_ev=label.energy_ev - weight * energy, forces=frozen_array(label.forces - weight * forces)
        )
        learned.append(bare)
    return Dataset(labels=tuple(learned))


def _network_rows(
    surrogate: MaceSurrogate, labels: Sequence[Label], free: Sequence[Any]
) -> tuple[FloatArray, FloatArray]:
    """The network's energies ``(n_labels,)`` and free forces ``(n_rows,)`` at the labels."""
    terms = [_network_terms(surrogate, label.structure) for label in labels]
    forces = [force.ravel()[mask] for (_, force), mask in zip(terms, free, strict=True)]
    return np.array([energy for energy, _ in terms]), np.concatenate(forces)


def _network_terms(surrogate: MaceSurrogate, structure: Structure) -> tuple[float, FloatArray]:
    network = surrogate.networks.get(network_key(structure))
    if network is None:
        return 0.0, np.zeros(structure.positions.shape)
    positions = torch.tensor(structure.positions[None], requires_grad=True)
    energy = network.energies(positions)
    (gradient,) = torch.autograd.grad(energy.sum(), positions)
    return float(energy[0].detach()), -_numpy(gradient[0])
