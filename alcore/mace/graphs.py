"""Structures as batches of graphs, in the form MACE's ``forward`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from alcore.mace.models import model_elements
from alcore.neighbours import neighbours
from alcore.types import FloatArray, Structure


def batch_graph(
    template: Structure,
    positions: FloatArray,
    *,
    elements: Sequence[int],
    r_max_ang: float,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """MACE's input dictionary for ``n_images`` geometries.

    Args:
        template: the atoms; its positions are not used.
        positions: Å, ``(n_images, n_atoms, 3)``.
        elements: the model's atomic numbers in its order.
        r_max_ang: the model's cutoff.
        dtype, device: of the tensors.

    Returns:
        ``positions`` (``n_images * n_atoms`` rows, taking gradients), ``node_attrs``, ``edge_index``, ``shifts``, …
    """
    n_images, n_atoms = positions.shape[:2]
    senders, receivers, shifts = [], [], []
    for image in range(n_images):
        i, j, s = neighbours("ijS", template, positions[image], r_max_ang)
        senders.append(i + image * n_atoms)
        receivers.append(j + image * n_atoms)
        shifts.append(s)
    unit_shifts = np.concatenate(shifts)
    place = {int(z): k for k, z in enumerate(elements)}
    one_hot = np.eye(len(elements))[[place[int(z)] for z in template.numbers]]

    def tensor(values: object, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.as_tensor(np.array(values), dtype=kind, device=device)

    graph = {
        "positions": tensor(positions.reshape(-1, 3)),
        "node_attrs": tensor(np.tile(one_hot, (n_images, 1))),
        "edge_index": tensor(np.stack([np.concatenate(senders), np.concatenate(receivers)]), torch.long),
        "shifts": tensor(unit_shifts @ template.cell),
        "unit_shifts": tensor(unit_shifts),
        "cell": tensor(np.tile(template.cell, (n_images, 1))),
        "batch": tensor(np.repeat(np.arange(n_images), n_atoms), torch.long),
        "ptr": tensor(np.arange(n_images + 1) * n_atoms, torch.long),
        "head": tensor(np.zeros(n_images), torch.long),
    }
    graph["positions"].requires_grad_(True)
    return graph


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
