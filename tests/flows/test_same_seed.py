"""Same seed, same result: two runs of one file on one machine are the same bit for bit, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alcore.plain import to_plain
from alcore.protocols import StepName
from alcore.runner import PlainRunner
from flows.runfile import load_run_file
from flows.session import open_record_store, run_session
from flows.sittings import flat
from storage.mongod import stop_mongod

STRUCTURES = Path(__file__).resolve().parents[2] / "config" / "structures" / "au_al100"
SHORT = {"sane_energy_ev": 10.0, "sane_force_ev_per_ang": 10.0}
"""Trainings too short for members that could be used: they are taken as they are."""
OF_THE_PROCESS = ("run", "seconds", "sitting")
"""What two runs need not have the same."""
STEPS = 4
"""A run that is interrupted is so after that many steps, again and again."""


class InterruptedRunner(PlainRunner):
    """Ctrl-C after some steps: what they found is stored, what comes next is not begun."""

    def __init__(self, workers: Mapping[StepName, int]) -> None:
        super().__init__(workers)
        self._left = STEPS

    def map(self, step: StepName, generation: int, names: Sequence[str], work: Callable[[str], Any]) -> list[Any]:
        def counted(name: str) -> Any:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            return work(name)

        return super().map(step, generation, names, counted)


class Runs:
    """Runs of one file, each under a name, with a data folder and a database of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.homes: list[Path] = []

    def run_file(self, name: str, workers: int = 1) -> Path:
        """A hop whose committee is trained twice; two labels a generation, which may come in any order."""
        values = {
            "name": name,
            "paths": [{key: str(STRUCTURES / f"{key}.extxyz") for key in ("initial", "final")}],
            "calculator": {"name": "emt"},
            "executor": {"workers": workers, "max_running": 2, "timeout_s": 120},
            "model": {"committee": 2, "options": {"fresh_epochs": 2, "warm_epochs": 1, "first_labels": 6, **SHORT}},
            "neb": {"n_images": 3},
            "select": {"labels_per_generation": 2},
            "stop": {"max_generations": 4, "barrier_tolerance_ev": 0.0001, "saddle_fmax_ev_per_ang": 0.02},
            "seed": 3,
        }
        file = self._folder / f"{name}.yaml"
        file.write_text(json.dumps(values))
        return file

    def home(self, name: str) -> Path:
        self.homes.append(self._folder / f"home-{name}")
        return self.homes[-1]

    def result(self, name: str, workers: int = 1, runner: Callable[..., PlainRunner] = PlainRunner) -> list[Any]:
        """What the generations of a run in this process hold; one that is interrupted is gone on with."""
        settings = load_run_file(self.run_file(name, workers))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AL_LOOP_HOME", str(self.home(name)))
            for _ in range(20):
                try:
                    run_session(settings, runner=runner({"label": workers}))
                    break
                except KeyboardInterrupt:
                    continue
            return stored(name)

    def result_of_command(self, name: str, **variables: str) -> list[Any]:
        """The same of ``al-loop run`` in a process of its own."""
        command = [sys.executable, "-m", "flows.cli", "run", str(self.run_file(name)), "--no-server"]
        home = self.home(name)
        path = str(Path(__file__).resolve().parents[2])
        env = os.environ | {"AL_LOOP_HOME": str(home), "PYTHONPATH": path} | variables
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 3, done.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AL_LOOP_HOME", str(home))
            return stored(name)


def stored(name: str) -> list[Any]:
    """Every value of every generation, by its place in it: floats and arrays as the bits they are."""
    with closing(open_record_store(None)) as store:
        generations = [
            {key: value for key, value in to_plain(record).items() if key not in OF_THE_PROCESS}
            for record in store.load_generations(name)
        ]
        labels = store.load_labels([key for generation in generations[-1:] for key in generation["kinds"]])
    measured = {key: {"energy_ev": label.energy_ev, "forces": label.forces} for key, label in labels.items()}
    return [{place: bits(value) for place, value in flat(values).items()} for values in (*generations, measured)]


def bits(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes().hex()
    return value.hex() if isinstance(value, float) else value


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("same-seed"))
    yield made
    for home in made.homes:
        stop_mongod(home)


@pytest.fixture(scope="module")
def first(runs: Runs) -> list[Any]:
    return runs.result("first")


def test_what_is_compared_is_worth_comparing(first: list[Any]) -> None:
    """Generations with bands, a committee that was trained twice, labels."""
    assert len(first) == 6
    members = [tuple(generation["surrogate.members"]) for generation in first[:-1]]
    assert len(set(members)) == 3
    assert all(len(sha256) == 64 for sha256 in members[-1])
    assert "paths.0.band.energies_ev" in first[-2]
    assert "calibration.factor" in first[1]
    assert len(first[-1]) == 2 * len(first[-2]["label_keys"])


def test_another_name_and_another_database(runs: Runs, first: list[Any]) -> None:
    assert runs.result("second") == first


@pytest.mark.slow
def test_two_labels_at_the_same_time(runs: Runs, first: list[Any]) -> None:
    assert runs.result("parallel", workers=2) == first


@pytest.mark.slow
def test_interrupted_over_and_over(runs: Runs, first: list[Any]) -> None:
    assert runs.result("interrupted", runner=InterruptedRunner) == first


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_process_of_its_own_with_any_number_of_threads(runs: Runs, first: list[Any], threads: str) -> None:
    """Small bands use one thread whatever the environment says."""
    assert runs.result_of_command(f"threads-{threads}", OMP_NUM_THREADS=threads) == first


@pytest.mark.slow
def test_another_seed_is_another_run(runs: Runs, first: list[Any]) -> None:
    """What is compared above can differ."""
    file = runs.run_file("other")
    file.write_text(file.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AL_LOOP_HOME", str(runs.home("other")))
        run_session(load_run_file(file), runner=PlainRunner({}))
        assert stored("other") != first
