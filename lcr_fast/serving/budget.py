"""Budgets: the most reasoning that a request can have within a time, measured on this machine."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from lcr_fast.batch import Batch
from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER
from lcr_fast.serving.scorer import fastest

_TURNS = 300  # calls of each depth, fewer where they take longer than _SECONDS
_SECONDS = 3.0
_WARM_UP = 5  # turns, which are not counted
_MARGIN = 1.1  # of what was measured: the next hour is not this second


class Choice(NamedTuple):
    """A model that fits a budget, and why it was taken."""

    model: LCRSER
    steps: int
    p99_ms: float  # measured
    profile: dict[int, float]  # p99 in ms of a request, by number of steps

    def describe(self) -> str:
        """Say what was chosen, in one sentence."""
        times = ", ".join(f"{k}: {ms:.2f}" for k, ms in self.profile.items())
        return f"K = {self.steps}, p99 {self.p99_ms:.2f} ms (of each K: {times})"


def with_budget(
    model: LCRSER,
    budget_ms: float,
    *,
    n_users: int = 1,
    n_candidates: int = 100,
    k: int | None = None,
) -> Choice:
    """Choose the most steps, of those the model was trained with, whose p99 is within a budget.

    Times what one call takes for ``n_users`` with full histories: scores of ``n_candidates``, or
    with ``k`` the best of the catalogue. Fewer steps give other scores, and in the paper's reading
    worse ones; how much worse is for ``lcr-fast evaluate`` to say. The chosen model shares its
    tensors with ``model``. Raises ValueError where not even K = 0 fits.
    """
    if not budget_ms > 0:
        raise ValueError(f"a budget must be a positive number of milliseconds, got {budget_ms}")
    models = {steps: with_steps(model, steps) for steps in range(model.config.steps + 1)}
    profile = measure(
        {steps: _call(one, n_users, n_candidates, k) for steps, one in models.items()}
    )
    fitting = [steps for steps, ms in profile.items() if ms * _MARGIN <= budget_ms]
    if not fitting:
        raise ValueError(
            f"a budget of {budget_ms:g} ms is too small: here a request without reasoning takes "
            f"{profile[0]:.2f} ms (p99)"
        )
    steps = max(fitting)
    return Choice(models[steps], steps, profile[steps], profile)


def with_steps(model: LCRSER, steps: int) -> LCRSER:
    """Make a model that runs the first ``steps`` steps, with the same tensors, in evaluation."""
    if not 0 <= steps <= model.config.steps:
        raise ValueError(f"steps must be in 0..{model.config.steps}, got {steps}")
    config = model.config.replace(steps=steps)
    with torch.device("meta"):  # its tensors are replaced at once
        copy = LCRSER(config)
    state = model.state_dict()
    for name, tensor in copy.state_dict().items():
        state[name] = state[name][: len(tensor)]  # of weights by step
    copy.load_state_dict(state, assign=True)
    copy.set_text(model.item_text, model.query_text)
    copy.data_fingerprint, copy.vocabulary = model.data_fingerprint, model.vocabulary
    if model.exits is not None:
        copy.exits = model.exits._replace(bias=model.exits.bias[:steps])
    return copy.eval()


def measure(calls: dict[int, Callable[[], object]]) -> dict[int, float]:
    """Time each call in turns, so that all meet the same noise: p99 in milliseconds."""
    times: dict[int, list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + _SECONDS
    for turn in range(_WARM_UP + _TURNS):
        if turn > 2 * _WARM_UP and time.perf_counter() > end:
            break
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= _WARM_UP:
                times[key].append(time.perf_counter() - start)
    return {key: 1e3 * float(np.percentile(all_, 99)) for key, all_ in times.items()}


def _call(model: LCRSER, n_users: int, n_candidates: int, k: int | None) -> Callable[[], object]:
    batch = full_batch(model.config, n_users, n_candidates).to(model.head.target_weight.device)
    scorer = fastest(model) if k is None else model

    @torch.inference_mode()
    def call() -> object:
        if k is not None:
            return model.recommend(batch, k)[0].tolist()  # which waits for a GPU
        return scorer(batch).tolist()

    return call


def full_batch(config: LCRConfig, n_users: int, n_candidates: int) -> Batch:
    """Make users with histories as long as the model reads, of arbitrary ids."""
    n_search, n_rec = config.max_search_len, config.max_rec_len
    generator = torch.Generator().manual_seed(0)

    def ids(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit + 1, (n_users, *shape), generator=generator)

    return Batch(
        user=ids(config.n_users),
        rec_items=ids(config.n_items, n_rec),
        rec_lengths=torch.full((n_users,), n_rec),
        search_queries=ids(config.n_queries, n_search),
        search_terms=ids(config.n_terms, n_search, 4),
        search_clicks=ids(config.n_items, n_search, config.max_clicks),
        search_lengths=torch.full((n_users,), n_search),
        candidates=ids(config.n_items, n_candidates),
        target=torch.full((n_users,), -1),
        row=torch.arange(n_users),
    )
