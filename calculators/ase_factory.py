"""Anything that returns an ASE calculator: ``factory: "package.module:function"``."""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo

from alcore.errors import CalculatorError
from alcore.identity import sha256_hex
from calculators.base import CalculatorEntry, CalculatorSettings, _against_base

if TYPE_CHECKING:
    from alcore.types import Structure


def _default_folder(path: Path | None, info: ValidationInfo) -> Path | None:
    return _against_base(path if path is not None else Path() if (info.context or {}).get("base") else None, info)


class AseSettings(CalculatorSettings):
    factory: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:function; called once a label, in the label's folder; "
        "a parameter named charge receives the structure's charge in e",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the factory")
    packages: list[str] = Field(
        default_factory=list, description="distributions whose version moves the energy, e.g. [gpaw]"
    )
    path: Annotated[Path | None, AfterValidator(_default_folder)] = Field(
        None, validate_default=True, description="folder of a module that is not installed; null: the run file's"
    )


def _import(settings: AseSettings) -> Callable[..., Any]:
    """The factory.

    Raises:
        CalculatorError: it cannot be imported.
    """
    module_name, _, function_name = settings.factory.partition(":")
    folder = str(settings.path) if settings.path is not None else None
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)  # last, so that a user's file never hides an installed package
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a user's module can fail in any way
        raise CalculatorError(
            f"cannot import {settings.factory}: {type(error).__name__}: {error}",
            where="calculator.factory",
            mend="write package.module:function; a module that is not installed is looked for in settings.path",
        ) from error
    if not callable(factory):
        raise CalculatorError(f"{settings.factory} is not callable", where="calculator.factory", mend="name a function")
    return factory  # type: ignore[no-any-return]


def _takes_charge(factory: Callable[..., Any]) -> bool:
    try:
        return "charge" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # builtins have no signature
        return False


def make(settings: AseSettings, structure: Structure | None = None) -> Any:
    factory, arguments = _import(settings), dict(settings.settings)
    if structure is not None and structure.charge:
        arguments["charge"] = structure.charge
    return factory(**arguments)


def unavailable(settings: AseSettings | None) -> str | None:
    if settings is None:
        return None
    try:
        _import(settings)
        fingerprint_facts(settings)
    except CalculatorError as error:
        return str(error)
    return None


@cache
def _distribution(top_level: str) -> str | None:
    return next(iter(packages_distributions().get(top_level, [])), None)


def _source_sha256(module_name: str) -> str:
    """Hash of the module's source and, if it lies in a package, of all the package's Python files."""
    own = Path(str(sys.modules[module_name].__file__))
    top = sys.modules[module_name.partition(".")[0]]
    folders = [Path(folder) for folder in getattr(top, "__path__", [])]
    files = sorted({own, *(file for folder in folders for file in folder.rglob("*.py"))})
    return sha256_hex(b"".join(file.name.encode() + b"\0" + file.read_bytes() + b"\0" for file in files))


def fingerprint_facts(settings: AseSettings) -> dict[str, Any]:
    """The factory, its arguments, and the version of its package; the hash of its source where it is not installed."""
    _import(settings)
    module_name = settings.factory.partition(":")[0]
    origin = Path(getattr(sys.modules[module_name], "__file__", None) or sys.executable).resolve()
    libraries = [Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")]
    installed = any(origin.is_relative_to(library) for library in libraries)
    distribution = _distribution(module_name.partition(".")[0]) if installed else None
    own = f"{distribution} {version(distribution)}" if distribution else f"sha256:{_source_sha256(module_name)}"
    try:
        packages = {name: version(name) for name in sorted(settings.packages)}
    except PackageNotFoundError as error:
        raise CalculatorError(
            f"package {error.name} is not installed", where="calculator.packages", mend="install it or leave it out"
        ) from error
    return {
        "code": settings.factory,
        "version": own,
        "settings": settings.model_dump(mode="json")["settings"],
        "packages": packages,
    }


def refuse(settings: AseSettings, structure: Structure) -> str | None:
    if structure.charge and not _takes_charge(_import(settings)):
        return f"{settings.factory} has no parameter `charge`, it would ignore the charge of {structure.charge:+g} e"
    return None


def warm_up(settings: AseSettings) -> None:
    _import(settings)


ENTRY = CalculatorEntry(
    name="ase",
    description="any ASE calculator, made by a function you name: package.module:function",
    settings_model=AseSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    takes_charge=True,
    warm_up=warm_up,
    refuse=refuse,
)
