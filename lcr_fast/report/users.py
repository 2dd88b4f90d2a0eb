"""A few users of a model: both histories, where each step looks, the list before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcr_fast.batch import Batch
from lcr_fast.data.batching import Batcher
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.reference import States
from lcr_fast.training.evaluation import make_batcher, with_target
from lcr_fast.weights import REC, SEARCH

_CHOSEN_AMONG = 4096  # test samples at most
_BATCH = 256
_SHOWN = 12  # of a history
_LISTED = 10  # places of a list


class Past(NamedTuple):
    """A search of a history, or the events on one item that stand one behind the other."""

    text: str  # an item's id, or what was searched for
    times: int  # events; of a search 1
    clicks: list[str]  # ids, of a search
    before: int  # ms before the target
    looks: list[float]  # share of attention of each step, from the other stream
    pooled: float  # share in what the target reads of the stream
    relevant: bool | None  # of generated data: does the search announce?


class Place(NamedTuple):
    """One place of a ranking."""

    item: str
    is_target: bool
    known: int  # events of the item that training knows
    rise: int  # places gained by reasoning; 0 in the list before it


class User(NamedTuple):
    """One test sample, looked at."""

    user: str
    why: str
    target: str
    repeat: bool
    known: int  # events of the target that training knows
    events: list[Past]
    searches: list[Past]
    earlier: tuple[int, int]  # events and searches that are read but not shown
    before: list[Place]
    after: list[Place]
    ranks: tuple[int, int]
    candidates: int


@torch.inference_mode()
def look_at_users(model: LCRSER, data: PreparedData, n: int = 6, split: str = "test") -> list[User]:
    """Choose n users of a split and look at what the model makes of them.

    A third are those whom reasoning helps most, a third those whom it harms most, the others are
    drawn; all have both histories. "Before" ranks from h^(0), "after" from what the model reads, or
    from h^(K) where validation chose to read h^(0) alone. Of a model without steps all are drawn,
    and both lists are the same.
    """
    model.eval()
    batcher = make_batcher(data, split, model)
    samples = batcher.samples
    events, searches = batcher.data.history_lengths(split)
    rows = np.flatnonzero((events > 0) & (searches > 0) & (samples.items > 0))[:_CHOSEN_AMONG]
    if samples.negatives is None or not samples.negatives.shape[1] or not len(rows) or n < 1:
        return []
    ranks = np.concatenate(
        [
            _ranks(model, batcher, rows[start : start + _BATCH])
            for start in range(0, len(rows), _BATCH)
        ]
    )
    chosen = _choose(ranks, n, with_extremes=bool(model.config.steps))
    return list(_users(model, batcher, rows[list(chosen)], list(chosen.values())))


def _choose(ranks: NDArray[np.int64], n: int, with_extremes: bool) -> dict[int, str]:
    """Choose places among ranks [n, 2] before and after reasoning, and say why."""
    gain = 1 / ranks[:, 1] - 1 / ranks[:, 0]
    order = np.argsort(gain, kind="stable")
    chosen: dict[int, str] = {}
    if with_extremes:
        best = [int(p) for p in order[::-1][: n // 3] if gain[p] > 0]
        worst = [int(p) for p in order[: n // 3] if gain[p] < 0]
        chosen |= dict.fromkeys(best, "among those whom reasoning helps most")
        chosen |= dict.fromkeys(worst, "among those whom it harms most")
    for place in np.random.default_rng(0).permutation(len(ranks)).tolist():
        if len(chosen) >= n:
            break
        chosen.setdefault(place, "drawn at random")
    return chosen


def _scores(model: LCRSER, batcher: Batcher, rows: NDArray) -> tuple[Batch, States, Tensor]:
    """Score the target, in column 0, and its negatives before and after reasoning: [b, 2, C]."""
    samples = batcher.samples
    assert samples.negatives is not None  # whoever calls has looked
    candidates, columns = with_target(samples.items[rows], samples.negatives[rows])
    batch = batcher.gather(rows, candidates, columns).to(model.head.target_weight.device)
    states = model.states(batch)
    read = model.read(states.h[0], states.h[-1]) if model.config.readout else states.h[-1]
    scores = [model.score(h, batch).float() for h in (states.h[0], read)]
    return batch, states, torch.stack(scores, 1)


def _ranks(model: LCRSER, batcher: Batcher, rows: NDArray) -> NDArray[np.int64]:
    """Rank the targets before and after, ties against them: [b, 2]."""
    _, _, scores = _scores(model, batcher, rows)
    return (scores >= scores[..., :1]).sum(-1).cpu().numpy()


def _users(model: LCRSER, batcher: Batcher, rows: NDArray, why: Sequence[str]) -> Iterator[User]:
    batch, states, scores = _scores(model, batcher, rows)
    lengths = (batch.search_lengths, batch.rec_lengths)
    target = model.item_vectors(batch.candidates[:, :1])
    read = model.read(states.h[0], states.h[-1])
    steps = model.cross_attention(states, batch)
    pooled = [model.pool(read[x], lengths[x], target, x)[1][:, 0] for x in (SEARCH, REC)]
    # What the other stream's events look at, a mean over its events and the heads.
    looks = [
        torch.stack([_mean_look(step[1 - x], lengths[1 - x]) for step in steps], 1)
        if steps
        else pooled[x].new_zeros(len(rows), 0, pooled[x].shape[1])
        for x in (SEARCH, REC)
    ]
    truth = batcher.relevant(rows, batch.search_queries.shape[1])
    for b, row in enumerate(rows.tolist()):
        attention = {x: (looks[x][b].T.tolist(), pooled[x][b].tolist()) for x in (SEARCH, REC)}
        yield _user(batcher, batch, b, row, why[b], attention, truth[b], scores[b])


def _mean_look(look: Tensor, lengths: Tensor) -> Tensor:
    """Average attention [B, H, L, M] over heads and the events before a length [B]: [B, M]."""
    real = torch.arange(look.shape[2], device=look.device) < lengths[:, None]
    return (look.mean(1) * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def _user(
    batcher: Batcher,
    batch: Batch,
    b: int,
    row: int,
    why: str,
    attention: dict[int, tuple[list[list[float]], list[float]]],
    truth: NDArray,
    scores: Tensor,
) -> User:
    data, samples = batcher.data, batcher.samples
    time = int(samples.times[row])
    n_searches, n_events = int(batch.search_lengths[b]), int(batch.rec_lengths[b])
    searches: list[Past] = []
    events: list[Past] = []
    first = int(samples.search_end[row]) - n_searches
    for place in range(n_searches):
        query = int(data.search_queries[first + place])
        clicks = [data.items[item] for item in batch.search_clicks[b, place].tolist() if item]
        looks, pooled = attention[SEARCH][0][place], attention[SEARCH][1][place]
        known = None if truth[place] < 0 else bool(truth[place])
        before = time - int(data.search_times[first + place])
        searches.append(Past(data.query(query), 1, clicks, before, looks, pooled, known))
    first = int(samples.rec_end[row]) - n_events
    for place in range(n_events):
        item = data.items[int(data.rec_items[first + place])]
        looks, pooled = attention[REC][0][place], attention[REC][1][place]
        before = time - int(data.rec_times[first + place])
        event = Past(item, 1, [], before, looks, pooled, None)
        if events and events[-1].text == item:
            event = _together(events.pop(), event)
        events.append(event)
    hidden = [past[:-_SHOWN] for past in (events, searches)]
    orders = [_order(each) for each in scores]
    target = int(samples.items[row])
    return User(
        user=data.users[int(samples.users[row])],
        why=why,
        target=data.items[target],
        repeat=bool(samples.repeat[row]),
        known=int(data.item_count[target]),
        events=events[-_SHOWN:],
        searches=searches[-_SHOWN:],
        earlier=(sum(past.times for past in hidden[0]), len(hidden[1])),
        before=_places(data, batch.candidates[b], orders[0], orders[0]),
        after=_places(data, batch.candidates[b], orders[1], orders[0]),
        ranks=(orders[0].index(0) + 1, orders[1].index(0) + 1),
        candidates=int((batch.candidates[b] > 0).sum()),
    )


def _together(first: Past, second: Past) -> Past:
    """Make one of two that stand one behind the other: as late as the second."""
    looks = [a + b for a, b in zip(first.looks, second.looks, strict=True)]
    pooled = first.pooled + second.pooled
    return second._replace(times=first.times + second.times, looks=looks, pooled=pooled)


def _order(scores: Tensor) -> list[int]:
    """Order columns by their scores [C], the target (column 0) behind its equals."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda column: (-values[column], column == 0))


def _places(
    data: PreparedData, candidates: Tensor, order: list[int], former: list[int]
) -> list[Place]:
    was = {column: place for place, column in enumerate(former)}
    return [
        Place(
            data.items[int(candidates[column])],
            column == 0,
            int(data.item_count[int(candidates[column])]),
            was[column] - place,
        )
        for place, column in enumerate(order[:_LISTED])
        if int(candidates[column])
    ]
