"""Folders of calculations: nothing that lies in one is ever written over."""

from __future__ import annotations

from pathlib import Path

from alcore.errors import AlLoopError


def fresh_folder(parent: Path, name: str) -> Path:
    """A new folder ``name``, ``name-2``, ... in ``parent``: what lies in an earlier one is kept."""
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise AlLoopError(f"cannot make a folder for a calculation: {error}") from error
