"""What `make run` says and returns; the whole of it is `make run` itself."""

from __future__ import annotations

import io
from pathlib import Path
from uuid import UUID

import pytest
from ase import Atoms
from rich.console import Console

from alcore.errors import AlLoopError, InputError
from alcore.types import BarrierEstimate, GenerationRecord, PathRecord, RunRecord, Structure
from flows import quickstart
from storage.memory import MemoryStore


def test_progress_line_states_the_uncertainty_known_after_the_labels() -> None:
    estimate = BarrierEstimate(
        forward_ev=0.3812,
        reverse_ev=0.3812,
        reaction_energy_ev=0.0,
        spline_forward_ev=0.38,
        sigma_ev=0.2,
        sigma_committee_ev=0.1,
        sigma_posterior_ev=0.1,
        saddle_image=4,
    )
    ends = Structure.from_atoms(Atoms("Al"))
    before = PathRecord(path="hop", initial=ends, final=ends, barrier=estimate)
    after = PathRecord(path="hop", initial=ends, final=ends, barrier=estimate, barrier_std_ev=0.012)
    lines = [
        quickstart.progress_line(GenerationRecord(run="quickstart", index=2, paths=paths, n_reference_calls=5))
        for paths in ((PathRecord(path="hop", initial=ends, final=ends),), (before,), (after,))
    ]
    assert lines[0] == "generation 2 · 5 reference calls"
    assert lines[1].endswith("barrier 0.381 ± 0.200 eV")
    assert lines[2].endswith("barrier 0.381 ± 0.012 eV")


@pytest.mark.parametrize(("status", "code"), [("converged", 0), ("budget_spent", 3), ("failed", 1), ("cancelled", 1)])
def test_exit_code_follows_the_run(status: str, code: int, tmp_path: Path) -> None:
    store, out = MemoryStore(), io.StringIO()
    run = RunRecord(name=quickstart.RUN, settings={}, settings_sha256="", status=status, reason="disk full")  # type: ignore[arg-type]
    store.save_run(run)
    assert quickstart.show(Console(file=out), store, tmp_path) == code
    assert ("disk full" in out.getvalue()) == (code == 1)


def test_a_run_that_never_began_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quickstart"):
        quickstart.show(Console(file=io.StringIO()), MemoryStore(), tmp_path)


def test_a_refused_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `al-loop up` the bare name is refused, or nobody answers."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(AlLoopError, match=r"`prefect deployment run al-loop` was refused: .+") as refused:
        quickstart.trigger()
    assert "\n" not in str(refused.value)


def test_the_flow_run_id_is_found_in_what_prefect_prints() -> None:
    said = "Created flow run 'olive-newt'.\n└── UUID: 6f2c1d8a-0a51-4f63-9d5f-8a6c1f5e2b70\n└── Parameters: {}"
    found = quickstart.UUID_PATTERN.search(said)
    assert found
    assert UUID(found.group()) == UUID("6f2c1d8a-0a51-4f63-9d5f-8a6c1f5e2b70")
