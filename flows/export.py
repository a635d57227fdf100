"""A run as files that other programs read: its labels, its models, its run file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import write
from ase.stress import voigt_6_to_full_3x3_stress

from alcore.identity import POSITION_DECIMALS
from alcore.protocols import RecordStore
from alcore.types import GenerationRecord, Label, RunRecord, Structure
from flows.report.frames import labelled_frames
from flows.runfile import dump_values
from flows.status import load_run, run_labels

HEAD = "Default"
"""The head on which MACE trains frames that name no other."""


def export_run(store: RecordStore, name: str, folder: str | Path) -> Path:
    """Write ``dataset.extxyz``, ``models/member-*.model`` and ``run.yaml`` of a run.

    Args:
        store: where the run is.
        name: its name.
        folder: where to; made if need be. Files of an earlier export of the run are replaced.

    Returns:
        The folder.

    Raises:
        InputError: there is no run of that name, or its foundation model cannot be loaded any more.
    """
    run = load_run(store, name)
    generations = store.load_generations(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(dump_values(run.settings), encoding="utf-8")
    write(folder / "dataset.extxyz", dataset_frames(generations, run_labels(store, generations)), format="extxyz")
    if generations:
        save_models(store, run, generations[-1], folder / "models")
    return folder


def dataset_frames(generations: Sequence[GenerationRecord], labels: Mapping[str, Label]) -> list[Atoms]:
    """Every sound label once, in the order it was asked, with the keys MACE reads (eV, eV/Å, eV/Å³)."""
    kinds = generations[-1].kinds if generations else {}
    frames: dict[str, Atoms] = {}
    for frame in labelled_frames(generations, labels):
        label = frame.label
        if not label.ok or label.forces is None or label.key in frames:
            continue
        kind = kinds.get(label.key, frame.kind)
        frames[label.key] = labelled_atoms(label, f"{frame.path}-{kind}" if frame.path else kind)
    return list(frames.values())


def labelled_atoms(label: Label, config_type: str) -> Atoms:
    """A sound label with the keys MACE reads (eV, eV/Å, eV/Å³)."""
    atoms = _atoms(label.structure)
    atoms.info |= {
        "REF_energy": label.energy_ev,
        "config_type": config_type,
        "head": HEAD,
        "calculator": label.calculator,
        "fingerprint": label.fingerprint,
        "key": label.key,
    }
    atoms.arrays["REF_forces"] = np.asarray(label.forces)
    if label.stress is not None:
        atoms.info["REF_stress"] = voigt_6_to_full_3x3_stress(label.stress)
    return atoms


def _atoms(structure: Structure) -> Atoms:
    """Rounded as content keys round, so that the eight decimals of the file have the same key when they are read."""
    atoms = structure.moved(structure.positions.round(POSITION_DECIMALS)).to_atoms()
    if structure.magnetic_moments is not None:
        atoms.set_initial_magnetic_moments(structure.magnetic_moments.round(POSITION_DECIMALS))
    return atoms


def save_models(store: RecordStore, run: RunRecord, last: GenerationRecord, folder: Path) -> list[Path]:
    """The committee as ``.model`` files, which ``mace.calculators.MACECalculator`` reads; none before it was trained.

    The store keeps weights alone. What they are the weights of is the foundation model, or the small MACE of the
    elements that stand among them.
    """
    members: Sequence[str] = last.surrogate.get("members") or ()
    if not members:
        return []
    import torch

    from alcore.mace.models import build_model, load_foundation, with_weights

    model: Mapping[str, Any] = run.settings.get("model") or {}
    weights = [store.load_model(sha256) for sha256 in members]
    if model.get("foundation") and model.get("strategy") != "scratch":
        base = load_foundation(model["foundation"])
    else:
        numbers = torch.load(io.BytesIO(weights[0]), weights_only=True)["atomic_numbers"]
        base = build_model(numbers.tolist(), seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"member-{i}.model" for i in range(len(weights))]
    for file, data in zip(files, weights, strict=True):
        torch.save(with_weights(base, data), file)
    return files
