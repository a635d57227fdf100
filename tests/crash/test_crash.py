"""The crash test, shortened; and that it counts right. ``make crash-test`` is the long one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from book import differences
from ledger import Calculation, Counts, Survey, count, read
from plans import AFTER, AIMS, Pace, draw
from users import Deployed, Foreground

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_over_and_over_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--kills", "12", "--deployed", "2", "--seed", "5", "--label-s", "0.5", "--json", str(figures)]
    command = [sys.executable, str(CAMPAIGN), *options, "--folder", str(tmp_path / "worlds")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(figures.read_text())
    assert sum(told["kills"].values()) == 12
    assert told["wrong"] == []
    assert told["counts"]["completed"] >= 2 * 12  # of at least two runs


def calculations(tmp_path: Path, *lines: str) -> list[Calculation]:
    file = tmp_path / "log"
    file.write_text("".join(f"{line}\n" for line in lines))
    return read(file)


def test_a_log_whose_last_line_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("start a 1 1.0\nstart b 2 1.5\nend a 1 2.0\nend b 2")
    assert read(file) == [
        Calculation(key="a", pid=1, started=1.0, ended=2.0),
        Calculation(key="b", pid=2, started=1.5),
    ]
    assert read(tmp_path / "none") == []


def test_one_that_was_in_flight_may_be_repeated(tmp_path: Path) -> None:
    log = calculations(tmp_path, "start a 1 1.0", "start a 2 5.0", "end a 2 6.0")
    assert count(log, {"a"}, [Survey(time=3.0, kept=())]) == Counts(started=2, completed=1, cut_off=1)


def test_one_that_was_kept_must_not_be_repeated(tmp_path: Path) -> None:
    log = calculations(tmp_path, "start a 1 1.0", "end a 1 2.0", "start a 2 5.0", "end a 2 6.0")
    for surveys in ([Survey(time=3.0, kept={"a"})], [], [Survey(time=0.5, kept=())], [Survey(time=3.0, kept=None)]):
        assert count(log, {"a"}, surveys).repeated == ["a"]


def test_one_whose_answer_never_reached_the_disk_is_told_apart(tmp_path: Path) -> None:
    log = calculations(tmp_path, "start a 1 1.0", "end a 1 2.0", "start a 2 5.0", "end a 2 6.0")
    counts = count(log, {"a"}, [Survey(time=3.0, kept=()), Survey(time=4.0, kept=None)])
    assert (counts.repeated, counts.unkept) == ([], ["a"])


def test_two_at_once_and_a_lost_one(tmp_path: Path) -> None:
    log = calculations(tmp_path, "start a 1 1.0", "start a 2 1.5", "end a 1 2.0", "end a 2 2.5")
    counts = count(log, (), [])
    assert (counts.at_once, counts.lost, counts.repeated) == (["a"], ["a"], [])


def test_results_differ_where_a_bit_does() -> None:
    one = {"generations": [{"energy": 0.1, "band": np.array([0.0, 1.0]), "nan": float("nan")}]}
    assert differences(one, {"generations": [{"nan": float("nan"), "band": np.array([0.0, 1.0]), "energy": 0.1}]}) == []
    last_bit = np.array([0.0, np.nextafter(1.0, 2.0)])
    other = {"generations": [{"energy": np.nextafter(0.1, 1.0), "band": last_bit, "nan": 0.0}]}
    places = [line.split(":")[0] for line in differences(one, other)]
    assert places == [f"generations.0.{name}" for name in ("energy", "band", "nan")]
    assert differences(one, {"generations": []}) == ["generations: 1 and 0"]


def test_kills_are_aimed_at_every_phase_and_every_process_and_are_the_same_for_a_seed() -> None:
    pace = Pace(total=30.0, start_up=6.0, step=2.0, label=1.0)
    for user in (Foreground, Deployed):
        rng, again = random.Random(0), random.Random(0)
        plans = [draw(rng, user.targets, pace) for _ in range(400)]
        assert plans == [draw(again, user.targets, pace) for _ in range(400)]
        assert {plan.aim for plan in plans} == {*AFTER, "any", "start-up"} == set(AIMS)
        assert {plan.target for plan in plans} == set(user.targets)
        assert all(0 <= plan.delay_s <= pace.total for plan in plans)
