"""Lets the bare ``prefect deployment run al-loop`` work, which the stock client refuses (it wants FLOW/DEPLOYMENT).

Prefect calls ``setup_environment`` when it is imported, before its command line is read. The entry point is in the
group ``prefect.plugins`` and needs ``PREFECT_PLUGINS_ENABLED=true`` (``al-loop up`` writes it into the active profile).
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

from prefect.plugins import HookContext, register_hook

BARE_NAMES = ("al-loop", "migration-benchmark")
FLAGS = ("--watch",)
"""Options of ``prefect deployment run`` that take no value: what follows one of them may be the name."""


def full_name(arguments: list[str]) -> list[str]:
    """``arguments`` (without the program): a bare name of ``deployment run`` becomes ``name/name``, all else stays."""
    if arguments[:2] != ["deployment", "run"]:
        return arguments
    for i, (before, argument) in enumerate(pairwise(arguments[1:]), start=2):
        is_value = before.startswith("-") and before not in FLAGS
        if argument in BARE_NAMES and not is_value:
            return [*arguments[:i], f"{argument}/{argument}", *arguments[i + 1 :]]
    return arguments


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    """Rewrites ``sys.argv`` of the Prefect client, and of nothing else."""
    as_module = sys.argv[:1] == ["-m"] and sys.orig_argv[1:3] == ["-m", "prefect"]
    if as_module or Path(sys.argv[0] if sys.argv else "").stem == "prefect":
        sys.argv[1:] = full_name(sys.argv[1:])
