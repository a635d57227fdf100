"""The real services, once a session, serving a tiny flow in place of the loop; and a small hop for the loop itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from ase.build import add_adsorbate, fcc100
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import write
from ase.optimize import BFGS

from storage.mongod import ensure_mongod, stop_mongod

CHECKOUT = Path(__file__).resolve().parents[2]
TINY_FLOW = """
import os, time
from prefect import flow
from alcore.errors import InputError
from prefect.states import Failed

@flow(name="al-loop")
def tiny(config: str | None = None, seconds: float = 0.0) -> dict:
    if config == "bad.yaml":
        error = InputError("no such file", where=config)
        return Failed(message=str(error), data=error)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.1)
    return {"config": config}
"""


@pytest.fixture(scope="session")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``PYTHONPATH`` with the tiny flow and, where al-loop is not installed, its plug-in entry point."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "tiny_flow.py").write_text(TINY_FLOW)
    try:
        metadata.distribution("al-loop")
    except metadata.PackageNotFoundError:
        info = folder / "al_loop_plugin-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: al-loop-plugin\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[prefect.plugins]\nal-loop = flows.prefect_plugin\n")
    return folder


@pytest.fixture(scope="session")
def shell(module_folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``python ARGUMENTS`` as from a fresh shell; ``prefect`` as first argument is the stock client."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("prefect") if arguments[0] == "prefect" else Path(sys.executable)
        command = [program, *arguments[1:]] if arguments[0] == "prefect" else [program, *arguments]
        path = os.pathsep.join([str(CHECKOUT), str(module_folder)])
        env = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"} | variables
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)

    return run


class Services:
    """``up`` and ``down`` in processes of their own, as a user calls them, with a choice of what is served."""

    def __init__(self, shell: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        self._shell = shell

    def call(self, verb: str, **variables: str) -> str:
        code = (
            "from flows import deployment, services\n"
            "deployment.ENTRYPOINTS = {'al-loop': 'tiny_flow:tiny'}\n"
            f"services.{verb}(lambda line: print(line, flush=True))\n"
        )
        done = self._shell("-c", code, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def services(shell: Callable[..., subprocess.CompletedProcess[str]]) -> Iterator[Services]:
    running = Services(shell)
    running.call("up")
    yield running
    running.call("down")


@pytest.fixture
def prefect_api(services: Services) -> Iterator[str]:
    """Inside, this process' flows report to the session's server."""
    from prefect.settings import temporary_settings

    from flows.services import addresses

    where = addresses()
    assert where is not None
    with temporary_settings({"api.url": where.api_url}):  # type: ignore[dict-item]
        yield where.api_url


# --- a small hop that runs through the whole loop in seconds ----------------------------------------------------------

COUNTED = '''
import time
from pathlib import Path
from ase.calculators.emt import EMT

def calculator(tag=""):
    """EMT that writes down each time it is asked, and does not answer while it is told to hang."""
    here = Path(__file__).parent
    with (here / f"calls-{tag}").open("a") as calls:
        calls.write(".")
    while (here / f"hang-{tag}").exists():
        time.sleep(0.05)
    return EMT()
'''


class Hop:
    """An adatom hop on Cu(100), 9 atoms, both ends relaxed; each ``tag`` is a reference calculator of its own.

    Attributes:
        folder: with ``initial.extxyz``, ``final.extxyz`` and the module of the reference calculator, which is EMT.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "counted.py").write_text(COUNTED)
        slab = fcc100("Cu", (2, 2, 2), vacuum=6.0)
        for name, offset in (("initial", (0, 0)), ("final", (1, 0))):
            atoms = slab.copy()
            add_adsorbate(atoms, "Cu", 1.6, "hollow", offset=offset)
            atoms.set_constraint(FixAtoms(mask=[atom.tag == 2 for atom in atoms]))
            atoms.info.clear()
            atoms.calc = EMT()
            BFGS(atoms, logfile=None).run(fmax=0.01)
            write(folder / f"{name}.extxyz", atoms, write_results=False)

    def run_file(self, name: str, **changes: Any) -> Path:
        """A run file next to the structures; ``tag`` chooses the reference, ``section={...}`` is merged in."""
        factory = {"factory": "counted:calculator", "settings": {"tag": changes.pop("tag", name)}}
        values: dict[str, Any] = {
            "name": name,
            "paths": [{"name": "hop", "initial": "initial.extxyz", "final": "final.extxyz"}],
            "calculator": {"name": "ase", **factory},
            "executor": {"workers": 1, "timeout_s": 60},
            "model": {"strategy": "zero-shot", "committee": 1},  # fine-tuning is the trainer's own test
            "neb": {"n_images": 3},
        }
        for key, value in changes.items():
            merge = isinstance(value, dict) and isinstance(values.get(key), dict) and "name" not in value
            values[key] = {**values[key], **value} if merge else value
        file = self.folder / f"{name}.yaml"
        file.write_text(json.dumps(values))
        return file

    def calls(self, tag: str) -> int:
        """How often this reference was really asked."""
        file = self.folder / f"calls-{tag}"
        return len(file.read_text()) if file.exists() else 0


@pytest.fixture(scope="session")
def hop(tmp_path_factory: pytest.TempPathFactory) -> Hop:
    return Hop(tmp_path_factory.mktemp("hop"))


@pytest.fixture(scope="session")
def loop_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder whose embedded MongoDB runs, one for all tests of the loop."""
    home = tmp_path_factory.mktemp("loop-home")
    ensure_mongod(home)
    yield home
    stop_mongod(home)


@pytest.fixture
def home(loop_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``loop_home``, made the data folder of this test."""
    monkeypatch.setenv("AL_LOOP_HOME", str(loop_home))
    return loop_home
