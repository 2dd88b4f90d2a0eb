"""Events' vectors and the bonus of seen items on Triton, against the model's own operations.

``triton`` runs where tests/where.py says.
"""

import contextlib
import math

import pytest
import torch
from torch import Tensor

import tensor_core
from graphs import Recorded
from lcr_fast.batch import Batch
from lcr_fast.capture import capture
from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER
from lcr_fast.ops import lookup
from lcr_fast.testing import assert_parity, random_batch, random_model
from where import DEVICE, HALVES, INTERPRETED

CONFIG = LCRConfig(
    n_items=20, n_users=3, n_queries=6, n_terms=9, dim=32, ffn_dim=32, steps=1, max_search_len=3,
    max_rec_len=4, max_clicks=3, mlp_hidden=(16, 16), backend="triton",
)  # fmt: skip
CASES = {
    "default": {},
    "query ids": {"query_encoder": "id"},
    "one click of several": {"max_clicks": 1},
    "an odd width": {"dim": 22, "n_heads": 2, "ffn_dim": 22},
    "a wide one": {"dim": 144, "n_heads": 2, "ffn_dim": 22},
    "no searches, no clicks": {"max_search_len": 0, "max_clicks": 0},
    "no events": {"max_rec_len": 0},
}

pytestmark = pytest.mark.gpu


def case(device: str = DEVICE, dtype: torch.dtype = torch.float32, **flags) -> lookup.LookupCase:
    return lookup.LookupCase(device, dtype, **flags)


@pytest.fixture(autouse=True)
def _served():
    if reason := lookup.EMBED.obstacles(case())["triton"]:
        pytest.skip(f"triton: {reason}")


def twins(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> dict[str, LCRSER]:
    """Make the same model thrice: on triton, on the reference, and that in float64.

    Only lookups ask these models' backends: no width and no dtype is refused.
    """
    config = CONFIG.replace(**{**changes, "backend": "auto"})
    drawn = random_model(config, torch.Generator().manual_seed(seed)).to(dtype)
    if drawn.head.seen_bonus is not None:
        with torch.no_grad():
            drawn.head.seen_bonus.copy_(torch.tensor([0.3, -0.7]))
    models = {}
    for name, backend, precision in (
        ("triton", "triton", dtype),
        ("reference", "reference", dtype),
        ("exact", "reference", torch.float64),
    ):
        model = LCRSER(config).to(dtype)
        model.load_state_dict(drawn.state_dict())
        model.config = config.replace(backend=backend)
        models[name] = model.to(DEVICE, precision).eval()
    return models


def draw(n_users: int, n_candidates: int = 5, n_terms: int = 3, seed: int = 0, **changes) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    config = CONFIG.replace(**changes)
    return random_batch(config, n_users, n_candidates, generator, n_terms=n_terms).to(DEVICE)


def draw_case(name: str, *sizes: int) -> Batch:
    """Draw a batch of one of the CASES. A tensor may hold more clicks than the model reads."""
    wide = {"max_clicks": 3} if name == "one click of several" else {}
    return draw(*sizes, **{**CASES[name], **wide})


def scores_like(batch: Batch, dtype: torch.dtype, n_trajectories: int = 0) -> Tensor:
    shape = [*batch.candidates.shape]
    shape[1:1] = [n_trajectories] * (n_trajectories > 0)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(DEVICE, dtype)


def assert_embeds(batch: Batch, dtype: torch.dtype = torch.float32, **changes) -> None:
    with torch.inference_mode():
        streams = {name: model.embed(batch) for name, model in twins(dtype, **changes).items()}
    for x, name in enumerate(("search", "rec")):
        of_stream = (streams[which][x] for which in ("triton", "reference", "exact"))
        assert_parity(name, *of_stream)


def assert_finishes(
    batch: Batch, dtype: torch.dtype = torch.float32, n_trajectories: int = 0, **changes
) -> None:
    scores, ids = scores_like(batch, dtype, n_trajectories), batch.candidates
    with torch.inference_mode():
        fused, eager, exact = (
            model.finish(scores.to(model.item_embedding.weight.dtype), batch, ids)
            for model in twins(dtype, **changes).values()
        )
    padding = ids == 0 if not n_trajectories else (ids == 0).unsqueeze(1).expand_as(fused)
    assert torch.equal(fused == -torch.inf, padding)
    kept = [t.masked_fill(padding, 0.0) for t in (fused, eager, exact)]
    assert_parity("scores", *kept)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Collect the names of the lookups that a backend serves."""
    names: list[str] = []
    run = lookup.Op.run

    def recorded(op, backend, name, *arguments):
        if op in (lookup.EMBED, lookup.SEEN_BONUS):
            names.append(f"{backend} {name}")
        return run(op, backend, name, *arguments)

    monkeypatch.setattr(lookup.Op, "run", recorded)
    return names


BOTH = ["triton embed_fwd", "triton seen_bonus_fwd"]
BACKWARD = ["triton seen_bonus_bwd", "triton embed_bwd"]


# -- events' vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_vectors_of_events(name):
    assert_embeds(draw_case(name, 3), **CASES[name])


@pytest.mark.parametrize("n_terms", [0, 1, 17])
def test_vectors_of_any_number_of_terms(n_terms):
    assert_embeds(draw(2, n_terms=n_terms))


@pytest.mark.parametrize("dtype", HALVES)
def test_vectors_in_half_precision(dtype):
    assert_embeds(draw(5), dtype)


def test_vectors_without_terms_or_clicks_are_positions():
    batch = draw(2)
    batch = batch.replace(
        search_terms=torch.zeros_like(batch.search_terms),
        search_clicks=torch.zeros_like(batch.search_clicks),
        rec_items=torch.zeros_like(batch.rec_items),
    )
    model = twins()["triton"]
    with torch.inference_mode():
        search, rec = model.embed(batch)
        assert torch.equal(search, model.search_position.expand_as(search))
        assert torch.equal(rec, model.rec_position.expand_as(rec))


def test_padding_is_not_read():
    batch, model = draw(3), twins()["triton"]
    with torch.no_grad():
        expected = model.embed(batch)
        for table in (model.item_embedding, model.query_embedding):
            table.weight[0] = torch.nan
        for stream, before in zip(model.embed(batch), expected, strict=True):
            assert torch.equal(stream, before)


def test_more_events_than_positions_are_refused():
    batch, model = draw(2, max_rec_len=5), twins()["triton"]
    with torch.inference_mode(), pytest.raises(ValueError, match="hold 5 events, but there are 4"):
        model.embed(batch)


# -- their gradients ------------------------------------------------------------------------------

TABLES = ("query_embedding.weight", "item_embedding.weight", "search_position", "rec_position")


def assert_gradients(batch: Batch, dtype: torch.dtype = torch.float32, **changes) -> None:
    """Hold the gradients of all tables to float64's, and row 0 of tables to 0."""
    generator = torch.Generator().manual_seed(2)
    upstream = [
        torch.randn(*events.shape[:2], changes.get("dim", CONFIG.dim), generator=generator)
        for events in (batch.search_queries, batch.rec_items)
    ]
    results = []
    for model in twins(dtype, **changes).values():
        tables = [model.get_parameter(name) for name in TABLES]
        weights = [u.to(DEVICE, tables[0].dtype) for u in upstream]
        torch.autograd.backward(model.embed(batch), weights)
        results.append([t.grad if t.grad is not None else torch.zeros_like(t) for t in tables])
    for name, *parts in zip(TABLES, *results, strict=True):
        assert_parity(name, *parts)
        if "weight" in name:
            assert not parts[0][0].any()


def rounding_of_tensor_cores(monkeypatch) -> contextlib.AbstractContextManager:
    """Multiply as a GPU does, in the interpreter too."""
    if not INTERPRETED:
        return contextlib.nullcontext()
    return tensor_core.multiplying(monkeypatch, "highest")


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_tables(name, launched):
    assert_gradients(draw_case(name, 9), **CASES[name])
    assert launched == [BOTH[0], BACKWARD[1]]


@pytest.mark.parametrize("n_terms", [0, 1, 17])
def test_gradients_of_any_number_of_terms(monkeypatch, n_terms):
    with rounding_of_tensor_cores(monkeypatch):
        assert_gradients(draw(2, n_terms=n_terms))


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_in_half_precision(dtype):
    assert_gradients(draw(5), dtype)


@pytest.mark.parametrize(
    ("n_users", "rec_len"), [(0, 4), (1, 4), (8, 4), (16, 4), (17, 4), (30, 40)]
)
def test_gradients_of_items_that_are_read_often(n_users, rec_len):
    """Of few items and terms: runs end within blocks of entries, at their ends, and far behind.

    The longest goes on through more blocks than are read at once: 32 of 32 entries.
    """
    few = {"n_items": 2, "max_search_len": 2, "max_rec_len": rec_len}
    batch = draw(n_users, n_terms=2, **few)
    batch.rec_items.fill_(2)
    batch.search_terms[:, 0].fill_(5)
    assert_gradients(batch, **few)


@pytest.mark.parametrize(
    "lengths", [(32,), (31, 1, 32), (33, 31), (64, 1), (1, 62, 1), (95, 1, 33)]
)
def test_gradients_of_runs_of_any_length(lengths):
    """Runs of so many entries, one behind the other."""
    items = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])
    sizes = {"max_search_len": 0, "max_rec_len": len(items)}
    batch = draw(1, **sizes).replace(rec_items=items[torch.randperm(len(items))].to(DEVICE)[None])
    assert_gradients(batch, **sizes)


def test_an_item_that_is_read_once_has_its_events_gradient(monkeypatch):
    """All 24 bits of it."""
    sizes = {"max_search_len": 0, "max_rec_len": CONFIG.n_items}
    items = 1 + torch.randperm(CONFIG.n_items, generator=torch.Generator().manual_seed(0))
    batch = draw(1, **sizes).replace(rec_items=items.to(DEVICE)[None])
    model = twins(**sizes)["triton"]
    with rounding_of_tensor_cores(monkeypatch):
        _, rec = model.embed(batch)
        upstream = torch.randn(rec.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        rec.backward(upstream)
    assert torch.equal(model.item_embedding.weight.grad[batch.rec_items], upstream)


@pytest.mark.full  # whatever the interpreter runs, it runs in order
def test_gradients_have_the_same_bits_each_time():
    batch, found = draw(60, n_items=3), []
    for _ in range(2):
        model = twins(n_items=3)["triton"]
        search, rec = model.embed(batch)
        (search.square().sum() + rec.square().sum()).backward()
        found.append(model.item_embedding.weight.grad)
    assert torch.equal(*found)


# -- the bonus of seen items ----------------------------------------------------------------------


@pytest.mark.parametrize("n_trajectories", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_bonus_of_seen_items(name, n_trajectories):
    batch = draw_case(name, 5, 9)
    batch.candidates[:, 2] = 0
    assert_finishes(batch, n_trajectories=n_trajectories, **CASES[name])


@pytest.mark.parametrize("n_candidates", [0, 1, 32, 45])
def test_bonus_of_any_number_of_candidates(n_candidates):
    assert_finishes(draw(2, n_candidates))


@pytest.mark.parametrize("dtype", HALVES)
def test_bonus_in_half_precision(dtype):
    assert_finishes(draw(5, 40), dtype)


def test_bonus_over_several_blocks_of_long_histories():
    sizes = {"max_search_len": 40, "max_rec_len": 130, "n_items": 600}
    assert_finishes(draw(3, 20, **sizes), **sizes)


def seen_bonus(batch: Batch, **changes: Tensor) -> Tensor:
    """Give what a score of 0 becomes, the bonus being 1 and 2."""
    candidates = changes.pop("candidates", batch.candidates)
    batch = batch.replace(**changes)
    scores = torch.zeros(len(batch), 1, candidates.shape[1], device=DEVICE)
    call = lookup.SeenBonus(
        scores, candidates, batch.search_clicks, batch.search_lengths, batch.rec_items,
        batch.rec_lengths, torch.tensor([0.25, 0.5], device=DEVICE), 4.0, 2,
    )  # fmt: skip
    return lookup.SEEN_BONUS("triton", call).squeeze(1)


def test_what_counts_as_seen():
    """Behind a length and behind the clicks that are read nothing counts, twice counts once."""
    batch = draw(2, 1).replace(
        rec_items=torch.tensor([[3, 3, 4, 9], [0, 0, 0, 0]], device=DEVICE),
        rec_lengths=torch.tensor([3, 0], device=DEVICE),
        search_clicks=torch.tensor([[[3, 5, 6], [5, 5, 0], [7, 0, 0]]] * 2, device=DEVICE),
        search_lengths=torch.tensor([2, 0], device=DEVICE),
    )
    ids = torch.tensor([[0, 3, 4, 5, 6, 7, 9, 3]], device=DEVICE)
    inf = math.inf
    expected = [[-inf, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 3.0], [-inf, *[0.0] * 7]]
    assert seen_bonus(batch, candidates=ids).tolist() == expected  # shared by the users
    assert seen_bonus(batch, candidates=ids.expand(2, -1)).tolist() == expected


def test_ids_are_compared_in_all_their_bits():
    far = 2**32
    batch = draw(1, 1).replace(
        rec_items=torch.tensor([[far + 5, 7]], device=DEVICE),
        rec_lengths=torch.tensor([2], device=DEVICE),
        search_lengths=torch.tensor([0], device=DEVICE),
    )
    ids = torch.tensor([[5, far + 5, far + 7, far]], device=DEVICE)
    assert seen_bonus(batch, candidates=ids).tolist() == [[0.0, 2.0, 0.0, 0.0]]


# -- both -----------------------------------------------------------------------------------------


def test_no_bit_depends_on_the_batch():
    batch, model = draw(4, 40), twins()["triton"]
    scores, users = scores_like(batch, torch.float32), [slice(i, i + 1) for i in range(4)]
    with torch.inference_mode():
        together = (*model.embed(batch), model.finish(scores, batch, batch.candidates))
        alone = [
            (*model.embed(one), model.finish(scores[u], one, one.candidates))
            for u in users
            for one in [batch.rows(u)]
        ]
    for i, whole in enumerate(together):
        assert torch.equal(torch.cat([parts[i] for parts in alone]), whole)


def test_no_bit_depends_on_padding():
    model, batch = twins()["triton"], draw(3, 5)
    pad = torch.nn.functional.pad
    padded = batch.replace(
        search_terms=pad(batch.search_terms, (0, 30)), rec_items=pad(batch.rec_items[:, :3], (0, 1))
    )
    with torch.inference_mode():
        for stream, other in zip(model.embed(batch), model.embed(padded), strict=True):
            n = min(stream.shape[1], 3)
            assert torch.equal(stream[:, :n], other[:, :n])


def test_strides_change_nothing():
    model, batch = twins()["triton"], draw(3, 5)
    strided = Batch(
        **{
            name: value.transpose(0, -1).contiguous().transpose(0, -1)
            for name, value in vars(batch).items()
        }
    )
    scores = scores_like(batch, torch.float32)
    with torch.inference_mode():
        for stream, other in zip(model.embed(batch), model.embed(strided), strict=True):
            assert torch.equal(stream, other)
        finished = model.finish(scores.mT.contiguous().mT, strided, strided.candidates)
        assert torch.equal(finished, model.finish(scores, batch, batch.candidates))


def test_the_registered_ops():
    model, batch = twins()["triton"], draw(2, 5)
    tables = (
        model.query_embedding.weight, model.item_embedding.weight, model.search_position,
        model.rec_position,
    )  # fmt: skip
    ids = (batch.search_terms, batch.search_clicks, batch.rec_items)
    call = lookup.Embed(*ids, *(t.detach() for t in tables), 2)
    torch.library.opcheck(torch.ops.lcr_fast.triton_embed_fwd, tuple(call))
    upstream = [torch.ones_like(stream) for stream in model.embed(batch)]
    torch.library.opcheck(torch.ops.lcr_fast.triton_embed_bwd, (*upstream, *call))
    scores, bonus = scores_like(batch, torch.float32, 2), torch.ones(2, device=DEVICE)
    lengths = (batch.search_lengths, batch.rec_items, batch.rec_lengths)
    bonus_call = lookup.SeenBonus(
        scores, batch.candidates, batch.search_clicks, *lengths, bonus, 2.0, 2
    )
    torch.library.opcheck(torch.ops.lcr_fast.triton_seen_bonus_fwd, tuple(bonus_call))
    backward = torch.ops.lcr_fast.triton_seen_bonus_bwd
    torch.library.opcheck(backward, (torch.ones_like(scores), *bonus_call))


# -- who serves -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_forward_is_that_of_the_reference(launched):
    models, batch = twins(), draw(4, 6)
    fused, eager, exact = (model(batch) for model in models.values())
    assert launched == BOTH
    assert_parity("scores", fused, eager, exact, factor=4.0)


def test_gradients_are_those_of_the_reference(launched):
    models, batch = twins(), draw(1, 3)
    gradients = {}
    for name, model in models.items():
        model(batch).sum().backward()
        tables = (model.item_embedding, model.query_embedding)
        positions = (model.search_position, model.rec_position)
        parameters = (*(table.weight for table in tables), *positions, model.head.seen_bonus)
        gradients[name] = [parameter.grad for parameter in parameters]
    assert launched == BOTH + BACKWARD
    for parts in zip(*gradients.values(), strict=True):
        assert_parity("gradient", *parts, factor=4.0)
        assert parts[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("n_trajectories", [0, 2])
@pytest.mark.parametrize("n_candidates", [0, 3, 70])
def test_gradients_of_the_bonus(n_candidates, n_trajectories, dtype, launched):
    """What comes up at padding, where the score is -inf whatever it was, goes nowhere."""
    batch, results = draw(4, n_candidates), []
    batch.candidates[:, 1:2] = 0
    scores = scores_like(batch, dtype, n_trajectories)
    upstream = scores.flip(-1).masked_fill(scores == -torch.inf, 0.0)
    upstream[..., 1:2] = torch.nan
    for model in twins(dtype).values():
        precision = model.item_embedding.weight.dtype
        leaf = scores.detach().to(precision, copy=True).requires_grad_()
        out = model.finish(leaf, batch, batch.candidates)
        out.backward(upstream.to(precision))
        results.append((leaf.grad, model.head.seen_bonus.grad))
    assert launched == [BOTH[1], BACKWARD[0]]
    (dscores, dbonus), (eager, _), (exact, exact_bonus) = results
    assert_parity("scores", dscores, eager, exact)
    assert not dscores[..., 1:2].any()
    assert n_candidates == 0 or dbonus.all()
    assert dbonus.dtype == dtype
    # A sum of terms that cancel, a few roundings of theirs and one of its own.
    terms = CONFIG.dim * upstream.nan_to_num().abs().sum().double()
    bound = 2**-22 * terms + torch.finfo(dtype).eps * exact_bonus.abs()
    assert ((dbonus.double() - exact_bonus).abs() <= bound).all()


@torch.no_grad()
def test_a_captured_model_has_the_bits_of_the_plain_call(launched):
    model, batch = twins()["triton"], draw(2, 5)
    captured = capture(model, (2,), 6, 4, None if DEVICE == "cuda" else Recorded)
    scores = captured(batch.to("cpu"))
    assert launched[:2] == BOTH
    assert torch.equal(scores, model(captured.padded(batch.to("cpu")).to(DEVICE))[:, :5])


def test_the_obstacles_are_named():
    def obstacle(**changes) -> str | None:
        return lookup.EMBED.obstacles(case(**changes))["triton"]

    assert obstacle() is None
    assert obstacle(sparse=True) == "it makes no sparse gradients"
    assert obstacle(text=True) == "it has no text vectors"
    assert obstacle(dtype=torch.float64) == "it serves float32 and halves, not torch.float64"
    assert next(iter(lookup.EMBED.obstacles(case("cuda")))) == "triton"
    assert next(iter(lookup.EMBED.obstacles(case("cpu")))) == "reference"


def test_float64_is_refused_where_triton_was_asked_for():
    model, batch = twins()["exact"], draw(1)
    model.config = model.config.replace(backend="triton")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"cannot serve embed: .*float64"):
        model.embed(batch)


def test_sparse_gradients_and_vectors_of_text_are_the_references(launched):
    model, batch = LCRSER(CONFIG).to(DEVICE), draw(2)
    assert "embed: triton" in (report := model.backend_report())
    assert "seen_bonus: triton" in report
    model.item_embedding.sparse = model.query_embedding.sparse = True
    assert "embed: reference (triton: it makes no sparse gradients)" in model.backend_report()
    model(batch).nan_to_num(neginf=0.0).sum().backward()
    assert model.item_embedding.weight.grad.is_sparse
    assert launched == [BOTH[1], BACKWARD[0]]
    assert "embed: triton" in model.eval().backend_report()
    of_text = LCRSER(CONFIG.replace(item_text_dim=4)).to(DEVICE).eval()
    of_text.set_text(item_text=torch.ones(CONFIG.n_items + 1, 4))
    assert "embed: reference (triton: it has no text vectors)" in of_text.backend_report()
    with torch.inference_mode():
        of_text(batch)
    assert launched[2:] == [BOTH[1]]
