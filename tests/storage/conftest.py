"""Real servers (the embedded replica set, and a stand-alone one as a user may have), and small records to store."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from pymongo import MongoClient

from alcore import types
from alcore.identity import label_key
from storage import courier
from storage import store as mongo
from storage.durable import DurableStore
from storage.memory import MemoryStore
from storage.mongod import ensure_mongod, find_mongod, stop_mongod
from storage.spool import Spool
from storage.store import MongoStore

Store = MongoStore | MemoryStore


@pytest.fixture(scope="session")
def embedded_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data_dir = tmp_path_factory.mktemp("embedded")
    yield ensure_mongod(data_dir)
    stop_mongod(data_dir)


@pytest.fixture(scope="session")
def standalone_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without transactions."""
    home = tmp_path_factory.mktemp("standalone")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        find_mongod(),
        "--fork",
        "--dbpath",
        home,
        "--logpath",
        home / "log",
        "--port",
        port,
        "--bind_ip",
        "127.0.0.1",
    ]
    subprocess.run([str(word) for word in [*command, "--nounixsocket"]], check=True, stdout=subprocess.DEVNULL)
    process = psutil.Process(int((home / "mongod.lock").read_text()))
    yield f"mongodb://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


@pytest.fixture
def new_mongo_store(request: pytest.FixtureRequest) -> Iterator[Callable[..., MongoStore]]:
    """Opens stores that share one database of this test's own, which is dropped afterwards."""
    database = f"test_{uuid.uuid4().hex}"
    opened: list[tuple[str, MongoStore]] = []

    def make(uri: str | None = None, **options: object) -> MongoStore:
        uri = uri or request.getfixturevalue("embedded_uri")
        store = MongoStore(uri, **({"database": database} | options))  # type: ignore[arg-type]
        opened.append((uri, store))
        return store

    yield make
    for uri, store in opened:
        store.close()
        with MongoClient(uri) as client:
            client.drop_database(database)


@pytest.fixture(params=["memory", "embedded", "standalone"])
def store(request: pytest.FixtureRequest, new_mongo_store: Callable[..., MongoStore]) -> Store:
    if request.param == "memory":
        return MemoryStore()
    return new_mongo_store(request.getfixturevalue(f"{request.param}_uri"))


@pytest.fixture
def mongo_store(new_mongo_store: Callable[..., MongoStore]) -> MongoStore:
    return new_mongo_store()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Path]:
    """A data folder whose server, if the test starts one, is ended afterwards."""
    yield tmp_path / "data"
    stop_mongod(tmp_path / "data")


def make_structure(seed: int = 0, symbols: tuple[int, ...] = (29, 29, 13)) -> types.Structure:
    rng = np.random.default_rng(seed)
    return types.Structure(
        numbers=np.array(symbols),
        positions=rng.normal(size=(len(symbols), 3)),
        cell=4.0 * np.eye(3),
        pbc=np.array([True, True, False]),
        fixed=np.arange(3 * len(symbols)).reshape(-1, 3) < 3,
    )


def make_label(seed: int = 0, status: types.LabelStatus = "ok", fmax: float = 0.1, **changes: Any) -> types.Label:
    """A label whose free atoms feel ``fmax``; failed ones have no energy."""
    atoms = changes.pop("structure", make_structure(seed))
    known = {"energy_ev": -1.0 - seed, "forces": np.full((len(atoms), 3), fmax / np.sqrt(3))} if status == "ok" else {}
    values = (
        {"fingerprint": "f" * 8, "calculator": "emt", "seconds": 1.5, "details": {"version": "1"}} | known | changes
    )
    return types.Label(key=label_key(atoms, values["fingerprint"]), structure=atoms, status=status, **values)


def make_band(path: str, n_images: int = 5, n_atoms: int = 3) -> types.Band:
    rng = np.random.default_rng(n_images)
    template = make_structure(1, (29,) * n_atoms)
    profile = np.sin(np.linspace(0, np.pi, n_images))
    return types.Band(
        path=path,
        template=template,
        positions=rng.normal(size=(n_images, n_atoms, 3)),
        energies_ev=0.7 * profile,
        forces=rng.normal(size=(n_images, n_atoms, 3)),
        sigma_committee_ev=0.01 * profile,
        sigma_posterior_ev=0.02 * profile,
        sigma_ev=0.03 * profile,
        coordinate_ang=np.linspace(0, 2.5, n_images),
        status="converged",
        climbing_image=n_images // 2,
        fmax_ev_per_ang=0.02,
    )


def make_generation(run: str, index: int, error_ev: float | None = None, **changes: Any) -> types.GenerationRecord:
    """One hop; its barrier is ``0.7 + error_ev`` where 0.7 eV is verified."""
    barrier = types.BarrierEstimate(
        forward_ev=0.7 + (error_ev or 0.0),
        reverse_ev=0.6,
        reaction_energy_ev=0.1,
        spline_forward_ev=0.701,
        sigma_ev=0.02,
        sigma_committee_ev=0.01,
        sigma_posterior_ev=0.015,
        saddle_image=2,
        extrema=(types.Extremum(kind="maximum", coordinate_ang=1.2, energy_ev=0.7, image=2),),
    )
    path = types.PathRecord(
        path="hop",
        initial=make_structure(1),
        final=make_structure(2),
        band=make_band("hop"),
        barrier=barrier,
        verified_barrier_ev=None if error_ev is None else 0.7,
        error_to_verified_ev=error_ev,
        barrier_std_ev=0.02,
    )
    record = types.GenerationRecord(
        run=run, index=index, paths=(path,), label_keys=("a", "b"), n_reference_calls=2 + index
    )
    return dataclasses.replace(record, **changes)


def make_run(name: str, **changes: Any) -> types.RunRecord:
    values = {"settings": {"seed": 0}, "settings_sha256": "0" * 64, "started": "2026-01-01T00:00:00+00:00"} | changes
    return types.RunRecord(name=name, **values)


@pytest.fixture(scope="session")
def records() -> SimpleNamespace:
    """Makers of small records with plausible numbers."""
    makers = {"structure": make_structure, "label": make_label, "band": make_band, "generation": make_generation}
    return SimpleNamespace(**makers, run=make_run)


PATIENCE_S = 60.0


def _wait(happened: Callable[[], object]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def wait() -> Callable[[Callable[[], object]], bool]:
    """Whether something happens before patience ends."""
    return _wait


class Relay:
    """A TCP relay to the server: cut, it is a database that is away, at once and as often as one likes."""

    def __init__(self, uri: str) -> None:
        place = re.search(r"127\.0\.0\.1:(\d+)", uri)
        assert place is not None
        self.target, self.open = int(place[1]), True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.uri = f"{uri[: place.start()]}127.0.0.1:{self.port}/?directConnection=true"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self.open:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.target))
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.open = False
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def mend(self) -> None:
        self.open = True

    def close(self) -> None:
        self.cut()
        self._listener.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, sooner."""
    for module, name, value in [
        (courier, "RETRY_S", 0.1),
        (courier, "SETTLE_S", 0.1),
        (courier, "REVIVE_EVERY_S", (0.2, 1.0)),
        (mongo, "UNREACHABLE_MS", 300),
        (mongo, "HUNG_MS", 1500),
        (mongo, "HEARTBEAT_MS", 500),
    ]:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def relay(embedded_uri: str) -> Iterator[Relay]:
    opened = Relay(embedded_uri)
    yield opened
    opened.close()


@contextmanager
def new_database(uri: str) -> Iterator[MongoStore]:
    opened = MongoStore(uri, f"test_{uuid.uuid4().hex}")
    yield opened
    opened.close()
    with MongoClient(uri) as client:
        client.drop_database(opened._database.name)


@pytest.fixture
def there(embedded_uri: str) -> Iterator[MongoStore]:
    """What is really in the database, of this test's own."""
    with new_database(embedded_uri) as opened:
        yield opened


@pytest.fixture
def plain(embedded_uri: str) -> Iterator[MongoStore]:
    """A database that is never away."""
    with new_database(embedded_uri) as opened:
        yield opened


@pytest.fixture
def kit(quick: None, relay: Relay, there: MongoStore, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A durable store behind the relay, the lines it told, and a maker of others like it."""
    told: list[str] = []
    opened: list[DurableStore] = []

    def make() -> DurableStore:
        mongo = MongoStore(relay.uri, there._database.name)
        opened.append(DurableStore(mongo, Spool(tmp_path / "spool", told.append), log=told.append))
        return opened[-1]

    yield SimpleNamespace(store=make(), make=make, told=told, relay=relay, there=there)
    relay.mend()
    for each in opened:
        each.close()
