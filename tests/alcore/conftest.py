"""Real parts shared by the tests of alcore: EMT as the reference, small MACE models, one finished run of the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc100, molecule
from ase.calculators.emt import EMT
from ase.io import read

from alcore.endpoints import make_pair
from alcore.gaussian_process import Matern
from alcore.identity import label_key
from alcore.types import EndpointPair, FloatArray, Label, LabelRequest, Structure

sys.path.insert(0, str(Path(__file__).parent))

STRUCTURES = Path(__file__).parents[2] / "config" / "structures"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: small models lose time on more, and sums are the same each time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class EmtPotential:
    """EMT behind ``alcore.protocols.Potential``."""

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        energies, forces = [], []
        for place in positions:
            atoms = template.moved(place).to_atoms()
            atoms.calc = EMT()
            energies.append(atoms.get_potential_energy())
            forces.append(atoms.get_forces(apply_constraint=False))
        return np.array(energies), np.array(forces)


@dataclass
class EmtLabeler:
    """EMT in this process behind ``alcore.protocols.Labeler``; ``spoil`` may turn a good label into a failed one."""

    spoil: Callable[[int, Label], Label] = lambda call, label: label
    energy_shift_ev: float = 0.0
    name: str = "emt"
    fingerprint: str = "emt-in-process"
    calls: list[str] = field(default_factory=list)

    def label(self, requests: Sequence[LabelRequest], on_done: Callable[[Label], None] | None = None) -> list[Label]:
        labels = []
        for request in requests:
            self.calls.append(request.key)
            label = emt_label(request.candidate.structure, self.fingerprint, self.energy_shift_ev)
            labels.append(self.spoil(len(self.calls), label))
            if on_done is not None:
                on_done(labels[-1])
        return labels

    def tidy(self, label: Label) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """Nothing was started."""


def emt_label(structure: Structure, fingerprint: str = "emt-in-process", energy_shift_ev: float = 0.0) -> Label:
    """What EMT says about ``structure``, all energies shifted alike."""
    energies, forces = EmtPotential().evaluate(structure, structure.positions[None])
    return Label(
        key=label_key(structure, fingerprint),
        structure=structure,
        status="ok",
        fingerprint=fingerprint,
        calculator="emt",
        energy_ev=float(energies[0]) + energy_shift_ev,
        forces=forces[0],
    )


@pytest.fixture(scope="session")
def emt() -> EmtPotential:
    return EmtPotential()


@pytest.fixture(scope="session")
def emt_labeler() -> type[EmtLabeler]:
    return EmtLabeler


@pytest.fixture(scope="session")
def label_of() -> Callable[..., Label]:
    return emt_label


@pytest.fixture(scope="session")
def au_pair() -> EndpointPair:
    """The quickstart's hop: Au on Al(100), hollow to hollow, CI-NEB barrier 0.3745 eV."""
    initial, final = (read(STRUCTURES / "au_al100" / f"{side}.extxyz") for side in ("initial", "final"))
    assert isinstance(initial, Atoms)
    assert isinstance(final, Atoms)
    return make_pair("hop", initial, final, reference_barrier_ev=0.3745)


@pytest.fixture(scope="session")
def geometries() -> dict[str, tuple[Structure, FloatArray]]:
    """Atoms of every kind of periodicity with three rattled images each, ``(3, n_atoms, 3)``."""
    rng = np.random.default_rng(7)
    crystal = bulk("Cu", "fcc", a=3.61, cubic=True)
    slab = fcc100("Al", size=(2, 2, 3), vacuum=4.0)
    slab.pbc = (True, True, False)
    water = molecule("H2O")
    outside = crystal.copy()
    outside.positions += np.array([[30.0, -20.0, 5.0], [0, 0, 0], [-11.0, 0, 0], [0, 0, 40.0]])
    tilted = bulk("Cu", "fcc", a=3.61)
    low_slab = slab.copy()
    low_slab.positions[:, 2] -= 9.0  # leaves the cell through its open side
    flat = slab.copy()
    flat.cell[2] = 0.0
    everything = {
        "crystal": crystal,
        "primitive cell, smaller than the cutoff": tilted,
        "slab": slab,
        "slab outside its cell": low_slab,
        "slab without third vector": flat,
        "molecule without cell": water,
        "atoms outside the cell": outside,
    }
    found = {}
    for name, atoms in everything.items():
        structure = Structure.from_atoms(atoms)
        shifts = 0.08 * rng.standard_normal((3, len(atoms), 3))
        found[name] = (structure, structure.positions + shifts)
    return found


@pytest.fixture(scope="session")
def dense_kernel() -> Callable[[FloatArray, FloatArray, Matern], FloatArray]:
    """Covariance of energies, then forces, at some places ``(n, d)`` with those at others ``(m, d)``, all in one
    matrix ``(n (1 + d), m (1 + d))``: the kernel by the book, its derivatives by autograd."""
    import torch
    from torch.func import grad, jacrev, vmap

    def dense(here: FloatArray, there: FloatArray, kernel: Matern) -> FloatArray:
        def value(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            rho = (5 * ((x - y).square().sum() + 1e-14)).sqrt() / kernel.length_ang
            return kernel.amplitude_ev**2 * (1 + rho + rho**2 / 3) * torch.exp(-rho)

        def pairs(function: Callable[..., torch.Tensor]) -> FloatArray:
            every = vmap(vmap(function, (None, 0)), (0, None))
            return np.asarray(every(torch.tensor(here), torch.tensor(there)).numpy())

        n, m, d = len(here), len(there), here.shape[1]
        whole = np.zeros((n * (1 + d), m * (1 + d)))
        whole[:n, :m] = pairs(value)
        whole[:n, m:] = -pairs(grad(value, argnums=1)).reshape(n, m * d)
        whole[n:, :m] = -pairs(grad(value, argnums=0)).transpose(0, 2, 1).reshape(n * d, m)
        bend = pairs(jacrev(grad(value, argnums=0), argnums=1))
        whole[n:, m:] = bend.transpose(0, 2, 1, 3).reshape(n * d, m * d)
        return whole

    return dense


def enliven(model: Any, seed: int) -> Any:
    """The model with readouts that are not zero, as after training: energies then depend on every weight."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for readout in model.readouts:
            last = readout.linear_2 if hasattr(readout, "linear_2") else readout.linear
            last.weight.copy_(torch.randn(last.weight.shape, generator=generator, dtype=last.weight.dtype))
    return model


@pytest.fixture(scope="session")
def lively_model() -> Any:
    """A MACE for H, O, Al, Cu, Au with non-zero readouts."""
    from alcore.mace.models import build_model

    return enliven(build_model([1, 8, 13, 29, 79], 3), 3)


@pytest.fixture(scope="session")
def other_model() -> Any:
    """Another one, for committees."""
    from alcore.mace.models import build_model

    return enliven(build_model([1, 8, 13, 29, 79], 4), 4)


@pytest.fixture(scope="session")
def untrained_model(au_pair: EndpointPair) -> Any:
    """The prior of the quickstart: no label has touched it."""
    from alcore.mace.models import build_model

    return build_model([int(z) for z in au_pair.initial.numbers], 0)


@pytest.fixture(scope="session")
def bench(untrained_model: Any) -> Callable[..., Any]:
    """A ``loop_bench.Bench`` with an EMT labeler made of what is passed."""
    from loop_bench import Bench

    return lambda **kwargs: Bench(model=untrained_model, labeler=EmtLabeler(**kwargs))


@pytest.fixture(scope="session")
def finished(bench: Callable[..., Any], au_pair: EndpointPair) -> tuple[Any, Any]:
    """State and bench of the uninterrupted run that others are compared with."""
    place = bench()
    return place.run(au_pair), place
