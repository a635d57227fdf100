"""Models: what an untrained one knows, and weights that come back as they went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from alcore.errors import ModelError
from alcore.mace.models import (
    build_model,
    check_elements,
    load_foundation,
    model_elements,
    save_model_file,
    trainable_copy,
    weights_sha256,
    weights_to_bytes,
    with_weights,
)
from alcore.mace.surrogate import MaceSurrogate
from alcore.types import FloatArray, Structure


def test_saving_a_model_leaves_it_where_it_is(
    tmp_path: Path, lively_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.nn.Module] = []
    real = torch.nn.Module._apply

    def apply(self: torch.nn.Module, *args: Any, **keywords: Any) -> Any:
        moved.append(self)
        return real(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "_apply", apply)
        save_model_file(lively_model, tmp_path / "mine.model")
    assert moved
    assert not {id(module) for module in moved} & {id(module) for module in lively_model.modules()}
    assert weights_sha256(load_foundation(str(tmp_path / "mine.model"))) == weights_sha256(lively_model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_model_on_the_gpu_stays_there_and_its_file_opens_anywhere(tmp_path: Path) -> None:
    model = build_model([29], 0).to("cuda")
    save_model_file(model, tmp_path / "mine.model")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    saved = torch.load(tmp_path / "mine.model", weights_only=False)
    assert {p.device.type for p in saved.parameters()} == {"cpu"}


def test_an_untrained_model_knows_nothing_but_repulsion() -> None:
    surrogate = MaceSurrogate(prior=build_model([29], 0))
    pair = Structure.from_atoms(Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 1]]))
    far, near, nearer = (pair.moved(np.array([[0, 0, 0], [0, 0, d]])) for d in (2.8, 1.0, 0.5))
    energies = [float(surrogate.evaluate(s, s.positions[None])[0][0]) for s in (far, near, nearer)]
    assert energies[0] == pytest.approx(0.0, abs=1e-6)
    assert 1.0 < energies[1] < energies[2]
    _, forces = surrogate.evaluate(near, near.positions[None])
    assert forces[0, 0, 2] < 0 < forces[0, 1, 2]


def test_one_seed_gives_one_model_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, again, other = (build_model([79, 13, 79], seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert weights_sha256(first) == weights_sha256(again) != weights_sha256(other)
    assert model_elements(first) == [13, 79]


def test_weights_come_back_as_they_went(lively_model: Any, geometries: dict[str, tuple[Structure, FloatArray]]) -> None:
    template, positions = geometries["crystal"]
    fresh = build_model(model_elements(lively_model), 99)
    back = with_weights(fresh, weights_to_bytes(lively_model))
    assert weights_sha256(back) == weights_sha256(lively_model) != weights_sha256(fresh)
    energies, forces = MaceSurrogate(prior=lively_model).evaluate(template, positions)
    energies_back, forces_back = MaceSurrogate(prior=back).evaluate(template, positions)
    np.testing.assert_array_equal(energies_back, energies)
    np.testing.assert_array_equal(forces_back, forces)
    assert not any(p.requires_grad for p in back.parameters())


def test_a_trainable_copy_leaves_the_original_frozen(lively_model: Any) -> None:
    before = weights_sha256(lively_model)
    twin = trainable_copy(lively_model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert weights_sha256(lively_model) == before
    assert all(p.requires_grad for p in twin.parameters())
    assert not any(p.requires_grad for p in lively_model.parameters())


def test_a_missing_element_is_named(lively_model: Any) -> None:
    check_elements(lively_model, [29, 29, 8])
    with pytest.raises(ModelError, match="does not know Sb, Te"):
        check_elements(lively_model, [52, 51, 29])


def test_a_foundation_model_is_read_from_its_file(tmp_path: Path, lively_model: Any) -> None:
    torch.save(lively_model, tmp_path / "mine.model")
    loaded = load_foundation(str(tmp_path / "mine.model"))
    assert weights_sha256(loaded) == weights_sha256(lively_model)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model file"):
        load_foundation(str(tmp_path / "missing.model"))
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(ModelError, match="cannot be read as a MACE model"):
        load_foundation(str(tmp_path / "text.model"))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.model")
    with pytest.raises(ModelError, match="not a MACE energy model"):
        load_foundation(str(tmp_path / "linear.model"))
