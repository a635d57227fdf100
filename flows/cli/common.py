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
    from storage.store import MongoStore


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
RunName = Annotated[str, typer.Argument(metavar="NAME", help="The run's name.")]
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
def opened_store(mongodb_uri: str | None) -> Iterator[MongoStore]:
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
