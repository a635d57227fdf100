"""``al-loop pretrain``: a file in, a model out; faults are a line each, and the teacher is asked for nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.build import bulk
from ase.io import write
from typer.testing import CliRunner, Result

from alcore.errors import InputError
from alcore.mace.models import model_elements, open_foundation
from alcore.mace.pretraining import PretrainSpec
from alcore.sampling import DefectSpec, SampleSpec
from calculators.registry import resolve
from flows.cli import app
from flows.pretrain import learning_spec, read_job
from flows.pretrain_settings import LearningSettings, PretrainSettings, SamplingSettings, load_pretrain_file
from flows.runfile import config_folder, load_run_file
from flows.wiring import make_prior

ROOT = Path(__file__).resolve().parents[2]
TINY = {"epochs": 2, "channels": 2, "batch_size": 4, "n_layers": 1, "max_ell": 1, "correlation": 1, "r_max_ang": 4.0}
COUNTED = '''
import os, signal, time
from pathlib import Path
from ase.calculators.emt import EMT

def calculator(folder):
    """EMT that counts its calls, and at the call that a file names ends as the file says, or waits."""
    here = Path(folder)
    with (here / "calls").open("a") as calls:
        calls.write(".")
    number = (here / "calls").stat().st_size
    if (here / "stop-at").exists() and number == int((here / "stop-at").read_text()):
        (here / "stopped").touch()
        time.sleep(60)
    return EMT()
'''
Write = Callable[..., Path]


def pretrain(file: Path, *options: str | Path) -> Result:
    arguments = ["pretrain", str(file), *map(str, options)]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})


@pytest.fixture
def spec(tmp_path: Path) -> Write:
    """Writes a pre-training file: twelve structures around an alloy, with EMT; keys by name, None removes one."""
    atoms = bulk("Cu", "fcc", a=3.7, cubic=True) * (2, 1, 1)
    atoms.symbols[0] = "Au"
    write(tmp_path / "alloy.extxyz", atoms)

    def _spec(**changes: Any) -> Path:
        values = {
            "name": "tiny",
            "teacher": {"name": "emt"},
            "around": ["alloy.extxyz"],
            "sampling": {"count": 12},
            "pairs": 1,
            "training": TINY,
            **changes,
        }
        file = tmp_path / "pretrain.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return file

    return _spec


def counted(folder: Path) -> dict[str, Any]:
    """A teacher that counts its calls in ``folder / "calls"``."""
    (folder / "counted_teacher.py").write_text(COUNTED)
    sys.modules.pop("counted_teacher", None)  # another test's, whose folder is no more
    return {
        "teacher": {"name": "ase", "factory": "counted_teacher:calculator", "settings": {"folder": str(folder)}},
    }


def calls(folder: Path) -> int:
    return (folder / "calls").stat().st_size


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_comes_out_that_a_run_file_can_name(spec: Write, tmp_path: Path) -> None:
    result = pretrain(spec(), "-o", tmp_path / "priors")
    assert result.exit_code == 0, result.stderr
    file = tmp_path / "priors" / "tiny.model"
    made = next(line for line in result.stdout.splitlines() if line.startswith("tiny: 15 structures labelled by emt"))
    assert "held-out errors" in made
    assert made.endswith(str(file))
    told = json.loads(file.with_suffix(".json").read_text())
    assert told["elements"] == ["Cu", "Au"]
    assert told["note"].startswith("12 around alloy.extxyz; 3 pairs of Cu, Au")
    assert told["fingerprint"] == resolve("emt").fingerprint
    model = open_foundation(str(file)).model
    assert model_elements(model) == [29, 79]
    assert json.loads(model.pretraining)["note"] == told["note"]

    run_file = tmp_path / "run.yaml"
    paths = [{"initial": "alloy.extxyz", "final": "alloy.extxyz"}]
    foundation = {"foundation": "priors/tiny.model"}
    run = {"name": "hop", "paths": paths, "calculator": {"name": "emt"}, "model": foundation}
    run_file.write_text(yaml.safe_dump(run))
    assert model_elements(make_prior(load_run_file(run_file).model, [29, 79], 0).model) == [29, 79]


def test_quiet_says_one_line(spec: Write, tmp_path: Path) -> None:
    result = pretrain(spec(), "-q")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert (tmp_path / "tiny.model").is_file()


def test_a_space_alone_will_do_and_options_reach_the_student(spec: Write, tmp_path: Path) -> None:
    space = {"kind": "metals", "elements": ["Al", "Cu"], "count": 8}
    result = pretrain(spec(around=None, space=space, output="out/mine.model"))
    assert result.exit_code == 0, result.stderr
    told = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert told["note"].startswith("8 metals of Al, Cu")
    architecture = {key: TINY[key] for key in ("channels", "max_ell", "correlation", "r_max_ang", "n_layers")}
    assert architecture.items() <= told["spec"]["architecture"].items()
    assert (told["spec"]["epochs"], told["spec"]["batch_size"]) == (2, 4)


def test_defaults_are_those_of_the_science() -> None:
    assert learning_spec(LearningSettings()) == PretrainSpec()
    sampling = SamplingSettings().model_dump()
    for spec in (SampleSpec(), DefectSpec()):
        for key in vars(spec).keys() & sampling.keys():
            value = getattr(spec, key)
            assert sampling[key] == (list(value) if isinstance(value, tuple) else value)


# --- what is withheld -------------------------------------------------------------------------------------------------


def test_withheld_compositions_are_not_learned_from_and_the_report_says_so(spec: Write, tmp_path: Path) -> None:
    """Of structures around Cu7Au, those without a vacancy; and pairs of copper, by a formula."""
    changes = {"withhold": ["alloy.extxyz", "Cu2"], "sampling": {"count": 60, "vacancy_fraction": 0.5}, "pairs": 2}
    job = read_job(load_pretrain_file(spec(**changes)), "pretrain.yaml")
    formulas = {structure.to_atoms().get_chemical_formula() for structure in job.structures}
    assert formulas == {"AuCu6", "Cu7", "AuCu", "Au2"}
    n_around = sum(len(structure) > 2 for structure in job.structures)
    assert job.note.endswith(f"left out: Cu2 (2 drawn), AuCu7 ({60 - n_around} drawn)")
    result = pretrain(spec(**changes))
    assert result.exit_code == 0, result.stderr
    assert "left out: Cu2 (2 drawn), " in json.loads((tmp_path / "tiny.json").read_text())["note"]


def test_nothing_left_is_refused(spec: Write) -> None:
    changes = {"withhold": ["alloy.extxyz"], "sampling": {"count": 20, "vacancy_fraction": 0.0}, "pairs": 0}
    result = pretrain(spec(**changes))
    assert result.exit_code == 2
    assert "only 0 structures are left to learn from, 20 were withheld (raise sampling.count" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_example_withholds_its_hop_and_keeps_chromium_out_of_the_gap() -> None:
    pytest.importorskip("chgnet")
    settings = load_pretrain_file(config_folder() / "pretrain_cr_sb_te.yaml")
    job = read_job(settings.model_copy(update={"output": "nowhere"}), "pretrain_cr_sb_te.yaml")
    formulas = [structure.to_atoms().get_chemical_formula() for structure in job.structures]
    assert "left out: CrSb16Te24" in job.note
    assert not {"CrSb16Te24", "Cr2Sb16Te24"} & set(formulas)
    assert any("Cr" in formula and "Sb" in formula for formula in formulas)


# --- nothing is asked twice -------------------------------------------------------------------------------------------


def test_an_interrupted_teacher_goes_on_where_it_was(spec: Write, tmp_path: Path) -> None:
    """Ctrl-C at the ninth of fifteen structures: the same command asks for seven more, and ends as an unbroken one."""
    file = spec(**counted(tmp_path))
    (tmp_path / "stop-at").write_text("9")
    command = [sys.executable, "-m", "flows.cli", "pretrain", str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    until = time.monotonic() + 60
    while not (tmp_path / "stopped").exists():
        assert time.monotonic() < until, running.kill()
        assert running.poll() is None, running.stderr
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"go on with: al-loop pretrain {file}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "tiny.model").exists()
    result = pretrain(file)
    assert result.exit_code == 0, result.stderr
    assert "8 labels were in " in result.stdout
    assert calls(tmp_path) == 9 + 7

    (tmp_path / "stop-at").unlink()
    broken = (tmp_path / "tiny.json").read_text()
    result = pretrain(file, "-o", tmp_path / "unbroken.model")
    assert calls(tmp_path) == 9 + 7 + 15
    seconds = ("label_seconds", "train_seconds")
    first, second = (json.loads(text) for text in (broken, (tmp_path / "unbroken.json").read_text()))
    assert {k: v for k, v in first.items() if k not in seconds} == {k: v for k, v in second.items() if k not in seconds}
    assert first["label_seconds"] > 0


def test_another_training_asks_for_nothing(spec: Write, tmp_path: Path) -> None:
    file = spec(**counted(tmp_path))
    result = pretrain(file)
    assert result.exit_code == 0, result.stderr
    for suffix in ("model", "json"):
        (tmp_path / f"tiny.{suffix}").unlink()
    chunk = next((tmp_path / "tiny.labels").glob("*.npz"))
    (tmp_path / "tiny.labels" / "torn.npz").write_bytes(chunk.read_bytes()[:100])
    again = spec(**counted(tmp_path), training={**TINY, "epochs": 3})
    result = pretrain(again)
    assert result.exit_code == 0, result.stderr
    assert calls(tmp_path) == 15


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 3}, "epochs: unknown key (did you mean `training.epochs`?"),
        ({"training": {"epochs": 0}}, "training.epochs: 0 is refused: must be greater than or equal to 1 (passes over"),
        ({"training": {"learning_rte": 0.1}}, "training.learning_rte: unknown key (did you mean `learning_rate`?"),
        ({"around": None}, "there is nothing to learn from (give `around`, `space`, or both"),
        ({"around": ["gone.xyz"]}, "around.0: no such file: HERE/gone.xyz (give a file ase.io.read takes"),
        ({"around": ["pretrain.yaml"]}, "around.0: pretrain.yaml cannot be read: "),
        ({"withhold": ["POSCAR_gone"]}, "withhold.0: 'POSCAR_gone' is neither a file nor a formula"),
        ({"teacher": None}, "teacher: missing (add `teacher`: what labels the structures"),
        ({"teacher": {"name": "emmt"}}, "teacher.name: there is no calculator 'emmt' (did you mean emt?"),
        ({"teacher": {"name": "tblite", "settings": {"method": "PBE"}}}, "teacher.settings.method: 'PBE' is not known"),
        ({"space": {"kind": "metal", "elements": ["Cu"]}}, "space.kind: 'metal' is not known (did you mean `metals`?"),
        ({"space": {"kind": "metals", "elements": ["H"]}}, "space.elements: H has no simple crystal (sample around"),
        ({"space": {"kind": "tellurides", "elements": ["Te"]}}, "space.elements: Te and one of Sb, Bi are needed"),
        (
            {"space": {"kind": "salts", "elements": ["Na", "Cl"]}},
            "teacher: emt does not know Na, Cl (it knows H C N O ",
        ),
        ({"sampling": {"rattle_ang": [0.2, 0.1]}}, "sampling: `rattle_ang` is [0.2, 0.1] (give a low and a higher one"),
        ({"output": "alloy.extxyz"}, "output: HERE/alloy.extxyz is no folder"),
        ({"name": "../up"}, "name: '../up' has not the right form"),
    ],
)
def test_a_fault_is_one_line_and_nothing_is_asked(
    changes: dict[str, Any], expected: str, spec: Write, tmp_path: Path
) -> None:
    file = spec(**changes)
    result = pretrain(file)
    assert result.exit_code == 2
    place, said = f"{file}: ", result.stderr.replace(str(tmp_path), "HERE")
    assert said.startswith(place.replace(str(tmp_path), "HERE") + expected), said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("*.labels"))


def test_every_fault_is_told(spec: Write) -> None:
    result = pretrain(spec(around=["a", "b"], seed=-1, training={"epochs": "many"}))
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [
        "around.0",
        "around.1",
        "training.epochs",
        "seed",
    ]


def test_no_file_and_no_mapping_name_the_example(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    for file, fault in ((tmp_path / "gone.yaml", "no such file"), (tmp_path / "empty.yaml", "the file is empty")):
        result = pretrain(file)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"{file}: {fault} (config/pretrain_cr_sb_te.yaml is an example)")


def test_a_model_that_exists_is_not_overwritten(spec: Write, tmp_path: Path) -> None:
    (tmp_path / "tiny.model").write_text("mine")
    result = pretrain(spec())
    assert result.exit_code == 2
    assert "tiny.model (remove that, or give another output (-o))" in result.stderr
    assert (tmp_path / "tiny.model").read_text() == "mine"


def test_settings_are_described() -> None:
    """What the messages give as a mend."""
    for model in (PretrainSettings, SamplingSettings, LearningSettings):
        assert all(field.description for field in model.model_fields.values())


def test_an_unreadable_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_pretrain_file(tmp_path)
