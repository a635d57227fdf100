from __future__ import annotations

import io
import json
from pathlib import Path

import ase.io
import pytest
from ase.build import bulk
from rich.console import Console
from typer.testing import CliRunner

from calculators.registry import REGISTRY
from flows.catalogue import check_calculator, list_calculators, show_calculator
from flows.cli import app


def paper(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_all_are_listed_within_80_columns() -> None:
    console = paper()
    list_calculators(console)
    lines = said(console).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == list(REGISTRY)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_calculator_is_described_within_80_columns(name: str) -> None:
    console = paper()
    show_calculator(console, name)
    text = said(console)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith(name)
    first_words = {line.split()[0] for line in text.splitlines() if line and line[0] != " "}
    assert first_words >= set(REGISTRY[name].settings_model.model_fields)
    assert ("not taken" not in text) == REGISTRY[name].takes_charge
    for number in range(1, len(REGISTRY[name].retries) + 1):
        assert f"{number}. after" in text


def test_a_description_says_type_default_and_unit() -> None:
    console = paper(160)
    show_calculator(console, "tblite")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in said(console).splitlines() if line}
    assert rows["electronic_temperature_k"] == "number > 0 300.0 Fermi smearing in K"
    assert rows["multiplicity"].startswith("whole number ≥ 1 | null 2S+1; null: from the sum")
    console = paper(160)
    show_calculator(console, "mace")
    assert "path" in said(console)
    assert "required" in said(console)


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    list_calculators(paper(), as_json=True)
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(entries) == list(REGISTRY)
    show_calculator(paper(), "tblite", as_json=True)
    assert json.loads(capsys.readouterr().out) == entries["tblite"]
    settings = {setting["name"]: setting for setting in entries["tblite"]["settings"]}
    assert settings["accuracy"]["default"] == 1.0
    assert entries["tblite"]["takes_charge"] is True


def test_the_contract_test_prints_a_line_a_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atoms = bulk("Cu", cubic=True)
    ase.io.write(tmp_path / "rest.xyz", atoms)
    console = paper()
    assert not check_calculator(console, "emt", structure=tmp_path / "rest.xyz"), "a structure at rest proves nothing"
    lines = said(console).splitlines()
    assert [line.split()[0] for line in lines].count("BROKEN") == 1
    assert next(line for line in lines if line.startswith("BROKEN")).split("  ")[1] == "forces are -dE/dx"
    atoms.rattle(0.05, seed=0)
    ase.io.write(tmp_path / "moved.xyz", atoms)
    assert check_calculator(paper(), "emt", structure=tmp_path / "moved.xyz", as_json=True)
    checks = json.loads(capsys.readouterr().out)
    assert {check["check"] for check in checks} >= {"runs", "translation"}
    assert all(check["passed"] for check in checks)


def test_tolerances_come_from_the_command_line(tmp_path: Path) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    ase.io.write(tmp_path / "cu.xyz", atoms)
    arguments = ["calculators", "--test", "emt", "--structure", str(tmp_path / "cu.xyz")]
    strict = CliRunner().invoke(app, [*arguments, "--force-tolerance", "1e-12"])
    assert strict.exit_code == 1
    assert "BROKEN" in strict.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["vaps"], "calculator.name: there is no calculator 'vaps' (did you mean vasp?"),
        (["emt", "--test", "emt"], "al-loop calculators: a name and --test (give one of them)"),
        (["emt", "--set", "a=1"], "al-loop calculators: an option that belongs to the test (add --test NAME)"),
        (["--force-tolerance", "1"], "al-loop calculators: an option that belongs to the test"),
        (["--test", "emt", "--energy-tolerance", "-1"], "al-loop calculators --test: the tolerance -1 is not positive"),
        (["--test", "mace"], "calculator.settings of mace: model: Field required"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, ["calculators", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1
