from __future__ import annotations

import sys
from pathlib import Path

import pytest

from calculators import programs
from calculators.programs import ask_version, find_program


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
