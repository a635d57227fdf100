"""What is compared: named changes of the run file's sections ``model``, ``neb``, ``select`` and ``stop``.

A variant says only what differs from the default. Names of fields are those of ``ModelSpec``, ``NebSpec``,
``SelectSpec`` and ``StopSpec``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alcore.mace.training import TrainSpec


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Overrides by section; ``about`` is one line for the table."""

    about: str
    model: Mapping[str, Any] = field(default_factory=dict)
    neb: Mapping[str, Any] = field(default_factory=dict)
    select: Mapping[str, Any] = field(default_factory=dict)
    stop: Mapping[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "default": Variant(about="as a run file without these sections"),
    "zero-shot": Variant(about="never fine-tuned", model={"strategy": "zero-shot"}),
    "naive": Variant(about="fine-tuned, the committee always leads", model={"strategy": "naive"}),
    "multihead": Variant(about="fine-tuned with a second head that replays", model={"strategy": "multihead"}),
    "lora": Variant(about="adapters of low rank fine-tuned", model={"strategy": "lora"}),
    "frozen": Variant(about="embedding and interactions frozen", model={"strategy": "frozen"}),
    "scratch": Variant(about="each member trained from its own weights", model={"strategy": "scratch"}),
    **{
        f"{strategy}-alone": Variant(
            about=f"strategy {strategy} without correction", model={"strategy": strategy, "correction": "none"}
        )
        for strategy in ("scratch", "naive", "multihead", "lora", "frozen")
    },
    "train-early": Variant(
        about="as the default, fine-tuned from 4 labels on", model={"train": TrainSpec(first_labels=4)}
    ),
    "correction-none": Variant(about="committee alone", model={"correction": "none"}),
    "correction-blr": Variant(about="linear on node features", model={"correction": "blr"}),
    "correction-gp": Variant(about="a Gaussian process over the places of the atoms", model={"correction": "gp"}),
    "select-uncertainty": Variant(about="most uncertain image first", select={"strategy": "uncertainty"}),
    "select-barrier-variance": Variant(
        about="the label that tells most about the barrier", select={"strategy": "barrier-variance"}
    ),
    "select-random": Variant(about="any image", select={"strategy": "random"}),
    "batch-2": Variant(about="two labels a generation", select={"labels_per_generation": 2}),
    "no-symmetry": Variant(about="symmetry of the hop not used", neb={"symmetry": False}),
    "images-5": Variant(about="5 images", neb={"n_images": 5}),
    "images-9": Variant(about="9 images", neb={"n_images": 9}),
}

MAX_LABELS = 40
"""A run that has not ended by then has failed."""
