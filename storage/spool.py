"""The write-ahead spool: what is worth keeping is a file on disk before anything else, and goes to MongoDB from there.

An entry is written under a temporary name, fsynced, renamed, and its folder fsynced: it is there whole or not at all.
It is removed once the database has acknowledged it. Delivering one twice changes nothing, so a crash in between does
no harm. Entries are numbered and never dated: clocks may jump.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import bson
from bson.errors import BSONError
from filelock import FileLock, Timeout

from alcore.errors import InputError
from alcore.files import TEMPORARY, fsync_folder, make_folder, write_whole
from storage.fields import decode_plain, encode_plain

EntryKind = Literal["run", "label", "generation", "step", "forget", "model"]
SUFFIX, DAMAGED, REFUSED = ".bson", ".damaged", ".refused"
NUMBERED = re.compile(r"\d{16}-")
TRIED_AGAIN = ("label", "model")
"""What was refused once and may be written at any later time; a run or a generation may have been overtaken."""
DIGEST_BYTES = 32
TURN_S = 30.0
"""Whoever delivers for longer was stopped (Ctrl-Z) or hangs, and must not hold up all others."""
ABANDONED_S = 24 * 3600.0
"""Half-written files of a killed process are removed when they are so old."""

FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SpoolEntry:
    """One write that waits for the database.

    Attributes:
        file: where it is kept.
        kind: what it is.
        content: plain values (``alcore.plain``).
    """

    file: Path
    kind: EntryKind
    content: Mapping[str, Any]


class Spool:
    """Entries of one folder, in the order they were written; any number of threads and processes may share it.

    Args:
        folder: made when the first entry comes.
        log: takes lines for a person.
        now: the clock (seconds since 1970) that tells what is old.
    """

    def __init__(
        self, folder: Path, log: Callable[[str], None] = logger.warning, now: Callable[[], float] = time.time
    ) -> None:
        self.folder = folder
        self._now = now
        self._log = log
        self._name = uuid.uuid4().hex[:12]  # a pid would not do: machines may share the folder
        self._numbering = threading.Lock()
        self._last = 0

    def check(self) -> None:
        """Raises:
        InputError: nothing can be written there. A full disk is none: that may change, and is dealt with.
        """
        probe = self.folder / f".{self._name}.probe"
        try:
            make_folder(self.folder)
            probe.touch(mode=0o600)
            probe.unlink()
            self._tidy()
            self._try_again()
        except OSError as error:
            if error.errno in FULL:
                return
            raise InputError(
                f"nothing can be written here: {error.strerror or error}",
                where=str(self.folder),
                mend="choose another data folder with AL_LOOP_HOME, or make this one writable",
            ) from error

    def put(self, kind: EntryKind, content: Mapping[str, Any]) -> Path:
        """On disk when this returns, even through a power cut.

        Raises:
            OSError: the disk is full, or not writable.
            TypeError: not plain values.
        """
        body = bson.encode({"kind": kind, "content": encode_plain(content)})
        make_folder(self.folder)
        file = self.folder / f"{self._next():016d}-{self._name}-{kind}{SUFFIX}"
        write_whole(file, hashlib.sha256(body).digest() + body)
        return file

    def files(self) -> list[Path]:
        """Of those that wait, oldest first."""
        return sorted(file for file in self.folder.glob(f"*{SUFFIX}") if NUMBERED.match(file.name))

    def read(self, file: Path) -> SpoolEntry | None:
        """The entry; None if it is no more, belongs to another user, or was damaged and is now put aside."""
        try:
            data = file.read_bytes()
        except (FileNotFoundError, PermissionError):  # another process delivered it; another user will
            return None
        except OSError as error:
            self.put_aside(file, DAMAGED, str(error.strerror or error))
            return None
        digest, body = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        try:
            if hashlib.sha256(body).digest() != digest:
                raise ValueError("its bytes are not what was written")
            held = bson.decode(body)
            if held["kind"] not in get_args(EntryKind):  # a newer al-loop wrote it, and will deliver it
                return None
            return SpoolEntry(file=file, kind=held["kind"], content=decode_plain(held["content"]))
        except (BSONError, KeyError, TypeError, ValueError) as error:
            self.put_aside(file, DAMAGED, str(error))
            return None

    def done(self, file: Path) -> None:
        """The database has it. The folder is fsynced, so that a power cut never brings back one but not the next.

        Raises:
            OSError: it cannot be removed.
        """
        file.unlink(missing_ok=True)
        fsync_folder(self.folder)

    def put_aside(self, file: Path, suffix: str, why: str) -> None:
        """Out of the way of all others; never deleted."""
        aside = file.with_suffix(suffix)
        with suppress(OSError):
            file.rename(aside)
            self._log(f"a write that waited for the database cannot be delivered and is kept as {aside}: {why}")

    def count(self) -> int:
        """How many wait."""
        return len(self.files())

    def count_aside(self) -> int:
        """How many were damaged or refused."""
        return sum(1 for suffix in (DAMAGED, REFUSED) for _ in self.folder.glob(f"*{suffix}"))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, no other process delivers. Not a promise: one that was stopped in the middle is not waited for."""
        lock = FileLock(self.folder / "lock", mode=0o600)
        try:
            lock.acquire(timeout=TURN_S)
        except (Timeout, OSError, NotImplementedError):  # or a disk that is full, or that knows no locks
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _next(self) -> int:
        """A number above all that wait and all of this process: whoever had seen an entry comes after it."""
        with self._numbering:
            waiting = self.files()
            self._last = max(self._last, int(waiting[-1].name[:16]) if waiting else 0) + 1
            return self._last

    def _try_again(self) -> None:
        for kind in TRIED_AGAIN:
            for file in self.folder.glob(f"*-{kind}{REFUSED}"):
                with suppress(FileNotFoundError):
                    file.rename(file.with_suffix(SUFFIX))

    def _tidy(self) -> None:
        for file in self.folder.glob(f".*{TEMPORARY}"):
            with suppress(OSError):
                if self._now() - file.stat().st_mtime > ABANDONED_S:
                    file.unlink()


def spool_name(place: str, database: str) -> str:
    """Name of the folder of one database's spool.

    Args:
        place: its address as it may be shown (``storage.uris.address``), or what else tells it from all others.
        database: its name.
    """
    readable = re.sub(r"[^\w.-]+", "-", f"{place}-{database}")[:60]
    return f"{readable}-{hashlib.sha256(f'{place}/{database}'.encode()).hexdigest()[:12]}"
