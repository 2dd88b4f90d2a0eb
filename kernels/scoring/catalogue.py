"""The whole catalogue in tiles of items: the best, or the place of one."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.core.noise import Dropout
from lcr_fast.kernels.gpu import gpu_of, on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.scoring.config import (
    PROGRAMS,
    catalogue_config,
    constants,
    prepare,
)
from lcr_fast.kernels.scoring.tile import (
    SIZES,
    Mlp,
    Stream,
    attend,
    load_length,
    load_vectors,
    score_tile,
    target_keys,
)

_ID_BITS = tl.constexpr(0x7FFFFFFF)
_NAN_BITS = tl.constexpr(0x7FC00000)
_NO_KEY = tl.constexpr(-(1 << 63))  # below the key of every score
_HIGHEST_KEY = tl.constexpr((1 << 63) - 1)
_LOWEST_KEY = -(((1 << 31) - 1) << 32)  # at or below the key of every score
_EXCLUDED = tl.constexpr(128)  # ids that are compared at a time
_SIZES = [*SIZES, "n_rows", "n_excluded", "n_users", "tiles_per_split"]


@triton.jit
def _score_items(
    ids,  # [P]
    valid,  # [P]
    search,  # Stream
    rec,  # Stream
    search_size,
    rec_size,
    search_length,
    rec_length,
    b,  # the user
    items_ptr,
    user_ptr,
    target_weight_ptr,
    mlp,  # Mlp
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    EVENTS: tl.constexpr,
    H1_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """Score a tile of items as :func:`score_fwd` returns it, in the states' dtype: [P]."""
    DTYPE: tl.constexpr = search.states.dtype.element_ty
    search_ptr = search.states + b * search_size * D
    rec_ptr = rec.states + b * rec_size * D
    user_ptr += b * D
    e = load_vectors(items_ptr, ids, valid, 0, D, D, DTYPE)  # [P, D]
    keys = target_keys(items_ptr, ids, valid, target_weight_ptr, 0, D, KEY_BLOCK, DTYPE, PRECISION)
    z_s, _, _ = attend(keys, search_ptr, search_length, D, EVENTS, PRECISION)
    keys = target_keys(items_ptr, ids, valid, target_weight_ptr, 1, D, KEY_BLOCK, DTYPE, PRECISION)
    z_r, _, _ = attend(keys, rec_ptr, rec_length, D, EVENTS, PRECISION)
    no_dropout = Dropout(0, 1.0, 0)
    y = score_tile(z_r, z_s, e, user_ptr, mlp, no_dropout, ids, ids, HEAD, H1_BLOCK, PRECISION)
    return y.to(DTYPE)


@triton.jit
def _sort_keys(scores, ids):
    """Make int64 keys that order like (score, -id), and so are unique; a NaN is the highest."""
    scores = tl.where(scores == 0, 0.0, scores.to(tl.float32))  # -0 equals 0
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores != scores, _NAN_BITS, bits)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers: the larger, the lower
    return (bits.to(tl.int64) << 32) | (ids ^ _ID_BITS).to(tl.int64)


@kernel(do_not_specialize=[*_SIZES, "k"])
def score_topk_kernel(
    search,  # Stream
    rec,  # Stream
    search_size,
    rec_size,
    items_ptr,  # [I + 1, D]
    user_ptr,  # [B, D]
    target_weight_ptr,  # [parts, 2, D, D]
    mlp,  # Mlp
    exclude_ptr,  # [B, X]
    ceiling_ptr,  # [B]: only keys below the ceiling count
    best_ptr,  # [B, splits, k] int64 keys, in no order
    n_rows,
    n_excluded,
    n_users,
    k,
    tiles_per_split,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EVENTS: tl.constexpr,
    H1_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    K_TILE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    b, split = pid % n_users, pid // n_users
    search_length = load_length(search, b, search_size)
    rec_length = load_length(rec, b, rec_size)
    ceiling = tl.load(ceiling_ptr + b)
    slots = tl.arange(0, K_TILE)
    # Distinct, as one slot at a time is replaced; slots beyond k never are.
    best = tl.where(slots < k, slots.to(tl.int64) + _NO_KEY, _HIGHEST_KEY)
    worst = tl.min(best, 0)
    n_nan = 0

    n_tiles = tl.cdiv(n_rows - 1, CANDIDATES)
    first_tile = split.to(tl.int32) * tiles_per_split
    end = tl.minimum(first_tile + tiles_per_split, n_tiles)
    # No hoisting: weights that waited for the next tile would take registers all the while.
    for tile in tl.range(first_tile, end, disable_licm=True):
        ids = 1 + tile * CANDIDATES + tl.arange(0, CANDIDATES)
        valid = ids < n_rows
        scores = _score_items(
            ids, valid, search, rec, search_size, rec_size, search_length, rec_length, b,
            items_ptr, user_ptr, target_weight_ptr, mlp, D, HEAD, PRECISION, EVENTS, H1_BLOCK,
            KEY_BLOCK,
        )  # fmt: skip
        n_nan += tl.sum((valid & (scores != scores)).to(tl.int32), 0)
        keys = _sort_keys(scores, ids)
        keys = tl.where(valid & (scores > float("-inf")) & (keys < ceiling), keys, _NO_KEY)
        # After the first tiles few keys pass, so one at a time is cheap, and so is the search for
        # each of them among the excluded ids.
        key = tl.max(keys, 0)
        while key > worst:
            item = (key & _ID_BITS) ^ _ID_BITS
            n_found = 0
            for x in range(0, n_excluded, _EXCLUDED):
                place = x + tl.arange(0, _EXCLUDED)
                excluded = tl.load(
                    exclude_ptr + b * n_excluded + place, mask=place < n_excluded, other=0
                )
                n_found += tl.sum((excluded == item).to(tl.int32), 0)
            best = tl.where((best == worst) & (n_found == 0), key, best)
            worst = tl.min(best, 0)
            keys = tl.where(keys == key, _NO_KEY, keys)
            key = tl.max(keys, 0)
    # One NaN spoils the user's list: it must not look like a list.
    nan_key = tl.full([K_TILE], _NAN_BITS, tl.int64) << 32
    best = tl.where(n_nan > 0, nan_key, best)
    tl.store(
        best_ptr + (b * tl.cdiv(n_tiles, tiles_per_split) + split) * k + slots, best, mask=slots < k
    )


@kernel(do_not_specialize=_SIZES)
def score_rank_kernel(
    search,  # Stream
    rec,  # Stream
    search_size,
    rec_size,
    items_ptr,  # [I + 1, D]
    user_ptr,  # [B, D]
    target_weight_ptr,  # [parts, 2, D, D]
    mlp,  # Mlp
    target_ptr,  # [B]
    bonus_ptr,  # [B]
    exclude_ptr,  # [B, X] without repetitions
    ahead_ptr,  # [B, splits] int64, hugely negative where there was a NaN
    n_rows,
    n_excluded,
    n_users,
    tiles_per_split,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EVENTS: tl.constexpr,
    H1_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    b, split = pid % n_users, pid // n_users
    search_length = load_length(search, b, search_size)
    rec_length = load_length(rec, b, rec_size)
    target = tl.load(target_ptr + b).to(tl.int32)
    bonus = tl.load(bonus_ptr + b)
    goal = tl.zeros([1], tl.float32)
    n_ahead = 0
    n_nan = 0

    # Tiles of the excluded items, which are counted away, and then of the whole catalogue. Before
    # them each program scores the target in the same loop, so that the very same instructions
    # give its score and that of an equal item.
    n_listed = tl.cdiv(n_excluded, CANDIDATES)
    n_tiles = n_listed + tl.cdiv(n_rows - 1, CANDIDATES)
    first_tile = split.to(tl.int32) * tiles_per_split
    end = tl.minimum(first_tile + tiles_per_split, n_tiles)
    for tile in tl.range(first_tile - 1, end, disable_licm=True):  # as in the kernel above
        is_goal, is_listed = tile < first_tile, tile < n_listed
        place = tile * CANDIDATES + tl.arange(0, CANDIDATES)
        listed = tl.load(
            exclude_ptr + b * n_excluded + place,
            mask=(place >= 0) & (place < n_excluded),
            other=0,
        ).to(tl.int32)
        ids = tl.where(is_listed, listed, place - n_listed * CANDIDATES + 1)
        ids = tl.where(is_goal, target, ids)
        valid = (ids > 0) & (ids < n_rows)
        scores = _score_items(
            ids, valid, search, rec, search_size, rec_size, search_length, rec_length, b,
            items_ptr, user_ptr, target_weight_ptr, mlp, D, HEAD, PRECISION, EVENTS, H1_BLOCK,
            KEY_BLOCK,
        ).to(tl.float32)  # fmt: skip
        goal = tl.where(is_goal, tl.max(scores, 0) + bonus, goal)
        n_nan += tl.sum((valid & (scores != scores)).to(tl.int32), 0)
        ahead = valid & (ids != target) & (scores >= goal) & (scores > float("-inf"))
        count = tl.sum(ahead.to(tl.int32), 0)
        n_ahead += tl.where(is_goal, 0, tl.where(is_listed, -count, count))
    n_nan += tl.max(((goal != goal) & (target > 0)).to(tl.int32), 0)
    n_splits = tl.cdiv(n_tiles, tiles_per_split)
    result = tl.where(n_nan > 0, -(1 << 40), n_ahead.to(tl.int64))  # type: ignore[attr-defined]
    tl.store(ahead_ptr + b * n_splits + split, result)


# A longer list is found in several passes over the catalogue.
MAX_K = 512


def list_tile(k: int) -> int:
    """Choose the slots of a list of k, of few sizes, as each is compiled."""
    return next(size for size in (32, 128, MAX_K) if k <= size)


# A split has at least so many tiles: its programs fill their lists, or score the target, once.
_SPLIT_TILES = 8


def _split_tiles(n_tiles: int, n_users: int) -> tuple[int, int]:
    """Tiles of a split, and splits."""
    n_splits = min(triton.cdiv(PROGRAMS, n_users), triton.cdiv(n_tiles, _SPLIT_TILES))
    per_split = triton.cdiv(n_tiles, max(n_splits, 1))
    return per_split, triton.cdiv(n_tiles, max(per_split, 1))


class _Catalogue(NamedTuple):
    """What the kernels of the catalogue read first, in the order of their arguments."""

    search: Stream
    rec: Stream
    search_size: int
    rec_size: int
    items: Tensor
    user: Tensor
    target_weight: Tensor
    mlp: Mlp


def _prepare(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    dot: bool,
) -> tuple[_Catalogue, dict[str, Any]]:
    """Make a launch's arguments, and its compile-time arguments and options."""
    sizes = search.shape[1], rec.shape[1]
    catalogue = _Catalogue(
        Stream(search.contiguous(), search_lengths.contiguous()),
        Stream(rec.contiguous(), rec_lengths.contiguous()),
        *sizes,
        items.contiguous(),
        user.contiguous(),
        *prepare(target_weight, mlp_weights, mlp_biases, search.dtype),
    )
    dim, dtype = search.shape[-1], search.dtype
    compiled = constants(dim, dtype, user, mlp_weights, 0, dot)
    compiled |= catalogue_config(
        dim, max(sizes), dtype, compiled["PRECISION"], gpu_of(search.device)
    )
    return catalogue, compiled


def score_topk(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    k: int,
    exclude: Tensor,
    dot: bool,
) -> tuple[Tensor, Tensor]:
    """Find the k best rows of ``items`` [I + 1, D] but row 0: ids and scores [B, k].

    States are [B, L, D], ``exclude`` int64 [B, X]. The best first, of equal scores the lower id;
    id 0 and score -inf where fewer have a score above -inf. One NaN among a user's scores makes
    them all NaN. Exact; each program keeps the best keys of a run of items, so memory is
    O(B splits min(k, MAX_K)), with splits <= PROGRAMS / B + 1.
    """
    n_users, n_rows = len(search), len(items)
    catalogue, compiled = _prepare(
        search, rec, search_lengths, rec_lengths, items, user, target_weight, mlp_weights,
        mlp_biases, dot,
    )  # fmt: skip
    n_tiles = triton.cdiv(n_rows - 1, compiled["CANDIDATES"])
    per_split, n_splits = _split_tiles(n_tiles, max(n_users, 1))
    exclude = exclude.contiguous()

    ceiling = torch.full((n_users,), 2**63 - 1, dtype=torch.int64, device=search.device)
    n_best = min(k, n_rows - 1) if n_users else 0
    found = [ceiling.new_empty(n_users, 0)]
    for first in range(0, n_best, MAX_K):
        size = min(MAX_K, n_best - first)
        keys = ceiling.new_empty(n_users, n_splits, size)
        with on_device(search):
            launch(
                score_topk_kernel, (n_users * n_splits,),
                *catalogue, exclude, ceiling, keys, n_rows, exclude.shape[1], n_users, size,
                per_split, K_TILE=list_tile(size), **compiled,
            )  # fmt: skip
        found.append(keys.flatten(1).sort(1, descending=True).values[:, :size])
        ceiling = found[-1][:, -1].contiguous()
    return _read_keys(torch.cat(found, 1), k, search.dtype)


def _read_keys(keys: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Undo :func:`_sort_keys`: [B, n] -> ids and scores [B, k], 0 and -inf where no item is."""
    bits = keys >> 32
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    scores = bits.to(torch.int32).view(torch.float32)
    absent = keys < _LOWEST_KEY
    scores = scores.masked_fill(absent, -torch.inf)
    ids = (~keys & 0x7FFFFFFF).masked_fill(absent | scores.isnan(), 0)
    missing = (0, k - keys.shape[1])
    ids = torch.nn.functional.pad(ids, missing)
    return ids, torch.nn.functional.pad(scores, missing, value=-torch.inf).to(dtype)


def score_rank(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    target: Tensor,
    bonus: Tensor,
    exclude: Tensor,
    dot: bool,
) -> Tensor:
    """Count, for each user, the items that come before ``target``, from 1: int64 [B].

    1 + the number of rows of ``items`` [I + 1, D], but row 0, the target and those in ``exclude``
    [B, X], with a score above -inf and not below the target's plus
    ``bonus`` [B]. -1 where a score is NaN.
    """
    n_users, n_rows = len(search), len(items)
    ahead = target.new_zeros(n_users, 0)
    if n_users and n_rows > 1:
        catalogue, compiled = _prepare(
            search, rec, search_lengths, rec_lengths, items, user, target_weight, mlp_weights,
            mlp_biases, dot,
        )  # fmt: skip
        exclude = exclude.sort(1).values
        repeated = torch.zeros_like(exclude, dtype=torch.bool)
        repeated[:, 1:] = exclude[:, 1:] == exclude[:, :-1]
        exclude = exclude.masked_fill(repeated | (exclude < 0) | (exclude >= n_rows), 0)
        counts = (exclude.shape[1], n_rows - 1)
        n_tiles = sum(triton.cdiv(n, compiled["CANDIDATES"]) for n in counts)
        per_split, n_splits = _split_tiles(n_tiles, n_users)
        ahead = target.new_empty(n_users, n_splits)
        with on_device(search):
            launch(
                score_rank_kernel, (n_users * n_splits,),
                *catalogue, target.contiguous(), bonus.contiguous(), exclude, ahead,
                n_rows, exclude.shape[1], n_users, per_split, **compiled,
            )  # fmt: skip
    n_ahead = ahead.sum(1)
    return torch.where(n_ahead < 0, -1, n_ahead + 1)
