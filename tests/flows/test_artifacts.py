from __future__ import annotations

import asyncio
import base64
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from alcore.types import Band, BarrierEstimate, Decision, GenerationRecord, Label, PathRecord, RunRecord, Structure
from flows import artifacts

N_IMAGES = 7
COORDINATE = np.linspace(0.0, 3.0, N_IMAGES)
ENERGIES = 0.4 * np.sin(np.pi * COORDINATE / 3.0) ** 2
SADDLE = int(ENERGIES.argmax())


def _band() -> Band:
    template = Structure.from_atoms(Atoms("Al2", positions=[[0, 0, 0], [0, 0, 2.5]], cell=[9, 9, 9], pbc=True))
    positions = np.repeat(template.positions[None], N_IMAGES, axis=0)
    positions[:, 1, 0] += COORDINATE
    forces = np.zeros_like(positions)
    forces[:, 1, 0] = -np.gradient(ENERGIES, COORDINATE)
    sigma = 0.05 * ENERGIES
    return Band(
        path="hop",
        template=template,
        positions=positions,
        energies_ev=ENERGIES,
        forces=forces,
        sigma_committee_ev=sigma,
        sigma_posterior_ev=sigma,
        sigma_ev=sigma,
        coordinate_ang=COORDINATE,
        status="converged",
        climbing_image=SADDLE,
        fmax_ev_per_ang=0.02,
        n_steps=30,
    )


BARRIER = BarrierEstimate(
    forward_ev=0.4,
    reverse_ev=0.4,
    reaction_energy_ev=0.0,
    spline_forward_ev=0.401,
    sigma_ev=float("nan"),
    sigma_committee_ev=0.01,
    sigma_posterior_ev=0.02,
    saddle_image=SADDLE,
)
RUN = RunRecord(
    name="al-on-al",
    settings={
        "stop": {"max_generations": 10, "max_labels": 20},
        "paths": [{"name": "hop"}],
        "calculator": {"name": "emt"},
    },
    settings_sha256="0" * 64,
)


def _labels() -> dict[str, Label]:
    band = _band()
    return {
        key: Label(
            key=key,
            structure=band.structure(image),
            status="ok",
            fingerprint="f",
            calculator="emt",
            energy_ev=float(ENERGIES[image]),
            forces=band.forces[image],
        )
        for key, image in (("start", 0), ("end", N_IMAGES - 1), ("top", SADDLE))
    }


def _generations() -> list[GenerationRecord]:
    ends = PathRecord(
        path="hop",
        initial=_band().structure(0),
        final=_band().structure(N_IMAGES - 1),
        label_keys=("start", "end"),
        initial_label="start",
        final_label="end",
    )
    probed = replace(
        ends,
        band=_band(),
        barrier=BARRIER,
        label_keys=("top",),
        saddle_key="top",
        verified_barrier_ev=0.395,
        error_to_verified_ev=0.005,
        error_to_reference_ev=float("inf"),
        decision=Decision(stop=False, code="continue", reason="the saddle moved"),
    )
    first = GenerationRecord(run=RUN.name, index=0, paths=(ends,), label_keys=("start", "end"), n_reference_calls=2)
    second = GenerationRecord(
        run=RUN.name,
        index=1,
        paths=(probed,),
        label_keys=("start", "end", "top"),
        n_reference_calls=3,
        calls_by_kind={"saddle": 1},
        seconds={"probe": 1.25, "label": 0.5},
    )
    return [first, second]


def _latest(key: str) -> tuple[Any, int]:
    """The newest version of an artifact, and how many there are."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    async def read() -> tuple[Any, int]:
        async with get_client() as client:
            found = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC
            )
            return (found[0], len(found)) if found else (None, 0)

    return asyncio.run(read())


def test_rows_are_valid_json_without_nan_or_inf() -> None:
    rows = artifacts.generation_rows(_generations())
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["generation"] for row in rows] == [0, 1]
    assert rows[0]["barrier"] == ""
    assert (
        rows[1] | {"barrier": 0.4, "verified barrier": 0.395, "± sigma": "", "error to known": "", "seconds": 1.8}
        == rows[1]
    )
    assert rows[1]["decision"] == "continue: the saddle moved"


def test_progress_is_the_used_share_of_the_tighter_budget_and_100_at_the_end() -> None:
    first, last = _generations()
    assert artifacts.progress(RUN, [first, last]) == pytest.approx(15.0)
    assert artifacts.progress(RUN, [first, *[last] * 5]) == pytest.approx(50.0)
    assert artifacts.progress(RUN, [first, *[last] * 50]) < 100
    stopped = replace(last, decision=Decision(stop=True, code="converged", reason=""))
    assert artifacts.progress(RUN, [first, stopped]) == 100
    assert artifacts.progress(replace(RUN, status="converged"), [first, last]) == 100


def test_progress_of_several_hops_counts_the_turns_of_each() -> None:
    """Ten generations are allowed to each of two; one asked in two of them, the other has yet to wait; then it is
    settled and needs no more."""
    first, last = (replace(generation, n_reference_calls=0) for generation in _generations())
    (ends,), (probed,) = first.paths, last.paths
    waits = replace(probed, path="other", label_keys=())
    both = replace(first, paths=(ends, replace(ends, path="other")))
    turn = replace(last, paths=(probed, waits))
    assert artifacts.progress(RUN, [both, turn, turn]) == pytest.approx(10.0)
    settled = replace(waits, decision=Decision(stop=True, code="converged", reason=""))
    assert artifacts.progress(RUN, [both, turn, replace(turn, paths=(probed, settled))]) == pytest.approx(60.0)


def test_summary_says_the_numbers_that_count() -> None:
    text = artifacts.markdown_summary(RUN, _generations()[-1])
    assert "barrier **0.400 eV** ± unknown, verified by the reference: **0.395 eV**" in text
    assert "Reference calls: 3 (saddle 1); reused: 0." in text
    assert "the end states are being settled" in artifacts.markdown_summary(RUN, _generations()[0])


NAMES = st.text(alphabet="aA1-_.", min_size=1, max_size=8)


@given(NAMES, NAMES)
def test_keys_suit_prefect_and_are_each_runs_own(one: str, other: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", artifacts.artifact_key(one))
    assert (artifacts.artifact_key(one) == artifacts.artifact_key(other)) == (one == other)


def test_publishing_every_generation_makes_versions_of_the_same_artifacts(prefect_api: str) -> None:
    from prefect import flow

    @flow(name="artifacts-test", persist_result=False)
    def run() -> None:
        for n in (1, 2):
            artifacts.publish(RUN, _generations()[:n], _labels())

    run()
    table, n_tables = _latest("al-loop-al-on-al-generations")
    assert n_tables == 2
    assert json.loads(table.data) == artifacts.generation_rows(_generations())
    for name, versions in (("barrier", 2), ("path", 1)):
        image, n_images = _latest(f"al-loop-al-on-al-{name}")
        assert n_images == versions
        head, _, body = image.data.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(body).startswith(b"\x89PNG\r\n")
    summary, n_summaries = _latest("al-loop-al-on-al-summary")
    assert n_summaries == 2
    assert summary.data.startswith("# al-on-al")
    progress, _ = _latest("al-loop-al-on-al-progress")
    assert progress.data == pytest.approx(15.0)


def test_nothing_is_published_before_the_first_generation() -> None:
    artifacts.publish(RUN, [], {})
