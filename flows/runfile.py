"""Run files: read, override, check all that can be known without computing, and write back.

Every problem is one line, ``run.yaml: paths.0.initial: what is wrong (how to mend it; line 4)``, and all are reported.
"""

from __future__ import annotations

import copy
import difflib
import io
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode

from alcore.errors import CalculatorError, InputError
from flows.settings import FOUNDATION_NAMES, NAME_PATTERN, RunSettings, TrainingOptions

Loc = tuple[str | int, ...]
Hint = Callable[[Loc], str]
M = TypeVar("M", bound=BaseModel)
Report = Callable[[Loc, str, str], None]

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
}


class RunFileErrors(InputError):
    """Everything that is wrong with a run file.

    Args:
        problems: one line each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def config_folder() -> Path:
    """The folder of example run files, in a checkout and in an installed wheel."""
    packaged = Path(__file__).parent / "_config"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "config"


def load_run_file(path: str | Path, overrides: Sequence[str] = (), name: str | None = None) -> RunSettings:
    """Read a run file; relative paths in it (and in ``overrides``) are relative to its folder.

    Args:
        path: a YAML file.
        overrides: ``key.sub=value`` each; the value is YAML, a number steps into a list.
        name: takes the place of the run's name.

    Raises:
        InputError: it cannot be read at all.
        RunFileErrors: it can be read, and this is what is wrong with it.
    """
    where = str(path)
    text = _read_text(Path(path).expanduser())
    data = _parse(text, where)
    problems: list[str] = []
    overridden: list[Loc] = []
    for override in overrides:
        try:
            overridden.append(apply_override(data, override))
        except InputError as error:
            problems.append(str(error))
    if name is not None:
        data["name"] = name
        overridden.append(("name",))
    node = _yaml().compose(text)

    def hint(loc: Loc) -> str:
        if any(loc[: len(key)] == key for key in overridden):
            return "set on the command line"
        return f"line {_line(node, loc)}"

    return _resolve(data, Path(path).expanduser().absolute().parent, where, hint, problems)


def resolve_settings(
    config: str | None = None, settings: Mapping[str, Any] | RunSettings | None = None, name: str | None = None
) -> RunSettings:
    """What a deployment's parameters mean: a run file, the same content as an object, or (neither) the quickstart.

    Raises:
        InputError: both are given, or what is given is wrong (``RunFileErrors``).
    """
    if config is not None and settings is not None:
        raise InputError("config and settings are both given", where="parameters", mend="give at most one of them")
    if settings is None:
        return load_run_file(config or config_folder() / "quickstart.yaml", name=name)
    data = settings.model_dump() if isinstance(settings, RunSettings) else copy.deepcopy(dict(settings))
    store = data.get("store")
    if isinstance(store, dict) and "@" in str(store.get("mongodb_uri")):
        raise InputError(
            "an address with a password is no parameter: Prefect stores parameters and shows them",
            where="settings: store.mongodb_uri",
            mend="set AL_LOOP_MONGODB_URI before `al-loop up`, or write it into a run file and give `config`",
        )
    if name is not None:
        data["name"] = name
    return _resolve(data, Path.cwd(), "settings", lambda _: "", [])


def dump_run_file(settings: RunSettings) -> str:
    """The run file as resolved: every key, absolute paths."""
    return dump_values(settings.model_dump(mode="json"))


def dump_values(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    stream = io.StringIO()
    _yaml().dump(dict(values), stream)
    return stream.getvalue()


def apply_override(data: dict[str, Any], override: str) -> Loc:
    """Set ``key.sub=value`` in ``data`` (in place) and return the key's place.

    Raises:
        InputError: not of that form, the value is not YAML, or the place cannot be reached.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    where = f"--set {key}"
    if not equals or not all(key.split(".")):
        raise InputError(f"{override!r} has not the form key=value", where="--set", mend="e.g. --set neb.n_images=9")
    try:
        value = _yaml().load(text)
    except (YAMLError, ValueError) as error:
        raise InputError(f"{text!r} is not a YAML value", where=where, mend="quote it") from error
    *sections, last = key.split(".")
    node: Any = data
    loc: Loc = ()
    for section in sections:
        index = _index(node, section, where, loc)
        loc = (*loc, index)
        if node[index] is None:
            node[index] = {}
        node = node[index]
    index = _index(node, last, where, loc)
    node[index] = value
    return (*loc, index)


def _index(node: Any, part: str, where: str, loc: Loc) -> Any:
    """The key of ``part`` in ``node``, which holds something there afterwards (None where it was absent)."""
    if isinstance(node, dict):
        node.setdefault(part, None)
        return part
    if not isinstance(node, list):
        place = ".".join(map(str, loc))
        raise InputError(f"{place} is a single value", where=where, mend=f"set {place} itself")
    if not part.isdecimal() or int(part) > len(node):
        raise InputError(f"{part!r} is no place in a list of {len(node)}", where=where, mend="count from 0")
    if int(part) == len(node):
        node.append(None)
    return int(part)


def _resolve(data: dict[str, Any], base: Path, where: str, hint: Hint, problems: list[str]) -> RunSettings:
    """Drop empty sections, make paths absolute, validate; every problem found on the way is raised together."""

    def report(loc: Loc, message: str, mend: str) -> None:
        key = ".".join(str(part) for part in loc if part != "[key]")
        note = "; ".join(part for part in (mend, hint(loc)) if part)
        problems.append(str(InputError(message, where=f"{where}: {key}" if key else where, mend=note)))

    _drop_empty_sections(data)
    for parent, place, loc in _file_entries(data):
        path = base / Path(parent[place]).expanduser()
        if not path.is_file():
            report(loc, f"no such file: {path}", "give an existing file; relative paths start at the run file's folder")
        parent[place] = str(path)
    calculator = data.get("calculator")
    if isinstance(calculator, dict):
        _resolve_calculator(calculator, base, report)
    options = data["model"].get("options", {}) if isinstance(data.get("model"), dict) else {}
    if isinstance(options, dict):
        _validate(TrainingOptions, options, ("model", "options"), report)
    settings = _validate(RunSettings, data, (), report)
    if settings is None or problems:
        raise RunFileErrors(problems)
    return settings


def _validate(model: type[M], values: Any, place: Loc, report: Report, base: Path | None = None) -> M | None:
    """``values`` of the section at ``place`` as ``model``, or None once every problem is reported."""
    try:
        return model.model_validate(values, context={"base": base})
    except ValidationError as error:
        for detail in error.errors():
            report((*place, *detail["loc"]), *_explain(detail, model, place))
        return None


def read_section(model: type[M], values: Mapping[str, Any], place: str) -> M:
    """A section that was put together outside a run file.

    Args:
        model: of the section.
        values: its keys.
        place: the section's name, for messages.
    Raises:
        RunFileErrors: everything that is wrong with it.
    """
    problems: list[str] = []

    def report(loc: Loc, message: str, mend: str) -> None:
        problems.append(str(InputError(message, where=".".join(map(str, loc)), mend=mend)))

    section = _validate(model, dict(values), (place,), report)
    if section is None:
        raise RunFileErrors(problems)
    return section


def _resolve_calculator(calculator: dict[str, Any], base: Path, report: Report) -> None:
    """Check the calculator's name and its own settings, and make the paths among them absolute (in place)."""
    from calculators.registry import get_calculator

    name, settings, path = calculator.get("name"), calculator.get("settings", {}), calculator.get("path", "")
    if name == "ase":
        calculator["path"] = str(base / Path(path or "").expanduser()) if isinstance(path, str | None) else path
        return
    if not isinstance(name, str) or not isinstance(settings, dict):
        return  # RunSettings says so
    try:
        model = get_calculator(name).settings_model
    except CalculatorError as error:
        report(("calculator", "name"), error.message, error.mend)
        return
    checked = _validate(model, settings, ("calculator", "settings"), report, base)
    for key in settings if checked is not None else ():
        if isinstance(value := getattr(checked, key), Path):
            settings[key] = str(value)


def _file_entries(data: Mapping[str, Any]) -> Iterator[tuple[Any, str | int, Loc]]:
    """Every place that names a file, as (container, key in it, place)."""
    paths = data.get("paths")
    for i, path in enumerate(paths if isinstance(paths, list) else []):
        for key in ("initial", "final", "band"):
            if isinstance(path, dict) and isinstance(path.get(key), str):
                yield path, key, ("paths", i, key)
    files = data.get("data")
    for i, file in enumerate(files if isinstance(files, list) else []):
        if isinstance(file, str):
            yield files, i, ("data", i)
    model = data.get("model")
    foundation = model.get("foundation") if isinstance(model, dict) else None
    if isinstance(foundation, str) and foundation.endswith(".model"):
        yield model, "foundation", ("model", "foundation")
    options = model.get("options") if isinstance(model, dict) else None
    if isinstance(options, dict) and isinstance(options.get("replay_file"), str):
        yield options, "replay_file", ("model", "options", "replay_file")


def _drop_empty_sections(data: dict[str, Any]) -> None:
    """A section of which every line is commented out reads as null; it means: the defaults."""
    for section, keys in (
        (data, ("data", "executor", "model", "neb", "select", "stop", "store")),
        (data.get("calculator"), ("settings",)),
        (data.get("model"), ("options",)),
    ):
        for key in keys:
            if isinstance(section, dict) and section.get(key, ...) is None:
                del section[key]


def _explain(detail: ErrorDetails, root: type[BaseModel], place: Loc) -> tuple[str, str]:
    """Message and mend for one of pydantic's errors about the ``root`` that stands at ``place``."""
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    key = ".".join(str(part) for part in (*place, *loc))
    given = "the address" if key == "store.mongodb_uri" else reprlib.repr(detail["input"])  # it may hold a password
    description = _description(loc, root)
    if kind == "extra_forbidden":
        return "unknown key", _suggest_key(loc, root)
    if kind == "missing":
        return "missing", f"add `{loc[-1]}`: {description}"
    if kind == "literal_error":
        return f"{given} is not known", _nearest(str(detail["input"]), re.findall("'([^']+)'", context["expected"]))
    if kind in _WANTED:
        return f"{given} is not {_WANTED[kind]}", description
    if kind == "value_error":
        message, _, mend = str(context["error"]).partition(" (")
        mend = _nearest(detail["input"], FOUNDATION_NAMES) if key == "model.foundation" else mend.removesuffix(")")
        return message, mend
    if kind == "string_pattern_mismatch":
        form = "letters, digits, dots, dashes and underscores" if context["pattern"] == NAME_PATTERN else description
        return f"{given} has not the right form", form
    if detail["msg"].startswith("Input should be "):
        return f"{given} is refused: must be {detail['msg'].removeprefix('Input should be ')}", description
    return f"{given} is refused: {detail['msg']}", description


def _description(loc: Loc, root: type[BaseModel]) -> str:
    """What the settings model says about a key, or ""."""
    fields = _fields_at(loc[:-1], root)
    field = fields.get(str(loc[-1])) if loc else None
    return (field.description or "") if field is not None else ""


def _fields_at(loc: Loc, root: type[BaseModel]) -> dict[str, Any]:
    """The known fields of the section at ``loc``; empty in a free-form section."""
    model: type[BaseModel] | None = root
    for part in loc:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        types = [field.annotation, *get_args(field.annotation)] if field is not None else []
        model = next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)
    return dict(model.model_fields) if model is not None else {}


def _suggest_key(loc: Loc, root: type[BaseModel]) -> str:
    key = str(loc[-1])
    known = list(_fields_at(loc[:-1], root))
    near = _near(key, known)
    if not near:
        sections: list[Loc] = [(), *((name,) for name in root.model_fields)]
        elsewhere = [".".join([*map(str, section), key]) for section in sections if key in _fields_at(section, root)]
        near = elsewhere[0].replace("paths.", "paths.0.") if elsewhere else ""
    return f"did you mean `{near}`?" if near else f"known here: {', '.join(known) or 'none'}"


def _nearest(given: str, known: Sequence[str]) -> str:
    near = _near(given, known)
    return f"did you mean `{near}`?" if near else f"one of {', '.join(known)}"


def _near(given: str, known: Sequence[str]) -> str:
    """The known word nearest to ``given``: misspelt, or without its unit; "" if none is near."""
    close = difflib.get_close_matches(given.lower(), known, n=1)
    longer = [word for word in known if len(given) > 2 and given.lower() in word]
    return (close or longer or [""])[0]


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: 1e-6 is a number, `no` is a word
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 4096
    return yaml


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), mend="`al-loop init DIR` writes one to start from") from None
    except UnicodeDecodeError as error:
        raise InputError("not a text file (UTF-8)", where=str(path), mend="give a YAML run file") from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path), mend="give a YAML run file") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = _yaml().load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise InputError(f"not valid YAML: {error.problem}", where=where, mend=line) from error
    except (YAMLError, ValueError) as error:
        message = f"not valid YAML: {str(error).splitlines()[0]}"
        raise InputError(message, where=where, mend="see the examples in config/") from error
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}, not a mapping (key: value)"
        raise InputError(f"the file is {found}", where=where, mend="`al-loop init DIR` writes one to start from")
    return data


def _line(node: Any, loc: Loc) -> int:
    """Line (from 1) of the key at ``loc``, or of the nearest section around it."""
    line = 0
    for part in loc:
        if isinstance(node, MappingNode):
            entry = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if entry is None:
                break
            line, node = entry[0].start_mark.line, entry[1]
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1
