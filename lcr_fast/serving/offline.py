"""Recommend to many users of prepared data, batch by batch."""

from collections.abc import Iterator, Sequence

from lcr_fast.capture import CapturedRecommender
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.ops.scoring import check_k
from lcr_fast.serving.engine import Engine, RecommendRequest
from lcr_fast.training import distributed


def recommend(
    model: LCRSER,
    data: PreparedData,
    users: Sequence[str] | None = None,
    k: int = 10,
    batch_size: int = 256,
    recommender: CapturedRecommender | None = None,
) -> Iterator[tuple[str, int, str, float]]:
    """Yield (user, rank, item, score) with raw ids, k unseen items a user, rank from 1.

    ``users`` None means all; a user without any history gets what the model gives to nobody in
    particular. What of the data the model does not know is skipped, as ``make_batcher`` says.
    ``recommender`` is the model captured, where there is one.
    Raises ValueError, before anything is computed, for a user that the data does not know, a ``k``
    or ``batch_size`` that is no number of items or users, and where the model knows items that the
    data does not. Processes of one job share the work, and each yields all of it.
    """
    if isinstance(users, str):  # whose letters would be taken for users
        raise ValueError(f"users must be a sequence of ids, [{users!r}], got a text")
    check_k(k)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    engine = Engine(model, data, recommender)
    if users is None:
        numbers = list(range(1, data.n_users + 1))
    else:
        numbers = [engine.user(str(user)) for user in users]
    return _recommend(engine, numbers, k, batch_size)


def _recommend(
    engine: Engine, numbers: list[int], k: int, batch_size: int
) -> Iterator[tuple[str, int, str, float]]:
    share = distributed.current()
    starts = range(0, len(numbers), share.count * batch_size)
    mine = (numbers[start + share.rank * batch_size :][:batch_size] for start in starts)
    lists = (
        (some, engine.recommend([RecommendRequest(user, k) for user in some]) if some else [])
        for some in mine
    )
    for users, found in share.rounds(lists):
        for user, items in zip(users, found, strict=True):
            for rank, (item, score) in enumerate(items, 1):
                yield engine.data.users[user], rank, item, score
