"""CHGNet, a pretrained potential, as teacher for rehearsals; its weights are inside its wheel."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alcore.errors import CalculatorError
from alcore.identity import sha256_hex
from calculators.base import CalculatorEntry, CalculatorSettings

if TYPE_CHECKING:
    from chgnet.model.dynamics import CHGNetCalculator
    from chgnet.model.model import CHGNet

    from alcore.types import Structure


class ChgnetSettings(CalculatorSettings):
    model: Literal["0.3.0", "0.2.0", "r2scan"] = Field("0.3.0", description="which of the wheel's weights")
    device: Literal["cpu", "cuda", "mps"] = Field("cpu", description="where it runs")


@cache
def _load(model: str, device: str) -> CHGNet:
    from chgnet.model.model import CHGNet

    with redirect_stdout(io.StringIO()):  # verbose=False still prints
        return CHGNet.load(model_name=model, use_device=device, verbose=False)


def make(settings: ChgnetSettings, structure: Structure | None = None) -> CHGNetCalculator:
    from chgnet.model.dynamics import CHGNetCalculator

    with redirect_stdout(io.StringIO()):
        return CHGNetCalculator(_load(settings.model, settings.device), use_device=settings.device)


def warm_up(settings: ChgnetSettings) -> None:
    make(settings)


def unavailable(settings: ChgnetSettings | None) -> str | None:
    if not find_spec("chgnet"):
        return "chgnet is not installed (pip install chgnet)"
    if settings is not None and settings.device != "cpu":
        import torch

        if not getattr(torch, settings.device).is_available():
            return f"device {settings.device} is not there (set device: cpu)"
    return None


def _weights(model: str) -> Path:
    spec = find_spec("chgnet")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else Path()
    files = sorted((folder / "pretrained" / model).glob("*.pth.tar"))
    if len(files) != 1:
        raise CalculatorError(f"chgnet has no weights {model}", where=str(folder), mend="install chgnet again")
    return files[0]


def fingerprint_facts(settings: ChgnetSettings) -> dict[str, Any]:
    from importlib.metadata import version

    weights = _weights(settings.model)
    return {
        "code": "chgnet",
        "version": version("chgnet"),
        "model": settings.model,
        "weights_sha256": sha256_hex(weights.read_bytes()),
    }


def elements(settings: ChgnetSettings) -> set[int]:
    return set(range(1, 95))


def refuse(settings: ChgnetSettings, structure: Structure) -> str | None:
    if not structure.pbc.all():
        return "chgnet needs a fully periodic cell (set all three pbc, with vacuum in the cell)"
    return None


ENTRY = CalculatorEntry(
    name="chgnet",
    description="CHGNet as teacher, Z up to 94, 3D periodic cells; predicts moments, ignores initial ones",
    settings_model=ChgnetSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    elements=elements,
    warm_up=warm_up,
    refuse=refuse,
)
