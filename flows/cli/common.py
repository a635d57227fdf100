"""What the verbs share: where output goes, options that several take, the opened store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from alcore.errors import InputError

if TYPE_CHECKING:
    from storage.durable import DurableStore


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go: stdout. Errors go to stderr, by ``OneLineErrors``."""

    console: Console
    quiet: bool

    def line(self, text: str) -> None:
        """One line as it is: no markup, no wrapping."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A message that is no result: silent with ``-q``."""
        if not self.quiet:
            self.line(text)


RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]


def checked_name(name: str | None) -> str | None:
    """A name that can be a run's, or none.

    Raises:
        InputError: one that cannot, before it is used in a path or a message.
    """
    from flows.settings import checked_name as checked

    return None if name is None else checked(name)


RunName = Annotated[str, typer.Argument(metavar="NAME", help="The run's name.", callback=checked_name)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. neb.n_images=9; may be repeated."),
]
Mongodb = Annotated[
    str | None,
    typer.Option(metavar="URI", help="Where to look; without it AL_LOOP_MONGODB_URI, or the embedded server."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def opened_store(mongodb_uri: str | None) -> Iterator[DurableStore]:
    """The store at the address, closed in the end.

    Raises:
        StoreError: not an address, or nobody answers there.
    """
    from flows.settings import StoreSettings

    if mongodb_uri is not None and not mongodb_uri.startswith(("mongodb://", "mongodb+srv://")):
        raise InputError("not an address", where="--mongodb-uri", mend="mongodb://host:port")
    from flows.session import open_record_store

    store = open_record_store(StoreSettings(mongodb_uri=mongodb_uri) if mongodb_uri else None)
    try:
        yield store
    finally:
        store.close()


def waiting_lines(mongodb_uri: str | None) -> list[str]:
    """What lies on disk for the database at the address, and for others, for a person; asks no database."""
    from flows import environment
    from storage.durable import spool_folder
    from storage.spool import Spool

    own = spool_folder(mongodb_uri or environment.mongodb_uri_from_env(), environment.data_dir())
    lines = []
    for folder in sorted({own, *own.parent.glob("*/")}, key=lambda folder: (folder != own, folder)):
        spool, which = Spool(folder), "the database" if folder == own else "another database"
        if waiting := spool.count():
            lines.append(f"{waiting} write{'s wait' if waiting != 1 else ' waits'} for {which} on disk in {folder}")
        if aside := spool.count_aside():
            lines.append(f"{aside} write{'s' if aside != 1 else ''} that could not be delivered kept in {folder}")
    return lines
