"""What a reference calculator has to say about itself.

A calculator made in Python is an entry with a ``make`` function. A code that is driven by files (write inputs, run a
command, read outputs) hides the three steps behind an ASE calculator that ``make`` returns: its process already runs in
its own folder, under the timeout, and with its output caught.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from ase.data import chemical_symbols
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo

from alcore.errors import CalculatorError
from alcore.types import LabelStatus, Structure

if TYPE_CHECKING:
    from ase.calculators.abc import GetPropertiesMixin as AseCalculator


class CalculatorSettings(BaseModel):
    """Base of every calculator's settings: unknown keys are refused; units stand in the descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _against_base(path: Path | None, info: ValidationInfo) -> Path | None:
    base = (info.context or {}).get("base")
    if path is None:
        return None
    return (Path(base) / path.expanduser() if base else path.expanduser()).absolute()


LocalPath = Annotated[Path, AfterValidator(_against_base)]
"""A path that is resolved against the run file's folder, because a worker runs in a folder of its own."""


def _no_facts(_settings: Any) -> None:
    return None


def _no_objection(_settings: Any, _structure: Structure) -> str | None:
    return None


def total_charge(settings: Any, structure: Structure | None) -> float:
    """The structure's charge in e, where it has one; else ``settings.charge``."""
    return structure.charge if structure is not None and structure.charge else settings.charge


def charge_contradiction(settings: Any, structure: Structure) -> str | None:
    """Why the structure's charge and ``settings.charge`` cannot both be meant, or None."""
    charge = total_charge(settings, structure)
    if settings.charge and charge != settings.charge:
        return f"the structure's charge {charge:+g} e contradicts the settings' {settings.charge:+g} e"
    return None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a code's own output says of the calculation that just ran.

    Attributes:
        electronic_steps: steps of the last self-consistency cycle, counted; None if the code does not tell.
        converged: False if that cycle stopped without converging (its limit reached, or the code says so): such a label
            is ``unconverged`` whatever numbers there are. None if the code does not tell.
        reason: one line; why not.
        code_version: as the output states it, or "". One that is not the fingerprint's makes a label ``rejected``.
        notes: more plain values worth keeping with the label (total moment, band gap, warnings, ...).
    """

    electronic_steps: int | None = None
    converged: bool | None = None
    reason: str = ""
    code_version: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """One rung of a code's ladder: another way to the same numbers, tried when an attempt failed.

    Attributes:
        name: what changes, for a person: ``"3x the steps, gentler mixing"``.
        change: the settings to try, made from the user's. What moves the energy must stay: a rung whose fingerprint
            facts differ is never tried.
        after: how the attempt before must have ended.
    """

    name: str
    change: Callable[[Any], Any]
    after: tuple[Literal["unconverged", "crashed"], ...] = ("unconverged",)


def no_inspection(_settings: Any, _calculator: Any) -> Inspection:
    return Inspection()


def as_it_is(settings: Any) -> Any:
    return settings


@dataclass(frozen=True, kw_only=True)
class CalculatorEntry:
    """One reference calculator. Every function takes an instance of ``settings_model`` and imports lazily.

    Attributes:
        name: as the run file writes it.
        description: one line.
        settings_model: pydantic model of its settings.
        make: ``make(settings, structure=None)`` returns a fresh ASE calculator; called once a label, in the label's own
            folder. The structure is there for its charge only.
        unavailable: why it cannot run here and how to mend that, or None; computes nothing. With None for the settings
            it answers for the installation alone.
        fingerprint_facts: code, version and every setting that moves the energy, as plain JSON values.
        elements: the atomic numbers it knows, or None if it does not say.
        takes_charge: whether ``Structure.charge`` reaches the calculation; if not, a charged structure is refused.
        warm_up: loads what is slow to load, once in each worker, outside the timeout of the first label.
        refuse: why it cannot compute this structure with these settings and how to mend that, or None.
        complete: settings with what only this machine can tell filled in (a program's version), before the fingerprint
            is made; a job on another machine is given these. May raise ``CalculatorError``.
        inspect: ``inspect(settings, calculator)`` reads what the code said, in the folder where it ran; called after a
            calculation that raised, too.
        retries: the ladder, in order.
        sabotage: settings under which a calculation must end in that status; the contract test tries each.
    """

    name: str
    description: str
    settings_model: type[CalculatorSettings]
    make: Callable[..., AseCalculator]
    unavailable: Callable[[Any], str | None]
    fingerprint_facts: Callable[[Any], dict[str, Any]]
    elements: Callable[[Any], set[int] | None] = _no_facts
    takes_charge: bool = False
    warm_up: Callable[[Any], None] = _no_facts
    refuse: Callable[[Any, Structure], str | None] = _no_objection
    complete: Callable[[Any], Any] = as_it_is
    inspect: Callable[[Any, Any], Inspection] = no_inspection
    retries: tuple[Retry, ...] = ()
    sabotage: Mapping[LabelStatus, Callable[[Any], Any]] = field(default_factory=dict)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A registered calculator travels to a worker or a queue by its name, so that it may be made of lambdas."""
        from calculators.registry import find_calculator, get_calculator

        if find_calculator(self.name) is self:
            return get_calculator, (self.name,)
        return super().__reduce_ex__(protocol)

    def facts(self, settings: Any) -> dict[str, Any]:
        """What a fingerprint is the hash of: what JSON holds and no more, so that it is the same after a journey."""
        facts = {"calculator": self.name, **self.fingerprint_facts(settings)}
        plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
        return plain


@dataclass(frozen=True, kw_only=True)
class ResolvedCalculator:
    """A calculator with its settings, ready to label.

    Attributes:
        entry: the calculator.
        settings: its validated settings.
        facts: what the fingerprint was made of.
        fingerprint: content hash of ``facts``.
    """

    entry: CalculatorEntry
    settings: CalculatorSettings
    facts: Mapping[str, Any]
    fingerprint: str

    @property
    def name(self) -> str:
        return self.entry.name

    def check_available(self) -> None:
        """Raises:
        CalculatorError: it cannot run here; says why, and the mend.
        """
        if why := self.entry.unavailable(self.settings):
            raise CalculatorError(why, where=f"calculator {self.name}")

    def check_structure(self, structure: Structure, where: str = "") -> None:
        """Refuse, before anything is computed, what the calculator cannot compute.

        Args:
            structure: what it would be asked about.
            where: where the structure came from, for the message.
        Raises:
            CalculatorError: an unknown element, a charge it does not take, or an objection of its own.
        """
        where = where or f"calculator {self.name}"
        known = self.entry.elements(self.settings)
        if known is not None and (missing := sorted(set(structure.numbers.tolist()) - known)):
            raise CalculatorError(
                f"{self.name} does not know {', '.join(chemical_symbols[z] for z in missing)}",
                where=where,
                mend="it knows " + " ".join(chemical_symbols[z] for z in sorted(known)),
            )
        if structure.charge and not self.entry.takes_charge:
            raise CalculatorError(
                f"{self.name} would ignore the charge of {structure.charge:+g} e",
                where=where,
                mend="set charge: 0 or use a calculator that takes a charge",
            )
        if not np.isfinite(structure.positions).all() or not np.isfinite(structure.cell).all():
            raise CalculatorError("positions or cell are not finite", where=where)
        if why := self.entry.refuse(self.settings, structure):
            raise CalculatorError(why, where=where)
