"""The settings models: every key of the documented run file, its default, its bounds, its meaning."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from flows.settings import (
    FOUNDATION_NAMES,
    CalculatorSettings,
    ExecutorSettings,
    PathSettings,
    RunSettings,
    TrainingOptions,
)
from flows.wiring import loop_spec

DOCUMENTED = """
name: cu-vacancy
paths:
  - name: hop
    initial: POSCAR_initial
    final: POSCAR_final
    relax_endpoints: true
    reference_barrier_ev: null
    charge: 0
data: []
calculator:
  name: emt
  settings: {}
executor: {kind: local, workers: 2, timeout_s: 3600}
model:
  foundation: null
  strategy: auto
  committee: 3
  correction: blr+gp
  options: {}
  device: auto
neb: {n_images: 7, climb: true, fmax_ev_per_ang: 0.03, spring_ev_per_ang2: 0.1, interpolation: idpp}
select: {strategy: saddle+uncertainty, labels_per_generation: 1}
stop: {barrier_tolerance_ev: 0.01, saddle_fmax_ev_per_ang: 0.05, max_generations: 15, max_labels: 60}
store: {mongodb_uri: null}
seed: 0
"""
PATHS = [{"initial": "a", "final": "b"}]
SMALLEST: dict[str, Any] = {"name": "x", "paths": PATHS, "calculator": {"name": "emt"}}
POSITIVE = [
    ("executor", "workers"),
    ("executor", "timeout_s"),
    ("executor", "threads"),
    ("executor", "max_running"),
    ("executor", "memory_gb"),
    ("executor", "cores"),
    ("model", "committee"),
    ("neb", "n_images"),
    ("neb", "fmax_ev_per_ang"),
    ("neb", "spring_ev_per_ang2"),
    ("select", "labels_per_generation"),
    ("stop", "barrier_tolerance_ev"),
    ("stop", "saddle_fmax_ev_per_ang"),
    ("stop", "max_generations"),
    ("stop", "max_labels"),
]


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """``(dotted key, description)`` of every field."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.description or ""
        types = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for inner in types:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from leaves(inner, f"{prefix}{name}.")


def test_the_documented_run_file_states_the_defaults() -> None:
    documented = RunSettings.model_validate(YAML(typ="safe").load(DOCUMENTED))
    smallest = RunSettings.model_validate(
        {
            "name": "cu-vacancy",
            "paths": [{"initial": "POSCAR_initial", "final": "POSCAR_final"}],
            "calculator": {"name": "emt"},
        }
    )
    assert documented == smallest


def test_every_key_says_what_it_means_and_in_which_unit() -> None:
    described = dict(leaves(RunSettings))
    assert len(described) > 40
    assert not [key for key, description in described.items() if len(description) < 10]
    units = {"_gb": "GB", "_ev": "eV", "_ev_per_ang": "eV/Å", "_ev_per_ang2": "eV/Å²", "_s": "s;"}
    for ending, unit in units.items():
        keys = [key for key in described if key.endswith(ending)]
        assert keys
        assert not [key for key in keys if unit not in described[key]]


@pytest.mark.parametrize(("section", "key"), POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_what_must_be_positive_is(section: str, key: str, value: int) -> None:
    with pytest.raises(ValidationError, match=f"{section}.{key}"):
        RunSettings.model_validate(SMALLEST | {section: {key: value}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("executor", "kind", "dask"),
        ("executor", "queue", "cron"),
        ("executor", "walltime", "12 hours"),
        ("executor", "walltime", 3600),
        ("executor", "retries", -1),
        ("executor", "memory_gb", float("inf")),
        ("model", "strategy", "qlora"),
        ("model", "correction", "blr+blr"),
        ("model", "foundation", "enormous"),
        ("model", "device", "gpu"),
        ("neb", "interpolation", "spline"),
        ("neb", "fmax_ev_per_ang", float("nan")),
        ("neb", "climb", "yes"),
        ("neb", "n_images", "7"),
        ("neb", "n_images", True),
        ("store", "mongodb_uri", "localhost:27017"),
    ],
)
def test_what_does_not_work_today_is_refused(section: str, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"{section}.{key}"):
        RunSettings.model_validate(SMALLEST | {section: {key: value}})


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "a/b", "a\n"])
def test_a_name_can_be_a_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        RunSettings.model_validate(SMALLEST | {"name": name})


def test_a_path_is_a_pair_or_a_band() -> None:
    assert PathSettings(band="band.xyz").initial is None
    for wrong in ({}, {"initial": "a"}, {"final": "b"}, {"band": "c", "initial": "a", "final": "b"}):
        with pytest.raises(ValidationError, match="`band`"):
            PathSettings.model_validate(wrong)


def test_hops_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="named 'hop'"):
        RunSettings.model_validate(SMALLEST | {"paths": PATHS * 2})


def test_one_uncorrected_member_states_no_uncertainty() -> None:
    with pytest.raises(ValidationError, match="no uncertainty"):
        RunSettings.model_validate(SMALLEST | {"model": {"committee": 1, "correction": "none"}})


def test_a_factory_goes_with_ase_and_with_nothing_else() -> None:
    given = CalculatorSettings(name="ase", factory="my.module:make", settings={"a": 1}, packages=["gpaw"])
    assert given.arguments() == {
        "factory": "my.module:make",
        "settings": {"a": 1},
        "path": None,
        "packages": ["gpaw"],
    }
    assert CalculatorSettings(name="tblite", settings={"method": "GFN2-xTB"}).arguments() == {"method": "GFN2-xTB"}
    for wrong in ({"name": "ase"}, {"name": "emt", "factory": "a:b"}, {"name": "ase", "factory": "no colon"}):
        with pytest.raises(ValidationError, match="factory"):
            CalculatorSettings.model_validate(wrong)


QUEUED: dict[str, Any] = {"kind": "pyiron", "queue": "slurm", "walltime": "1-12:00:00"}


@pytest.mark.parametrize("values", [{}, {"kind": "pyiron"}, {"kind": "pyiron", "cores": 4, "prologue": ["x"]}, QUEUED])
def test_executors_that_make_sense(values: dict[str, Any]) -> None:
    settings = ExecutorSettings.model_validate(values)
    assert {key: getattr(settings, key) for key in values} == values
    assert settings.kind == values.get("kind", "local")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prologue": ["x"]}, "prologue"),
        ({"modules": ["vasp"]}, "modules"),
        ({"queue": "slurm", "walltime": "1:00:00"}, "queue"),
        ({"kind": "pyiron", "walltime": "1:00:00"}, "walltime"),
        ({"kind": "pyiron", "submit_options": ["--account=a"]}, "submit_options"),
        ({"kind": "pyiron", "queue": "slurm"}, "walltime"),
    ],
)
def test_keys_of_an_executor_that_it_would_ignore_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=f"`{named}`"):
        ExecutorSettings.model_validate(values)


def test_the_foundation_names_are_those_of_mace_torch() -> None:
    spec = find_spec("mace")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "calculators" / "foundations_models.py").read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "mace_mp_urls":
            assert set(ast.literal_eval(node.value)) == set(FOUNDATION_NAMES)
            return
    pytest.fail("mace_mp_urls has moved")


def test_the_training_options_are_those_of_the_trainer() -> None:
    """Of the parts of alcore they are handed to, which import torch."""

    def defaults(module: str, name: str) -> dict[str, object]:
        tree = ast.parse((Path(__file__).parents[2] / "alcore" / "mace" / f"{module}.py").read_text("utf-8"))
        spec = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        given = [f for f in spec.body if isinstance(f, ast.AnnAssign) and isinstance(f.value, ast.Constant | ast.Tuple)]
        return {ast.unparse(f.target): ast.literal_eval(f.value) for f in given if f.value}

    ours = TrainingOptions().model_dump()
    theirs = defaults("training", "TrainSpec") | defaults("strategies", "StrategySpec")
    replay, sanity = defaults("trainer", "ModelSpec")["replay_count"], defaults("sanity", "SanitySpec")
    sane = {"sane_energy_ev": sanity["energy_rmse_ev"], "sane_force_ev_per_ang": sanity["force_rmse_ev_per_ang"]}
    del theirs["learning"]
    theirs["frozen_layers"] = list(theirs["frozen_layers"])  # type: ignore[call-overload]
    assert ours == theirs | sane | {"replay_count": replay, "replay_file": None, "head": None}


@pytest.mark.parametrize("strategy", ["lora", "frozen", "multihead"])
def test_some_strategies_start_from_a_foundation_model(strategy: str) -> None:
    with pytest.raises(ValidationError, match="needs a trained model to start from"):
        RunSettings.model_validate(SMALLEST | {"model": {"strategy": strategy}})
    model = RunSettings.model_validate(SMALLEST | {"model": {"strategy": strategy, "foundation": "small"}}).model
    assert model.strategy == strategy


def test_the_form_shows_bounds_and_choices() -> None:
    schema = RunSettings.model_json_schema()
    assert schema["additionalProperties"] is False
    stop = schema["$defs"]["StopSettings"]["properties"]["barrier_tolerance_ev"]
    assert (stop["exclusiveMinimum"], stop["default"]) == (0, 0.01)
    assert schema["$defs"]["ModelSettings"]["properties"]["strategy"]["enum"] == [
        "auto",
        "zero-shot",
        "scratch",
        "naive",
        "multihead",
        "lora",
        "frozen",
    ]


@pytest.mark.parametrize(
    ("calculator", "symmetric"),
    [
        ({"name": "emt"}, True),
        ({"name": "vasp", "settings": {"encut": 400, "kspacing": 0.3}}, True),
        ({"name": "vasp", "settings": {"encut": 400, "kpts": [4, 4, 4]}}, True),
        ({"name": "vasp", "settings": {"encut": 400, "kpts": [4, 4, 2]}}, False),
        ({"name": "vasp", "settings": {"encut": 400, "kspacing": 0.3, "lreal": False}}, True),
        ({"name": "vasp", "settings": {"encut": 400, "kspacing": 0.3, "lreal": True}}, False),
        ({"name": "vasp", "settings": {"encut": 400, "kspacing": 0.3, "lreal": "Auto"}}, False),
        ({"name": "vasp", "settings": {"encut": 400, "kspacing": 0.3, "lreal": "On"}}, False),
        ({"name": "vasp", "settings": {"folder": "inputs"}}, False),
        ({"name": "vasp", "settings": {"encut": 400, "kspacing": 0.3, "incar": {"LSORBIT": True}}}, False),
        ({"name": "espresso", "settings": {"kpts": [2, 2, 2], "koffset": [1, 0, 0]}}, False),
        ({"name": "gpaw", "settings": {"mode": "pw"}}, True),
        ({"name": "gpaw", "settings": {"mode": "lcao"}}, False),
        ({"name": "cp2k"}, False),
        ({"name": "ase", "factory": "here:make"}, False),
    ],
)
def test_labels_are_shared_by_symmetry_where_the_calculation_has_it(
    calculator: dict[str, Any], symmetric: bool
) -> None:
    settings = RunSettings.model_validate({**SMALLEST, "calculator": calculator})
    assert loop_spec(settings).neb.symmetry is symmetric
    for chosen in (True, False):
        told = RunSettings.model_validate({**SMALLEST, "calculator": calculator, "neb": {"symmetry": chosen}})
        assert loop_spec(told).neb.symmetry is chosen
    assert "symmetry" not in settings.model_dump()["neb"], "a run that was begun before there was this key is the same"
