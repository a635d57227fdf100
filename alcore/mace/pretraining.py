"""Pre-training a small MACE on a teacher that is not the reference, so that the first band is sane.

The teacher (a cheap potential, a universal one) labels structures of ``alcore.sampling``; the student learns them in
minibatches with Adam (amsgrad: Reddi, Kale and Kumar, ICLR 2018) under a one-cycle learning rate (Smith and Topin,
arXiv:1708.07120), Huber losses, and an exponential moving average of its weights, which is what is kept: as it was when
the held-out structures were predicted best. The student is faster than its teacher, has pair repulsion at any distance,
and can be fine-tuned.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alcore.chemical_space import pairs
from alcore.errors import InputError, TrainingError
from alcore.identity import json_sha256
from alcore.mace.graphs import graph_of, merge_graphs
from alcore.mace.models import (
    Architecture,
    build_model,
    freeze,
    model_elements,
    save_model_file,
    trainable_copy,
    weights_sha256,
)
from alcore.neighbours import neighbours
from alcore.teaching import Lessons, Limits, Teacher, atom_counts, atomic_energies, sound_labels, teach
from alcore.types import FloatArray, Label, Structure

ANCHOR_REACH = (0.25, 0.5)
"""Distances of close pairs in sums of covalent radii; teachers are asked from 0.6 on (``SampleSpec.min_contact``)."""


@dataclass(frozen=True, kw_only=True)
class PretrainSpec:
    """How a student is trained.

    Attributes:
        architecture: of the student; ``mean_neighbors`` is measured.
        epochs: passes over the structures.
        batch_size: structures a step.
        learning_rate: peak of the one-cycle schedule.
        energy_weight: on the Huber loss of energies an atom, eV⁻²; ``force_weight``, Å²/eV², on that of forces.
        energy_huber_ev_per_atom, force_huber_ev_per_ang: errors beyond these count linearly.
        clip_norm: of the gradient.
        ema_decay: of the moving average, a step.
        anchors_per_pair: pairs of atoms too close for any teacher, of every two elements, whose forces shall be those
            of the model's own pair repulsion: what is learned must not undo it.
        held_out: share of the structures that is never trained on.
        validate_every: epochs between two looks at them.
        limits: labels beyond them are removed.
    """

    architecture: Architecture = Architecture(channels=32)
    epochs: int = 60
    batch_size: int = 8
    learning_rate: float = 0.01
    energy_weight: float = 20.0
    force_weight: float = 1.0
    energy_huber_ev_per_atom: float = 0.05
    force_huber_ev_per_ang: float = 0.3
    clip_norm: float = 10.0
    ema_decay: float = 0.99
    anchors_per_pair: int = 4
    held_out: float = 0.1
    validate_every: int = 2
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Errors on the held-out structures after ``epoch`` epochs."""

    epoch: int
    loss: float
    energy_rmse_ev_per_atom: float
    force_rmse_ev_per_ang: float


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """Where a prior comes from; travels in its file.

    Attributes:
        teacher: name of what labelled the structures, and ``fingerprint``.
        elements: symbols the student knows.
        n_given: structures the teacher was asked about; ``n_train`` and ``n_held_out`` of them were used.
        removed: why the others were not, and how many.
        n_atoms: of all that were used.
        structures_sha256: hash of those, energies and forces included.
        energy_rmse_ev_per_atom, force_rmse_ev_per_ang: on the held-out structures; ``force_rms_ev_per_ang`` is the
            size of the forces there.
        best_epoch: whose averaged weights were kept.
        label_seconds, train_seconds: wall time.
        atomic_energies_ev: by symbol: least squares over the compositions, or those of the model it went on from.
        spec: how it was trained.
        curve: of the errors on the held-out structures.
        note: what the structures are, in words.
        held_out_keys: content keys of the held-out structures.
        began_from: sha256 of the weights of the model it went on from, or "".
    """

    teacher: str
    fingerprint: str
    elements: tuple[str, ...]
    n_given: int
    n_train: int
    n_held_out: int
    removed: Mapping[str, int]
    n_atoms: int
    structures_sha256: str
    energy_rmse_ev_per_atom: float
    force_rmse_ev_per_ang: float
    force_rms_ev_per_ang: float
    best_epoch: int
    label_seconds: float
    train_seconds: float
    atomic_energies_ev: Mapping[str, float]
    spec: PretrainSpec
    curve: tuple[CurvePoint, ...] = ()
    note: str = ""
    held_out_keys: tuple[str, ...] = ()
    began_from: str = ""

    def line(self) -> str:
        """One line to be printed with every result that uses the prior."""
        return _line(asdict(self))


def prior_line(model: Any) -> str:
    """That line of a model as ``open_foundation`` gives it, printable characters only; "" where the model does not say
    where it comes from."""
    try:
        line = _line(json.loads(getattr(model, "pretraining", "")))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # the text comes from a file
        return ""
    return "".join(letter if letter.isprintable() else " " for letter in line)


def _line(told: Mapping[str, Any]) -> str:
    return (
        f"pre-trained on {told['n_train'] + told['n_held_out']} structures ({told['note'] or 'no note'}) labelled by "
        f"{told['teacher']}; held-out errors {1000 * told['energy_rmse_ev_per_atom']:.1f} meV/atom, "
        f"{1000 * told['force_rmse_ev_per_ang']:.0f} meV/Å"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A frozen student in float64 and its report, which the model also carries as ``model.pretraining`` (JSON)."""

    model: Any
    report: PretrainReport

    def save(self, path: Path) -> None:
        """Writes ``path``, a ``.model`` file that ``open_foundation`` reads without running code in it, and beside it
        the report as ``.json``."""
        save_model_file(self.model, path)
        path.with_suffix(".json").write_text(json.dumps(asdict(self.report), indent=1) + "\n", encoding="utf-8")


def pretrain(
    structures: Sequence[Structure],
    teacher: Teacher,
    spec: PretrainSpec,
    rng: np.random.Generator,
    note: str = "",
    start: Any = None,
) -> Pretrained:
    """A student that imitates ``teacher`` on structures like these; see ``learn``."""
    return learn(teach(structures, teacher), spec, rng, note, start)


def learn(
    lessons: Lessons, spec: PretrainSpec, rng: np.random.Generator, note: str = "", start: Any = None
) -> Pretrained:
    """A student of these labels; the same labels, spec and generator give the same weights.

    Args:
        lessons: labels of one teacher.
        spec: how to train.
        rng: seeds the weights, draws the held-out structures and the batches.
        note: what the structures are, in words; it is kept with the model.
        start: a model of the same elements to go on from; fresh weights where None. What was held out when it was
            trained stays held out.

    Raises:
        InputError: ``start`` knows other elements or has another cutoff, or fewer than four labels are sound.
        TrainingError: the loss is not finite.
    """
    began = time.perf_counter()
    sound, removed = sound_labels(lessons.labels, spec.limits)
    if len(sound) < 4:
        raise InputError(
            f"only {len(sound)} of {len(lessons.labels)} labels of the teacher are sound",
            where="pre-training",
            mend="give more structures, or another teacher",
        )
    elements = sorted({int(z) for label in sound for z in label.structure.numbers})
    shifts = atomic_energies(sound, elements) if start is None else _own_energies(start, elements, spec.architecture)
    held_out_keys = _held_out(sound, spec, rng, start)
    architecture = replace(spec.architecture, mean_neighbors=_mean_neighbors(sound, spec.architecture.r_max_ang))
    fresh = build_model(elements, int(rng.integers(2**31)), architecture, torch.float32)
    anchors = _anchors(fresh, elements, spec, rng)
    held_out, train = (
        [_example(fresh, label, shifts) for label in sound if (label.key in held_out_keys) == held]
        for held in (True, False)
    )
    model, curve = _train(fresh if start is None else _unshifted(start), [*train, *anchors], held_out, spec, rng)
    best = min(curve, key=lambda point: point.loss)
    model = freeze(model.to(torch.float64))
    own = model.atomic_energies_fn.atomic_energies
    own.copy_(torch.as_tensor(shifts).reshape(own.shape))
    report = PretrainReport(
        teacher=lessons.teacher,
        fingerprint=lessons.fingerprint,
        elements=tuple(chemical_symbols[z] for z in elements),
        n_given=len(lessons.labels),
        n_train=len(train),
        n_held_out=len(held_out),
        removed=removed,
        n_atoms=sum(len(label.structure) for label in sound),
        structures_sha256=json_sha256({x.key: [x.energy_ev, np.asarray(x.forces).tolist()] for x in sound}),
        energy_rmse_ev_per_atom=best.energy_rmse_ev_per_atom,
        force_rmse_ev_per_ang=best.force_rmse_ev_per_ang,
        force_rms_ev_per_ang=float(torch.cat([x.forces for x in held_out]).square().mean().sqrt()),
        best_epoch=best.epoch,
        label_seconds=lessons.seconds,
        train_seconds=time.perf_counter() - began,
        atomic_energies_ev={chemical_symbols[z]: float(e) for z, e in zip(elements, shifts, strict=True)},
        spec=replace(spec, architecture=architecture),
        curve=tuple(curve),
        note=note,
        held_out_keys=tuple(sorted(held_out_keys)),
        began_from="" if start is None else weights_sha256(start),
    )
    model.pretraining = json.dumps(asdict(report))
    return Pretrained(model=model, report=report)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Example:
    graph: dict[str, torch.Tensor]
    energy: torch.Tensor
    forces: torch.Tensor


def _held_out(labels: Sequence[Label], spec: PretrainSpec, rng: np.random.Generator, start: Any) -> set[str]:
    """Keys of the labels to judge by: those ``start`` was judged by, since it has seen the others; or drawn."""
    keys = [label.key for label in labels]
    before = json.loads(getattr(start, "pretraining", "{}")).get("held_out_keys", [])
    drawn = rng.permutation(len(keys))[: max(1, round(spec.held_out * len(keys)))]
    return set(keys) & set(before) or {keys[k] for k in drawn}


def _example(model: Any, label: Label, shifts: FloatArray) -> _Example:
    like = next(iter(model.parameters()))
    energy = float(label.energy_ev or 0.0) - float((atom_counts([label], model_elements(model)) @ shifts)[0])
    return _Example(
        graph=graph_of(model, label.structure), energy=like.new_tensor([energy]), forces=like.new_tensor(label.forces)
    )


def _anchors(untrained: Any, elements: Sequence[int], spec: PretrainSpec, rng: np.random.Generator) -> list[_Example]:
    """Close pairs whose forces are those of the untrained model, which is its pair repulsion alone; their energies are
    left open."""
    symbols = [chemical_symbols[z] for z in elements]
    examples = []
    for structure in pairs(symbols, spec.anchors_per_pair, rng, ANCHOR_REACH):
        graph = graph_of(untrained, structure)
        forces = untrained(graph, training=False, compute_force=True)["forces"].detach()
        examples.append(_Example(graph=graph, energy=forces.new_tensor([float("nan")]), forces=forces))
    return examples


def _own_energies(model: Any, elements: Sequence[int], architecture: Architecture) -> FloatArray:
    """Energy an atom of each element has in the model, eV, ``(n_elements,)``.

    Raises:
        InputError: it knows other elements, or has another cutoff than the graphs will have.
    """
    if model_elements(model) != list(elements):
        raise InputError("the model to go on from knows other elements", where="pre-training", mend="start afresh")
    if not np.isclose(cutoff := float(model.r_max), architecture.r_max_ang):
        raise InputError(
            f"the model to go on from has a cutoff of {cutoff:g} Å, not {architecture.r_max_ang:g} Å",
            where="pre-training",
            mend=f"set the architecture's r_max_ang to {cutoff:g}",
        )
    return np.array(model.atomic_energies_fn.atomic_energies.detach().cpu().double().reshape(-1))


def _unshifted(model: Any) -> Any:
    """A copy in float32 without the atoms' own energies."""
    twin = trainable_copy(model).to(torch.float32)
    twin.atomic_energies_fn.atomic_energies.zero_()
    return twin


def _mean_neighbors(labels: Sequence[Label], r_max_ang: float) -> float:
    n_edges = sum(len(neighbours("i", x.structure, x.structure.positions, r_max_ang)[0]) for x in labels)
    return n_edges / sum(len(x.structure) for x in labels)


def _batches(examples: Sequence[_Example], order: Sequence[int], size: int) -> Iterator[list[_Example]]:
    for start in range(0, len(order), size):
        yield [examples[k] for k in order[start : start + size]]


def _errors(model: Any, batch: Sequence[_Example], *, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of energies an atom, where known, and of forces ``(n_nodes, 3)``."""
    graph = merge_graphs([example.graph for example in batch])
    out = model(graph, training=training, compute_force=True)
    wanted = torch.cat([x.energy for x in batch])
    energy_error = (out["energy"] - wanted) / torch.diff(graph["ptr"])
    return energy_error[~torch.isnan(wanted)], out["forces"] - torch.cat([x.forces for x in batch])


def _loss(energy_error: torch.Tensor, force_error: torch.Tensor, spec: PretrainSpec) -> torch.Tensor:
    huber = torch.nn.functional.huber_loss
    energy = huber(energy_error, torch.zeros_like(energy_error), delta=spec.energy_huber_ev_per_atom, reduction="sum")
    energy = energy / max(1, len(energy_error))  # a batch of anchors alone has no energies
    force = huber(force_error, torch.zeros_like(force_error), delta=spec.force_huber_ev_per_ang)
    return spec.energy_weight * energy + spec.force_weight * force


def _train(
    model: Any, train: Sequence[_Example], held_out: Sequence[_Example], spec: PretrainSpec, rng: np.random.Generator
) -> tuple[Any, list[CurvePoint]]:
    """The averaged weights that predicted the held-out structures best, and the learning curve."""
    twin = trainable_copy(model)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    n_steps = spec.epochs * -(-len(train) // spec.batch_size)
    optimizer = torch.optim.Adam(parameters, lr=spec.learning_rate, amsgrad=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=spec.learning_rate, total_steps=n_steps + 1, pct_start=0.15
    )
    average = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(spec.ema_decay))
    curve = [_look(twin, held_out, spec, 0)]
    best = copy.deepcopy(twin)
    for epoch in range(1, spec.epochs + 1):
        for batch in _batches(train, rng.permutation(len(train)).tolist(), spec.batch_size):
            optimizer.zero_grad()
            loss = _loss(*_errors(twin, batch, training=True), spec)
            if not bool(torch.isfinite(loss)):
                raise TrainingError("the pre-training loss is not finite: lower the learning rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm)
            optimizer.step()
            schedule.step()
            average.update_parameters(twin)
        if epoch % spec.validate_every == 0 or epoch == spec.epochs:
            curve.append(_look(average.module, held_out, spec, epoch))
            if curve[-1].loss == min(point.loss for point in curve):
                best = copy.deepcopy(average.module)
    return freeze(best), curve


def _look(model: Any, examples: Sequence[_Example], spec: PretrainSpec, epoch: int) -> CurvePoint:
    found = [
        [e.detach() for e in _errors(model, batch, training=False)]
        for batch in _batches(examples, range(len(examples)), 2 * spec.batch_size)
    ]
    energy, force = (torch.cat(errors) for errors in zip(*found, strict=True))
    return CurvePoint(
        epoch=epoch,
        loss=float(_loss(energy, force, spec)),
        energy_rmse_ev_per_atom=float(energy.square().mean().sqrt()),
        force_rmse_ev_per_ang=float(force.square().mean().sqrt()),
    )
