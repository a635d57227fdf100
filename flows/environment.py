"""The only place that reads environment variables and the clock."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

HOME_VARIABLE = "AL_LOOP_HOME"
MONGODB_VARIABLE = "AL_LOOP_MONGODB_URI"


def data_dir() -> Path:
    """Where the services keep their data, logs and pids: ``AL_LOOP_HOME``, else the user's data folder. Absolute."""
    given = os.environ.get(HOME_VARIABLE)
    if given:
        return Path(given).expanduser().resolve()
    from platformdirs import user_data_path

    return user_data_path("al-loop", appauthor=False)


def make_private(folder: Path) -> None:
    """Makes ``folder`` if it is not there, for this user alone, whatever the umask; what is there stays as it is."""
    try:
        folder.mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host() -> str:
    """This machine's name."""
    return platform.node() or "localhost"


def mongodb_uri_from_env() -> str | None:
    """The MongoDB the user named in ``AL_LOOP_MONGODB_URI``, or None."""
    return os.environ.get(MONGODB_VARIABLE) or None


@contextmanager
def mongodb_uri(uri: str | None) -> Iterator[None]:
    """Inside, ``uri`` is the MongoDB of this process; None changes nothing."""
    before = os.environ.get(MONGODB_VARIABLE)
    if uri:
        os.environ[MONGODB_VARIABLE] = uri
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(MONGODB_VARIABLE, None)
        else:
            os.environ[MONGODB_VARIABLE] = before


def prefect_api_url_from_env() -> str | None:
    """A ``PREFECT_API_URL`` in the environment; Prefect lets it win over every profile."""
    return os.environ.get("PREFECT_API_URL") or None


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of a service: ours without the user's Prefect settings, plus ``changes``; loopback never goes
    through a proxy."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    direct = ",".join(
        filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1", "localhost"])
    )
    return inherited | {"NO_PROXY": direct, "no_proxy": direct} | dict(changes)


def python_path_with(folder: str) -> str:
    """``PYTHONPATH`` with ``folder`` in front."""
    return os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def now_iso() -> str:
    """Now, as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def now_s() -> float:
    """Now, in seconds since the epoch."""
    return datetime.now(UTC).timestamp()
