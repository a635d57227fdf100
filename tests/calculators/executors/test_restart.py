"""The process that waits is killed; what another one then finds. On this machine, and in a queue that is odd."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from alcore.errors import CalculatorError
from alcore.types import Label, LabelRequest
from calculators.executors import queues, runners
from calculators.executors.local import PoolClosedError
from calculators.executors.outcome import JobOutcome
from calculators.executors.processes import family
from calculators.executors.queues import QueueSpec
from calculators.outcomes import write_outcome
from calculators.pyiron_labeling import PyironLabeler
from calculators.registry import resolve

MakeRequests = Callable[..., list[LabelRequest]]
SPEC = QueueSpec(system="slurm", walltime_s=600, poll_s=0.2, grace_s=1.0)


def tokens(folder: Path) -> list[str]:
    return [json.loads(file.read_text())["token"] for file in folder.glob("jobs/*_hdf5/*/job.json")]


def in_thread(labeler: PyironLabeler, request: LabelRequest) -> tuple[threading.Thread, list[Any]]:
    answer: list[Any] = []

    def work() -> None:
        try:
            answer.extend(labeler.label([request]))
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, answer


@pytest.mark.parametrize("system", ["", "slurm"])
def test_a_running_job_is_found_again_and_runs_once(
    system: str, waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting(system)
    other.start_and_kill(lambda: other.n_begun() == 1)
    assert fake_slurm.calls("sbatch") == (1 if system else 0)
    with other.labeler() as labeler:
        thread, answer = in_thread(labeler, other.request())
        thread.join(3)
        assert (thread.is_alive(), answer) == (True, [])
        other.hold.unlink()
        thread.join(60)
    assert [label.status for label in answer] == ["ok"]
    assert other.n_begun() == 1
    assert fake_slurm.calls("sbatch") == (1 if system else 0)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["", "slurm"])
def test_a_job_that_ended_meanwhile_is_collected(
    system: str, waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting(system)
    other.start_and_kill(lambda: other.n_begun() == 1)
    other.hold.unlink()
    (token,) = tokens(other.folder / "run")
    wait_until(lambda: family(token) == set())
    with other.labeler() as labeler:
        assert labeler.label([other.request()])[0].ok
    assert other.n_begun() == 1


def _end_job(*processes: psutil.Process) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it may be gone with one that was ended before, or be a zombie
            if "calculators.job" in " ".join(process.cmdline()):
                process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("system", ["", "slurm"])
def test_a_job_that_died_meanwhile_is_a_crash_and_then_computed_afresh(
    system: str, waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting(system)
    other.start_and_kill(lambda: other.n_begun() == 1)
    (token,) = tokens(other.folder / "run")
    for process in family(token):
        with suppress(psutil.NoSuchProcess):  # what watches it in a queue carries no mark
            _end_job(*process.parents()[:1])
        _end_job(process)
    wait_until(lambda: family(token) == set())
    other.hold.unlink()
    with other.labeler() as labeler:
        first, second = (labeler.label([other.request()])[0] for _ in range(2))
    assert (first.status, second.status) == ("crashed", "ok")
    assert ("left the queue without an outcome" if system else "it is gone") in first.reason
    assert other.n_begun() == 2


@pytest.mark.slow
@pytest.mark.parametrize("system", ["", "slurm"])
def test_cancel_ends_what_an_earlier_process_left(
    system: str, waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting(system)
    other.start_and_kill(lambda: other.n_begun() == 1)
    (token,) = tokens(other.folder / "run")
    with other.labeler() as labeler:
        assert labeler.cancel() == 1
    wait_until(lambda: family(token) == set())
    with other.labeler() as labeler:
        assert labeler.cancel() == 0


def test_a_refusal_that_nobody_heard_is_tried_again(
    waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting("slurm")
    other.start_and_kill(lambda: other.n_begun() == 1)
    other.hold.unlink()
    (token,) = tokens(other.folder / "run")
    wait_until(lambda: family(token) == set())
    (described,) = (other.folder / "run").glob("jobs/*_hdf5/*/job.json")
    write_outcome(described.parent, JobOutcome(kind="died"), token=token, refused="no licence")
    with other.labeler() as labeler:
        assert labeler.label([other.request()])[0].ok
    assert other.n_begun() == 2


def test_close_leaves_a_queued_job_to_the_next_labeler(
    waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    other = waiting("slurm")
    other.hold.touch()
    labeler = other.labeler()
    thread, answer = in_thread(labeler, other.request())
    wait_until(lambda: other.n_begun() == 1)
    labeler.close()
    thread.join(30)
    assert isinstance(answer[0], PoolClosedError)
    other.hold.unlink()
    with other.labeler() as labeler:
        assert labeler.label([other.request()])[0].ok
    assert (other.n_begun(), fake_slurm.calls("sbatch"), fake_slurm.calls("scancel")) == (1, 1, 0)


def other_run(waiting: Any) -> PyironLabeler:
    """Asks for the same label as ``waiting.labeler()`` does, in a folder of its own."""
    return PyironLabeler(waiting.resolved(), waiting.folder / "other", queue=SPEC, timeout_s=300)


def test_a_refused_job_leaves_that_of_another_run_alone(
    waiting: Callable[[str], Any], fake_slurm: Any, wait_until: Callable[..., None]
) -> None:
    one = waiting("slurm")
    one.hold.touch()
    with one.labeler() as labeler, other_run(one) as other:
        thread, answer = in_thread(labeler, one.request())
        wait_until(lambda: one.n_begun() == 1)
        fake_slurm.tell("refuse", "sbatch: error: invalid account")
        with pytest.raises(CalculatorError, match="invalid account"):
            other.label([one.request()])
        assert fake_slurm.calls("scancel") == 0
        one.hold.unlink()
        thread.join(60)
    assert [label.status for label in answer] == ["ok"]


def test_a_full_queue_is_waited_for_and_then_given_the_run_s_own_job(
    waiting: Callable[[str], Any],
    fake_slurm: Any,
    wait_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stopped while it waits, it has a job that was never submitted; the job of the same label that another run has
    in the queue is not taken for it."""
    monkeypatch.setattr(runners, "FULL_PAUSE_S", 0.1)
    one = waiting("slurm")
    one.hold.touch()
    with one.labeler() as labeler:
        threads = [in_thread(labeler, one.request())]
        wait_until(lambda: one.n_begun() == 1)
        fake_slurm.tell("refuse", "sbatch: error: QOSMaxSubmitJobPerUserLimit")
        with other_run(one) as other:
            thread, stopped = in_thread(other, one.request())
            wait_until(lambda: fake_slurm.calls("sbatch") > 2 + runners.N_SUBMISSIONS or not thread.is_alive())
            assert thread.is_alive()
        thread.join(30)
        assert isinstance(stopped[0], PoolClosedError)
        assert caplog.text.count("takes no more jobs for now") == 1
        (fake_slurm.folder / "refuse").unlink()
        with other_run(one) as other:
            threads.append(in_thread(other, one.request()))
            wait_until(lambda: one.n_begun() == 2)
            one.hold.unlink()
            for thread, _ in threads:
                thread.join(60)
    assert [label.status for _, answer in threads for label in answer] == ["ok", "ok"]
    assert fake_slurm.calls("scancel") == 0


def test_a_job_found_again_that_close_ends_is_no_crash(
    waiting: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = waiting("")
    other.start_and_kill(lambda: other.n_begun() == 1)
    labeler = other.labeler()
    look = labeler._runner.gone

    def gone(job: Any) -> JobOutcome | None:
        """Closed after the waiting thread last asked whether it is, and before it looks for processes."""
        labeler.close()
        outcome: JobOutcome | None = look(job)
        assert outcome is not None
        return outcome

    monkeypatch.setattr(labeler._runner, "gone", gone)
    with pytest.raises(PoolClosedError):
        labeler.label([other.request()])


def label_one(tmp_path: Path, make_requests: MakeRequests, spec: QueueSpec = SPEC) -> Label:
    resolved = resolve("emt")
    with PyironLabeler(resolved, tmp_path / "run", queue=spec, timeout_s=60) as labeler:
        return labeler.label(make_requests(resolved))[0]


@pytest.mark.parametrize(("file", "text"), [("squeue-fails", "3"), ("lag", "2"), ("silent", "1")])
def test_a_queue_that_is_odd_for_a_while_does_no_harm(
    file: str, text: str, tmp_path: Path, make_requests: MakeRequests, fake_slurm: Any
) -> None:
    fake_slurm.tell(file, text)
    assert label_one(tmp_path, make_requests).ok
    assert fake_slurm.calls("sbatch") == 1
    assert not (fake_slurm.folder / file).exists() or file != "silent"


def test_a_queue_that_hangs_does_not_hold_up_a_job_that_has_ended(
    tmp_path: Path, make_requests: MakeRequests, fake_slurm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "COMMAND_LIMIT_S", 1.0)
    fake_slurm.tell("squeue-hangs", "1")
    assert label_one(tmp_path, make_requests).ok


def test_a_job_that_vanishes_is_a_crash(tmp_path: Path, make_requests: MakeRequests, fake_slurm: Any) -> None:
    fake_slurm.tell("vanish")
    label = label_one(tmp_path, make_requests)
    assert label.status == "crashed"
    assert "slurm job 100 left the queue without an outcome" in label.reason
    assert fake_slurm.calls("sbatch") == 1


def test_a_refusal_is_one_clear_line(tmp_path: Path, make_requests: MakeRequests, fake_slurm: Any) -> None:
    fake_slurm.tell(
        "refuse", "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed"
    )
    with pytest.raises(CalculatorError, match=r"sbatch says: .*invalid partition specified: x \| ") as caught:
        label_one(tmp_path, make_requests)
    assert "\n" not in str(caught.value)


def test_a_missing_sbatch_is_told_with_the_mend(
    tmp_path: Path, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CalculatorError, match=r"sbatch is not on this machine.*login node"):
        label_one(tmp_path, make_requests)


def test_one_question_is_asked_for_all_jobs(waiting: Callable[[str], Any], fake_slurm: Any, tmp_path: Path) -> None:
    """Four jobs that are waited for a while cost as many questions as one."""
    other = waiting("slurm")
    other.hold.touch()
    spec = QueueSpec(system="slurm", walltime_s=600, poll_s=1.0, grace_s=60)
    labeler = PyironLabeler(other.resolved(), other.folder / "run", 4, queue=spec, timeout_s=60)
    request = other.request()
    requests = [LabelRequest(key=digit * 64, candidate=request.candidate, generation=0) for digit in "1234"]
    thread = threading.Thread(target=lambda: labeler.label(requests))
    with labeler:
        thread.start()
        while other.n_begun() < 4:
            thread.join(0.1)
        before = fake_slurm.calls("squeue")
        thread.join(5)
        asked = fake_slurm.calls("squeue") - before
        other.hold.unlink()
        thread.join(60)
    assert 3 <= asked <= 8
