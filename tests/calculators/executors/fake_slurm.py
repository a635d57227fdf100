"""``sbatch``, ``squeue`` and ``scancel`` without a cluster: jobs are processes, ``FOLDER/job-NUMBER`` lists them.

Files in FOLDER change how they behave:
``refuse``: sbatch refuses with this text. ``silent``: sbatch takes the job, but dies before it says so, once.
``squeue-fails``: squeue fails so many times. ``squeue-hangs``: it hangs, once. ``lag``: it lists no job before it
has been asked so many times. ``vanish``: the job is never run, and is not listed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def countdown(file: Path) -> int:
    """The number in the file, which is then one less; 0 if there is none."""
    if not file.exists():
        return 0
    number = int(file.read_text() or 1)
    file.write_text(str(number - 1)) if number > 1 else file.unlink()
    return number


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def sbatch(folder: Path, script: Path) -> int:
    if (folder / "refuse").exists():
        print((folder / "refuse").read_text(), file=sys.stderr)
        return 1
    words = dict(line[8:].strip().split("=", 1) for line in script.read_text().splitlines() if "=" in line[:30])
    number = 100 + len(list(folder.glob("job-*")))
    pid = 0
    if not (folder / "vanish").exists():
        with Path(words["--output"]).open("ab") as out:
            command = ["/bin/bash", str(script)]
            job = subprocess.Popen(command, cwd=words["--chdir"], stdout=out, stderr=out, start_new_session=True)
        pid = job.pid
    (folder / f"job-{number}").write_text(f"{pid}|{words['--job-name']}|{words['--chdir']}")
    if countdown(folder / "silent"):
        print("sbatch: error: Socket timed out on send/recv operation", file=sys.stderr)
        return 1
    print(number)
    return 0


def squeue(folder: Path) -> int:
    if countdown(folder / "squeue-hangs"):
        time.sleep(60)
    if countdown(folder / "squeue-fails"):
        print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr)
        return 1
    if countdown(folder / "lag"):
        return 0
    for job in sorted(folder.glob("job-*")):
        pid, name, place = job.read_text().split("|")
        if alive(int(pid)):
            print(f"{job.name[4:]}|root|R|{name:>15.15}|{place}")
    return 0


def scancel(folder: Path, number: str) -> int:
    pid, _, place = (folder / f"job-{number}").read_text().split("|")
    with (Path(place) / "queue.out").open("a") as log:
        log.write(f"slurmstepd: error: *** JOB {number} ON here CANCELLED AT 2030-01-01T00:00:00 ***\n")
    os.kill(int(pid), signal.SIGTERM)
    return 0


def main(program: str, folder: Path, arguments: list[str]) -> int:
    with (folder / f"{program}.calls").open("a") as log:
        log.write(" ".join(arguments) + "\n")
    if program == "sbatch":
        return sbatch(folder, Path(arguments[-1]))
    return squeue(folder) if program == "squeue" else scancel(folder, arguments[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
