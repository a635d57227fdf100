"""Steps that are not done twice: what one found is stored as soon as it is there, and found again after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from alcore.plain import plain_sha256, to_plain
from alcore.protocols import StepName
from alcore.state import Workshop

T = TypeVar("T")


@dataclass(frozen=True)
class Steps:
    """The steps of one unfinished generation.

    Attributes:
        shop: runs and remembers them.
        run: the run's name.
        index: of the generation.
    """

    shop: Workshop
    run: str
    index: int

    def remembered(
        self,
        step: StepName,
        names: Sequence[str],
        work: Callable[[str], T],
        *,
        inputs: Mapping[str, Any],
        unpack: Callable[[Any], T],
        pack: Callable[[T], Any] = to_plain,
    ) -> list[T]:
        """``StepRunner.map``; what an interrupted process had finished with the same ``inputs`` is not done again.

        Args:
            step: which step.
            names: of its parts.
            work: does one.
            inputs: what decides what comes of it, beside the generations before and the run's settings.
            unpack: undoes ``pack``.
            pack: makes a result plain (``alcore.plain``).
        """
        wanted = plain_sha256(inputs)

        def once(name: str) -> T:
            place = f"{step}/{name}"
            kept = self.shop.store.load_step(self.run, self.index, place)
            if kept is not None and kept["inputs"] == wanted:
                self.shop.log(f"{step} of {name} in generation {self.index}: done before the run was stopped")
                return unpack(kept["result"])
            result = work(name)
            self.shop.store.save_step(self.run, self.index, place, {"inputs": wanted, "result": pack(result)})
            return result

        return self.shop.runner.map(step, self.index, names, once)
