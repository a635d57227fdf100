"""What a VASP run left behind: electronic steps, version, how it ended, and the name of its error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from calculators.base import Inspection

VERSION = re.compile(r"(?:vasp\.)?(\d+\.\d+\.\d+)")
_ITERATION = re.compile(r"-\s*Iteration\s+\d+\(\s*(\d+)\)")
_NELM = re.compile(r"^\s*NELM\s*=\s*(\d+)", re.MULTILINE)
_UNCONVERGED = ("EDIFF was not reached", "hard stop was set")
_LOUD = re.compile(r"error|fatal|not found|no such|bad news|killed|fault", re.IGNORECASE)
_ORNAMENTS = set("EROWANIGDVCUS# !")
_BOX_WORDS = re.compile(r"[a-z]{3}|[A-Z]{4}")
TAIL_CHARACTERS = 20_000


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """The last self-consistency cycle: its steps, NELM (None if not said), and the version of VASP ("" likewise)."""

    steps: int
    limit: int | None
    version: str


def is_whole(path: Path) -> bool:
    """Whether a vasprun.xml is there and ends as it should."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 200))
            return file.read().rstrip().endswith(b"</modeling>")
    except OSError:
        return False


def cycle_of_xml(path: Path) -> Cycle:
    """As far as the file goes; one that was cut off gives what came before."""
    steps, limit, version = 0, None, ""
    try:
        for event, element in ElementTree.iterparse(path, events=("start", "end")):
            if event == "start":
                steps = 0 if element.tag == "calculation" else steps
                continue
            name, text = element.get("name"), (element.text or "").strip()
            if element.tag == "scstep":
                steps += 1
                element.clear()
            elif element.tag == "i" and name == "NELM":
                limit = int(text)
            elif element.tag == "i" and name == "version" and not version:
                version = text
    except (ElementTree.ParseError, OSError, ValueError):
        pass
    return Cycle(steps=steps, limit=limit, version=_plain(version))


def cycle_of_outcar(text: str) -> Cycle:
    """The same from the text of OUTCAR, which VASP writes out earlier."""
    steps = [int(match[1]) for match in _ITERATION.finditer(text)]
    limit = _NELM.search(text)
    return Cycle(steps=steps[-1] if steps else 0, limit=int(limit[1]) if limit else None, version=_plain(text[:200]))


def _plain(version: str) -> str:
    """``6.4.2`` of ``vasp.6.4.2 20Jul23``."""
    match = VERSION.search(version)
    return match[1] if match else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def inspect_folder(folder: Path, stdout: str = "vasp.out", exit_code: int | None = None) -> Inspection:
    """Count the steps of the last cycle against NELM. Reaching NELM is not converged, whatever VASP prints: older ones
    print "EDIFF is reached" then, too.

    Args:
        folder: where VASP ran.
        stdout: name of the file with what it printed.
        exit_code: of the program, if it is known.
    """
    whole, outcar_text = is_whole(folder / "vasprun.xml"), _read(folder / "OUTCAR")
    xml, outcar = cycle_of_xml(folder / "vasprun.xml"), cycle_of_outcar(outcar_text)
    steps, limit = max(xml.steps, outcar.steps), xml.limit or outcar.limit
    printed = _read(folder / stdout)[-TAIL_CHARACTERS:]
    converged, reason = None, ""
    if limit is not None and steps >= limit:
        converged, reason = False, f"the SCF stopped at its limit of {limit} electronic steps"
    elif whole and any(words in outcar_text for words in _UNCONVERGED):
        converged, reason = False, f"VASP says that EDIFF was not reached, after {steps} electronic steps"
    elif whole:
        converged = True
    else:
        reason = _broken_off(folder, steps, name_error(printed), exit_code)
    complaint = complaints(printed)
    return Inspection(
        electronic_steps=steps or None,
        converged=converged,
        reason=reason,
        code_version=xml.version or outcar.version,
        notes={"vasp_complaint": complaint} if complaint else {},
    )


def _broken_off(folder: Path, steps: int, complaint: str, exit_code: int | None) -> str:
    how = {None: "", 0: ""}.get(exit_code, f" with exit code {exit_code}")
    if exit_code is not None and exit_code < 0:
        how = f", killed by signal {-exit_code},"
    said = complaint or f"it gave no reason (see {folder / 'OUTCAR'})"
    if not (folder / "OUTCAR").exists() and not (folder / "vasprun.xml").exists():
        return f"VASP did not start{how and f' (ended{how})'}: {complaint or 'it printed nothing of use'}"
    how_far = f"after {steps} electronic steps" if steps else "before the first electronic step"
    cut = "vasprun.xml is cut off" if (folder / "vasprun.xml").exists() else "there is no vasprun.xml"
    return f"VASP ended{how} {how_far}, {cut}: {said}"


def complaints(text: str) -> str:
    """What stands in VASP's boxes, and lines that speak of an error, as one line; advice is among it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    boxed = [line.strip("| ") for line in lines if line.startswith("|")]
    said = [line for line in boxed if _BOX_WORDS.search(line) and not set(line) <= _ORNAMENTS]
    loud = [line for line in lines if not line.startswith("|") and _LOUD.search(line)]
    return " ".join(said + loud[:3])[:300]


def name_error(text: str) -> str:
    """``complaints`` with custodian's names of the errors it knows."""
    said = complaints(text)
    if not said or not find_spec("custodian"):
        return said
    try:
        from custodian.vasp.handlers import VaspErrorHandler
    except ImportError:  # it needs a pymatgen of its own age
        return said
    known = VaspErrorHandler.error_msgs.items()
    names = [name for name, messages in known if any(message in text for message in messages)]
    return f"{said} [{', '.join(names)}]" if names else said
