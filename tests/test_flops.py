"""Fused ops in torch's counter of FLOPs: what the reference counts for on the same shapes."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcr_fast import LCRSER, LCRConfig, ops
from lcr_fast.flops import register
from lcr_fast.ops._extension import extension_error
from lcr_fast.serving.scorer import Scorer
from lcr_fast.testing import random_batch, random_model

pytestmark = pytest.mark.skipif(extension_error() is not None, reason="needs the C++ extension")
CONFIG = LCRConfig(
    n_items=12, n_users=3, n_queries=4, n_terms=6, dim=8, n_heads=2, ffn_dim=12, n_layers=2,
    steps=3, max_search_len=3, max_rec_len=4, max_clicks=2, mlp_hidden=(9, 5),
    user_embedding=True, dropout=0.0, seen_bonus=False,
)  # fmt: skip
CHANGES = [
    {}, {"steps": 0}, {"step_ffn": False, "share_steps": False}, {"user_embedding": False},
    {"score": "dot", "user_embedding": False}, {"mlp_hidden": (6,), "score": "mlp"},
]  # fmt: skip


def counted(run) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    register()
    # The counter does not know torch's fused attention on CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def make(backend: str, **changes) -> tuple[LCRSER, object]:
    config = CONFIG.replace(backend=backend, **changes)
    generator = torch.Generator().manual_seed(0)
    return random_model(config, generator).float(), random_batch(config, 5, 6, generator)


def both(run, **changes) -> tuple[int, int]:
    fused, reference = make("cpp", **changes), make("reference", **changes)
    return counted(lambda: run(*fused)), counted(lambda: run(*reference))


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_training_step(changes):
    def run(model, batch):
        target = model.item_vectors(batch.candidates[:, 0])
        # Leaves that need gradients, so that the reference computes them all.
        h0 = tuple(x.requires_grad_() for x in model.encode(batch))
        reasoned = model.reason(h0, batch, target)
        loss = model.score(reasoned.streams, batch).sum()
        (loss if reasoned.pooled is None else loss + reasoned.pooled.sum()).backward()

    fused, reference = both(run, **changes)
    assert fused == reference > 0


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_requests_rollouts_and_the_catalogue(changes):
    with torch.no_grad():
        fused, reference = both(lambda m, b: m(b), **changes)
        assert fused == reference > 0
        model, batch = make("auto", **changes)
        assert counted(lambda: Scorer(model.eval())(batch)) == reference

        def roll_out(model, batch):
            h = model.rollout(model.encode(batch), batch, 3, 0.1, 1).streams
            model.score_vectors(h, batch, model.item_vectors(batch.candidates))

        def rank(model, batch):
            h = model.final_states(batch)
            model.target_rank(h, batch, batch.candidates[:, 0])
            model.best_items(h, batch, 3)

        for run in (roll_out, rank):
            fused, reference = both(run, **changes)
            assert fused == reference > 0


def test_ranks_in_a_catalogue_of_dot_products():
    users, items = torch.randn(3, 4), torch.randn(7, 4)
    target = torch.tensor([1, 2, 3])
    assert counted(lambda: ops.catalogue_rank(users, items, target)) == 2 * 3 * 7 * 4


def test_users_add_up_and_formulas_are_registered_once():
    register()
    register()  # again
    model, batch = make("cpp")
    doubled = dataclasses.replace(batch, **{
        f.name: torch.cat([getattr(batch, f.name)] * 2) for f in dataclasses.fields(batch)
    })  # fmt: skip
    with torch.no_grad():
        one, two = (counted(lambda b=b: model(b)) for b in (batch, doubled))
    assert two == 2 * one
