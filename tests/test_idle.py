"""Options that act on nothing: the rules against what losses say, and who is told of them."""

import dataclasses

import numpy as np
import pytest
import torch

from command_line import TINY, WORLD, fails, run
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.experiments.comparison import VARIANTS
from lcr_fast.training.distillation import Distilled
from lcr_fast.training.evaluation import make_batcher
from lcr_fast.training.idle import RULES, Trained, unread, warn_of_idle
from lcr_fast.training.objective import OBJECTIVES
from lcr_fast.training.trainer import DISTILL, Trainer

# Everything acts: both configs where no rule holds.
MODEL = {"dropout": 0.3, "steps": 2}
TRAIN = {
    "rank_loss": "bce", "align_queries": 0.4, "align_items": 0.3, "align_pairs": 20,
    "tcl_weight": 0.7, "tcl_margin": 0.2, "deep_supervision": 0.4, "n_trajectories": 4,
    "noise_scale": 1.0, "reward": "ndcg@5", "clip": 0.02, "kl_weight": 0.8, "temperature": 0.6,
    "inner_epochs": 3, "rl_negatives": 9,
}  # fmt: skip
# Another value of every field that a loss can show.
OTHER = {
    "n_heads": 4, "n_layers": 2, "ffn_dim": 5, "steps": 1, "max_search_len": 3, "max_rec_len": 4,
    "max_clicks": 1, "max_terms": 1, "dropout": 0.1, "query_encoder": "id", "user_embedding": False,
    "step_ffn": False, "share_steps": False, "step_embedding": True, "update": "rec_first",
    "cross_memory": "step_input", "score": "mlp", "readout": 0.5, "seen_bonus": False,
    "mlp_hidden": (4,),
    "negatives": "uniform", "n_negatives": 5, "rl_negatives": 5, "rank_loss": "softmax",
    "precision": "bfloat16", "align_queries": 0.9, "align_items": 0.9, "align_pairs": 9,
    "tcl_weight": 0.3, "tcl_margin": 0.0, "tcl_distance": "cosine", "tcl_detach_negative": True,
    "deep_supervision": 0.9, "deep_weights": "uniform", "distill_kl": 0.5, "distill_states": 0.5,
    "distill_temperature": 2.0, "distill_trainable": "histories", "n_trajectories": 5,
    "noise_scale": 0.4, "inner_epochs": 2, "rl_trainable": "all", "reward": "mrr",
    "action": "sampled", "scale_advantages": False, "silent_groups": "mask", "clip": 0.5,
    "kl": "k3", "kl_weight": 0.3, "temperature": 2.0,
}  # fmt: skip
# What a field's being so may leave others without effect.
SETTINGS = [
    {}, {"score": "dot"}, {"steps": 0}, {"steps": 1}, {"max_search_len": 0},
    {"max_search_len": 0, "align_queries": 0.0}, {"max_clicks": 0}, {"query_encoder": "id"},
    {"dropout": 0.0}, {"cross_memory": "initial", "deep_supervision": 0.0},
    {"update": "search_first"}, {"seen_bonus": False}, {"negatives": "in_batch"},
    {"tcl_weight": 0.0}, {"tcl_margin": 0.0}, {"deep_supervision": 0.0}, {"align_queries": 0.0},
    {"align_queries": 0.0, "align_items": 0.0}, {"distill_kl": 0.0}, {"distill_states": 0.0},
    {"max_rec_len": 0}, {"kl_weight": 0.0}, {"inner_epochs": 1},
    {"action": "target"}, {"action": "sampled"}, {"silent_groups": "mask"}, {"rank_loss": "bpr"},
    {"rl_trainable": "all"}, {"precision": "bfloat16"}, {"kl": "k3"}, {"scale_advantages": False},
]  # fmt: skip


def split(changes):
    """Part changes into those of the model and those of its training."""
    names = {f.name for f in dataclasses.fields(LCRConfig)}
    return [{n: v for n, v in changes.items() if (n in names) == own} for own in (True, False)]


@pytest.fixture(scope="module")
def outcome(prepared, make_model):
    """Return a function: the gradients of some updates, under changes of the configs."""
    teacher = make_model(prepared, dropout=0.0, seed=3).eval()
    start = make_model(prepared, **MODEL).state_dict()

    def gradients_of(objective: str, changes: dict) -> list:
        of_model, of_train = split({**MODEL, **TRAIN, **changes})
        model = make_model(prepared, **of_model)
        # One more parameter must not change the first values of others.
        own = model.state_dict()
        same = {n: t for n, t in start.items() if n in own and own[n].shape == t.shape}
        model.load_state_dict(same, strict=False)
        config, batcher = TrainConfig(**of_train), make_batcher(prepared, "train", model)
        if objective == DISTILL:
            made = Distilled(model, batcher, config, teacher)
        else:
            made = OBJECTIVES[objective](model, batcher, config)
        batch = made.batch(np.arange(0, 120, 6), np.random.default_rng(0))
        found = []
        for loss, _ in made.updates(batch, 5, made.extras(5)):
            named = made.parameters()
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            for (name, parameter), gradient in zip(named, gradients, strict=True):
                if gradient is not None and gradient.any():
                    found.append((name, gradient.double().sum().item()))
                    with torch.no_grad():
                        parameter -= 0.5 * gradient
        return [*found, len(named) if made.config.distill_trainable == "histories" else 0]

    return gradients_of


def idle_in(objective: str, changes: dict) -> set[str]:
    of_model, of_train = split({**MODEL, **TRAIN, **changes})
    configs = LCRConfig(**of_model), TrainConfig(**of_train)
    ruled = {name for rule in RULES if rule.holds(*configs) for name in rule.fields}
    return ruled | set(unread(objective))


def is_idle(objective: str, changes: dict, name: str) -> bool:
    """Tell whether a field that is set beside other changes acts on nothing, by the rules."""
    configs = [
        kind(**part)
        for kind, part in zip(
            (LCRConfig, TrainConfig),
            split({**MODEL, **TRAIN, **changes, name: OTHER[name]}),
            strict=True,
        )
    ]
    ruled = any(rule.holds(*configs) and name in rule.fields for rule in RULES)
    return ruled or name in unread(objective)


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_what_a_rule_names_moves_no_bit(outcome, changes):
    usual = {}
    for objective in (DISTILL, "grpo"):
        for name in OTHER.keys() - changes.keys() - {*unread(objective)}:
            if is_idle(objective, changes, name):
                if objective not in usual:
                    usual[objective] = outcome(objective, changes)
                assert outcome(objective, {**changes, name: OTHER[name]}) == usual[objective], name


@pytest.mark.full
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_what_no_rule_names_moves_something(outcome, changes):
    """In one objective at least: phase 2 does not read what is of phase 1 alone."""
    names, moved, acting = OTHER.keys() - changes.keys(), set(), set()
    for objective in (DISTILL, "grpo", "noisy"):
        usual = outcome(objective, changes)
        acting |= {name for name in names if not is_idle(objective, changes, name)}
        for name in names - moved:
            if outcome(objective, {**changes, name: OTHER[name]}) != usual:
                moved.add(name)
    assert moved == acting


# -- who is told ---------------------------------------------------------------------------------


def told(caplog) -> list[str]:
    """Give what was warned of so far, and forget it."""
    found = [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()]
    caplog.clear()
    return found


@pytest.mark.parametrize(
    ("model", "train", "expected"),
    [
        ({}, {}, []),
        ({"user_embedding": True}, {"negatives": "in_batch", "tcl_weight": 0.0}, []),
        (
            {"score": "dot", "user_embedding": True},
            {},
            ["user_embedding=True has no effect: score=dot has no MLP"],
        ),
        (
            {"user_embedding": False},
            {"negatives": "in_batch", "n_negatives": 5, "reward": "mrr", "clip": 0.1},
            ["n_negatives=5 has no effect: negatives=in_batch takes the targets of others"],
        ),
        (
            {"steps": 0, "update": "rec_first"},
            {"tcl_margin": 0.3},
            ["update=rec_first has no effect: steps is 0", "tcl_margin=0.3 has no effect: steps"],
        ),
    ],
    ids=str,
)
def test_a_trainer_warns_of_its_own_options(
    prepared, make_model, tmp_path, caplog, model, train, expected
):
    model = {"dropout": 0.2, "user_embedding": False, "mlp_hidden": (200, 80), **model}
    Trainer(make_model(prepared, **model), prepared, TrainConfig(**train), "supervised", tmp_path)
    found = told(caplog)
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_phases_share_a_config_without_a_word(prepared, make_model, tmp_path, caplog):
    config = TrainConfig(
        n_negatives=5, reward="mrr", clip=0.1, rl_negatives=9, negatives="in_batch", distill_kl=3.0
    )
    for objective, n_told in (("supervised", 1), ("noisy", 0), ("grpo", 1)):
        Trainer(make_model(prepared), prepared, config, objective, tmp_path / objective)
        assert len(told(caplog)) == n_told, objective


ALL = [kind.trained for kind in VARIANTS.values()]


@pytest.mark.parametrize(
    ("trained", "given", "expected"),
    [
        (ALL, {"steps": 0, "align_queries": 0.0}, []),
        (ALL, {"tcl_weight": 0.3, "tcl_margin": 0.2, "share_steps": False, "reward": "mrr"}, []),
        (ALL, {"n_negatives": 5, "clip": 0.1, "inner_epochs": 2}, []),
        (ALL, {"distill_kl": 3.0}, ["distill_kl=3.0 has no effect: no model that is trained"]),
        (ALL, {"clip": 0.1}, ["clip=0.1 has no effect: with inner_epochs=1 no ratio leaves 1"]),
        (ALL[:2], {"reward": "mrr"}, ["reward=mrr has no effect: no model that is trained reads"]),
        (ALL[:1], {"steps": 5}, ["steps=5 has no effect: no model that is trained reads it"]),
        (ALL[:2], {"tcl_weight": 0.5}, ["tcl_weight=0.5 has no effect: steps is 0; no model that"]),
        ([*ALL, Trained("grpo", {"inner_epochs": 2})], {"clip": 0.1}, []),
        ([Trained(DISTILL)], {"reward": "mrr"}, ["reward=mrr has no effect: no model that is tr"]),
    ],
    ids=str,
)
def test_a_job_is_told_of_what_acts_on_none_of_its_models(caplog, trained, given, expected):
    of_model, of_train = split(given)
    warn_of_idle(LCRConfig(**of_model), TrainConfig(**of_train), trained, given)
    found = told(caplog)
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_commands_warn_of_what_they_are_given_and_of_no_default(tmp_path, caplog):
    data = tmp_path / "data"
    prepare(synthetic.generate(WORLD), data)
    out = ("--protocols", "sampled", "--out")
    run("train", "--data", data, *TINY, *out, tmp_path / "quiet")
    assert told(caplog) == []
    run(
        "train", "--data", data, *TINY, "--variants", "lcr", "--tcl-margin", "0.3",
        *out, tmp_path / "run",
    )  # fmt: skip
    found = told(caplog)
    # Of TINY, what is of phase 2; of the rest, what no model of these reads.
    assert [text.split("=")[0] for text in found] == [
        "tcl_margin", "rl_epochs", "rl_epoch_size", "rl_negatives", "n_trajectories"
    ]  # fmt: skip
    model = tmp_path / "run" / "lcr" / "model.safetensors"
    flags = ("--epochs", "1", "--tcl-weight", "0.3", "--reward", "mrr")
    run("distill", model, "--data", data, *flags, "--out", tmp_path / "student")
    assert [text.split("=")[0] for text in told(caplog)] == ["tcl_weight", "reward"]


def test_flags_that_say_nothing_beside_others_are_refused(prepared_folder, tmp_path, capsys):
    sampled = ("--protocols", "sampled", "--catalogue-users", "5")
    for words in (("baselines",), ("train", "--out", tmp_path / "run")):
        line = fails(capsys, *words, "--data", prepared_folder, *sampled)
        assert line.endswith("--catalogue-users 5: --protocols leaves the catalogue out")
    for flags in (("--noise", "0.5"), ("--seeds", "2"), ("--disjoint",), ("--dim", "8")):
        line = fails(capsys, "study", "strata", "--runs", tmp_path, *flags)
        assert line.endswith(f"--runs trains nothing: leave out {flags[0]}")
    with pytest.raises(SystemExit):  # it ranks among sampled negatives alone
        run("study", "grid", "--catalogue-users", "5")
