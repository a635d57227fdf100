"""Fine-tuning one MACE on a handful of labels, in process: full batch, Adam (amsgrad), one-cycle learning rate.

Energies are learned relative to each composition's mean, so the reference code's absolute energies never matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alcore.dataset import composition_groups
from alcore.errors import TrainingError
from alcore.mace.graphs import batch_graph
from alcore.mace.models import freeze, model_elements, trainable_copy
from alcore.types import Dataset, FloatArray, Label, Structure


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How a member is fine-tuned.

    Attributes:
        epochs: of the first training; ``warm_epochs`` of later ones, which start from the last weights.
        learning_rate: peak of the one-cycle schedule; 0.01 learned in 100 epochs what 0.001 did not in 500.
        energy_weight_per_ev2: on the squared total energy relative to its composition's mean.
        force_weight: on the mean squared force component, Å²/eV².
        clip_norm: of the gradient.
        first_labels: how many there must be before anything is trained; None leaves it to the strategy.
    """

    epochs: int = 150
    warm_epochs: int = 40
    learning_rate: float = 0.01
    energy_weight_per_ev2: float = 20.0
    force_weight: float = 1.0
    clip_norm: float = 10.0
    first_labels: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedMember:
    """A fine-tuned model and what it reached on its own labels.

    Attributes:
        model: frozen.
        energy_rmse_ev: of energies relative to their composition's mean.
        force_rmse_ev_per_ang: over all components.
        epochs: how many were run.
        learning_rate: the peak that was used.
        name: which member it is.
        generation: that it was trained in.
        began_from: sha256 of the weights it started from, or the seed of fresh ones.
    """

    model: Any
    energy_rmse_ev: float
    force_rmse_ev_per_ang: float
    epochs: int
    learning_rate: float
    name: str = ""
    generation: int = -1
    began_from: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    graph: dict[str, torch.Tensor]
    energies: torch.Tensor
    forces: torch.Tensor
    groups: torch.Tensor


def fine_tune(model: Any, dataset: Dataset, spec: TrainSpec, *, weights: FloatArray, warm: bool) -> TrainedMember:
    """A fine-tuned, frozen copy of ``model``.

    Args:
        model: where to start.
        dataset: labels to learn.
        spec: how.
        weights: of each label in the loss, ``(n_labels,)``; what makes members differ (Bayesian bootstrap, Rubin 1981).
        warm: True if ``model`` was trained on most of these labels before.

    Raises:
        TrainingError: the loss is not finite.
    """
    twin = trainable_copy(model)
    batch = _merge(model, dataset.labels)
    scale = batch.energies.new_tensor(weights)
    epochs = spec.warm_epochs if warm else spec.epochs
    optimizer = torch.optim.Adam(twin.parameters(), lr=spec.learning_rate, amsgrad=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=spec.learning_rate, total_steps=epochs + 1)
    best, best_state = float("inf"), None
    for _ in range(epochs + 1):
        optimizer.zero_grad()
        energy_error, force_error = _errors(twin, batch, training=True)
        per_label = spec.energy_weight_per_ev2 * energy_error**2 + spec.force_weight * _mean_square(force_error, batch)
        loss = (scale * per_label).mean()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise TrainingError("the training loss is not finite: look at the labels' energies and forces")
        if value < best:
            best, best_state = value, {k: v.detach().clone() for k, v in twin.state_dict().items()}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), spec.clip_norm)
        optimizer.step()
        schedule.step()
    assert best_state is not None
    twin.load_state_dict(best_state)
    freeze(twin)
    energy_error, force_error = _errors(twin, batch, training=False)
    return TrainedMember(
        model=twin,
        energy_rmse_ev=float(energy_error.detach().square().mean().sqrt()),
        force_rmse_ev_per_ang=float(force_error.detach().square().mean().sqrt()),
        epochs=epochs,
        learning_rate=spec.learning_rate,
    )


def _errors(model: Any, batch: _Batch, *, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy errors relative to their composition's mean ``(n_labels,)`` and force errors ``(n_nodes, 3)``."""
    out = model(batch.graph, training=training, compute_force=True)
    error = out["energy"] - batch.energies
    counts = torch.bincount(batch.groups).to(error.dtype)
    means = torch.zeros_like(counts).index_add(0, batch.groups, error) / counts
    return error - means[batch.groups], out["forces"] - batch.forces


def _mean_square(force_error: torch.Tensor, batch: _Batch) -> torch.Tensor:
    """Mean squared force component of each label, ``(n_labels,)``."""
    per_atom = force_error.square().mean(dim=1)
    total = torch.zeros_like(batch.energies).index_add(0, batch.graph["batch"], per_atom)
    return total / torch.diff(batch.graph["ptr"]).to(total.dtype)


def _merge(model: Any, labels: Sequence[Label]) -> _Batch:
    """One batch of all labels, which may differ in composition and size."""
    like = next(iter(model.parameters()))
    energies = np.array([label.energy_ev for label in labels], dtype=float)
    forces = np.concatenate([label.forces for label in labels if label.forces is not None])
    return _Batch(
        graph=merge_graphs([graph_of(model, label.structure) for label in labels]),
        # differences from the mean survive in float32 as well
        energies=like.new_tensor(energies - energies.mean()),
        forces=like.new_tensor(forces),
        groups=torch.as_tensor(composition_groups(labels), device=like.device),
    )


def graph_of(model: Any, structure: Structure) -> dict[str, torch.Tensor]:
    """One structure as ``model`` takes it, in the model's precision and on its device."""
    like = next(iter(model.parameters()))
    return batch_graph(
        structure,
        structure.positions[None],
        elements=model_elements(model),
        r_max_ang=float(model.r_max),
        dtype=like.dtype,
        device=like.device,
    )


def merge_graphs(graphs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of single structures that may differ in composition and size; the positions take gradients."""
    offsets = np.cumsum([0, *(len(g["positions"]) for g in graphs)])
    merged = {
        name: torch.cat([g[name].detach() for g in graphs])
        for name in ("positions", "node_attrs", "shifts", "unit_shifts", "cell", "head")
    }
    merged["edge_index"] = torch.cat(
        [g["edge_index"] + int(start) for g, start in zip(graphs, offsets, strict=False)], dim=1
    )
    merged["batch"] = torch.cat([g["batch"] + k for k, g in enumerate(graphs)])
    merged["ptr"] = torch.as_tensor(offsets, device=merged["batch"].device)
    merged["positions"].requires_grad_(True)
    return merged
