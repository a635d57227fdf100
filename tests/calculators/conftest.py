from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk

from alcore.identity import label_key
from alcore.types import Candidate, LabelRequest, Structure
from calculators import plugins
from calculators.base import ResolvedCalculator
from calculators.registry import resolve

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def misbehaving() -> Callable[..., ResolvedCalculator]:
    """``misbehaving("nan", key=value)``: the calculator whose factory is ``misbehaving.py``'s function ``nan``."""

    def make(function: str, **settings: Any) -> ResolvedCalculator:
        return resolve("ase", {"factory": f"misbehaving:{function}", "settings": settings, "path": str(HERE)})

    return make


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """``offer({"NAME": "module:object"})``: what a package installed beside us with these entry points would do.

    Workers find it too: they inherit our search path.
    """
    monkeypatch.setattr(sys, "path", [*sys.path, str(HERE)])

    def make(points: Mapping[str, str], package: str = "offered") -> None:
        info = tmp_path / "site" / f"{package}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"[{plugins.GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        if str(info.parent) not in sys.path:
            sys.path.append(str(info.parent))
        plugins.forget()

    yield make
    monkeypatch.undo()
    plugins.forget()


@pytest.fixture
def entries(offer: Callable[[Mapping[str, str]], None]) -> None:
    """The calculators of ``misbehaving_entries.py`` are there, by name."""
    import misbehaving_entries  # type: ignore[import-not-found]  # found through ``offer``

    offer({name: f"misbehaving_entries:{name}" for name in misbehaving_entries.NAMES})


@pytest.fixture(scope="session")
def make_requests() -> Callable[..., list[LabelRequest]]:
    """``make_requests(resolved, n)``: requests for ``n`` different rattled structures (CuAl, 4 atoms, periodic)."""

    def make(resolved: ResolvedCalculator, n: int = 1, structure: Structure | None = None) -> list[LabelRequest]:
        requests = []
        for seed in range(n):
            atoms = bulk("Cu", cubic=True)
            atoms.numbers[0] = 13
            atoms.rattle(0.05, seed=seed)
            asked = structure or Structure.from_atoms(atoms)
            candidate = Candidate(path="hop", kind="data", image=0, structure=asked)
            requests.append(LabelRequest(key=label_key(asked, resolved.fingerprint), candidate=candidate, generation=0))
        return requests

    return make


@pytest.fixture(scope="session")
def tiny_mace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MACE for Cu and Al with random weights, saved as users have them."""
    import mace.calculators  # noqa: F401  # first: sets how torch.load reads e3nn's tables
    import torch
    from e3nn import o3
    from mace import modules

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        model = modules.ScaleShiftMACE(
            r_max=4.0,
            num_bessel=4,
            num_polynomial_cutoff=5,
            max_ell=1,
            interaction_cls=block,
            interaction_cls_first=block,
            num_interactions=1,
            num_elements=2,
            hidden_irreps=o3.Irreps("8x0e"),
            MLP_irreps=o3.Irreps("8x0e"),
            atomic_energies=np.array([[-3.0, -5.0]]),
            avg_num_neighbors=10.0,
            atomic_numbers=[13, 29],
            correlation=1,
            gate=torch.nn.functional.silu,
            atomic_inter_scale=100.0,
            atomic_inter_shift=0.0,
            radial_MLP=[8],
        )
    finally:
        torch.set_default_dtype(default)
    path = tmp_path_factory.mktemp("mace") / "tiny.model"
    torch.save(model, path)
    return path
