"""Makes the benchmark's priors: small MACE models whose teacher, CHGNet, is the reference of no case they are used in.

    python tests/benchmarks/labels/priors.py metals salts --out FOLDER

The teacher's weights ride in the wheel of the package ``chgnet`` (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)). The
structures are those of ``alcore.chemical_space``: drawn from a seed, never relaxed, no end state and no band of any
hop; whatever has the composition of a case is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from cases import CASES

from alcore.chemical_space import metals, pairs, salts
from alcore.mace.models import load_foundation
from alcore.mace.pretraining import PretrainSpec, pretrain
from alcore.types import Structure
from calculators.registry import resolve
from calculators.teacher import InProcess, make_teacher


def chgnet() -> InProcess:
    """CHGNet in batches, under the fingerprint that the reports of the first priors have: what was held out then, stays
    held out when one of them is trained on (``--start``)."""
    return replace(make_teacher(resolve("chgnet")), fingerprint=f"chgnet {version('chgnet')}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one prior is made."""

    elements: tuple[str, ...]
    sample: Callable[..., list[Structure]]
    count: int
    spec: PretrainSpec
    note: str
    per_pair: int = 3
    seed: int = 0


RECIPES = {
    "metals": Recipe(
        elements=("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt"),
        sample=metals,
        count=1000,
        spec=PretrainSpec(epochs=60),
        note="crystals, alloys, vacancies, dumbbells, surfaces, adatoms and pairs of Al, Cu, Ag, Au, Ni, Pd and Pt",
    ),
    "salts": Recipe(
        elements=("Li", "Na", "K", "Mg", "F", "Cl", "O"),
        sample=salts,
        count=300,
        spec=PretrainSpec(epochs=60, batch_size=5),
        per_pair=0,
        note="rock salts, fluorites, their vacancies, interstitials and slabs of Li, Na, K, Mg, F, Cl and O",
    ),
}


def composition(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(int(z) for z in numbers))


def structures_of(recipe: Recipe) -> list[Structure]:
    """The training structures: none has the composition of a state of any case."""
    shunned = {composition(atoms.numbers) for case in CASES.values() for atoms in case.built.values()}
    drawn = recipe.sample(recipe.elements, recipe.count, np.random.default_rng(recipe.seed))
    drawn += pairs(recipe.elements, recipe.per_pair, np.random.default_rng(recipe.seed + 2))
    return [structure for structure in drawn if composition(structure.numbers) not in shunned]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME-chgnet.model and .json")
    parser.add_argument("--count", type=int, help="structures, instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--learning-rate", type=float, help="instead of the recipe's")
    parser.add_argument("--start", help="a prior of the same elements to go on from")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        recipe = RECIPES[name]
        if given.count:
            recipe = replace(recipe, count=given.count)
        spec = replace(
            recipe.spec,
            epochs=given.epochs or recipe.spec.epochs,
            learning_rate=given.learning_rate or recipe.spec.learning_rate,
        )
        rng, start = np.random.default_rng(recipe.seed + 1), load_foundation(given.start) if given.start else None
        pretrained = pretrain(structures_of(recipe), chgnet(), spec, rng, recipe.note, start)
        pretrained.save(given.out / f"{name}-chgnet.model")
        print(f"{name}: {pretrained.report.line()}")


if __name__ == "__main__":
    main()
