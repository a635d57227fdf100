from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.prefect_plugin import BARE_NAMES, full_name

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("deployment run al-loop", "deployment run al-loop/al-loop"),
        (
            "deployment run al-loop -p config=/a.yaml --watch",
            "deployment run al-loop/al-loop -p config=/a.yaml --watch",
        ),
        ("deployment run -p config=/a.yaml al-loop", "deployment run -p config=/a.yaml al-loop/al-loop"),
        ("deployment run --watch al-loop", "deployment run --watch al-loop/al-loop"),
        ("deployment run migration-benchmark", "deployment run migration-benchmark/migration-benchmark"),
    ],
)
def test_bare_name_becomes_the_full_one(typed: str, understood: str) -> None:
    assert full_name(typed.split()) == understood.split()


@pytest.mark.parametrize(
    "typed",
    [
        "deployment run al-loop/al-loop",
        "deployment run other/al-loop",
        "deployment run al-loops",
        "deployment run other/x --flow-run-name al-loop",
        "deployment run other/x -p al-loop",
        "deployment inspect al-loop",
        "deployment pause al-loop",
        "flow-run ls --flow-name al-loop",
        "worker start --pool al-loop",
        "run deployment al-loop",
        "",
    ],
)
def test_everything_else_stays(typed: str) -> None:
    assert full_name(typed.split()) == typed.split()


@given(st.lists(st.sampled_from(["deployment", "run", "al-loop", "-p", "--watch", "x=1", "other/x"]), max_size=7))
def test_at_most_one_argument_changes_and_only_a_bare_name(arguments: list[str]) -> None:
    rewritten = full_name(arguments)
    changed = [(old, new) for old, new in zip(arguments, rewritten, strict=True) if old != new]
    assert len(changed) <= 1
    assert all(old in BARE_NAMES and new == f"{old}/{old}" for old, new in changed)
    assert not changed or arguments[:2] == ["deployment", "run"]


def test_only_the_prefect_client_is_touched(shell: Shell) -> None:
    code = "import sys; sys.argv[:] = ['tool', 'deployment', 'run', 'al-loop']; import prefect; print(sys.argv[1:])"
    done = shell("-c", code, PREFECT_PLUGINS_ENABLED="true")
    assert done.stdout.strip() == "['deployment', 'run', 'al-loop']", done.stderr


def test_stock_client_refuses_without_plug_ins_and_understands_with_them(services: object, shell: Shell) -> None:
    bare = ("prefect", "deployment", "run", "al-loop", "-p", "config=seen")
    refused = shell(*bare, PREFECT_PLUGINS_ENABLED="false")
    assert refused.returncode != 0
    understood = shell(*bare)
    assert understood.returncode == 0, understood.stderr
    assert "deployment 'al-loop/al-loop'" in understood.stdout
    assert "'config': 'seen'" in understood.stdout
