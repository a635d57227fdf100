"""Ending a process with everything it started."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from calculators.executors.processes import MARK, end_family, family

WAITS_FOR_ITS_CHILDREN = """
import pathlib, subprocess, sys
children = [subprocess.Popen(["sleep", "300"]) for _ in range(20)]
pathlib.Path(sys.argv[1]).touch()
for child in children:
    child.wait()
    pathlib.Path(sys.argv[2]).touch()
"""


@pytest.mark.parametrize("attempt", range(3))
def test_the_leader_never_sees_its_children_die(attempt: int, tmp_path: Path, wait_until: Callable[..., None]) -> None:
    """Or it would go on with what a killed program left."""
    started, saw = tmp_path / "started", tmp_path / "saw"
    mark = uuid.uuid4().hex
    leader = subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_ITS_CHILDREN, str(started), str(saw)],
        env=os.environ | {MARK: mark},
        start_new_session=True,
    )
    wait_until(started.exists)
    end_family(leader.pid, mark)
    assert leader.wait(10) == -9
    assert family(mark) == set()
    assert not saw.exists()
