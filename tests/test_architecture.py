"""The layout is a promise: who may import what, how long things may be, and what lies where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("alcore", "calculators", "flows", "storage")
FOLDERS = {*PACKAGES, "config", "tests"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL = 6

STDLIB = sys.stdlib_module_names
# alcore's whole world (e3nn and matscipy, which MACE is built from, count as MACE); its probes may reach for more
ALCORE_MAY_IMPORT = {"alcore", "numpy", "scipy", "ase", "torch", "mace", "e3nn", "matscipy"}
PROBES_MAY_IMPORT = {"sklearn", "phate", "phonopy", "matcalc"}
# package -> the only folder that may import it
AT_HOME_IN = {
    "prefect": "flows",
    "typer": "flows",
    "mongoengine": "storage",
    "pymongo": "storage",
    "gridfs": "storage",
    **dict.fromkeys(
        ("pyiron_base", "pysqa", "tblite", "gpaw", "_gpaw", "dftd3", "pymatgen", "custodian", "fairchem"), "calculators"
    ),
}
FORBIDDEN_NEIGHBOURS = {
    "alcore": {"calculators", "storage", "flows"},
    "calculators": {"storage", "flows"},
    "storage": {"calculators", "flows"},
    "flows": set[str](),
}
HEAVY = {"torch", "mace", "e3nn", "prefect", "mongoengine", "pymongo", "chgnet", "matplotlib"}
HEAVY |= {package for package, home in AT_HOME_IN.items() if home == "calculators"}
# what `al-loop --help`, `check` and the tests of pure code import
LIGHT_MODULES = (
    "alcore.types",
    "alcore.protocols",
    "alcore.identity",
    "alcore.errors",
    "calculators",
    "calculators.registry",
    "storage",
    "flows",
    "flows.cli",
    "flows.settings",
    "flows.runfile",
    "flows.report",
)


def project_files() -> list[Path]:
    """Files under version control, or about to be (not ignored by git); in an unpacked archive, all there are."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        files = [f for name in sorted(FOLDERS) for f in (ROOT / name).rglob("*")] + list(ROOT.glob("*"))
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


@cache
def sources() -> dict[str, ast.Module]:
    """Syntax tree of every Python file of the packages and tests, by its path from the root."""
    files = [file.relative_to(ROOT) for file in project_files() if file.suffix == ".py"]
    return {file.as_posix(): ast.parse((ROOT / file).read_text("utf-8")) for file in files}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """``(full module name, line)`` of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module or "", node.lineno


def imports_of(folder: str) -> list[tuple[str, str]]:
    """``("folder/file.py:line", top-level package imported there)`` for all of ``folder``."""
    return [
        (f"{file}:{line}", module.split(".")[0])
        for file, tree in sources().items()
        if file.startswith(f"{folder}/")
        for module, line in imported(tree)
    ]


def docstring_lines(tree: ast.AST) -> int:
    """Lines that docstrings take anywhere below ``tree``, bare strings under a definition or constant included."""
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return sum((n.end_lineno or n.lineno) - n.lineno + 1 for n in strings if isinstance(n.value.value, str))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the project, with the place where it stands."""
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file}:{node.lineno} {node.name}", node


@pytest.mark.parametrize("folder", PACKAGES)
def test_layers_only_import_downwards(folder: str) -> None:
    found = imports_of(folder)
    assert found, f"{folder} imports nothing, so this test sees nothing"
    forbidden = FORBIDDEN_NEIGHBOURS[folder] | {"tests"}
    assert not [f"{place} imports {package}" for place, package in found if package in forbidden]


def test_alcore_imports_only_science() -> None:
    wrong = [
        f"{place} imports {package}"
        for place, package in imports_of("alcore")
        if package not in ALCORE_MAY_IMPORT | STDLIB
        and not (place.startswith("alcore/probes/") and package in PROBES_MAY_IMPORT)
    ]
    assert not wrong


def test_alcore_starts_no_process_and_reads_neither_environment_nor_wall_clock() -> None:
    assert not [place for place, package in imports_of("alcore") if package in {"subprocess", "datetime"}]
    forbidden = {"os.environ", "os.getenv", "os.system", "time.time"}
    for file, tree in sources().items():
        if file.startswith("alcore/"):
            used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not used & forbidden, file


@pytest.mark.parametrize(("package", "home"), sorted(AT_HOME_IN.items()))
def test_services_are_imported_in_one_folder_only(package: str, home: str) -> None:
    elsewhere = [folder for folder in PACKAGES if folder != home]
    assert not [place for folder in elsewhere for place, name in imports_of(folder) if name == package]


def test_executors_know_nothing_of_calculators() -> None:
    """They run jobs; what a job computes is told to them as an importable function or a command."""
    imports = (
        (f"{file}:{line}", module)
        for file, tree in sources().items()
        if file.startswith("calculators/executors/")
        for module, line in imported(tree)
    )
    known = [(place, module) for place, module in imports if module.startswith("calculators.")]
    assert known, "executors import nothing of each other, so this test sees nothing"
    assert not [(place, module) for place, module in known if not module.startswith("calculators.executors")]


def test_what_starts_at_once_imports_nothing_heavy() -> None:
    program = (
        f"import importlib, sys\nfor name in {LIGHT_MODULES!r}:\n"
        f"    importlib.import_module(name)\n"
        f"    loaded = {HEAVY!r} & set(sys.modules)\n"
        f"    assert not loaded, f'{{name}} imports {{sorted(loaded)}}'\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_files_are_short() -> None:
    """Docstrings are not counted: ``alcore/types.py`` is a vocabulary, mostly prose."""
    lines = {file: (ROOT / file).read_text("utf-8").count("\n") for file in sources()}
    counted = {file: lines[file] - docstring_lines(tree) for file, tree in sources().items()}
    assert not {file: count for file, count in counted.items() if count > MAX_FILE_LINES}


def test_functions_are_short() -> None:
    """Docstrings are not counted, decorators neither."""
    counted = {place: (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node) for place, node in functions()}
    assert not {place: lines for place, lines in counted.items() if lines > MAX_FUNCTION_LINES}


def test_functions_take_few_positional_parameters() -> None:
    def positional(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        names = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args]]
        return len(names) - (names[:1] in (["self"], ["cls"]))

    # the verbs of the command line take their options from typer, which reads them by name
    counted = {p: positional(n) for p, n in functions() if not p.startswith("flows/cli") and not n.decorator_list}
    assert not {place: count for place, count in counted.items() if count > MAX_POSITIONAL}


def test_top_level_holds_what_is_promised() -> None:
    files = [file.relative_to(ROOT) for file in project_files()]
    folders = {file.parts[0] for file in files if len(file.parts) > 1 and not file.parts[0].startswith(".")}
    assert folders == FOLDERS
    loose = {file.name for file in files if len(file.parts) == 1}
    assert {"LICENSE", "Makefile", "README.md", "pyproject.toml"} <= loose
    assert not [name for name in loose if name.endswith((".py", ".cfg", ".ini"))]


def test_config_holds_no_python() -> None:
    assert not [file for file in project_files() if file.is_relative_to(ROOT / "config") and file.suffix == ".py"]


def test_nothing_names_a_machine_or_a_package_index() -> None:
    forbidden = {
        "a folder of somebody's machine": re.compile(r"(?<![\w.}/~-])/(?:home|Users|root|work|workspace)/\w"),
        "an option that names a package index": re.compile(r"(?:index-url|find-links)\s*[= ]\s*['\"]?(?:\w+://|/)"),
        "a package index": re.compile(r"https?://[^\s'\"]*(?:/simple\b|\.whl\b)"),
    }
    found: list[str] = []
    for file in project_files():
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for what, rule in forbidden.items():
            found += [f"{file.relative_to(ROOT)}: {what}: {match.group()}" for match in rule.finditer(text)]
    assert not found


def canonical(requirement: str) -> str:
    """The normalised name at the start of a requirement or pin."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def test_every_dependency_is_pinned_once() -> None:
    lines = (ROOT / "config" / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin)]
    names = [canonical(pin) for pin in pins]
    assert len(names) == len(set(names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert {canonical(name) for name in asked} <= set(names)
