"""Calculators from other packages: the entry point group ``al_loop.calculators``.

An entry point has the name of its calculator and loads to a ``CalculatorEntry`` or to a function that returns one. What
is wrong with a plug-in is a text beside its name; it never stops anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from pydantic import BaseModel

from calculators.base import CalculatorEntry

GROUP = "al_loop.calculators"


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One calculator that another package offers.

    Attributes:
        name: of the entry point.
        origin: the package and its version.
        entry: the calculator, or None.
        problem: why there is none and how to mend that, or "".
    """

    name: str
    origin: str
    entry: CalculatorEntry | None = None
    problem: str = ""


@cache
def _found() -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points by name; nothing is imported. A process looks once: that takes some ten milliseconds."""
    by_name: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        by_name[point.name] = (*by_name.get(point.name, ()), point)
    return by_name


def plugin_names() -> list[str]:
    """What is on offer, sound or not; imports none of it."""
    return list(_found())


@cache
def load_plugin(name: str) -> Plugin | None:
    """The plug-in of this name, imported; None if no package offers one. Raises nothing."""
    points = _found().get(name)
    if not points:
        return None
    origin = ", ".join(_origin(point) for point in points)
    if len(points) > 1:
        return Plugin(
            name=name, origin=origin, problem=f"more than one package offers it: {origin} (remove all but one)"
        )
    try:
        return Plugin(name=name, origin=origin, entry=_load(points[0]))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: somebody else's module can fail in any way
        said = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"the plug-in {points[0].value} of {origin} cannot be used: {said}"
        return Plugin(name=name, origin=origin, problem=problem)


def _load(point: EntryPoint) -> CalculatorEntry:
    """Raises:
    TypeError, ValueError: it is not what it should be; and whatever its module raises.
    """
    loaded = point.load()
    if callable(loaded):
        loaded = loaded()
    if not isinstance(loaded, CalculatorEntry):
        raise TypeError(f"it is {type(loaded).__name__}, not a calculators.base.CalculatorEntry")
    if loaded.name != point.name:
        raise ValueError(f"its entry point is called {point.name!r}, its CalculatorEntry {loaded.name!r}")
    if not (isinstance(loaded.settings_model, type) and issubclass(loaded.settings_model, BaseModel)):
        raise TypeError("its settings_model is not a subclass of calculators.base.CalculatorSettings")
    return loaded


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.module


def forget() -> None:
    """Look again: for tests, and after a package was installed while the process runs."""
    _found.cache_clear()
    load_plugin.cache_clear()
