"""A label that takes more memory than it may is ended, with all that came from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alcore.types import LabelRequest
from calculators.base import ResolvedCalculator
from calculators.executors.memory import MemoryWatch, resident_gb
from calculators.labeling import LocalLabeler

Misbehaving = Callable[..., ResolvedCalculator]
MakeRequests = Callable[..., list[LabelRequest]]


@pytest.mark.parametrize("child", [False, True])
def test_a_label_that_takes_too_much_memory_is_ended(
    child: bool, tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    greedy = misbehaving("hoards", megabytes=600, child=child)
    with LocalLabeler(greedy, tmp_path, workers=1, timeout_s=120, memory_gb=0.5) as labeler:
        (label,) = labeler.label(make_requests(greedy))
        assert labeler._pool.pids() == []  # its worker and all that had come from it are gone
    assert label.status == "crashed"
    said = re.match(r"used ([\d.]+) GB, more than executor\.memory_gb 0\.5; ", label.reason)
    assert said
    assert 0.5 <= float(said[1]) < 1.2  # what was seen first above the limit, rounded
    assert label.reason in (Path(label.folder) / "error.txt").read_text()


def test_a_label_within_its_memory_is_left_alone(
    tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    """It is looked at more than once."""
    modest = misbehaving("hoards", megabytes=100, seconds=2.5)
    with LocalLabeler(modest, tmp_path, workers=1, timeout_s=120, memory_gb=0.5) as labeler:
        (label,) = labeler.label(make_requests(modest))
    assert label.ok


def test_children_count() -> None:
    hold = "import sys; held = b'x' * 200_000_000; print('held', flush=True); sys.stdin.read()"
    before = resident_gb(os.getpid())
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 0.2 < resident_gb(os.getpid()) - before < 0.4
        child.communicate()
    assert resident_gb(child.pid) == 0.0


def test_it_looks_about_once_a_second_and_never_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [0.0], []
    monkeypatch.setattr("calculators.executors.memory.time.monotonic", lambda: now[0])
    monkeypatch.setattr("calculators.executors.memory.resident_gb", lambda pid: looks.append(pid) or 3.2)
    limited, free = MemoryWatch(7, 2.0), MemoryWatch(8, None)
    answers = []
    for tenth in range(31):
        now[0] = 0.1 * tenth + 1e-9
        answers.append(limited.excess_gb())
        assert free.excess_gb() is None
    assert looks == [7, 7, 7]
    assert [answer for answer in answers if answer] == [3.2] * 3
