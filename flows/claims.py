"""A label that anybody computes now is waited for: nobody computes it a second time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from alcore.errors import AlLoopError, StoreUnreachableError
from alcore.protocols import RecordStore
from alcore.state import good_label
from alcore.types import Label
from flows.leases import Held, LeaseKeeper, Waiting, read_owner

LABEL_PREFIX = "label/"


class LabelClaims:
    """``alcore.protocols.Claims``: the lease ``label/<key>`` is held while a label is computed.

    Args:
        keeper: holds the leases.
        store: where labels are.
        stop: ends the waiting; ``BoundedLabeler.closed``.
        log: takes lines for a person.
    """

    def __init__(
        self, keeper: LeaseKeeper, store: RecordStore, *, stop: threading.Event, log: Callable[[str], None]
    ) -> None:
        self._keeper, self._store, self._stop, self._log = keeper, store, stop, log

    @contextmanager
    def claim(self, key: str, *, computed: bool = False) -> Iterator[Label | None]:
        """As ``Claims.claim``. A failure of whoever was waited for is not inherited.

        Raises:
            StoreError: the store refuses; one that does not answer now is waited for.
            AlLoopError: ``stop`` was set meanwhile.
        """
        label, held = self._wait(key, computed)
        try:
            yield label
        finally:
            self._give_back(held)

    def held(self) -> set[str]:
        """Keys of the labels that are being computed now, as far as is known.

        Raises:
            StoreError: the store refuses.
        """
        with suppress(StoreUnreachableError):
            return {name.removeprefix(LABEL_PREFIX) for name in self._keeper.store.held_leases(LABEL_PREFIX)}
        return set()

    def _wait(self, key: str, computed: bool) -> tuple[Label | None, Held | None]:
        """The good label, or the lease, whichever comes first."""
        name = f"{LABEL_PREFIX}{key}"

        def tell(owners: Mapping[str, str]) -> None:
            who = read_owner(owners[name])
            whose = f"by '{who.run}' ({who})" if who is not None else "elsewhere"
            self._log(f"waits for label {key[:6]}: it is being computed {whose}")

        waiting = Waiting(self._keeper, [name], prefix=name, stop=self._stop, tell=tell, log=self._log)
        while not self._stop.is_set():
            held = waiting.turn()
            try:
                label = good_label(self._store.load_labels([key]), key)
            except BaseException as error:
                self._give_back(held)
                if isinstance(error, StoreUnreachableError):
                    continue  # the next turn waits for it
                raise
            if label is not None and not (computed and label.derived_from):
                self._give_back(held)
                return label, None
            if held is not None:
                return None, held
        raise AlLoopError("labelling was stopped: what was waited for is not computed")

    def _give_back(self, held: Held | None) -> None:
        if held is not None:
            self._keeper.give_back(held)
