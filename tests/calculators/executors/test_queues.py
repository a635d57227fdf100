from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alcore.errors import CalculatorError, InputError
from calculators.executors.queues import (
    SYSTEMS,
    Queue,
    QueueFullError,
    QueueSpec,
    Resources,
    script_template,
    walltime_s,
)


@given(days=st.integers(0, 30), hours=st.integers(0, 23), minutes=st.integers(0, 59), seconds=st.integers(1, 59))
def test_wall_times_are_read(days: int, hours: int, minutes: int, seconds: int) -> None:
    clock = f"{hours}:{minutes:02d}:{seconds:02d}"
    total = (hours * 60 + minutes) * 60 + seconds
    assert walltime_s(clock) == total
    assert walltime_s(f"{days}-{clock}") == total + 86400 * days


@pytest.mark.parametrize("text", ["", "12", "12:00", "1:60:00", "0:00:00", "1-", "a:00:00"])
def test_what_is_no_wall_time_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no wall time"):
        walltime_s(text)


EXPECTED = {
    "slurm": ["--ntasks=4", "--cpus-per-task=2", "--time=36:00:00", "--mem=16384M", "--partition=long", "--no-requeue"],
    "sge": ["-l h_rt=129600", "-l h_vmem=2048M", "-q long", "-r n"],
    "torque": ["-l nodes=1:ppn=8", "-l walltime=36:00:00", "-l mem=16384mb", "-q long"],
    "lsf": ["-n 8", "-W 2160", "-M 16384MB", "-q long"],
    "flux": ["--nslots=4", "--cores-per-slot=2", "--time-limit=129600s", "--queue=long"],
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_told_what_a_job_takes(system: str) -> None:
    """A shell reads the script without an error, and the user's own lines arrive as they are."""
    import jinja2

    options = ("--account=abc", "--comment={{x}}")
    spec = QueueSpec(system=system, walltime_s=36 * 3600, partition="long", submit_options=options)
    take = Resources(cores=8, threads=2, memory_gb=16, modules=("vasp/6.4.2",), prologue=("export A='{{a}}'",))
    template = jinja2.Template(script_template(spec, take))
    script = template.render(job_name="al_1", working_directory="/somewhere", command="exec true")
    prefix = SYSTEMS[system][0]
    for line in (*EXPECTED[system], *options):
        assert f"{prefix} {line}" in script.splitlines()
    body = [line for line in script.splitlines() if not line.startswith("#")]
    assert "module load vasp/6.4.2" in body[0]
    assert body[1:] == ["export A='{{a}}'", "exec true"]
    assert script.startswith("#!/bin/bash -l\n")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"system": "moab"}, "moab"), ({"system": "pigeon"}, "unknown queue"), ({"walltime_s": 0}, "must be positive")],
)
def test_what_cannot_be_driven_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        QueueSpec(**{"system": "slurm", "walltime_s": 60.0} | change)


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_lsf_reads_its_script_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = "echo 'JOBID USER STAT QUEUE FROM_HOST EXEC_HOST JOB_NAME SUBMIT_TIME'; echo '17 me RUN q h h al_1 now'"
    programs(tmp_path, monkeypatch, bsub=f"cat > {tmp_path}/read; echo 'Job <17> is submitted'", bjobs=jobs)
    queue = Queue(QueueSpec(system="lsf", walltime_s=600), Resources(), tmp_path / "queues")
    assert queue.submit("al_1", tmp_path / "job", "true") == 17
    assert "#BSUB -J al_1" in (tmp_path / "read").read_text()
    assert queue.ask() == {17: "al_1"}


POLICY = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size)"
)


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ("QOSMaxSubmitJobPerUserLimit", QueueFullError),
        ("AssocMaxSubmitJobLimit", QueueFullError),
        ("AssocGrpSubmitJobsLimit", QueueFullError),
        ("", QueueFullError),
        ("QOSMaxWallDurationPerJobLimit", CalculatorError),
        ("AssocMaxCpuPerJobLimit", CalculatorError),
    ],
)
def test_a_limit_on_the_number_of_jobs_passes_and_one_on_a_job_s_size_does_not(
    named: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"sbatch: error: {named}\n{POLICY}" if named else POLICY
    programs(tmp_path, monkeypatch, sbatch=f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
    queue = Queue(QueueSpec(system="slurm", walltime_s=600), Resources(), tmp_path / "queues")
    with pytest.raises(error, match="accounting/QOS policy"):
        queue.submit("al_1", tmp_path / "job", "true")


def test_a_module_s_name_is_no_command(tmp_path: Path) -> None:
    name = '$(touch done)"`touch done`'
    script = "module() { return 1; }\n" + "\n".join(Resources(modules=(name,)).preamble())
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (90, f"al-loop: cannot load module {name}\n")
    assert list(tmp_path.iterdir()) == []


def test_torque_s_number_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, qsub="echo 23.server")
    queue = Queue(QueueSpec(system="torque", walltime_s=600), Resources(), tmp_path / "queues")
    assert queue.submit("al_1", tmp_path / "job", "true") == 23


@pytest.mark.parametrize(("system", "module", "package"), [("sge", "defusedxml", ""), ("flux", "flux", "flux-python")])
def test_a_package_that_pysqa_needs_is_named(system: str, module: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed here")
    with pytest.raises(CalculatorError, match=f"pip install {package or module}"):
        Queue(QueueSpec(system=system, walltime_s=600), Resources(), tmp_path)


def test_limits_of_an_outer_slurm_job_do_not_leak_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("SLURM_CONF", "/somewhere/slurm.conf")
    programs(tmp_path, monkeypatch, sbatch=f"env > {tmp_path}/env; echo 5")
    queue = Queue(QueueSpec(system="slurm", walltime_s=600), Resources(), tmp_path / "queues")
    assert queue.submit("al_1", tmp_path / "job", "true") == 5
    seen = (tmp_path / "env").read_text()
    assert "SLURM_MEM_PER_CPU" not in seen
    assert "SLURM_CONF=/somewhere/slurm.conf" in seen
