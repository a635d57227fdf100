from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from alcore.files import write_whole


def test_the_order_is_such_that_a_power_cut_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content is on the disk before it has its name; the name is there, in folders that are, before we go on."""
    target = tmp_path / "run" / "calculation" / "outcome"
    target.parent.mkdir(parents=True)
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("sync", "content" if path.suffix == ".tmp" and path.read_bytes() == b"all of it" else path.name))
        sync(descriptor)

    def rename(path: Path, other: Any) -> Any:
        done.append(("rename", path.suffix + " to " + Path(other).name))
        return replace(path, other)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write_whole(target, b"all of it", n_folders=2)
    assert done == [("sync", "content"), ("rename", ".tmp to outcome"), ("sync", "calculation"), ("sync", "run")]
    assert target.read_bytes() == b"all of it"


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        write_whole(tmp_path / "file", b"before")
        with pytest.raises(OSError, match="No space left"):
            write_whole(tmp_path / "file", bytes(200_000))
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert (tmp_path / "file").read_bytes() == b"before"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
