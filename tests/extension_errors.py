"""Every error of the C++ operators, as a call that raises it; a script that raises them all.

``python extension_errors.py <the extension>`` prints the sentences as JSON. It needs torch alone,
so that an extension can be tried that is not the installed one.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

F32, I64 = torch.float32, torch.int64
B, L, D, F, N_ITEMS = 2, 3, 8, 12, 6


def zeros(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


IDS = zeros(B, dtype=I64)
SEED = zeros(dtype=I64)


def call(op: str, arguments: dict[str, object], changes: dict[str, object]) -> Any:
    assert not changes.keys() - arguments.keys()
    return getattr(torch.ops.lcr_fast, op)(*(arguments | changes).values())


def noise(**changes: object) -> None:
    arguments = {"rows": zeros(B, dtype=I64), "seed": SEED, "n_trajectories": 1, "stream": 0}
    call("normal_noise", arguments | {"length": L, "dim": D}, changes)


def dropout(**changes: object) -> None:
    arguments = {"rows": zeros(B, dtype=I64), "seed": SEED, "first_site": 0, "n_sites": 1}
    call("dropout_masks", arguments | {"length": L, "dim": D, "threshold": 1}, changes)


def ranking(**changes: object) -> None:
    arguments = {
        "scores": zeros(B, L, N_ITEMS), "target": zeros(B, L, dtype=I64), "relevance": None,
        "counts": None, "excluded": None, "kinds": [0], "ks": [3], "ties": 0, "output": 0,
    }  # fmt: skip
    call("ranking_metrics", arguments, changes)


def catalogue(**changes: object) -> None:
    arguments = {
        "users": zeros(B, D), "items": zeros(N_ITEMS, D), "target": zeros(B, dtype=I64),
        "seen": None, "kinds": [0], "ks": [3], "ties": 0, "output": 0,
    }  # fmt: skip
    call("catalogue_metrics", arguments, changes)


def block(n_attentions: int, ffn_dim: int = F, dim: int = D) -> list[Tensor]:
    attention = ((3 * dim, dim), (3 * dim,), (dim, dim), (dim,))
    ffn = ((ffn_dim, dim), (ffn_dim,), (dim, ffn_dim), (dim,))
    norms = ((n_attentions + 1, dim),) * 2
    return [zeros(1, 2, *shape) for shape in (*attention * n_attentions, *ffn, *norms)]


def reasoning(**changes: object) -> None:
    arguments = {
        "search": zeros(B, L, D), "rec": zeros(B, L, D), "search_lengths": zeros(B, dtype=I64),
        "rec_lengths": zeros(B, dtype=I64), "rows": zeros(B, dtype=I64), "target_keys": zeros(0),
        "weights": block(2), "steps": 1, "n_heads": 2, "n_trajectories": 1, "noise_scale": 0.0,
        "noise_seed": SEED, "dropout_threshold": 0, "dropout_seed": SEED, "save_states": False,
    }  # fmt: skip
    call("cpu_latent_reasoning_fwd", arguments, changes)


def adaptive(**changes: object) -> None:
    arguments = {
        "search": zeros(B, L, D), "rec": zeros(B, L, D), "search_lengths": zeros(B, dtype=I64),
        "rec_lengths": zeros(B, dtype=I64), "weights": block(2), "exit_weight": zeros(2 * D + 2),
        "exit_bias": zeros(1), "steps": 1, "n_heads": 2,
    }  # fmt: skip
    call("cpu_adaptive_reasoning", arguments, changes)


def encode(**changes: object) -> None:
    arguments = {
        "search": zeros(B, L, D), "rec": zeros(B, L, D), "search_lengths": zeros(B, dtype=I64),
        "rec_lengths": zeros(B, dtype=I64), "rows": zeros(B, dtype=I64), "weights": block(1),
        "n_heads": 2, "dropout_threshold": 0, "dropout_seed": SEED,
    }  # fmt: skip
    call("cpu_encode_fwd", arguments, changes)


def scoring_arguments(states: Sequence[int]) -> dict[str, object]:
    return {
        "search": zeros(*states), "rec": zeros(*states), "search_lengths": zeros(B, dtype=I64),
        "rec_lengths": zeros(B, dtype=I64), "items": zeros(N_ITEMS + 1, D),
        "ids": zeros(B, 4, dtype=I64), "user": zeros(0), "target_weight": zeros(2, D, D),
        "mlp_weights": [zeros(5, 3 * D), zeros(1, 5)], "mlp_biases": [zeros(5), zeros(1)],
    }  # fmt: skip


def score(**changes: object) -> None:
    more = {"dropout_rows": zeros(0), "dropout_threshold": 0, "dropout_seed": SEED, "dot": False}
    call("cpu_score_fwd", scoring_arguments((B, 1, L, D)) | more, changes)


def topk(**changes: object) -> None:
    arguments = scoring_arguments((B, L, D))
    del arguments["ids"]
    arguments |= {"k": 3, "exclude": zeros(B, 0, dtype=I64), "dot": False}
    call("cpu_score_topk", arguments, changes)


def rank(**changes: object) -> None:
    arguments = scoring_arguments((B, L, D))
    del arguments["ids"]
    arguments |= {"target": zeros(B, dtype=I64), "bonus": zeros(B)}
    arguments |= {"exclude": zeros(B, 0, dtype=I64), "dot": False}
    call("cpu_score_rank", arguments, changes)


def request_weights(**changes: object) -> Tensor:
    arguments = {"encoder": block(1), "reasoning": block(2), "target_weight": zeros(2, D, D)}
    arguments |= {"mlp_weights": [], "mlp_biases": [], "n_heads": 2, "pairs": False}
    return call("cpu_request_weights", arguments, changes)


def request_items(**changes: object) -> Tensor:
    arguments = {"items": zeros(N_ITEMS + 1, D), "weight": zeros(5, 3 * D), "pairs": True}
    return call("cpu_request_items", arguments, changes)


def request(**changes: object) -> None:
    ids = {"user": zeros(B, dtype=I64), "rec_items": zeros(B, L, dtype=I64)}
    ids |= {"rec_lengths": IDS, "search_queries": zeros(B, L, dtype=I64)}
    ids |= {f"search_{name}": zeros(B, L, 2, dtype=I64) for name in ("terms", "clicks")}
    ids |= {"search_lengths": IDS, "candidates": zeros(B, 4, dtype=I64)}
    weights = {"items": zeros(N_ITEMS + 1, D), "item_layer": zeros(0)}
    weights |= {"queries": zeros(4, D), "query_text": zeros(0), "users": zeros(0)}
    weights |= {"search_position": zeros(L, D), "rec_position": zeros(L, D)}
    weights |= {"seen_bonus": zeros(2), "weights": request_weights(), "widths": []}
    weights |= {"n_layers": 1, "ffn": F, "n_sets": 1, "step_ffn": F}
    more = {"steps": 1, "n_heads": 2, "max_clicks": 2, "readout": 1.0, "terms": True, "dot": True}
    more |= {"pairs": False, "n_threads": 1}
    call("cpu_request", {**ids, **weights, **more}, changes)


def at(place: int | tuple[int, ...], value: float, like: Tensor) -> Tensor:
    changed = like.clone()
    changed[place] = value
    return changed


ROW_IDS = zeros(B, L, dtype=I64)
INTS = zeros(B, dtype=torch.int32)
MANY_AXES = zeros(*(4,) * 6)[::2, ::2, ::2, ::2, ::2]
TRANSPOSED = zeros(1, 2, 3 * D, D).mT.contiguous().mT

ERRORS: dict[str, Callable[[], None]] = {
    # ops.cpp
    "rows must be a contiguous int64 vector": lambda: noise(rows=INTS),
    "n_trajectories, length and dim must not be negative, got 1, 3 and -1": lambda: noise(dim=-1),
    "stream must be 0 or 1, got 2": lambda: noise(stream=2),
    "seed must be an int64 tensor without axes": lambda: noise(seed=IDS),
    "first_site, n_sites, length and dim must not be negative, got 0, 1, -1 and 8":
        lambda: dropout(length=-1),
    "threshold must be in 0..65535, got 65536": lambda: dropout(threshold=65536),
    # ranking_ops.cpp
    "scores must be float32, float16, bfloat16 or float64":
        lambda: ranking(scores=zeros(B, L, N_ITEMS, dtype=I64)),
    "relevance must be bool, int32, int64, float32 or float64":
        lambda: ranking(target=None, relevance=zeros(B, L, N_ITEMS, dtype=torch.int8)),
    "scores must have at least one axis": lambda: ranking(scores=torch.tensor(0.0)),
    "scores has more than 4 axes of independent strides before its last; make it contiguous":
        lambda: ranking(scores=MANY_AXES),
    "target must be contiguous int64, one element a row": lambda: ranking(target=INTS),
    "kinds and ks must have one length, at most 64": lambda: ranking(kinds=[0, 1]),
    "ties must be 0, 1 or 2": lambda: ranking(ties=3),
    "kinds[1] or ks[1] is out of range": lambda: ranking(kinds=[0, 8], ks=[3, 3]),
    "output must be 0, 1 or 2": lambda: ranking(output=3),
    "give either target or relevance, not both": lambda: ranking(relevance=zeros(B, L, N_ITEMS)),
    "relevance must have the shape of scores": lambda: ranking(target=None, relevance=zeros(B, L)),
    "excluded must be bool, of the shape of scores":
        lambda: ranking(excluded=zeros(B, L, N_ITEMS)),
    "counts[1, 2] is 7, expected 0 to 6": lambda: ranking(counts=at((1, 2), 7, ROW_IDS + 6)),
    "target[0, 2] is -2, expected an index below 6, or -1 for none":
        lambda: ranking(target=at((0, 2), -2, ROW_IDS)),
    "scores[1, 0] has a NaN, expected numbers (infinities included)":
        lambda: ranking(scores=at((1, 0, 5), torch.nan, zeros(B, L, N_ITEMS))),
    "users and items must be matrices of one width and dtype":
        lambda: catalogue(items=zeros(N_ITEMS, D - 1)),
    "seen must be [n_users, n_seen]": lambda: catalogue(seen=IDS),
    "target[1] is 6, expected an index below 6, or -1 for none":
        lambda: catalogue(target=at(1, 6, IDS)),
    "seen[0] has an item out of range, expected indices below 6":
        lambda: catalogue(seen=at((0, 1), 6, ROW_IDS)),
    "users[1] gives a NaN score, expected finite vectors":
        lambda: catalogue(users=at((1, 0), torch.nan, zeros(B, D))),
    # reasoning_ops.cpp
    "search must be float32, float16 or bfloat16":
        lambda: reasoning(search=zeros(B, L, D, dtype=torch.float64)),
    "rec must be contiguous, of the states' dtype and of the size that the other arguments give it":
        lambda: reasoning(rec=zeros(B + 1, L, D)),
    "rec_lengths must be contiguous int64 or int32, one a user":
        lambda: reasoning(rec_lengths=zeros(B)),
    "search_lengths[1] is 4, expected 0 to 3": lambda: reasoning(search_lengths=at(1, 4, IDS)),
    "rows must be contiguous int64, one a user": lambda: reasoning(rows=INTS, noise_scale=1.0),
    "noise_seed must be an int64 tensor without axes":
        lambda: reasoning(noise_scale=1.0, noise_seed=zeros(0, dtype=I64)),
    "dropout_seed must be an int64 tensor without axes":
        lambda: reasoning(dropout_threshold=1, dropout_seed=zeros()),
    "dropout_threshold must be in 0..65535, got -1": lambda: reasoning(dropout_threshold=-1),
    "expected 14 weights, got 10": lambda: reasoning(weights=block(1)),
    "weights of linear layers must be [P, 2, out, in]":
        lambda: reasoning(weights=[zeros(D, D), *block(2)[1:]]),
    "n_heads must divide the width 8, got 3": lambda: reasoning(n_heads=3),
    "the weights must have the sizes of lcr_fast.weights for width 8 and FFN width 12":
        lambda: reasoning(weights=[*block(2)[:-1], zeros(1, 2, 2, D)]),
    "weights must be contiguous, in float32 or the states' dtype":
        lambda: reasoning(weights=[TRANSPOSED, *block(2)[1:]]),
    "search and rec must be [B, L, D]": lambda: reasoning(rec=zeros(B, D)),
    "steps must be at least 1, and at most the sets of weights, got 0":
        lambda: reasoning(steps=0),
    "n_trajectories must be at least 1, got 0": lambda: reasoning(n_trajectories=0),
    "dropout needs n_trajectories = 1, got 2":
        lambda: reasoning(n_trajectories=2, dropout_threshold=1),
    "exit_weight must be contiguous float32 [18]": lambda: adaptive(exit_weight=zeros(18, 1)),
    "exit_bias must be contiguous float32 [1]": lambda: adaptive(exit_bias=zeros(2)),
    "the encoder's FFN must have a width": lambda: encode(weights=block(1, ffn_dim=0)),
    "rec_lengths[1] is 4, expected 0 to 3": lambda: encode(rec_lengths=at(1, 4, IDS)),
    # scoring_ops.cpp
    "search must be contiguous float32 of a fitting shape":
        lambda: score(search=zeros(B, 1, L, D, dtype=torch.float64)),
    "dropout_rows must be contiguous int64 of a fitting shape":
        lambda: score(dropout_threshold=1, dropout_rows=INTS),
    "ids must be in 0..6, got 7": lambda: score(ids=zeros(1, 4, dtype=I64) + 7),
    "states must be [B, N, L, D]": lambda: score(search=zeros(B, L, D)),
    "each layer needs a weight and a bias, got 2 and 1": lambda: score(mlp_biases=[zeros(5)]),
    "mlp_weights must be matrices [out, in]": lambda: score(mlp_weights=[zeros(5), zeros(1, 5)]),
    "the MLP must end in one score":
        lambda: score(mlp_weights=[zeros(5, 3 * D)], mlp_biases=[zeros(5)]),
    "items must be [T, D] and ids [B or 1, C]": lambda: score(items=zeros(N_ITEMS)),
    "dropout_threshold must be in 0..65535, got 65536": lambda: score(dropout_threshold=65536),
    "dropout needs one trajectory":
        lambda: score(
            search=zeros(B, 2, L, D), rec=zeros(B, 2, L, D), dropout_rows=IDS, dropout_threshold=1
        ),
    "ids must be [B or 1, C]": lambda: score(ids=zeros(3, 4, dtype=I64)),
    "states must be contiguous [B, L, D]": lambda: topk(rec=zeros(B, 1, L, D)),
    "items must be [I + 1, D] and exclude [B, X]": lambda: topk(exclude=IDS),
    "k must be at least 1, got 0": lambda: topk(k=0),
    "target must be in 0..6, got -1": lambda: rank(target=IDS - 1),
    # request_ops.cpp
    "a batch has the dimensions of lcr_fast.Batch, and items are [rows, dim]":
        lambda: request(candidates=IDS),
    "steps and max_clicks must not be negative and n_threads be positive, got -1, 2 and 1":
        lambda: request(steps=-1),
    "search_clicks must be in 0..6, got 7":
        lambda: request(search_clicks=zeros(B, L, 2, dtype=I64) + 7),
    "queries must be [rows, dim]":
        lambda: request(queries=zeros(4)),
    "rec_position has 1 rows, and a history 3 events": lambda: request(rec_position=zeros(1, D)),
    "weights must be contiguous float32 of a fitting shape": lambda: request(ffn=F + 1),
    "no layers for 3 steps: n_layers 1, ffn 12, n_sets 2, step_ffn 12":
        lambda: request(steps=3, n_sets=2),
    "query_text is added to means of terms alone":
        lambda: request(terms=False, query_text=zeros(4, D)),
    "search_queries must be in 0..1, got 2":
        lambda: request(query_text=zeros(2, D), search_queries=ROW_IDS + 2),
    "without an MLP there is no item_layer": lambda: request(item_layer=zeros(N_ITEMS + 1, 5)),
    "items must be [rows, dim] and weight [out, in]": lambda: request_items(items=zeros(4)),
    "weight must be contiguous float32 of a fitting shape":
        lambda: request_items(weight=zeros(5, 2 * D)),
    "target_weight must be [2, D, D]": lambda: request_weights(target_weight=zeros(D)),
    "the encoder must have an FFN": lambda: request_weights(encoder=block(1, ffn_dim=0)),
    "the reasoning must be of width 8":
        lambda: request_weights(reasoning=block(2, dim=4)),
}  # fmt: skip


def sentences() -> list[str]:
    """Return what each call of ERRORS raises, without the stack that torch may add."""
    found = []
    for provoke in ERRORS.values():
        try:
            provoke()
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
        else:
            found.append("no error")
    return found


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    json.dump(sentences(), sys.stdout)
