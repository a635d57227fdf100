"""The real services, once a session, serving a tiny flow in place of the loop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

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
