"""Fine-tuning one MACE on a handful of labels, in process: full batch, Adam (amsgrad), one-cycle learning rate.

Energies are learned relative to each composition's mean, so the reference code's absolute energies never matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from alcore.dataset import composition_groups
from alcore.errors import TrainingError
from alcore.mace.graphs import batch_graph
from alcore.mace.models import model_elements
from alcore.mace.strategies import Learner, StrategySpec, learner
from alcore.types import Dataset, FloatArray, Label, Structure

REFERENCES = {"reference_energies": "none fitted: energies are learned relative to the mean of their composition"}
"""What a training tells about E0s, which are those of the starting model, whatever code the labels come from."""


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
        told: what was really done: strategy, trainable weights, heads, replay set, reference energies.
        faults: why it must not be used (``alcore.mace.sanity``); empty if it may.
    """

    model: Any
    energy_rmse_ev: float
    force_rmse_ev_per_ang: float
    epochs: int
    learning_rate: float
    name: str = ""
    generation: int = -1
    began_from: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    graph: dict[str, torch.Tensor]
    energies: torch.Tensor
    forces: torch.Tensor
    groups: torch.Tensor
    n_labels: int


def fine_tune(
    model: Any,
    dataset: Dataset,
    spec: TrainSpec,
    *,
    weights: FloatArray,
    warm: bool,
    strategy: StrategySpec | None = None,
    replay: Sequence[Label] = (),
    seed: int = 0,
) -> TrainedMember:
    """A fine-tuned, frozen copy of ``model``.

    Args:
        model: where to start.
        dataset: labels to learn.
        spec: how long and how hard.
        weights: of each label in the loss, ``(n_labels,)``; what makes members differ (Bayesian bootstrap, Rubin 1981).
        warm: True if ``model`` was trained on most of these labels before.
        strategy: which weights learn; all where None.
        replay: what a second head is held to (``multihead``).
        seed: of adapters (``lora``).

    Raises:
        TrainingError: the loss was never finite, or what would be done is not what was asked for.
    """
    how = strategy or StrategySpec()
    if (how.learning == "multihead") != bool(replay):
        raise TrainingError(
            f"strategy {how.learning} with {len(replay)} structures to replay: that is another strategy"
        )
    made = learner(model, how, seed)
    twin, batch = made.model, _merge(model, made, dataset.labels, replay)
    scale = batch.energies.new_tensor(weights)
    epochs = spec.warm_epochs if warm else spec.epochs
    trainable = [weight for weight in twin.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=spec.learning_rate, amsgrad=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=spec.learning_rate, total_steps=epochs + 1)
    best, best_state = float("inf"), None
    done = -1
    while done < epochs:
        done += 1
        optimizer.zero_grad()
        energy_error, force_error = _errors(twin, batch, training=True)
        each = spec.energy_weight_per_ev2 * energy_error**2 + spec.force_weight * _mean_square(force_error, batch)
        loss = (scale * each[: batch.n_labels]).mean()
        if replay:
            loss = loss + how.replay_weight * each[batch.n_labels :].mean()
        value = float(loss.detach())
        if not np.isfinite(value):
            break  # what was best until here is judged like any other
        if value < best:
            best, best_state = value, {k: v.detach().clone() for k, v in twin.state_dict().items()}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, spec.clip_norm)
        optimizer.step()
        schedule.step()
    if best_state is None:
        raise TrainingError("the training loss is not finite: look at the labels' energies and forces")
    twin.load_state_dict(best_state)
    trained = made.finished(twin)
    alone = _merge(trained, Learner(model=trained), dataset.labels, ())
    energy_error, force_error = _errors(trained, alone, training=False)
    told = {**made.told, "learning_rate": spec.learning_rate, "epochs": done, "n_replay": len(replay), **REFERENCES}
    return TrainedMember(
        model=trained,
        energy_rmse_ev=float(energy_error.detach().square().mean().sqrt()),
        force_rmse_ev_per_ang=float(force_error.detach().square().mean().sqrt()),
        epochs=done,
        learning_rate=spec.learning_rate,
        told=told,
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


def _merge(model: Any, made: Learner, labels: Sequence[Label], replay: Sequence[Label]) -> _Batch:
    """One batch of all labels and then of all to be replayed, which may differ in composition and size. Energies of the
    two are never compared: each head has a mean of its own."""
    like = next(iter(model.parameters()))
    groups = composition_groups(labels)
    energies = [np.array([label.energy_ev for label in part], dtype=float) for part in (labels, replay)]
    shifted = [part - part.mean() for part in energies if len(part)]  # differences survive in float32 as well
    graph = merge_graphs([graph_of(model, label.structure) for label in (*labels, *replay)])
    if replay:
        assert made.replay_head is not None
        groups = np.concatenate([groups, composition_groups(replay) + groups.max() + 1])
        graph["head"] = graph["head"].new_tensor([made.head] * len(labels) + [made.replay_head] * len(replay))
    return _Batch(
        graph=graph,
        energies=like.new_tensor(np.concatenate(shifted)),
        forces=like.new_tensor(
            np.concatenate([label.forces for label in (*labels, *replay) if label.forces is not None])
        ),
        groups=torch.as_tensor(groups, device=like.device),
        n_labels=len(labels),
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
