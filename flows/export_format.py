"""The files of an export: exact JSON, and a manifest that says what belongs to it.

JSON has no bytes, arrays or infinities: they stand as objects with one key that starts with ``%``. A user's key that
starts so has a second one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from alcore.errors import InputError
from alcore.identity import label_key
from alcore.plain import to_plain
from alcore.types import Label

T = TypeVar("T")
Watch = Callable[[Sequence[Any], str], Iterable[Any]]
"""Shows how far one is with a list of things (what is done to them, in words) while it is gone through."""

KIND, VERSION = "al-loop run", 1
MANIFEST, RUN, GENERATIONS, LABELS, STEPS, MODELS = (
    "manifest.json",
    "run.json",
    "generations.jsonl",
    "labels.jsonl",
    "steps.jsonl",
    "models.jsonl",
)
RECORDS = (RUN, GENERATIONS, LABELS, STEPS, MODELS)
"""What an import reads, beside the weights; everything else is for other programs."""
WEIGHTS = "weights"
SHA256 = re.compile(r"[0-9a-f]{64}")


def unwatched(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Shows nothing."""
    return items


def unproven_key(label: Label) -> str:
    """That of a label which somebody brought along without saying which calculator made it (``alcore.dataset``)."""
    return label_key(label.structure, f"{label.fingerprint}, unproven")


# --- exact JSON -------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """One line of strict JSON from which ``from_json`` makes the same plain values, floats and arrays bit for bit.

    Raises:
        TypeError: it holds what is not plain (``alcore.plain``).
    """
    return json.dumps(_tagged(to_plain(value)), ensure_ascii=False, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """Undoes ``to_json``; arrays are read-only.

    Raises:
        ValueError: no JSON, or none that ``to_json`` writes.
    """
    try:
        return _untagged(json.loads(text, parse_constant=_refuse_constant))
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _tagged(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"%float": repr(float(value))}
    if isinstance(value, bytes):
        return {"%bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return {"%array": _array_to_json(value)}
    if isinstance(value, Mapping):
        return {f"%{key}" if key.startswith("%") else key: _tagged(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    return value


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "%float" in value:
        return float(value["%float"])
    if "%bytes" in value:
        return base64.b64decode(value["%bytes"], validate=True)
    if "%array" in value:
        return _array_from_json(value["%array"])
    return {key.removeprefix("%"): _untagged(item) for key, item in value.items()}


def _array_to_json(array: NDArray[Any]) -> dict[str, Any]:
    """``values`` in C order where JSON can say them exactly, else the bytes."""
    if array.dtype.hasobject:
        raise TypeError("an array of objects is no plain value")
    entry = {"dtype": array.dtype.str, "shape": list(array.shape)}
    readable = array.dtype.kind in "biu" or (array.dtype.kind == "f" and array.itemsize <= 8)
    if readable and np.isfinite(array).all():
        return entry | {"values": array.ravel().tolist()}
    return entry | {"base64": base64.b64encode(array.tobytes()).decode()}


def _array_from_json(entry: Mapping[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(str(entry["dtype"]))
    if dtype.hasobject:
        raise ValueError("an array of objects is no plain value")
    if "values" in entry:
        array = np.array(entry["values"], dtype=dtype)
    else:
        array = np.frombuffer(base64.b64decode(entry["base64"], validate=True), dtype=dtype).copy()
    array = array.reshape(entry["shape"])
    array.setflags(write=False)
    return array


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


# --- the manifest -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an export holds.

    Attributes:
        run: the run's name.
        al_loop: the version that wrote it.
        schema_version: of that version's database.
        files: sha256 of every other file of the folder, by its path in it (``/`` between folders).
    """

    run: str
    al_loop: str
    schema_version: int
    files: Mapping[str, str]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Last of all files: with it, the export is whole."""
    values = {"kind": KIND, "version": VERSION} | to_plain(manifest)
    (folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path, schema_version: int) -> Manifest:
    """The manifest of an export that this al-loop can read; of its files, only the names are checked.

    Args:
        folder: the export.
        schema_version: of this al-loop's database.

    Raises:
        InputError: there is none, it is not one, or a newer al-loop wrote it.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), mend="name the folder that `al-loop export` wrote")
    if not file.is_file() or file.is_symlink():
        mend = "export again: without it an export is not whole, or by an earlier al-loop"
        raise InputError("no such file", where=str(file), mend=mend)
    try:
        values = json.loads(file.read_bytes())
        kind, version = values["kind"], values["version"]
        known = kind == KIND and version <= VERSION
        manifest = Manifest(**{name: values[name] for name in Manifest.__dataclass_fields__}) if known else None
        texts = [] if manifest is None else [manifest.run, manifest.al_loop, *manifest.files, *manifest.files.values()]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("not a text")
        newer = kind == KIND and (version > VERSION or values["schema_version"] > schema_version)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("this is no manifest of an export", where=str(file), mend="export again") from error
    if newer:
        writer = f"al-loop {values.get('al_loop', '')}".strip()
        raise InputError(f"written by a newer al-loop ({writer})", where=str(file), mend="update al-loop")
    if manifest is None:
        raise InputError(f"this is a manifest of {kind!r}, not of {KIND!r}", where=str(file), mend="export again")
    return manifest


def check_files(folder: Path, manifest: Manifest, watch: Watch = unwatched) -> None:
    """Every file that the manifest names is there, whole, and nothing else is.

    Raises:
        InputError: the first that is not so.
    """

    def wrong(name: str, what: str, mend: str = "copy or export it again") -> InputError:
        return InputError(what, where=str(folder / name), mend=mend)

    for name in manifest.files:
        if not is_inside(name):
            raise InputError(f"names {name!r}, which is not in this folder", where=str(folder / MANIFEST))
    there = set(files_below(folder)) - {MANIFEST}
    for name in sorted({*RECORDS, *manifest.files}):
        if name not in manifest.files:
            raise InputError(f"does not name {name}", where=str(folder / MANIFEST), mend="export again")
        if (link := first_link(folder, name)) is not None:
            raise wrong(link, "is a link: an export holds its files itself")
        if name not in there:
            raise wrong(name, "this file of the export is missing")
    for name in sorted(there - set(manifest.files)):
        raise wrong(name, "this is no part of the export", mend="remove it, or export again")
    for name in watch(sorted(manifest.files), "checking files"):
        if sha256_of(folder / name) != manifest.files[name]:
            raise wrong(name, "damaged, or changed since the export")


def is_inside(name: str) -> bool:
    """Whether a path of a manifest stays in its folder, and is written the one way that we write it."""
    path = PurePosixPath(name)
    plain = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name
    return plain and not re.search(r"[\\:\0]", name)


def first_link(folder: Path, name: str) -> str | None:
    """The first part of a path in the folder that is a link, or None."""
    parts = PurePosixPath(name).parts
    places = ("/".join(parts[: k + 1]) for k in range(len(parts)))
    return next((place for place in places if (folder / place).is_symlink()), None)


def files_below(folder: Path) -> Iterator[str]:
    """Paths of everything below the folder that is not itself a folder; links are not followed."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        yield from ((Path(root) / name).relative_to(folder).as_posix() for name in [*files, *links])


def sha256_of(file: Path) -> str:
    """Raises:
    InputError: it is no regular file, or cannot be read.
    """
    try:
        if not file.is_file():  # a pipe would never end
            raise OSError("no regular file")
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(file)) from error
