"""Saved models: bit-equal, replaced atomically, and everything else refused in one sentence."""

import ast
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import lcr_fast
from lcr_fast import LCRSER, LCRConfig
from lcr_fast.storage import load_tensors, save_tensors
from lcr_fast.testing import random_batch, random_model

CONFIG = LCRConfig(
    n_items=9, n_users=2, n_terms=4, dim=4, steps=2, max_search_len=2, max_rec_len=3,
    mlp_hidden=(5, 3),
)  # fmt: skip


@pytest.fixture
def model():
    return random_model(CONFIG, torch.Generator().manual_seed(0), torch.float32)


@pytest.fixture
def path(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 0, "score": "dot", "user_embedding": False},
        {"step_embedding": True, "share_steps": False, "item_text_dim": 3, "step_ffn": False},
    ],
    ids=str,
)
def test_round_trip_is_bit_equal(tmp_path, changes, dtype):
    model = random_model(CONFIG.replace(**changes), torch.Generator().manual_seed(0), dtype)
    model.save(tmp_path / "new folder" / "model.safetensors")
    loaded = LCRSER.load(tmp_path / "new folder" / "model.safetensors")
    assert loaded.config == model.config
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor), name
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_loaded_model_scores_and_trains_like_the_saved_one(model, path):
    batch = random_batch(CONFIG, 5, 3, torch.Generator().manual_seed(1))
    loaded = LCRSER.load(path).eval()
    assert torch.equal(loaded(batch), model(batch))
    before = path.read_bytes()
    loaded(batch).sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    assert path.read_bytes() == before  # the tensors are not the file's own memory


def test_the_backend_may_be_overridden(path):
    assert LCRSER.load(path, backend="reference").config.backend == "reference"
    with pytest.raises(ValueError, match="backend must be one of"):
        LCRSER.load(path, backend="cuda")


def rewrite(path, change, kind="model"):
    """Write the file again with other tensors or another config."""
    tensors, info = load_tensors(path, "model")
    change(tensors, info)
    save_tensors(path, kind, tensors, info)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path):
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)


def other_version(path):
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "format_version": "99"}
    tensors, _ = load_tensors(path, "model")
    safetensors.torch.save_file(tensors, path, metadata)


def without_config(path):
    tensors, _ = load_tensors(path, "model")
    safetensors.torch.save_file(tensors, path, {"kind": "model", "format_version": "1"})


def set_value(name, value):
    def change(tensors, info):
        tensors[name].view(-1)[-1] = value

    return lambda path: rewrite(path, change)


BROKEN = {
    "no such file": lambda path: path.unlink(),
    "not a complete safetensors file": truncate,
    "not a complete safetensors file ": lambda path: path.write_bytes(b""),
    "not a complete safetensors file  ": lambda path: path.write_text("{}" * 100),
    r"not a model file of lcr_fast \(kind None\)": foreign,
    r"not a model file of lcr_fast \(kind 'checkpoint'\)": lambda path: rewrite(
        path, lambda tensors, info: None, "checkpoint"
    ),
    "format version '99', this lcr_fast reads 1": other_version,
    "has no readable config": without_config,
    "tensor 'rec_position' has NaN or infinite": set_value("rec_position", torch.nan),
    "tensor 'head.target_weight' has NaN or infinite": set_value("head.target_weight", torch.inf),
    "tensor 'rec_position' should have shape": lambda path: rewrite(
        path, lambda tensors, info: tensors.pop("rec_position")
    ),
    r"should have shape \(3, 4\), the file has \(2, 4\)": lambda path: rewrite(
        path, lambda tensors, info: tensors.update(rec_position=torch.zeros(2, 4))
    ),
    "tensor 'extra' should have shape None": lambda path: rewrite(
        path, lambda tensors, info: tensors.update(extra=torch.zeros(1))
    ),
    "no field 'n_step'; did you mean 'steps'": lambda path: rewrite(
        path, lambda tensors, info: info.update(n_step=2)
    ),
    "dim must be an integer, got '4'": lambda path: rewrite(
        path, lambda tensors, info: info.update(dim="4")
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(path, message):
    BROKEN[message](path)
    with pytest.raises(ValueError, match=message.strip()) as caught:
        LCRSER.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


def test_a_folder_is_not_a_model(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        LCRSER.load(tmp_path)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_save_that_fails_half_way_leaves_the_old_file(monkeypatch, model, path, error):
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"half of a file")
        raise error

    with torch.no_grad():
        model.rec_position.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(type(error)):
            model.save(path)
    assert path.read_bytes() == before
    LCRSER.load(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    model.save(path)
    assert torch.equal(LCRSER.load(path).rec_position, model.rec_position)


def test_the_file_holds_plain_json_beside_the_tensors(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert LCRConfig.from_dict(json.loads(metadata["info"])) == CONFIG


def test_nothing_in_the_package_unpickles():
    """Neither pickle and its kin, nor the loaders of torch and numpy that use it."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = []
    for source in Path(lcr_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            loads = (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in {("torch", "load"), ("torch", "save")}
            )
            allowed = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
            if (
                modules.intersection(name.split(".")[0] for name in names)
                or loads
                or (allowed and not (isinstance(node.value, ast.Constant) and not node.value.value))
            ):
                found.append(f"{source.name}:{getattr(node, 'lineno', node)}")
    assert not found
