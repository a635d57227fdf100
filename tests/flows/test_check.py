"""``al-loop check``: what it says of a good run file, and that it lists everything that is wrong with a bad one."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from ase.calculators.emt import EMT
from typer.testing import CliRunner, Result

from alcore.mace.models import build_model
from alcore.types import RunRecord
from flows import environment
from flows.check import check_run, executor_lines
from flows.cli import app
from flows.runfile import load_run_file
from flows.session import open_record_store
from flows.settings import ExecutorSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*loaded with pickle.*")


def check(file: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["check", str(file), *options], env={"COLUMNS": "160"})


def test_it_says_what_the_run_would_do(hop: Any, home: Path) -> None:
    result = check(hop.run_file("checked"), "--set", "stop.max_labels=12")
    assert (result.exit_code, result.stderr) == (0, "")
    said = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert said["path"].startswith("hop: Cu9, 9 atoms (5 free); Cu 8 moves 2.5")
    assert said["reference"].startswith("ase (fingerprint ")
    assert said["executor"].startswith("local, this machine: 1 at a time of this run, ")
    assert (
        said["prior"]
        == "untrained MACE (seed 0) on an elastic network of the end states, which has seen no reference data"
    )
    assert said["band"] == "3 images between the end states, idpp"
    assert "10 meV, or after 12 labels or 15 generations" in said["stops"]
    assert said["run"] == "checked: new"
    assert hop.calls("checked") == 0
    assert not (home / "calculations" / "checked").exists()
    with closing(open_record_store(None)) as store:
        assert store.load_run("checked") is None


def test_it_says_that_the_name_is_known(hop: Any, home: Path) -> None:
    settings = load_run_file(hop.run_file("known"))
    values = settings.model_dump(mode="json")
    with closing(open_record_store(None)) as store:
        store.save_run(RunRecord(name="known", settings=values, settings_sha256="", status="cancelled"))
    report = check_run(settings)
    assert (report.problems, report.lines[-1]) == ([], "run         known: exists (cancelled), begins anew")
    other = check_run(settings.model_copy(update={"seed": 5}))
    assert other.lines == []
    assert other.problems == [
        (
            "name: the run 'known' exists with other settings: seed was 0, is now 5 "
            "(choose another name (--name), or undo the change)"
        )
    ]


def test_everything_wrong_with_the_run_file_is_listed(hop: Any, home: Path) -> None:
    wrong = {"neb": {"n_image": 3}, "stop": {"barrier_tolerance_ev": 0}, "paths": [{"initial": "initial.extxyz"}]}
    result = check(hop.run_file("bad", **wrong, data=["gone.extxyz"]))
    assert (result.exit_code, result.stdout) == (2, "")
    keys = [line.split("bad.yaml: ")[1].split(":")[0] for line in result.stderr.splitlines()]
    assert sorted(keys) == ["data.0", "neb.n_image", "paths.0", "stop.barrier_tolerance_ev"]


def test_everything_wrong_with_what_it_names_is_listed(hop: Any, home: Path) -> None:
    torch.save(build_model([13], seed=0), hop.folder / "aluminium.model")
    gold = ase.io.read(hop.folder / "final.extxyz")
    gold.symbols[8] = "Au"
    ase.io.write(hop.folder / "gold.extxyz", gold)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [
        {"name": "good", "initial": "initial.extxyz", "final": "final.extxyz"},
        {"name": "changed", "initial": "initial.extxyz", "final": "gold.extxyz"},
        {"name": "still", "initial": "initial.extxyz", "final": "initial.extxyz"},
    ]
    file = hop.run_file(
        "bad",
        paths=paths,
        data=["initial.extxyz", "final.extxyz"],
        model={"foundation": "aluminium.model"},
        store={"mongodb_uri": f"mongodb://127.0.0.1:{port}"},
    )
    result = check(file)
    assert (result.exit_code, result.stdout) == (2, "")
    expected = [
        "paths.1 (changed: initial.extxyz and gold.extxyz): the end states differ in composition",
        "paths.2 (still: initial.extxyz and initial.extxyz): the end states are the same structure",
        "data.0: frame 0 of initial.extxyz has no energy and forces",
        "data.1: frame 0 of final.extxyz has no energy and forces",
        "model.foundation: the foundation model does not know Cu",
        f"127.0.0.1:{port}: MongoDB cannot be reached",
    ]
    lines = result.stderr.splitlines()
    assert len(lines) == len(expected)
    assert not [pair for pair in zip(lines, expected, strict=True) if not pair[0].startswith(pair[1])]


def test_elements_of_the_data_must_be_known_to_the_model_too(hop: Any, home: Path) -> None:
    torch.save(build_model([29], seed=0), hop.folder / "copper.model")
    atoms = ase.io.read(hop.folder / "initial.extxyz")
    atoms.symbols[8] = "Au"
    atoms.calc = EMT()
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
    ase.io.write(hop.folder / "gold-data.extxyz", atoms, write_results=False)
    model = {"foundation": "copper.model"}
    assert check(hop.run_file("copper", model=model)).exit_code == 0
    result = check(hop.run_file("copper", model=model, data=["gold-data.extxyz"]))
    assert result.exit_code == 2
    assert result.stderr.startswith("model.foundation: the foundation model does not know Au")


@pytest.mark.parametrize(
    ("values", "cores", "expected"),
    [
        (
            {},
            2,
            ["executor    local, this machine: 2 at a time of this run, 2 of all runs there (2 cores / 1 thread), "],
        ),
        (
            {"workers": 3, "threads": 2, "memory_gb": 1.5},
            8,
            ["3 at a time of this run, 4 of all runs there (8 cores / 2 threads), 3600 s and 1.5 GB each at most"],
        ),
        ({"workers": 4}, 2, ["4 at a time", "4 workers, but only 2 can ever run at once (2 cores / 1 thread)"]),
        (
            {"workers": 1, "threads": 4},
            2,
            ["1 at a time", "warning     4 threads at once on 2 cores slow "],
        ),
        (
            {"workers": 3, "max_running": 3},
            2,
            ["3 of all runs there (executor.max_running)", "3 threads at once on "],
        ),
        (
            {"kind": "pyiron", "queue": "slurm", "walltime": "1:00:00", "workers": 50, "cores": 32},
            2,
            ["executor    pyiron, queue slurm: 50 at a time of this run, 1000 of all runs there (unless "],
        ),
    ],
)
def test_it_says_how_many_labels_run_at_once_and_why(
    values: dict[str, Any], cores: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cores", lambda: cores)
    lines = executor_lines(ExecutorSettings(**values))
    assert len(lines) == len(expected)
    assert not [pair for pair in zip(lines, expected, strict=True) if pair[1] not in pair[0]]
