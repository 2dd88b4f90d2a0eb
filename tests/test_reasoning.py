"""Encoders, reasoning, aggregation and head: the reference against the oracle, and its facts.

Inputs carry NaN behind every length, so each test also shows that padding is not read.
"""

import functools

import pytest
import torch
from torch import Tensor

import oracle
from lcr_fast import LCRConfig, ops, reference
from lcr_fast.ops._extension import extension_error
from lcr_fast.ops._op import INTEGERS
from lcr_fast.ops.adaptive import adaptive_reasoning
from lcr_fast.ops.noise import Dropout, Noise
from lcr_fast.reference import Exits, Steps, length_mask
from lcr_fast.reference.transformer import key_bias
from lcr_fast.testing import random_streams, random_weights
from lcr_fast.weights import REC, SEARCH

TINY = LCRConfig(
    n_items=5, dim=6, n_heads=3, ffn_dim=4, steps=2, max_search_len=3, max_rec_len=5,
    mlp_hidden=(5, 3), score="mlp", user_embedding=True,
)  # fmt: skip
SHAPES = {
    "D=6 H=3": {},
    "D=10 H=2, longer searches": {"dim": 10, "n_heads": 2, "max_search_len": 4, "max_rec_len": 2},
    "D=4 H=1, one event": {"dim": 4, "n_heads": 1, "max_search_len": 1, "max_rec_len": 1},
}
SWITCHES = [
    {"steps": 0},
    {"steps": 1},
    {"steps": 3},
    {"steps": 3, "share_steps": False},
    {"step_ffn": False},
    {"step_embedding": True},
    *(
        {"update": update, "cross_memory": memory}
        for update in ("jacobi", "search_first", "rec_first")
        for memory in ("post_msa", "step_input", "initial")
    ),
    {"update": "rec_first", "cross_memory": "step_input", "step_ffn": False,
     "step_embedding": True, "share_steps": False},
]  # fmt: skip


def name_of(changes: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in changes.items()) or "default"


def make_case(config: LCRConfig, seed: int = 0, n_users: int = 7):
    """Weights, streams [B, L, D] and their lengths [B]."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(config, generator)
    search, rec, *lengths = random_streams(config, n_users, generator)
    return weights, (search, rec), tuple(lengths)


def steps_of(config: LCRConfig, seed: int = 1) -> Steps:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.steps, 2, config.dim)
    embedding = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Steps(
        config.steps,
        config.n_heads,
        embedding if config.step_embedding else None,
        config.update,
        config.cross_memory,
    )


def events(x: Tensor, lengths: Tensor, b: int) -> list:
    """Vectors of one user's events, for the oracle."""
    return list(x[b, : lengths[b]].numpy())


def assert_history(actual: Tensor, expected: list, place: str) -> None:
    """Compare [L, D] with the oracle's events; padding must be exactly 0."""
    assert not actual[len(expected) :].any(), f"{place}: padding is not 0"
    for j, vector in enumerate(expected):
        torch.testing.assert_close(
            actual[j],
            torch.from_numpy(vector),
            rtol=1e-10,
            atol=1e-10,
            msg=lambda text, j=j: f"{place}, event {j}: {text}",
        )


# -- against the oracle -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_layers", [1, 2])
@torch.no_grad()
def test_encode_matches_the_oracle(shape, n_layers):
    config = TINY.replace(**SHAPES[shape], n_layers=n_layers)
    (weights, _, _), streams, lengths = make_case(config)
    for x in (SEARCH, REC):
        h = reference.encode(streams[x], lengths[x], weights, x, n_heads=config.n_heads)
        for b in range(len(h)):
            expected = oracle.encode(
                events(streams[x], lengths[x], b), oracle.packed(weights), x, config.n_heads
            )
            assert_history(h[b], expected, f"stream {x}, user {b}")


@pytest.mark.parametrize(
    ("shape", "switches"),
    [*((s, {}) for s in SHAPES), *(("D=6 H=3", switches) for switches in SWITCHES)],
    ids=lambda v: v if isinstance(v, str) else name_of(v),
)
@torch.no_grad()
def test_latent_reasoning_matches_the_oracle(shape, switches):
    config = TINY.replace(**SHAPES[shape], **switches)
    (_, weights, _), streams, lengths = make_case(config)
    steps = steps_of(config)
    states = reference.latent_reasoning(*streams, *lengths, weights, steps)
    assert len(states.h) == config.steps + 1
    assert len(states.a) == config.steps
    for b in range(len(lengths[0])):
        after, before = oracle.reason(
            tuple(events(streams[x], lengths[x], b) for x in (SEARCH, REC)),
            oracle.packed(weights),
            config.steps,
            config.n_heads,
            update=config.update,
            cross_memory=config.cross_memory,
            step_embedding=None if steps.embedding is None else steps.embedding.numpy(),
        )
        for x in (SEARCH, REC):
            for k in range(config.steps):
                assert_history(states.a[k][x][b], before[k][x], f"a, step {k}, {x}, user {b}")
            for k in range(config.steps + 1):
                assert_history(states.h[k][x][b], after[k][x], f"h, step {k}, {x}, user {b}")


@pytest.mark.parametrize("head", ["mlp", "mlp without user", "dot"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_score_matches_the_oracle(shape, head):
    config = TINY.replace(
        **SHAPES[shape], score=head.split()[0], user_embedding=head != "mlp without user"
    )
    (_, _, weights), streams, lengths = make_case(config)
    generator = torch.Generator().manual_seed(2)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    items, user = draw(7, 4, config.dim), draw(7, config.dim)
    user = None if head == "mlp without user" else user
    scores = reference.score(*streams, *lengths, items, user, weights)
    z, alpha = reference.aggregate(streams[REC], lengths[REC], items, weights.target_weight[REC])
    for b in range(7):
        h = tuple(events(streams[x], lengths[x], b) for x in (SEARCH, REC))
        for i in range(4):
            vector = items[b, i].numpy()
            z_i, alpha_i = oracle.aggregate(h[REC], vector, weights.target_weight[REC].numpy())
            torch.testing.assert_close(z[b, i], torch.from_numpy(z_i), rtol=1e-10, atol=1e-10)
            if len(alpha_i):
                padded = torch.zeros(config.max_rec_len, dtype=torch.float64)
                padded[: len(alpha_i)] = torch.from_numpy(alpha_i)
                torch.testing.assert_close(alpha[b, i], padded, rtol=1e-10, atol=1e-10)
            e_u = None if user is None else user[b].numpy()
            expected = oracle.score(h, vector, e_u, oracle.packed(weights))
            assert scores[b, i].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_bias_of_padding_has_room_for_logits(dtype):
    """Of a history without events all logits are biased: none may become infinite."""
    bias = key_bias(torch.tensor([0, 2]), 3, dtype)
    logits = torch.linspace(-1000, 1000, 9, dtype=dtype).view(-1, 1, 1, 1)
    assert torch.isfinite(logits + bias).all()
    assert ((logits + bias).softmax(-1)[:, 1, 0, 2] == 0).all()


@torch.no_grad()
def test_attention_probabilities_are_those_of_attention():
    (weights, _, _), (search, rec), (_, n_r) = make_case(TINY)
    search, rec = search.nan_to_num(), rec.nan_to_num()
    qkv_weight, qkv_bias = weights.qkv_weight[0, 0], weights.qkv_bias[0, 0]
    p = reference.attention_probabilities(search, rec, n_r, qkv_weight, qkv_bias, TINY.n_heads)
    some = n_r > 0
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    assert not (p[some] * ~length_mask(n_r, 5)[some, None, None]).any()

    values = (rec @ qkv_weight[12:].T + qkv_bias[12:]).unflatten(-1, (3, 2)).transpose(1, 2)
    heads = (p @ values).transpose(1, 2).flatten(2)
    eye, zero = torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    expected = reference.attention(search, rec, n_r, qkv_weight, qkv_bias, eye, zero, TINY.n_heads)
    torch.testing.assert_close(heads[some], expected[some], rtol=1e-12, atol=1e-12)


# -- facts --------------------------------------------------------------------------------------


def run_all(config: LCRConfig, weights, streams, lengths, items, user) -> list[Tensor]:
    """Encode, reason and score: every result, padding included."""
    encoder, step, head = weights
    h0 = tuple(
        reference.encode(streams[x], lengths[x], encoder, x, n_heads=config.n_heads)
        for x in (SEARCH, REC)
    )
    states = reference.latent_reasoning(*h0, *lengths, step, steps_of(config))
    flat = [t for pair in (*states.h, *states.a) for t in pair]
    return [*flat, reference.score(*states.h[-1], *lengths, items, user, head)]


@pytest.fixture
def case():
    weights, streams, lengths = make_case(TINY)
    generator = torch.Generator().manual_seed(3)
    items = torch.randn(7, 4, 6, generator=generator, dtype=torch.float64)
    user = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    return weights, streams, lengths, items, user


@pytest.mark.parametrize("switches", SWITCHES, ids=name_of)
@pytest.mark.parametrize("filler", [torch.inf, 3.0])
@torch.no_grad()
def test_padding_content_changes_no_bit(switches, filler):
    config = TINY.replace(**switches)
    weights, streams, lengths = make_case(config)
    items, user = torch.randn(7, 4, 6).double(), torch.randn(7, 6).double()
    filled = tuple(torch.where(x.isnan(), filler, x) for x in streams)
    for poisoned, other in zip(
        run_all(config, weights, streams, lengths, items, user),
        run_all(config, weights, filled, lengths, items, user),
        strict=True,
    ):
        assert torch.isfinite(poisoned).all()
        assert torch.equal(poisoned, other)


@torch.no_grad()
def test_shared_candidates_equal_repeated_ones(case):
    (_, _, head), streams, lengths, items, user = case
    shared = reference.score(*streams, *lengths, items[:1], user, head)
    repeated = reference.score(*streams, *lengths, items[:1].expand(7, -1, -1), user, head)
    torch.testing.assert_close(shared, repeated, rtol=1e-12, atol=1e-12)


# -- gradients ----------------------------------------------------------------------------------

GRADIENT_CASES = [
    {},
    {"steps": 2, "share_steps": False, "step_embedding": True},
    {"step_ffn": False, "update": "search_first"},
    {"steps": 2, "update": "rec_first", "cross_memory": "step_input"},
    {"steps": 2, "cross_memory": "initial"},
]


def gradcheck(function, tensors: list[Tensor]) -> None:
    """Check a random projection of the results, along a random direction of each input.

    Inputs are NaN behind their lengths: they must not be read, and their gradient must be 0.
    """
    generator = torch.Generator().manual_seed(9)
    upstream: list[Tensor] = []

    def projected(*inputs):
        results = function(*inputs)
        if not upstream:
            upstream.extend(
                torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in results
            )
        return sum((t * d).sum() for t, d in zip(results, upstream, strict=True))

    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(projected, leaves, fast_mode=True)
    gradients = torch.autograd.grad(projected(*leaves), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient is None or not gradient[leaf.isnan()].any()


def gradient_setup(switches: dict):
    config = TINY.replace(
        dim=4, n_heads=2, ffn_dim=3, steps=1, max_search_len=2, max_rec_len=3, mlp_hidden=(3, 2)
    ).replace(**switches)
    return config, *make_case(config, n_users=5)


@pytest.mark.parametrize("stream", [SEARCH, REC])
def test_gradients_of_encode(stream):
    _, (weights, _, _), streams, lengths = gradient_setup({})

    def function(x, *w):
        return [reference.encode(x, lengths[stream], type(weights)(*w), stream, n_heads=2)]

    gradcheck(function, [streams[stream], *weights])


@pytest.mark.parametrize("switches", GRADIENT_CASES, ids=name_of)
def test_gradients_of_latent_reasoning(switches):
    config, (_, weights, _), streams, lengths = gradient_setup(switches)
    steps = steps_of(config)
    embedding = steps.embedding

    def function(search, rec, *w):
        states = reference.latent_reasoning(
            search,
            rec,
            *lengths,
            type(weights)(*w[: len(weights)]),
            steps if embedding is None else steps._replace(embedding=w[-1]),
        )
        return [t for pair in (*states.h, *states.a) for t in pair]

    gradcheck(function, [*streams, *weights, *([] if embedding is None else [embedding])])


@pytest.mark.parametrize("head", ["mlp", "dot"])
def test_gradients_of_score(head):
    _, (_, _, weights), streams, lengths = gradient_setup({"score": head})
    generator = torch.Generator().manual_seed(4)
    items = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    user = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    n = len(weights.mlp_weights)

    def function(search, rec, items, user, target_weight, *mlp):
        w = type(weights)(target_weight, mlp[:n], mlp[n:])
        return [reference.score(search, rec, *lengths, items, user, w)]

    head_tensors = [weights.target_weight, *weights.mlp_weights, *weights.mlp_biases]
    # The dot head has no weights of its own and reads no user vector.
    gradcheck(function, [*streams, items, user, *head_tensors])


# -- halves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_halves_are_computed_in_float32_and_rounded_once(dtype, case):
    weights, streams, lengths, items, user = case

    def cast(value, *dtypes):
        if isinstance(value, Tensor):
            for d in dtypes:
                value = value.to(d)
            return value
        if isinstance(value, bool):
            return value
        parts = [cast(v, *dtypes) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)

    inputs = (
        ((streams, weights, items, user), (dtype,)),
        ((streams, weights, items, user), (dtype, torch.float32)),
    )
    results = []
    for values, dtypes in inputs:
        x, (encoder, step, head), e, u = cast(values, *dtypes)
        states = reference.latent_reasoning(*x, *lengths, step, Steps(2, 3))
        results.append(
            [
                reference.encode(x[REC], lengths[REC], encoder, REC, n_heads=3),
                *(t for pair in (*states.h, *states.a) for t in pair),
                *reference.aggregate(x[SEARCH], lengths[SEARCH], e, head.target_weight[SEARCH]),
                reference.score(*x, *lengths, e, u, head),
            ]
        )
    for half, single in zip(*results, strict=True):
        assert half.dtype == dtype
        assert torch.equal(half, single.to(dtype))


# -- what the ops refuse --------------------------------------------------------------------------


def test_ops_refuse_what_does_not_fit(case):
    (encoder, step, head), (search, rec), (n_s, n_r), items, user = case
    encode = functools.partial(ops.encode, weights=encoder, n_heads=3)
    reason = functools.partial(ops.latent_reasoning, weights=step, steps=Steps(2, 3))
    calls = {
        r"search must be \[\.\.\., L, 6\]": lambda: encode(search[..., :4], rec, n_s, n_r),
        "rec must be floating point": lambda: encode(search, rec.nan_to_num().long(), n_s, n_r),
        "search_lengths must be integers": lambda: encode(search, rec, n_s.double(), n_r),
        "search_lengths must be integers.*, got torch.bool": lambda: reason(
            search, rec, n_s.bool(), n_r
        ),
        "rec_lengths must be integers .*, got torch.bool": lambda: ops.score(
            search, rec, n_s, n_r.bool(), items, user, head
        ),
        "n_heads must divide the width 6, got 4": lambda: encode(
            search, rec, n_s, n_r, n_heads=4
        ),
        "agree in dtype and leading axes, got": lambda: encode(search, rec[:3], n_s, n_r[:3]),
        r"rec must be \[\.\.\., L, 6\]": lambda: reason(search, rec[..., :4], n_s, n_r),
        "rec_lengths must be integers": lambda: reason(search, rec, n_s, n_r[None]),
        "agree in dtype and leading axes": lambda: reason(search, rec[:3], n_s, n_r[:3]),
        "agree in dtype": lambda: reason(search, rec.float(), n_s, n_r),
        "steps must be": lambda: reason(search, rec, n_s, n_r, steps=Steps(-1, 3)),
        r"candidates must be item vectors of width 6": lambda: ops.score(
            search, rec, n_s, n_r, items[..., :2], user, head
        ),
        r"dropout needs states \[B, L, D\], got \[7, 1, 3, 6\]": lambda: reason(
            search[:, None], rec[:, None], n_s[:, None], n_r[:, None],
            dropout=Dropout(0.1, 0, torch.arange(7)),
        ),
        "dropout needs states": lambda: ops.score(
            search[:, None], rec[:, None], n_s, n_r, items, user, head,
            dropout=Dropout(0.1, 0, torch.arange(7)),
        ),
        r"rows must be int64 \[7\], got torch.int64 \[3\]": lambda: encode(
            search, rec, n_s, n_r, dropout=Dropout(0.1, 0, torch.arange(3))
        ),
        r"rows must be int64 \[7\], got torch.int32 \[7\]": lambda: reason(
            search, rec, n_s, n_r, dropout=Dropout(0.1, 0, torch.arange(7, dtype=torch.int32))
        ),
        "n_trajectories must be at least 1": lambda: reason(
            search, rec, n_s, n_r, noise=Noise(0, 1.0, 0, torch.arange(7))
        ),
        r"rows must be int64 \[7\], got torch.int64 \[6\]": lambda: reason(
            search, rec, n_s, n_r, noise=Noise(2, 1.0, 0, torch.arange(6))
        ),
        r"noise needs states \[B, L, D\], got \[7, 1, 3, 6\]": lambda: reason(
            search[:, None], rec[:, None], n_s[:, None], n_r[:, None],
            noise=Noise(2, 1.0, 0, torch.arange(7)),
        ),
        "noise goes with neither dropout nor target_keys": lambda: reason(
            search, rec, n_s, n_r, noise=Noise(2, 1.0, 0, torch.arange(7)),
            target_keys=search[:, :2],
        ),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@torch.no_grad()
def test_lengths_are_integers_of_any_kind(backend, dtype):
    if backend == "cpp" and extension_error() is not None:
        pytest.skip(f"lcr_fast._C is not built: {extension_error()}")
    generator = torch.Generator().manual_seed(0)
    encoder, step, head = random_weights(TINY, generator, torch.float32)
    *streams, n_search, n_rec = random_streams(TINY, 7, generator, torch.float32)
    items = torch.ones(7, 2, 6)
    user, steps = items[:, 0], Steps(2, 3)
    exits = Exits(torch.ones(2 * 6 + 2), torch.zeros(2))
    options = {"backend": backend}

    def run(n_s, n_r):
        streams_and_lengths = (*streams, n_s, n_r)
        yield from ops.encode(*streams_and_lengths, encoder, n_heads=3, **options)
        rows = torch.arange(len(n_s))
        for drawn in ({}, {"noise": Noise(2, 1.0, 0, rows)}, {"dropout": Dropout(0.1, 0, rows)}):
            yield from ops.latent_reasoning(
                *streams_and_lengths, step, steps, **drawn, **options
            ).streams
        yield from adaptive_reasoning(*streams_and_lengths, step, steps, exits, **options)
        yield ops.score(*streams_and_lengths, items, user, head, **options)

    for given, expected in zip(
        run(n_search.to(dtype), n_rec.to(dtype)), run(n_search, n_rec), strict=True
    ):
        assert torch.equal(given, expected)


def test_ops_refuse_more_steps_than_sets_of_weights():
    (_, step, _), (search, rec), lengths = make_case(TINY.replace(share_steps=False))
    with pytest.raises(ValueError, match=r"steps must be 0\.\.2 for 2 sets of weights, got 3"):
        ops.latent_reasoning(search, rec, *lengths, step, Steps(3, 3))
