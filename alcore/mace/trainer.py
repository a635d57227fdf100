"""The MACE trainer: when the committee is fine-tuned, from what, and which surface leads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from alcore.errors import ModelError, TrainingError
from alcore.identity import keys_sha256
from alcore.mace.contacts import anchors
from alcore.mace.fitting import DEFAULT, CorrectionName, make_surrogate, with_correction, without_network
from alcore.mace.models import build_model, weights_sha256, weights_to_bytes, with_weights
from alcore.mace.network import make_networks
from alcore.mace.replay import pseudo_labels
from alcore.mace.sanity import SanitySpec, calm_labels, faults
from alcore.mace.strategies import Learning, StrategySpec
from alcore.mace.surrogate import Lead, MaceSurrogate
from alcore.mace.training import TrainedMember, TrainSpec, fine_tune
from alcore.types import Dataset, FloatArray, GenerationRecord, Label, Residual, Structure

RATTLE_ANG = 0.05
"""Spread of the environments on which descriptors are standardised: about a phonon's."""
FIRST_TRAINING, FIRST_TRAINING_ASKED = 20, 6
"""Labels before which a fine-tune learns nothing the correction does not: where the better surface leads, and where the
committee was asked to."""
GROWTH = 1.3
"""The committee is fine-tuned again when the data set has grown by this factor: total cost stays linear in labels."""
FROM_TRAINED = ("multihead", "lora", "frozen")
"""Strategies that mean nothing over weights that know nothing."""
ROUNDS = 3
"""A member with faults goes on learning, so many times as long in all, before it is given up."""
RECENT = 3
"""Residuals over which two surfaces are compared."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the run file's ``model`` section asks for (``foundation`` already loaded).

    Attributes:
        strategy: ``auto`` fine-tunes as ``naive`` does, and lets the surface lead that predicts better; under the
            others the committee leads. ``scratch`` starts each member from weights of its own; ``multihead``, ``lora``
            and ``frozen`` are ``alcore.mace.strategies``'; ``zero-shot`` never trains.
        committee: members.
        correction: ``none``, ``blr`` (random features), ``gp`` (over the places of atoms) or both, ``blr+gp``.
        train: how long and how hard a member is fine-tuned.
        learn: the numbers of its strategy (``learning`` is set by ``strategy``).
        replay_count: structures that ``multihead`` replays.
        sanity: what a member must pass before it is used.
        seed: of weights, features and bootstrap.
        features_per_element: random features of the correction.
        prior_name: what the prior is, for provenance.
        run: the run's name, likewise.
    """

    strategy: Literal["auto", "zero-shot"] | Learning = "auto"
    committee: int = 3
    correction: CorrectionName = DEFAULT
    train: TrainSpec = TrainSpec()
    learn: StrategySpec = StrategySpec()
    replay_count: int = 32
    sanity: SanitySpec = SanitySpec()
    seed: int = 0
    features_per_element: int = 256
    prior_name: str = ""
    run: str = ""


class MaceTrainer:
    """``alcore.protocols.Trainer`` for MACE.

    Args:
        prior: the starting model, frozen.
        spec: what the run file asks for.
        untrained: True if ``prior`` is fresh from ``build_model``: then each member starts from weights of its own.
        save_model: stores weights and returns their id; None keeps them in memory only.
        load_model: the inverse.
        replay: what ``multihead`` replays, and where that comes from; None for the prior's own energies and forces on
            structures around the labels.

    Raises:
        ModelError: the strategy needs a trained model to start from.
    """

    def __init__(
        self,
        prior: Any,
        spec: ModelSpec,
        *,
        untrained: bool,
        save_model: Callable[[bytes, dict[str, object]], str] | None = None,
        load_model: Callable[[str], bytes] | None = None,
        replay: tuple[Sequence[Label], str] | None = None,
    ) -> None:
        if untrained and spec.strategy in FROM_TRAINED:
            raise ModelError(
                f"strategy {spec.strategy} needs a trained model to start from",
                where="model.foundation",
                mend="name one, or set strategy: auto",
            )
        self.prior, self.spec, self.untrained = prior, spec, untrained
        self._save, self._load, self._replay = save_model, load_model, replay
        self._prior_sha = weights_sha256(prior)

    def start(self, samples: Sequence[Structure], ends: Sequence[Structure] = ()) -> MaceSurrogate:
        """The surrogate that has seen no label; features standardised on rattled ``samples``. Under an untrained
        prior lies the elastic network of the end states."""
        rng = np.random.default_rng([self.spec.seed, 1])
        rattled = [
            s.moved(s.positions + np.where(s.fixed, 0.0, RATTLE_ANG * rng.standard_normal(s.positions.shape)))
            for s in samples
        ]
        surrogate = make_surrogate(
            self.prior,
            rattled,
            rng,
            per_element=self.spec.features_per_element,
            correction=self.spec.correction,
            networks=make_networks(ends) if self.untrained else None,
        )
        notes = {
            "prior": self._prior_sha,
            "prior_name": self.spec.prior_name,
            "strategy": self.spec.strategy,
            "members": [],
            "trained_on": 0,
        }
        return replace(surrogate, notes={**notes, "why": "no labels yet: the prior alone"})

    def due(self, surrogate: MaceSurrogate, dataset: Dataset) -> list[str]:
        """All members at once, each time the data set has grown by ``GROWTH`` since the last fine-tuning."""
        if self.spec.strategy == "zero-shot":
            return []
        last = int(surrogate.notes.get("trained_on", 0))
        first = self.spec.train.first_labels
        if first is None:
            first = FIRST_TRAINING if self.spec.strategy == "auto" else FIRST_TRAINING_ASKED
            first = 2 if self.spec.correction == "none" else first
        if len(dataset) < max(first, int(np.ceil(GROWTH * last))):
            return []
        return [f"member-{k}" for k in range(self.spec.committee)]

    def train_member(self, name: str, surrogate: MaceSurrogate, dataset: Dataset, generation: int) -> TrainedMember:
        """Warm-started from the member's last weights; the first time from the prior, or from weights of its own.

        Raises:
            TrainingError: no usable model came of it.
        """
        k = _place(name)
        warm = bool(surrogate.members)
        if warm:
            model, began_from = surrogate.members[k], str(surrogate.notes["members"][k])
        elif self._fresh:
            seed = self.spec.seed + 1000 * (k + 1)
            model, began_from = build_model([int(z) for z in self.prior.atomic_numbers], seed), f"seed {seed}"
        else:
            model, began_from = self.prior, self._prior_sha
        weights: FloatArray = np.random.default_rng([self.spec.seed, generation, k]).exponential(size=len(dataset))
        # Never below a third: with a handful of labels a member that ignores one is no member.
        weights = np.maximum(weights / weights.mean(), 1 / 3)
        learned = without_network(surrogate, dataset)
        replay, source = self._replayed(learned)
        train = self.spec.train
        epochs = train.warm_epochs if warm else train.fresh_epochs if self._fresh else train.epochs
        before = surrogate.members[k] if warm else None if self._fresh else self.prior
        held = anchors([x.structure for x in calm_labels(learned.labels)], MaceSurrogate(prior=self.prior).evaluate)
        done = 0
        for trial in range(ROUNDS):
            member = fine_tune(
                model,
                learned,
                train,
                weights=weights,
                epochs=epochs,
                strategy=replace(self.spec.learn, learning=self._learning),
                replay=replay,
                anchors=held,
                seed=self.spec.seed + 1000 * (k + 1) + generation + 100_000 * trial,
            )
            model, done = member.model, done + member.epochs
            wrong = self._faults(surrogate, model, learned, before)
            if not wrong:
                break
        told = {**member.told, "epochs": done, **({"replay": source} if source else {})}
        member = replace(member, told=told, faults=tuple(wrong), epochs=done)
        return replace(member, name=name, generation=generation, began_from=began_from)

    @property
    def _fresh(self) -> bool:
        """Whether members begin with weights of their own."""
        return self.untrained or self.spec.strategy == "scratch"

    @property
    def _learning(self) -> Learning:
        return "naive" if self.spec.strategy in ("auto", "zero-shot") else self.spec.strategy  # type: ignore[return-value]

    def _replayed(self, learned: Dataset) -> tuple[Sequence[Label], str]:
        """What the second head is held to, and where that comes from; the same for all members."""
        if self.spec.strategy != "multihead":
            return (), ""
        if self._replay is not None:
            return self._replay
        around = [label.structure for label in learned.labels]
        rng = np.random.default_rng([self.spec.seed, 2])
        return pseudo_labels(
            self.prior, around, self.spec.replay_count, rng
        ), "the starting model's own, around the labels"

    def _faults(self, surrogate: MaceSurrogate, model: Any, learned: Dataset, before: Any | None) -> list[str]:
        whole = None
        if surrogate.networks:
            whole = replace(surrogate, prior=model, members=(), lead="prior", correction=None, known={}).evaluate
        rng = np.random.default_rng([self.spec.seed, 3])
        return faults(model, learned, self.spec.sanity, before=before, rng=rng, backdrop=whole)

    def pack_member(self, member: TrainedMember) -> dict[str, Any]:
        """Weights and what they reached."""
        values = {f.name: getattr(member, f.name) for f in fields(member) if f.name != "model"}
        return {**values, "weights": weights_to_bytes(member.model)}

    def unpack_member(self, packed: Mapping[str, Any]) -> TrainedMember:
        """The member whose weights these are."""
        values = {name: value for name, value in packed.items() if name not in ("weights", "faults")}
        wrong = tuple(packed.get("faults", ()))
        return TrainedMember(model=with_weights(self._skeleton(), packed["weights"]), faults=wrong, **values)

    def finish(
        self,
        surrogate: MaceSurrogate,
        members: Mapping[str, TrainedMember],
        dataset: Dataset,
        residuals: Sequence[Residual],
    ) -> MaceSurrogate:
        """New members in (if any and if sane), lead chosen, correction fitted.

        A member with faults is given up for its predecessor; where there is none, the prior goes on alone.
        """
        refused = ""
        if members:
            ordered = [members[name] for name in sorted(members, key=_place)]
            sane = [not member.faults for member in ordered]
            refused = "; ".join(f"{m.name} given up: {', '.join(m.faults)}" for m in ordered if m.faults)
            told = _told(ordered)
            line = "; ".join(filter(None, (_line(told, len(ordered), len(dataset)), refused)))
            notes = {**surrogate.notes, "trained_on": len(dataset), "train": told, "trained": line}
            if surrogate.members or all(sane):
                olds = surrogate.members or (None,) * len(ordered)
                ids = surrogate.notes["members"] or [""] * len(ordered)
                notes["members"] = [
                    self._keep(m, dataset) if ok else i for m, ok, i in zip(ordered, sane, ids, strict=True)
                ]
                models = tuple(m.model if ok else old for m, ok, old in zip(ordered, sane, olds, strict=True))
                surrogate = replace(surrogate, members=models)
            surrogate = replace(surrogate, notes=notes)
        lead, why = self.choose_lead(bool(surrogate.members), residuals)
        why = "; ".join(filter(None, (why, refused)))
        surrogate = replace(surrogate, lead=lead, notes={**surrogate.notes, "why": why})
        return with_correction(surrogate, dataset, self.spec.correction)

    def choose_lead(self, has_members: bool, residuals: Sequence[Residual]) -> tuple[Lead, str]:
        """The surface with the smaller mean |error| on the last labels, each predicted before it was trained on
        (prequential: Dawid, J. R. Stat. Soc. A 147, 278 (1984)), and the reason in words."""
        if not has_members:
            return "prior", "the frozen prior with its correction: no committee yet"
        if self.spec.strategy != "auto":
            return "committee", f"strategy {self.spec.strategy} was asked for"
        both = [r for r in residuals if {"prior", "committee"} <= set(r.by_lead_ev)][-RECENT:]
        if not both:
            return "prior", "the committee has not predicted a label yet"
        error = {
            lead: float(np.mean([abs(r.by_lead_ev[lead] - r.labelled_ev) for r in both]))
            for lead in ("prior", "committee")
        }
        lead: Lead = "committee" if error["committee"] < error["prior"] else "prior"
        theirs, prior = 1e3 * error["committee"], 1e3 * error["prior"]
        n = len(both)
        return (
            lead,
            f"last {n} labels predicted within {theirs:.0f} meV by the committee, {prior:.0f} by the frozen prior",
        )

    def restore(
        self, start: MaceSurrogate, record: GenerationRecord, dataset: Dataset, residuals: Sequence[Residual]
    ) -> MaceSurrogate:
        """The surrogate as it stood after ``record``: members by their ids, the correction fitted anew."""
        made_with = record.surrogate.get("prior")
        if made_with != self._prior_sha:
            raise ModelError(
                f"the run was begun with another starting model ({str(made_with)[:12]}, now {self._prior_sha[:12]})",
                where="model.foundation",
                mend="give the same model, or another name to the run",
            )
        ids = [str(i) for i in record.surrogate.get("members", [])]
        if ids and self._load is None:
            raise TrainingError("the committee cannot be restored without a model store")
        members = tuple(with_weights(self._skeleton(), self._load(i)) for i in ids) if self._load else ()
        keep = ("strategy", "members", "trained_on", "train", "trained", "why")
        notes = {**start.notes, **{k: record.surrogate[k] for k in keep if k in record.surrogate}}
        lead: Lead = "committee" if record.surrogate.get("lead") == "committee" else "prior"
        return with_correction(replace(start, members=members, lead=lead, notes=notes), dataset, self.spec.correction)

    def _skeleton(self) -> Any:
        return build_model([int(z) for z in self.prior.atomic_numbers], 0) if self._fresh else self.prior

    def _keep(self, member: TrainedMember, dataset: Dataset) -> str:
        """Stores the weights with what made them; returns their id."""
        if self._save is None:
            return weights_sha256(member.model)
        made: dict[str, object] = {f.name: getattr(member, f.name) for f in fields(member) if f.name != "model"}
        made |= {"kind": "member", "run": self.spec.run, "seed": self.spec.seed, "strategy": self.spec.strategy}
        made |= {"prior": self._prior_sha, "prior_name": self.spec.prior_name}
        made |= {"n_labels": len(dataset), "labels_sha256": keys_sha256([label.key for label in dataset.labels])}
        return self._save(weights_to_bytes(member.model), made)


def _told(members: Sequence[TrainedMember]) -> dict[str, Any]:
    """What a training did, for the record: the same for all members, but for errors, of which the worst is told."""
    return {
        **members[0].told,
        "epochs": max(m.epochs for m in members),
        "learning_rate": members[0].learning_rate,
        "energy_rmse_ev": max(m.energy_rmse_ev for m in members),
        "force_rmse_ev_per_ang": max(m.force_rmse_ev_per_ang for m in members),
        "faults": {m.name: list(m.faults) for m in members if m.faults},
    }


def _line(told: Mapping[str, Any], n_members: int, n_labels: int) -> str:
    """What was done, in one line for a person."""
    parts = [f"trained {n_members} member{'s' * (n_members > 1)} on {n_labels} labels"]
    if "strategy" in told:  # what an earlier al-loop stored does not say
        parts += [f"strategy {told['strategy']}", f"{told['n_trainable']:,} of {told['n_parameters']:,} weights"]
    parts.append(f"{told['epochs']} epochs, learning rate {told['learning_rate']:g}")
    if told.get("n_replay"):
        parts.append(f"{told['n_replay']} structures replayed ({told['replay']})")
    if "frozen" in told:
        parts.append(f"frozen: {', '.join(told['frozen'])}")
    if "lora_rank" in told:
        parts.append(f"adapters of rank {told['lora_rank']}")
    energy, force = 1e3 * told["energy_rmse_ev"], told["force_rmse_ev_per_ang"]
    return ", ".join(parts) + f"; labels within {energy:.0f} meV and {force:.2f} eV/Å"


def _place(name: str) -> int:
    """Index of a member by its name; member 10 comes after member 9."""
    return int(name.removeprefix("member-"))
