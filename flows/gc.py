"""``al-loop gc``: what no run needs, shown, and removed if that is asked for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from alcore.errors import InputError
from alcore.types import RunRecord
from flows import environment
from flows.leases import LeaseKeeper, live_runs
from flows.one_process import take_run
from flows.status import load_run
from flows.wiring import run_folder

if TYPE_CHECKING:
    from rich.table import Table

    from storage.durable import DurableStore
    from storage.garbage import Finding
    from storage.store import MongoStore

MIN_AGE_S = 3600.0
"""Nothing younger is touched: it may be on its way to what will refer to it."""
FOLDER_NAME = re.compile(r"([0-9a-f]{16})(-\d+)?")
"""Of a calculation: the beginning of its label's key."""
MB = 1e6

Row = tuple[str, int, float]


def findings(store: MongoStore, data_dir: Path, *, labels: bool = False, min_age_s: float = MIN_AGE_S) -> list[Finding]:
    """What no run needs, a kind a row; nothing is removed before ``Finding.remove`` is called.

    Args:
        store: where the runs are.
        data_dir: where their calculations lie.
        labels: also labels that no run refers to.
        min_age_s: nothing younger is touched, nor what is younger than the sitting of a run that is alive.
    """
    from storage.garbage import Garbage

    since, _ = unfinished_since(store)
    begun = None if since is None else since.astimezone(UTC).replace(tzinfo=None)
    found = store.ask(lambda database: Garbage(database, begun, min_age_s).findings(labels))
    return [*found, _folders(store, data_dir, min_age_s)]


def unfinished_since(store: MongoStore) -> tuple[datetime | None, str]:
    """When the latest sitting of an unfinished run began, and its name: the earliest of all that live or are abandoned.

    What is younger may be about to be referred to by what the run still has to write, or has on disk on its machine.
    """
    open_runs = [run for run in store.list_runs() if run.status == "running" and run.sittings]
    begun = [(since, run.name) for run in open_runs if (since := _time(run.sittings[-1].started or run.started))]
    return min(begun, default=(None, ""))


def _time(text: str) -> datetime | None:
    """None for "", which older databases and other people's exports may hold."""
    with suppress(ValueError):
        time = datetime.fromisoformat(text)
        return time if time.tzinfo else time.replace(tzinfo=UTC)
    return None


def _folders(store: MongoStore, data_dir: Path, min_age_s: float) -> Finding:
    """Of calculations whose label is stored and believed, in runs that are known and that nobody works on."""
    from storage.garbage import Finding

    def unneeded() -> Iterator[Path]:
        alive = live_runs(store)
        for run in store.list_runs():
            if run.name not in alive:
                folders = {f: m[1] for f in _subfolders(run_folder(data_dir, run.name)) if (m := _key_part(f))}
                settled = _settled(store, run.name, set(folders.values()))
                yield from (f for f, part in folders.items() if part in settled and _age_s(f) > min_age_s)

    def remove() -> int:
        gone = list(unneeded())
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
        return len(gone)

    found = list(unneeded())
    size_mb = sum(_size(folder) for folder in found) / MB
    return Finding(kind="folders of finished calculations", count=len(found), size_mb=size_mb, remove=remove)


def _settled(store: MongoStore, run: str, parts: Collection[str]) -> set[str]:
    from storage.queries import settled_labels

    return store.ask(lambda database: settled_labels(database, run, parts))


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir() or folder.is_symlink():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def _key_part(folder: Path) -> re.Match[str] | None:
    return FOLDER_NAME.fullmatch(folder.name)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in [folder, *folder.rglob("*")] if not path.is_symlink())


def _age_s(folder: Path) -> float:
    """Since anything in it was written."""
    return environment.now_s() - max((path.stat().st_mtime for path in _files(folder)), default=0.0)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder) if path.is_file())


def run_findings(store: MongoStore, data_dir: Path, name: str) -> list[Finding]:
    """What goes with a whole run, or with what an import or a delivery that was cut off left of one.

    Raises:
        InputError: there is nothing of that name, or jobs of the run are in a queue.
    """
    from storage.garbage import Finding
    from storage.queries import run_bytes

    run, generations = store.load_run(name), len(store.generation_indices(name))
    steps = len(store.step_places(name))
    if not generations and not steps:
        run = load_run(store, name)
    folder = run_folder(data_dir, name)
    if run is not None:
        _refuse_if_jobs_wait(run, folder)
    count = int(run is not None) + generations or steps

    def remove_run() -> int:
        store.delete_run(name)
        return count

    def remove_folder() -> int:
        shutil.rmtree(folder, ignore_errors=True)
        return 1

    size_mb = _size(folder) / MB if folder.is_dir() else 0.0
    return [
        Finding(
            kind=f"run {name} with its generations",
            count=count,
            size_mb=store.ask(lambda database: run_bytes(database, name)) / MB,
            remove=remove_run,
        ),
        Finding(kind="folder of its calculations", count=int(folder.is_dir()), size_mb=size_mb, remove=remove_folder),
    ]


def _refuse_if_jobs_wait(run: RunRecord, folder: Path) -> None:
    """Raises:
    InputError: jobs that the run has sent to a queue may still write into its folder.
    """
    executor = run.settings.get("executor")
    if not isinstance(executor, Mapping) or executor.get("kind") != "pyiron" or not executor.get("queue"):
        return
    from calculators.job import JOB
    from calculators.outcomes import ERROR, JOBS, OUTCOME

    ended = (OUTCOME, ERROR)
    places = (file.parent for file in (folder / JOBS).glob(f"*/*/{JOB}"))
    if n := sum(not any((place / name).exists() for name in ended) for place in places):
        told = f"{n} job{'s' * (n != 1)} of it in the queue {executor['queue']} may still run"
        raise InputError(told, where=f"run '{run.name}'", mend=f"`al-loop cancel {run.name}` first")


def refuse_if_writes_wait(store: MongoStore | DurableStore) -> None:
    """Raises:
    InputError: writes wait on disk; what they refer to would seem to be of no use.
    """
    if n := getattr(store, "waiting", 0):
        mend = "`al-loop status` delivers them once the database takes writes"
        raise InputError(f"{n} writes wait on disk for the database", where="al-loop gc", mend=mend)


def collect(
    store: MongoStore,
    data_dir: Path,
    *,
    run: str | None = None,
    labels: bool = False,
    yes: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], str]:
    """Looks and, with ``yes``, removes.

    Args:
        store: where the runs are.
        data_dir: where their calculations lie.
        run: this whole run, and nothing else.
        labels: also labels that no run refers to.
        yes: remove what is found.
        log: takes lines for a person.

    Returns:
        Kind, number and MB: of what there is, or of what was removed; and a line about what was left alone, or "".

    Raises:
        InputError: there is no run of that name, or jobs of it are in a queue.
        RunBusyError: somebody works on it.
    """
    if run is not None and labels:
        raise InputError("either --run or --labels", where="al-loop gc", mend="one after the other")
    if run is None:
        found = findings(store, data_dir, labels=labels)
        since, name = unfinished_since(store)
        kept = (
            f"run '{name}' is not finished: nothing younger than {since:%Y-%m-%d %H:%M} was looked at" if since else ""
        )
        return (_done(found, store) if yes else _seen(found)), kept
    with closing(LeaseKeeper(store, run=run)) as keeper:
        take_run(keeper, run, log, mend="wait for it or stop it")
        found = run_findings(store, data_dir, run)
        return (_done(found, store) if yes else _seen(found)), ""


def _seen(found: Sequence[Finding]) -> list[Row]:
    return [(finding.kind, finding.count, finding.size_mb) for finding in found]


def _done(found: Sequence[Finding], store: MongoStore) -> list[Row]:
    """In their order, one after the other."""
    counts = [store.ask(lambda _: finding.remove() if finding.count else 0) for finding in found]  # noqa: B023
    return [(finding.kind, count, finding.size_mb) for finding, count in zip(found, counts, strict=True)]


def gc_table(rows: Sequence[Row], *, removed: bool) -> Table:
    """For a terminal."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("removed" if removed else "what no run needs")
    table.add_column("count", justify="right")
    table.add_column("MB", justify="right")
    for kind, count, size_mb in rows:
        table.add_row(kind, str(count), f"{size_mb:.1f}")
    return table
