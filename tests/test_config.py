"""Configurations and batches: what they accept, how they say no, and the JSON round trip."""

import dataclasses
import json
import math

import pytest
import torch

from lcr_fast import Batch, LCRConfig, TrainConfig
from lcr_fast.testing import random_batch

OTHER = {
    LCRConfig: {"n_items": 7, "dim": 6, "n_heads": 3, "mlp_hidden": (9,), "dropout": 0},
    TrainConfig: {"seed": 2**63 - 1, "learning_rate": 1e-300, "action": "sampled", "reward": "mrr"},
}


@pytest.mark.parametrize("cls", OTHER)
def test_json_round_trip(cls):
    for config in (cls(), cls(**OTHER[cls])):
        text = config.to_json()
        assert cls.from_json(text) == config
        assert cls.from_dict(json.loads(text)) == config
        assert hash(cls.from_json(text)) == hash(config)
    assert cls().replace(**OTHER[cls]) == cls(**OTHER[cls])


@pytest.mark.parametrize("cls", OTHER)
def test_every_field_is_frozen_and_explained(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().seed = 3
    assert all(field.metadata["help"] for field in dataclasses.fields(cls))


REFUSED = [
    (LCRConfig, {"n_step": 2}, "LCRConfig has no field 'n_step'; did you mean 'steps'?"),
    (LCRConfig, {"zzz": 2}, "LCRConfig has no field 'zzz'"),
    (LCRConfig, {"dim": "64"}, "LCRConfig.dim must be an integer, got '64'"),
    (LCRConfig, {"dim": 64.0}, "LCRConfig.dim must be an integer, got 64.0"),
    (LCRConfig, {"dim": True}, "LCRConfig.dim must be an integer, got True"),
    (LCRConfig, {"dim": 0}, "LCRConfig.dim must be at least 1, got 0"),
    (LCRConfig, {"n_items": 0}, "LCRConfig.n_items must be at least 1, got 0"),
    (LCRConfig, {"steps": -1}, "LCRConfig.steps must be at least 0, got -1"),
    (LCRConfig, {"dim": 10, "n_heads": 4}, "n_heads must divide dim, got 4 heads for dim 10"),
    (LCRConfig, {"dropout": math.nan}, "LCRConfig.dropout must be a finite number, got nan"),
    (LCRConfig, {"dropout": 1.0}, "LCRConfig.dropout must be at most 0.99, got 1.0"),
    (LCRConfig, {"dropout": "0.1"}, "LCRConfig.dropout must be a finite number, got '0.1'"),
    (LCRConfig, {"step_ffn": 1}, "LCRConfig.step_ffn must be true or false, got 1"),
    (LCRConfig, {"update": "both"}, "update must be one of jacobi, search_first, rec_first"),
    (LCRConfig, {"backend": None}, "backend must be one of auto, reference, triton, cpp"),
    (LCRConfig, {"mlp_hidden": ()}, "mlp_hidden must list positive widths, got []"),
    (LCRConfig, {"mlp_hidden": (8, 0)}, "mlp_hidden must list positive widths, got [8, 0]"),
    (LCRConfig, {"mlp_hidden": (8, "9")}, "mlp_hidden must be a tuple, each entry an integer"),
    (LCRConfig, {"mlp_hidden": 8}, "mlp_hidden must be a tuple, each entry an integer, got 8"),
    (TrainConfig, {"lerning_rate": 1.0}, "did you mean 'learning_rate'?"),
    (TrainConfig, {"learning_rate": math.nan}, "learning_rate must be a finite number, got nan"),
    (TrainConfig, {"tcl_weight": math.inf}, "tcl_weight must be a finite number, got inf"),
    (TrainConfig, {"n_trajectories": 0}, "n_trajectories must be at least 1, got 0"),
    (TrainConfig, {"seed": 2**63}, "TrainConfig.seed must be at most"),
    (TrainConfig, {"seed": -1}, "TrainConfig.seed must be at least 0, got -1"),
    (TrainConfig, {"clip": 10**400}, "clip must be a finite number, got 1000"),
    (TrainConfig, {"n_negatives": 2**31}, f"n_negatives must be at most {2**31 - 1}, got"),
    (LCRConfig, {"mlp_hidden": (8, 2**40)}, f"mlp_hidden must be at most {2**31 - 1} each"),
    (TrainConfig, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
    (TrainConfig, {"reward": "mrr@5"}, "TrainConfig.reward must be hr@k, ndcg@k, mrr or a sum"),
    (TrainConfig, {"reward": "ndcg"}, "such as 0.5*hr@1+0.5*ndcg@10, got 'ndcg'"),
    (TrainConfig, {"reward": "hr@0"}, "TrainConfig.reward must be"),
    (TrainConfig, {"reward": f"hr@{2**64}"}, "TrainConfig.reward must be"),
    (TrainConfig, {"reward": "0.5*hr@1+map"}, "TrainConfig.reward must be"),
    (TrainConfig, {"reward": "hr@1+-1*mrr"}, "TrainConfig.reward must be"),
    (TrainConfig, {"reward": "hr@1+"}, "TrainConfig.reward must be"),
    (TrainConfig, {"reward": "nan*hr@1"}, "TrainConfig.reward must be"),
    (TrainConfig, {"precision": "float16"}, "precision must be one of float32, bfloat16, got"),
    (TrainConfig, {"reward": 1}, "TrainConfig.reward must be a text, got 1"),
]


@pytest.mark.parametrize(("cls", "values", "message"), REFUSED, ids=lambda v: str(v))
def test_bad_values_are_refused(cls, values, message):
    for build in (cls.from_dict, lambda v: cls().replace(**v)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            build(values)
        assert message in str(caught.value)


def test_a_list_must_be_a_tuple_where_no_json_is_read():
    with pytest.raises(ValueError, match=r"mlp_hidden must be a tuple.*got \[8\]"):
        LCRConfig(mlp_hidden=[8])
    assert LCRConfig.from_dict({"mlp_hidden": [8]}).mlp_hidden == (8,)


def test_bad_json_is_refused():
    with pytest.raises(ValueError, match="LCRConfig: not valid JSON"):
        LCRConfig.from_json("{dim: 3}")
    with pytest.raises(ValueError, match="LCRConfig must be a JSON object, got list"):
        LCRConfig.from_json("[]")


# -- Batch ----------------------------------------------------------------------------------------

FITTING = LCRConfig(n_items=9, n_users=2, n_terms=4, dim=4, max_search_len=2, max_rec_len=3)


@pytest.fixture
def batch():
    return random_batch(FITTING, 5, 3, torch.Generator().manual_seed(0))


BAD_TENSORS = {
    "rec_items must be an int64 tensor, got torch.int32": {"rec_items": torch.ones(5, 3).int()},
    "target must be an int64 tensor, got list": {"target": [0] * 5},
    r"rec_lengths must have 1 dimensions, got shape \[5, 1\]": {
        "rec_lengths": torch.ones(5, 1).long()
    },
    "candidates has 4 rows, but user has 5": {"candidates": torch.ones(4, 3).long()},
    "search_terms has 3 searches a user, but search_queries has 2": {
        "search_terms": torch.ones(5, 3, 1).long()
    },
    "search_clicks has 1 searches a user, but search_queries has 2": {
        "search_clicks": torch.ones(5, 1, 1).long()
    },
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_batch_refuses_tensors_that_do_not_fit(batch, message):
    with pytest.raises(ValueError, match=message):
        batch.replace(**BAD_TENSORS[message])


def test_batch_rows(batch):
    names = [f.name for f in dataclasses.fields(Batch)]
    chosen = torch.tensor([3, 1])
    mask = torch.tensor([False, True, False, True, False])
    assert len(batch) == 5
    assert len(batch.rows(slice(1, 3))) == 2
    for name in names:
        tensor = getattr(batch, name)
        assert torch.equal(getattr(batch.rows(chosen), name), tensor[chosen])
        assert torch.equal(getattr(batch.rows(mask), name), tensor[[1, 3]])
        assert torch.equal(getattr(batch.to("cpu"), name), tensor)
        assert getattr(batch.to("meta"), name).device.type == "meta"
    assert batch.device.type == "cpu"
