"""Outcomes on disk: a calculation that has ended is in a file of its folder before anybody hears of it.

``outcome.npz`` appears in one step, complete, or not at all, and says which label of which calculator it is the outcome
of. Whoever is asked for that label next looks for it: in the folder of its own run, and in those of the others.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alcore.errors import CalculatorError
from alcore.files import write_whole
from calculators.executors.outcome import JobOutcome

if TYPE_CHECKING:
    from calculators.measure import Measurement

OUTCOME = "outcome.npz"
ERROR = "error.txt"
"""In the folder of a calculation whose label was judged and is not ``ok``: its outcome is no answer any more."""
JOBS = "jobs"
"""Folder of a run in which its queue or pyiron jobs lie; others lie in the run's folder itself."""


class RefusedError(CalculatorError):
    """The calculator could not even be set up where the job ran; more jobs would end the same way."""


def folder_name(key: str) -> str:
    """How the folders of a label's calculations begin."""
    return key[:16]


def job_stem(key: str) -> str:
    """How the names of a label's jobs begin: letters, digits and underscores."""
    return f"label_{''.join(c for c in key if c.isascii() and c.isalnum())[:24]}"


def write_outcome(
    folder: Path, outcome: JobOutcome, *, token: str = "", key: str = "", fingerprint: str = "", refused: str = ""
) -> None:
    """In one step: a reader sees all of it or nothing.

    Args:
        folder: of the calculation; it may be new, and so may the one above.
        outcome: how it ended.
        token: the job's, if it is one.
        key, fingerprint: of the label and its calculator.
        refused: why the calculator could not even be set up; the outcome then does not count.
    Raises:
        OSError: it cannot be written.
    """
    import numpy as np

    arrays: dict[str, Any] = {}
    answer = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
    if outcome.value is not None:
        values = {field.name: getattr(outcome.value, field.name) for field in fields(outcome.value)}
        inspection = values["inspection"]
        values["inspection"] = {field.name: getattr(inspection, field.name) for field in fields(inspection)}
        answer["value"] = _encoded(values, arrays)
    answer |= {"token": token, "key": key, "fingerprint": fingerprint}
    answer |= {"kind": "refused", "text": refused} if refused else {}
    arrays["json"] = np.frombuffer(json.dumps(answer, default=repr).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(folder / OUTCOME, buffer.getvalue(), n_folders=3)


def read_outcome(folder: Path, **wanted: str) -> JobOutcome | None:
    """The outcome in ``folder``; None if there is none, it is damaged, or it is that of something else.

    Args:
        folder: of the calculation.
        wanted: what it must say of itself: ``token``, ``key``, ``fingerprint``.
    Raises:
        RefusedError: the calculator where it ran was not what the fingerprint says.
    """
    import numpy as np

    try:
        with np.load(folder / OUTCOME, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        answer = json.loads(arrays.pop("json").tobytes())
        if any(answer.get(name) != value for name, value in wanted.items()):
            return None
        refused = answer["text"] if answer["kind"] == "refused" else None
        value = answer.pop("value")
        told = {field.name: answer[field.name] for field in fields(JobOutcome) if field.name in answer}
        outcome = JobOutcome(**told, value=None if value is None else _to_measurement(_decoded(value, arrays)))
    except Exception:  # there is none, it was never written by us, or not all of it has arrived
        return None
    if refused is not None:
        raise RefusedError(str(refused))
    return outcome


def went_well(outcome: JobOutcome) -> bool:
    """Whether there are numbers; nobody has looked at them yet."""
    return outcome.kind == "done" and outcome.value.status == "ok"


def concluded(folder: Path) -> bool:
    """Whether a label was made of the outcome there, and was not ``ok``."""
    return os.path.exists(folder / ERROR)  # False where we may not look


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder in which a label was, or is being, computed.

    Attributes:
        folder: of the calculation.
        home: of the run whose calculation it is.
        is_job: whether it was handed to pyiron.
    """

    folder: Path
    home: Path
    is_job: bool


def places(key: str, home: Path, beside: Path | None = None) -> Iterator[Place]:
    """Where calculations of ``key`` lie, those of ``home`` first, the latest first; by name alone, nothing is opened.

    Args:
        key: of the label.
        home: folder of the run that asks.
        beside: the folder in which those of all runs lie.
    """
    others = [Path(entry) for entry in _entries(beside)] if beside is not None else []
    for run in (home, *sorted(run for run in others if run.resolve() != home.resolve())):
        found = [Place(folder=Path(entry), home=run, is_job=False) for entry in _entries(run, folder_name(key))]
        for entry in _entries(run / JOBS, job_stem(key)):
            if entry.name.endswith("_hdf5"):
                name = entry.name.removesuffix("_hdf5")
                found.append(Place(folder=Path(entry) / name, home=run, is_job=True))
        yield from sorted(found, key=_made, reverse=True)


def _entries(folder: Path, start: str = "") -> list[os.DirEntry[str]]:
    """Folders in ``folder`` whose names begin so; none if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name.startswith(start) and entry.is_dir()]
    return []


def _made(place: Place) -> float:
    with suppress(OSError):
        return place.folder.stat().st_mtime
    return 0.0


def finished(place: Place, key: str, fingerprint: str, own: Path) -> JobOutcome | None:
    """The outcome there, if it answers whoever asks for this label from the run ``own``.

    What was judged and found wanting is no answer any more. Of another run only what went well is one: how a
    calculation fails depends on the time, the memory and the retries that the run grants.
    """
    if concluded(place.folder):
        return None
    try:
        outcome = read_outcome(place.folder, key=key, fingerprint=fingerprint)
    except RefusedError:
        return None
    if outcome is None or outcome.kind != "done":
        return None
    return outcome if went_well(outcome) or place.home == own else None


def _encoded(value: Any, arrays: dict[str, Any]) -> Any:
    """Plain values, with each array moved to ``arrays``."""
    import numpy as np

    if isinstance(value, np.ndarray) and value.dtype != object:
        arrays[name := f"array{len(arrays)}"] = value
        return {"__array__": name}
    if isinstance(value, np.ndarray | np.generic):
        return _encoded(value.tolist(), arrays)
    if isinstance(value, Mapping):
        return {str(key): _encoded(part, arrays) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(part, arrays) for part in value]
    return value


def _decoded(value: Any, arrays: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__array__"}:
            return arrays[value["__array__"]]
        return {key: _decoded(part, arrays) for key, part in value.items()}
    return [_decoded(part, arrays) for part in value] if isinstance(value, list) else value


def _to_measurement(values: dict[str, Any]) -> Measurement:
    from calculators.base import Inspection
    from calculators.measure import Measurement

    values["inspection"] = Inspection(**values["inspection"])
    values["geometries"] = tuple(tuple(geometry) for geometry in values["geometries"])
    values["attempts"] = tuple(values["attempts"])
    return Measurement(**values)
