from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from ase.build import bulk, molecule
from pydantic import Field

from alcore.errors import CalculatorError
from alcore.identity import json_sha256
from alcore.types import Structure
from calculators.base import CalculatorSettings, LocalPath
from calculators.registry import REGISTRY, describe, describe_all, get_calculator, resolve


def water(charge: float = 0.0, moments: list[float] | None = None) -> Structure:
    return Structure.from_atoms(molecule("H2O"), charge=charge, magnetic_moments=moments)


def test_unknown_name_gives_the_nearest_and_all() -> None:
    with pytest.raises(CalculatorError, match=r"did you mean tblite\?.*known: emt, tblite, .*, ase"):
        get_calculator("tblight")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tblite", {"acuracy": 1.0}, "unknown key acuracy, did you mean accuracy"),
        ("tblite", {"accuracy": -1.0}, "accuracy: Input should be greater than 0"),
        ("emt", {"cutoff": 1.0}, "unknown key cutoff, known: none"),
        ("mace", {}, "model: Field required"),
        ("mace", {"model": "nowhere.model"}, "nowhere.model: cannot read the model"),
        ("ase", {"factory": "no_such_module:make"}, "cannot import no_such_module:make"),
        ("ase", {"factory": "ase.calculators.emt:parameters"}, "is not callable"),
        ("ase", {"factory": "ase.calculators.emt"}, "factory: String should match pattern"),
        ("ase", {"factory": "ase.calculators.emt:EMT", "packages": ["no-such-code"]}, "no-such-code is not installed"),
    ],
)
def test_bad_settings_are_one_line(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(CalculatorError, match=message) as caught:
        resolve(name, settings)
    assert "\n" not in str(caught.value)


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(CalculatorError, match=r"accuracy: .*; unknown key chrge, did you mean charge"):
        resolve("tblite", {"accuracy": -1.0, "chrge": 1})


def test_fingerprint_moves_with_what_moves_the_energy_and_only_with_that() -> None:
    plain = resolve("tblite")
    assert resolve("tblite", {"accuracy": 1.0}).fingerprint == plain.fingerprint == json_sha256(plain.facts)
    assert resolve("tblite", {"max_iterations": 1000}).fingerprint == plain.fingerprint
    others = [{"method": "GFN2-xTB"}, {"accuracy": 0.1}, {"electronic_temperature_k": 1000.0}, {"charge": 1}]
    prints = {plain.fingerprint, *(resolve("tblite", settings).fingerprint for settings in others)}
    assert len(prints) == 1 + len(others)
    assert resolve("emt").fingerprint not in prints


def test_facts_are_plain_and_name_code_and_version() -> None:
    for name in ("emt", "tblite", "chgnet"):
        facts = resolve(name).facts
        assert json.loads(json.dumps(facts)) == facts
        assert {"code", "version", "calculator"} <= facts.keys()


def test_chgnet_weights_are_in_the_fingerprint() -> None:
    hashes = {resolve("chgnet", {"model": name}).facts["weights_sha256"] for name in ("0.3.0", "0.2.0", "r2scan")}
    assert len(hashes) == 3


def test_factory_outside_site_packages_is_known_by_its_source(tmp_path: Path) -> None:
    source = "from ase.calculators.emt import EMT\ndef make(): return EMT()\n"
    prints = []
    for folder, text in (("one", source), ("two", source), ("three", source + "# changed\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own_factory.py").write_text(text)
        resolved = resolve("ase", {"factory": "own_factory:make"}, base=tmp_path / folder)
        prints.append(resolved.fingerprint)
        sys.modules.pop("own_factory")
        sys.path.remove(str(tmp_path / folder))
    assert prints[0] == prints[1] != prints[2]


def test_installed_factory_is_known_by_its_version() -> None:
    import ase

    facts = resolve("ase", {"factory": "ase.calculators.emt:EMT", "packages": ["numpy"]}).facts
    assert facts["version"] == f"ase {ase.__version__}"
    assert facts["packages"] == {"numpy": np.__version__}


def test_relative_paths_refer_to_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "teacher.model").write_bytes(b"weights")
    assert resolve("mace", {"model": "teacher.model"}, base=tmp_path).settings.model == tmp_path / "teacher.model"  # type: ignore[attr-defined]


def test_a_file_that_is_no_model_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "broken.model").write_bytes(b"not a pickle")
    resolved = resolve("mace", {"model": str(tmp_path / "broken.model")})
    with pytest.raises(CalculatorError, match="cannot be read as a MACE model"):
        resolved.check_available()


def test_mace_knows_its_elements_and_heads(tiny_mace: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_mace, tmp_path / "fresh.model")
    resolved = resolve("mace", {"model": "fresh.model"}, base=tmp_path)
    assert resolved.entry.elements(resolved.settings) == {13, 29}
    resolved.check_available()
    with pytest.raises(CalculatorError, match="does not know H, O"):
        resolved.check_structure(water())
    with pytest.raises(CalculatorError, match="has no head 'dft'"):
        resolve("mace", {"model": str(tiny_mace), "head": "dft"}).check_available()


def test_a_charge_that_would_be_ignored_is_refused() -> None:
    for name in ("emt", "chgnet"):
        assert not REGISTRY[name].takes_charge
        with pytest.raises(CalculatorError, match=r"would ignore the charge of \+1 e"):
            resolve(name).check_structure(water(charge=1.0))
    factory = resolve("ase", {"factory": "ase.calculators.emt:EMT"})
    with pytest.raises(CalculatorError, match="has no parameter `charge`"):
        factory.check_structure(water(charge=1.0))


def test_tblite_refuses_what_it_would_compute_wrongly() -> None:
    resolved = resolve("tblite")
    resolved.check_structure(water(charge=1.0))
    with pytest.raises(CalculatorError, match="not a whole number"):
        resolved.check_structure(water(charge=0.5))
    with pytest.raises(CalculatorError, match="1 unpaired electrons are impossible with 10 electrons"):
        resolved.check_structure(water(moments=[1.0, 0.0, 0.0]))
    with pytest.raises(CalculatorError, match=r"contradicts the settings' -1 e"):
        resolve("tblite", {"charge": -1}).check_structure(water(charge=1.0))
    slab = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    slab.pbc = (True, True, False)
    with pytest.raises(CalculatorError, match="partly periodic"):
        resolved.check_structure(Structure.from_atoms(slab))
    with pytest.raises(CalculatorError, match="does not know Pu"):
        resolved.check_structure(Structure.from_atoms(bulk("Pu", "fcc", a=4.6)))


def test_describe_all_says_units_and_defaults() -> None:
    described = {entry.name: entry for entry in describe_all()}
    assert list(described) == list(REGISTRY)
    settings = {setting.name: setting for setting in described["tblite"].settings}
    assert settings["electronic_temperature_k"].default == 300.0
    assert "in K" in settings["electronic_temperature_k"].description
    assert settings["electronic_temperature_k"].type == "number > 0"
    assert settings["method"].type == "GFN1-xTB | GFN2-xTB"
    assert settings["multiplicity"].type == "whole number ≥ 1 | null"
    assert {s.name for s in described["mace"].settings if s.required} == {"model"}
    assert all(setting.description for entry in described.values() for setting in entry.settings)


class Inner(CalculatorSettings):
    width_ev: float = 0.1


class Oddities(CalculatorSettings):
    """A setting of every kind that people declare."""

    flag: bool = False
    path: LocalPath = Field(description="a file")
    table: dict[str, int] = Field(default_factory=dict)
    anything: dict[str, Any] = Field(default_factory=dict)
    grid: tuple[int, int, int] | None = None
    mixed: list[int | str] = Field(default_factory=list)
    kind: Literal["one"] = "one"
    inner: Inner = Inner()
    share: float = Field(0.5, ge=0, lt=1)


def test_types_are_said_as_a_person_says_them() -> None:
    described = describe(replace(REGISTRY["emt"], settings_model=Oddities, retries=(), sabotage={}))
    assert {setting.name: setting.type for setting in described.settings} == {
        "flag": "true | false",
        "path": "path",
        "table": "mapping to whole number",
        "anything": "mapping",
        "grid": "list of whole number | null",
        "mixed": "list of whole number | text",
        "kind": "one",
        "inner": "mapping",
        "share": "number ≥ 0, < 1",
    }


@pytest.mark.parametrize("name", REGISTRY)
def test_every_entry_can_be_described_and_says_what_its_ladder_does(name: str) -> None:
    described = describe(REGISTRY[name])
    assert described.description
    assert "\n" not in described.unavailable
    assert len(described.retries) == len(REGISTRY[name].retries)
    assert set(described.provokes) <= {"unconverged", "crashed", "timeout", "rejected"}
    assert all(setting.type for setting in described.settings)


def test_resolved_calculator_travels_to_a_worker() -> None:
    resolved = resolve("tblite", {"accuracy": 0.5})
    assert pickle.loads(pickle.dumps(resolved)) == resolved


def test_the_registry_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'mace', 'chgnet', 'tblite', 'prefect', 'mongoengine'}"
    code = f"import sys, calculators.registry, calculators.labeling as _; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert said.stdout.strip() == "set()"


def test_a_problem_of_all_settings_together_reads_like_one_of_ours() -> None:
    with pytest.raises(CalculatorError) as caught:
        resolve("vasp", {})
    assert str(caught.value).startswith("calculator.settings of vasp: encut (eV) and kspacing")
