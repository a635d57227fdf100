"""A job that the killed process of one run left, and another run that asks for the same label."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from alcore.types import Label
from calculators import outcomes
from calculators.executors.local import PoolClosedError
from calculators.executors.outcome import JobOutcome
from calculators.executors.processes import family
from calculators.executors.queues import QueueSpec
from calculators.labeling import ExecutorLabeler, LocalLabeler
from calculators.pyiron_labeling import PyironLabeler

SPEC = QueueSpec(system="slurm", walltime_s=600, poll_s=0.5, grace_s=2)
BOTH = pytest.mark.parametrize("system", ["", "slurm"])


class Taking:
    """The other run: asks for the label of ``waiting`` from a folder beside."""

    def __init__(self, waiting: Any) -> None:
        self.waiting, self.said = waiting, list[str]()

    def labeler(self) -> PyironLabeler:
        return PyironLabeler(
            self.waiting.resolved(),
            self.waiting.folder / "other",
            queue=SPEC if self.waiting.system else None,
            timeout_s=300,
            beside=self.waiting.folder,
            log=self.said.append,
        )

    def in_thread(self, labeler: ExecutorLabeler) -> tuple[threading.Thread, list[Any]]:
        answer: list[Any] = []

        def work() -> None:
            try:
                answer.extend(labeler.label([self.waiting.request()]))
            except Exception as error:
                answer.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        return thread, answer

    def left(self) -> Path:
        """The folder of the job that was left."""
        (described,) = (self.waiting.folder / "run").glob("jobs/*_hdf5/*/job.json")
        return described.parent

    def token(self) -> str:
        return str(json.loads((self.left() / "job.json").read_text())["token"])


def records(folder: Path) -> dict[str, bytes]:
    """pyiron's own files of a run."""
    return {path.name: path.read_bytes() for path in (folder / "pyiron.db", *folder.glob("jobs/*.h5"))}


@BOTH
def test_a_job_that_runs_is_waited_for_and_its_run_s_records_are_not_touched(
    system: str, waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting(system)
    other.start_and_kill(lambda: other.n_begun() == 1)
    taking, before = Taking(other), records(other.folder / "run")
    with taking.labeler() as labeler:
        thread, answer = taking.in_thread(labeler)
        wait_until(lambda: taking.said or not thread.is_alive())
        thread.join(2)
        assert (thread.is_alive(), answer) == (True, [])
        other.hold.unlink()
        thread.join(60)
        assert [label.status for label in answer] == ["ok"]
        labeler.tidy(answer[0])
        assert Path(answer[0].folder) == taking.left()
    assert taking.said == [f"label {other.key[:6]} is being computed by a job of run run: waits for it"]
    assert other.n_begun() == 1
    assert (fake_slurm.calls("sbatch"), fake_slurm.calls("scancel")) == (1 if system else 0, 0)
    assert records(other.folder / "run") == before


@BOTH
def test_closing_leaves_the_job_to_the_next_who_asks(
    system: str, waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting(system)
    other.start_and_kill(lambda: other.n_begun() == 1)
    taking = Taking(other)
    labeler = taking.labeler()
    thread, answer = taking.in_thread(labeler)
    wait_until(lambda: taking.said or not thread.is_alive())
    labeler.close()
    thread.join(30)
    assert isinstance(answer[0], PoolClosedError)
    assert family(taking.token()) != set()
    other.hold.unlink()
    with other.labeler() as labeler:
        assert labeler.label([other.request()])[0].ok
    assert (other.n_begun(), fake_slurm.calls("scancel")) == (1, 0)


@pytest.mark.slow
@BOTH
def test_what_a_job_brought_meanwhile_is_taken(
    system: str, waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting(system)
    other.start_and_kill(lambda: other.n_begun() == 1)
    other.hold.unlink()
    taking = Taking(other)
    wait_until(lambda: family(taking.token()) == set())
    with taking.labeler() as labeler:
        assert labeler.label([other.request()])[0].ok
    assert "taken from its folder" in taking.said[0]
    with LocalLabeler(other.resolved(), other.folder / "third", beside=other.folder) as labeler:
        assert labeler.label([other.request()])[0].ok
    assert other.n_begun() == 1


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("how", ["killed", "timeout"])
def test_a_job_that_brought_no_answer_is_computed_here(
    system: str, how: str, waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    """What one run calls late another may have time for."""
    other = waiting(system)
    other.start_and_kill(lambda: other.n_begun() == 1)
    taking = Taking(other)
    token = taking.token()
    with taking.labeler() as labeler:
        thread, answer = taking.in_thread(labeler)
        wait_until(lambda: taking.said or not thread.is_alive())
        if how == "timeout":
            of = {"token": token, "key": other.key, "fingerprint": other.resolved().fingerprint}
            outcomes.write_outcome(taking.left(), JobOutcome(kind="timeout"), **of)
        else:
            for process in family(token):
                for one in (process, *process.parents()[:1]):  # what watches it in a queue carries no mark
                    with suppress(psutil.Error):
                        if "calculators.job" in " ".join(one.cmdline()):
                            one.kill()
        wait_until(lambda: len(taking.said) == 2)
        assert "brought no good answer, so it is computed here" in taking.said[1]
        other.hold.unlink()
        thread.join(60)
    assert [label.status for label in answer] == ["ok"]
    assert Path(answer[0].folder).is_relative_to(other.folder / "other")
    assert other.n_begun() == 2


@pytest.mark.slow
def test_the_job_of_a_run_that_lives_is_waited_for_without_its_lock(
    waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    """Only without claims, or after a claim was lost, do two ask for the same label at once."""
    one = waiting("slurm")
    one.hold.touch()
    taking = Taking(one)
    with one.labeler() as labeler, taking.labeler() as other:
        threads = [taking.in_thread(labeler)]
        wait_until(lambda: one.n_begun() == 1)
        threads.append(taking.in_thread(other))
        wait_until(lambda: taking.said)
        one.hold.unlink()
        for thread, _ in threads:
            thread.join(60)
    assert [label.status for _, answer in threads for label in answer] == ["ok", "ok"]
    assert (one.n_begun(), fake_slurm.calls("sbatch"), fake_slurm.calls("scancel")) == (1, 1, 0)


FINDS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import waiting
from calculators import pyiron_labeling
made = pyiron_labeling.PyironLabeler
waiting.PyironLabeler = lambda *a, **k: made(*a, **k, beside=Path(sys.argv[1]).parent, log=print)
waiting.main(sys.argv[1], *sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_a_second_run_takes_over_a_job_of_a_real_slurm(
    waiting: Callable[[str], Any], wait_until: Callable[..., None]
) -> None:
    """The first process is killed; the second, of another run, is killed while it waits; the third gets the answer."""
    other = waiting("slurm")
    other.start_and_kill(lambda: other.n_begun() == 1)
    here = Path(__file__).parent
    command = [sys.executable, "-c", FINDS, str(other.folder / "second"), str(here)]
    command += ["slurm", other.key, json.dumps(other.settings)]
    said = other.folder / "said"
    with said.open("w") as out:
        second = subprocess.Popen([sys.executable, "-u", *command[1:]], stdout=out, cwd=here.parents[2])
    wait_until(lambda: "waits for it" in said.read_text() or second.poll() is not None)
    second.kill()
    assert second.wait() == -9
    taking = Taking(other)
    with taking.labeler() as labeler:
        thread, answer = taking.in_thread(labeler)
        wait_until(lambda: taking.said)
        listed = subprocess.run(["squeue", "--noheader", "--format=%A"], capture_output=True, text=True, check=True)
        assert len(listed.stdout.split()) == 1
        other.hold.unlink()
        thread.join(60)
    assert [label.status for label in answer if isinstance(label, Label)] == ["ok"]
    assert other.n_begun() == 1
    assert list((other.folder / "other").glob("jobs/*")) == []
