"""What a run that exists was asked, held against what it is asked now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from alcore.errors import InputError
from alcore.identity import geometry_bytes
from alcore.protocols import RecordStore
from alcore.types import EndpointPair, RunRecord, Sitting
from flows.settings import RunSettings
from flows.sittings import flat

if TYPE_CHECKING:
    from calculators.base import ResolvedCalculator

MAY_CHANGE = ("name", "stop", "executor", "store")
"""Sections of a run file that may differ when a run goes on; all else would mix two different questions."""
SHOWN = 60
"""Characters of a value in a message."""


def earlier_run(
    settings: RunSettings, store: RecordStore, pairs: Sequence[EndpointPair], resolved: ResolvedCalculator
) -> RunRecord | None:
    """The run of that name, if there is one and it asked the same question.

    Raises:
        InputError: it was made with other physics: other settings, end states or reference calculator.
    """
    before = store.load_run(settings.name)
    if before is None:
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
    if changed:
        raise InputError(
            f"the run '{settings.name}' exists with other settings: {'; '.join(changed)}",
            where="name",
            mend="choose another name (--name), or undo the change",
        )
    return before


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
    """Settings that must not differ. Of end states the content counts, not where their files lie; that a model file is
    trusted does not make it another one (the trainer knows it by its weights)."""
    paths = [{**path, "initial": None, "final": None} for path in values.get("paths", [])]
    model = {key: value for key, value in values.get("model", {}).items() if key != "foundation_sha256"}
    return {key: value for key, value in values.items() if key not in MAY_CHANGE} | {"paths": paths, "model": model}


def _with_defaults(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """A setting that there was not yet when the run began had its default."""
    with suppress(ValidationError):
        return plain_settings(RunSettings.model_validate(stored))
    return stored
