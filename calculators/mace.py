"""Any MACE ``.model`` file as teacher for rehearsals, loaded without running what is written in it if possible."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alcore.errors import CalculatorError, ModelError
from alcore.identity import sha256_hex
from calculators.base import CalculatorEntry, CalculatorSettings, LocalPath

if TYPE_CHECKING:
    from mace.calculators import MACECalculator

    from alcore.types import Structure


class MaceSettings(CalculatorSettings):
    model: LocalPath = Field(description="path of a MACE .model file")
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-fA-F]{64}$",
        description="of that file; vouches for one that can be loaded only by running the code inside it, as a line in "
        "trusted-models.txt in the data folder does",
    )
    head: str | None = Field(None, description="which head of a multi-head model; null: its only one")
    device: Literal["cpu", "cuda", "mps", "xpu"] = Field("cpu", description="where it runs")
    dtype: Literal["float32", "float64"] = Field("float64", description="precision")


@cache
def _load(path: str, stamp: tuple[int, int], device: str, dtype: str, sha256: str | None) -> Any:
    """The model of a file; ``stamp`` (time, size) loads a changed file anew; ``dtype``: converting is in place."""
    data = Path(path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mace.calculators  # noqa: F401  # before anything loads e3nn: mace sets how torch.load reads pickles

        from alcore.mace.trust import Trust, read_model
    trust = Trust(sha256=sha256, key="calculator.settings.sha256")
    return read_model(data, path, trust, "calculator.settings.model").to(device).eval()


def _unreadable(settings: MaceSettings, error: OSError) -> CalculatorError:
    text = f"cannot read the model: {error.strerror}"
    return CalculatorError(text, where=str(settings.model), mend="mend calculator.settings.model")


def _read(settings: MaceSettings) -> Any:
    try:
        status = settings.model.stat()
        stamp = status.st_mtime_ns, status.st_size
        model = _load(str(settings.model), stamp, settings.device, settings.dtype, settings.sha256)
        model.atomic_numbers, model.r_max  # noqa: B018  # a MACE model has both
    except OSError as error:
        raise _unreadable(settings, error) from error
    except ModelError as error:
        raise CalculatorError(error.message, where=error.where, mend=error.mend) from error
    except Exception as error:  # a file may hold anything
        text = str(error).splitlines() or [""]
        raise CalculatorError(
            f"not a MACE model ({type(error).__name__}: {text[0]})",
            where=str(settings.model),
            mend="give a .model file",
        ) from error
    return model


def make(settings: MaceSettings, structure: Structure | None = None) -> MACECalculator:
    model = _read(settings)
    from mace.calculators import MACECalculator

    # The calculator switches the gradients of the model it is given off; this one is ours alone.
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        return MACECalculator(models=[model], device=settings.device, default_dtype=settings.dtype, head=settings.head)
    finally:
        logging.root.setLevel(level)


def warm_up(settings: MaceSettings) -> None:
    make(settings)


def unavailable(settings: MaceSettings | None) -> str | None:
    if not find_spec("mace"):
        return "mace-torch is not installed (pip install mace-torch)"
    if settings is None:
        return None
    if not settings.model.is_file():
        return f"there is no model file {settings.model} (mend calculator.settings.model)"
    if settings.device != "cpu":
        import torch

        if not getattr(torch, settings.device).is_available():
            return f"device {settings.device} is not there (set device: cpu)"
    try:
        heads = list(getattr(_read(settings), "heads", None) or ["Default"])
    except CalculatorError as error:
        return str(error)
    if settings.head is not None and settings.head not in heads:
        return f"the model has no head {settings.head!r} (it has {', '.join(heads)})"
    if settings.head is None and len(heads) > 1 and "default" not in [head.lower() for head in heads]:
        return f"the model has several heads (set head to one of {', '.join(heads)})"
    return None


def fingerprint_facts(settings: MaceSettings) -> dict[str, Any]:
    from importlib.metadata import version

    try:
        weights = settings.model.read_bytes()
    except OSError as error:
        raise _unreadable(settings, error) from error
    return {
        "code": "mace-torch",
        "version": version("mace-torch"),
        "weights_sha256": sha256_hex(weights),
        "head": settings.head,
        "dtype": settings.dtype,
    }


def elements(settings: MaceSettings) -> set[int]:
    return {int(z) for z in _read(settings).atomic_numbers}


ENTRY = CalculatorEntry(
    name="mace",
    description="a MACE .model file as teacher; knows the elements it was trained on, ignores magnetic moments",
    settings_model=MaceSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    elements=elements,
    warm_up=warm_up,
)
