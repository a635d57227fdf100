"""What the reference calculator wrote down, counted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Calculation:
    """One calculation of the label ``key`` in the process ``pid``; times are Unix seconds.

    Attributes:
        ended: None if the process was killed before.
    """

    key: str
    pid: int
    started: float
    ended: float | None = None


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found after a kill: the labels for which the disk or the database had an answer; None if the database
    was away, so that nobody knows."""

    time: float
    kept: Collection[str] | None


@dataclass(kw_only=True)
class Counts:
    """Calculations by what became of them.

    Attributes:
        started, completed: all of them.
        cut_off: started and never ended.
        repeated: labels that were computed again although an answer was kept, one entry a repeat. Must be empty.
        unkept: labels computed again of which no answer was found after the first calculation: its process was ended
            between the calculator's last line and the moment the answer was on the disk, so it was still in flight.
        at_once: labels that two processes computed to the end at the same time. Must be empty.
        lost: labels that were completed and are not in the database in the end. Must be empty.
    """

    started: int = 0
    completed: int = 0
    cut_off: int = 0
    repeated: list[str] = field(default_factory=list)
    unkept: list[str] = field(default_factory=list)
    at_once: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __iadd__(self, other: Counts) -> Counts:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def read(log: Path) -> list[Calculation]:
    """All calculations, in the order they started. A line that is not whole was being written."""
    if not log.exists():
        return []
    found: list[Calculation] = []
    open_now: dict[tuple[str, int], int] = {}
    for line in log.read_text().split("\n")[:-1]:
        what, key, pid, time = line.split()
        if what == "start":
            open_now[key, int(pid)] = len(found)
            found.append(Calculation(key=key, pid=int(pid), started=float(time)))
        else:
            place = open_now.pop((key, int(pid)))
            found[place] = replace(found[place], ended=float(time))
    return found


def count(calculations: Sequence[Calculation], good: Collection[str], surveys: Sequence[Survey]) -> Counts:
    """What became of every calculation.

    Args:
        calculations: in the order they started.
        good: labels in the database in the end that are ``ok``.
        surveys: one after each kill.
    """
    ended = [c for c in calculations if c.ended is not None]
    counts = Counts(started=len(calculations), completed=len(ended), cut_off=len(calculations) - len(ended))
    counts.lost = sorted({c.key for c in ended} - set(good))
    for key in sorted({c.key for c in ended}):
        mine = [c for c in calculations if c.key == key]
        first = min(c.ended for c in mine if c.ended is not None)
        for one in mine:
            if one.started > first:
                between = [survey.kept for survey in surveys if first <= survey.time <= one.started]
                seen = [kept for kept in between if kept is not None]
                was_nowhere = bool(seen) and key not in seen[-1]
                (counts.unkept if was_nowhere else counts.repeated).append(key)
            elif one.ended is not None and one.ended > first:
                counts.at_once.append(key)
    return counts
