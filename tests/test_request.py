"""A request by one call: the bits of the model's own forward, whatever the config and the batch."""

import dataclasses

import pytest
import torch

from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER
from lcr_fast.ops import ranking
from lcr_fast.ops._extension import extension_error
from lcr_fast.serving.scorer import DTYPES, Scorer, fastest, obstacle
from lcr_fast.testing import assert_parity, random_batch, random_model
from test_cpu_reasoning import LOGITS

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


TEXTS = [
    {"item_text_dim": 6, "query_text_dim": 5},
    {"query_text_dim": 5, "score": "dot"},
    {"item_text_dim": 6, "query_text_dim": 5, "query_encoder": "id", "steps": 0},
]


def make(**changes):
    """Make a model, with its text vectors if it reads any."""
    generator = torch.Generator().manual_seed(0)
    model = random_model(CONFIG.replace(**changes), generator, torch.float32)
    config = model.config
    rows = {"item": config.n_items + 1, "query": config.n_queries + 1}
    for kind, n in rows.items():
        if width := getattr(config, f"{kind}_text_dim"):
            model.set_text(**{f"{kind}_text": torch.randn(n, width, generator=generator)})
    return model


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


@pytest.mark.parametrize("changes", TEXTS, ids=str)
def test_texts_are_projected_once(changes):
    """For all ids at a time, which torch may round otherwise than for those of a batch."""
    model = make(**changes)
    scorer, moved = Scorer(model), make(**changes)
    with torch.no_grad():
        for name, projection in moved.named_parameters():
            if "text_projection" in name:
                projection.mul_(1.5)
        for batch in batches(model.config):
            expected = model(batch)
            torch.testing.assert_close(scorer(batch), expected, rtol=1e-5, atol=1e-5)
            if len(batch) > 5 and batch.candidates.shape[1] > 5:
                assert not torch.allclose(moved(batch), expected, rtol=1e-3, atol=1e-3)


def test_texts_must_be_set():
    model = random_model(
        CONFIG.replace(query_text_dim=5), torch.Generator().manual_seed(0), torch.float32
    )
    with pytest.raises(ValueError, match="call set_text"):
        Scorer(model)


@pytest.mark.parametrize(
    "changes", [*CONFIGS, TEXTS[0], {"dim": 18, "n_heads": 3, "mlp_hidden": (7,)}], ids=str
)
def test_bfloat16_is_as_accurate_as_the_reference_in_bfloat16(changes):
    """Products round their factors, and nothing else: the reference rounds every result."""
    model = make(**changes)
    eager = make(**changes, backend="reference").bfloat16()
    exact = make(**changes, backend="reference").double()
    scorer = Scorer(model, dtype=torch.bfloat16)
    with torch.no_grad():
        for batch in batches(model.config):
            batch = batch.replace(candidates=batch.candidates.clamp(min=1))
            found = scorer(batch)
            assert_parity("scores", found, eager(batch).float(), exact(batch), factor=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"dim": 19, "n_heads": 1, "user_embedding": True}], ids=str
)
def test_same_bits_alone_on_two_threads_and_with_kept_items(changes, dtype):
    model = make(**changes)
    scorer = Scorer(model, dtype=dtype, keep_items=True)
    others = (Scorer(model, 2, dtype=dtype), Scorer(model, dtype=dtype, keep_items=False))
    for batch in batches(model.config):
        expected = scorer(batch)
        for other in others:
            assert torch.equal(other(batch), expected)
        for b in range(0, len(batch), 7):
            alone = batch.replace(
                **{
                    field.name: getattr(batch, field.name)[b : b + 1]
                    for field in dataclasses.fields(batch)
                }
            )
            assert torch.equal(scorer(alone)[0], expected[b])


BFLOAT16 = """
import hashlib
import torch
import test_request as t
from lcr_fast.ops.request import Request
model = t.make(dim=33, n_heads=1)
scorer = t.Scorer(model, dtype=torch.bfloat16)
packed = dict(zip(Request._fields[8:], scorer._rest))["weights"]
print(hashlib.sha256(packed.numpy()).hexdigest())
for batch in t.batches(model.config):
    print(hashlib.sha256(scorer(batch).numpy()).hexdigest())
t.test_bfloat16_is_as_accurate_as_the_reference_in_bfloat16({"dim": 33, "n_heads": 1})
for dtype in t.DTYPES:
    for logits in t.LOGITS:
        t.test_logits_that_are_no_numbers_give_nan_scores(logits, dtype)
print(scorer.describe())
"""


def test_bfloat16_on_every_instruction_set(run_code):
    """Packed weights are the same on all; vectors of the same width give the instruction's bits."""
    found = {}
    for level in ranking.CPU_LEVELS[: ranking.CPU_LEVELS.index(ranking.cpu_level()) + 1]:
        done = run_code(BFLOAT16, LCR_FAST_CPU=level)
        assert done.returncode == 0, done.stderr
        packed, *scores, described = done.stdout.splitlines()
        found[level] = scores
        assert packed == found.setdefault("packed", packed)
        assert f"instructions {level}" in described
        assert ("slower than float32" in described) == (level != "avx512bf16")
    if "avx512bf16" in found:
        assert found["avx512"] == found["avx512bf16"] != found["baseline"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_weights_give_nan(dtype):
    model = make()
    with torch.no_grad():
        model.head.weights().mlp_weights[0].fill_(torch.nan)
    batch = next(batches(model.config))
    assert Scorer(model, dtype=dtype)(batch)[batch.candidates > 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
def test_logits_that_are_no_numbers_give_nan_scores(logits, dtype):
    for part, name in (("encoder", "qkv_bias"), ("reasoning", "cross_qkv_bias")):
        model = make()
        batch = next(batches(model.config))
        batch = batch.replace(  # so that each history attends to the other
            search_lengths=batch.search_lengths.clamp(min=1),
            rec_lengths=batch.rec_lengths.clamp(min=1),
        )
        with torch.no_grad():
            LOGITS[logits](getattr(getattr(model, part).weights(), name))
            assert Scorer(model, dtype=dtype)(batch)[batch.candidates > 0].isnan().all()


def test_what_a_scorer_says_of_itself():
    model = make(n_items=2000, mlp_hidden=(128,))
    assert Scorer(model).describe() == (
        f"products in float32, instructions {ranking.cpu_level()}; "
        "1.0 MiB kept of the items' first layer"
    )
    rounded = Scorer(model, dtype=torch.bfloat16).describe()
    assert rounded.startswith("products in bfloat16, instructions ")
    assert rounded.endswith("; nothing kept of the items' first layer")
    assert Scorer(model, keep_items=False).kept_bytes == 0
    assert Scorer(make(score="dot"), keep_items=True).kept_bytes == 0


def test_much_is_not_kept_unasked(monkeypatch):
    monkeypatch.setattr("lcr_fast.serving.scorer._SMALL", 201 * 8 * 4 - 1)
    assert Scorer(make()).kept_bytes == 0
    monkeypatch.setattr("lcr_fast.serving.scorer._SMALL", 201 * 8 * 4)
    assert Scorer(make()).kept_bytes == 201 * 8 * 4
    assert Scorer(make(), dtype=torch.bfloat16).kept_bytes == 0


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
    ],
)
def test_what_one_call_cannot_serve(changes, why):
    model = make(**changes)
    assert obstacle(model) == why
    with pytest.raises(ValueError, match=f"one call cannot serve this model: {why}"):
        Scorer(model)


class Other(LCRSER):
    def score(self, states, batch, candidates=None):
        return super().score(states, batch, candidates) + 1


def test_what_computes_something_else_is_not_replaced():
    model = make()
    other = Other(model.config)
    assert obstacle(other) == "its class Other may compute something else than LCRSER"
    assert fastest(other) is other
    hook = model.encoder.register_forward_hook(lambda *_: None)
    assert obstacle(model) == "it has hooks, which one call would not run"
    hook.remove()
    assert isinstance(fastest(model), Scorer)


def test_tables_may_be_strided():
    model = make()
    batch = random_batch(model.config, 3, 4, torch.Generator().manual_seed(0))
    expected = Scorer(model)(batch)
    for table in (model.item_embedding, model.query_embedding):
        table.weight.data = table.weight.data.T.contiguous().T
        assert not table.weight.is_contiguous()
    assert torch.equal(Scorer(model)(batch), expected)


def test_it_computes_float32_on_any_thread_but_none():
    assert obstacle(make().bfloat16()) == "it computes float32, not torch.bfloat16"
    for n_threads in (0, 1.5):
        with pytest.raises(ValueError, match=f"integer of at least 1, got {n_threads}"):
            Scorer(make(), n_threads)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not torch\.float16"):
        Scorer(make(), dtype=torch.float16)


def test_bfloat16_is_never_replaced_by_something_else():
    model = make(update="rec_first", backend="auto")
    assert fastest(model) is model
    with pytest.raises(ValueError, match="one call cannot serve this model: it has no update"):
        fastest(model, torch.bfloat16)


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
