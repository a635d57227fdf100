"""Model files: none runs what is written in it unasked, and what is read is what was saved."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mace import modules

from alcore.errors import ModelError
from alcore.identity import sha256_hex
from alcore.mace.inert import Husk, NotPlainError, read_inert, rebuild
from alcore.mace.models import build_model, load_foundation, weights_sha256, weights_to_bytes, with_weights
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.trust import Trust, read_list, read_model
from alcore.types import FloatArray, Structure

o3: Any = vars(modules.blocks)["o3"]  # e3nn must not be imported before mace
SILU = torch.nn.functional.silu


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._target,))


class EvilByEval(Evil):
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"open({str(self._target)!r}, 'w')",))


class EvilBySystem(Evil):
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self._target}",))


def saved(model: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer, **options)
    return buffer.getvalue()


def mace(dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    """As mace-torch's training makes them, built and kept in one precision."""
    interactions = modules.interaction_classes
    values: dict[str, Any] = {
        "r_max": 4.5,
        "num_bessel": 6,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": interactions["RealAgnosticResidualInteractionBlock"],
        "interaction_cls_first": interactions["RealAgnosticInteractionBlock"],
        "num_interactions": 2,
        "num_elements": 2,
        "hidden_irreps": o3.Irreps("8x0e+8x1o"),
        "MLP_irreps": o3.Irreps("16x0e"),
        "atomic_energies": np.array([-1.25, -3.5]),
        "avg_num_neighbors": 12.3,
        "atomic_numbers": [13, 29],
        "correlation": 3,
        "gate": SILU,
        "radial_MLP": [16, 16],
        "atomic_inter_scale": 0.8,
        "atomic_inter_shift": 0.1,
    }
    kind = changes.pop("kind", modules.ScaleShiftMACE)
    values |= changes
    if kind is modules.MACE:
        del values["atomic_inter_scale"], values["atomic_inter_shift"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return kind(**values)
    finally:
        torch.set_default_dtype(default)


MAKES: dict[str, Callable[[], torch.nn.Module]] = {
    "of our own": lambda: build_model([13, 29], 1),
    "float64": lambda: mace(torch.float64),
    "float32": lambda: mace(torch.float32),
    "float32, then made float64": lambda: mace(torch.float32).double(),
    "density, Agnesi, pair repulsion": lambda: mace(
        torch.float64,
        interaction_cls=modules.interaction_classes["RealAgnosticDensityResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticDensityInteractionBlock"],
        distance_transform="Agnesi",
        pair_repulsion=True,
    ),
    "two heads": lambda: mace(
        torch.float64,
        heads=["pt_head", "dft"],
        atomic_energies=np.array([[-1.0, -3.0], [-1.5, -3.5]]),
        atomic_inter_scale=[0.8, 0.9],
        atomic_inter_shift=[0.1, 0.2],
        correlation=2,
        hidden_irreps=o3.Irreps("8x0e"),
    ),
    "without scale and shift, one layer": lambda: mace(
        torch.float64, kind=modules.MACE, num_interactions=1, hidden_irreps=o3.Irreps("8x0e"), correlation=2
    ),
    "Gaussians, tanh": lambda: mace(torch.float64, radial_type="gaussian", gate=torch.tanh, correlation=2),
}


@pytest.mark.parametrize("make", MAKES)
def test_what_is_read_is_bit_for_bit_what_was_saved(
    make: str, geometries: dict[str, tuple[Structure, FloatArray]]
) -> None:
    """Weights, the constants that e3nn compiles in, energies and forces; and nothing of the file was run."""
    model = MAKES[make]()
    read = rebuild(saved(model))
    assert weights_sha256(read) == weights_sha256(model)
    template, positions = geometries["crystal"]
    template = template.__class__(
        numbers=np.where(np.arange(len(template)) % 2, 13, 29),
        positions=template.positions,
        cell=template.cell,
        pbc=template.pbc,
        fixed=template.fixed,
    )
    results = [
        MaceSurrogate(prior=m.double().eval().requires_grad_(False)).evaluate(template, positions)
        for m in (model, read)
    ]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert np.ptp(results[0][1]) > 0


def test_files_of_older_versions_lack_some_attributes() -> None:
    model = mace(torch.float64, correlation=2, use_reduced_cg=False)
    for name in ("heads", "apply_cutoff", "use_reduced_cg", "use_so3", "lammps_mliap", "edge_irreps"):
        del model.__dict__[name]
    flags = 0
    for module in model.modules():
        if isinstance(module, modules.symmetric_contraction.Contraction):
            for name in [name for name in module._buffers if name.endswith("_zeroed")]:
                del module._buffers[name]
                flags += 1
    assert flags
    read = rebuild(saved(model)).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "code in the file was run"


@pytest.mark.parametrize("kind", [Evil, EvilByEval, EvilBySystem])
def test_a_malicious_file_runs_nothing_and_is_refused(kind: type[Evil], target: Path, tmp_path: Path) -> None:
    file = tmp_path / "gift.model"
    for data in (saved(kind(target)), saved(kind(target), _use_new_zipfile_serialization=False)):
        file.write_bytes(data)
        with pytest.raises(ModelError) as caught:
            load_foundation(str(file), trust=Trust(listed=tmp_path / "trusted-models.txt"))
        said = str(caught.value)
        words = ("gift.model", sha256_hex(data), "running the code", "trusted-models.txt", "model.foundation_sha256")
        assert [word for word in words if word not in said] == []
        assert "\n" not in said
    file.write_bytes(pickle.dumps(kind(target)))
    with pytest.raises(ModelError, match="refused"):
        load_foundation(str(file))
    with pytest.raises(Exception, match=r"."):  # as stored weights
        with_weights(build_model([29], 0), saved(kind(target)))


def test_a_true_model_with_something_hidden_in_it_runs_nothing(target: Path, lively_model: Any) -> None:
    """In an attribute; in the source of an fx graph, which unpickling would hand to ``exec``; in its TorchScript."""
    lively_model = pickle.loads(pickle.dumps(lively_model))
    clean = saved(lively_model)
    lively_model.souvenir = EvilByEval(target)
    assert weights_sha256(rebuild(saved(lively_model))) == weights_sha256(lively_model)
    source = b"def forward(self"
    with zipfile.ZipFile(io.BytesIO(clean)) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in content if name.endswith("data.pkl"))
    assert source in content[pickled], "the file holds no source, so this test sees nothing"
    evil = f"__import__('pathlib').Path({str(target)!r}).touch()\n".encode()
    at = content[pickled].index(b"import torch", 0)
    content[pickled] = content[pickled].replace(b"import torch", evil[: len(b"import torch")])
    assert content[pickled][at : at + 3] != b"imp"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    rebuild(buffer.getvalue())


def test_what_is_read_is_tensors_and_lifeless_stand_ins(lively_model: Any) -> None:
    tree = read_inert(saved(lively_model))
    assert isinstance(tree, Husk)
    assert tree.kind == "mace.modules.models.ScaleShiftMACE"
    assert isinstance(tree["interactions.0.linear"], Husk)
    assert isinstance(tree["r_max"], torch.Tensor)
    assert "mace.modules.models.ScaleShiftMACE" not in {str(name) for name in torch.serialization.get_safe_globals()}


def test_a_model_that_is_not_as_mace_builds_it_is_not_taken(lively_model: Any) -> None:
    changed = pickle.loads(pickle.dumps(lively_model))
    changed.interactions[0].linear.internal_weights = False
    with pytest.raises(NotPlainError, match=r"internal_weights of interactions\.0\.linear"):
        rebuild(saved(changed))
    changed = pickle.loads(pickle.dumps(lively_model))
    changed.readouts.append(torch.nn.Linear(2, 2))
    with pytest.raises(NotPlainError):
        rebuild(saved(changed))


def test_who_vouches_for_exactly_these_bytes_gets_them_with_a_warning(tmp_path: Path) -> None:
    class_path = tmp_path / "odd.model"
    model = build_model([29], 0)
    model.readouts.append(torch.nn.Linear(2, 2).double())  # no make that is built from its numbers
    data = saved(model)
    class_path.write_bytes(data)
    digest, listed = sha256_hex(data), tmp_path / "trusted-models.txt"
    with pytest.raises(ModelError, match="refused"):
        load_foundation(str(class_path), trust=Trust(listed=listed))
    with pytest.raises(ModelError, match="not the one given"):
        load_foundation(str(class_path), trust=Trust(sha256="0" * 64))
    listed.write_text(f"# mine\n\n{digest.upper()}  made by me\n")
    for trust in (Trust(listed=listed), Trust(sha256=digest)):
        with pytest.warns(UserWarning, match=rf"odd\.model is loaded by running the code inside it.*{digest}") as told:
            loaded = load_foundation(str(class_path), trust=trust)
        assert len(told) == 1
        assert weights_sha256(loaded) == weights_sha256(model)
    class_path.write_bytes(data + b"\0")
    with pytest.raises(ModelError, match="refused"):
        load_foundation(str(class_path), trust=Trust(listed=listed))


def test_a_list_with_a_slip_is_told_by_its_line(tmp_path: Path) -> None:
    assert read_list(tmp_path / "absent") == set()
    (tmp_path / "list").write_text("# a comment\n" + "a" * 63 + " short\n")
    with pytest.raises(ModelError, match=r"list: line 2: is no sha256"):
        read_list(tmp_path / "list")


def test_a_file_that_is_no_archive_is_not_offered_to_be_trusted(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read as a MACE model") as caught:
        read_model(b"hello", "x.model", Trust(), "model.foundation")
    assert "sha256" not in str(caught.value)


def test_names_are_fetched_by_mace_torch_and_read_by_us(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, lively_model: Any
) -> None:
    """The cache of mace-torch stands in for its download."""
    from mace.calculators import foundations_models

    cached = tmp_path / "20231210mace128L0_energy_epoch249model"
    monkeypatch.setattr(foundations_models, "get_cache_dir", lambda: str(tmp_path))
    cached.write_bytes(saved(lively_model))
    assert weights_sha256(load_foundation("small")) == weights_sha256(lively_model)
    cached.write_bytes(saved(Evil(target)))
    with pytest.raises(ModelError, match="refused"):
        load_foundation("small")
    with pytest.raises(ModelError, match="'https:evil' cannot be had"):
        load_foundation("https:evil")


def test_weights_are_read_without_code(lively_model: Any, target: Path) -> None:
    weights = torch.load(io.BytesIO(weights_to_bytes(lively_model)), weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in weights.values())
