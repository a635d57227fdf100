from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alcore.errors import CalculatorError
from calculators import programs
from calculators.programs import ask_version, find_program, version_of


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_program_behind_the_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = write(tmp_path / "mycode.x", "#!/bin/sh\n")
    for launcher in ("mpirun", "srun"):
        write(tmp_path / launcher, "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    for command in (
        "mycode.x",
        str(program),
        "mpirun -np 4 mycode.x",
        "mpirun -np 4 mycode.x -nk 2",
        "env OMP_NUM_THREADS=1 srun -n 4 mycode.x",
    ):
        assert find_program(command) == program
    for command in ("", "other.x", "mpirun -np 4", "mpirun -np 4 other.x", "'mycode.x"):
        assert find_program(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "pw.x -pd true",
        "srun pw.x | tee log",
        "pw.x > true 2>&1",
        "pw.x -nk 2; true",
        "cd true && module load node; OMP_NUM_THREADS=1 mpirun.openmpi -np 4 --map-by node --bind-to core pw.x",
        "mpirun --mca btl self,vader --oversubscribe --hostfile hosts pw.x -in node",
        "timeout 10m nice -n 5 taskset -c 0-3 time -p pw.x true",
        "exec ibrun pw.x",
    ],
)
def test_the_first_program_counts_and_not_what_comes_after(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pw.x", "true", "tee", "node", "core", "srun", "mpirun", "mpirun.openmpi", "timeout", "nice", "time"):
        write(tmp_path / name, "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program(command) == tmp_path / "pw.x"
    (tmp_path / "pw.x").unlink()
    assert find_program("mpirun -np 4 pw.x -pd true") is None
    assert find_program("pw.x -pd true | tee log") is None
    assert find_program(str(write(tmp_path / "run", "#!/bin/sh\n"))) == tmp_path / "run"


def test_a_container_is_its_image(tmp_path: Path) -> None:
    (tmp_path / "qe.sif").write_text("squashed")
    for launcher in ("singularity exec", "mpirun -np 4 apptainer exec --nv -B /scratch:/scratch", "apptainer run --nv"):
        assert find_program(f"{launcher} {tmp_path / 'qe.sif'} true") == tmp_path / "qe.sif"


def test_a_version_or_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = {"where": "calculator x", "package": "code-x"}
    with pytest.raises(CalculatorError, match=r"code\.x -v 1 is not on this machine.*install code-x"):
        version_of("mpirun code.x -v 1", r"v(\S+)", **asked)
    program = write(tmp_path / "code.x", "#!/bin/sh\necho v1.2 $1\n")
    assert version_of("mpirun code.x | tee log", r"v(\S+ --version)", "--version", **asked) == "1.2 --version"
    with pytest.raises(CalculatorError, match=f"{program} does not say its version"):
        version_of("mpirun code.x | tee log", r"version (\S+)", **asked)


def test_a_program_is_asked_once_until_it_changes(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    text = f'#!/bin/sh\necho asked >> {asked}\nread line\necho "Program $line v.%s" >&2\nexit 3\n'
    program = write(tmp_path / "code.x", text % "1.2")
    for _ in range(2):
        assert ask_version(program, r"Program X v\.(\S+)", text="X\n") == "1.2"
    assert asked.read_text().split() == ["asked"]
    write(program, text % "1.2.3")
    assert ask_version(program, r"Program X v\.(\S+)", text="X\n") == "1.2.3"


def test_a_program_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "ASK_LIMIT_S", 0.5)
    assert ask_version(write(tmp_path / "mute.x", "#!/bin/sh\nexit 1\n"), "v(.*)") == ""
    assert ask_version(write(tmp_path / "slow.x", "#!/bin/sh\nexec sleep 30\n"), "v(.*)") == ""
    assert ask_version(write(tmp_path / "broken.x", "no program at all"), "v(.*)") == ""
    assert ask_version(write(tmp_path / "bytes.x", "#!/bin/sh\nprintf '\\377 v1.0'\n"), r"v(\S+)") == "1.0"


def test_it_leaves_nothing_where_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = Path(sys.executable)
    assert ask_version(program, r"v(\d)", "-c", "open('litter', 'w'); print('v7')") == "7"
    assert list(tmp_path.iterdir()) == []
