"""What a run that exists was asked, held against what it is asked now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from alcore.errors import InputError
from alcore.identity import geometry_bytes
from alcore.protocols import RecordStore
from alcore.types import EndpointPair, Label, RunRecord, Sitting
from flows.settings import RunSettings, unvouched
from flows.sittings import flat

if TYPE_CHECKING:
    from calculators.base import ResolvedCalculator

MAY_CHANGE = ("name", "stop", "executor", "store")
"""Sections of a run file that may differ when a run goes on; all else would mix two different questions."""
SHOWN = 60
"""Characters of a value in a message."""


def earlier_run(
    settings: RunSettings,
    store: RecordStore,
    pairs: Sequence[EndpointPair],
    resolved: ResolvedCalculator,
    given: Sequence[Label],
) -> RunRecord | None:
    """The run of that name, if there is one and it asked the same question.

    Args:
        settings: of the run as it is asked for now.
        store: where the run may be.
        pairs, resolved, given: what the settings name, read: end states, reference calculator, labels brought along.

    Raises:
        InputError: it was made with other physics: other settings, end states, data or reference calculator; or
            somebody left generations under that name without the run that they are of.
    """
    before = store.load_run(settings.name)
    if before is None:
        _refuse_leftovers(settings.name, store)
        return None
    then, now = flat(_question(_with_defaults(before.settings))), flat(_question(plain_settings(settings)))
    keys = [key for key in [*now, *then] if then.get(key) != now.get(key)]
    changed = [f"{key} was {shown(then.get(key))}, is now {shown(now.get(key))}" for key in dict.fromkeys(keys)]
    generations = store.load_generations(settings.name)
    if generations:
        asked = [(p.path, geometry_bytes(p.initial), geometry_bytes(p.final)) for p in generations[0].paths]
        if asked != [(pair.name, geometry_bytes(pair.initial), geometry_bytes(pair.final)) for pair in pairs]:
            changed.append("the end states' files were others")
        labels = store.load_labels(generations[-1].label_keys[:1]).values()
        same_settings = not any(key.startswith("calculator.") for key in keys)
        if same_settings and any(label.fingerprint != resolved.fingerprint for label in labels):
            changed.append("the calculator's version or files were others")
        elif same_settings and not _same_data(generations[0].kinds, given):
            changed.append("data: the labels in its files were others")
    if changed:
        raise InputError(
            f"the run '{settings.name}' exists with other settings: {'; '.join(changed)}",
            where="name",
            mend="choose another name (--name), or undo the change",
        )
    return before


def _same_data(kinds: Mapping[str, str], given: Sequence[Label]) -> bool:
    """Whether the labels brought along are those of generation 0; one that it asked for as well has that for a kind."""
    brought, now = {key for key, kind in kinds.items() if kind == "data"}, {label.key for label in given}
    return brought <= now <= set(kinds)


def _refuse_leftovers(name: str, store: RecordStore) -> None:
    """Raises:
    InputError: an import that was cut off, or a write that came late, has left what would be gone on with unseen.
    """
    if n := len(store.load_generations(name)):
        raise InputError(
            f"{n} generation{'s' * (n != 1)} of a run '{name}' without its record, left by an import that was cut off",
            where="name",
            mend=f"`al-loop gc --run {name} --yes` removes them, or choose another name (--name)",
        )


def change_lines(sitting: Sitting) -> list[str]:
    """What may change and did when the run went on, a line each."""
    return [f"{key} was {shown(then)}, is now {shown(now)}" for key, (then, now) in sitting.changed.items()]


def shown(value: Any) -> str:
    """A setting's value in a message."""
    text = "not set" if value is None else " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def plain_settings(settings: RunSettings) -> dict[str, Any]:
    """Plain values; where the database lies is no part of the question, and its password none of the answer."""
    values = settings.model_dump(mode="json")
    values["store"] = {"mongodb_uri": None}
    return values


def _question(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that must not differ. Of files the content counts, not where they lie: of end states and data it is
    compared here, a model the trainer knows by its weights, trusted or not."""
    paths = [
        {**path, "initial": None, "final": None, "band": None if path.get("band") is None else "given"}
        for path in values.get("paths", [])
    ]
    asked = {key: value for key, value in unvouched(values).items() if key not in MAY_CHANGE}
    model = asked.get("model", {})
    # The correction is fitted anew from the labels each time.
    asked["model"] = {key: value for key, value in model.items() if key != "correction"}
    if str(model.get("foundation")).endswith(".model"):
        asked["model"]["foundation"] = "a file"
    return asked | {"paths": paths, "data": []}


def _with_defaults(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """A setting that there was not yet when the run began had its default."""
    with suppress(ValidationError):
        return plain_settings(RunSettings.model_validate(stored))
    return stored
