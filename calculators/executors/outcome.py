"""How a job ended, whatever ran it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        kind: ``done``, ``raised`` (``text`` is the traceback), ``died`` (``text`` is how), ``timeout``,
            ``memory`` (it was ended because it used too much; ``text`` says how much), or ``lost`` (the worker died
            before the job began, and so did a fresh one).
        value: what the job returned, if ``done``.
        last_words: the last lines of its stderr, if it ``died``, was late or too large.
        seconds: wall time.
    """

    kind: Literal["done", "raised", "died", "timeout", "memory", "lost"]
    value: Any = None
    text: str = ""
    last_words: str = ""
    seconds: float = 0.0
