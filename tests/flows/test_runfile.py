"""Run files: every bad input is one line that names file, key and mend; every good one survives a round trip."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alcore.errors import InputError
from flows.runfile import (
    RunFileErrors,
    apply_override,
    config_folder,
    dump_run_file,
    load_run_file,
    resolve_settings,
)
from flows.settings import RunSettings

GOOD = """\
name: cu-vacancy
paths:
  - name: hop
    initial: POSCAR_initial
    final: POSCAR_final
calculator:
  name: emt
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run file beside two (empty) end states."""

    def _write(text: str) -> Path:
        for name in ("POSCAR_initial", "POSCAR_final"):
            (tmp_path / name).touch()
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return _write


def problems(file: Path, *overrides: str) -> list[str]:
    """What is wrong with it, without the folder."""
    with pytest.raises(InputError) as caught:
        load_run_file(file, overrides)
    lines = caught.value.problems if isinstance(caught.value, RunFileErrors) else [str(caught.value)]
    assert "\n".join(lines) == str(caught.value)
    assert not [line for line in lines if "\n" in line]
    return [line.replace(f"{file.parent}/", "") for line in lines]


def test_paths_start_at_the_run_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(GOOD)
    settings = load_run_file(file)
    assert settings.paths[0].initial == str(file.parent / "POSCAR_initial")
    monkeypatch.chdir(file.parent)
    assert load_run_file("run.yaml") == settings
    assert load_run_file("run.yaml", name="other").name == "other"


def test_paths_among_a_calculators_settings_too(write: Write) -> None:
    mace = "calculator: {name: mace, settings: {model: teacher.model, head: null}}\n"
    settings = load_run_file(write(GOOD.replace("calculator:\n  name: emt\n", mace)))
    assert settings.calculator.settings == {"model": str(Path(write(GOOD)).parent / "teacher.model"), "head": None}
    ase = "calculator: {name: ase, factory: 'mine:make', settings: {model: teacher.model}}\n"
    settings = load_run_file(write(GOOD.replace("calculator:\n  name: emt\n", ase)))
    assert settings.calculator.settings == {"model": "teacher.model"}, "a factory's arguments are its own"
    assert settings.calculator.path == str(write(GOOD).parent)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            ("POSCAR_initial", "POSCAR_start"),
            "run.yaml: paths.0.initial: no such file: POSCAR_start (give an existing ",
        ),
        (("initial:", "intial:"), "run.yaml: paths.0.intial: unknown key (did you mean `initial`?; line 4)"),
        (("name: emt", "name: etm"), "run.yaml: calculator.name: there is no calculator 'etm' (did you mean emt? "),
        (("calculator:\n  name: emt\n", ""), "run.yaml: calculator: missing (add `calculator`: "),
        (("name: cu-vacancy", "name: cu vacancy"), "run.yaml: name: 'cu vacancy' has not the right form (letters, "),
        (("name: cu-vacancy", "name: 12"), "run.yaml: name: 12 is not text (the run's name"),
        (("    final: POSCAR_final\n", ""), "run.yaml: paths.0: `final` is missing (give `initial` and `final`, or "),
        (
            ("name: emt", "name: emt\n  settings: {cutoff: 5}"),
            "run.yaml: calculator.settings.cutoff: unknown key (known",
        ),
        (
            ("name: emt", "name: tblite\n  settings: {metod: x}"),
            "run.yaml: calculator.settings.metod: unknown key (did ",
        ),
        (("name: emt", "name: mace"), "run.yaml: calculator.settings.model: missing (add `model`: path of "),
    ],
)
def test_bad_paths_and_calculators(write: Write, changed: tuple[str, str], expected: str) -> None:
    assert problems(write(GOOD.replace(*changed)))[0].startswith(expected)


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("stop: {barrier_tolerance_ev: 0}", "stop.barrier_tolerance_ev: 0 is refused: must be greater than 0 (eV; "),
        (
            "stop: {saddle_fmax_ev_per_ang: -0.05}",
            "stop.saddle_fmax_ev_per_ang: -0.05 is refused: must be greater than 0",
        ),
        ("neb: {fmax: 0.03}", "neb.fmax: unknown key (did you mean `fmax_ev_per_ang`?; line 8)"),
        ("neb: {n_image: 7}", "neb.n_image: unknown key (did you mean `n_images`?; line 8)"),
        ("neb: {n_images: 7.5}", "neb.n_images: 7.5 is not a whole number (images between the end states; line 8)"),
        ("max_labels: 3", "max_labels: unknown key (did you mean `stop.max_labels`?; line 8)"),
        ("frobnicate: 3", "frobnicate: unknown key (known here: name, paths, data, calculator, "),
        ("executor: {kind: piron}", "executor.kind: 'piron' is not known (did you mean `pyiron`?; line 8)"),
        (
            "executor: {queue: slurm}",
            "executor: `queue` belongs to kind: pyiron (remove it, or set kind: pyiron; line 8)",
        ),
        ("executor: {kind: pyiron, partition: long}", "executor: `partition` needs a queue (set `queue`, e.g. queue: "),
        ("executor: {kind: pyiron, queue: slurm}", "executor: `walltime` is missing (a job in a queue needs one, "),
        ("executor: {timeout: 5}", "executor.timeout: unknown key (did you mean `timeout_s`?; line 8)"),
        ("model: {strategy: frozen}", "model: strategy frozen needs a trained model to start from (set `foundation`"),
        ("model: {strategy: scrach}", "model.strategy: 'scrach' is not known (did you mean `scratch`?; line 8)"),
        ("model: {correction: gpr}", "model.correction: 'gpr' is not known (did you mean `gp`?; line 8)"),
        (
            "model: {foundation: medum}",
            "model.foundation: 'medum' is neither a .model file nor a name mace-torch knows ",
        ),
        ("model: {foundation: my.model}", "model.foundation: no such file: my.model (give an existing file; "),
        ("model: {options: {epoch: 5}}", "model.options.epoch: unknown key (did you mean `epochs`?; line 8)"),
        (
            "model: {options: {epochs: 0}}",
            "model.options.epochs: 0 is refused: must be greater than or equal to 1 (of ",
        ),
        (
            "model: {options: {lora_rank: 4}}",
            "model: `options.lora_rank` belongs to strategy: lora (remove it; line 8)",
        ),
        ("model: {options: {head: mp}}", "model: `options.head` is that of a foundation model (set `foundation`, or "),
        (
            "model: {foundation: small, strategy: frozen, options: {frozen_layers: [trunk]}}",
            "model.options.frozen_layers.0: 'trunk' is not known (",
        ),
        (
            "model: {foundation: small, strategy: multihead, options: {replay_file: old.xyz}}",
            "model.options.replay_file: no such file: old.xyz (give an existing file; ",
        ),
        ("model: 3", "model: 3 is not a mapping (key: value) (the surrogate; line 8)"),
        ("data: [old.xyz]", "data.0: no such file: old.xyz (give an existing file; "),
        ("data: old.xyz", "data: 'old.xyz' is not a list (files of labelled structures to start from; line 8)"),
        ("seed: -1", "seed: -1 is refused: must be greater than or equal to 0 (of everything that is random; line 8)"),
    ],
)
def test_bad_values_and_keys(write: Write, added: str, expected: str) -> None:
    (problem,) = problems(write(GOOD + added))
    assert problem.startswith(f"run.yaml: {expected}")


def test_all_problems_are_told_at_once(write: Write) -> None:
    text = GOOD.replace("POSCAR_final", "gone").replace("emt", "emmt") + "stop: {max_labels: 0}\nstoop: 1\n"
    found = problems(write(text), "nonsense", "neb.climb=maybe")
    keys = ["--set", "paths.0.final", "calculator.name", "neb.climb", "stop.max_labels", "stoop"]
    assert [line.removeprefix("run.yaml: ").split(":")[0] for line in found] == keys
    assert found[3].endswith("set on the command line)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.yaml: the file is empty"),
        ("- 1\n", "run.yaml: the file is a list, not a mapping"),
        ("a: [1,\nb: 2\n", "run.yaml: not valid YAML"),
        ("a: 1\na: 2\n", "run.yaml: not valid YAML: found duplicate key"),
        ("a:\n\t- 1\n", "run.yaml: not valid YAML: found character '\\t' that cannot start any token (line 2)"),
        ("a: !!python/object:os.system x\n", "run.yaml: not valid YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_run_file(write: Write, text: str, expected: str) -> None:
    (problem,) = problems(write(text))
    assert problem.startswith(expected)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, expected in (("gone.yaml", "no such file"), ("binary", "not a text file"), (".", "cannot be read")):
        with pytest.raises(InputError, match=expected):
            load_run_file(tmp_path / name)


def test_a_password_is_not_repeated(write: Write) -> None:
    (problem,) = problems(write(GOOD + "store: {mongodb_uri: 'mongo://me:secret@host'}\n"))
    assert "store.mongodb_uri" in problem
    assert "secret" not in problem


def test_a_section_of_which_all_is_commented_out_has_its_defaults(write: Write) -> None:
    text = GOOD + "  settings:\n    # nothing\nmodel:\n  options:\nneb:\nstop:\ndata:\nstore:\n"
    assert load_run_file(write(text)) == load_run_file(write(GOOD))


def test_numbers_are_read_as_people_write_them(write: Write) -> None:
    settings = load_run_file(write(GOOD + "stop: {barrier_tolerance_ev: 1e-2}\n"), ["neb.fmax_ev_per_ang=2e-2"])
    assert (settings.stop.barrier_tolerance_ev, settings.neb.fmax_ev_per_ang) == (0.01, 0.02)


def test_overrides_reach_into_lists_and_make_sections(write: Write) -> None:
    file = write(GOOD)
    settings = load_run_file(
        file, ["paths.0.initial=POSCAR_final", "model.options.epochs=5", "paths.1={name: back, band: POSCAR_initial}"]
    )
    assert settings.paths[0].initial == str(file.parent / "POSCAR_final")
    assert settings.paths[1].band == str(file.parent / "POSCAR_initial")
    assert settings.model.options == {"epochs": 5}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("neb", "--set: 'neb' has not the form key=value"),
        ("=3", "--set: '=3' has not the form key=value"),
        ("neb..climb=3", "--set: 'neb..climb=3' has not the form key=value"),
        ("neb={a", "--set neb: '{a' is not a YAML value"),
        ("name.first=x", "--set name.first: name is a single value (set name itself)"),
        ("paths.2.initial=x", "--set paths.2.initial: '2' is no place in a list of 1 (count from 0)"),
        ("paths.-1.initial=x", "--set paths.-1.initial: '-1' is no place in a list of 1 (count from 0)"),
        ("neb.fmx_ev_per_ang=1", "run.yaml: neb.fmx_ev_per_ang: unknown key (did you mean `fmax_ev_per_ang`?; set on "),
    ],
)
def test_bad_overrides(write: Write, override: str, expected: str) -> None:
    assert problems(write(GOOD), override)[0].startswith(expected)


WORDS = st.from_regex(r"[a-z][a-z_0-9]{0,9}", fullmatch=True)
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=8
)


@given(keys=st.lists(WORDS, min_size=1, max_size=4), value=VALUES)
def test_an_override_sets_exactly_what_it_says(keys: list[str], value: Any) -> None:
    before = {"kept": 1, "name": "x"} if keys[0] not in ("kept", "name") else {}
    data: dict[str, Any] = dict(before)
    as_typed = json.dumps(value, ensure_ascii=False)  # JSON is YAML
    assert apply_override(data, f"{'.'.join(keys)}={as_typed}") == tuple(keys)
    found: Any = data
    for key in keys:
        found = found[key]
    assert found == value
    assert type(found) is type(value)
    assert {key: data[key] for key in before} == before


@st.composite
def run_settings(draw: st.DrawFn) -> RunSettings:
    """Any settings a run file can state, but for the files, which have to exist."""
    positive = st.floats(1e-9, 1e9)
    return RunSettings.model_validate(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
            "paths": [
                {
                    "name": name,
                    "band": __file__,
                    "charge": draw(st.floats(-9, 9)),
                    "magnetic_moments": draw(st.none() | st.lists(st.floats(-9, 9), min_size=1, max_size=3)),
                    "reference_barrier_ev": draw(st.none() | positive),
                }
                for name in draw(st.lists(WORDS, min_size=1, max_size=3, unique=True))
            ],
            "calculator": {
                "name": "ase",
                "factory": "package.module:function",
                "path": str(Path(__file__).parent),
                "settings": draw(st.dictionaries(st.text(st.characters(exclude_categories=["C"]), max_size=9), VALUES)),
            },
            "model": {"options": draw(st.fixed_dictionaries({}, optional={"learning_rate": positive}))},
            "stop": {"barrier_tolerance_ev": draw(positive), "max_labels": draw(st.integers(1, 10**6))},
            "seed": draw(st.integers(0, 2**32 - 1)),
        }
    )


@given(settings=run_settings())
def test_dump_and_load_give_the_same_settings(tmp_path_factory: pytest.TempPathFactory, settings: RunSettings) -> None:
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_run_file(settings), encoding="utf-8")
    assert load_run_file(file) == settings


RUN_FILES = [file for file in sorted(config_folder().glob("*.yaml")) if not file.stem.startswith("pretrain_")]


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: file.stem)
def test_the_examples_are_good_run_files(file: Path) -> None:
    settings = load_run_file(file)
    assert settings.paths[0].name
    assert settings.stop.max_labels <= 60


def test_config_folder_holds_the_quickstart() -> None:
    assert {"quickstart", "cu_vacancy", "cr_sb2te3"} <= {file.stem for file in config_folder().glob("*.yaml")}


def test_an_installed_package_has_its_own_config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.runfile.__file__", str(tmp_path / "flows" / "runfile.py"))
    assert config_folder() == tmp_path / "config"
    (tmp_path / "flows" / "_config").mkdir(parents=True)
    assert config_folder() == tmp_path / "flows" / "_config"


def test_parameters_name_a_run_file_or_are_one(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(GOOD)
    from_file = resolve_settings(config=str(file))
    assert from_file == load_run_file(file)
    assert resolve_settings(settings=from_file) == from_file
    monkeypatch.chdir(file.parent)
    content = {
        "name": "cu-vacancy",
        "paths": [{"initial": "POSCAR_initial", "final": "POSCAR_final"}],
        "calculator": {"name": "emt"},
    }
    assert resolve_settings(settings=content) == from_file
    assert content["paths"] == [{"initial": "POSCAR_initial", "final": "POSCAR_final"}], "what was given is not changed"
    assert resolve_settings(settings=content, name="mine").name == "mine"
    assert resolve_settings(config=str(file), name="123").name == "123"
    assert resolve_settings() == load_run_file(config_folder() / "quickstart.yaml")


def test_bad_parameters(write: Write) -> None:
    with pytest.raises(InputError, match="parameters: config and settings are both given"):
        resolve_settings(config=str(write(GOOD)), settings={})
    with pytest.raises(RunFileErrors) as caught:
        resolve_settings(settings={"name": "x", "paths": [], "calculator": {"name": "emt"}, "stops": {}})
    assert [line.split(":")[1] for line in caught.value.problems] == [" paths", " stops"]


def test_errors_survive_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(RunFileErrors(["a: b (c)", "d: e (f)"])))
    assert error.problems == ["a: b (c)", "d: e (f)"]
    assert str(error) == "a: b (c)\nd: e (f)"
