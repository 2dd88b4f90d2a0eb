"""Engine: scores and recommendations for users of prepared data, in the data's own ids."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lcr_fast.capture import CapturedRecommender
from lcr_fast.data.prepared import IdTable, PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.serving.scorer import Scorer, fastest
from lcr_fast.training.evaluation import make_batcher, padded_seen

_F = TypeVar("_F", bound=Callable)
_END_OF_TIME = np.iinfo(np.int64).max


class UnknownIdError(ValueError):
    """An id that the data, or the model, does not know."""


class ScoreRequest(NamedTuple):
    """Scores of given items for one user."""

    user: int
    items: tuple[int, ...]


class RecommendRequest(NamedTuple):
    """The best k items for one user, of those that the user has not seen."""

    user: int
    k: int


def _on_its_gpu(method: _F) -> _F:
    """Make the model's GPU current: in another thread it is GPU 0 again."""

    @functools.wraps(method)
    def run(self: "Engine", requests: Any) -> Any:
        gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if gpu else contextlib.nullcontext():
            return method(self, requests)

    return run  # type: ignore[return-value]


class Engine:
    """A model beside the histories of its users, all that is known of them.

    The model is in evaluation; its items' texts are projected once. Answers depend on what else is
    in their batch by rounding alone. ``recommender`` is the model captured, where recommendations
    shall come from graphs. Scores are computed in ``dtype``, see
    :func:`~lcr_fast.serving.scorer.fastest`, recommendations in the model's own. Raises ValueError
    where the model knows more items than the data.
    """

    def __init__(
        self,
        model: LCRSER,
        data: PreparedData,
        recommender: CapturedRecommender | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if model.config.n_items > data.n_items:
            raise ValueError(
                f"the model knows more items than the data: {model.config.n_items}, not "
                f"{data.n_items}"
            )
        self.model = model = model.projected()
        self.data = data
        self._dtype = dtype
        self._batcher = make_batcher(data, "test", model)
        self._device = model.head.target_weight.device
        self._recommend = model.recommend if recommender is None else recommender.recommend
        # A captured model lays a batch out on the host.
        self._read_on = self._device if recommender is None else torch.device("cpu")

    @functools.cached_property
    def scorer(self) -> nn.Module:
        """What scores candidates, made when it is first wanted: recommendations need none."""
        return fastest(self.model, self._dtype)

    def describe_scores(self) -> str:
        """Say in a line what computes scores."""
        if isinstance(self.scorer, Scorer):
            return self.scorer.describe()
        return f"op by op in {str(self._dtype).removeprefix('torch.')}"

    def user(self, text: str) -> int:
        """Look up a user; raises UnknownIdError."""
        return _find(self.data.users, "user", text)

    def item(self, text: str) -> int:
        """Look up an item that the model knows; raises UnknownIdError."""
        number = _find(self.data.items, "item", text)
        if number > self.model.config.n_items:
            raise UnknownIdError(f"item {text!r} is not in the model: it came after its training")
        return number

    @_on_its_gpu
    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Score the items of each request, in their order.

        Raises ValueError on a NaN score, and for numbers that :meth:`user` and :meth:`item` do not
        give.
        """
        width = max((len(request.items) for request in requests), default=0)
        candidates = np.zeros((len(requests), width), dtype=np.int64)
        for row, request in zip(candidates, requests, strict=True):
            row[: len(request.items)] = _rows("item", request.items, self.model.config.n_items)
        users = _rows("user", [request.user for request in requests], self.data.n_users)
        batch = self._batcher.at(users, _ends(users), candidates).to(self._device)
        scores = self.scorer(batch)
        if scores.isnan().any():
            raise ValueError("the model's scores hold NaN")
        rows = zip(requests, scores.tolist(), strict=True)
        return [row[: len(request.items)] for request, row in rows]

    @_on_its_gpu
    @torch.inference_mode()
    def recommend(self, requests: Sequence[RecommendRequest]) -> list[list[tuple[str, float]]]:
        """Find the best items of each request, with their scores; fewer where all else is seen."""
        users = _rows("user", [request.user for request in requests], self.data.n_users)
        times = _ends(users)
        nothing = np.zeros((len(users), 0), dtype=np.int64)
        batch = self._batcher.at(users, times, nothing).to(self._read_on)
        seen = torch.from_numpy(padded_seen(self.data, users, times)).to(self._device)
        # Lists of more than the catalogue would end in nothing, and have to be held all the same.
        k = min(max((r.k for r in requests), default=1), self.model.config.n_items)
        items, scores = self._recommend(batch, k, exclude=seen)
        answers = []
        for request, *found in zip(requests, items.tolist(), scores.tolist(), strict=True):
            best = itertools.islice(zip(*found, strict=True), request.k)
            answers.append([(self.data.items[item], score) for item, score in best if item])
        return answers


def _rows(kind: str, numbers: Sequence[int], most: int) -> NDArray[np.int64]:
    """Check rows of a table, from 1."""
    rows = np.array(numbers)
    if rows.size and (rows.dtype.kind not in "iu" or rows.min() < 1 or rows.max() > most):
        raise ValueError(f"the {kind} of a request must be an integer 1..{most}, got {numbers!r}")
    return rows.astype(np.int64)


def _ends(users: NDArray) -> NDArray[np.int64]:
    return np.full(len(users), _END_OF_TIME)


def _find(table: IdTable, kind: str, text: str) -> int:
    try:
        return table.find(text)
    except KeyError:
        raise UnknownIdError(f"{kind} {text!r} is not in the data") from None
