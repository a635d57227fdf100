"""Who works on a run, and with what: written into its record each time a process begins or goes on with it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from alcore.identity import json_sha256, sha256_hex
from alcore.types import RunRecord, Sitting
from flows import __version__, environment

PACKAGES = ("al-loop", "torch", "mace-torch", "e3nn", "ase", "numpy", "scipy", "prefect", "mongoengine")
OWN = ("alcore", "calculators", "flows", "storage")


def new_sitting(settings: Mapping[str, Any], before: RunRecord | None) -> Sitting:
    """The sitting that begins now.

    Args:
        settings: the run's, plain.
        before: the run as it stands, if it exists.
    """
    then = {} if before is None else flat(before.settings)
    now = flat(settings)
    absent = [key for key in then if key not in now]
    changed = {key: [then.get(key), now.get(key)] for key in [*now, *absent] if then.get(key) != now.get(key)}
    return Sitting(
        started=environment.now_iso(),
        host=environment.host(),
        versions=versions(),
        code_sha256=code_sha256(),
        settings_sha256=json_sha256(settings),
        changed={} if before is None else changed,
    )


def flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested plain values by their dotted keys, as ``--set`` takes them."""
    if isinstance(values, Mapping):
        parts = values.items()
    elif isinstance(values, list | tuple) and any(isinstance(item, Mapping) for item in values):
        parts = {str(k): item for k, item in enumerate(values)}.items()
    else:
        return {key: values}
    return {name: value for k, item in parts for name, value in flat(item, f"{key}.{k}" if key else str(k)).items()}


def versions() -> dict[str, str]:
    """Of Python and the packages that have a part in a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = __version__ if package == "al-loop" else "not installed"
    return found


@cache
def code_sha256() -> str:
    """Hash of the source files of al-loop as this process has them."""
    folders = [Path(str(import_module(name).__file__)).parent for name in OWN]
    parts = [
        f"{folder.name}/{file.relative_to(folder).as_posix()}".encode() + b"\0" + file.read_bytes()
        for folder in folders
        for file in sorted(folder.rglob("*.py"))
    ]
    return sha256_hex(b"\0".join(parts))
