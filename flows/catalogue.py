"""``al-loop calculators``: what there is, what one of them takes, and the contract test on one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alcore.errors import InputError

if TYPE_CHECKING:
    from alcore.types import Structure
    from calculators.contract import ContractCheck, Tolerances
    from calculators.registry import CalculatorDescription, SettingDescription

KEPT = {True: "kept  ", False: "BROKEN"}
CHECK_COLUMN = 38


def refuse_mixture(name: str | None, test: str | None, options: Sequence[object]) -> None:
    """Raises:
    InputError: a calculator to describe and one to test, or an option of the test without one.
    """
    if test is not None and name is not None:
        raise InputError("a name and --test", where="al-loop calculators", mend="give one of them")
    if test is None and any(option is not None and option != [] for option in options):
        raise InputError("an option that belongs to the test", where="al-loop calculators", mend="add --test NAME")


def list_calculators(console: Console, as_json: bool = False) -> None:
    """Every calculator, whether it can run here and if not why; plug-ins that cannot be used included."""
    from calculators.registry import describe_all

    entries = describe_all()
    if as_json:
        print(_json([dataclasses.asdict(entry) for entry in entries]))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("calculator", no_wrap=True)
    for column in ("here", "what it is"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        origin = f" (plug-in: {entry.origin})" if entry.origin else ""
        table.add_row(entry.name, Text(entry.unavailable or "yes"), Text((entry.description + origin).strip()))
    console.print(table)


def show_calculator(console: Console, name: str, as_json: bool = False) -> None:
    """One calculator: its settings with type, default and meaning, its ladder, whether it can run here.

    Raises:
        CalculatorError: there is no such calculator, or a plug-in that cannot be used.
    """
    from calculators.plugins import load_plugin
    from calculators.registry import REGISTRY, describe, describe_plugin, get_calculator

    entry, plugin = get_calculator(name), load_plugin(name)
    shown = describe(entry) if plugin is None or name in REGISTRY else describe_plugin(plugin)
    if as_json:
        print(_json(dataclasses.asdict(shown)))
        return
    console.print(_facts(shown))
    if shown.settings:
        console.print()
        console.print(_settings(shown.settings))


def _facts(shown: CalculatorDescription) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [(shown.name, shown.description), ("here", shown.unavailable or "can run")]
    rows += [("plug-in", shown.origin)] if shown.origin else []
    rows += [("charge", "taken" if shown.takes_charge else "not taken: charged structures are refused")]
    rows += [("retries", "\n".join(f"{i}. {rung}" for i, rung in enumerate(shown.retries, 1)) or "none")]
    rows += [] if shown.settings else [("settings", "none")]
    for title, text in rows:
        table.add_row(title, Text(text))
    return table


def _settings(settings: Sequence[SettingDescription]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("type", overflow="fold", max_width=22)
    table.add_column("default", overflow="fold", max_width=16)
    table.add_column("meaning", overflow="fold")
    for setting in settings:
        default = "required" if setting.required else _json(setting.default, indent=None)
        table.add_row(setting.name, Text(setting.type), Text(default), Text(setting.description))
    return table


def _json(value: Any, indent: int | None = 1) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)


def check_calculator(
    console: Console,
    name: str,
    overrides: Sequence[str] = (),
    structure: Path | None = None,
    tolerances: tuple[float | None, float | None] = (None, None),
    as_json: bool = False,
) -> bool:
    """Run the contract test, a line a check as soon as it is decided; whether every promise was kept.

    Args:
        console: where the lines go.
        name: the calculator.
        overrides: ``key=value`` of its settings.
        structure: a file; None: a few atoms of elements it knows.
        tolerances: in eV and eV/Å; None: the defaults.
        as_json: all checks at the end instead.
    Raises:
        InputError: a setting or a file that does not fit, or it cannot run here.
    """
    from calculators.contract import run_contract
    from flows.runfile import apply_override

    settings: dict[str, Any] = {}
    for override in overrides:
        apply_override(settings, override)
    tell = None if as_json else lambda check: console.print(_line(check), soft_wrap=True)
    asked = _structure(structure) if structure is not None else None
    checks = run_contract(name, settings, asked, tolerances=_tolerances(tolerances), on_check=tell)
    if as_json:
        print(_json([check._asdict() for check in checks]))
    return all(check.passed for check in checks)


def _line(check: ContractCheck) -> Text:
    text = Text(KEPT[check.passed], style="" if check.passed else "bold red")
    return text.append(f"  {check.check:<{CHECK_COLUMN}}  {check.detail}", style="not bold default")


def _tolerances(given: tuple[float | None, float | None]) -> Tolerances:
    from calculators.contract import Tolerances

    names = ("energy_ev", "force_ev_per_ang")
    values = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    for value in values.values():
        if not value > 0:
            raise InputError(f"the tolerance {value:g} is not positive", where="al-loop calculators --test")
    return Tolerances(**values)


def _structure(file: Path) -> Structure:
    from alcore.endpoints import read_atoms
    from alcore.types import Structure

    atoms = read_atoms(file, "--structure")
    return Structure.from_atoms(atoms, charge=float(atoms.info.get("charge", 0.0)))
