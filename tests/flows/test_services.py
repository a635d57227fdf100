from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import psutil
import pytest

from flows import environment, processes
from flows import services as services_module

Shell = Callable[..., subprocess.CompletedProcess[str]]


def _state() -> dict[str, dict[str, float]]:
    return dict(json.loads((environment.data_dir() / "services.json").read_text()))


def _wait(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.3)
    return condition()


def _start(shell: Shell, *parameters: str) -> UUID:
    done = shell("prefect", "deployment", "run", "al-loop", *parameters)
    assert done.returncode == 0, done.stderr
    return UUID(done.stdout.split("UUID: ")[1].split()[0])


def _flow_run(run: UUID) -> tuple[str, str]:
    """State's name and message."""
    from prefect.client.orchestration import get_client

    async def read() -> tuple[str, str]:
        async with get_client() as client:
            state = (await client.read_flow_run(run)).state
            return (state.name, state.message or "") if state else ("", "")

    return asyncio.run(read())


def _processes_of(run: UUID) -> list[psutil.Process]:
    return processes.with_variable("PREFECT__FLOW_RUN_ID", str(run))


def test_data_dir_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AL_LOOP_HOME", str(tmp_path / "a" / ".." / "b"))
    assert environment.data_dir() == tmp_path.resolve() / "b"
    monkeypatch.delenv("AL_LOOP_HOME")
    assert environment.data_dir().is_absolute()
    assert environment.data_dir().name == "al-loop"


def test_child_environment_drops_the_users_prefect_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("NO_PROXY", "example.org")
    env = environment.child_environment({"PREFECT_HOME": "/x"})
    assert "PREFECT_API_URL" not in env
    assert env["PREFECT_HOME"] == "/x"
    assert env["NO_PROXY"].split(",") == ["example.org", "127.0.0.1", "localhost"]


def test_a_pid_that_was_given_to_another_process_is_not_the_service() -> None:
    me = {"pid": os.getpid(), "created": psutil.Process().create_time()}
    found = processes.find(me)
    assert found is not None
    assert found.pid == os.getpid()
    assert processes.find({**me, "created": me["created"] - 100}) is None
    assert processes.find(None) is None


def test_an_ended_service_is_not_found(tmp_path: Path) -> None:
    started = processes.start_detached(
        [sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ, log=tmp_path / "log"
    )
    child = processes.find(started)
    assert child is not None
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    processes.stop([child])
    assert processes.find(started) is None


def test_stop_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    started = processes.start_detached([sys.executable, "-c", code], env=os.environ, log=tmp_path / "log")
    assert _wait(lambda: "deaf" in (tmp_path / "log").read_text())
    child = processes.find(started)
    assert child is not None
    processes.stop([child], grace_s=0.5)
    assert processes.find(started) is None


@pytest.mark.parametrize(
    "address", ["mongodb://me:s3cret@host:1/db", "mongodb://me:s3cret//x@y@host:1/db", "mongodbb:me:s3cret@host"]
)
def test_up_says_no_password(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("AL_LOOP_HOME", str(tmp_path))
    monkeypatch.setenv("AL_LOOP_MONGODB_URI", address)
    monkeypatch.setattr(services_module, "_ensure_server", lambda home, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        services_module.up(said.append)
    assert len(said) == 1
    assert "***@" in said[0]
    assert "s3cret" not in said[0]
    assert "me:" not in said[0]


def test_up_again_changes_nothing(services: object) -> None:
    before = _state()
    services.call("up")  # type: ignore[attr-defined]
    assert _state() == before


def test_a_dead_server_comes_back_at_its_address_with_its_runs(
    services: object, prefect_api: str, shell: Shell
) -> None:
    run = _start(shell, "-p", "config=kept")
    assert _wait(lambda: _flow_run(run)[0] == "Completed")
    server = processes.find(_state()["server"])
    assert server is not None
    processes.stop([server], grace_s=0)
    assert services_module.addresses() is None
    services.call("up")  # type: ignore[attr-defined]
    where = services_module.addresses()
    assert where is not None
    assert where.api_url == prefect_api
    assert _flow_run(run)[0] == "Completed"


def test_bad_input_is_one_line_in_the_runs_state(prefect_api: str, shell: Shell) -> None:
    run = _start(shell, "-p", "config=bad.yaml")
    assert _wait(lambda: _flow_run(run)[0] == "Failed")
    assert _flow_run(run)[1] == "bad.yaml: no such file"


def test_killed_run_shows_crashed(prefect_api: str, shell: Shell) -> None:
    run = _start(shell, "-p", "seconds=300")
    assert _wait(lambda: _flow_run(run)[0] == "Running")
    for process in _processes_of(run):
        process.kill()
    assert _wait(lambda: _flow_run(run)[0] == "Crashed")


def test_run_whose_worker_was_ended_too_is_crashed_by_the_next_up(
    services: object, prefect_api: str, shell: Shell
) -> None:
    run = _start(shell, "-p", "seconds=300")
    assert _wait(lambda: _flow_run(run)[0] == "Running")
    worker = processes.find(_state()["worker"])
    assert worker is not None
    processes.stop([worker, *_processes_of(run)], grace_s=0)
    assert _flow_run(run)[0] == "Running"
    said = services.call("up")  # type: ignore[attr-defined]
    assert "1 run(s) had died unnoticed" in said
    assert _flow_run(run)[0] == "Crashed"
    replaced = processes.find(_state()["worker"])
    assert replaced is not None
    assert replaced.pid != worker.pid


def test_run_that_lives_on_without_its_worker_is_left_alone(services: object, prefect_api: str, shell: Shell) -> None:
    run = _start(shell, "-p", "seconds=300")
    assert _wait(lambda: _flow_run(run)[0] == "Running")
    worker = processes.find(_state()["worker"])
    assert worker is not None
    worker.send_signal(signal.SIGKILL)
    assert _wait(lambda: processes.find(_state()["worker"]) is None)
    services.call("up")  # type: ignore[attr-defined]
    assert _flow_run(run)[0] == "Running"
    processes.stop(_processes_of(run))


def test_rule_for_missing_heartbeats_is_there_once(services: object, prefect_api: str) -> None:
    from prefect.client.orchestration import get_client

    from flows.deployment import ZOMBIE_RULE

    async def read() -> int:
        async with get_client() as client:
            return len(await client.read_automations_by_name(ZOMBIE_RULE))

    services.call("up")  # type: ignore[attr-defined]
    assert asyncio.run(read()) == 1


def test_down_ends_everything_and_puts_the_profile_back(
    shell: Shell, services: object, tmp_path: Path, prefect_api: str
) -> None:
    home, prefect_home = tmp_path / "home", tmp_path / "prefect"
    prefect_home.mkdir()
    profiles = prefect_home / "profiles.toml"
    profiles.write_text(
        f'active = "mine"\n\n[profiles.mine]\nPREFECT_API_URL = "{prefect_api}"\nPREFECT_LOGGING_LEVEL = "INFO"\n'
    )
    before = profiles.read_text()
    variables = {"AL_LOOP_HOME": str(home), "PREFECT_HOME": str(prefect_home)}
    said = services.call("up", **variables)  # type: ignore[attr-defined]
    assert f"the Prefect server at {prefect_api} keeps running" in said
    assert "PREFECT_PLUGINS_ENABLED" in profiles.read_text()
    started = shell("prefect", "deployment", "run", "al-loop", "-p", "seconds=300", **variables)
    assert started.returncode == 0, started.stderr
    assert _wait(lambda: bool(processes.with_variable(services_module.WORKER_MARK, str(home))))
    state = json.loads((home / "services.json").read_text())
    services.call("down", **variables)  # type: ignore[attr-defined]
    assert processes.find(state["server"]) is None
    assert processes.find(state["worker"]) is None
    assert not processes.with_variable(services_module.WORKER_MARK, str(home))
    assert profiles.read_text().split() == before.split()
