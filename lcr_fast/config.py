"""Configuration: frozen dataclasses, validated, with a JSON round trip."""

import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin

from lcr_fast.metrics import parse_reward

Backend = Literal["auto", "reference", "triton", "cpp"]
Update = Literal["jacobi", "search_first", "rec_first"]
CrossMemory = Literal["post_msa", "step_input", "initial"]
_Config = TypeVar("_Config", bound="_JsonConfig")
_MOST_COUNT = 2**31 - 1


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON's pairs; ValueError for a key that is there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return values


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return "a tuple, each entry " + _describe(get_args(kind)[0])
    return {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}[kind]


def _matches(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_matches(v, get_args(kind)[0]) for v in value)
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # an integer may be beyond any float
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


class _JsonConfig:
    """Type checks, ``replace`` and JSON for a frozen dataclass of numbers, names and flags."""

    def _check(self, minimum: Mapping[str, float], maximum: Mapping[str, float]) -> None:
        name = type(self).__name__
        for key, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, key)
            if not _matches(value, kind):
                raise ValueError(f"{name}.{key} must be {_describe(kind)}, got {value!r}")
            if key in minimum and value < minimum[key]:
                raise ValueError(f"{name}.{key} must be at least {minimum[key]}, got {value}")
            # What is counted is laid out in arrays, of which none can be as large.
            most = maximum.get(key, _MOST_COUNT if kind is int else math.inf)
            if kind in (int, float) and value > most:
                raise ValueError(f"{name}.{key} must be at most {most}, got {value}")
            if get_origin(kind) is tuple and max(value, default=0) > _MOST_COUNT:
                raise ValueError(f"{name}.{key} must be at most {_MOST_COUNT} each, got {value}")

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """Build from plain values; an unknown or missing key is a ValueError that names it."""
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{cls.__name__} has no field {key!r}{hint}")
        for key, f in known.items():
            if key not in values and f.default is dataclasses.MISSING:
                raise ValueError(f"{cls.__name__} needs a value for {key!r}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    @classmethod
    def from_json(cls: type[_Config], text: str) -> _Config:
        """Read what :meth:`to_json` wrote."""
        try:
            values = json.loads(text, object_pairs_hook=unique)
        except ValueError as error:
            raise ValueError(f"{cls.__name__}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} must be a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def replace(self: _Config, **changes: Any) -> _Config:
        """Copy with some fields changed; an unknown one is a ValueError."""
        return type(self).from_dict({**self.to_dict(), **changes})


def with_defaults(config: type[_JsonConfig], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Give what was saved before some fields were there, with their defaults, as JSON has them."""
    defaults = {
        f.name: f.default
        for f in dataclasses.fields(config)  # type: ignore[arg-type]
        if f.default is not dataclasses.MISSING
    }
    return {**json.loads(json.dumps(defaults)), **saved}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LCRConfig(_JsonConfig):
    """Shape and switches of an :class:`~lcr_fast.LCRSER`; raises ValueError on a bad value.

    The switches and their meaning stand in :mod:`lcr_fast.reference`. Defaults follow the paper's
    summary where it states a value, the same authors' public systems where it does not, and what
    was measured (docs/learning.md) where a plain reading does not learn from sparse logs: for that
    reading set ``score="mlp"``, ``user_embedding=True``, ``seen_bonus=False``.
    """

    n_items: int = _option(1, "items of the catalogue; ids are 1..n_items")
    n_users: int = _option(0, "users with a vector of their own; others are user 0")
    n_queries: int = _option(0, "distinct queries, for query_encoder=id and query text vectors")
    n_terms: int = _option(0, "distinct query terms, for query_encoder=terms")
    dim: int = _option(64, "width D of every vector")
    n_heads: int = _option(2, "attention heads H; must divide dim")
    n_layers: int = _option(1, "Transformer layers of each encoder")
    ffn_dim: int = _option(0, "hidden width of every FFN; 0 means dim")
    steps: int = _option(3, "latent reasoning steps K; 0 is the dual-encoder base")
    max_search_len: int = _option(30, "most recent searches that are read; 0: none")
    max_rec_len: int = _option(30, "most recent recommendation events that are read")
    max_clicks: int = _option(5, "clicked items read per search")
    max_terms: int = _option(16, "terms read of a query, from its beginning")
    dropout: float = _option(0.2, "dropout on every sublayer's output and in the head")
    query_encoder: Literal["terms", "id"] = _option(
        "terms", "a query's vector: its terms' mean or its id's"
    )
    user_embedding: bool = _option(False, "give the MLP a user vector")
    item_text_dim: int = _option(0, "width of frozen item text vectors; 0 means none")
    query_text_dim: int = _option(0, "width of frozen query text vectors; 0 means none")
    step_ffn: bool = _option(True, "FFN at the end of each reasoning step")
    share_steps: bool = _option(True, "the K steps share one set of weights")
    step_embedding: bool = _option(False, "add a learned vector per step (ReaRec)")
    update: Update = _option("jacobi", "both streams at once, or one after the other")
    cross_memory: CrossMemory = _option(
        "post_msa", "the state of the other stream that cross-attention reads"
    )
    score: Literal["mlp", "dot", "mlp_dot"] = _option(
        "mlp_dot", "head: MLP, dot product, or the sum of both, which starts as the dot product"
    )
    readout: float = _option(
        1.0, "share of h^(K) in what the aggregation reads, from 0 to 1; the rest is h^(0)"
    )
    seen_bonus: bool = _option(
        True, "learned bonuses of candidates among the searches' clicks, among the events read"
    )
    mlp_hidden: tuple[int, ...] = _option((200, 80), "hidden widths of the MLP head")
    backend: Backend = _option("auto", "which implementation the ops use")

    def __post_init__(self) -> None:
        minimum = dict.fromkeys(("n_items", "dim", "n_heads", "n_layers", "max_terms"), 1)
        minimum |= dict.fromkeys(
            (
                "n_users", "n_queries", "n_terms", "ffn_dim", "steps", "max_search_len",
                "max_rec_len", "max_clicks", "dropout", "item_text_dim", "query_text_dim",
                "readout",
            ),
            0,
        )  # fmt: skip
        self._check(minimum, {"dropout": 0.99, "readout": 1.0})
        if self.dim % self.n_heads:
            raise ValueError(
                f"LCRConfig.n_heads must divide dim, got {self.n_heads} heads for dim {self.dim}"
            )
        if not self.mlp_hidden or min(self.mlp_hidden) < 1:
            raise ValueError(
                f"LCRConfig.mlp_hidden must list positive widths, got {list(self.mlp_hidden)}"
            )

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or self.dim

    @property
    def largest_ids(self) -> dict[str, int]:
        """The largest id that each field of a batch may hold, of those that the model looks up."""
        limits = dict.fromkeys(("rec_items", "search_clicks", "candidates"), self.n_items)
        if self.user_embedding:
            limits["user"] = self.n_users
        if self.query_encoder == "id" or self.query_text_dim:
            limits["search_queries"] = self.n_queries
        if self.query_encoder == "terms":
            limits["search_terms"] = self.n_terms
        return limits


@dataclass(frozen=True)
class TrainConfig(_JsonConfig):
    """How to train, in both phases; raises ValueError on a bad value."""

    seed: int = _option(0, "seed of everything random")
    epochs: int = _option(15, "phase 1: most epochs")
    min_updates: int = _option(
        0, "phase 1: as many epochs more as this number of updates takes, where the data is small"
    )
    batch_size: int = _option(256, "phase 1: users in a batch")
    learning_rate: float = _option(3e-3, "phase 1: Adam's learning rate")
    schedule: Literal["constant", "linear"] = _option(
        "linear", "phase 1: learning rate, constant or falling to 0 at the last epoch"
    )
    weight_decay: float = _option(1e-2, "decoupled decay, on dense weights only")
    grad_clip: float = _option(1.0, "largest gradient norm; 0 means no clipping")
    tables: Literal["dense", "rows"] = _option(
        "dense", "update every row of the tables in a step, or those alone that its batch touches"
    )
    workers: int = _option(0, "processes that assemble batches ahead; 0: the trainer, in turn")
    capture: bool = _option(
        False, "on a GPU, replay training steps as a CUDA graph, at full history lengths"
    )
    precision: Literal["float32", "bfloat16"] = _option(
        "float32",
        "dtype of states and item vectors; weights, optimizer and losses stay float32",
    )
    patience: int = _option(
        15, "epochs without a better validation before stopping, once it is above chance"
    )
    valid_metric: str = _option(
        "ndcg@5", "what validation chooses by: hr@k, ndcg@k, mrr, or a sum as for reward"
    )
    select_readout: bool = _option(
        True, "phase 1: choose the model's readout by validation, once the steps are trained"
    )
    rank_loss: Literal["bce", "softmax", "bpr"] = _option(
        "softmax", "ranking loss L_rank: of phase 1, beside TCL, and alone of phase 2's control"
    )
    negatives: Literal["popularity", "uniform", "in_batch"] = _option(
        "popularity", "where sampled negatives come from"
    )
    n_negatives: int = _option(9, "phase 1: sampled negatives a positive")
    align_queries: float = _option(1.0, "phase 1: weight of aligning queries with clicked items")
    align_items: float = _option(0.0, "phase 1: weight of aligning items with the next other ones")
    align_pairs: int = _option(1024, "phase 1: pairs of each kind drawn for an update")
    tcl_weight: float = _option(0.1, "phase 1: weight of the target-aware contrastive loss")
    tcl_margin: float = _option(0.1, "TCL margin m")
    tcl_distance: Literal["l2", "cosine"] = _option("l2", "TCL distance D")
    tcl_detach_negative: bool = _option(False, "no gradient through TCL's negative")
    deep_supervision: float = _option(
        0.0, "phase 1: weight of the ranking losses of h^(0) to h^(K-1), read by the same head"
    )
    deep_weights: Literal["uniform", "rising"] = _option(
        "rising", "phase 1: shares of these K losses, all alike or as 1 : 2 : ... : K"
    )
    distill_kl: float = _option(1.0, "distillation: weight of the KL of the teacher's list")
    distill_states: float = _option(1.0, "distillation: weight of the distance of pooled states")
    distill_temperature: float = _option(1.0, "distillation: temperature of both lists")
    distill_trainable: Literal["all", "histories"] = _option(
        "all", "distillation: train everything, or what reads histories, not items and head"
    )
    rl_epochs: int = _option(2, "phase 2: most epochs")
    rl_epoch_size: int = _option(2048, "phase 2: users drawn for an epoch; 0 means all")
    rl_batch_size: int = _option(64, "phase 2: users in a batch")
    rl_learning_rate: float = _option(1e-4, "phase 2: Adam's learning rate")
    rl_negatives: int = _option(99, "phase 2: fresh negatives a positive")
    n_trajectories: int = _option(8, "phase 2: noisy trajectories N of a user")
    noise_scale: float = _option(0.1, "phase 2: gamma, the scale of the noise on h^(0)")
    reward: str = _option(
        "hr@1", "phase 2: hr@k, ndcg@k, mrr, or a sum of them, 0.5*hr@1+0.5*ndcg@10"
    )
    action: Literal["top1", "sampled", "target"] = _option("top1", "phase 2: the action a_n")
    scale_advantages: bool = _option(
        True, "phase 2: divide a group's advantages by the deviation of its rewards"
    )
    silent_groups: Literal["keep", "mask", "resample"] = _option(
        "keep", "phase 2: keep or mask the KL of users whose trajectories earn alike, or draw anew"
    )
    clip: float = _option(0.2, "phase 2: clipping of the probability ratio")
    kl: Literal["exact", "k3"] = _option("exact", "phase 2: KL to the frozen phase-1 policy")
    kl_weight: float = _option(0.1, "phase 2: weight of that KL")
    temperature: float = _option(1.0, "phase 2: temperature of the policy")
    inner_epochs: int = _option(1, "phase 2: updates on each rollout")
    rl_trainable: Literal["reasoning", "all"] = _option(
        "reasoning", "phase 2: train reasoning and head, or everything"
    )

    def __post_init__(self) -> None:
        minimum = dict.fromkeys(
            (
                "batch_size",
                "align_pairs",
                "n_negatives",
                "rl_batch_size",
                "rl_negatives",
                "n_trajectories",
                "inner_epochs",
            ),
            1,
        )
        minimum |= dict.fromkeys(
            (
                "seed", "epochs", "learning_rate", "weight_decay", "grad_clip", "patience",
                "min_updates", "workers", "align_queries", "align_items", "tcl_weight",
                "tcl_margin", "deep_supervision", "distill_kl", "distill_states",
                "rl_epochs", "rl_epoch_size", "rl_learning_rate", "noise_scale", "clip",
                "kl_weight",
            ),
            0,
        )  # fmt: skip
        self._check(minimum, {"seed": 2**63 - 1})
        for name in ("temperature", "distill_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"TrainConfig.{name} must be positive, got {getattr(self, name)}")
        for name in ("reward", "valid_metric"):
            try:
                parse_reward(getattr(self, name))
            except ValueError as error:
                text = str(error).removeprefix("reward")
                raise ValueError(f"TrainConfig.{name}{text}") from None
