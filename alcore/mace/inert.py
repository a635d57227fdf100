"""MACE ``.model`` files read without running anything that is written in them.

Such a file is a pickle of live modules: TorchScript, Python source of fx graphs (which unpickling hands to ``exec``),
and names of classes to call. An allow-list of those classes would therefore allow everything. So torch's weights-only
reader is given a lifeless stand-in for *every* name it does not know itself: what comes out is a tree of tensors,
numbers and words. From these a model is built anew by mace-torch's own constructors, and it must agree with the file in
the class of every module, in every plain attribute and in the shape and precision of every tensor, or it is not taken.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

with contextlib.redirect_stdout(io.StringIO()):  # it says that an accelerator is missing; and it must come before e3nn
    from mace import modules

from e3nn import o3

KINDS = {"mace.modules.models.MACE": modules.MACE, "mace.modules.models.ScaleShiftMACE": modules.ScaleShiftMACE}
RADIAL = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
TRANSFORMS = {"AgnesiTransform": "Agnesi", "SoftTransform": "Soft"}
GATES = {"torch.nn.functional.silu": "silu", "torch._C._nn.silu": "silu", "torch.abs": "abs", "torch.tanh": "tanh"}
GRAPH = "torch.fx.graph_module.reduce_graph_module"
SWITCHES = ("use_reduced_cg", "use_so3", "use_edge_irreps_first", "use_agnostic_product", "use_last_readout_only")
SINCE_OLD_FILES = "_zeroed"
"""End of the names of flags that files of older mace-torch lack; they follow from the tensors that are there."""

_READING = threading.Lock()
"""torch's list of stand-ins is one for the whole process."""


class NotPlainError(Exception):
    """The file cannot be read as tensors and numbers alone; the text says why."""


class Husk:
    """What stands for an object of a foreign class: how it was made and what it held, never more.

    Attributes:
        kind: full name of the class (or function) it stands for.
        args: what that would have been called with.
        state: what it would have been filled with.
    """

    kind = ""

    def __new__(cls, *args: Any) -> Husk:
        husk = super().__new__(cls)
        husk.args, husk.state = args, {}
        return husk

    def __init__(self, *args: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, Mapping):
            raise NotPlainError(f"{self.kind} holds no named attributes")
        self.state = dict(state)

    @property
    def name(self) -> str:
        """Of the class, without its module."""
        return self.kind.rpartition(".")[2]

    def __getitem__(self, place: str) -> Any:
        """What ``module.place`` would be; ``place`` may have dots. Raises ``NotPlainError`` where there is nothing."""
        found: Any = self
        for part in place.split("."):
            if not isinstance(found, Husk):
                raise NotPlainError(f"{place} is not there")
            tables = [found.state.get(table) or {} for table in ("_parameters", "_buffers", "_modules")]
            table = next((table for table in [found.state, *tables] if part in table), None)
            if table is None:
                raise NotPlainError(f"{found.name} has no {part}")
            found = table[part]
        return found

    def __contains__(self, place: str) -> bool:
        try:
            return self[place] is not None
        except NotPlainError:
            return False

    def children(self) -> dict[str, Husk]:
        """Its modules by name."""
        found = self.state.get("_modules") or {}
        return {str(name): child for name, child in found.items() if isinstance(child, Husk)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its own parameters and buffers."""
        found = {**(self.state.get("_parameters") or {}), **(self.state.get("_buffers") or {})}
        return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}


def rebuild(data: bytes) -> torch.nn.Module:
    """The model of a ``.model`` file, built anew from its tensors and numbers, on the CPU and in its own precision.

    Raises:
        NotPlainError: it is not a MACE energy model that this mace-torch can build, or differs from what it builds.
    """
    tree = read_inert(data)
    if not isinstance(tree, Husk) or tree.kind not in KINDS:
        raise NotPlainError(f"it holds {_article(tree)}, not a MACE energy model of a known make")
    try:
        config = _config(tree)
        dtype = tree["r_max"].dtype
        with _built_in(_precision(tree, dtype)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = KINDS[tree.kind](**config).to(dtype)
        _compare(model, tree, "")
        _fill(model, dict(_all_tensors(tree)))
    except NotPlainError:
        raise
    except Exception as error:  # whatever a foreign file makes of a constructor
        raise NotPlainError(f"no model can be built from its numbers ({type(error).__name__})") from error
    if isinstance(told := tree.state.get("pretraining"), str):  # where a prior of our own comes from
        model.pretraining = told
    return model.eval()


def read_inert(data: bytes) -> Any:
    """What a file of ``torch.save`` holds, ``Husk`` in the place of everything but tensors and plain values.

    Raises:
        NotPlainError: it is no such file, or asks for what the weights-only reader refuses to do.
    """
    try:
        with _READING:
            names = get_unsafe_globals_in_checkpoint(io.BytesIO(data))
            stand_ins: list[Any] = [(type("Stand", (Husk,), {"kind": name}), name) for name in names]
            with safe_globals(stand_ins):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        lines = str(error).replace("\n", " ").split("WeightsUnpickler error: ")[-1].split(". ")
        raise NotPlainError(f"torch's weights-only reader refuses it: {lines[0][:120]}") from error


# --- from the tree to the constructor's arguments ---------------------------------------------------------------------


def _config(tree: Husk) -> dict[str, Any]:
    """Arguments with which mace-torch builds such a model."""
    first, last, readout = tree["interactions.0"], _last(tree["interactions"]), _last(tree["readouts"])
    heads = _plain(tree["heads"]) if "heads" in tree else None
    n_heads = len(heads or [0])
    scalars = 1
    if "hidden_irreps" in readout:
        scalars = max(1, _irreps(readout["hidden_irreps"]).count(o3.Irrep(0, 1)) // n_heads)
    radial, products = tree["radial_embedding"], tree["products.0"]
    config: dict[str, Any] = {
        "r_max": tree["r_max"].item(),
        "num_bessel": int(_plain(radial["out_dim"])),
        "num_polynomial_cutoff": radial["cutoff_fn.p"].item(),
        "max_ell": _plain(tree["spherical_harmonics._lmax"]),
        "interaction_cls": _known(last, modules.interaction_classes),
        "interaction_cls_first": _known(first, modules.interaction_classes),
        "num_interactions": int(tree["num_interactions"]),
        "num_elements": len(tree["atomic_numbers"]),
        "hidden_irreps": _irreps(products["linear.irreps_out"]),
        "edge_irreps": _irreps(tree["edge_irreps"]) if "edge_irreps" in tree else None,
        "MLP_irreps": o3.Irreps(f"{scalars}x0e"),
        "gate": _gate(readout),
        "readout_cls": _known(readout, modules.readout_classes) if "hidden_irreps" in readout else None,
        "atomic_energies": tree["atomic_energies_fn.atomic_energies"].numpy(),
        "avg_num_neighbors": _number(first["avg_num_neighbors"]),
        "atomic_numbers": tree["atomic_numbers"].tolist(),
        "correlation": len(products["symmetric_contractions.contractions.0.weights"].tensors()) + 1,
        "radial_type": _known(radial["bessel_fn"], RADIAL),
        "radial_MLP": _plain(first["conv_tp_weights.hs"])[1:-1],
        "pair_repulsion": "pair_repulsion_fn" in tree,
        "distance_transform": "None",
        "apply_cutoff": bool(_plain(tree["apply_cutoff"])) if "apply_cutoff" in tree else True,
        "heads": heads,
    }
    if "distance_transform" in radial:
        config["distance_transform"] = _known(radial["distance_transform"], TRANSFORMS)
    config |= {switch: bool(_plain(tree[switch])) if switch in tree else False for switch in SWITCHES}
    if config["readout_cls"] is None:
        del config["readout_cls"]
    if "scale_shift" in tree:
        scale = tree["scale_shift"]
        config |= {"atomic_inter_scale": scale["scale"].numpy(), "atomic_inter_shift": scale["shift"].numpy()}
    return config


def _last(container: Husk) -> Husk:
    children = container.children()
    if not children:
        raise NotPlainError("it has no layers")
    return children[str(len(children) - 1)]


def _known(husk: Husk, table: Mapping[str, Any]) -> Any:
    if husk.name not in table or not husk.kind.startswith("mace.modules."):
        raise NotPlainError(f"it has {_article(husk)}, which cannot be built from its name")
    return table[husk.name]


def _gate(readout: Husk) -> Any:
    if "non_linearity" not in readout:
        return None
    act = readout["non_linearity.acts.0"]
    function = act["f"] if isinstance(act, Husk) and "f" in act else act
    kind = getattr(function, "kind", "")
    if kind == "builtins.getattr" and isinstance(function, Husk):  # how torch's own functions are named in a pickle
        kind = f"torch.{function.args[1]}"
    if kind not in GATES:
        raise NotPlainError(f"its gate {kind or function!r} is not known")
    return modules.gate_dict[GATES[kind]]


def _irreps(value: Any) -> o3.Irreps:
    plain = _plain(value)
    return plain if isinstance(plain, o3.Irreps) else o3.Irreps(plain)


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor):
        return float(value.item())
    return float(_plain(value))


def _plain(value: Any) -> Any:
    """Numbers, words, lists and irreps out of husks; a husk that is none of these stays."""
    if isinstance(value, list | tuple):
        return type(value)([_plain(item) for item in value])
    if isinstance(value, Husk):
        if value.kind == "e3nn.o3._irreps.Irreps":
            return o3.Irreps([(int(mul.args[0][0]), tuple(mul.args[0][1].args[0])) for mul in value.args[0]])
        if value.kind in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"):
            code, content = value.args[0].args[0], value.args[1]
            if str(code)[0] in "fiub" and isinstance(content, bytes):  # never objects
                return np.frombuffer(content, np.dtype(code))[0].item()
    return value


# --- what is built must be what the file says -------------------------------------------------------------------------


def _compare(model: torch.nn.Module, husk: Husk, place: str) -> None:
    """Raises:
    NotPlainError: a module is of another class, has other children, or a plain attribute differs.
    """
    where = place or "the model"
    if husk.kind == GRAPH:  # traced from the class it belongs to, which was compared
        return
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if kind != husk.kind:
        raise NotPlainError(f"{where} is {_article(husk)}, where mace-torch builds {kind}")
    for key, theirs in husk.state.items():
        ours = model.__dict__.get(key)
        if key == "training" or key.startswith("__") or not isinstance(ours, bool | int | float | str | o3.Irreps):
            continue
        if isinstance(theirs, torch.Tensor) or not _same(ours, _plain(theirs)):
            raise NotPlainError(f"{key} of {where} is another than mace-torch builds")
    compiled = set(getattr(model, "__codegen__", ()))
    ours_by_name = {name: child for name, child in model.named_children() if name not in compiled}
    theirs_by_name = husk.children()
    if ours_by_name.keys() != theirs_by_name.keys():
        odd = sorted(ours_by_name.keys() ^ theirs_by_name.keys())[0]
        raise NotPlainError(f"{where} has other parts than mace-torch builds ({odd})")
    for name, child in theirs_by_name.items():
        _compare(ours_by_name[name], child, f"{place}.{name}".strip("."))


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and not isinstance(theirs, str | Husk | o3.Irreps | type(None)):
        return bool(np.isclose(ours, float(theirs), rtol=1e-6, atol=0.0))
    return bool(ours == theirs)


def _all_tensors(husk: Husk, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in husk.tensors().items():
        yield f"{place}{name}", tensor
    for name, child in husk.children().items():
        yield from _all_tensors(child, f"{place}{name}.")


def _fill(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises:
    NotPlainError: tensors are missing, too many, or of another shape or precision.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    compiled = tuple(
        f"{name}.{child}.".lstrip(".")
        for name, module in model.named_modules()
        for child in getattr(module, "__codegen__", ())
    )
    for name in own.keys() - tensors.keys():
        if not name.startswith(compiled) and not name.endswith(SINCE_OLD_FILES):
            raise NotPlainError(f"it lacks {name}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape or own[name].dtype != tensor.dtype:
                raise NotPlainError(f"{name} is not what mace-torch expects there")
            own[name].copy_(tensor)


def _precision(tree: Husk, dtype: torch.dtype) -> torch.dtype:
    """In which precision the model was built: constants that survive rounding to float32 were made in float32, and
    those that are built anew must be rounded as those of the file were."""
    constants = [tensor for name, tensor in _all_tensors(tree) if ".U_matrix_" in name]
    single = bool(constants) and all(torch.equal(t.to(torch.float32).to(t.dtype), t) for t in constants)
    return torch.float32 if dtype == torch.float64 and single else dtype


class _built_in:
    """Inside, modules are built in this precision, and torch's generator is left as it was."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before, self._state = torch.get_default_dtype(), torch.get_rng_state()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)
        torch.set_rng_state(self._state)


def _article(value: Any) -> str:
    kind = value.kind if isinstance(value, Husk) else type(value).__name__
    return f"a {kind.removeprefix('builtins.')}"
