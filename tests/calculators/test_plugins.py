"""Calculators from other packages: a real one, installed by pip, and every way to get one wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from alcore.errors import CalculatorError
from calculators.plugins import load_plugin, plugin_names
from calculators.registry import REGISTRY, describe_all, find_calculator, get_calculator, resolve

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Offer = Callable[[Mapping[str, str]], None]

LABEL = """
import sys
from pathlib import Path
from ase.build import bulk
from alcore.identity import label_key
from alcore.types import Candidate, LabelRequest, Structure
from calculators.labeling import LocalLabeler
from calculators.registry import resolve

resolved = resolve("morse", {"depth_ev": 0.35})
structure = Structure.from_atoms(bulk("Cu", cubic=True))
candidate = Candidate(path="hop", kind="data", image=0, structure=structure)
request = LabelRequest(key=label_key(structure, resolved.fingerprint), candidate=candidate, generation=0)
with LocalLabeler(resolved, Path(sys.argv[1]), timeout_s=60.0) as labeler:
    (label,) = labeler.label([request])
print(label.status, label.reason, label.calculator, round(label.energy_ev, 6), label.details["settings"]["depth_ev"])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that pip installed the example into."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("pip or setuptools is missing here, so the example plug-in cannot be installed")
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(HERE / "example_plugin", folder / "source")  # setuptools builds beside the source
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def fresh(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Another Python, elsewhere, that finds al-loop and the installed package."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "COLUMNS": "80"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_example_plug_in_keeps_the_contract(site: Path, tmp_path: Path) -> None:
    done = fresh(site, tmp_path, "-m", "flows.cli", "calculators", "--test", "morse", "--set", "depth_ev=0.35")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept") >= 8
    assert done.stdout.count("BROKEN") == 0


def test_the_example_plug_in_is_listed_and_described(site: Path, tmp_path: Path) -> None:
    listed = json.loads(fresh(site, tmp_path, "-m", "flows.cli", "calculators", "--json").stdout)
    (morse,) = [entry for entry in listed if entry["name"] == "morse"]
    assert (morse["origin"], morse["unavailable"]) == ("al-loop-morse 0.1.0", "")
    shown = fresh(site, tmp_path, "-m", "flows.cli", "calculators", "morse").stdout
    assert "al-loop-morse 0.1.0" in shown
    assert "distance of the minimum in Å" in shown


def test_the_example_plug_in_labels_in_a_worker(site: Path, tmp_path: Path) -> None:
    done = fresh(site, tmp_path, "-c", LABEL, str(tmp_path / "calc"))
    assert done.returncode == 0, done.stderr
    status, _, rest = done.stdout.partition(" ")
    assert status == "ok", done.stdout
    name, energy, depth = rest.split()
    assert (name, depth) == ("morse", "0.35")
    assert -20 < float(energy) < -5  # 0.35 eV a bond, some ten bonds an atom by its neighbours near and far


def test_the_example_plug_in_runs_through_run_files(site: Path, tmp_path: Path) -> None:
    made = fresh(site, tmp_path, "-m", "flows.cli", "init", "hop", "--calculator", "morse")
    assert made.returncode == 0, made.stderr
    file = tmp_path / "hop" / "run.yaml"
    assert "# depth_ev: 0.3429" in file.read_text("utf-8")
    bad = fresh(site, tmp_path, "-m", "flows.cli", "check", str(file), "--set", "calculator.settings.depth_ev=-1")
    assert bad.returncode == 2
    assert "depth_ev" in bad.stderr


def test_without_it_the_name_is_unknown() -> None:
    assert "morse" not in plugin_names()
    with pytest.raises(CalculatorError, match="there is no calculator 'morse'"):
        get_calculator("morse")


BAD = {
    "GONE": ("no_such_module:ENTRY", "ModuleNotFoundError: No module named 'no_such_module'"),
    "NOTHING": ("misbehaving_entries:NO_SUCH", "AttributeError: "),
    "NO_ENTRY": ("misbehaving_entries:no_entry", "TypeError: it is str, not a calculators.base.CalculatorEntry"),
    "A_NUMBER": ("misbehaving_entries:NAP_S", "TypeError: it is str"),
    "EXITS": ("misbehaving_entries:exits", "SystemExit: not here"),
    "OTHER": ("misbehaving_entries:HONEST", "its entry point is called 'OTHER', its CalculatorEntry 'HONEST'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plug_in_is_listed_with_its_reason_and_harms_nothing_else(name: str, offer: Offer) -> None:
    value, reason = BAD[name]
    offer({name: value, "HONEST": "misbehaving_entries:HONEST"})
    described = {entry.name: entry for entry in describe_all()}
    assert list(described)[: len(REGISTRY)] == list(REGISTRY)
    assert reason in described[name].unavailable
    assert value in described[name].unavailable
    assert described[name].origin == "offered 1.2"
    assert described["HONEST"].unavailable == ""
    with pytest.raises(CalculatorError, match="mend or uninstall that package") as caught:
        resolve(name)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert resolve("HONEST").name == "HONEST"
    assert get_calculator("emt") is REGISTRY["emt"]


def test_a_plug_in_cannot_take_the_name_of_a_built_in(offer: Offer) -> None:
    offer({"emt": "misbehaving_entries:HONEST"})
    assert get_calculator("emt") is REGISTRY["emt"]
    clash = describe_all()[-1]
    assert (clash.name, clash.origin) == ("emt", "offered 1.2")
    assert "al-loop has a calculator of that name" in clash.unavailable


def test_two_packages_with_one_name_are_both_named(offer: Callable[..., None]) -> None:
    offer({"HONEST": "misbehaving_entries:HONEST"})
    offer({"HONEST": "misbehaving_entries:HONEST"}, package="second")
    with pytest.raises(CalculatorError, match=r"more than one package offers it: .*(offered|second) 1.2, ") as caught:
        get_calculator("HONEST")
    assert {"offered", "second"} <= set(str(caught.value).replace(",", " ").split())


def test_an_entry_point_may_be_a_function_and_is_called_once(offer: Offer) -> None:
    offer({"MADE": "misbehaving_entries:make_honest"})
    assert get_calculator("MADE") is get_calculator("MADE")


@pytest.mark.usefixtures("entries")
def test_a_registered_calculator_travels_by_name_although_it_is_made_of_lambdas() -> None:
    resolved = resolve("HONEST", {"max_steps": 30})
    there = pickle.loads(pickle.dumps(resolved))
    assert there.entry is resolved.entry
    assert (there.settings, there.fingerprint) == (resolved.settings, resolved.fingerprint)


@pytest.mark.usefixtures("entries")
def test_a_misspelt_plug_in_is_found_among_all_names() -> None:
    with pytest.raises(CalculatorError, match="did you mean tblite"):
        get_calculator("tblit")
    with pytest.raises(CalculatorError, match=r"known: emt.*HONEST"):
        get_calculator("nothing like it")
    assert find_calculator("nothing like it") is None
    assert load_plugin("nothing like it") is None


def test_listing_names_imports_no_plug_in(offer: Offer) -> None:
    offer({"EXITS": "misbehaving_entries:exits"})
    sys.modules.pop("misbehaving_entries", None)
    assert plugin_names() == ["EXITS"]
    assert get_calculator("emt").name == "emt"
    assert "misbehaving_entries" not in sys.modules


def test_help_and_built_ins_do_not_look_for_plug_ins() -> None:
    program = (
        "import sys, calculators.plugins as p, flows.cli\n"
        "from calculators.registry import get_calculator\n"
        "get_calculator('emt')\n"
        "assert p._found.cache_info().currsize == 0\n"
        "try:\n    flows.cli.app(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert p._found.cache_info().currsize == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
