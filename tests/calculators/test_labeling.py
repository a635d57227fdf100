from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import psutil
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from alcore.errors import AlLoopError, CalculatorError, InputError
from alcore.protocols import Labeler
from alcore.types import Candidate, Label, LabelRequest, Structure
from calculators.base import ResolvedCalculator
from calculators.labeling import LocalLabeler
from calculators.registry import resolve

Misbehaving = Callable[..., ResolvedCalculator]
MakeRequests = Callable[..., list[LabelRequest]]
Moody = Callable[[str, list[LabelRequest]], Label]


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """After every test of this module no process is left that was not there before."""
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) - before == set()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(happened: Callable[[], bool], limit_s: float = 30.0) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.05)
    return False


def one(resolved: ResolvedCalculator, folder: Path, requests: list[LabelRequest], timeout_s: float = 60.0) -> Label:
    with LocalLabeler(resolved, folder, workers=1, timeout_s=timeout_s) as labeler:
        (label,) = labeler.label(requests[:1])
    return label


def test_labels_are_the_calculator_s_numbers_in_order(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    requests = make_requests(resolved, 5)
    heard: list[str] = []
    with LocalLabeler(resolved, tmp_path / "calc", workers=2, timeout_s=60) as labeler:
        typed: Labeler = labeler
        labels = typed.label(requests, lambda label: heard.append(label.key))
        for label in labels:  # what a calculation left stays until its label is believed
            assert (Path(label.folder) / "input.extxyz").exists()
            typed.tidy(label)
    assert [label.key for label in labels] == [request.key for request in requests]
    assert sorted(heard) == sorted(label.key for label in labels)
    for request, label in zip(requests, labels, strict=True):
        atoms = request.candidate.structure.to_atoms()
        atoms.calc = EMT()
        assert label.ok
        assert label.energy_ev == atoms.get_potential_energy(force_consistent=True)
        np.testing.assert_array_equal(label.forces, atoms.get_forces())
        np.testing.assert_array_equal(label.stress, atoms.get_stress())
        assert (label.fingerprint, label.calculator) == (resolved.fingerprint, "emt")
    assert list((tmp_path / "calc").iterdir()) == []


def test_forces_of_fixed_atoms_are_kept(tmp_path: Path, make_requests: MakeRequests) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=3)
    atoms.set_constraint(FixAtoms([0, 1]))
    label = one(resolve("emt"), tmp_path, make_requests(resolve("emt"), structure=Structure.from_atoms(atoms)))
    assert label.forces is not None
    assert np.linalg.norm(label.forces, axis=1).min() > 0.01


def test_no_stress_without_three_periodic_directions(tmp_path: Path, make_requests: MakeRequests) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.pbc = (True, True, False)
    assert (
        one(resolve("emt"), tmp_path, make_requests(resolve("emt"), structure=Structure.from_atoms(atoms))).stress
        is None
    )


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory, misbehaving: Misbehaving) -> Iterator[Moody]:
    """One warm worker for many misbehaviours: each must leave it fit for the next."""
    folder = tmp_path_factory.mktemp("moody")
    resolved = misbehaving("named_in", file=str(folder / "name"))
    with LocalLabeler(resolved, folder / "calc", workers=1, timeout_s=60) as labeler:

        def label(function: str, requests: list[LabelRequest]) -> Label:
            (folder / "name").write_text(function)
            return labeler.label(requests)[0]

        candidate = Candidate(path="hop", kind="data", image=0, structure=Structure.from_atoms(bulk("Cu", cubic=True)))
        assert label("honest", [LabelRequest(key="warm", candidate=candidate, generation=0)]).ok
        (pid,) = labeler._pool.pids()
        yield label
        assert labeler._pool.pids() == [pid]
    assert gone(pid)


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        ("raises", "crashed", "RuntimeError: no licence"),
        ("exits", "crashed", "SystemExit: a calculator must not end the worker"),
        ("scf", "unconverged", "SCFError: gave up"),
        ("says_unconverged", "unconverged", "SCF did not converge in 60 steps"),
        ("silent_unconverged", "unconverged", "says it has not converged"),
        ("nan", "rejected", "forces that are not finite"),
        ("nan_energy", "rejected", "the energy is nan"),
        ("wrong_shape", "rejected", "shape (3, 3)"),
        ("moves", "rejected", "moved atom 1 by 0.08"),
        ("moves_its_own", "rejected", "moved atom 0 by 0.08"),
        ("strains", "rejected", "changed the cell"),
        ("reorders", "rejected", "changed the order of the atoms"),
        ("explodes", "rejected", "above 50 eV/Å"),
    ],
)
def test_what_goes_wrong_is_a_status(
    function: str, status: str, reason: str, moody: Moody, make_requests: MakeRequests
) -> None:
    requests = make_requests(resolve("emt"))
    label = moody(function, requests)
    assert label.status == status
    assert reason in label.reason
    assert "\n" not in label.reason
    folder = Path(label.folder)
    assert reason in (folder / "error.txt").read_text()
    written = ase.io.read(folder / "input.extxyz")
    np.testing.assert_allclose(written.positions, requests[0].candidate.structure.positions, atol=1e-7)  # type: ignore[union-attr]
    assert label.energy_ev is None or np.isfinite(label.energy_ev)
    assert label.forces is None or np.isfinite(label.forces).all()


@pytest.mark.parametrize("child", ["plain", "session", "bare"])
def test_a_timeout_ends_the_whole_tree_and_a_fresh_worker_follows(
    child: str, tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    resolved = misbehaving("hangs", pid_file=str(tmp_path / "pids"), child=child)
    with LocalLabeler(resolved, tmp_path / "calc", workers=1, timeout_s=0.7) as labeler:
        first, second = labeler.label(make_requests(resolved, 2))
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(wait_until(lambda pid=pid: gone(pid)) for pid in pids)  # type: ignore[misc]
    assert [first.status, second.status] == ["timeout", "timeout"]
    assert "no answer within 0.7 s" in first.reason


def test_a_hang_that_holds_the_interpreter_is_ended_too(
    tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    resolved = misbehaving("hangs_in_c")
    assert one(resolved, tmp_path, make_requests(resolved), timeout_s=0.5).status == "timeout"


def test_a_dead_worker_is_a_crash_with_its_last_words(
    tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    resolved = misbehaving("dies", pid_file=str(tmp_path / "pids"))
    label = one(resolved, tmp_path / "calc", make_requests(resolved))
    assert label.status == "crashed"
    assert "exit code 3" in label.reason
    assert "the licence server bit me" in label.reason
    assert "the licence server bit me" in (Path(label.folder) / "error.txt").read_text()
    child = int((tmp_path / "pids").read_text().split()[1])
    assert wait_until(lambda: gone(child))  # although it had left the session and its parent was dead


def test_a_segfault_says_where(tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests) -> None:
    resolved = misbehaving("segfaults")
    label = one(resolved, tmp_path, make_requests(resolved))
    assert label.status == "crashed"
    assert "killed by signal 11" in label.reason
    assert "Segmentation fault" in label.reason
    assert "misbehaving.py" in (Path(label.folder) / "error.txt").read_text()


@pytest.mark.parametrize(("times", "status"), [(1, "ok"), (2, "crashed")])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_label_whose_worker_is_killed_from_outside_is_computed_once_more(
    times: int, status: str, number: int, tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    begun = tmp_path / "begun"
    resolved = misbehaving("killed", times=times, begun=str(begun), number=int(number))
    label = one(resolved, tmp_path / "run", make_requests(resolved))
    assert (label.status, len(begun.read_text())) == (status, 2)
    assert [str(folder) for folder in (tmp_path / "run").iterdir() if folder.is_dir()] == [label.folder]
    if status == "crashed":
        assert f"killed by signal {int(number)}" in label.reason


def test_a_worker_killed_while_idle_is_replaced(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    with LocalLabeler(resolved, tmp_path, workers=1, timeout_s=60) as labeler:
        requests = make_requests(resolved, 2)
        assert labeler.label(requests[:1])[0].ok
        (pid,) = labeler._pool.pids()
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: gone(pid))
        assert labeler.label(requests[1:])[0].ok
        assert labeler._pool.pids() not in ([], [pid])


def test_the_same_failure_twice_keeps_both_folders(
    tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    resolved = misbehaving("nan")
    request = make_requests(resolved)[0]
    with LocalLabeler(resolved, tmp_path, workers=2, timeout_s=60) as labeler:
        folders = {label.folder for label in labeler.label([request, request])}
    assert len(folders) == 2


def test_threads_share_the_warm_workers(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    requests = make_requests(resolved, 9)
    results: dict[int, list[Label]] = {}
    with LocalLabeler(resolved, tmp_path, workers=2, timeout_s=60) as labeler:

        def work(third: int) -> None:
            results[third] = labeler.label(requests[third::3])

        threads = [threading.Thread(target=work, args=(third,)) for third in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(labeler._pool.pids()) <= 2
    for third, labels in results.items():
        assert [label.key for label in labels] == [request.key for request in requests[third::3]]
        assert all(label.ok for label in labels)
    assert len(results) == 3


def test_scratch_threads_and_output_stay_in_the_folder(
    tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests, capfd: pytest.CaptureFixture[str]
) -> None:
    resolved = misbehaving("environment")
    with LocalLabeler(resolved, tmp_path / "e", workers=1, timeout_s=60, threads=3) as labeler:
        (label,) = labeler.label(make_requests(resolved))
    assert f"['3', '3'] in {label.folder}" in label.reason
    resolved = misbehaving("writes")
    label = one(resolved, tmp_path / "w", make_requests(resolved))
    assert label.ok
    assert list((tmp_path / "w").iterdir()) == [Path(label.folder)]
    assert (Path(label.folder) / "scratch.dat").exists()
    assert "said by a child" in (Path(label.folder) / "stdout.txt").read_text()
    assert capfd.readouterr().out == ""
    assert not Path("scratch.dat").exists()


def test_a_charge_reaches_the_calculator(tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests) -> None:
    resolved = misbehaving("charged")
    structure = Structure.from_atoms(bulk("Cu", cubic=True), charge=2.0)
    assert one(resolved, tmp_path, make_requests(resolved, structure=structure)).energy_ev == 14.0


def test_tblite_charge_and_unconverged(tmp_path: Path, make_requests: MakeRequests) -> None:
    """The ionisation of water costs 15 to 25 eV in GFN1-xTB; one iteration is not enough for it."""
    energies = []
    for charge in (0.0, 1.0):
        structure = Structure.from_atoms(molecule("H2O"), charge=charge)
        energies.append(
            one(resolve("tblite"), tmp_path, make_requests(resolve("tblite"), structure=structure)).energy_ev
        )
    assert 15 < energies[1] - energies[0] < 25  # type: ignore[operator]
    hasty = resolve("tblite", {"max_iterations": 2})
    with LocalLabeler(hasty, tmp_path / "hasty", timeout_s=60, retries=0) as labeler:
        (label,) = labeler.label(make_requests(hasty, structure=Structure.from_atoms(molecule("H2O"))))
    assert (label.status, label.energy_ev) == ("unconverged", None)
    assert "SCF not converged in 2 cycles" in label.reason


def test_what_the_calculator_cannot_take_is_refused_before_anything_runs(
    tmp_path: Path, make_requests: MakeRequests
) -> None:
    requests = make_requests(resolve("emt"), structure=Structure.from_atoms(bulk("Cu"), charge=1.0))
    with LocalLabeler(resolve("emt"), tmp_path, workers=1, timeout_s=60) as labeler:
        with pytest.raises(CalculatorError, match="would ignore the charge"):
            labeler.label(requests)
        assert labeler._pool.pids() == []


@pytest.mark.parametrize("limits", [{"workers": 0}, {"timeout_s": 0.0}, {"threads": -1}, {"timeout_s": float("nan")}])
def test_limits_must_be_positive(limits: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be positive"):
        LocalLabeler(resolve("emt"), tmp_path, **{"workers": 1, "timeout_s": 1.0} | limits)


def test_a_calculator_that_changed_since_the_run_began_is_refused(tmp_path: Path, make_requests: MakeRequests) -> None:
    source = tmp_path / "changing_factory.py"
    source.write_text("from ase.calculators.emt import EMT\ndef make(): return EMT()\n")
    resolved = resolve("ase", {"factory": "changing_factory:make"}, base=tmp_path)
    source.write_text(source.read_text() + "# other numbers now\n")
    with (
        LocalLabeler(resolved, tmp_path / "calc", workers=1, timeout_s=60) as labeler,
        pytest.raises(CalculatorError, match="has changed since the run began: version"),
    ):
        labeler.label(make_requests(resolved))


def test_close_ends_a_label_in_flight_without_a_label(
    tmp_path: Path, misbehaving: Misbehaving, make_requests: MakeRequests
) -> None:
    resolved = misbehaving("hangs", pid_file=str(tmp_path / "pids"))
    labeler = LocalLabeler(resolved, tmp_path / "calc", workers=1, timeout_s=300)
    heard: list[Label] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            labeler.label(make_requests(resolved, 3), heard.append)
        except AlLoopError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_until(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()))
    labeler.close()
    thread.join(30)
    assert not thread.is_alive()
    assert heard == []
    assert "labelling was stopped" in str(errors[0])
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    labeler.close()
    with pytest.raises(AlLoopError, match="labelling was stopped"):
        labeler.label(make_requests(resolved))


def test_an_error_of_on_done_is_raised_after_what_ran_was_reported(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    heard: list[str] = []

    def on_done(label: Label) -> None:
        heard.append(label.key)
        raise OSError("disk full")

    with LocalLabeler(resolved, tmp_path, workers=2, timeout_s=60) as labeler:
        with pytest.raises(OSError, match="disk full"):
            labeler.label(make_requests(resolved, 6), on_done)
        assert heard
        assert labeler.label(make_requests(resolved, 1))[0].ok


PARENT = """
import sys
from pathlib import Path
from ase.build import bulk
from alcore.types import Candidate, LabelRequest, Structure
from calculators.labeling import LocalLabeler
from calculators.registry import resolve
here, folder = sys.argv[1:]
resolved = resolve("ase", {"factory": "misbehaving:hangs", "settings": {"pid_file": folder + "/pids"}, "path": here})
candidate = Candidate(path="hop", kind="data", image=0, structure=Structure.from_atoms(bulk("Cu")))
request = LabelRequest(key="k" * 64, candidate=candidate, generation=0)
LocalLabeler(resolved, Path(folder) / "calc", 1, timeout_s=300.0).label([request])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    here = Path(__file__).parent
    with (tmp_path / "said").open("wb") as said:
        command = [sys.executable, "-c", PARENT, str(here), str(tmp_path)]
        parent = subprocess.Popen(command, cwd=here.parents[1], stderr=said)
        assert wait_until(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()))
        parent.send_signal(number)
        assert parent.wait(30) != 0
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(wait_until(lambda pid=pid: gone(pid)) for pid in pids)  # type: ignore[misc]
