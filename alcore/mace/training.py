"""Fine-tuning one MACE on a handful of labels, in process: small batches, and the mean of the last weights.

Energies are learned relative to each composition's mean, so the reference code's absolute energies never matter; E0s
are set afterwards. Adam (amsgrad) as in mace-torch, with a learning rate that falls to zero (cosine), on gradients of
one length; what is kept is the exponential moving average of the weights (Polyak and Juditsky, SIAM J. Control Optim.
30, 838 (1992)). Steps off two structures each are ten times as many as steps off twenty, at one cost
(``tests/benchmarks/training_speed.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alcore.dataset import centred, composition_groups
from alcore.errors import TrainingError
from alcore.mace.contacts import Anchor
from alcore.mace.graphs import graph_of, merge_graphs
from alcore.mace.reference_energies import align
from alcore.mace.strategies import Learner, StrategySpec, learner
from alcore.mace.surrogate import MAX_BATCH_ATOMS
from alcore.types import Dataset, FloatArray, IntArray, Label

EPOCH_DRAWS = 20
"""Structures of an epoch, at least: fewer labels are passed over several times."""
GRADIENT_NORM = 0.01
"""To which longer gradients are cut, which is nearly all: the first steps do not outweigh the last in Adam's memory."""
ANCHOR_DRAWS, ANCHOR_WEIGHT = 0.25, 0.1
"""How often an anchor is drawn in an epoch, and what a repulsion that is wholly lacking weighs, Å²/eV². With much less
of either some holes remain; with more, errors on labels grow."""
STRONG_EV_PER_ANG = 1.0
"""Forces above which what lacks of a repulsion counts relative to them: a deep hole must not drown the labels."""


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How a member is fine-tuned.

    Attributes:
        epochs: of the first training; ``warm_epochs`` of later ones, which start from the last weights;
            ``fresh_epochs`` of the first one of weights that know nothing. An epoch is a pass over the labels, of
            at least ``EPOCH_DRAWS`` structures.
        batch_size: structures a step.
        learning_rate: of Adam, at first.
        ema_decay: of the average of weights, a step.
        energy_weight: on the squared energy an atom relative to its composition's mean, atom²/eV². On labels of a path
            energies are off with a tenth of it; on rattled ones ten times as much makes errors of both larger.
        force_weight: on the mean squared force component, Å²/eV².
        first_labels: how many there must be before anything is trained; None leaves it to the strategy.
        e0s: energies of isolated atoms in eV by symbol; None: fitted to the labels.
    """

    epochs: int = 10
    warm_epochs: int = 10
    fresh_epochs: int = 30
    batch_size: int = 2
    learning_rate: float = 0.01
    ema_decay: float = 0.9
    energy_weight: float = 10.0
    force_weight: float = 1.0
    first_labels: int | None = None
    e0s: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedMember:
    """A fine-tuned model and what it reached on its own labels.

    Attributes:
        model: frozen.
        energy_rmse_ev: of energies relative to their composition's mean.
        force_rmse_ev_per_ang: over all components.
        epochs: how many were run.
        learning_rate: that was used.
        name: which member it is.
        generation: that it was trained in.
        began_from: sha256 of the weights it started from, or the seed of fresh ones.
        told: what was really done: strategy, trainable weights, heads, replay set, E0s.
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


def fine_tune(
    model: Any,
    dataset: Dataset,
    spec: TrainSpec,
    *,
    weights: FloatArray,
    epochs: int | None = None,
    strategy: StrategySpec | None = None,
    replay: Sequence[Label] = (),
    anchors: Sequence[Anchor] = (),
    seed: int = 0,
) -> TrainedMember:
    """A fine-tuned, frozen copy of ``model``.

    Args:
        model: where to start.
        dataset: labels to learn.
        spec: how.
        weights: how often each label is drawn, relative to the others, ``(n_labels,)``; what makes members differ
            (Bayesian bootstrap, Rubin 1981).
        epochs: how long; ``spec.epochs`` where None.
        strategy: which weights learn; all where None.
        replay: what a second head is held to (``multihead``).
        anchors: repulsion that is kept where no labels are.
        seed: of the draws, and of adapters (``lora``).

    Raises:
        TrainingError: labels are not finite, or what would be done is not what was asked for.
    """
    how = strategy or StrategySpec()
    if (how.learning == "multihead") != bool(replay):
        raise TrainingError(
            f"strategy {how.learning} with {len(replay)} structures to replay: that is another strategy"
        )
    made, rng = learner(model, how, seed), np.random.default_rng(seed)
    lessons = _Lessons.of(made, dataset.labels, replay, anchors, weights, how.replay_weight)
    done = _learn(made.model, lessons, spec, spec.epochs if epochs is None else epochs, rng)
    trained = made.finished(made.model)
    energies, forces = predictions(trained, dataset.labels)
    true = np.array([label.energy_ev for label in dataset.labels], dtype=float)
    energy_errors = centred(energies - true, composition_groups(dataset.labels))
    force_errors = np.concatenate([f - np.array(x.forces) for f, x in zip(forces, dataset.labels, strict=True)])
    told = {**made.told, "learning_rate": spec.learning_rate, "epochs": done, "n_replay": len(replay)}
    told |= align(trained, dataset.labels, energies, spec.e0s)
    return TrainedMember(
        model=trained,
        energy_rmse_ev=float(np.sqrt(np.mean(energy_errors**2))),
        force_rmse_ev_per_ang=float(np.sqrt(np.mean(force_errors**2))),
        epochs=done,
        learning_rate=spec.learning_rate,
        told=told,
    )


def predictions(model: Any, labels: Sequence[Label]) -> tuple[FloatArray, list[FloatArray]]:
    """Energies in eV ``(n_labels,)`` and the forces ``(n_atoms, 3)`` in eV/Å of each label, as the bare model says."""
    energies, forces = [], []
    chunk = max(1, MAX_BATCH_ATOMS // max(len(label.structure) for label in labels))
    for start in range(0, len(labels), chunk):
        structures = [label.structure for label in labels[start : start + chunk]]
        out = model(merge_graphs([graph_of(model, s) for s in structures]), training=False, compute_force=True)
        some, theirs = (out[name].detach().cpu().numpy().astype(float) for name in ("energy", "forces"))
        energies.append(some)
        forces += np.split(theirs, np.cumsum([len(s) for s in structures])[:-1])
    return np.concatenate(energies), forces


# --- learning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Lessons:
    """All labels, then all that is replayed, then all anchors. They may differ in composition and size.

    Attributes:
        graphs: of each, with its head.
        energies_ev: ``(n,)``, relative to the mean of its part: differences survive in float32 as well.
        forces: eV/Å, of each.
        counts: 0 for anchors, of which energies and forces are not known, ``(n,)``.
        away: of anchors, zero for all others.
        repulsion: eV/Å, of anchors, ``(n,)``.
        groups: composition and part of each, ``(n,)``: energies of two groups are never compared.
        draws: how often each is drawn in an epoch, ``(n,)``: labels several times if there are few.
    """

    graphs: list[dict[str, torch.Tensor]]
    energies_ev: torch.Tensor
    forces: list[torch.Tensor]
    counts: torch.Tensor
    away: list[torch.Tensor]
    repulsion: torch.Tensor
    groups: IntArray
    draws: FloatArray

    @classmethod
    def of(
        cls,
        made: Learner,
        labels: Sequence[Label],
        replay: Sequence[Label],
        anchors: Sequence[Anchor],
        weights: FloatArray,
        replay_weight: float,
    ) -> _Lessons:
        """Raises:
        TrainingError: an energy or a force is not finite.
        """
        known = [*labels, *replay]
        sizes = (len(labels), len(replay), len(anchors))
        part = np.repeat([0, 1, 2], sizes)
        n_known = len(known)
        energies = np.array([label.energy_ev for label in known], dtype=float)
        forces = [np.array(label.forces) for label in known]
        if not (np.isfinite(energies).all() and all(np.isfinite(f).all() for f in forces)):
            raise TrainingError("an energy or a force to be learned is not finite: look at the labels")
        structures = [label.structure for label in known] + [anchor.structure for anchor in anchors]
        graphs = [graph_of(made.model, structure) for structure in structures]
        for graph in graphs[sizes[0] : n_known]:
            assert made.replay_head is not None
            graph["head"] = torch.full_like(graph["head"], made.replay_head)
        times = math.ceil(EPOCH_DRAWS / sizes[0])
        replayed = np.full(sizes[1], replay_weight * sizes[0] / max(sizes[1], 1))
        shares = (times * sizes[0] * weights / weights.sum(), times * replayed, np.full(sizes[2], ANCHOR_DRAWS))
        like = next(iter(made.model.parameters()))
        aside = [np.zeros_like(anchor.away) for anchor in anchors]
        return cls(
            graphs=graphs,
            energies_ev=like.new_tensor(np.append(centred(energies, part[:n_known]), np.zeros(len(anchors)))),
            forces=[like.new_tensor(f) for f in (*forces, *aside)],
            counts=like.new_tensor(part < 2),
            away=[like.new_tensor(u) for u in (*(np.zeros_like(f) for f in forces), *(a.away for a in anchors))],
            repulsion=like.new_tensor([0.0] * n_known + [anchor.repulsion_ev_per_ang for anchor in anchors]),
            groups=np.append(composition_groups(known) + part[:n_known] * n_known, np.full(len(anchors), 2 * n_known)),
            draws=np.concatenate(shares),
        )

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[IntArray]:
        """Batches in which each occurs as often as it is to be drawn: systematic resampling (Kitagawa, J. Comput.
        Graph. Stat. 5, 1 (1996))."""
        edges = np.floor(np.cumsum(self.draws) + rng.random()).astype(int)
        order = rng.permutation(np.repeat(np.arange(len(self.draws)), np.diff(edges, prepend=0)))
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def steps(self, batch_size: int) -> int:
        """Of an epoch; one more or less is drawn."""
        return math.ceil(float(self.draws.sum()) / batch_size)


def _learn(model: Any, lessons: _Lessons, spec: TrainSpec, epochs: int, rng: np.random.Generator) -> int:
    """Trains ``model`` in place; returns how many epochs were ended. If it explodes it gets back its first weights."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    first = [weight.detach().clone() for weight in trainable]
    optimizer = torch.optim.Adam(trainable, lr=spec.learning_rate, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * lessons.steps(spec.batch_size))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(spec.ema_decay))
    errors_ev = np.full(len(lessons.graphs), np.nan)  # when last seen; their mean is the zero of a composition
    for epoch in range(epochs):
        for batch in lessons.epoch(spec.batch_size, rng):
            optimizer.zero_grad()
            _loss(model, lessons, batch, errors_ev, spec).backward()
            if not bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(trainable, GRADIENT_NORM))):
                with torch.no_grad():
                    for weight, before in zip(trainable, first, strict=True):
                        weight.copy_(before)
                return epoch
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    return epochs


def _loss(model: Any, lessons: _Lessons, batch: IntArray, errors_ev: FloatArray, spec: TrainSpec) -> torch.Tensor:
    """Mean over the batch, whose energy errors are entered in ``errors_ev``."""
    graph = merge_graphs([lessons.graphs[k] for k in batch])
    out = model(graph, training=True, compute_force=True)
    which = torch.as_tensor(batch, device=graph["batch"].device)
    energy_error = out["energy"] - lessons.energies_ev[which]
    errors_ev[batch] = energy_error.detach().cpu().numpy()
    zeros = [np.nanmean(errors_ev[lessons.groups == lessons.groups[k]]) for k in batch]
    per_atom = (out["forces"] - torch.cat([lessons.forces[k] for k in batch])).square().mean(dim=1)
    along = (out["forces"] * torch.cat([lessons.away[k] for k in batch])).sum(dim=1)
    summed, repelled = (torch.zeros_like(energy_error).index_add(0, graph["batch"], each) for each in (per_atom, along))
    n_atoms = torch.diff(graph["ptr"]).to(summed.dtype)
    energy_part = ((energy_error - energy_error.new_tensor(zeros)) / n_atoms) ** 2
    wanted = lessons.repulsion[which]
    largest = torch.maximum(wanted.abs(), repelled.detach().abs()).clamp(min=STRONG_EV_PER_ANG)
    known = spec.energy_weight * energy_part + spec.force_weight * summed / n_atoms
    return (lessons.counts[which] * known + ANCHOR_WEIGHT * (torch.relu(wanted - repelled) / largest) ** 2).mean()
