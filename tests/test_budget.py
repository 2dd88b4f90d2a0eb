"""Budgets: the most steps within a time, from given times, and once from the clock."""

import pytest
import torch

from lcr_fast import cli
from lcr_fast.config import LCRConfig
from lcr_fast.reference import Exits
from lcr_fast.serving import budget
from lcr_fast.serving.scorer import Scorer, fastest
from lcr_fast.testing import random_batch, random_model

CONFIG = LCRConfig(
    n_items=40, n_terms=20, dim=8, steps=3, max_search_len=4, max_rec_len=5, mlp_hidden=(8,)
)


def make(**changes):
    return random_model(CONFIG.replace(**changes), torch.Generator().manual_seed(0), torch.float32)


@pytest.fixture
def clock(monkeypatch):
    """Let a request with K steps take 1 + K milliseconds."""
    monkeypatch.setattr(budget, "measure", lambda calls: {steps: 1.0 + steps for steps in calls})


@pytest.mark.parametrize(("budget_ms", "steps"), [(1.2, 0), (3.31, 2), (3.29, 1), (100, 3)])
def test_the_most_steps_that_fit(clock, budget_ms, steps):
    choice = budget.with_budget(make(), budget_ms)
    assert (choice.steps, choice.model.config.steps) == (steps, steps)
    assert choice.p99_ms == 1 + steps
    text = f"K = {steps}, p99 {1 + steps}.00 ms (of each K: 0: 1.00, 1: 2.00, 2: 3.00, 3: 4.00)"
    assert choice.describe() == text


def test_what_fits_no_budget(clock):
    with pytest.raises(ValueError, match=r"0\.5 ms is too small: .* takes 1\.00 ms"):
        budget.with_budget(make(), 0.5)
    with pytest.raises(ValueError, match="must be a positive number of milliseconds, got nan"):
        budget.with_budget(make(), float("nan"))


@pytest.mark.parametrize("changes", [{}, {"share_steps": False, "step_embedding": True}], ids=str)
def test_fewer_steps_are_the_first_ones(changes):
    model = make(**changes)
    batch = random_batch(CONFIG, 5, 6, torch.Generator().manual_seed(1))
    states = model.states(batch)
    for steps in range(4):
        fewer = budget.with_steps(model, steps)
        found = fewer.states(batch)
        assert len(found.h) == steps + 1
        for a, b in zip(found.h, states.h, strict=False):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
        assert fewer.item_embedding.weight.data_ptr() == model.item_embedding.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(budget.with_steps(model, 3)(batch), model(batch))
    with pytest.raises(ValueError, match=r"steps must be in 0..3, got 4"):
        budget.with_steps(model, 4)


def test_the_command_says_what_it_chose(prepared, prepared_folder, make_model, tmp_path, capsys):
    model = make_model(prepared)
    model.data_fingerprint = prepared.fingerprint
    model.save(tmp_path / "model.safetensors")
    words = [str(tmp_path / "model.safetensors"), "--data", str(prepared_folder)]
    users = ["--users", prepared.users[1], prepared.users[2]]
    cli.main(["recommend", *words, *users, "--budget-ms", "60000", "-k", "3"])
    printed = capsys.readouterr()
    assert printed.err.startswith("K = 2, p99 ")
    assert len(printed.out.splitlines()) == 7
    with pytest.raises(SystemExit):
        cli.main(["recommend", *words, "--budget-ms", "0.0001"])
    assert "a budget of 0.0001 ms is too small" in capsys.readouterr().err


def test_who_leaves_early_does_so_in_a_budget_too():
    """And no single call, which knows nothing of leaving, serves such a model."""
    model = make()
    batch = random_batch(CONFIG, 5, 6, torch.Generator().manual_seed(1))
    assert isinstance(fastest(model), Scorer)
    after_one = torch.tensor([-1.0, 1.0, 1.0])
    model.exits = Exits(torch.zeros(2 * CONFIG.dim + 2), after_one, "fixed")
    assert fastest(model) is model
    with torch.no_grad():
        scores = [budget.with_steps(model, steps).eval()(batch) for steps in range(4)]
        plain = budget.with_steps(make(), 1)(batch)
    assert torch.equal(scores[1], plain)
    assert torch.equal(scores[2], plain)
    assert torch.equal(scores[3], plain)
    assert not torch.equal(scores[0], plain)
