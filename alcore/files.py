"""Structure files a user names, read with one line where that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ase.io import read

from alcore.errors import InputError


def read_file(path: Path, where: str, index: str | int = -1) -> Any:
    """What ``ase.io.read`` makes of the file: one frame, or a list of them for ``index=":"``.

    Args:
        path: the file.
        where: the key of the run file that names it.
        index: which frames.

    Raises:
        InputError: no such file, or ASE cannot read it.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}", where=where, mend="paths are relative to the run file")
    try:
        return read(path, index=index)
    except Exception as error:
        raise InputError(
            f"{path.name} cannot be read: {error or type(error).__name__}",
            where=where,
            mend="give a file ase.io.read takes",
        ) from error
