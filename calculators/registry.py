"""Every calculator al-loop knows by name: its own, and those of other packages (``calculators.plugins``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alcore.errors import CalculatorError
from alcore.identity import json_sha256
from calculators import ase_factory, chgnet, cp2k, emt, espresso, gpaw, mace, tblite
from calculators.base import CalculatorEntry, ResolvedCalculator, as_it_is
from calculators.plugins import Plugin, load_plugin, plugin_names
from calculators.vasp import entry as vasp

REGISTRY: dict[str, CalculatorEntry] = {
    entry.name: entry
    for entry in (
        emt.ENTRY,
        tblite.ENTRY,
        vasp.ENTRY,
        espresso.ENTRY,
        cp2k.ENTRY,
        gpaw.ENTRY,
        chgnet.ENTRY,
        mace.ENTRY,
        ase_factory.ENTRY,
    )
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
    """One calculator for a person.

    Attributes:
        name: as a run file writes it.
        description: one line.
        unavailable: "" where it can run here, else why not and the mend.
        takes_charge: whether it computes charged structures.
        settings: in the order they are declared in.
        retries: the rungs of its ladder in order, as text.
        provokes: the failures that its contract test provokes.
        origin: the package a plug-in comes from, with its version; "" for al-loop's own.
    """

    name: str
    description: str
    unavailable: str
    takes_charge: bool = False
    settings: tuple[SettingDescription, ...] = ()
    retries: tuple[str, ...] = ()
    provokes: tuple[str, ...] = ()
    origin: str = ""


def find_calculator(name: str) -> CalculatorEntry | None:
    """The calculator of this name, or None; a plug-in cannot take the place of one of al-loop's own."""
    if name in REGISTRY:
        return REGISTRY[name]
    plugin = load_plugin(name)
    return plugin.entry if plugin is not None else None


def get_calculator(name: str) -> CalculatorEntry:
    """Raises:
    CalculatorError: no such calculator (names the nearest one, and all of them), or a plug-in that cannot be used.
    """
    if (entry := find_calculator(name)) is not None:
        return entry
    if (plugin := load_plugin(name)) is not None:
        raise CalculatorError(plugin.problem, where=f"calculator {name}", mend="mend or uninstall that package")
    known = [*REGISTRY, *(other for other in plugin_names() if other not in REGISTRY)]
    near = get_close_matches(name.lower(), known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    mend = f"{meant}known: {', '.join(known)}"
    raise CalculatorError(f"there is no calculator {name!r}", where="calculator.name", mend=mend)


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
    if entry.complete is as_it_is and (why := entry.unavailable(None)):
        raise CalculatorError(why, where=f"calculator {name}")
    checked = entry.complete(checked)  # says itself what is missing: settings may name another program
    facts = entry.facts(checked)
    return ResolvedCalculator(entry=entry, settings=checked, facts=facts, fingerprint=json_sha256(facts))


def _problem(entry: CalculatorEntry, detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        said = str(detail["msg"]).removeprefix("Value error, ")  # pydantic's words for our own
        return f"{key}: {said}" if key else said
    known = list(entry.settings_model.model_fields)
    near = get_close_matches(key, known, n=1)
    return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else f", known: {', '.join(known) or 'none'}")


def describe(entry: CalculatorEntry, origin: str = "") -> CalculatorDescription:
    """What ``entry`` is, whether it can run here, and what can be set; computes nothing."""
    schema = entry.settings_model.model_json_schema()
    properties, shared = schema.get("properties", {}), schema.get("$defs", {})
    settings = tuple(
        SettingDescription(
            name=name,
            type=_type_text(properties[name], shared),
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
        retries=tuple(f"after {' or '.join(rung.after)}: {rung.name}" for rung in entry.retries),
        provokes=tuple(entry.sabotage),
        origin=origin,
    )


_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
_WORDS = {"string": "text", "boolean": "true | false", "object": "mapping"}


def _type_text(schema: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """A JSON schema as a person says it: ``whole number ≥ 1 | null``."""
    if "$ref" in schema:
        return _type_text(shared[schema["$ref"].rpartition("/")[2]], shared)
    if "enum" in schema or "const" in schema:
        return " | ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return " | ".join(_type_text(part, shared) for part in alternatives)
    kind = str(schema.get("type", "any"))
    if kind == "array":
        several = {_type_text(part, shared): None for part in schema.get("prefixItems", [schema.get("items", {})])}
        return f"list of {' and '.join(several)}"
    if kind == "object" and isinstance(values := schema.get("additionalProperties"), Mapping):
        return f"mapping to {_type_text(values, shared)}"
    if kind in ("number", "integer"):
        bounds = [f"{sign} {schema[bound]:g}" for bound, sign in _BOUNDS.items() if bound in schema]
        return " ".join(["whole number" if kind == "integer" else "number", ", ".join(bounds)]).strip()
    return str(schema.get("format") or _WORDS.get(kind, kind))


def describe_plugin(plugin: Plugin) -> CalculatorDescription:
    """Likewise for one from another package; whatever is wrong with it is why it is unavailable."""
    problem = plugin.problem
    if plugin.name in REGISTRY:
        problem = "not used: al-loop has a calculator of that name (its package must rename it)"
    elif plugin.entry is not None:
        try:
            return describe(plugin.entry, plugin.origin)
        except Exception as error:  # its own functions may fail in any way
            problem = " ".join(f"cannot be described: {type(error).__name__}: {error}".split())
    return CalculatorDescription(name=plugin.name, description="", unavailable=problem, origin=plugin.origin)


def describe_all() -> list[CalculatorDescription]:
    """Al-loop's own calculators in the registry's order, then those of other packages, broken ones included."""
    plugins = [plugin for name in plugin_names() if (plugin := load_plugin(name)) is not None]
    return [*(describe(entry) for entry in REGISTRY.values()), *(describe_plugin(plugin) for plugin in plugins)]
