"""Files: those a user names, read with one line where that fails; and those that must outlive a power cut."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from alcore.errors import InputError

TEMPORARY = ".tmp"
"""End of the names of files that are being written."""
KNOW_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""What some shared file systems answer to the fsync of a folder."""


def read_file(path: Path, where: str, index: str | int = -1) -> Any:
    """What ``ase.io.read`` makes of the file: one frame, or a list of them for ``index=":"``.

    Args:
        path: the file.
        where: the key of the run file that names it.
        index: which frames.

    Raises:
        InputError: no such file, or ASE cannot read it.
    """
    from ase.io import read

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


def write_whole(path: Path, content: bytes, n_folders: int = 1) -> None:
    """Write a file that a reader sees whole or not at all, whenever power or process end; on the disk at return.

    Args:
        path: the file, for this user alone; what was there is replaced.
        content: of the file.
        n_folders: so many of the folders above it may be new, and are put on the disk, too.

    Raises:
        OSError: it is not certain that it was written; nothing half is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    for folder in list(path.absolute().parents)[:n_folders]:
        fsync_folder(folder)


def make_folder(folder: Path) -> None:
    """``folder``, for this user alone, and the entries of all its new parents on disk.

    Raises:
        OSError: it cannot be made.
    """
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """What was made, renamed or removed in ``folder`` is on the disk when this returns.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in KNOW_NO_FSYNC:
            raise
    finally:
        os.close(descriptor)
