"""Labels that run at once, bounded over labelers, processes and runs by leases in a real store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk

from alcore.errors import AlLoopError, StoreError
from alcore.identity import label_key
from alcore.protocols import Labeler
from alcore.types import Candidate, Label, LabelRequest, Structure
from calculators.base import ResolvedCalculator
from calculators.labeling import LocalLabeler
from calculators.registry import resolve
from flows.bounded import BoundedLabeler
from flows.leases import LEASE_S, is_dead
from storage.memory import MemoryStore
from storage.store import MongoStore, open_store

ROOT = Path(__file__).resolve().parents[2]
SPANS = '''
import time
from pathlib import Path
from ase.calculators.emt import EMT

class Slow(EMT):
    """EMT that writes down from when to when it ran."""
    def __init__(self, seconds, folder):
        super().__init__()
        self.seconds, self.folder = seconds, folder
    def calculate(self, *arguments, **options):
        began = time.monotonic()
        end = began + self.seconds
        here = Path(self.folder)
        (here / f"began-{began}").touch()
        while time.monotonic() < end or (here / "hang").exists():
            time.sleep(0.01)
        super().calculate(*arguments, **options)
        with (here / "spans").open("a") as spans:
            spans.write(f"{began} {time.monotonic()}\\n")

def calculator(seconds, folder):
    return Slow(seconds, folder)
'''


class Slow:
    """A calculator whose every run leaves a trace in ``folder``."""

    def __init__(self, modules: Path, folder: Path) -> None:
        self.modules, self.folder = modules, folder
        (modules / "spans_of_slow.py").write_text(SPANS)

    def resolved(self, seconds: float = 0.1) -> ResolvedCalculator:
        values = {"seconds": seconds, "folder": str(self.folder)}
        arguments = {"factory": "spans_of_slow:calculator", "settings": values, "path": str(self.modules)}
        return resolve("ase", arguments)

    def spans(self) -> list[tuple[float, float]]:
        lines = (self.folder / "spans").read_text().splitlines()
        return sorted((float(line.split()[0]), float(line.split()[1])) for line in lines)

    def most_at_once(self) -> int:
        edges = sorted([(began, 1) for began, _ in self.spans()] + [(ended, -1) for _, ended in self.spans()])
        running = [sum(step for _, step in edges[: i + 1]) for i in range(len(edges))]
        return max(running)

    def begun(self) -> int:
        return len(list(self.folder.glob("began-*")))


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slow")


@pytest.fixture
def slow(modules: Path, tmp_path: Path) -> Slow:
    return Slow(modules, tmp_path)


@pytest.fixture
def store(home: Path) -> Iterator[MongoStore]:
    """The real one; what an earlier test left held is gone."""
    opened = open_store(None, home)
    opened._database["leases"].delete_many({})
    yield opened
    opened.close()


def requests(resolved: ResolvedCalculator, n: int, seed: int = 0) -> list[LabelRequest]:
    found = []
    for k in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed + k)
        candidate = Candidate(path="hop", kind="data", image=0, structure=Structure.from_atoms(atoms))
        key = label_key(candidate.structure, resolved.fingerprint)
        found.append(LabelRequest(key=key, candidate=candidate, generation=0))
    return found


def wait_until(happened: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def make(resolved: ResolvedCalculator, store: Any, folder: Path, **options: Any) -> BoundedLabeler:
    workers = options.get("workers", 1)
    inner = LocalLabeler(resolved, folder, workers=workers, timeout_s=60)
    return BoundedLabeler(inner, store, **({"pool": "test", "limit": 2} | options))


def test_it_is_a_labeler_that_holds_a_lease_while_a_label_runs(slow: Slow, store: MongoStore, tmp_path: Path) -> None:
    resolved = slow.resolved(0.3)
    with ThreadPoolExecutor(1) as thread:
        labeler = make(resolved, store, tmp_path / "calc", workers=2, limit=3, run="mine")
        typed: Labeler = labeler
        asked = requests(resolved, 4)
        heard: list[str] = []
        future = thread.submit(typed.label, asked, lambda label: heard.append(label.key))
        wait_until(lambda: len(store.held_leases("label-slot/test/")) == 2)
        held = store.held_leases("label-slot/test/")
        assert set(held) <= {f"label-slot/test/{k}" for k in range(3)}
        assert all(owner.endswith("|mine") for owner in held.values())
        labels = future.result()
    assert [label.key for label in labels] == [request.key for request in asked]
    assert sorted(heard) == sorted(label.key for label in labels)
    assert all(label.ok for label in labels)
    assert (typed.name, typed.fingerprint) == ("ase", resolved.fingerprint)
    assert (labeler.running, store.held_leases("label-slot/")) == (0, {})
    typed.tidy(labels[0])
    assert not Path(labels[0].folder).exists()
    labeler.close()


def test_several_runs_together_keep_to_the_limit(slow: Slow, store: MongoStore, tmp_path: Path) -> None:
    """Three runs of two workers each, and two slots."""
    resolved = slow.resolved()
    (slow.folder / "hang").touch()
    with ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        labelers = [make(resolved, store, tmp_path / str(i), workers=2, run=str(i)) for i in range(3)]
        for labeler in labelers:
            stack.callback(labeler.close)
        futures = [threads.submit(one.label, requests(resolved, 4, 10 * i)) for i, one in enumerate(labelers)]
        wait_until(lambda: slow.begun() == 2)
        (slow.folder / "hang").unlink()
        labels = [label for future in futures for label in future.result()]
    assert len(labels) == 12
    assert all(label.ok for label in labels)
    assert slow.most_at_once() == 2
    assert store.held_leases("") == {}


def test_it_tells_for_whom_it_waits_and_goes_on_when_they_are_done(
    slow: Slow, store: MongoStore, tmp_path: Path
) -> None:
    for k in range(2):
        assert store.take_lease([f"label-slot/test/{k}"], f"x|host|elsewhere|1|0.0||run-{k}", 60)
    said: list[str] = []
    resolved = slow.resolved(0.0)
    with ThreadPoolExecutor(1) as thread:
        labeler = make(resolved, store, tmp_path / "calc", log=said.append)
        future = thread.submit(labeler.label, requests(resolved, 1))
        wait_until(lambda: bool(said))
        assert said == ["waits: 2 labels of other runs are being computed (run-0, run-1), at most 2 at once in test"]
        assert slow.begun() == 0
        store.release_lease("label-slot/test/1", "x|host|elsewhere|1|0.0||run-1")
        assert future.result()[0].ok
        labeler.close()


@pytest.mark.parametrize("way", ["close", "one more label while it is closed"])
def test_close_ends_the_waiting(way: str, slow: Slow, store: MongoStore, tmp_path: Path) -> None:
    store.take_lease(["label-slot/test/0"], "x|host|elsewhere|1|0.0||", 60)
    resolved = slow.resolved()
    labeler = make(resolved, store, tmp_path / "calc", limit=1)
    if way == "close":
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(labeler.label, requests(resolved, 3))
            time.sleep(0.3)
            labeler.close()
            with pytest.raises(AlLoopError, match="labelling was stopped"):
                future.result(timeout=10)
    labeler.close()
    with pytest.raises(AlLoopError, match="labelling was stopped"):
        labeler.label(requests(resolved, 1))
    assert slow.begun() == 0
    assert list(store.held_leases("")) == ["label-slot/test/0"]


def test_close_gives_back_what_a_label_in_flight_holds(slow: Slow, store: MongoStore, tmp_path: Path) -> None:
    (slow.folder / "hang").touch()
    resolved = slow.resolved()
    labeler = make(resolved, store, tmp_path / "calc")
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(labeler.label, requests(resolved, 1))
        wait_until(lambda: slow.begun() == 1)
        assert len(store.held_leases("")) == labeler.running == 1
        labeler.close()
        with pytest.raises(AlLoopError, match="labelling was stopped"):
            future.result(timeout=10)
    assert store.held_leases("") == {}


class Flaky(MemoryStore):
    """A store that is away while ``away`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.away = threading.Event()
        self.renewals: list[bool] = []

    def renew_lease(self, name: str, owner: str, seconds: float) -> bool:
        self.renewals.append(not self.away.is_set())
        self._refuse_if_away()
        return super().renew_lease(name, owner, seconds)

    def release_lease(self, name: str, owner: str) -> None:
        self._refuse_if_away()
        super().release_lease(name, owner)

    def _refuse_if_away(self) -> None:
        if self.away.is_set():
            raise StoreError("MongoDB cannot be reached")


def test_a_lease_is_renewed_while_its_label_runs(slow: Slow, store: MongoStore, tmp_path: Path) -> None:
    """The label takes four times as long as a lease."""
    resolved = slow.resolved(2.4)
    labeler = make(resolved, store, tmp_path / "calc", limit=1, lease_s=0.6)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(labeler.label, requests(resolved, 1))
        wait_until(lambda: slow.begun() == 1)
        while not future.done():
            assert store.take_lease(["label-slot/test/0"], "thief", 60) is None or future.done()
            time.sleep(0.05)
            store.release_lease("label-slot/test/0", "thief")
        assert future.result()[0].ok
    labeler.close()


def test_a_store_that_is_away_for_a_moment_ends_no_calculation(slow: Slow, tmp_path: Path) -> None:
    store = Flaky()
    (slow.folder / "hang").touch()
    resolved = slow.resolved()
    labeler = make(resolved, store, tmp_path / "calc", lease_s=0.8)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(labeler.label, requests(resolved, 1))
        wait_until(lambda: slow.begun() == 1)
        store.away.set()
        wait_until(lambda: store.renewals.count(False) >= 2)
        store.away.clear()
        seen = len(store.renewals)
        wait_until(lambda: len(store.renewals) >= seen + 2)
        assert len(store.held_leases("")) == 1
        store.away.set()  # nor does a release that fails
        (slow.folder / "hang").unlink()
        assert future.result()[0].ok
    store.away.clear()
    labeler.close()


def test_a_calculation_whose_lease_was_lost_is_finished_and_takes_nothing_from_the_new_owner(
    slow: Slow, store: MongoStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (slow.folder / "hang").touch()
    resolved = slow.resolved()
    labeler = make(resolved, store, tmp_path / "calc", limit=1, lease_s=0.4)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(labeler.label, requests(resolved, 1))
        wait_until(lambda: slow.begun() == 1)
        ((name, owner),) = store.held_leases("").items()
        store.release_lease(name, owner)
        store.take_lease([name], "another", 60)
        wait_until(lambda: labeler.running == 0)
        (slow.folder / "hang").unlink()
        assert future.result()[0].ok
    assert store.held_leases("") == {name: "another"}
    assert "was lost" in caplog.text
    labeler.close()


OTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_bounded as t
from flows.session import open_record_store
slow = t.Slow(Path(sys.argv[2]), Path(sys.argv[3]))
resolved = slow.resolved()
labeler = t.make(resolved, open_record_store(None), slow.folder / "other", limit=1, run="other")
print([label.status for label in labeler.label(t.requests(resolved, 1))])
labeler.close()
"""


def start_other(slow: Slow) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OTHER_PROCESS, str(Path(__file__).parent), str(slow.modules), str(slow.folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_a_killed_process_of_this_machine_held_is_free_at_once(
    slow: Slow, store: MongoStore, tmp_path: Path
) -> None:
    (slow.folder / "hang").touch()
    other = start_other(slow)
    wait_until(lambda: slow.begun() == 1)
    (owner,) = store.held_leases("label-slot/test/").values()
    assert owner.endswith("|other")
    assert not is_dead(owner)
    other.send_signal(signal.SIGKILL)
    other.communicate(timeout=30)
    assert is_dead(owner)
    assert list(store.held_leases("label-slot/test/").values()) == [owner]
    (slow.folder / "hang").unlink()
    resolved = slow.resolved()
    began = time.monotonic()
    labeler = make(resolved, store, tmp_path / "calc", limit=1)
    assert labeler.label(requests(resolved, 1))[0].ok
    assert time.monotonic() - began < LEASE_S / 2  # it did not wait for the lease to run out
    labeler.close()


def test_ctrl_c_ends_what_waits(slow: Slow, store: MongoStore) -> None:
    store.take_lease(["label-slot/test/0"], "x|host|elsewhere|1|0.0||somebody", 60)
    other = start_other(slow)
    line = other.stderr.readline()  # type: ignore[union-attr]
    assert "waits: 1 label of other runs is being computed (somebody), at most 1 at once in test" in line
    other.send_signal(signal.SIGINT)
    out, err = other.communicate(timeout=30)
    assert (out, slow.begun()) == ("", 0)
    assert "KeyboardInterrupt" in err
    assert list(store.held_leases("")) == ["label-slot/test/0"]


def test_overhead_of_a_lease_is_printed(store: MongoStore, tmp_path: Path) -> None:
    resolved = resolve("emt")
    asked = requests(resolved, 61)

    def per_label(labeler: Labeler) -> float:
        assert labeler.label(asked[:1])[0].ok
        began = time.perf_counter()
        labels: list[Label] = [labeler.label([request])[0] for request in asked[1:]]
        assert all(label.ok for label in labels)
        return (time.perf_counter() - began) / len(labels)

    with LocalLabeler(resolved, tmp_path / "plain", timeout_s=60) as plain:
        without = per_label(plain)
    labeler = make(resolved, store, tmp_path / "bounded")
    with_lease = per_label(labeler)
    labeler.close()
    print(f"\na warm EMT label: {1e3 * without:.1f} ms without a lease, {1e3 * with_lease:.1f} ms with one")
