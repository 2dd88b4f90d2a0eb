"""LCRSER as a whole: against the oracle, its facts, recommend, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune

import oracle
from graphs import Recorded
from lcr_fast import LCRSER, Batch, LCRConfig, export, reference
from lcr_fast.batch import seen_items
from lcr_fast.capture import capture
from lcr_fast.ops._extension import extension_error
from lcr_fast.reference import length_mask
from lcr_fast.serving.scorer import Scorer
from lcr_fast.testing import random_batch, random_model
from lcr_fast.weights import REC, SEARCH

CONFIG = LCRConfig(
    n_items=12, n_users=3, n_queries=4, n_terms=6, dim=6, n_heads=3, ffn_dim=4, steps=2,
    max_search_len=3, max_rec_len=4, max_clicks=2, mlp_hidden=(9, 5), user_embedding=True,
)  # fmt: skip
CONFIGS = {
    "default": {},
    "base": {"steps": 0},
    "D=10, two layers, three steps": {
        "dim": 10, "n_heads": 2, "ffn_dim": 0, "n_layers": 2, "steps": 3, "share_steps": False,
        "mlp_hidden": (7,),
    },
    "query ids, dot head": {
        "query_encoder": "id", "score": "dot", "user_embedding": False, "step_ffn": False,
    },
    "MLP alone, mean readout, no bonus": {
        "score": "mlp", "readout": 0.5, "seen_bonus": False,
    },
    "text": {
        "item_text_dim": 5, "query_text_dim": 7, "step_embedding": True, "update": "search_first",
        "cross_memory": "step_input",
    },
    "query ids and text": {
        "query_encoder": "id", "query_text_dim": 7, "update": "rec_first",
        "cross_memory": "initial",
    },
}  # fmt: skip


def text_vectors(config: LCRConfig, generator: torch.Generator) -> dict:
    """Frozen text vectors; row 0 stands for nothing and must not be read."""
    vectors = {}
    for kind, rows in (("item", config.n_items), ("query", config.n_queries)):
        width = getattr(config, f"{kind}_text_dim")
        if width:
            table = torch.randn(rows + 1, width, generator=generator, dtype=torch.float64)
            table[0] = torch.nan
            vectors[f"{kind}_text"] = table.numpy()
    return vectors


def make_case(n_users=7, n_candidates=4, **changes) -> tuple[LCRSER, Batch]:
    config = CONFIG.replace(**changes)
    generator = torch.Generator().manual_seed(0)
    model = random_model(config, generator)
    model.set_text(**text_vectors(config, generator))
    return model, random_batch(config, n_users, n_candidates, generator)


def close(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10, atol=1e-10)


# -- against the oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_states_match_the_oracle(name):
    model, batch = make_case(**CONFIGS[name])
    batch.candidates[0, 1] = 0
    twin = oracle.Model(model)
    states, scores = model.states(batch), model(batch)
    for b in range(len(batch)):
        close(scores[b], twin.forward(batch, b))
        after, before = twin.reason(twin.encode(batch, b), batch, b)
        for mine, theirs in ((states.h, after), (states.a, before)):
            for pair, pair_b in zip(mine, theirs, strict=True):
                for x in (SEARCH, REC):
                    n = len(pair_b[x])
                    close(pair[x][b, :n], np.reshape(pair_b[x], (n, model.config.dim)))


@pytest.mark.parametrize("name", CONFIGS)
def test_training_scores_match_the_oracle_with_its_dropout(name):
    model, batch = make_case(**CONFIGS[name], dropout=0.3)
    model.train()
    model.dropout_seed = 2**40 + 17
    twin, scores = oracle.Model(model), model(batch)
    for b in range(len(batch)):
        close(scores[b], twin.forward(batch, b, seed=model.dropout_seed))
    model.dropout_seed = torch.tensor(model.dropout_seed)
    assert torch.equal(model(batch), scores)
    assert not torch.allclose(scores, model.eval()(batch))


@pytest.mark.parametrize("name", ["default", "MLP alone, mean readout, no bonus", "text", "base"])
def test_rollouts_match_the_oracle(name):
    """In training mode too, where dropout acts on the encoders alone."""
    model, batch = make_case(**CONFIGS[name], dropout=0.3)
    h0 = model.encode(batch)
    reasoned = model.train().rollout(h0, batch, 3, 0.7, seed=99)
    scores = model.score(reasoned.streams, batch)
    twin = oracle.Model(model)
    for b in range(len(batch)):
        for n in range(3):
            after, _ = twin.rollout(batch, b, n, 0.7, seed=99)
            read = twin.read(twin.encode(batch, b), after[-1])
            close(scores[b, n], twin.scores(read, batch, b))
    again = model.rollout(h0, batch, 3, 0.7, seed=torch.tensor(99))
    assert torch.equal(again.search, reasoned.search)


@pytest.mark.parametrize("name", CONFIGS)
def test_cross_attention_looks_where_the_oracle_looks(name, monkeypatch):
    """The oracle's softmax of a cross-attention is that of a query over the other stream."""
    model, batch = make_case(**CONFIGS[name])
    states = model.states(batch)
    looks = model.cross_attention(states, batch)
    assert len(looks) == model.config.steps
    twin = oracle.Model(model)
    calls = []

    def attend(query, memory, *weights):
        p = []
        monkeypatch.setattr(oracle, "softmax", lambda logits: p.append(softmax(logits)) or p[-1])
        result = plain_attend(query, memory, *weights)
        calls.append((query, memory, np.array(p)))
        return result

    plain_attend, softmax = oracle.attend, oracle.softmax
    monkeypatch.setattr(oracle, "attend", attend)
    for b in range(len(batch)):
        h0 = twin.encode(batch, b)
        calls.clear()
        _, before = twin.reason(h0, batch, b)
        queries = iter(calls)
        second = model.config.update == "rec_first"
        for k, a in enumerate(before):
            for _ in range(len(a[0]) + len(a[1])):
                next(queries)  # self-attention
            for x in (REC, SEARCH) if second else (SEARCH, REC):
                for j in range(len(a[x]) if len(a[1 - x]) else 0):
                    _, memory, p = next(queries)
                    close(looks[k][x][b, :, j, : len(memory)], p)
        assert next(queries, None) is None


# -- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_ids_change_no_bit(name):
    model, batch = make_case(**CONFIGS[name])
    generator = torch.Generator().manual_seed(5)
    searches = length_mask(batch.search_lengths, model.config.max_search_len)
    masks = {
        "rec_items": length_mask(batch.rec_lengths, model.config.max_rec_len),
        "search_queries": searches,
        "search_terms": searches.unsqueeze(-1),
        "search_clicks": searches.unsqueeze(-1),
    }
    limits = {"rec_items": 12, "search_queries": 4, "search_terms": 6, "search_clicks": 12}
    changed = {
        field: torch.where(
            mask,
            getattr(batch, field),
            torch.randint(1, limits[field] + 1, getattr(batch, field).shape, generator=generator),
        )
        for field, mask in masks.items()
    }
    assert all(not torch.equal(value, getattr(batch, f)) for f, value in changed.items())
    assert torch.equal(model(batch.replace(**changed)), model(batch))


@pytest.mark.parametrize("field", ["search_terms", "search_clicks"])
def test_unknown_terms_and_clicks_count_for_nothing_anywhere(field):
    model, batch = make_case()
    padded = torch.nn.functional.pad(getattr(batch, field), (1, 0))
    if field == "search_clicks":  # only the first max_clicks are read
        model.config = model.config.replace(max_clicks=model.config.max_clicks + 1)
    torch.testing.assert_close(
        model(batch.replace(**{field: padded})), model(batch), rtol=1e-12, atol=1e-12
    )


def test_clicks_beyond_max_clicks_are_not_read():
    model, batch = make_case()
    more = torch.nn.functional.pad(batch.search_clicks, (0, 1), value=5)
    assert torch.equal(model(batch.replace(search_clicks=more)), model(batch))


def test_the_sum_of_both_heads_starts_as_the_dot_product():
    """With the same seed the tables and the encoders of both models are the same."""
    batch = make_case()[1]
    scores = []
    for score in ("mlp_dot", "dot"):
        torch.manual_seed(0)
        model = LCRSER(CONFIG.replace(score=score, user_embedding=False)).eval()
        scores.append(model(batch))
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_readout_is_a_share_of_the_last_states(share):
    model, batch = make_case(readout=share)
    states = model.states(batch)
    for first, last, read in zip(states.h[0], states.h[-1], model.final_states(batch), strict=True):
        torch.testing.assert_close(read, (1 - share) * first + share * last)


def test_candidates_gain_by_standing_in_the_histories_that_are_read():
    model, batch = make_case(n_users=1, n_candidates=5, seen_bonus=True, max_clicks=1)
    batch = batch.replace(
        rec_items=torch.tensor([[3, 4, 5]]),
        rec_lengths=torch.tensor([2]),
        search_clicks=torch.tensor([[[4, 7], [6, 0], [8, 0]]]),
        search_lengths=torch.tensor([2]),
        search_queries=torch.zeros(1, 3, dtype=torch.int64),
        search_terms=torch.zeros(1, 3, 2, dtype=torch.int64),
        candidates=torch.tensor([[3, 4, 5, 6, 7, 8]]),
    )
    scores = {}
    for gains in ((0.0, 0.0), (0.5, 2.0)):
        with torch.no_grad():
            model.head.seen_bonus.copy_(torch.tensor(gains))
        scores[gains] = model(batch)
    # 5 and 8 stand behind a length, 7 is the second click of a search.
    gained = model.config.dim * torch.tensor([[2.0, 2.5, 0.0, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(scores[0.5, 2.0] - scores[0.0, 0.0], gained.to(scores[0.0, 0.0]))


def test_a_batch_may_be_split_in_training_too():
    model, batch = make_case(n_users=9, dropout=0.4)
    model.train()
    parts = [model(batch.rows(rows)) for rows in (slice(0, 2), slice(2, 9))]
    torch.testing.assert_close(torch.cat(parts), model(batch), rtol=1e-12, atol=1e-12)
    assert model(batch.rows(slice(0, 0))).shape == (0, 4)


@pytest.mark.parametrize("axis", ["L", "T", "M", "C"])
def test_axes_of_size_zero(axis):
    model, batch = make_case()
    zero = torch.zeros(7, dtype=torch.int64)
    empty = {
        "L": {
            "rec_items": batch.rec_items[:, :0],
            "rec_lengths": zero,
            "search_lengths": zero,
            **{
                k: getattr(batch, k)[:, :0]
                for k in ("search_queries", "search_terms", "search_clicks")
            },
        },
        "T": {"search_terms": batch.search_terms[..., :0]},
        "M": {"search_clicks": batch.search_clicks[..., :0]},
        "C": {"candidates": batch.candidates[:, :0], "target": zero - 1},
    }[axis]
    batch = batch.replace(**empty)
    close(
        model(batch),
        np.array([oracle.Model(model).forward(batch, b) for b in range(7)]).reshape(7, -1),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_finite_gradient(name):
    model, batch = make_case(**CONFIGS[name])
    model(batch).square().sum().backward()
    for key, parameter in model.named_parameters():
        unused = key == "reasoning.ffn_out_bias" and not model.config.step_ffn
        if parameter.numel() and not unused:
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.any(), key


# -- the catalogue --------------------------------------------------------------------------------


def test_a_target_is_ranked_with_its_bonus_among_unseen_items():
    model, batch = make_case(seen_bonus=True)
    h, seen = model.final_states(batch), seen_items(batch)
    ids = torch.arange(1, model.config.n_items + 1)
    scores = model.score(h, batch, ids.expand(len(batch), -1))
    bare = scores - model._bonus(batch, ids.expand(len(batch), -1))
    moved = False
    for target in ids.tolist():
        ranks = model.target_rank(h, batch, torch.full((len(batch),), target), seen)
        for b, rank in enumerate(ranks.tolist()):
            rivals = [i for i in ids.tolist() if i != target and i not in seen[b].tolist()]
            ahead = sum(scores[b, i - 1] >= scores[b, target - 1] for i in rivals)
            assert rank == 1 + ahead
            moved |= bool(ahead != sum(bare[b, i - 1] >= bare[b, target - 1] for i in rivals))
    assert moved


# -- recommend ------------------------------------------------------------------------------------


def brute_force(model, batch, k, exclude):
    """Sort all (score, id) pairs of one user at a time."""
    ids = torch.arange(1, model.config.n_items + 1)
    scores = model.score(model.states(batch).h[-1], batch, ids.expand(len(batch), -1))
    items, values = [], []
    for b in range(len(batch)):
        seen = set(batch.rec_items[b, : batch.rec_lengths[b]].tolist())
        for j in range(int(batch.search_lengths[b])):
            seen |= set(batch.search_clicks[b, j].tolist())
        seen |= set([] if exclude is None else exclude[b].tolist())
        ranked = sorted(
            (-s, i) for i, s in enumerate(scores[b].tolist(), start=1) if i not in seen
        )[:k]
        missing = k - len(ranked)
        items.append([i for _, i in ranked] + [0] * missing)
        values.append([-s for s, _ in ranked] + [-np.inf] * missing)
    return torch.tensor(items), torch.tensor(values, dtype=scores.dtype)


def integer_head(model: LCRSER) -> None:
    """Make every score a small integer of the item and the user: exact, with many ties."""
    with torch.no_grad():
        for table in (model.item_embedding, model.user_embedding):
            table.weight.round_().clamp_(-1, 1)
        for weight, bias in zip(model.head.mlp_weights, model.head.mlp_biases, strict=True):
            weight.mul_(2).round_()
            bias.round_()
        model.head.mlp_weights[0][:, :12] = 0  # what the histories say


@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 4, 30])
@torch.no_grad()
def test_recommend_is_a_full_sort(monkeypatch, k, ties, with_exclude):
    monkeypatch.setattr(reference.scoring, "_CATALOGUE_BLOCK", 5)
    model, batch = make_case(n_items=23, score="mlp")
    if ties:
        integer_head(model)
    generator = torch.Generator().manual_seed(1)
    # Items that the catalogue does not have, repeats and padding are harmless.
    exclude = torch.randint(0, 26, (7, 6), generator=generator) if with_exclude else None
    items, scores = model.recommend(batch, k, exclude)
    expected_items, expected_scores = brute_force(model, batch, k, exclude)
    if ties:
        assert expected_scores[:, :4].unique().numel() < 12
    assert torch.equal(items, expected_items)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-12, atol=1e-12)


def test_recommend_does_not_mask_what_stands_behind_a_length():
    model, batch = make_case()
    batch.rec_items[1, :] = 7
    batch.search_clicks[1, :] = 8
    batch = batch.replace(rec_lengths=torch.zeros_like(batch.rec_lengths))
    assert batch.search_lengths[1] == 0
    assert not seen_items(batch)[1].any()
    assert {7, 8} <= set(model.recommend(batch, 12)[0][1].tolist())


def test_recommend_runs_in_eval_mode_and_leaves_the_mode_alone():
    model, batch = make_case(dropout=0.5)
    expected = model.recommend(batch, 5)
    model.train()
    items, scores = model.recommend(batch, 5)
    assert model.training
    assert torch.equal(items, expected[0])
    assert torch.equal(scores, expected[1])
    with pytest.raises(ValueError, match="rec_items"):
        model.recommend(batch.replace(rec_items=batch.rec_items + 99), 5)
    assert model.training
    model.eval().recommend(batch, 5)
    assert not model.training


def test_recommend_and_export_leave_the_mode_of_every_part(monkeypatch):
    model, batch = make_case()
    model.train()
    model.encoder.eval()
    model.head.mlp_weights.eval()
    modes = {name: part.training for name, part in model.named_modules()}
    model.recommend(batch, 5)
    assert modes == {name: part.training for name, part in model.named_modules()}
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: model.training)
    assert export.program(model) is False
    assert modes == {name: part.training for name, part in model.named_modules()}
    # What evaluates may be shared by threads: nothing is written.
    model.eval()
    monkeypatch.setattr(torch.nn.Module, "__setattr__", None)
    model.recommend(batch, 5)


def test_recommend_refuses_bad_arguments():
    model, batch = make_case()
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        model.recommend(batch, 0)
    for exclude in (torch.ones(7, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64), [[1]]):
        with pytest.raises(ValueError, match=r"exclude must be int64 \[7, X\]"):
            model.recommend(batch, 3, exclude)


# -- what the model refuses -----------------------------------------------------------------------


def changed(field, index, value):
    def change(batch):
        tensor = getattr(batch, field).clone()
        tensor[index] = value
        return batch.replace(**{field: tensor})

    return change


BAD_BATCHES = {
    r"user must be ids in 0\.\.3, got 4": changed("user", 2, 4),
    r"rec_items must be ids in 0\.\.12, got 13": changed("rec_items", (0, 1), 13),
    r"rec_items must be ids in 0\.\.12, got -1": changed("rec_items", (0, 1), -1),
    r"search_terms must be ids in 0\.\.6, got 7": changed("search_terms", (0, 0, 1), 7),
    r"search_clicks must be ids in 0\.\.12, got 13": changed("search_clicks", (0, 0, 1), 13),
    r"candidates must be ids in 0\.\.12, got -3": changed("candidates", (6, 3), -3),
    r"search_lengths must be in 0\.\.3, got -1\.\.": changed("search_lengths", 6, -1),
    r"search_lengths must be in 0\.\.3, got 0\.\.4": changed("search_lengths", 6, 4),
    r"rec_lengths must be in 0\.\.4, got 0\.\.5": changed("rec_lengths", 6, 5),
    "rec histories hold 5 events, but max_rec_len is 4": lambda b: b.replace(
        rec_items=torch.nn.functional.pad(b.rec_items, (0, 1))
    ),
    "search histories hold 4 events, but max_search_len is 3": lambda b: b.replace(
        search_queries=torch.nn.functional.pad(b.search_queries, (0, 1)),
        search_terms=torch.nn.functional.pad(b.search_terms, (0, 0, 0, 1)),
        search_clicks=torch.nn.functional.pad(b.search_clicks, (0, 0, 0, 1)),
    ),
    r"target must be a column of candidates.*got 4": changed("target", 3, 4),
    r"target must be a column of candidates.*got -2": changed("target", 3, -2),
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_a_batch_that_does_not_fit_is_refused(message):
    model, batch = make_case()
    model.check(batch)
    with pytest.raises(ValueError, match=message):
        model(BAD_BATCHES[message](batch))


def test_query_ids_are_checked_where_they_are_read():
    model, batch = make_case()
    wrong = batch.replace(search_queries=batch.search_queries + 99)
    model(wrong)  # a model of terms does not read them
    model, _ = make_case(query_encoder="id")
    with pytest.raises(ValueError, match=r"search_queries must be ids in 0\.\.4, got 1"):
        model(wrong)
    model(batch.replace(search_terms=batch.search_terms + 99))


def test_target_may_be_missing():
    model, batch = make_case()
    model(batch.replace(target=torch.full_like(batch.target, -1)))


def test_text_vectors_are_wanted_and_checked():
    config = CONFIG.replace(item_text_dim=5)
    model = LCRSER(config)
    with pytest.raises(ValueError, match=r"item_text_dim=5: call set_text\(item_text=...\) first"):
        model.item_vectors(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"item_text must be \[13, 5\], got \[12, 5\]"):
        model.set_text(item_text=np.zeros((12, 5), np.float32))
    with pytest.raises(ValueError, match="the config has query_text_dim=0"):
        model.set_text(query_text=np.zeros((5, 7), np.float32))


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("layout", ["C", "F", "part"])
def test_text_vectors_may_be_memory_mapped(tmp_path, mode, layout):
    """Whatever the file's memory order, and where the array is a part of what the file holds."""
    vectors = np.random.default_rng(0).normal(size=(13, 5)).astype(np.float16)
    stored = np.concatenate((vectors, vectors)) if layout == "part" else vectors
    np.save(tmp_path / "items.npy", np.asarray(stored, order="F" if layout == "F" else "C"))
    before = (tmp_path / "items.npy").read_bytes()
    mapped = np.load(tmp_path / "items.npy", mmap_mode=mode)
    model = random_model(CONFIG.replace(item_text_dim=5), torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 0])
    model.set_text(item_text=torch.from_numpy(vectors))
    expected = model.item_vectors(ids)
    model.set_text(item_text=mapped[13:] if layout == "part" else mapped)
    assert torch.equal(model.item_vectors(ids), expected)
    assert not expected[1].any()
    assert "item_text" not in model.state_dict()
    model.item_text.zero_()
    assert (tmp_path / "items.npy").read_bytes() == before


@pytest.mark.parametrize("changes", [{}, {"query_encoder": "id"}, {"score": "dot"}], ids=str)
def test_a_projected_model_gives_the_same_scores_without_item_texts(changes):
    model, batch = make_case(**CONFIGS["text"], **changes)
    model.data_fingerprint, model.vocabulary = "data", "ids"
    made = model.projected()
    assert made.config == model.config.replace(item_text_dim=0)
    assert made.item_text is None
    assert (made.data_fingerprint, made.vocabulary) == ("data", "ids")
    assert made.training == model.training
    torch.testing.assert_close(made(batch), model(batch))
    items, scores = model.recommend(batch, 5)
    found = made.recommend(batch, 5)
    assert torch.equal(found[0], items)
    torch.testing.assert_close(found[1], scores)
    assert made.projected() is made
    with torch.no_grad():  # a copy
        made.head.target_weight.zero_()
    assert model.head.target_weight.any()


def test_a_table_of_queries_holds_what_their_ids_stand_for():
    ids = torch.arange(1, 5)
    no_terms = torch.zeros(4, 0, dtype=torch.int64)
    for changes in ({"query_encoder": "id"}, {"query_encoder": "terms"}):
        model, _ = make_case(**CONFIGS["text"], **changes)
        torch.testing.assert_close(model.query_table()[ids], model.query_vectors(ids, no_terms))
        assert not model.query_table()[0].any()
    model, _ = make_case(query_encoder="id", query_text_dim=0)
    assert model.query_table() is model.query_embedding.weight
    model, _ = make_case(query_encoder="terms", query_text_dim=0)
    with pytest.raises(ValueError, match="queries are means of terms and have no text"):
        model.query_table()


@pytest.mark.parametrize("table", ["item_embedding", "query_embedding"])
def test_a_padding_row_that_is_not_zero_is_refused(table, tmp_path):
    """On the CPU its numbers would be added to every query, in Triton's kernels not."""
    config = CONFIG.replace(user_embedding=False)
    model = LCRSER(config)
    batch = random_batch(config, 3, 4, torch.Generator().manual_seed(0))
    model(batch)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.numel():
            torch.nn.init.xavier_uniform_(parameter)
    other = {"item_embedding": model.query_embedding, "query_embedding": model.item_embedding}
    with torch.no_grad():
        other[table].weight[0] = 0
    model.save(tmp_path / "model.safetensors")
    sizes = (config.n_items, config.n_users, config.n_queries, config.n_terms)
    ways = {
        "in training": lambda: model.train()(batch),
        "loaded": lambda: LCRSER.load(tmp_path / "model.safetensors"),
        "extended": lambda: model.extended(*sizes),
        "captured": lambda: capture(model.eval(), (2,), 4, graph=Recorded),
        "exported": lambda: export.program(model),
    }
    if extension_error() is None:
        ways["a Scorer"] = lambda: Scorer(model.eval())
    for way in ways.values():
        with pytest.raises(ValueError, match=rf"row 0 of {table}\.weight stands for padding"):
            way()
    with torch.no_grad():
        getattr(model, table).weight[0] = 0
    model.save(tmp_path / "model.safetensors")
    del ways["exported"]  # takes seconds
    for way in ways.values():
        way()


# -- parameters that are not what they were -------------------------------------------------------


def test_layers_may_share_their_weights():
    """As many layers as the config names, with the scores of a model that holds each twice."""
    model, batch = make_case(mlp_hidden=(9, 9, 9))
    for layers in (model.head.mlp_weights, model.head.mlp_biases):
        layers[2] = layers[1]
    apart = copy.deepcopy(model)
    for layers in (apart.head.mlp_weights, apart.head.mlp_biases):
        layers[2] = torch.nn.Parameter(layers[1].detach().clone())
    assert len(model.head.weights().mlp_weights) == 4
    assert torch.equal(model(batch), apart(batch))


class Halved(torch.nn.Module):
    def forward(self, x):
        return x / 2


def parts(model: LCRSER) -> list[tuple[torch.nn.Module, str]]:
    """List a parameter of each kind of module."""
    return [
        (model.encoder, "qkv_weight"),
        (model.head.mlp_weights, "1"),
        (model.head.mlp_biases, "0"),
    ]


@pytest.mark.parametrize("part", range(3))
def test_parametrizations_and_pruning_reach_the_ops(part):
    model, batch = make_case()
    plain = model(batch)
    expected = copy.deepcopy(model)
    module, name = parts(expected)[part]
    with torch.no_grad():
        module.get_parameter(name).div_(2)
    parametrized = copy.deepcopy(model)
    torch.nn.utils.parametrize.register_parametrization(*parts(parametrized)[part], Halved())
    assert torch.equal(parametrized(batch), expected(batch))
    assert not torch.equal(plain, expected(batch))
    with torch.no_grad():
        module.get_parameter(name).zero_()
    torch.nn.utils.prune.l1_unstructured(*parts(model)[part], amount=1.0)
    assert torch.equal(model(batch), expected(batch))


# -- compile --------------------------------------------------------------------------------------


def test_a_loader_pins_a_batch(monkeypatch):
    _, batch = make_case()
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    found = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert isinstance(found, Batch)
    assert len(pinned) == len(vars(batch))


def test_shapes_are_found_on_the_meta_device():
    model, batch = make_case()
    meta = model.float().to("meta").train()
    meta.dropout_seed = torch.tensor(0, device="meta")
    scores = meta(batch.to("meta"))
    assert scores.device.type == "meta"
    assert scores.shape == batch.candidates.shape
    scores.sum().backward()


def test_forward_compiles_without_graph_breaks():
    model, batch = make_case(**CONFIGS["text"])
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    torch.testing.assert_close(compiled(batch), model(batch))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_seed_that_is_a_tensor_compiles_once_for_all_masks(backend):
    if backend == "cpp" and extension_error() is not None:
        pytest.skip(f"lcr_fast._C is not built: {extension_error()}")
    model, batch = make_case(**{**CONFIGS["default"], "backend": backend}, dropout=0.3)
    model.float().train()
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    model.dropout_seed = torch.tensor(0)
    found = []
    for seed in (1, 2, 3):
        model.dropout_seed.fill_(seed)
        found.append(compiled(batch))
        torch.testing.assert_close(found[-1], model(batch))
    assert len(graphs) == 1
    assert not torch.allclose(found[0], found[1])


# -- torch's own ways to change a model ----------------------------------------------------------


def float_case(**changes) -> tuple[LCRSER, Batch]:
    model, batch = make_case(**changes)
    model.float().eval()
    for name in ("item_text", "query_text"):
        if getattr(model, name) is not None:
            setattr(model, name, getattr(model, name).float())
    return model, batch


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("changes", [{}, CONFIGS["text"]], ids=["default", "text"])
@torch.no_grad()
def test_a_model_with_quantized_projections_scores(changes, tmp_path):
    model, batch = float_case(**changes)
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("this torch has no quantized layers")
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    torch.testing.assert_close(quantized(batch), model(batch), rtol=0.05, atol=0.3)
    assert quantized.recommend(batch, 2)[0].shape == (len(batch), 2)
    quantized.backend_report()
    if changes:
        for refused in (lambda: quantized.save(tmp_path / "m"), quantized.projected):
            with pytest.raises(
                ValueError, match="layers that torch quantized, which cannot be sav"
            ):
                refused()


def test_sharded_parts_are_refused_and_a_sharded_model_scores(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        for part in ("encoder", "reasoning", "head"):
            model, batch = float_case()
            fsdp.fully_shard(getattr(model, part))
            with pytest.raises(
                ValueError, match="fully_shard the whole model and call it as model"
            ):
                model(batch)
        model, batch = float_case()
        expected = model(batch), model.recommend(batch, 2)
        fsdp.fully_shard(model)
        with pytest.raises(ValueError, match="weights are sharded where they are read"):
            model.recommend(batch, 2)
        with pytest.raises(ValueError, match="layers that torch sharded, which cannot be saved"):
            model.save(tmp_path / "model.safetensors")
        fsdp.register_fsdp_forward_method(model, "recommend")
        assert torch.equal(model(batch), expected[0])
        assert all(map(torch.equal, model.recommend(batch, 2), expected[1]))
    finally:
        torch.distributed.destroy_process_group()
