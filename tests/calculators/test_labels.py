from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alcore.errors import InputError
from alcore.types import Label, LabelRequest
from calculators.attempts import ATTEMPTS_FILE
from calculators.base import Inspection
from calculators.executors.outcome import JobOutcome
from calculators.labels import LabelLimits, conclude, telling_line
from calculators.measure import Measurement
from calculators.registry import resolve

Judge = Callable[..., Label]


@pytest.fixture
def judge(tmp_path: Path, make_requests: Callable[..., list[LabelRequest]]) -> Judge:
    """The label of EMT at a job that ended with this outcome."""
    resolved = resolve("emt")
    (request,) = make_requests(resolved)

    def label(outcome: JobOutcome, version: str | None = None) -> Label:
        asked = resolved if version is None else replace(resolved, facts={**resolved.facts, "version": version})
        return conclude(request, asked, outcome, tmp_path, LabelLimits(timeout_s=5.0))

    return label


def answer(**changes: Any) -> JobOutcome:
    values = {"status": "ok", "energy_ev": -1.0, "forces": np.full((4, 3), 0.1)} | changes
    return JobOutcome(kind="done", value=Measurement(**values), seconds=2.0)


def test_an_answer_becomes_a_label(judge: Judge, tmp_path: Path) -> None:
    label = judge(answer(total_magnetic_moment=3.0, magnetic_moments=np.ones(4)))
    assert (label.status, label.reason, label.energy_ev, label.seconds) == ("ok", "", -1.0, 2.0)
    assert label.details["total_magnetic_moment"] == 3.0
    assert not (tmp_path / "error.txt").exists()
    assert "total_magnetic_moment" not in judge(answer()).details


@pytest.mark.parametrize(
    ("outcome", "status", "reason"),
    [
        (JobOutcome(kind="timeout"), "timeout", "no answer within 5 s; its processes were ended"),
        (
            JobOutcome(kind="died", text="exit code 3", last_words="a\nno licence\n"),
            "crashed",
            "(exit code 3): no licence",
        ),
        (JobOutcome(kind="lost", text="killed by signal 9"), "crashed", "the worker process died (killed by signal 9)"),
        (JobOutcome(kind="raised", text="Traceback\n  more\nKeyError: 'x'\n"), "crashed", "KeyError: 'x'"),
        (JobOutcome(kind="raised"), "crashed", ""),
        (answer(status="unconverged", reason="two\nlines"), "unconverged", "two lines"),
        (answer(energy_ev=float("nan")), "rejected", "the energy is nan"),
        (answer(forces=np.zeros((2, 3))), "rejected", "forces have shape (2, 3)"),
        (answer(forces=None), "rejected", "forces have shape ()"),
    ],
)
def test_every_ending_has_its_status_and_one_line(
    outcome: JobOutcome, status: str, reason: str, judge: Judge, tmp_path: Path
) -> None:
    label = judge(outcome)
    assert label.status == status
    assert reason in label.reason
    assert "\n" not in label.reason
    assert (tmp_path / "error.txt").read_text().startswith(f"{status}: {label.reason}\n")
    assert label.folder == str(tmp_path)
    assert label.energy_ev is None or np.isfinite(label.energy_ev)


@pytest.mark.parametrize(
    ("stated", "found", "status"),
    [
        ("6.7", "6.7", "ok"),
        ("6.7", "6.7.1", "ok"),
        ("6.7", "6.7 build 3", "ok"),
        ("6.7", "6.70", "rejected"),
        ("6.7", "7.2", "rejected"),
        ("6.7", "", "ok"),
        ("", "7.2", "ok"),
    ],
)
def test_a_label_of_another_version_is_rejected(stated: str, found: str, status: str, judge: Judge) -> None:
    label = judge(answer(inspection=Inspection(code_version=found)), version=stated)
    assert label.status == status
    assert ("the output is from version" in label.reason) == (status == "rejected")


def test_a_note_hides_nothing(judge: Judge) -> None:
    notes = {"attempts": "none", "settings": 1, "calculator": "other", "gap_ev": 0.5}
    attempts = ({"name": "as set", "status": "ok"},)
    details = judge(answer(inspection=Inspection(notes=notes), attempts=attempts, settings={"a": 1})).details
    assert (details["attempts"], details["settings"], details["gap_ev"]) == ([attempts[0]], {"a": 1}, 0.5)
    assert details["calculator"]["code"] == "ase.calculators.emt"


@pytest.mark.parametrize("kind", ["timeout", "died"])
def test_a_job_that_was_ended_says_how_far_it_had_come(kind: Any, judge: Judge, tmp_path: Path) -> None:
    stories = [
        {"name": "as set", "status": "unconverged"},
        {"name": "lower cutoff", "status": "not made"},
        {"name": "3x the steps", "status": "begun"},
    ]
    (tmp_path / ATTEMPTS_FILE).write_text(json.dumps(stories))
    label = judge(JobOutcome(kind=kind, text="exit code 1"))
    assert "in its retry '3x the steps' after unconverged" in label.reason
    assert label.details["attempts"] == stories
    (tmp_path / ATTEMPTS_FILE).write_text('[{"name": "cut')  # it was ended while it wrote
    assert judge(JobOutcome(kind=kind)).details["attempts"] == []


@pytest.mark.parametrize("wrong", [{"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"max_force_ev_per_ang": -1.0}])
def test_limits_make_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be positive"):
        LabelLimits(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must not be negative"):
        LabelLimits(retries=-1)


def test_the_telling_line() -> None:
    assert telling_line("Fatal Python error: Segmentation fault\n\nCurrent thread\n") == (
        "Fatal Python error: Segmentation fault"
    )
    assert telling_line("first\n  last  \n\n") == "last"
    assert telling_line(" \n") == ""
    assert len(telling_line("x" * 1000)) == 300
