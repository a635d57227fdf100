"""The surrogate: MACE (a frozen prior, or a fine-tuned committee) plus the closed-form correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from alcore.correction import Correction, Local
from alcore.mace.features import RandomFeatures, element_index, invariant_columns
from alcore.mace.graphs import batch_graph
from alcore.mace.models import model_elements
from alcore.mace.network import ElasticNetwork, lattice_wraps, network_key
from alcore.types import Calibration, CommitteePrediction, FloatArray, Structure
from alcore.uncertainty import OVER_TRAINED, OVER_UNTRAINED

MAX_BATCH_ATOMS = 3000
"""Atoms in one batch of the Jacobian; bounds its memory to a few hundred MB for small models."""


Lead = Literal["prior", "committee"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What the correction knows of one set of atoms: g's posterior, and the places around which atoms are unwrapped,
    ``(n_atoms, 3)`` in Å."""

    local: Local
    home_ang: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class MaceSurrogate:
    """Energy = model + network + φ·w + g (``alcore.correction``).

    φ holds random features of the prior's trunk, which never learns, and the energy of the elastic network, whose scale
    the labels may change. (The scale of a trained prior they may not: at end states at rest it pulls, so they would
    take its whole surface away.) Every model (the prior and each fine-tuned member) has weights of its
    own, fitted to what it leaves unexplained; the posterior covariance is common and rests on the prior's residuals.
    Relaxations follow the frozen prior, or the committee's mean once that predicts better.

    Attributes:
        prior: the starting model, frozen.
        members: the fine-tuned committee; empty until the first fine-tuning.
        lead: which surface relaxations follow.
        features: random features on the prior's descriptors, or None.
        networks: what is known of each set of atoms before any label, under every model (``network.ElasticNetwork``).
        correction: None before the first label, or without correction; its weights' rows are the prior, then the
            members.
        known: g's part of it by ``atoms_key``.
        rows: features and Jacobian of each label seen so far, by key (they depend on the frozen trunk only, so they
            stay true).
        notes: how it was made, for ``describe``.
    """

    prior: Any
    members: tuple[Any, ...] = ()
    lead: Lead = "prior"
    features: RandomFeatures | None = None
    networks: Mapping[bytes, ElasticNetwork] = field(default_factory=dict)
    correction: Correction | None = None
    known: Mapping[bytes, Known] = field(default_factory=dict)
    rows: Mapping[str, tuple[FloatArray, FloatArray]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the model's type and device."""
        return next(iter(self.prior.parameters()))

    @property
    def elsewhere(self) -> Calibration:
        """What other runs found for surrogates over such a prior."""
        return OVER_UNTRAINED if self.networks else OVER_TRAINED

    def describe(self) -> dict[str, Any]:
        """Plain values: which surface leads and what the correction's evidence found, besides ``notes``."""
        found: dict[str, Any] = {**self.notes, "lead": self.lead, "n_members": len(self.members)}
        if self.correction is None:
            return found
        hyper = self.correction.hyper
        found["correction"] = {
            "precision": hyper.precision,
            "force_noise_ev_per_ang": hyper.force_noise_ev_per_ang,
            "log_evidence": self.correction.log_evidence,
            "n_features": int(self.correction.weights.shape[1]),
        }
        if hyper.kernel:
            found["correction"] |= {"amplitude_ev": hyper.amplitude_ev, "length_ang": hyper.length_ang}
        if self.networks:
            found["network_scale"] = 1.0 + float(self.correction.weights[0, -1])
        return found

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Energies in eV ``(n_images,)`` and forces in eV/Å ``(n_images, n_atoms, 3)`` of the leading surface."""
        graph = self._graph(template, positions)
        committee = self.lead == "committee"
        energies, _ = self._corrected(graph, template, self.members if committee else (self.prior,))
        lead = energies.mean(dim=0)
        return _numpy(lead), self._forces(lead, graph)

    def predict(self, template: Structure, positions: FloatArray) -> CommitteePrediction:
        """Leading energies and forces, every member, and the posterior covariance relative to the first geometry."""
        graph = self._graph(template, positions)
        energies, phi = self._corrected(graph, template, (self.prior, *self.members))
        by_lead = {"prior": energies[0]}
        if self.members:
            by_lead["committee"] = energies[1:].mean(dim=0)
        return CommitteePrediction(
            energies_ev=_numpy(by_lead[self.lead]),
            forces=self._forces(by_lead[self.lead], graph),
            members_ev=_numpy(energies[1:]),
            by_lead_ev={name: _numpy(values) for name, values in by_lead.items()},
            covariance_ev2=self._covariance(template, positions, _numpy(phi)),
            lead=self.lead,
        )

    def posterior_sigma(self, template: Structure, positions: FloatArray) -> FloatArray:
        """The correction's sigma of each energy relative to the first in eV, ``(n_images,)``; zero without one."""
        if self.correction is None:
            return np.zeros(len(positions))
        with torch.no_grad():
            graph = self._graph(template, positions)
            out = self.prior(graph, compute_force=False)
            phi = self._phi(out, self._host(graph, template), template)
        return np.sqrt(np.maximum(np.diag(self._covariance(template, positions, _numpy(phi))), 0.0))

    def _covariance(self, template: Structure, positions: FloatArray, phi: FloatArray) -> FloatArray:
        if self.correction is None:
            return np.zeros((len(positions),) * 2)
        known = self.known.get(atoms_key(template))
        home = template.positions if known is None else known.home_ang
        places = free_coordinates(template, positions, home)
        return self.correction.energy_covariance(phi, places, known.local if known else None)

    def _graph(self, template: Structure, positions: FloatArray) -> dict[str, torch.Tensor]:
        return batch_graph(
            template,
            positions,
            elements=model_elements(self.prior),
            r_max_ang=float(self.prior.r_max),
            dtype=self.like.dtype,
            device=self.like.device,
        )

    def _corrected(
        self, graph: dict[str, torch.Tensor], template: Structure, models: Sequence[Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Energies of ``models`` with all that lies over them ``(n_models, n_images)``, and φ
        ``(n_images, n_features)``, of no column before there is a correction; graphs shared."""
        outs = [model(graph, compute_force=False) for model in models]
        host = self._host(graph, template)
        energies = torch.stack([out["energy"] for out in outs]) + host
        if self.correction is None:
            return energies, host.new_zeros((len(host), 0))
        by_prior = outs[0] if models[0] is self.prior else self.prior(graph, compute_force=False)
        phi = self._phi(by_prior, host, template)
        rows = [0 if model is self.prior else 1 + k for k, model in self._numbered(models)]
        energies = energies + self.like.new_tensor(self.correction.weights[rows]) @ phi.T
        known = self.known.get(atoms_key(template))
        return energies if known is None else energies + self._pull(graph, template, known)[rows], phi

    def _numbered(self, models: Sequence[Any]) -> list[tuple[int, Any]]:
        places = {id(member): k for k, member in enumerate(self.members)}
        return [(places.get(id(model), -1), model) for model in models]

    def _host(self, graph: dict[str, torch.Tensor], template: Structure) -> torch.Tensor:
        """Energy of the elastic network under every model, ``(n_images,)``; zero where these atoms have none."""
        positions = graph["positions"].reshape(-1, len(template), 3)
        network = self.networks.get(network_key(template))
        return self.like.new_zeros(len(positions)) if network is None else network.energies(positions)

    @staticmethod
    def _forces(energies: torch.Tensor, graph: dict[str, torch.Tensor]) -> FloatArray:
        (gradient,) = torch.autograd.grad(energies.sum(), graph["positions"])
        return -_numpy(gradient).reshape(len(energies), -1, 3)

    def _phi(self, out: Mapping[str, torch.Tensor], host: torch.Tensor, template: Structure) -> torch.Tensor:
        """φ ``(n_images, n_features)`` from what the prior says and the network's energies."""
        columns = []
        if self.features is not None:
            descriptors = out["node_feats"][:, invariant_columns(self.prior)]
            blocks = element_index(template, self.features, len(host)).to(self.like.device)
            nodes = self.features.of_nodes(descriptors, blocks)
            columns.append(nodes.reshape(len(host), len(template), -1).sum(dim=1) @ self.features.basis)
        if self.networks:
            columns.append(host[:, None])
        return torch.cat(columns, dim=1) if columns else host.new_zeros((len(host), 0))

    def _pull(self, graph: dict[str, torch.Tensor], template: Structure, known: Known) -> torch.Tensor:
        """g under every model, ``(n_models, n_images)``."""
        local, kernel = known.local, known.local.covariance.kernel
        assert kernel is not None
        n_images = len(graph["positions"]) // len(template)
        positions = graph["positions"].reshape(n_images, len(template), 3)
        wraps = lattice_wraps(_numpy(positions), known.home_ang, template.cell, template.pbc)
        free = torch.as_tensor(np.flatnonzero(~template.fixed.ravel()), device=self.like.device)
        unwrapped = positions - self.like.new_tensor(wraps)
        if not template.fixed.any():  # as in free_coordinates
            unwrapped = unwrapped - unwrapped.mean(dim=1, keepdim=True)
        places = unwrapped.reshape(n_images, -1)[:, free]
        gaps = places[:, None] - self.like.new_tensor(local.covariance.places)[None]
        rho = 5.0**0.5 / kernel.length_ang * torch.sqrt(gaps.square().sum(dim=2) + 1e-18)  # the root's slope at 0
        decay = kernel.amplitude_ev**2 * torch.exp(-rho)
        slope = -5.0 / (3.0 * kernel.length_ang**2) * decay * (1 + rho)
        along = torch.einsum("pnd,knd->kpn", gaps, self.like.new_tensor(local.force_pull))
        value = decay * (1 + rho + rho**2 / 3)
        return self.like.new_tensor(local.energy_pull) @ value.T + (along * slope).sum(dim=2)

    def descriptors(self, template: Structure, positions: FloatArray) -> FloatArray:
        """The prior's invariant node descriptors, ``(n_images * n_atoms, n_descriptors)``."""
        with torch.no_grad():
            feats = self.prior(self._graph(template, positions), compute_force=False)["node_feats"]
        return _numpy(feats[:, invariant_columns(self.prior)])

    def feature_rows(self, structure: Structure) -> tuple[FloatArray, FloatArray]:
        """φ ``(n_features,)`` and −∂φ/∂x ``(3 n_atoms, n_features)`` of one structure.

        One backward pass a feature, or, for fewer atoms than that, the Jacobian of the descriptors column by column as
        forward derivatives (by differentiating the backward pass, which is linear in its seed, once more). Each pass
        costs as much as there are atoms, and there are never more of them than features.
        """
        graph = self._graph(structure, structure.positions[None])
        out = self.prior(graph, compute_force=False)
        host = self._host(graph, structure)
        phi = self._phi(out, host, structure)[0]
        n_random = len(phi) - bool(self.networks)
        if self.features is None or n_random <= 3 * len(structure):
            gradient = self._backward(phi, graph["positions"])
        else:
            network = self._backward(phi[n_random:], graph["positions"])
            gradient = torch.cat([self._forward(out["node_feats"], graph, structure), network])
        return _numpy(phi), -_numpy(gradient).T

    def _backward(self, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """∂values/∂x, ``(n_values, 3 n_atoms)``."""
        if not values.requires_grad:  # nothing in φ is about these atoms
            return values.new_zeros((len(values), 3 * len(positions)))
        seeds, chunk = torch.eye(len(values), dtype=values.dtype, device=values.device), _chunk(len(positions))
        rows = [values.new_zeros((0, 3 * len(positions)))]
        for start in range(0, len(values), chunk):
            (gradient,) = torch.autograd.grad(
                values, positions, grad_outputs=seeds[start : start + chunk], is_grads_batched=True, retain_graph=True
            )
            rows.append(gradient.reshape(len(gradient), -1))
        return torch.cat(rows)

    def _forward(self, node_feats: torch.Tensor, graph: dict[str, torch.Tensor], structure: Structure) -> torch.Tensor:
        """∂φ/∂x of the random features, ``(n_random, 3 n_atoms)``."""
        assert self.features is not None
        descriptors = node_feats[:, invariant_columns(self.prior)]
        seed = torch.zeros_like(descriptors, requires_grad=True)
        (gradient,) = torch.autograd.grad(
            descriptors, graph["positions"], grad_outputs=seed, create_graph=True, retain_graph=True
        )
        n_atoms, chunk = len(structure), _chunk(len(structure))
        directions = torch.eye(3 * n_atoms, dtype=self.like.dtype, device=self.like.device).reshape(-1, n_atoms, 3)
        blocks = element_index(structure, self.features, 1).to(self.like.device)
        rows = []
        for start in range(0, 3 * n_atoms, chunk):
            (jacobian,) = torch.autograd.grad(
                gradient, seed, grad_outputs=directions[start : start + chunk], is_grads_batched=True, retain_graph=True
            )
            rows.append(self.features.derivative(descriptors.detach(), jacobian, blocks))
        return (torch.cat(rows) @ self.features.basis).T


def atoms_key(structure: Structure) -> bytes:
    """Structures with equal keys have the same coordinates to move: the same atoms in the same cell, equally held."""
    return network_key(structure) + structure.fixed.tobytes()


def free_coordinates(template: Structure, positions: FloatArray, home_ang: FloatArray) -> FloatArray:
    """Those that may move, unwrapped around ``home_ang``, Å, ``(n_images, n_coordinates)``; where nothing is held, as
    seen from the mean of all atoms."""
    unwrapped = positions - lattice_wraps(positions, home_ang, template.cell, template.pbc)
    if not template.fixed.any():
        unwrapped = unwrapped - unwrapped.mean(axis=1, keepdims=True)
    return np.asarray(unwrapped.reshape(len(positions), -1)[:, ~template.fixed.ravel()])


def _chunk(n_atoms: int) -> int:
    return max(1, MAX_BATCH_ATOMS // n_atoms)


def _numpy(tensor: torch.Tensor) -> FloatArray:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
