from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import h5py
import numpy as np
import psutil
import pytest
from ase.calculators.emt import EMT

from alcore.errors import AlLoopError, CalculatorError, InputError
from alcore.protocols import Labeler
from alcore.types import Label, LabelRequest
from calculators.base import ResolvedCalculator
from calculators.executors.local import PoolClosedError
from calculators.executors.queues import QueueSpec, Resources
from calculators.pyiron_labeling import PyironLabeler
from calculators.registry import resolve

Misbehaving = Callable[..., ResolvedCalculator]
MakeRequests = Callable[..., list[LabelRequest]]
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) - before == set()


def statuses(folder: Path) -> list[tuple[str, str]]:
    """pyiron's own table of jobs, read without pyiron."""
    with sqlite3.connect(folder / "pyiron.db") as database:
        return database.execute("select job, status from jobs_pyiron order by id").fetchall()


def wait_until(happened: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def forces_in_hdf5(file: Path) -> Any:
    """What pyiron keeps, read without pyiron."""
    found = []
    with h5py.File(file) as record:
        record.visititems(lambda path, item: found.append(item[()]) if "/forces__" in path else None)
    return found[0]


def all_gone(pids: Path) -> None:
    """Soon, none of the processes whose numbers stand in ``pids`` runs."""
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split()))


def counting(tmp_path: Path, **settings: Any) -> ResolvedCalculator:
    settings = {"file": str(tmp_path / "counts")} | settings
    path = str(HERE / "executors")
    return resolve("ase", {"factory": "counting:counted", "settings": settings, "path": path})


def n_begun(tmp_path: Path) -> int:
    counts = tmp_path / "counts"
    return len(counts.read_text().splitlines()) if counts.exists() else 0


def test_labels_are_the_calculator_s_numbers_in_order(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    requests = make_requests(resolved, 4)
    heard: list[str] = []
    start = time.perf_counter()
    with PyironLabeler(resolved, tmp_path / "run", 2, timeout_s=60) as labeler:
        typed: Labeler = labeler
        labels = typed.label(requests[:1], lambda label: heard.append(label.key))
        cold, start = time.perf_counter() - start, time.perf_counter()
        labels += typed.label(requests[1:], lambda label: heard.append(label.key))
        warm = (time.perf_counter() - start) / 3
        print(f"\na label through pyiron on this machine: first {cold:.2f} s, then {warm:.2f} s (2 at once)")
        assert sorted(heard) == sorted(request.key for request in requests)
        for request, label in zip(requests, labels, strict=True):
            atoms = request.candidate.structure.to_atoms()
            atoms.calc = EMT()
            assert label.ok
            assert label.key == request.key
            assert label.energy_ev == atoms.get_potential_energy(force_consistent=True)
            np.testing.assert_array_equal(label.forces, atoms.get_forces())
            np.testing.assert_array_equal(label.stress, atoms.get_stress())
            written = ase.io.read(Path(label.folder) / "input.extxyz")
            np.testing.assert_allclose(written.positions, atoms.positions, atol=1e-7)  # type: ignore[union-attr]
            name = Path(label.folder).name
            np.testing.assert_array_equal(forces_in_hdf5(tmp_path / "run" / "jobs" / f"{name}.h5"), label.forces)
            labeler.tidy(label)
            assert not Path(label.folder).parent.exists()
    assert [status for _, status in statuses(tmp_path / "run")] == ["finished"] * 4


def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    """Neither in a home folder that exists nor in one that does not, nor where the process stands."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    command = [sys.executable, str(HERE / "executors" / "waiting.py"), str(tmp_path / "run"), "", "a1b2" * 16]
    settings = f'{{"file": "{tmp_path}/counts"}}'
    for place in (home, tmp_path / "nowhere"):
        environment = os.environ | {"HOME": str(place), "PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(
            [*command, settings], cwd=here, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        assert done.stdout == "ok\n"
    assert list(home.iterdir()) == []
    assert list(here.iterdir()) == []
    assert not (tmp_path / "nowhere").exists()
    assert n_begun(tmp_path) == 1  # the second process found the outcome of the first


def test_two_runs_in_one_process_keep_apart(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    requests = make_requests(resolved, 2)
    answers: dict[str, list[Label]] = {}

    def work(name: str) -> None:
        with PyironLabeler(resolved, tmp_path / name, 1, timeout_s=60) as labeler:
            answers[name] = labeler.label(requests)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("one", "two"):
        assert [label.status for label in answers[name]] == ["ok", "ok"]
        assert all(Path(label.folder).is_relative_to(tmp_path / name) for label in answers[name])
        assert len(statuses(tmp_path / name)) == 2


@pytest.mark.parametrize(
    ("function", "settings", "status", "reason"),
    [
        ("raises", {}, "crashed", "RuntimeError: no licence"),
        ("scf", {}, "unconverged", "SCFError: gave up"),
        ("nan", {}, "rejected", "forces that are not finite"),
        ("segfaults", {}, "crashed", "killed by signal 11"),
    ],
)
def test_what_goes_wrong_is_a_status_and_the_next_request_a_fresh_job(
    function: str,
    settings: dict[str, Any],
    status: str,
    reason: str,
    tmp_path: Path,
    misbehaving: Misbehaving,
    make_requests: MakeRequests,
) -> None:
    resolved = misbehaving(function, **settings)
    with PyironLabeler(resolved, tmp_path, timeout_s=60) as labeler:
        first, second = (labeler.label(make_requests(resolved))[0] for _ in range(2))
    assert (first.status, second.status) == (status, status)
    assert reason in first.reason
    assert first.folder != second.folder
    assert reason in (Path(first.folder) / "error.txt").read_text()
    assert [status for _, status in statuses(tmp_path)] == ["aborted", "aborted"]


def test_a_believed_answer_is_not_given_twice(tmp_path: Path, make_requests: MakeRequests) -> None:
    """Whoever asks the same labeler again wants another calculation."""
    resolved = counting(tmp_path)
    request = make_requests(resolved)
    with PyironLabeler(resolved, tmp_path / "run", timeout_s=60) as labeler:
        assert labeler.label(request)[0].folder != labeler.label(request)[0].folder
    assert n_begun(tmp_path) == 2


def test_a_timeout_ends_the_whole_tree(tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests) -> None:
    resolved = misbehaving("hangs", pid_file=str(tmp_path / "pids"), child="session")
    with PyironLabeler(resolved, tmp_path / "run", timeout_s=0.7) as labeler:
        (label,) = labeler.label(make_requests(resolved))
    assert (label.status, "no answer within 0.7 s" in label.reason) == ("timeout", True)
    all_gone(tmp_path / "pids")


def test_a_job_killed_from_outside_is_a_crash(
    tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    resolved = misbehaving("hangs", pid_file=str(tmp_path / "pids"))
    answer: list[Label] = []
    with PyironLabeler(resolved, tmp_path / "run", timeout_s=300) as labeler:
        thread = threading.Thread(target=lambda: answer.extend(labeler.label(make_requests(resolved))))
        thread.start()
        wait_until(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()))
        inner = psutil.Process(int((tmp_path / "pids").read_text().split()[0]))
        watching = inner.parent()
        assert watching is not None
        watching.kill()
        thread.join(60)
    assert [(label.status, "killed by signal 9" in label.reason) for label in answer] == [("crashed", True)]


def test_modules_that_cannot_be_loaded_end_the_job_and_say_so(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    take = Resources(modules=("no-such-module/1",))
    with PyironLabeler(resolved, tmp_path, resources=take, timeout_s=60) as labeler:
        (label,) = labeler.label(make_requests(resolved))
    assert label.status == "crashed"
    assert "cannot load module no-such-module/1" in label.reason


def test_the_prologue_comes_first(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = counting(tmp_path)
    take = Resources(prologue=(f"echo prologue >> {tmp_path}/counts",))
    with PyironLabeler(resolved, tmp_path / "run", resources=take, timeout_s=60) as labeler:
        assert labeler.label(make_requests(resolved))[0].ok
    assert (tmp_path / "counts").read_text().split() == ["prologue", "begun"]


def test_close_ends_a_label_in_flight_without_a_label(
    tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    resolved = misbehaving("hangs", pid_file=str(tmp_path / "pids"))
    labeler = PyironLabeler(resolved, tmp_path / "run", 1, timeout_s=300)
    heard: list[Label] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            labeler.label(make_requests(resolved, 3), heard.append)
        except AlLoopError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()))
    labeler.close()
    thread.join(30)
    assert not thread.is_alive()
    assert heard == []
    assert isinstance(errors[0], PoolClosedError)
    all_gone(tmp_path / "pids")
    assert [status for _, status in statuses(tmp_path / "run")] == ["aborted"]
    labeler.close()
    with pytest.raises(PoolClosedError):
        labeler.label(make_requests(resolved))


def test_a_calculator_that_changed_since_the_run_began_is_refused(tmp_path: Path, make_requests: MakeRequests) -> None:
    source = tmp_path / "changing_pyiron_factory.py"
    source.write_text("from ase.calculators.emt import EMT\ndef make(): return EMT()\n")
    resolved = resolve("ase", {"factory": "changing_pyiron_factory:make"}, base=tmp_path)
    source.write_text(source.read_text() + "# other numbers now\n")
    with (
        PyironLabeler(resolved, tmp_path / "run", timeout_s=60) as labeler,
        pytest.raises(CalculatorError, match="has changed since the run began: version"),
    ):
        labeler.label(make_requests(resolved))


def test_a_refusal_that_was_mended_is_not_remembered(tmp_path: Path, make_requests: MakeRequests) -> None:
    source = tmp_path / "mended_pyiron_factory.py"
    good = "from ase.calculators.emt import EMT\ndef make(): return EMT()\n"
    source.write_text(good)
    resolved = resolve("ase", {"factory": "mended_pyiron_factory:make"}, base=tmp_path)
    with PyironLabeler(resolved, tmp_path / "run", timeout_s=60) as labeler:
        source.write_text(good + "# other numbers now\n")
        with pytest.raises(CalculatorError, match="has changed"):
            labeler.label(make_requests(resolved))
        source.write_text(good)
        assert labeler.label(make_requests(resolved))[0].ok


def test_a_folder_is_one_labeler_s_until_it_is_closed(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    with PyironLabeler(resolved, tmp_path / "run", timeout_s=60) as labeler:
        with pytest.raises(InputError, match=r"/run: another process labels there \(.*stop it"):
            PyironLabeler(resolved, tmp_path / "run")
        PyironLabeler(resolved, tmp_path / "other").close()
        assert labeler.label(make_requests(resolved))[0].ok
        closing = threading.Thread(target=labeler.close)  # as at Ctrl-C
        closing.start()
        closing.join()
        PyironLabeler(resolved, tmp_path / "run").close()


def test_bad_numbers_and_folders_are_refused(tmp_path: Path) -> None:
    resolved = resolve("emt")
    with pytest.raises(InputError, match="workers is 0"):
        PyironLabeler(resolved, tmp_path, 0)
    with pytest.raises(InputError, match="timeout_s is 0"):
        PyironLabeler(resolved, tmp_path, timeout_s=0)
    with pytest.raises(InputError, match="no folder with a space"):
        PyironLabeler(resolved, tmp_path / "a folder")
    with pytest.raises(InputError, match="cores is 0"):
        Resources(cores=0)


def test_a_job_in_a_queue_ends_itself_before_its_walltime(tmp_path: Path) -> None:
    for walltime_s, expected_s in ((100.0, 90.0), (7200.0, 7140.0), (1e6, 36000.0)):
        queue = QueueSpec(system="slurm", walltime_s=walltime_s)
        with PyironLabeler(resolve("emt"), tmp_path, queue=queue, timeout_s=36000) as labeler:
            assert labeler._limits.timeout_s == expected_s
