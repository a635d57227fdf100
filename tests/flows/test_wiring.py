"""From settings to parts: nothing a user sets is lost on the way, and what cannot work is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

from alcore.errors import CalculatorError, EndpointError, InputError, ModelError
from alcore.identity import label_key, sha256_hex
from alcore.mace.models import build_model, model_elements, save_model_file, weights_sha256
from flows import environment, wiring
from flows.runfile import load_run_file
from flows.settings import ExecutorSettings, ModelSettings, PathSettings
from storage.memory import MemoryStore


def test_every_setting_reaches_the_loop(hop: Any) -> None:
    neb = {"n_images": 5, "climb": False, "fmax_ev_per_ang": 0.04, "spring_ev_per_ang2": 0.7, "interpolation": "linear"}
    stop = {"barrier_tolerance_ev": 0.02, "saddle_fmax_ev_per_ang": 0.06, "max_generations": 3, "max_labels": 9}
    settings = load_run_file(hop.run_file("wired", neb=neb, stop=stop, select={"labels_per_generation": 4}))
    spec = wiring.loop_spec(settings)
    assert {key: getattr(spec.neb, key) for key in neb} == neb
    assert {key: getattr(spec.stop, key) for key in stop} == stop
    assert (spec.run, spec.select.labels_per_generation) == ("wired", 4)


def test_every_setting_reaches_the_trainer(hop: Any) -> None:
    options = {"epochs": 7, "warm_epochs": 3, "learning_rate": 0.004, "force_weight": 2.5}
    model = {"strategy": "naive", "committee": 4, "correction": "none", "options": options}
    settings = load_run_file(hop.run_file("wired", model=model, seed=11))
    trainer = wiring.make_trainer(settings, wiring.make_prior(settings.model, [29], 11), MemoryStore())
    spec = trainer.spec
    assert (spec.strategy, spec.committee, spec.correction, spec.seed) == ("naive", 4, "none", 11)
    assert {key: getattr(spec.train, key) for key in options} == options
    assert (
        spec.prior_name
        == "untrained MACE (seed 11) on an elastic network of the end states, which has seen no reference data"
    )
    assert trainer.untrained


def test_a_pair_is_read_with_what_the_run_file_says_of_it(hop: Any) -> None:
    path = PathSettings(
        name="there",
        initial=str(hop.folder / "initial.extxyz"),
        final=str(hop.folder / "final.extxyz"),
        charge=-1.0,
        magnetic_moments=[0.5] * 9,
        relax_endpoints=False,
        reference_barrier_ev=0.4,
    )
    pair = wiring.read_pair(path, "paths.0")
    assert (pair.name, pair.relax, pair.reference_barrier_ev, pair.images) == ("there", False, 0.4, ())
    for structure in (pair.initial, pair.final):
        assert structure.charge == -1.0
        assert structure.magnetic_moments is not None
        assert structure.magnetic_moments.tolist() == [0.5] * 9
        assert structure.fixed.all(axis=1).sum() == 4


def test_a_whole_band_brings_its_images(hop: Any, tmp_path: Path) -> None:
    first, last = (ase.io.read(hop.folder / f"{name}.extxyz") for name in ("initial", "final"))
    frames = []
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        frames.append(first.copy())
        frames[-1].positions += fraction * (last.positions - first.positions)
    ase.io.write(tmp_path / "band.extxyz", frames)
    pair = wiring.read_pair(PathSettings(band=str(tmp_path / "band.extxyz")), "paths.0")
    assert len(pair.images) == 3
    np.testing.assert_allclose(pair.images[1].positions, frames[2].positions, atol=1e-6)
    frames[-1].symbols[8] = "Au"
    ase.io.write(tmp_path / "band.extxyz", frames)
    with pytest.raises(EndpointError, match=r"^paths\.0 \(hop: band\.extxyz\): the end states differ in composition"):
        wiring.read_pair(PathSettings(band=str(tmp_path / "band.extxyz")), "paths.0")


def test_what_is_missing_is_named_by_its_key(hop: Any, tmp_path: Path) -> None:
    here, gone = str(hop.folder / "initial.extxyz"), str(tmp_path / "gone")
    for path, key in (
        (PathSettings(initial=gone, final=here), "paths.3.initial"),
        (PathSettings(initial=here, final=gone), "paths.3.final"),
        (PathSettings(band=gone), "paths.3.band"),
    ):
        with pytest.raises(InputError) as raised:
            wiring.read_pair(path, "paths.3")
        assert raised.value.where == key


def test_the_calculator_is_asked_about_every_path(hop: Any) -> None:
    iron = ase.io.read(hop.folder / "initial.extxyz")
    iron.symbols[:] = "Fe"
    moved = iron.copy()
    moved.positions[8, 0] += 1.0
    ase.io.write(hop.folder / "iron-0.extxyz", iron)
    ase.io.write(hop.folder / "iron-1.extxyz", moved)
    paths = [
        {"name": "copper", "initial": "initial.extxyz", "final": "final.extxyz"},
        {"name": "iron", "initial": "iron-0.extxyz", "final": "iron-1.extxyz"},
    ]
    settings = load_run_file(hop.run_file("two", paths=paths, calculator={"name": "emt"}))
    pairs = wiring.read_pairs(settings)
    assert wiring.resolve_calculator(settings, pairs[:1]).name == "emt"
    with pytest.raises(CalculatorError, match=r"^path iron: emt does not know Fe"):
        wiring.resolve_calculator(settings, pairs)
    assert wiring.elements(pairs, []) == [26, 29]


def test_the_untrained_prior_is_the_seeds_and_knows_the_elements() -> None:
    one, again, other = (wiring.make_prior(ModelSettings(), [29, 79], seed).model for seed in (3, 3, 4))
    assert model_elements(one) == [29, 79]
    assert weights_sha256(one) == weights_sha256(again) != weights_sha256(other)


@pytest.mark.filterwarnings("ignore:.*loaded with pickle.*")
def test_a_foundation_model_is_named_with_its_content(tmp_path: Path) -> None:
    file = tmp_path / "mine.model"
    model = build_model([29, 79], seed=0)
    torch.save(model, file)
    prior = wiring.make_prior(ModelSettings(foundation=str(file)), [29, 79], seed=7)
    assert not prior.untrained
    assert prior.name == f"foundation model mine.model, sha256 {sha256_hex(file.read_bytes())[:16]}"
    assert weights_sha256(prior.model) == weights_sha256(model)
    fewer = wiring.make_prior(ModelSettings(foundation=str(file)), [29], seed=7)
    assert model_elements(fewer.model) == [29], "what is not there is not carried along"
    assert fewer.name == prior.name
    with pytest.raises(ModelError, match="does not know O, Na"):
        wiring.make_prior(ModelSettings(foundation=str(file)), [8, 11, 29], seed=7)


def test_a_pretrained_model_says_what_it_learned_from(tmp_path: Path) -> None:
    file, model = tmp_path / "student.model", build_model([29], seed=0)
    errors = {"energy_rmse_ev_per_atom": 0.0021, "force_rmse_ev_per_ang": 0.087}
    told = {"n_train": 90, "n_held_out": 10, "note": "metals", "teacher": "chgnet", **errors}
    setattr(model, "pretraining", json.dumps(told))  # noqa: B010
    save_model_file(model, file)
    settings = ModelSettings(foundation=str(file))
    prior = wiring.make_prior(settings, [29], seed=7)
    assert prior.name == (
        f"foundation model student.model, sha256 {sha256_hex(file.read_bytes())[:16]}, pre-trained on 100 structures "
        "(metals) labelled by chgnet; held-out errors 2.1 meV/atom, 87 meV/Å"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert wiring.pick_device("auto") == "cpu"
    with pytest.raises(InputError, match=r"model\.device: there is no CUDA device here \(set device: auto or cpu\)"):
        wiring.make_prior(ModelSettings(device="cuda"), [29], seed=0)


def test_labels_brought_along_are_of_the_runs_theory(hop: Any) -> None:
    frames = []
    for name in ("initial", "final"):
        atoms = ase.io.read(hop.folder / f"{name}.extxyz")
        atoms.calc = EMT()
        atoms.get_forces()
        frames.append(atoms)
    ase.io.write(hop.folder / "mine.extxyz", frames[:1])
    ase.io.write(hop.folder / "more.extxyz", frames[1:])
    settings = load_run_file(hop.run_file("brought", data=["mine.extxyz", "more.extxyz"]))
    pairs = wiring.read_pairs(settings)
    resolved = wiring.resolve_calculator(settings, pairs)
    labels = wiring.read_data(settings, resolved)
    ends = (pairs[0].initial, pairs[0].final)
    # they do not say which calculator made them: learned from, but never taken for a label of the reference
    assert [label.key for label in labels] == [label_key(s, f"{resolved.fingerprint}, unproven") for s in ends]
    assert {label.fingerprint for label in labels} == {resolved.fingerprint}
    assert [label.energy_ev for label in labels] == pytest.approx([a.get_potential_energy() for a in frames])


def test_every_setting_reaches_the_local_executor(hop: Any, tmp_path: Path) -> None:
    executor = {"workers": 3, "max_running": 2, "timeout_s": 12.5, "retries": 1, "threads": 4, "memory_gb": 1.5}
    settings = load_run_file(hop.run_file("wired", executor=executor, calculator={"name": "emt"}))
    resolved = wiring.resolve_calculator(settings, [])
    labeler = wiring.make_labeler(settings, resolved, MemoryStore(), tmp_path)
    inner: Any = labeler._labeler
    pool = inner._pool
    assert (labeler.limit, labeler.pool, labeler._run) == (2, f"local-{environment.host()}", "wired")
    assert (inner._workers, pool._n_slots, pool._threads, pool._memory_gb) == (3, 3, 4, 1.5)
    assert (inner._limits.timeout_s, inner._limits.retries) == (12.5, 1)
    assert inner._folder == tmp_path / "calculations" / "wired"
    assert (labeler.name, labeler.fingerprint) == ("emt", resolved.fingerprint)
    labeler.close()


def test_every_setting_reaches_the_queue() -> None:
    executor = ExecutorSettings(
        kind="pyiron",
        queue="slurm",
        cores=8,
        threads=2,
        memory_gb=16.0,
        walltime="1-12:00:00",
        partition="long",
        modules=["vasp/6.4.2"],
        prologue=["ulimit -s unlimited"],
        submit_options=["--account=abc"],
    )
    queue, resources = wiring._jobs(executor)
    assert queue is not None
    assert (queue.system, queue.walltime_s, queue.partition) == ("slurm", 36 * 3600, "long")
    assert queue.submit_options == ("--account=abc",)
    assert (resources.cores, resources.threads, resources.memory_gb) == (8, 2, 16.0)
    assert (resources.modules, resources.prologue) == (("vasp/6.4.2",), ("ulimit -s unlimited",))


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({}, 8),
        ({"threads": 3}, 2),
        ({"threads": 20}, 1),
        ({"threads": 4, "max_running": 5}, 5),
        ({"kind": "pyiron", "cores": 4, "threads": 2}, 2),
        ({"kind": "pyiron", "queue": "slurm", "walltime": "1:00:00", "cores": 64}, 1000),
        ({"kind": "pyiron", "queue": "slurm", "walltime": "1:00:00", "max_running": 7}, 7),
    ],
)
def test_labels_of_all_runs_share_a_machine_or_a_queue(
    values: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cores", lambda: 8)
    pool = "queue-slurm" if values.get("queue") else f"local-{environment.host()}"
    assert wiring.label_pool(ExecutorSettings(**values)) == (pool, limit)


def test_every_element_of_the_run_needs_its_isolated_atom() -> None:
    model = build_model([29, 79], seed=0)
    wiring.check_e0s(None, model)
    wiring.check_e0s({"Cu": -1.0, "Au": -2.0, "Pt": -3.0}, model)
    with pytest.raises(InputError, match="no energy of an isolated atom of Au"):
        wiring.check_e0s({"Cu": -1.0}, model)
    with pytest.raises(InputError, match="no energy of an isolated atom of Cu, Au"):
        wiring.check_e0s({}, model)
