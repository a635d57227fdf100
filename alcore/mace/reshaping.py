"""A MACE with other heads or fewer elements that says the same: mace-torch's ``load_foundations_elements`` and
``remove_pt_head``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ase import Atoms

from alcore.errors import ModelError
from alcore.mace.graphs import graph_of
from alcore.mace.models import CONSTRUCTION, freeze, model_elements
from alcore.types import Structure

SAME = 1e-4
"""Relative: float32 leaves 1e-6, a tensor in the wrong place 1."""


@contextmanager
def in_precision_of(model: Any) -> Iterator[None]:
    """mace-torch makes modules in torch's default precision; inside, that is the model's."""
    before = torch.get_default_dtype()
    with CONSTRUCTION:
        torch.set_default_dtype(next(model.parameters()).dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def one_headed(model: Any, head: str | None, where: str) -> Any:
    """``model`` with the head of that name alone, frozen; the model itself if it has no other.

    Raises:
        ModelError: there are several and none is named, or none of that name.
    """
    from mace.tools.scripts_utils import remove_pt_head

    heads = list(getattr(model, "heads", None) or ["Default"])
    known = ", ".join(heads)
    if head is not None and head not in heads:
        raise ModelError(f"the foundation model has no head '{head}'", where=where, mend=f"choose among {known}")
    if len(heads) == 1:
        return model
    if head is None:
        raise ModelError(f"the foundation model has {len(heads)} heads", where=where, mend=f"choose among {known}")
    with in_precision_of(model):
        return freeze(remove_pt_head(model, head).to(next(model.parameters()).device))


def with_heads(model: Any, names: Sequence[str]) -> Any:
    """A copy of a model of one head that gives the same energies from each of several.

    Raises:
        ModelError: it is none that mace-torch can rebuild.
    """
    config = _config(model)
    n = len(names)
    for name in ("atomic_inter_scale", "atomic_inter_shift"):
        config[name] = np.repeat(np.atleast_1d(config[name]), n)
    config["atomic_energies"] = np.repeat(np.atleast_2d(config["atomic_energies"]), n, axis=0)
    config["heads"] = list(names)
    return _rebuilt(model, config, model_elements(model))


def for_elements(model: Any, numbers: Sequence[int]) -> Any:
    """A frozen copy that knows these elements alone; the model itself if it knows no others, or if it is none that
    mace-torch can rebuild.

    It is smaller and learns better: the weights of an element are divided by the root of how many elements there are,
    so that among many a step of the same size moves it less.

    Args:
        model: of one head, knowing all of ``numbers``.
        numbers: atomic numbers.
    """
    elements = sorted({int(z) for z in numbers})
    known = model_elements(model)
    if known == elements:
        return model
    try:
        config = _config(model)
    except ModelError:
        return model
    places = [known.index(z) for z in elements]
    config |= {"atomic_numbers": elements, "num_elements": len(elements)}
    config["atomic_energies"] = np.asarray(config["atomic_energies"])[..., places]
    twin = freeze(_rebuilt(model, config, elements))
    return twin if _says_the_same(twin, model, elements) else model


def _says_the_same(one: Any, other: Any, elements: Sequence[int]) -> bool:
    """On atoms of these elements at distances of bonds; mace-torch does not know every architecture's tensors."""
    rng = np.random.default_rng(0)
    numbers = np.resize(elements, 8 * math.ceil(len(elements) / 8))
    places = 2.6 * np.indices((2, 2, len(numbers) // 4)).reshape(3, -1).T
    atoms = Atoms(numbers=rng.permutation(numbers), positions=places + rng.uniform(-0.3, 0.3, places.shape))
    structure = Structure.from_atoms(atoms)
    first, second = (m(graph_of(m, structure), training=False, compute_force=True) for m in (one, other))
    return all(_close(first[name], second[name]) for name in ("node_feats", "forces"))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= SAME * other.abs().max())


def _config(model: Any) -> dict[str, Any]:
    from mace.tools.scripts_utils import extract_config_mace_model

    config = extract_config_mace_model(model)
    if "error" in config:
        raise ModelError(f"this model cannot be rebuilt: {config['error']}", mend="give another foundation model")
    return dict(config)


def _rebuilt(model: Any, config: dict[str, Any], elements: Sequence[int]) -> Any:
    from e3nn import o3
    from mace.tools.finetuning_utils import load_foundations_elements
    from mace.tools.utils import AtomicNumberTable

    like = next(model.parameters())
    with in_precision_of(model):
        twin = load_foundations_elements(
            type(model)(**config),
            model,
            AtomicNumberTable(list(elements)),
            load_readout=True,
            max_L=o3.Irreps(str(model.products[0].linear.irreps_out)).lmax,
            default_dtype=like.dtype,
        )
    return twin.to(like.device)
