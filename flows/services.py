"""Starts and stops what al-loop needs beside itself: MongoDB, a Prefect server, a worker that serves the deployments.

Everything lives in the data folder (``flows.environment.data_dir``): databases, logs, ports, pids. ``up`` reuses what
is healthy and replaces what is not; ``down`` ends worker, server and MongoDB, in this order.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener
from uuid import UUID

import psutil
from filelock import FileLock, Timeout

from alcore.errors import AlLoopError, InputError
from flows import deployment, environment, processes, profile
from storage.uris import redact_uri

Echo = Callable[[str], None]

HOST = "127.0.0.1"
PORTS = range(4200, 4300)
"""The first free one is taken once and then kept."""

START_TIMEOUT_S = 120.0
LOCK_TIMEOUT_S = 400.0
FULL_OR_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
WORKER_MARK = "AL_LOOP_WORKER_OF"
"""Environment variable by which the worker and all its offspring are recognised; its value is the data folder."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where things are.

    Attributes:
        dashboard_url: Prefect's pages; its API is below ``/api``.
        mongodb_uri: as a client needs it (it may hold a password: ``redact_uri`` before it is shown).
        data_dir: databases, logs and pids of the services.
    """

    dashboard_url: str
    mongodb_uri: str
    data_dir: Path

    @property
    def api_url(self) -> str:
        return f"{self.dashboard_url}/api"


def up(echo: Echo = print) -> Addresses:
    """Starts what is not running yet; may be called as often as one likes.

    Raises:
        AlLoopError: a service does not start; the message names its log.
    """
    from prefect.settings import temporary_settings

    home = environment.data_dir()
    with _locked(home) as state:
        uri = _mongodb(home)
        echo(f"MongoDB    {redact_uri(uri)}")
        url = _ensure_server(home, state)
        echo(f"dashboard  {url}")
        _tell_about_other_server(f"{url}/api", echo)
        replaced = profile.point_at(f"{url}/api")
        if replaced:
            _remember_profile(state.setdefault("profiles", []), replaced)
            _save(home, state)
        with temporary_settings(_client_settings(f"{url}/api")):
            _ensure_worker(home, state, f"{url}/api", echo)
            asyncio.run(deployment.deploy(_job_environment(), deployment.ENTRYPOINTS))
        echo(f"served     {', '.join(deployment.ENTRYPOINTS)} (start a run: prefect deployment run al-loop)")
    _refresh_prefect()
    return Addresses(dashboard_url=url, mongodb_uri=uri, data_dir=home)


def down(echo: Echo = print) -> None:
    """Stops worker (with its runs), server and MongoDB, and puts the Prefect profile back. Runs that were going on are
    shown as Crashed and go on when they are started again under their name."""
    from prefect.settings import temporary_settings

    from storage.mongod import stop_mongod

    home = environment.data_dir()
    with _locked(home) as state:
        stopped = _stop_worker(home, state)
        server, port = processes.find(state.get("server")), state.get("port")
        if server and port and _healthy(port):
            with temporary_settings(_client_settings(f"http://{HOST}:{port}/api")):
                marked = asyncio.run(deployment.crash_orphans(alive=()))
            if marked:
                echo(f"{marked} run(s) were going on; start them again under the same name to go on")
        echo("worker stopped" if stopped else "no worker was running")
        if server:
            processes.stop([server], grace_s=15)
        echo("Prefect server stopped" if server else "no Prefect server was running")
        echo("MongoDB stopped" if stop_mongod(home) else "no MongoDB was running")
        for saved in state.pop("profiles", []):
            profile.restore(saved)
            echo(f"Prefect profile {saved['name']!r} is as it was before")
        state.pop("server", None)
        _save(home, state)
    _refresh_prefect()


def addresses() -> Addresses | None:
    """Where the services are, if the server answers; starts nothing."""
    from storage.mongod import mongod_status

    home = environment.data_dir()
    state = _load(home)
    port = state.get("port")
    if not (port and processes.find(state.get("server")) and _healthy(port)):
        return None
    uri = environment.mongodb_uri_from_env() or mongod_status(home).uri
    return Addresses(dashboard_url=f"http://{HOST}:{port}", mongodb_uri=uri, data_dir=home)


@contextmanager
def connected(echo: Echo = print) -> Iterator[Addresses]:
    """``up``, and inside the block every flow of this process reports to our server, whatever the environment says."""
    from prefect.settings import temporary_settings

    where = up(echo)
    with temporary_settings(_client_settings(where.api_url)):
        yield where


# --- the pieces ------------------------------------------------------------------------------------------------------


def _mongodb(home: Path) -> str:
    given = environment.mongodb_uri_from_env()
    if given:
        return given
    from storage.mongod import ensure_mongod

    return ensure_mongod(home)


def _ensure_server(home: Path, state: dict[str, Any]) -> str:
    """Address of our server; started, on the port it always had, unless it runs and answers."""
    running = processes.find(state.get("server"))
    if running:
        if _wait_healthy(running, state["port"]):
            return f"http://{HOST}:{state['port']}"
        processes.stop([running])
    remembered = [state["port"]] if "port" in state else []
    log = home / "logs" / "prefect-server.log"
    for port in (port for port in [*remembered, *PORTS] if _is_free(port)):
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
        state["server"] = processes.start_detached(command, env=_server_environment(home, port), log=log)
        state["port"] = port
        _save(home, state)
        started = processes.find(state["server"])
        if started and _wait_healthy(started, port):
            return f"http://{HOST}:{port}"
        if started := processes.find(state["server"]):
            processes.stop([started])
            break
    raise AlLoopError(f"the Prefect server does not start; the reason is at the end of {log}")


def _ensure_worker(home: Path, state: dict[str, Any], api_url: str, echo: Echo) -> None:
    """A worker that polls for our deployments; runs that a dead one left behind are told to be Crashed first."""
    uri = redact_uri(environment.mongodb_uri_from_env() or "")
    worker = processes.find(state.get("worker"))
    if worker and state.get("worker_api", api_url) != api_url:
        processes.stop([worker])  # it polls where our server no longer is
        worker = None
    if worker:
        if state.get("worker_mongodb", "") != uri:
            echo(
                f"the worker still uses {state.get('worker_mongodb') or 'the embedded MongoDB'}: al-loop down, then up"
            )
        return
    marked = asyncio.run(deployment.crash_orphans(alive=_runs_with_process(home)))
    if marked:
        echo(f"{marked} run(s) had died unnoticed; start them again under the same name to go on")
    env = _server_environment(home, state["port"]) | {
        "PREFECT_API_URL": api_url,
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(deployment.HEARTBEAT_S),
        environment.HOME_VARIABLE: str(home),
        WORKER_MARK: str(home),
    }
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", deployment.POOL, "--type", "process"]
    log = home / "logs" / "prefect-worker.log"
    state["worker"] = processes.start_detached([*command, "--name", "al-loop"], env=env, log=log)
    state["worker_mongodb"], state["worker_api"] = uri, api_url
    _save(home, state)
    time.sleep(0.5)
    if not processes.find(state["worker"]):
        raise AlLoopError(f"the Prefect worker does not start; the reason is at the end of {log}")


def _stop_worker(home: Path, state: dict[str, Any]) -> bool:
    """First the worker, then its runs (each closes its labelling processes), then whatever is left of them."""
    worker = processes.find(state.pop("worker", None))
    if worker:
        processes.stop([worker], grace_s=5)
    offspring = processes.with_variable(WORKER_MARK, str(home))
    processes.stop(p for p in offspring if _is_engine(p))
    processes.stop(processes.with_variable(WORKER_MARK, str(home)))
    return worker is not None


def _is_engine(process: psutil.Process) -> bool:
    try:
        return any(part.startswith("prefect") or "/prefect/" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _runs_with_process(home: Path) -> set[UUID]:
    found = set()
    for process in processes.with_variable(WORKER_MARK, str(home)):
        try:
            run_id = process.environ().get("PREFECT__FLOW_RUN_ID")
        except psutil.Error:
            continue
        if run_id:
            found.add(UUID(run_id))
    return found


# --- settings and state ----------------------------------------------------------------------------------------------


def _server_environment(home: Path, port: int) -> dict[str, str]:
    folder = home / "prefect"
    environment.make_private(folder)
    return environment.child_environment(
        {
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_HOME": str(folder),
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_UI_API_URL": f"http://{HOST}:{port}/api",
            "PREFECT_CLI_PROMPT": "false",
            "PYTHONUNBUFFERED": "1",
        }
    )


def _client_settings(api_url: str) -> dict[Any, Any]:
    return {"api.url": api_url, "flows.heartbeat_frequency": deployment.HEARTBEAT_S}


def _job_environment() -> dict[str, str]:
    """Extra environment of a flow run. Out of a checkout that is not installed, the folder that holds the packages."""
    try:
        metadata.distribution("al-loop")
        return {}
    except metadata.PackageNotFoundError:
        return {"PYTHONPATH": environment.python_path_with(str(Path(__file__).resolve().parents[1]))}


def _tell_about_other_server(api_url: str, echo: Echo) -> None:
    from prefect.settings import PREFECT_API_URL, load_current_profile

    from_env = environment.prefect_api_url_from_env()
    if from_env and from_env != api_url:
        echo(
            f"PREFECT_API_URL={from_env} is set in this shell and wins over the profile: `unset PREFECT_API_URL` first"
        )
    current = load_current_profile()
    other = current.settings.get(PREFECT_API_URL) if current else None
    if other and other != api_url and _answers(f"{other}/health"):
        echo(f"the Prefect server at {other} keeps running; the profile points at ours until `al-loop down`")


def _remember_profile(profiles: list[dict[str, Any]], now: dict[str, Any]) -> None:
    """Keeps what each profile said before our *first* ``up``: a value that we wrote ourselves is not the user's."""
    for before in profiles:
        if (before["path"], before["name"]) == (now["path"], now["name"]):
            for key, value in now["replaced"].items():
                if value != before["wrote"].get(key):
                    before["replaced"][key] = value
            before["wrote"] = now["wrote"]
            return
    profiles.append(now)


def _refresh_prefect() -> None:
    """This process read the profile when it imported Prefect; let it read it again."""
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


def _healthy(port: int) -> bool:
    return _answers(f"http://{HOST}:{port}/api/health")


def _answers(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=3) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError, ValueError):
        return False


def _wait_healthy(process: psutil.Process, port: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if _healthy(port) and _listens(process, port):
            return True
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.3)
    return False


def _listens(process: psutil.Process, port: int) -> bool:
    """Whether it is this server that answers: of two that start at once, one gets the port and answers for both."""
    try:
        ours = [process, *process.children(recursive=True)]
        return any(c.laddr.port == port for p in ours for c in p.net_connections() if c.status == psutil.CONN_LISTEN)
    except psutil.Error:
        return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


@contextmanager
def _locked(home: Path) -> Iterator[dict[str, Any]]:
    """The services' state, for one ``up`` or ``down`` at a time.

    Raises:
        InputError: the data folder cannot be written, or the disk is full.
    """
    try:
        environment.make_private(home)
        with FileLock(home / "services.lock", timeout=LOCK_TIMEOUT_S):
            yield _load(home)
    except Timeout:
        raise AlLoopError(f"another `al-loop up` or `down` has been busy in {home} for minutes") from None
    except OSError as error:
        if error.errno not in FULL_OR_CLOSED:
            raise
        mend = "free space there, or choose another data folder with AL_LOOP_HOME"
        raise InputError(f"the data folder cannot be written: {error.strerror}", where=str(home), mend=mend) from error


def _load(home: Path) -> dict[str, Any]:
    try:
        state = json.loads((home / "services.json").read_text())
    except (FileNotFoundError, ValueError):
        state = None
    return state if isinstance(state, dict) else _found_again(home)


def _found_again(home: Path) -> dict[str, Any]:
    """Who runs, where nothing tells it: the file is lost or damaged. Both services carry our folder of Prefect's."""
    state: dict[str, Any] = {}
    for process in processes.with_variable("PREFECT_HOME", str(home / "prefect")):
        try:
            words = process.cmdline()
            who = {"pid": process.pid, **processes.identity(process)}
        except psutil.Error:
            continue
        if words[1:5] == ["-m", "prefect", "server", "start"]:
            state |= {"server": who, "port": int(words[words.index("--port") + 1])}
        elif words[1:5] == ["-m", "prefect", "worker", "start"]:
            state["worker"] = who
    return state


def _save(home: Path, state: Mapping[str, Any]) -> None:
    new = home / "services.json.new"
    new.write_text(json.dumps(state, indent=1))
    new.replace(home / "services.json")
