"""``al-loop init``: a folder to start from, a commented run file and two end states."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from alcore.errors import InputError
from flows.runfile import config_folder
from flows.settings import CalculatorSettings, PathSettings, RunSettings

RUN_FILE = "run.yaml"
END_STATES = ("POSCAR_initial", "POSCAR_final")
COMMENT_COLUMN = 36
EXAMPLE_FACTORY = "package.module:function"
ONLY_WITH_ASE = ("  factory:", "  path:", "  packages:")
PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_+./-]*")
NOT_WORDS = ("null", "true", "false", "Null", "True", "False", "NULL", "TRUE", "FALSE")
HEAD = """\
# An al-loop run file. Every key stands here with its default, except name, paths and calculator: leave out what you do
# not change. Relative paths start at this folder. `al-loop check` tells what is wrong, `al-loop run` runs it."""


def init_folder(folder: str | Path, calculator: str = "emt") -> Path:
    """Write a run file and an example pair of end states (a vacancy hop in copper).

    Args:
        folder: made if need be.
        calculator: whose settings the run file shows, all of them, commented out.

    Returns:
        The run file.

    Raises:
        InputError: a file is there already, or there is no such calculator.
    """
    folder = Path(folder).expanduser()
    run_file = folder / RUN_FILE
    text = run_file_text(calculator)
    for file in (run_file, *(folder / name for name in END_STATES)):
        if file.exists():
            raise InputError("exists already, nothing was written", where=str(file), mend="give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made: {error.strerror}", where=str(folder), mend="give another folder") from error
    for name in END_STATES:
        shutil.copy(config_folder() / "structures" / "cu_vacancy" / name, folder / name)
    run_file.write_text(text, encoding="utf-8")
    return run_file


def run_file_text(calculator: str) -> str:
    """A run file that names every key, its default, its unit and its meaning.

    Raises:
        InputError: there is no such calculator.
    """
    from calculators.registry import get_calculator

    settings = RunSettings(
        name="cu-vacancy",
        paths=[PathSettings(initial=END_STATES[0], final=END_STATES[1])],
        calculator=CalculatorSettings(name=calculator, factory=EXAMPLE_FACTORY if calculator == "ase" else None),
    )
    own = [] if calculator == "ase" else list(commented(get_calculator(calculator).settings_model, {}))
    lines = [HEAD, ""]
    for line in commented(RunSettings, settings.model_dump()):
        if line.startswith("  settings: {}") and calculator != "ase":
            lines.append(line.replace("{}", "  ", 1) if own else line)
            lines += [f"    # {setting}" for setting in own]
        elif calculator == "ase" or not line.startswith(ONLY_WITH_ASE):
            lines.append(line)
    return "\n".join(lines) + "\n"


def commented(model: type[BaseModel], values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """YAML lines of a settings model: each key with its value (or default) and, as a comment, what it means."""
    for name, field in model.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        value = values.get(name, default)
        meaning = " ".join((field.description or "").split())
        if field.is_required() and name not in values:
            meaning = f"required; {meaning}"
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)), None)
        if inner is None or value is None:
            yield _line(f"{indent}{name}: {_scalar(value)}", meaning)
        elif isinstance(value, list):
            yield _line(f"{indent}{name}:", meaning)
            for item in value:
                first, *rest = commented(inner, item, indent + "    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            yield _line(f"{indent}{name}:", meaning)
            yield from commented(inner, value.model_dump() if isinstance(value, BaseModel) else value, indent + "  ")


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _scalar(value: Any) -> str:
    """A value in YAML's flow style, which is JSON but for plain words."""
    if isinstance(value, str) and PLAIN_WORD.fullmatch(value) and value not in NOT_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _line(text: str, meaning: str) -> str:
    return f"{text:<{COMMENT_COLUMN}} # {meaning}" if meaning else text
