"""MACE models: a small untrained one from a seed, a foundation model from a file or a name, weights as bytes."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alcore.errors import ModelError
from alcore.files import write_whole
from alcore.identity import sha256_hex

# mace-torch prints on import that an optional accelerator is missing. It must come before e3nn, whose constants load
# only once mace has allowed it.
with contextlib.redirect_stdout(io.StringIO()):
    from mace import modules

from e3nn import o3

from alcore.mace.trust import Trust, read_model

# A long-lived process pays TorchScript's profiling for nothing: it makes the second call of every model slow.
torch._C._jit_set_profiling_executor(False)

CONSTRUCTION = threading.Lock()
"""Models are drawn from torch's global generator, so only one is built at a time."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A bespoke MACE (Batatia et al., NeurIPS 2022), small enough to be trained on a handful of labels.

    Attributes:
        channels: invariant channels of the hidden features.
        max_ell: highest spherical harmonic on the edges.
        correlation: body order of the product basis minus one.
        r_max_ang: cutoff in Å.
        n_layers: message-passing layers.
    """

    channels: int = 16
    max_ell: int = 2
    correlation: int = 2
    r_max_ang: float = 5.0
    n_layers: int = 2
    mean_neighbors: float = 30.0


def build_model(
    numbers: Sequence[int], seed: int, architecture: Architecture | None = None, dtype: torch.dtype = torch.float64
) -> torch.nn.Module:
    """An untrained MACE whose energy is its ZBL pair repulsion alone: the readouts start at zero, so that it knows
    nothing but that atoms must not overlap, while its node features already tell environments apart.

    Args:
        numbers: atomic numbers it must know.
        seed: of its weights.
        architecture: its size; the default where None.
        dtype: of weights and evaluation.
    """
    arch = architecture or Architecture()
    elements = sorted({int(z) for z in numbers})
    with CONSTRUCTION, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = modules.ScaleShiftMACE(
            r_max=arch.r_max_ang,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=arch.max_ell,
            interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
            num_interactions=arch.n_layers,
            num_elements=len(elements),
            hidden_irreps=o3.Irreps(f"{arch.channels}x0e"),
            MLP_irreps=o3.Irreps(f"{arch.channels}x0e"),
            atomic_energies=np.zeros(len(elements)),
            avg_num_neighbors=arch.mean_neighbors,
            atomic_numbers=elements,
            correlation=arch.correlation,
            gate=torch.nn.functional.silu,
            pair_repulsion=True,
            radial_MLP=[32, 32],
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
    with torch.no_grad():
        for readout in model.readouts:
            last = readout.linear_2 if hasattr(readout, "linear_2") else readout.linear
            last.weight.zero_()
    return freeze(model.to(dtype))


@dataclass(frozen=True, kw_only=True, eq=False)
class Foundation:
    """A pre-trained MACE and the file it came from.

    Attributes:
        file: its name.
        sha256: of the very bytes that were loaded.
    """

    model: torch.nn.Module
    file: str
    sha256: str


def load_foundation(
    source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float64, trust: Trust | None = None
) -> torch.nn.Module:
    """The model of ``open_foundation``."""
    return open_foundation(source, device=device, dtype=dtype, trust=trust).model


def open_foundation(
    source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float64, trust: Trust | None = None
) -> Foundation:
    """A pre-trained MACE: a ``.model`` file, or a name mace-torch knows (downloaded by it at first use).

    Args:
        source: path or name.
        device: where the model goes.
        dtype: its precision there.
        trust: who vouches for files that run code when they are loaded; nobody where None.

    Raises:
        ModelError: no such file, not a MACE energy model, not one that can be loaded without running code in it and
            nobody vouches for it, or the name cannot be had (no network).
    """
    where = "model.foundation"
    path = Path(source).expanduser()
    if not (path.suffix == ".model" or path.exists() or "/" in source):
        path = _download(source)
    elif not path.is_file():
        raise ModelError(f"no such model file: {source}", where=where, mend="give an existing .model file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{source} cannot be read: {error.strerror}", where=where, mend="mend its rights") from error
    model = read_model(data, path.name, trust or Trust(), where)
    if not hasattr(model, "atomic_numbers") or not hasattr(model, "readouts"):
        raise ModelError(f"{source} is not a MACE energy model", where=where, mend="give a MACE .model file")
    return Foundation(model=freeze(model.to(device=device, dtype=dtype)), file=path.name, sha256=sha256_hex(data))


def save_model_file(model: torch.nn.Module, path: Path) -> None:
    """A ``.model`` file as mace-torch writes them, which ``open_foundation`` and mace-torch itself read."""
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model).cpu(), buffer)  # the caller's stays where it is
    write_whole(path, buffer.getvalue())


def _download(name: str) -> Path:
    """The file of that name in mace-torch's cache, which it fetches if need be; mace-torch does not open it."""
    from mace.calculators.foundations_models import download_mace_mp_checkpoint, mace_mp_names

    try:
        if name not in mace_mp_names:  # mace-torch would take it for an address
            raise ModelError("mace-torch knows no such name")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            path = Path(download_mace_mp_checkpoint(name))
    except Exception as error:
        raise ModelError(
            f"foundation model '{name}' cannot be had: {error}",
            where="model.foundation",
            mend="check the name and the network, or give a .model file; null makes a small MACE of your own",
        ) from error
    for line in said.getvalue().splitlines():  # the licences of some of them
        if "license" in line.lower():
            warnings.warn(line.strip(), stacklevel=3)
    return path


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, in evaluation mode and without gradients on its weights."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def trainable_copy(model: torch.nn.Module) -> torch.nn.Module:
    """An independent copy whose weights take gradients."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    return twin.train()


def model_elements(model: Any) -> list[int]:
    """Atomic numbers the model knows, in its own order."""
    return [int(z) for z in model.atomic_numbers]


def check_elements(model: Any, numbers: Sequence[int], where: str = "model.foundation") -> None:
    """Raises:
    ModelError: the model lacks an element, which is named.
    """
    from ase.data import chemical_symbols

    missing = sorted({int(z) for z in numbers} - set(model_elements(model)))
    if missing:
        names = ", ".join(chemical_symbols[z] for z in missing)
        raise ModelError(
            f"the foundation model does not know {names}", where=where, mend="choose another model, or null"
        )


def weights_to_bytes(model: torch.nn.Module) -> bytes:
    """The weights alone (no code), readable with ``torch.load(weights_only=True)``."""
    buffer = io.BytesIO()
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, buffer)
    return buffer.getvalue()


def with_weights(model: torch.nn.Module, data: bytes) -> torch.nn.Module:
    """A frozen copy of ``model`` with the weights of ``weights_to_bytes``."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    return freeze(twin)


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash of the weights, independent of how a file packs them."""
    parts = [
        name.encode() + value.detach().cpu().numpy().tobytes() for name, value in sorted(model.state_dict().items())
    ]
    return sha256_hex(b"|".join(parts))
