"""The spool alone: what is acknowledged is on disk, whole and in order, whatever happens to process, clock and disk."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alcore.errors import InputError
from alcore.plain import from_plain, to_plain
from alcore.types import GenerationRecord, Label, RunRecord
from storage.spool import ABANDONED_S, DAMAGED, REFUSED, Spool, spool_name

CHECKOUT = Path(__file__).parents[2]


def numbers(spool: Spool) -> list[int]:
    """What the steps that wait were called, in their order."""
    entries = [spool.read(file) for file in spool.files()]
    return [int(entry.content["n"]) for entry in entries if entry is not None]


def put(spool: Spool, *ns: int) -> list[Path]:
    return [spool.put("step", {"n": n}) for n in ns]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small tmpfs; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(size: str = "256k") -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# what comes back


def test_records_come_back_as_they_were(spool: Spool, records: Any) -> None:
    label = records.label(3, details={"steps": (1, 2), "a.b$": np.arange(3.0), "big": 2**70})
    run, generation = records.run("r", settings={"x": {"y": [1, None]}}), records.generation("r", 2, 0.01)
    for kind, record in [("run", run), ("label", label), ("generation", generation)]:
        spool.put(kind, to_plain(record))
    kinds = [RunRecord, Label, GenerationRecord]
    entries = [spool.read(file) for file in spool.files()]
    held = [from_plain(kind, entry.content) for kind, entry in zip(kinds, entries, strict=True) if entry is not None]
    for record, again in zip([run, label, generation], held, strict=True):
        assert repr(to_plain(again)) == repr(to_plain(record))
    assert held[1].structure.positions.tobytes() == label.structure.positions.tobytes()


def test_weights_of_many_megabytes(spool: Spool) -> None:
    weights = np.random.default_rng(0).bytes(40_000_000)
    entry = spool.read(spool.put("model", {"weights": weights, "description": {}}))
    assert entry is not None
    assert entry.content["weights"] == weights


def test_nobody_else_can_read_it(spool: Spool) -> None:
    (file,) = put(spool, 1)
    assert file.stat().st_mode & 0o777 == 0o600
    assert spool.folder.stat().st_mode & 0o777 == 0o700


def test_what_is_done_is_gone(spool: Spool) -> None:
    first, _ = put(spool, 1, 2)
    spool.done(first)
    assert (numbers(spool), spool.count()) == ([2], 1)
    spool.done(first)
    assert spool.read(first) is None


def test_databases_have_folders_of_their_own() -> None:
    names = {spool_name("a:1", "x"), spool_name("a:1", "y"), spool_name("b:1", "x"), spool_name("a:1,b:1", "x")}
    assert len(names) == 4
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)


# damage


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "foreign"])
def test_a_damaged_entry_is_put_aside_and_told(damage: str, tmp_path: Path) -> None:
    told: list[str] = []
    spool = Spool(tmp_path / "spool", told.append)
    _, bad, _ = put(spool, 1, 2, 3)
    data = bytearray(bad.read_bytes())
    data[-3] ^= 4
    bad.write_bytes({"cut": data[:-9], "bit": data, "empty": b"", "foreign": b"hello" * 20}[damage])
    kept = bad.read_bytes()
    assert numbers(spool) == [1, 3]
    assert (spool.count(), spool.count_aside()) == (2, 1)
    assert bad.with_suffix(DAMAGED).read_bytes() == kept
    assert len(told) == 1
    assert str(bad.with_suffix(DAMAGED)) in told[0]


def test_what_a_newer_al_loop_wrote_is_left_to_it(spool: Spool) -> None:
    spool.put("later", {"n": 1})  # type: ignore[arg-type]
    put(spool, 2)
    assert numbers(spool) == [2]
    assert (spool.count(), spool.count_aside()) == (2, 0)


def test_labels_that_were_refused_are_tried_again_by_the_next_process(spool: Spool) -> None:
    files = [spool.put(kind, {"n": 1}) for kind in ("label", "run", "model", "generation")]
    for file in files:
        spool.put_aside(file, REFUSED, "why")
    assert (spool.count(), spool.count_aside()) == (0, 4)
    Spool(spool.folder).check()
    assert spool.files() == [files[0], files[2]]


def test_half_written_files_of_the_dead_go_in_the_end(spool: Spool) -> None:
    put(spool, 1)
    old, new = (spool.folder / f".{name}.tmp" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    os.utime(new, (1001, 1001))
    Spool(spool.folder, now=lambda: 1000.5 + ABANDONED_S).check()
    assert (old.exists(), new.exists(), numbers(spool)) == (False, True, [1])


# order


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_order_holds_when_the_clock_jumps(jump_s: float, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time, time.time_ns
    put(spool, 1, 2)
    monkeypatch.setattr(time, "time", lambda: real[0]() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: real[1]() + int(jump_s * 1e9))
    put(spool, 3)
    put(Spool(spool.folder), 4)
    put(spool, 5)
    assert numbers(spool) == [1, 2, 3, 4, 5]


def test_order_holds_when_what_came_before_is_delivered(spool: Spool) -> None:
    """The folder is empty then, and another process begins to count anew."""
    for file in put(spool, 1, 2, 3):
        spool.done(file)
    other = Spool(spool.folder)
    put(other, 4)
    put(spool, 5)
    put(other, 6)
    assert numbers(spool) == [4, 5, 6]


def test_threads_and_spools_share_a_folder(tmp_path: Path) -> None:
    spools = [Spool(tmp_path / "spool") for _ in range(4)]
    threads = [threading.Thread(target=put, args=(s, *range(k, 80, 4))) for k, s in enumerate(spools)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = numbers(spools[0])
    assert sorted(found) == list(range(80))
    for k in range(4):
        own = [n for n in found if n % 4 == k]
        assert own == sorted(own)


# what survives a power cut


class Disk:
    """What a disk holds for sure at any moment: bytes after their fsync, names after that of their folder. Names that
    were not fsynced may have come about or not; then the worst is assumed, which is neither."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open_files: dict[int, Path] = {}
        self.calls: list[str] = []
        self.bytes: dict[int, bytes] = {}  # by inode
        self.names: dict[Path, dict[str, int]] = {}
        real_open, real_fsync, real_close = os.open, os.fsync, os.close

        def opened(path: Any, *rest: Any, **options: Any) -> int:
            descriptor = real_open(path, *rest, **options)
            self.open_files[descriptor] = Path(path)
            return descriptor

        def fsynced(descriptor: int) -> None:
            real_fsync(descriptor)
            path = self.open_files[descriptor]
            self.calls.append(f"fsync {'folder' if path.is_dir() else 'file'}")
            if path.is_dir():
                self.names[path] = {file.name: file.stat().st_ino for file in path.iterdir()}
            else:
                self.bytes[os.fstat(descriptor).st_ino] = path.read_bytes()

        def closed(descriptor: int) -> None:
            real_close(descriptor)
            self.open_files.pop(descriptor, None)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "fsync", fsynced)
        monkeypatch.setattr(os, "close", closed)
        monkeypatch.setattr(os, "replace", self._told("rename", os.replace))

    def _told(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            return real(*args)

        return call

    def after_a_power_cut(self, folder: Path, copy: Path) -> Spool:
        """The spool as it is found then."""
        copy.mkdir()
        parent = self.names.get(folder.parent, {})
        for name, inode in (self.names.get(folder, {}) if folder.name in parent else {}).items():
            (copy / name).write_bytes(self.bytes.get(inode, b""))
        return Spool(copy)


def test_nothing_is_acknowledged_before_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "data" / "spool")
    disk = Disk(monkeypatch)
    files = []
    for n in range(3):
        disk.calls.clear()
        files += put(spool, n)
        assert disk.calls[-3:] == ["fsync file", "rename", "fsync folder"]
        found = disk.after_a_power_cut(spool.folder, tmp_path / f"cut{n}")
        assert numbers(found) == list(range(n + 1))
        assert found.count_aside() == 0
    spool.done(files[0])
    assert numbers(disk.after_a_power_cut(spool.folder, tmp_path / "done")) == [1, 2]


CHILD = """
import os, sys
from pathlib import Path
from storage.spool import Spool
spool = Spool(Path(sys.argv[1]))
for n in range(int(sys.argv[2])):
    spool.put("step", {"n": n, "filler": bytes(20_000)})
    os.write(1, b"%d\\n" % n)
"""


def child(*arguments: Any, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_system_calls_come_in_the_right_order(tmp_path: Path) -> None:
    """The same, as the kernel sees it."""
    folder, log = tmp_path / "spool", tmp_path / "calls"
    folder.mkdir()
    tracer = ("strace", "-f", "-y", "-e", "trace=openat,write,fsync,rename,renameat,renameat2", "-o", str(log))
    process = child(folder, 1, before=tracer)
    assert process.wait(60) == 0
    calls = [line.split(None, 1)[1] for line in log.read_text().splitlines() if " = " in line]
    mine = [call for call in calls if str(folder) in call or call.startswith("write(1<")]
    steps = [
        r"openat\(.*\.tmp\", O_WRONLY\|O_CREAT\|O_EXCL.*, 0600\)",
        r"write\(.*\.tmp>",
        r"fsync\(.*\.tmp>\) += 0",
        r"rename.*\.tmp\", .*\.bson\"",
        r"openat\(.*spool\", O_RDONLY.*O_DIRECTORY",
        r"fsync\(.*/spool>\) += 0",
        r"write\(1<.*\"0\\n\"",
    ]
    found = [next((k for k, step in enumerate(steps) if re.search(step, call)), None) for call in mine]
    order = [k for k in found if k is not None]
    assert order[-len(steps) :] == list(range(len(steps))), "\n".join(mine)


# kill, and disks


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_nothing_acknowledged_is_lost(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    process = child(tmp_path / "spool", 10_000)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(float(rng.uniform(0.0, 0.3)))
    process.send_signal(signal.SIGKILL)
    acknowledged = [0, *map(int, process.stdout.read().split())]
    process.wait()
    spool = Spool(tmp_path / "spool")
    found = numbers(spool)
    assert found[: len(acknowledged)] == acknowledged
    assert len(found) <= len(acknowledged) + 1
    assert spool.count_aside() == 0


def test_a_full_disk_is_said_and_leaves_no_half(small_disk: Callable[..., Path]) -> None:
    disk = small_disk()
    spool = Spool(disk / "spool")
    put(spool, 1)
    with pytest.raises(OSError, match="No space left"):
        spool.put("model", {"weights": bytes(1_000_000)})
    assert [file.name for file in spool.folder.iterdir()] == [spool.files()[0].name]
    spool.check()  # it may become free again
    put(spool, 2)
    assert numbers(spool) == [1, 2]


def test_a_folder_that_cannot_be_written_is_bad_input(small_disk: Callable[..., Path]) -> None:
    disk = small_disk()
    put(Spool(disk / "spool"), 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(
        InputError, match=r"nothing can be written here: Read-only file system \(choose another"
    ) as caught:
        Spool(disk / "spool").check()
    assert "\n" not in str(caught.value)
    assert numbers(Spool(disk / "spool")) == [1]


def test_a_file_in_the_folders_place_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("")
    with pytest.raises(InputError, match="nothing can be written here"):
        Spool(tmp_path / "spool" / "embedded").check()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["put", "done", "restart"])), max_size=25))
def test_any_processes_in_any_order(tmp_path_factory: pytest.TempPathFactory, deeds: list[tuple[int, str]]) -> None:
    """What one process saw waiting comes before what it then writes, and nothing else ever goes."""
    folder = tmp_path_factory.mktemp("any") / "spool"
    spools = [Spool(folder) for _ in range(3)]
    model: list[int] = []
    for n, (k, deed) in enumerate(deeds):
        if deed == "put":
            put(spools[k], n)
            model.append(n)
        elif deed == "restart":
            spools[k] = Spool(folder)
        elif model:
            spools[k].done(spools[k].files()[0])
            model.pop(0)
    assert numbers(spools[0]) == model
