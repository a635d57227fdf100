"""Every calculator al-loop knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alcore.errors import CalculatorError
from alcore.identity import json_sha256
from calculators import ase_factory, chgnet, emt, mace, tblite
from calculators.base import CalculatorEntry, ResolvedCalculator

REGISTRY: dict[str, CalculatorEntry] = {
    entry.name: entry for entry in (emt.ENTRY, tblite.ENTRY, chgnet.ENTRY, mace.ENTRY, ase_factory.ENTRY)
}


@dataclass(frozen=True, kw_only=True)
class SettingDescription:
    """One setting: its type as text, its default (None where it is ``required``) and what it means, with its unit."""

    name: str
    type: str
    default: Any
    required: bool
    description: str


@dataclass(frozen=True, kw_only=True)
class CalculatorDescription:
    """One calculator for a person; ``unavailable`` is "" where it can run here, else why not and the mend."""

    name: str
    description: str
    unavailable: str
    takes_charge: bool
    settings: tuple[SettingDescription, ...]


def get_calculator(name: str) -> CalculatorEntry:
    """Raises:
    CalculatorError: no such calculator; names the nearest one, and all of them.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    near = get_close_matches(name.lower(), REGISTRY, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise CalculatorError(
        f"there is no calculator {name!r}", where="calculator.name", mend=f"{meant}known: {', '.join(REGISTRY)}"
    )


def resolve(name: str, settings: Mapping[str, Any] | None = None, base: Path | None = None) -> ResolvedCalculator:
    """A calculator with validated settings and its fingerprint.

    Args:
        name: as in the registry.
        settings: plain values, as in a run file; None: all defaults.
        base: folder that relative paths refer to (the run file's).
    Raises:
        CalculatorError: unknown calculator, a setting that does not fit (all of them are named), a missing file, or
            a program that is not installed.
    """
    entry = get_calculator(name)
    try:
        checked = entry.settings_model.model_validate(dict(settings or {}), context={"base": base})
    except ValidationError as error:
        problems = "; ".join(_problem(entry, detail) for detail in error.errors())
        raise CalculatorError(problems, where=f"calculator.settings of {name}") from None
    if why := entry.unavailable(None):
        raise CalculatorError(why, where=f"calculator {name}")
    checked = entry.complete(checked)
    facts = entry.facts(checked)
    return ResolvedCalculator(entry=entry, settings=checked, facts=facts, fingerprint=json_sha256(facts))


def _problem(entry: CalculatorEntry, detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        return f"{key}: {detail['msg']}"
    known = list(entry.settings_model.model_fields)
    near = get_close_matches(key, known, n=1)
    return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else f", known: {', '.join(known) or 'none'}")


def describe(entry: CalculatorEntry) -> CalculatorDescription:
    """What ``entry`` is, whether it can run here, and what can be set; computes nothing."""
    properties = entry.settings_model.model_json_schema().get("properties", {})
    settings = tuple(
        SettingDescription(
            name=name,
            type=_type_text(properties[name]),
            default=None if field.is_required() else field.get_default(call_default_factory=True, validated_data={}),
            required=field.is_required(),
            description=field.description or "",
        )
        for name, field in entry.settings_model.model_fields.items()
    )
    return CalculatorDescription(
        name=entry.name,
        description=entry.description,
        unavailable=entry.unavailable(None) or "",
        takes_charge=entry.takes_charge,
        settings=settings,
    )


def _type_text(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type_text(part) for part in schema["anyOf"])
    return str(schema.get("format") or schema.get("type", "any"))


def describe_all() -> list[CalculatorDescription]:
    """Every registered calculator, in the registry's order."""
    return [describe(entry) for entry in REGISTRY.values()]
