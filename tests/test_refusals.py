"""What a call cannot mean is refused in a sentence, whatever backend would compute it."""

import math

import numpy as np
import pytest
import torch

from lcr_fast import LCRConfig, ops, ranking_metrics
from lcr_fast.ops.noise import Dropout
from lcr_fast.reference import Steps
from lcr_fast.serving.scorer import Scorer
from lcr_fast.testing import random_batch, random_model

CONFIG = LCRConfig(
    n_items=12, n_terms=6, dim=8, n_heads=2, steps=2, max_search_len=3, max_rec_len=4,
    max_clicks=2, mlp_hidden=(9, 5), item_text_dim=3,
)  # fmt: skip


@pytest.fixture(scope="module", params=["auto", "reference"])
def case(request):
    generator = torch.Generator().manual_seed(0)
    model = random_model(CONFIG.replace(backend=request.param), generator).float()
    model.set_text(item_text=np.ones((13, 3), np.float32))
    return model, random_batch(CONFIG, 4, 5, generator)


def encode(model, batch, rate):
    return ops.encode(
        *model.embed(batch), batch.search_lengths, batch.rec_lengths, model.encoder.weights(),
        n_heads=2, dropout=Dropout(rate, 0, batch.row), backend=model.config.backend,
    )  # fmt: skip


def reason(model, batch, n_users=4, **changes):
    return ops.latent_reasoning(
        *(torch.ones(4, 3, 8),) * 2, batch.search_lengths[:n_users], batch.rec_lengths,
        model.reasoning.weights(), Steps(2, 2)._replace(**changes), backend=model.config.backend,
    )  # fmt: skip


CALLS = {
    "k must be an integer, got 2.5": lambda m, b: m.recommend(b, 2.5),
    "k must be an integer, got '3'": lambda m, b: m.recommend(b, "3"),
    r"exclude must be int64 \[4, X\], ids, got torch.bool": (
        lambda m, b: m.recommend(b, 3, b.candidates > 0)
    ),
    r"target must be int64 \[4\], got \[4, 5\]": (
        lambda m, b: m.target_rank(m.final_states(b), b, b.candidates)
    ),
    "item_text must be a tensor or an array, got list": lambda m, b: m.set_text([[0.0] * 3] * 13),
    **{
        f"item_text must hold real numbers, got {dtype}": (
            lambda m, b, dtype=dtype: m.set_text(np.ones((13, 3), dtype))
        )
        for dtype in ("complex64", "object", "bool")
    },
    **{
        f"scale must be finite and not negative, got {scale}": (
            lambda m, b, scale=scale: m.rollout(m.encode(b), b, 2, scale, 1)
        )
        for scale in (-1.0, math.nan, math.inf)
    },
    **{
        rf"dropout's rate must be in \[0, 1\), got {rate}": (
            lambda m, b, rate=rate: encode(m, b, rate)
        )
        for rate in (1.5, -0.25, 1.0, 0.999999, math.nan)
    },
    "update must be jacobi or search_first or rec_first, got 'Jacobi'": (
        lambda m, b: reason(m, b, update="Jacobi")
    ),
    "cross_memory must be post_msa or step_input or initial, got 'foo'": (
        lambda m, b: reason(m, b, cross_memory="foo")
    ),
    r"embedding must be \[2, 2, 8\], got \[1, 2, 8\]": (
        lambda m, b: reason(m, b, embedding=torch.ones(1, 2, 8))
    ),
    r"search_lengths must be integers \[4\], got torch.int64 \[3\]": (
        lambda m, b: reason(m, b, n_users=3)
    ),
    "scores must be a tensor, got ndarray": lambda m, b: ranking_metrics(
        np.ones((2, 3)), b.target[:2], metrics=("mrr",)
    ),
    "target must be a tensor, got list": lambda m, b: ranking_metrics(
        torch.ones(2, 3), [0, 1], metrics=("mrr",)
    ),
    "users must be a tensor, got ndarray": lambda m, b: ops.catalogue_rank(
        np.ones((2, 3)), torch.ones(4, 3), b.target[:2]
    ),
}


@pytest.mark.parametrize("message", CALLS)
def test_a_call_is_refused(case, message):
    with pytest.raises(ValueError, match=message):
        CALLS[message](*case)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_torch_func_would_map_is_refused_by_name(case):
    model, batch = case
    stacked = {name: torch.stack([p, p]) for name, p in model.state_dict().items()}

    def ensemble():
        def run(parameters):
            return torch.func.functional_call(model, parameters, (batch,))

        return torch.func.vmap(run)(stacked)

    if model.config.backend == "reference":
        torch.testing.assert_close(ensemble(), model(batch).expand(2, -1, -1))
    else:
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"not mapped by torch.func.vmap"):
            ensemble()


def test_tensors_without_numbers_are_refused(case):
    """Torch would take them for what is to be traced, and return memory that nobody wrote."""
    model, batch = case
    if model.config.backend == "reference":
        pytest.skip("torch refuses to compute with them")
    bias = model.head.mlp_biases[0]
    model.head.mlp_biases[0] = torch.nn.Parameter(bias.to("meta"))
    try:
        with pytest.raises(ValueError, match=r"score got mlp_biases on the meta device"):
            model(batch)
    finally:
        model.head.mlp_biases[0] = bias
    batch = batch.replace(search_lengths=batch.search_lengths.to("meta"))
    for name, call in (("encode", lambda b: encode(model, b, 0.0)), ("request", Scorer(model))):
        with pytest.raises(ValueError, match=f"{name} got search_lengths on the meta device"):
            call(batch)
