"""Tables updated by rows: gradients, clipping, AdamW, whole steps, resume; against dense ones."""

import numpy as np
import pytest
import torch

from lcr_fast.config import TrainConfig
from lcr_fast.storage import load_tensors
from lcr_fast.training import trainer as module
from lcr_fast.training.objective import OBJECTIVES
from lcr_fast.training.rows import RowAdamW, clip_gradients, flat, merge_gradients, merged
from lcr_fast.training.trainer import CHECKPOINT, Trainer
from training_runs import KilledError, assert_same_run, die_at

CONFIG = TrainConfig(
    epochs=2, batch_size=100, learning_rate=1e-2, align_queries=0.2, align_items=0.3,
    align_pairs=30, rl_epochs=2, rl_epoch_size=24, rl_batch_size=8, rl_learning_rate=1e-2,
    rl_negatives=9, n_trajectories=4, noise_scale=0.5, inner_epochs=2, rl_trainable="all",
    tables="rows", select_readout=False,
)  # fmt: skip
TABLES = ("item_embedding.weight", "query_embedding.weight", "user_embedding.weight")


def sparse(rows, values, n_rows: int = 7) -> torch.Tensor:
    index = torch.tensor([list(rows)], dtype=torch.int64)
    return torch.sparse_coo_tensor(index, values, (n_rows, values.shape[1]), check_invariants=True)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adam(table: torch.Tensor, kind=RowAdamW, **options):
    parameter = torch.nn.Parameter(table.clone())
    return parameter, kind([parameter], lr=0.1, weight_decay=0.0, **options)


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[3, 0, 3, 6, 3], [2], []])
def test_merged_gradients_add_up_by_row(rows):
    gradient = sparse(rows, numbers(len(rows), 2))
    found = merged(gradient)
    assert found.indices()[0].tolist() == sorted(set(rows))
    torch.testing.assert_close(found.to_dense(), gradient.to_dense())


@pytest.mark.parametrize("largest", [0.5, 50.0])
def test_clipping_counts_sparse_gradients(largest):
    table, weight = (torch.nn.Parameter(numbers(7, 2, seed=s)) for s in (0, 1))
    table.grad, weight.grad = sparse([4, 1, 4], numbers(3, 2)), numbers(7, 2, seed=2)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (table, weight)]
    for twin, gradient in zip(twins, (table.grad.to_dense(), weight.grad.clone()), strict=True):
        twin.grad = gradient
    torch.nn.utils.clip_grad_norm_(twins, largest)
    merge_gradients([table, weight])
    clip_gradients([table, weight], largest)
    torch.testing.assert_close(table.grad.to_dense(), twins[0].grad)
    torch.testing.assert_close(weight.grad, twins[1].grad)


def test_flat_gradients_stand_on_common_rows():
    like = numbers(7, 2)
    first, second = sparse([4, 1, 4], numbers(3, 2)), sparse([6, 1], numbers(2, 2, seed=1))
    a, b, nothing = flat([first, second, None], like)
    rows = [1, 4, 6]
    assert torch.equal(a, first.to_dense()[rows].flatten())
    assert torch.equal(b, second.to_dense()[rows].flatten())
    assert torch.equal(nothing, torch.zeros(6))
    dense, absent = flat([like, None], like)
    assert torch.equal(dense, like.flatten())
    assert torch.equal(absent, torch.zeros(14))


# -- AdamW ---------------------------------------------------------------------------------------


def test_rows_touched_by_every_step_are_those_of_adamw():
    start = numbers(7, 4)
    (mine, by_rows), (theirs, dense) = adam(start), adam(start, torch.optim.AdamW)
    for step in range(5):
        gradient = numbers(7, 4, seed=step + 1)
        mine.grad, theirs.grad = sparse(range(7), gradient).coalesce(), gradient
        for optimizer in (by_rows, dense):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
        assert torch.equal(mine, theirs)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(by_rows.state[mine][name], dense.state[theirs][name])


def test_moments_decay_over_missed_steps_while_the_row_stays():
    start = numbers(3, 4)
    (mine, by_rows), (theirs, dense) = adam(start), adam(start, torch.optim.AdamW)
    always = [0]
    for step, also in enumerate([[1], [], [2], [], [1, 2]]):
        rows, before = always + also, mine.detach().clone()
        gradient = torch.zeros(3, 4)
        gradient[rows] = numbers(len(rows), 4, seed=step + 1)
        mine.grad, theirs.grad = sparse(rows, gradient[rows], 3).coalesce(), gradient
        by_rows.step()
        dense.step()
        left = [row for row in range(3) if row not in rows]
        assert torch.equal(mine[left], before[left])
        assert not (mine[rows] == before[rows]).any()
    assert not torch.equal(mine[1], theirs[1])  # which coasted
    assert torch.equal(mine[0], theirs[0])
    for name in ("exp_avg", "exp_avg_sq"):  # of rows that the last step touched
        torch.testing.assert_close(by_rows.state[mine][name], dense.state[theirs][name])


def test_a_step_costs_nothing_where_nothing_was_touched():
    table, optimizer = adam(numbers(3, 4))
    table.grad = merged(sparse([], torch.zeros(0, 4), 3))
    before = table.detach().clone()
    optimizer.step()
    assert torch.equal(table, before)


def test_integers_of_a_loaded_state_stay_integers():
    table, optimizer = adam(numbers(3, 4))
    table.grad = sparse([1], numbers(1, 4), 3).coalesce()
    optimizer.step()
    twin, other = adam(table.detach())
    other.load_state_dict(optimizer.state_dict())
    assert other.state[twin]["last"].tolist() == [0, 1, 0]
    assert other.state[twin]["last"].dtype == torch.int32


def test_tables_have_no_weight_decay():
    table = torch.nn.Parameter(numbers(3, 4))
    optimizer = RowAdamW([table], weight_decay=0.1)
    table.grad = sparse([1], numbers(1, 4), 3).coalesce()
    with pytest.raises(ValueError, match="no weight decay"):
        optimizer.step()


# -- the trainer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "query_encoder", "precision"),
    [
        *((objective, "terms", "float32") for objective in OBJECTIVES),
        ("supervised", "id", "float32"),
        ("supervised", "terms", "bfloat16"),
    ],
)
def test_the_first_step_is_that_of_dense_tables(
    prepared, make_model, tmp_path, objective, query_encoder, precision
):
    """Without momentum yet, whole steps agree to rounding; of phase 2 the first update."""
    exact = precision == "float32"
    found, gradients = {}, {}
    for tables in ("dense", "rows"):
        config = CONFIG.replace(tables=tables, inner_epochs=1, precision=precision, grad_clip=0.5)
        model = make_model(
            prepared,
            dropout=0.2,
            query_encoder=query_encoder,
            score="mlp",
            item_text_dim=0,
            query_text_dim=0,
        )
        start = {name: model.get_parameter(name).detach().clone() for name in TABLES}
        trainer = Trainer(model, prepared, config, objective, tmp_path / tables)
        trainer.step(np.arange(8), np.random.default_rng(0))
        found[tables] = {name: p.detach().clone() for name, p in model.named_parameters()}
        state = trainer.optimizer.state
        gradients[tables] = {
            name: state[p]["exp_avg"] for name, p in model.named_parameters() if p in state
        }
    assert gradients["rows"].keys() == gradients["dense"].keys() >= set(TABLES)
    for name, gradient in gradients["dense"].items():
        error = (gradients["rows"][name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
        assert error < (1e-5 if exact else 0.05), name
    for name in TABLES:
        still = (gradients["dense"][name] == 0).all(1)
        assert 0 < still.sum() < len(still)
        assert torch.equal(found["rows"][name][still], start[name][still])
        assert not torch.equal(found["rows"][name], start[name])


@pytest.mark.parametrize("objective", ["supervised", "grpo"])
def test_a_killed_run_resumes_bit_for_bit(prepared, make_model, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", -1.0)
    Trainer(make_model(prepared), prepared, CONFIG, objective, tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        die_at(patch, 5)
        killed = Trainer(make_model(prepared), prepared, CONFIG, objective, tmp_path / "killed")
        with pytest.raises(KilledError):
            killed.run()
    again = make_model(prepared, seed=9)
    trainer = Trainer(again, prepared, CONFIG, objective, tmp_path / "killed", resume=True)
    assert trainer.progress.step
    trainer.run()
    assert not any(module.sparse for module in again.modules() if hasattr(module, "sparse"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    saved, _ = load_tensors(tmp_path / "killed" / CHECKPOINT, "checkpoint")
    last = saved.get("adam.item_embedding.weight.last")
    assert last is None or last.dtype == torch.int32


def test_rows_and_dense_tables_are_two_runs(prepared, make_model, tmp_path):
    Trainer(make_model(prepared), prepared, CONFIG.replace(epochs=0), "supervised", tmp_path).run()
    with pytest.raises(ValueError, match="train config differs in tables"):
        Trainer(
            make_model(prepared),
            prepared,
            CONFIG.replace(epochs=0, tables="dense"),
            "supervised",
            tmp_path,
            resume=True,
        )
