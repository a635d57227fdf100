"""The dashboard's limit follows the labels that run, and is nothing that a label could wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.session import open_record_store

HERE = Path(__file__).resolve().parent

IN_A_FLOW = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from prefect import flow
import test_bounded as t
from flows.runner import show_slots
from flows.session import open_record_store
slow = t.Slow(Path(sys.argv[2]), Path(sys.argv[3]))
resolved = slow.resolved()

@flow(name="slots", persist_result=False)
def labels():
    labeler = t.make(resolved, open_record_store(None), slow.folder / "flow", pool=sys.argv[4], workers=2, limit=3)
    with show_slots(labeler):
        labeler.label(t.requests(resolved, 2))
        Path(sys.argv[3], "labelled").touch()
    labeler.close()

labels()
"""


def wait_until(happened: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def occupied(name: str) -> tuple[int, int]:
    """Limit and occupied slots, as the dashboard shows them; (0, 0) while there is none."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            found = client.read_global_concurrency_limit_by_name(f"al-loop-labels-{name}")
        except ObjectNotFound:
            return 0, 0
        return found.limit, found.active_slots


@pytest.mark.parametrize("ends", ["by itself", pytest.param("killed", marks=pytest.mark.slow)])
def test_the_dashboard_shows_labels_that_run(prefect_api: str, ends: str, home: Path, tmp_path: Path) -> None:
    """Prefect's lease of a flow that was killed runs out within a minute or two."""
    (tmp_path / "hang").touch()
    (tmp_path / "modules").mkdir()
    pool = f"shown-{ends.replace(' ', '-')}"
    command = [sys.executable, "-c", IN_A_FLOW, str(HERE), str(tmp_path / "modules"), str(tmp_path), pool]
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "PREFECT_API_URL": prefect_api}
    with (
        closing(open_record_store(None)) as store,
        subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as flow,
    ):
        wait_until(lambda: len(list(tmp_path.glob("began-*"))) == 2)
        wait_until(lambda: occupied(pool) == (3, 2))
        assert len(store.held_leases(f"label-slot/{pool}/")) == 2
        if ends == "killed":
            flow.kill()
        else:
            (tmp_path / "hang").unlink()
        _, err = flow.communicate(timeout=60)
    assert (tmp_path / "labelled").exists() == (ends == "by itself"), err
    began = time.monotonic()
    wait_until(lambda: occupied(pool) == (3, 0), limit_s=200)
    print(f"\nfree in the dashboard {time.monotonic() - began:.0f} s after it ended ({ends})")


def test_slots_follow_what_runs(prefect_api: str) -> None:
    from flows.runner import show_slots

    labeler: Any = SimpleNamespace(pool="follows", limit=2, running=0)
    with show_slots(labeler):
        for running, shown in ((1, 1), (2, 2), (0, 0), (5, 2), (1, 1)):  # more than the limit: as many as there are
            labeler.running = running
            wait_until(lambda shown=shown: occupied("follows") == (2, shown))  # type: ignore[misc]
    assert occupied("follows") == (2, 0)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", None])
def test_a_dashboard_that_is_not_there_changes_nothing(url: str | None) -> None:
    from prefect.settings import temporary_settings

    from flows.runner import show_slots

    done = []
    labeler: Any = SimpleNamespace(pool="nowhere", limit=2, running=1)
    with temporary_settings({"api.url": url}), show_slots(labeler):  # type: ignore[dict-item]
        done.append("labelled")
    assert done == ["labelled"]
