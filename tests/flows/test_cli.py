"""The command line: verbs, flags, exit codes, one line an error. What runs behind a verb has its own tests."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from typer.testing import CliRunner, Result

from alcore.errors import RunawayError
from alcore.identity import label_key
from alcore.types import (
    Decision,
    GenerationRecord,
    Label,
    PathRecord,
    RunRecord,
    Structure,
)
from flows import __version__
from flows.cli import app
from flows.runfile import load_run_file
from flows.settings import RunSettings
from storage.memory import MemoryStore

VERBS = (
    "init",
    "check",
    "run",
    "cancel",
    "up",
    "down",
    "status",
    "show",
    "report",
    "export",
    "import",
    "gc",
    "calculators",
    "pretrain",
)
HEAVY = ("torch", "mace", "prefect", "mongoengine", "pymongo", "ase", "numpy", "matplotlib", "pyiron_base")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Any:
    levels = {name: logging.getLogger(name).level for name in ("alcore", "calculators", "storage", "flows")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def al_loop(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """What ``al-loop init`` wrote."""
    assert al_loop("init", tmp_path / "hop", "-q").exit_code == 0
    return tmp_path / "hop" / "run.yaml"


def session(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Puts ``functions`` in the place of ``flows.session``, whose own tests run it."""
    monkeypatch.setitem(sys.modules, "flows.session", SimpleNamespace(**functions))


def test_help_is_there_at_once_and_shows_every_verb() -> None:
    program = (
        "import sys\nfrom flows.cli import main\nsys.argv = ['al-loop', '--help']\n"
        "try:\n    main()\nfinally:\n"
        f"    print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.rstrip().endswith("LOADED []")
    assert not [verb for verb in VERBS if f" {verb} " not in done.stdout]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps_with_an_example(verb: str) -> None:
    result = al_loop(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: al-loop {verb}" in result.stdout


def test_alone_it_helps() -> None:
    result = al_loop()
    assert result.exit_code == 0
    assert "Usage: al-loop" in result.stdout


def test_version() -> None:
    assert al_loop("--version").stdout == f"al-loop {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrain", "x.yaml"], "x.yaml: no such file (config/pretrain_cr_sb_te.yaml is an example)"),
        (["benchmark", "bench.yaml"], "al-loop benchmark: not available yet"),
        (["pretrain"], "al-loop pretrain: Missing argument 'PRETRAIN.yaml'. (see `al-loop pretrain --help`)"),
        (["import", "gone"], "gone: no such folder (name the folder that `al-loop export` wrote)"),
        (["chek", "run.yaml"], "al-loop chek: no such verb (did you mean `al-loop check`?)"),
        (["run"], "al-loop run: Missing argument 'RUN.yaml'. (see `al-loop run --help`)"),
        (["run", "run.yaml", "--dry"], "al-loop run: No such option: --dry"),
        (["show"], "al-loop show: Missing argument 'NAME'."),
        (["--frobnicate"], "al-loop: No such option: --frobnicate"),
        (["run", "gone.yaml"], "gone.yaml: no such file (`al-loop init DIR` writes one to start from)"),
        (["check", "gone.yaml"], "gone.yaml: no such file"),
        (["show", "x", "--mongodb-uri", "localhost"], "--mongodb-uri: not an address (mongodb://host:port)"),
        (["calculators", "--test", "vaps"], "calculator.name: there is no calculator 'vaps'"),
        (["calculators", "--test", "emt", "--structure", "gone.xyz"], "--structure: no such file: gone.xyz"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_2(arguments: list[str], expected: str) -> None:
    result = al_loop(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_init_writes_what_check_and_run_take(tmp_path: Path) -> None:
    result = al_loop("init", tmp_path / "a b")
    file = tmp_path / "a b" / "run.yaml"
    assert result.exit_code == 0
    assert f"al-loop check '{file}'" in result.stdout
    assert f"al-loop run '{file}'" in result.stdout
    settings = load_run_file(file)
    assert settings == RunSettings(name="cu-vacancy", paths=settings.paths, calculator=settings.calculator)
    pair = [ase.io.read(path) for path in (settings.paths[0].initial, settings.paths[0].final)]
    assert [str(atoms.symbols) for atoms in pair] == ["Cu31", "Cu31"]


def test_init_does_not_overwrite(run_file: Path) -> None:
    text = run_file.read_text("utf-8")
    run_file.write_text(text + "# mine\n")
    result = al_loop("init", run_file.parent, "--calculator", "tblite")
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert run_file.read_text("utf-8") == text + "# mine\n"
    run_file.unlink()
    assert al_loop("init", run_file.parent).exit_code == 2, "the end states are there still"
    assert not run_file.exists()


def test_init_shows_the_calculators_settings(tmp_path: Path) -> None:
    al_loop("init", tmp_path / "tb", "--calculator", "tblite")
    file = tmp_path / "tb" / "run.yaml"
    text = file.read_text("utf-8")
    assert load_run_file(file).calculator.settings == {}
    method = next(line for line in text.splitlines() if "# method: GFN1-xTB" in line)
    file.write_text(text.replace(method, method.replace("# method: GFN1-xTB", "method: GFN2-xTB")))
    assert load_run_file(file).calculator.settings == {"method": "GFN2-xTB"}
    assert al_loop("init", tmp_path / "x", "--calculator", "tblit").exit_code == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("code", [0, 3, 1])
def test_run_hands_over_settings_and_hands_back_the_exit_code(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    seen: dict[str, Any] = {}

    def run_foreground(settings: RunSettings, **options: Any) -> int:
        seen.update(options, settings=settings)
        return code

    session(monkeypatch, run_foreground=run_foreground)
    result = al_loop("run", run_file, "--name", "mine", "--set", "stop.max_labels=5", "--set", "seed=3", "--no-server")
    assert result.exit_code == code
    settings = seen["settings"]
    assert (settings.name, settings.stop.max_labels, settings.seed) == ("mine", 5, 3)
    assert (seen["use_prefect"], seen["dry_run"]) == (False, False)
    al_loop("run", run_file, "--dry-run")
    assert (seen["use_prefect"], seen["dry_run"]) == (True, True)


def test_every_problem_of_a_run_file_is_a_line(run_file: Path) -> None:
    text = run_file.read_text("utf-8")
    run_file.write_text(text.replace("POSCAR_final", "gone").replace("fmax_ev_per_ang: 0.03", "fmax: 0"))
    result = al_loop("run", run_file)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.removeprefix(f"{run_file}: ").split(":")[0] for line in lines] == ["paths.0.final", "neb.fmax"]
    assert al_loop("check", run_file).stderr == result.stderr


def test_errors_while_running(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_with(error: BaseException) -> Callable[..., int]:
        def run_foreground(*_: Any, **__: Any) -> int:
            raise error

        return run_foreground

    session(monkeypatch, run_foreground=fails_with(RunawayError("the band exploded")))
    result = al_loop("run", run_file)
    assert (result.exit_code, result.stderr) == (1, "the band exploded\n")

    session(monkeypatch, run_foreground=fails_with(ValueError("first\nsecond")))
    result = al_loop("run", run_file)
    assert (result.exit_code, result.stderr) == (1, "failed: ValueError: first (--debug shows where)\n")
    result = al_loop("run", run_file, "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "run_foreground" in result.stderr

    session(monkeypatch, run_foreground=fails_with(KeyboardInterrupt()))
    result = al_loop("run", run_file, "--name", "mine", "--set", "paths.0.name='a-b'", "--no-server")
    assert result.exit_code == 130
    assert "cancel" not in result.stderr
    again = result.stderr.rstrip().split("go on with: al-loop ")[1]
    assert shlex.split(again) == ["run", str(run_file), "--name", "mine", "--set=paths.0.name='a-b'", "--no-server"]

    queue = ("executor.kind=pyiron", "executor.queue=slurm", "executor.walltime='1:00:00'")
    result = al_loop("run", run_file, "--name", "mine", *(word for change in queue for word in ("--set", change)))
    assert result.exit_code == 130
    assert "jobs in the queue go on (`al-loop cancel mine` ends them), go on with: al-loop run" in result.stderr


def labelled(rattle: float) -> Label:
    atoms = bulk("Cu", cubic=True) * (1, 1, 2)
    atoms.rattle(rattle, seed=1)
    atoms.calc = EMT()
    structure = Structure.from_atoms(atoms)
    return Label(
        key=label_key(structure, "f"),
        structure=structure,
        status="ok",
        fingerprint="f",
        calculator="emt",
        energy_ev=float(atoms.get_potential_energy()),
        forces=atoms.get_forces(),
        stress=atoms.get_stress(),
    )


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A run of one generation: two sound labels, a failed one, no band yet."""
    store = MemoryStore()
    first, second = labelled(0.0), labelled(0.1)
    failed = Label(
        key="failed", structure=second.structure, status="timeout", fingerprint="f", calculator="emt", reason="too slow"
    )
    for label in (first, second, failed):
        store.save_label(label, "hop")
    settings = RunSettings.model_validate(
        {
            "name": "hop",
            "paths": [{"name": "path", "band": "band.xyz"}],
            "calculator": {"name": "emt"},
            "store": {"mongodb_uri": "mongodb://me:secret@host/"},
        }
    )
    store.save_run(
        RunRecord(name="hop", settings=settings.model_dump(), settings_sha256="s", started="2026-01-02T03:04")
    )
    record = PathRecord(
        path="path",
        initial=first.structure,
        final=second.structure,
        label_keys=(first.key, second.key, "failed"),
        initial_label=first.key,
        final_label=second.key,
    )
    store.save_generation(
        GenerationRecord(
            run="hop",
            index=0,
            paths=(record,),
            label_keys=(first.key, second.key),
            kinds={first.key: "initial", second.key: "final", "failed": "endpoint"},
            n_reference_calls=3,
            decision=Decision(stop=False, code="continue", reason="settling the end states"),
        )
    )
    session(monkeypatch, open_record_store=lambda _: store)
    return store


def test_status_counts_labels_by_status(store: MemoryStore) -> None:
    (row,) = json.loads(al_loop("status", "--json").stdout)
    assert (row["name"], row["status"], row["generations"], row["n_reference_calls"]) == ("hop", "abandoned", 1, 3)
    assert row["labels"] == {"ok": 2, "timeout": 1}
    assert row["paths"][0]["barrier_forward_ev"] is None
    (one,) = json.loads(al_loop("status", "hop", "--json").stdout)
    assert [entry["index"] for entry in one["rows"]] == [0]
    table = al_loop("status", "hop").stdout
    assert "2 ok, 1 timeout" in table
    assert "settling the end states" in table


def test_status_of_an_empty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    session(monkeypatch, open_record_store=lambda _: MemoryStore())
    assert json.loads(al_loop("status", "--json").stdout) == []
    assert "no run yet" in al_loop("status").stdout


@pytest.mark.parametrize("verb", ["status", "show", "report", "export", "cancel"])
def test_a_run_that_is_not_there(
    store: MemoryStore, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = al_loop(verb, "hopp")
    assert (result.exit_code, result.stderr) == (2, "no run named 'hopp' (runs: hop)\n")
    assert not list(tmp_path.iterdir())


def test_show_is_what_barrier_json_holds(store: MemoryStore) -> None:
    shown = json.loads(al_loop("show", "hop", "--json").stdout)
    assert (shown["run"], shown["converged"], shown["n_reference_calls"]) == ("hop", False, 3)
    assert "no barrier" in al_loop("show", "hop").stdout


def test_export_is_what_mace_reads(store: MemoryStore, tmp_path: Path) -> None:
    result = al_loop("export", "hop", "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "out"))
    frames = ase.io.read(tmp_path / "out" / "dataset.extxyz", index=":")
    expected = [labelled(0.0), labelled(0.1)]
    assert [atoms.info["config_type"] for atoms in frames] == ["path-initial", "path-final"]
    for atoms, label in zip(frames, expected, strict=True):
        assert atoms.info["head"] == "Default"
        assert atoms.info["REF_energy"] == pytest.approx(label.energy_ev, abs=1e-7)
        np.testing.assert_allclose(atoms.arrays["REF_forces"], label.forces, atol=1e-7)
        assert label.stress is not None
        np.testing.assert_allclose(np.diag(atoms.info["REF_stress"]), label.stress[:3], atol=1e-9)
        assert atoms.calc is None, "`energy` and `forces` would collide with ASE's own"
    text = (tmp_path / "out" / "run.yaml").read_text("utf-8")
    assert "name: hop" in text
    assert "secret" not in text


def test_the_exported_committee_computes_what_it_computed(store: MemoryStore, tmp_path: Path) -> None:
    from mace.calculators import MACECalculator

    from alcore.mace.models import build_model, weights_to_bytes
    from alcore.mace.surrogate import MaceSurrogate

    models = [build_model([29], seed=seed) for seed in (1, 2)]
    members = [store.save_model(weights_to_bytes(model), {}) for model in models]
    (generation,) = store.load_generations("hop")
    store.save_generation(dataclasses.replace(generation, surrogate={"members": members}))
    assert al_loop("export", "hop", "-o", tmp_path).exit_code == 0
    files = sorted((tmp_path / "models").iterdir())
    assert [file.name for file in files] == ["member-0.model", "member-1.model"]
    structure = labelled(0.1).structure
    (expected,), _ = MaceSurrogate(prior=models[1]).evaluate(structure, structure.positions[None])
    atoms = structure.to_atoms()
    atoms.calc = MACECalculator(model_paths=str(files[1]), device="cpu", default_dtype="float64")
    assert atoms.get_potential_energy() == pytest.approx(expected, abs=1e-8)


def test_report_writes_a_folder(store: MemoryStore, tmp_path: Path) -> None:
    result = al_loop("report", "hop", "-o", tmp_path / "report")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "report" / "barrier.json").read_text("utf-8"))["run"] == "hop"
    assert (tmp_path / "report" / "report.html").exists()


def test_calculators_are_listed() -> None:
    result = al_loop("calculators")
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines() if line and line[0] != " "}
    assert rows["emt"] == "yes"
    assert {"tblite", "chgnet", "mace", "ase"} <= set(rows)


def test_the_contract_test_of_a_calculator() -> None:
    result = al_loop("calculators", "--test", "emt")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "BROKEN" not in result.stdout
    assert result.stdout.count("kept") >= 5
