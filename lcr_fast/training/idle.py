"""Options that were set and act on nothing: which they are, and the words for it.

The one place that knows under which settings a field of a config is not read. A Trainer warns of
its own, a job of those that act on none of its models.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from lcr_fast.config import LCRConfig, TrainConfig

_LOG = logging.getLogger("lcr_fast")
# Fields of phase 2 that its control knows nothing of.
POLICY = (
    "reward", "action", "scale_advantages", "silent_groups", "kl", "kl_weight", "clip",
    "temperature",
)  # fmt: skip
# Fields that phase 1 does not read.
PHASE_2 = (
    *POLICY, "n_trajectories", "noise_scale", "inner_epochs", "rl_epochs", "rl_epoch_size",
    "rl_batch_size", "rl_learning_rate", "rl_negatives", "rl_trainable",
)  # fmt: skip
_DISTILLATION = ("distill_kl", "distill_states", "distill_temperature", "distill_trainable")
_TCL = ("tcl_margin", "tcl_distance", "tcl_detach_negative")
_OF_STEPS = (
    "share_steps", "step_ffn", "step_embedding", "update", "cross_memory", "readout",
    "select_readout", "deep_supervision", "deep_weights", "tcl_weight", *_TCL,
)  # fmt: skip


class Rule(NamedTuple):
    """Fields that are not read where a condition holds."""

    fields: tuple[str, ...]
    why: str
    holds: Callable[[LCRConfig, TrainConfig], bool]


RULES = (
    Rule(("user_embedding", "mlp_hidden"), "score=dot has no MLP", lambda m, t: m.score == "dot"),
    Rule(_OF_STEPS, "steps is 0", lambda m, t: m.steps == 0),
    Rule(("share_steps", "deep_weights"), "steps is 1", lambda m, t: m.steps == 1),
    Rule(
        ("update",),
        "with cross_memory=initial no stream waits for the other",
        lambda m, t: m.cross_memory == "initial",
    ),
    Rule(("max_clicks",), "max_search_len is 0", lambda m, t: m.max_search_len == 0),
    Rule(
        ("query_encoder", "max_terms"),
        "max_search_len and align_queries are 0",
        lambda m, t: m.max_search_len == t.align_queries == 0,
    ),
    Rule(
        ("n_negatives",),
        "negatives=in_batch takes the targets of others",
        lambda m, t: t.negatives == "in_batch",
    ),
    Rule(
        ("tcl_weight", *_TCL),
        "max_search_len or max_rec_len is 0, and one stream has no other to read",
        lambda m, t: m.max_search_len * m.max_rec_len == 0,
    ),
    Rule(_TCL, "tcl_weight is 0", lambda m, t: t.tcl_weight == 0),
    Rule(("deep_weights",), "deep_supervision is 0", lambda m, t: t.deep_supervision == 0),
    Rule(
        ("align_pairs",),
        "align_queries and align_items are 0",
        lambda m, t: t.align_queries == t.align_items == 0,
    ),
    Rule(("distill_temperature",), "distill_kl is 0", lambda m, t: t.distill_kl == 0),
    Rule(("kl",), "kl_weight is 0", lambda m, t: t.kl_weight == 0),
    Rule(
        ("silent_groups",),
        "there is no KL to mask where kl_weight is 0",
        lambda m, t: t.kl_weight == 0 and t.silent_groups == "mask",
    ),
    Rule(
        ("clip",),
        "with inner_epochs=1 no ratio leaves 1",
        lambda m, t: t.inner_epochs == 1,
    ),
)


class Trained(NamedTuple):
    """A model that is to be trained: by what objective, and what is fixed of the configs."""

    objective: str
    fixed: Mapping[str, Any] = {}


def changed(*configs: LCRConfig | TrainConfig) -> list[str]:
    """List the fields that differ from their defaults."""
    return [
        f.name for c in configs for f in dataclasses.fields(c) if getattr(c, f.name) != f.default
    ]


def unread(objective: str) -> tuple[str, ...]:
    """Name the fields of a TrainConfig that an objective leaves to others."""
    of_others = {"distill": PHASE_2, "supervised": PHASE_2, "noisy": POLICY}.get(objective, ())
    return of_others if objective == "distill" else (*of_others, *_DISTILLATION)


def own_options(model: LCRConfig, train: TrainConfig, objective: str) -> list[str]:
    """List what was set for an objective: what differs from the defaults.

    Phases share a TrainConfig, so that what others read is not among them. The options of a model
    count where it is new, which it is in phase 1.
    """
    names = changed(model, train) if objective == "supervised" else changed(train)
    of_phase_2 = objective in ("grpo", "noisy")
    others = unread(objective)
    return [n for n in names if n not in others and (n in PHASE_2 or not of_phase_2)]


def warn_of_idle(
    model: LCRConfig, train: TrainConfig, trained: Iterable[Trained], given: Collection[str]
) -> None:
    """Warn of each option of ``given`` that acts on no model of ``trained``."""
    reasons = []
    for objective, fixed in trained:
        of_model = model.replace(**{n: v for n, v in fixed.items() if hasattr(model, n)})
        of_train = train.replace(**{n: v for n, v in fixed.items() if hasattr(train, n)})
        idle = dict.fromkeys((*fixed, *unread(objective)), "no model that is trained reads it")
        for rule in RULES:
            if rule.holds(of_model, of_train):
                idle |= dict.fromkeys(rule.fields, rule.why)
        reasons.append(idle)
    values = model.to_dict() | train.to_dict()
    for name in given:
        whys = dict.fromkeys(idle.get(name, "") for idle in reasons)
        if "" not in whys:
            _LOG.warning("%s=%s has no effect: %s", name, values[name], "; ".join(whys))
