"""A request by one call: the bits of the model's own forward, whatever the config and the batch."""

import dataclasses

import pytest
import torch

from lcr_fast.config import LCRConfig
from lcr_fast.ops._extension import extension_error
from lcr_fast.serving.scorer import Scorer, obstacle
from lcr_fast.testing import assert_parity, random_batch, random_model

pytestmark = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)

CONFIG = LCRConfig(
    n_items=200, n_users=50, n_terms=40, n_queries=30, dim=64, steps=2, max_search_len=6,
    max_rec_len=7, max_clicks=3, mlp_hidden=(8, 4), backend="cpp",
)  # fmt: skip
CONFIGS = [
    {},
    {"dim": 128, "n_heads": 4, "n_layers": 2, "n_items": 900},
    {"steps": 0},
    {"user_embedding": True},
    {"query_encoder": "id"},
    {"readout": 0.3},
    {"readout": 0.7},
    {"score": "dot"},
    {"score": "mlp", "seen_bonus": False},
    {"share_steps": False, "step_ffn": False},
    {"max_clicks": 20},  # of which torch adds sixteen first
]
# (B, C, terms of a query)
SHAPES = [(6, 9, 3), (1, 100, 17), (40, 130, 40), (5, 5, 0), (0, 3, 3), (3, 0, 3)]


def make(**changes):
    return random_model(CONFIG.replace(**changes), torch.Generator().manual_seed(0), torch.float32)


def batches(config):
    generator = torch.Generator().manual_seed(1)
    for n_users, n_candidates, n_terms in SHAPES:
        batch = random_batch(config, n_users, n_candidates, generator, n_terms=n_terms)
        kept = torch.rand(batch.candidates.shape, generator=generator) < 0.9
        seen = torch.rand(batch.candidates.shape, generator=generator) < 0.3
        columns = torch.arange(n_candidates) % config.max_rec_len
        candidates = torch.where(seen, batch.rec_items[:, columns], batch.candidates) * kept
        yield batch.replace(candidates=candidates)


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_the_bits_of_the_models_forward(changes):
    model = make(**changes)
    with torch.no_grad():
        for n_threads in (1, 2):
            scorer = Scorer(model, n_threads)
            for batch in batches(model.config):
                assert torch.equal(scorer(batch), model(batch))


def test_other_widths():
    """There torch adds the vectors of many terms and clicks in another order."""
    model, eager, exact = (
        make(dim=16, max_clicks=9, backend=b) for b in ("cpp", "reference", "auto")
    )
    exact = exact.double()
    for batch in batches(model.config):
        batch = batch.replace(candidates=batch.candidates.clamp(min=1))
        with torch.no_grad():
            assert_parity("scores", Scorer(model)(batch), eager(batch), exact(batch))


def test_what_stands_behind_a_length_is_not_read():
    model = make()
    batch = next(batches(model.config))
    events = torch.arange(model.config.max_rec_len) >= batch.rec_lengths.unsqueeze(1)
    searches = torch.arange(model.config.max_search_len) >= batch.search_lengths.unsqueeze(1)
    other = batch.replace(
        rec_items=batch.rec_items.masked_fill(events, 9),
        search_terms=batch.search_terms.masked_fill(searches.unsqueeze(-1), 9),
        search_clicks=batch.search_clicks.masked_fill(searches.unsqueeze(-1), 9),
    )
    scorer = Scorer(model)
    assert torch.equal(scorer(other), scorer(batch))


def test_weights_are_those_of_its_making():
    model = make(user_embedding=True)
    batch = next(batches(model.config))
    scorer = Scorer(model)
    before = scorer(batch)
    with torch.no_grad():
        for layer in (model.encoder, model.reasoning, model.head):
            for parameter in layer.parameters():
                parameter.mul_(1.5)
        after = model(batch)
    assert not torch.equal(before, after)
    assert torch.equal(scorer(batch), before)
    assert torch.equal(Scorer(model)(batch), after)


def test_strided_ids():
    model = make()
    batch = next(batches(model.config))
    wide = {
        field.name: getattr(batch, field.name).repeat_interleave(2, -1)[..., ::2]
        for field in dataclasses.fields(batch)
    }
    assert torch.equal(Scorer(model)(batch.replace(**wide)), Scorer(model)(batch))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"backend": "reference"}, "its backend is reference"),
        ({"update": "rec_first", "backend": "auto"}, "it has no update='rec_first'"),
        ({"cross_memory": "initial", "backend": "auto"}, "it has no cross_memory='initial'"),
        ({"step_embedding": True, "backend": "auto"}, "it has no step embedding"),
        ({"item_text_dim": 3}, "it has no text vectors"),
    ],
)
def test_what_one_call_cannot_serve(changes, why):
    model = make(**changes)
    assert obstacle(model) == why
    with pytest.raises(ValueError, match=f"one call cannot serve this model: {why}"):
        Scorer(model)


def test_it_computes_float32_on_any_thread_but_none():
    assert obstacle(make().bfloat16()) == "it computes float32, not torch.bfloat16"
    with pytest.raises(ValueError, match="n_threads must be at least 1, got 0"):
        Scorer(make(), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("candidates", 201), ("rec_items", -1), ("search_terms", 41), ("search_lengths", 7)],
)
def test_ids_out_of_range(field, value):
    model = make()
    batch = next(batches(model.config))
    bad = getattr(batch, field).clone()
    bad.view(-1)[-1] = value
    with pytest.raises(RuntimeError, match=f"{field} must be in 0..[0-9]+, got {value}"):
        Scorer(model)(batch.replace(**{field: bad}))
