"""What waits on disk is told, whichever database it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.cli.common import waiting_lines
from storage.durable import spool_folder
from storage.spool import REFUSED, Spool


def test_every_spool_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AL_LOOP_HOME", str(tmp_path))
    monkeypatch.delenv("AL_LOOP_MONGODB_URI", raising=False)
    assert waiting_lines(None) == []
    there = "mongodb://ann:s3cret@db.example"
    own, other = Spool(spool_folder(None, tmp_path)), Spool(spool_folder(there, tmp_path))
    own.put("step", {"n": 1})
    for n in range(3):
        file = other.put("step", {"n": n})
    other.put_aside(file, REFUSED, "why")
    assert waiting_lines(None) == [
        f"1 write waits for the database on disk in {own.folder}",
        f"2 writes wait for another database on disk in {other.folder}",
        f"1 write that could not be delivered kept in {other.folder}",
    ]
    assert waiting_lines(there)[0] == f"2 writes wait for the database on disk in {other.folder}"
    assert waiting_lines(there)[-1] == f"1 write waits for another database on disk in {own.folder}"
    assert "db.example-27017" in other.folder.name
