from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ase.build import bulk
from ase.calculators.calculator import SCFError
from ase.calculators.emt import EMT
from hypothesis import given
from hypothesis import strategies as st

from alcore.types import LabelRequest, Structure
from calculators.attempts import ATTEMPTS_FILE, climb
from calculators.base import CalculatorEntry, ResolvedCalculator, Retry
from calculators.emt import ENTRY as EMT_ENTRY
from calculators.labeling import LocalLabeler
from calculators.registry import resolve
from storage.mongod import ensure_mongod, stop_mongod
from storage.store import MongoStore

COPPER = Structure.from_atoms(bulk("Cu"))
MakeRequests = Callable[..., list[LabelRequest]]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "label"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def story(attempts: Any) -> list[tuple[str, str]]:
    return [(attempt["name"], attempt["status"]) for attempt in attempts]


@pytest.mark.usefixtures("entries")
def test_the_second_rung_rescues(in_folder: Path) -> None:
    answer = climb(resolve("HONEST", {"needs": 100, "needs_gentle": 5}), 2, COPPER)
    assert story(answer.attempts) == [
        ("as set", "unconverged"),
        ("3x the steps", "unconverged"),
        ("gentle mixing", "ok"),
    ]
    assert [attempt["electronic_steps"] for attempt in answer.attempts] == [20, 60, 5]
    assert (answer.settings["gentle"], answer.settings["max_steps"]) == (True, 20)
    limits = [
        json.loads((in_folder / folder / "scf.json").read_text())["steps"] for folder in (".", "retry-1", "retry-2")
    ]
    assert limits == [20, 60, 5], "each attempt has a folder of its own"
    assert Path.cwd() == in_folder


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (1, 2), (2, 3), (5, 3)])
def test_no_more_than_the_allowed_rungs_are_climbed(in_folder: Path, retries: int, attempts: int) -> None:
    answer = climb(resolve("HONEST", {"needs": 100}), retries, COPPER)
    assert (answer.status, len(answer.attempts)) == ("unconverged", attempts)
    assert "the SCF stopped at its limit" in answer.reason
    assert len(list(in_folder.glob("retry-*"))) == attempts - 1


@pytest.mark.usefixtures("entries", "in_folder")
def test_a_crash_climbs_the_rung_for_crashes() -> None:
    answer = climb(resolve("HONEST", {"memory_gb": 1.0}), 2, COPPER)
    assert story(answer.attempts) == [("as set", "crashed"), ("more memory", "ok")]
    assert answer.settings["memory_gb"] == 16.0


@pytest.mark.usefixtures("entries", "in_folder")
@pytest.mark.parametrize(
    ("name", "rung", "why"),
    [("RUNG_MOVES", "lower cutoff", "it would change cutoff_ev"), ("RUNG_RAISES", "no such key", "no attribute")],
)
def test_a_rung_that_moves_the_energy_is_named_and_not_climbed(name: str, rung: str, why: str) -> None:
    stuck = climb(resolve(name, {"needs": 1000}), 0, COPPER)
    assert story(stuck.attempts) == [("as set", "unconverged")]
    saved = climb(resolve(name, {"needs": 50}), 1, COPPER)
    assert story(saved.attempts) == [("as set", "unconverged"), (rung, "not made"), ("3x the steps", "ok")]
    assert why in saved.attempts[1]["reason"]
    lost = climb(replace_ladder(resolve(name, {"needs": 1000}), 1), 3, COPPER)
    assert lost.status == "unconverged"
    assert f"the retry '{rung}' was not made: " in lost.reason
    assert why in lost.reason


def replace_ladder(resolved: ResolvedCalculator, rungs: int) -> ResolvedCalculator:
    return replace(resolved, entry=replace(resolved.entry, retries=resolved.entry.retries[:rungs]))


@pytest.mark.usefixtures("entries")
def test_an_output_that_cannot_be_read_is_a_crash(in_folder: Path) -> None:
    answer = climb(resolve("HONEST", {"inspection_fails": True}), 2, COPPER)
    assert story(answer.attempts) == [("as set", "crashed"), ("more memory", "crashed"), ("gentle mixing", "crashed")]
    assert answer.reason.startswith("the output cannot be read: ValueError: line 1 is not")
    assert "Traceback" in answer.error_text


@pytest.mark.usefixtures("entries")
def test_retries_lie_in_the_label_s_folder_wherever_a_failure_went(in_folder: Path) -> None:
    climb(resolve("HONEST", {"memory_gb": 1.0, "lost_folder": True}), 1, COPPER)
    assert (in_folder / "retry-1" / "scf.json").exists()
    assert Path.cwd() == in_folder


@pytest.mark.usefixtures("entries")
def test_a_job_that_a_queue_begins_again_finds_its_old_folders(in_folder: Path) -> None:
    (in_folder / "retry-1").mkdir()
    assert climb(resolve("HONEST", {"memory_gb": 1.0}), 1, COPPER).status == "ok"
    assert (in_folder / "retry-1-2" / "scf.json").exists()


@pytest.mark.usefixtures("entries")
def test_a_timeout_counts_all_attempts_and_says_where_it_struck(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("HONEST", {"needs": 100, "hangs_gently": True})
    with LocalLabeler(resolved, tmp_path / "calc", timeout_s=1.0, retries=2) as labeler:
        (label,) = labeler.label(make_requests(resolved))
    assert (label.status, label.energy_ev) == ("timeout", None)
    assert label.reason.startswith("no answer within 1 s, in its retry 'gentle mixing' after unconverged")
    assert story(label.details["attempts"])[-2:] == [("3x the steps", "unconverged"), ("gentle mixing", "begun")]
    assert json.loads((Path(label.folder) / ATTEMPTS_FILE).read_text()) == label.details["attempts"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "314.159"]]


@pytest.mark.usefixtures("entries")
def test_attempts_and_final_settings_are_stored_with_the_label(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("HONEST", {"needs": 50})
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    asked = Structure.from_atoms(atoms, magnetic_moments=[2.0, 0.0, 0.0, 0.0])
    with LocalLabeler(resolved, tmp_path / "calc", timeout_s=60) as labeler:
        (label,) = labeler.label(make_requests(resolved, structure=asked))
    assert label.ok, label.reason
    try:
        store = MongoStore(ensure_mongod(tmp_path / "db"))
        store.save_label(label)
        stored = store.load_labels([label.key])[label.key]
        store.close()
    finally:
        stop_mongod(tmp_path / "db")
    details = stored.details
    assert details == label.details
    assert story(details["attempts"]) == [("as set", "unconverged"), ("3x the steps", "ok")]
    assert details["settings"]["max_steps"] == 60
    assert details["calculator"] == {"calculator": "HONEST", "code": "program", "version": "1.0", "cutoff_ev": 400.0}
    assert (details["electronic_steps"], details["code_version"], details["energy_kind"]) == (
        50,
        "1.0.2",
        "force-consistent",
    )
    assert (details["gap_ev"], details["kpoints"]) == (0.5, [0, 1, 2])
    assert details["total_magnetic_moment"] == 2.0
    assert stored.magnetic_moments is not None
    assert stored.magnetic_moments.tolist() == [2.0, 0.0, 0.0, 0.0]


Ending = str


def scripted(endings: list[Ending], ladder: list[tuple[Any, ...]], made: list[str]) -> ResolvedCalculator:
    """EMT whose attempts end as the script says, whatever the settings; ``made`` hears of every one."""
    script: Iterator[Ending] = iter(endings)

    def make(settings: Any, structure: Any = None) -> Any:
        made.append(next(script))
        if made[-1] == "crashed":
            raise RuntimeError("killed")
        if made[-1] == "unconverged":
            raise SCFError("gave up")
        return EMT()

    rungs = tuple(Retry(name=f"rung {i}", change=lambda s: s, after=after) for i, after in enumerate(ladder))
    entry: CalculatorEntry = replace(EMT_ENTRY, name="scripted", make=make, retries=rungs)
    settings = entry.settings_model()
    return ResolvedCalculator(entry=entry, settings=settings, facts=entry.facts(settings), fingerprint="")


@contextmanager
def scratch() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def test_a_rung_that_did_not_fit_at_first_is_still_there_later() -> None:
    made: list[str] = []
    ladder = [("unconverged",), ("crashed",)]
    with scratch():
        answer = climb(scripted(["crashed", "unconverged", "ok"], ladder, made), 2, COPPER)
    assert [name for name, _ in story(answer.attempts)] == ["as set", "rung 1", "rung 0"]
    assert answer.status == "ok"


FAILURES = st.sampled_from(["unconverged", "crashed"])


@given(
    endings=st.lists(st.sampled_from(["unconverged", "crashed", "ok"]), min_size=8, max_size=8),
    ladder=st.lists(st.lists(FAILURES, min_size=1, max_size=2, unique=True).map(tuple), max_size=6),
    retries=st.integers(0, 5),
)
def test_the_ladder_is_climbed_by_its_rules(endings: list[Ending], ladder: list[tuple[Any, ...]], retries: int) -> None:
    made: list[str] = []
    with scratch():
        answer = climb(scripted(endings, ladder, made), retries, COPPER)
    attempts = story(answer.attempts)
    assert [status for _, status in attempts] == made
    assert answer.status == made[-1]
    assert "ok" not in made[:-1]
    climbed = [int(name.removeprefix("rung ")) for name, _ in attempts[1:]]
    assert len(climbed) == len(set(climbed)) <= retries
    for rung, (_, failure) in zip(climbed, attempts, strict=False):
        assert failure in ladder[rung]
    if answer.status != "ok" and len(climbed) < retries:
        assert not [i for i, after in enumerate(ladder) if i not in climbed and answer.status in after]
