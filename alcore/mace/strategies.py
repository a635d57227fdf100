"""How a copy of a MACE learns: all of it, adapters of low rank, the part that is not frozen, or with a second head that
keeps what the starting model knew.

mace-torch does the work: ``inject_lora`` and ``merge_lora_weights`` (Hu et al., ICLR 2022), the modules that its
``--freeze`` takes (Radova et al., npj Comput. Mater. 11, 237 (2025)), ``load_foundations_elements`` and
``remove_pt_head`` (multi-head replay: Batatia et al., J. Chem. Phys. 163, 184110 (2025)). Whatever the strategy, what
comes out has one head and exactly the tensors of what went in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from alcore.errors import TrainingError
from alcore.mace.models import freeze, trainable_copy
from alcore.mace.reshaping import in_precision_of, one_headed, with_heads

Learning = Literal["naive", "scratch", "multihead", "lora", "frozen"]
Part = Literal["embedding", "interactions", "products", "readouts"]
LABELS, REPLAY = "labels", "replay"
"""Names of the two heads while a model learns with replay."""


@dataclass(frozen=True, kw_only=True)
class StrategySpec:
    """What a strategy needs beyond the learning rate; field names as in ``model.options`` of a run file.

    Attributes:
        learning: the strategy. ``scratch`` differs from ``naive`` in where it starts only.
        lora_rank, lora_alpha: of the adapters; the change of a weight is ``lora_alpha / lora_rank`` A·B.
        frozen_layers: parts of the model that keep their weights under ``frozen``.
        replay_weight: of the replay set's mean loss beside that of the labels.
    """

    learning: Learning = "naive"
    lora_rank: int = 4
    lora_alpha: float = 4.0
    frozen_layers: tuple[Part, ...] = ("embedding", "interactions")
    replay_weight: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """A model made ready to learn.

    Attributes:
        model: takes gradients where it may learn.
        replay_head: index of the replay set's head, after that of the labels; None without one.
        finished: makes of ``model`` the frozen model of one head.
        told: what was really done, as plain values.
    """

    model: Any
    replay_head: int | None = None
    finished: Callable[[Any], Any] = freeze
    told: Mapping[str, Any] = field(default_factory=dict)


def learner(model: Any, spec: StrategySpec, seed: int) -> Learner:
    """An independent copy of ``model`` that learns as ``spec`` says.

    Args:
        model: of one head; stays as it is.
        spec: the strategy and its numbers.
        seed: of the adapters' first weights.

    Raises:
        TrainingError: nothing would learn, or the model is none that the strategy can take.
    """
    makers: dict[Learning, Callable[[], Learner]] = {
        "naive": lambda: Learner(model=trainable_copy(model)),
        "scratch": lambda: Learner(model=trainable_copy(model)),
        "lora": lambda: _adapted(model, spec, seed),
        "frozen": lambda: _partly_frozen(model, spec),
        "multihead": lambda: _two_headed(model),
    }
    made = makers[spec.learning]()
    weights = list(made.model.parameters())
    trainable = sum(w.numel() for w in weights if w.requires_grad)
    if not trainable:
        raise TrainingError(f"strategy {spec.learning} leaves no weight of this model to be trained")
    counts = {"strategy": spec.learning, "n_parameters": sum(w.numel() for w in weights), "n_trainable": trainable}
    return replace(made, told={**counts, "heads": list(getattr(made.model, "heads", ["Default"])), **made.told})


def _adapted(model: Any, spec: StrategySpec, seed: int) -> Learner:
    from mace.modules.lora import inject_lora, merge_lora_weights

    twin = trainable_copy(model)
    with in_precision_of(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_lora(twin, rank=spec.lora_rank, alpha=spec.lora_alpha)
    return Learner(
        model=twin,
        finished=lambda trained: freeze(merge_lora_weights(trained)),
        told={"lora_rank": spec.lora_rank, "lora_alpha": spec.lora_alpha},
    )


def _partly_frozen(model: Any, spec: StrategySpec) -> Learner:
    from mace.tools.scripts_utils import freeze_module

    twin = trainable_copy(model)
    parts = {
        "embedding": twin.node_embedding,
        "interactions": twin.interactions,
        "products": twin.products,
        "readouts": twin.readouts,
    }
    for name in spec.frozen_layers:
        freeze_module(parts[name], True)
    return Learner(model=twin, told={"frozen": list(spec.frozen_layers)})


def _two_headed(model: Any) -> Learner:
    """The same energies from two heads; that of the labels alone is left when it has learned."""
    twin = trainable_copy(with_heads(model, (LABELS, REPLAY)))

    def finished(trained: Any) -> Any:
        single = one_headed(trained, LABELS, "model")
        own, like = single.atomic_energies_fn, model.atomic_energies_fn.atomic_energies
        own.atomic_energies = own.atomic_energies.reshape(like.shape)
        single.heads = list(model.heads)
        return single

    return Learner(model=twin, replay_head=1, finished=finished)
