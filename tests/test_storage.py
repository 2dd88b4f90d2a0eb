"""Saved models: bit-equal, replaced atomically, and everything else refused in one sentence."""

import ast
import errno
import json
import math
import os
import resource
import signal
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch.nn.utils import parametrize, prune

import lcr_fast
from lcr_fast import LCRSER, LCRConfig, storage
from lcr_fast.storage import claimed, load_json, load_tensors, replacing, save_json, save_tensors
from lcr_fast.testing import random_batch, random_model
from lcr_fast.training.distillation import student_of

CONFIG = LCRConfig(
    n_items=9, n_users=2, n_terms=4, dim=4, steps=2, max_search_len=2, max_rec_len=3,
    mlp_hidden=(5, 3), user_embedding=True,
)  # fmt: skip


def prune_it(module):
    prune.l1_unstructured(module, "qkv_weight", amount=0.5)


def parametrize_it(module):
    parametrize.register_parametrization(module, "out_bias", torch.nn.Identity())


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


def test_tensors_keep_their_own_dtypes(tmp_path):
    """In a loaded model, an extended one, one for serving and a student."""
    config = CONFIG.replace(item_text_dim=3)
    model = random_model(config, torch.Generator().manual_seed(0), torch.float32)
    model.set_text(item_text=torch.ones(config.n_items + 1, 3))
    model.head.bfloat16()
    model.encoder.double()
    model.save(tmp_path / "model.safetensors")
    sizes = [n + 1 for n in (config.n_items, config.n_users, config.n_queries, config.n_terms)]
    made = {
        "loaded": LCRSER.load(tmp_path / "model.safetensors"),
        "extended": model.extended(*sizes),
        "projected": model.projected(),
        "student": student_of(model, config.steps),
    }
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    assert len(set(dtypes.values())) == 3
    for way, other in made.items():
        for name, tensor in other.state_dict().items():
            assert tensor.dtype == dtypes[name], (way, name)
            assert tensor.data_ptr() != model.state_dict()[name].data_ptr()
        assert all(p.requires_grad for p in other.parameters())
    for name, tensor in made["loaded"].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_file_of_integers_is_no_model(model, tmp_path):
    path = tmp_path / "model.safetensors"
    model.head.target_weight.requires_grad_(False)
    model.head.target_weight.data = model.head.target_weight.long()
    model.save(path)
    with pytest.raises(ValueError, match=r"'head\.target_weight' should hold floats, not torch"):
        LCRSER.load(path)


def test_a_loaded_model_scores_and_trains_like_the_saved_one(model, path):
    batch = random_batch(CONFIG, 5, 3, torch.Generator().manual_seed(1))
    loaded = LCRSER.load(path)
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
    change(tensors, info["config"])
    save_tensors(path, kind, tensors, info)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path):
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)


def other_version(version):
    """Save as another version of this package would, without a checksum before version 2."""

    def change(path):
        with safe_open(path, framework="pt") as file:
            metadata = {**file.metadata(), "format_version": version}
        if version == "1":
            del metadata["sha256"]
        tensors, _ = load_tensors(path, "model")
        safetensors.torch.save_file(tensors, path, metadata)

    return change


def by_other_hands(path):
    """Write what this package would, with another's tool: the same values, other bytes."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, _ = load_tensors(path, "model")
    tensors["rec_position"] += 1
    safetensors.torch.save_file(tensors, path, metadata)


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
    "format version '99', this lcr_fast reads 2": other_version("99"),
    "format version 1, which has no checksum, so damage would not show": other_version("1"),
    "damaged, its content has another checksum than it says": by_other_hands,
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
    with pytest.raises(ValueError, match="a folder; expected a model file"):
        LCRSER.load(tmp_path)


def test_a_loaded_model_evaluates_and_a_fresh_one_trains(model, path):
    """As torch has it: dropout only where it was asked for."""
    batch = random_batch(CONFIG, 5, 3, torch.Generator().manual_seed(1))
    assert LCRSER(CONFIG).training
    loaded = LCRSER.load(path)
    assert not any(module.training for module in loaded.modules())
    scores = loaded(batch)
    assert not torch.equal(loaded.train()(batch), scores)
    assert torch.equal(loaded.eval()(batch), scores)


def test_the_same_model_has_the_same_bytes(model, path):
    saved = path.read_bytes()
    LCRSER.load(path).save(path)
    assert path.read_bytes() == saved
    with torch.no_grad():
        model.rec_position[0, 0] += 1e-3
    model.save(path)
    assert path.read_bytes() != saved


def test_the_file_names_its_data(model, path):
    names = ("data_fingerprint", "vocabulary")
    assert [getattr(LCRSER.load(path), name) for name in names] == [None, None]
    model.data_fingerprint, model.vocabulary = "that", "those"
    model.save(path)
    assert [getattr(LCRSER.load(path), name) for name in names] == ["that", "those"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_save_that_fails_half_way_leaves_the_old_file(monkeypatch, model, path, error):
    before = path.read_bytes()

    def fail(handle):
        raise error

    with torch.no_grad():
        model.rec_position.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", fail)
        with pytest.raises(type(error)):
            model.save(path)
    assert path.read_bytes() == before
    LCRSER.load(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    model.save(path)
    assert torch.equal(LCRSER.load(path).rec_position, model.rec_position)


def test_an_error_names_the_file_that_was_asked_for(model, path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", ".name.of.our.own.partial")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "open", refuse)
        with pytest.raises(PermissionError) as error:
            model.save(path)
    assert error.value.filename == str(path)


def test_permissions_are_the_umasks_or_the_old_files(model, path):
    before = os.umask(0o027)
    try:
        model.save(path.with_name("new"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.with_name("new").stat().st_mode) == 0o640
    for mode in (0o664, 0o600):
        path.chmod(mode)
        model.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    with replacing(path) as temporary:  # while it is written, too
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.write_bytes(path.read_bytes())


def test_a_link_stays_one_and_what_is_no_file_is_left_alone(model, path):
    link, pipe = path.with_name("link"), path.with_name("pipe")
    link.symlink_to(path)
    with torch.no_grad():
        model.rec_position.add_(1)
    model.save(link)
    assert link.is_symlink()
    assert torch.equal(LCRSER.load(path).rec_position, model.rec_position)
    os.mkfifo(pipe)
    for other, kind in ((pipe, "a device or a pipe"), (path.parent, "a folder")):
        with pytest.raises(OSError, match=f"it is {kind}, not a regular file") as error:
            model.save(other)
        assert error.value.filename == str(other)
    assert pipe.is_fifo()
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(OSError, match="symbolic links"):
        model.save(link)


class Larger(LCRSER):
    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Parameter(torch.ones(3))


def test_a_subclass_with_tensors_of_its_own_is_saved_and_loaded(path):
    Larger(CONFIG).save(path)
    assert torch.equal(Larger.load(path).extra, torch.ones(3))
    with pytest.raises(ValueError, match="tensor 'extra' should have shape None"):
        LCRSER.load(path)


@pytest.mark.parametrize("change", [prune_it, parametrize_it])
def test_what_would_not_load_is_not_saved(model, path, change):
    before = path.read_bytes()
    change(model.encoder)
    for function in (model.save, lambda _: model.extended(10, 2, 4, 4)):
        with pytest.raises(ValueError, match="the model has no tensor 'encoder"):
            function(path)
    assert path.read_bytes() == before


INFO = {"config": CONFIG.to_dict(), "data": None, "vocabulary": None, "exits": None}
EXITS = {"rule": "", "weight": [0.0] * 10, "bias": [0.0] * 2}


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        (None, "it does not describe a model"),
        ([], "it does not describe a model"),
        ({}, "it does not describe a model"),
        ({**INFO, "config": []}, "it does not describe a model"),
        ({"config": INFO["config"]}, "it does not describe a model"),
        ({**INFO, "exits": 3}, "it does not describe a model"),
        (
            {**INFO, "exits": {**EXITS, "bias": [0.0] * 3}},
            r"exits must hold a weight \[10\] and a bias \[2\], got \[10\] and \[3\]",
        ),
        ({**INFO, "exits": {**EXITS, "weight": [math.nan] * 10}}, "a list of finite numbers"),
        ({**INFO, "exits": {**EXITS, "weight": "ab"}}, "it does not describe a model"),
    ],
)
def test_a_file_that_describes_no_model_is_refused(model, path, info, sentence):
    save_tensors(path, "model", model.state_dict(), {**INFO, "exits": EXITS})
    assert LCRSER.load(path).exits is not None
    save_tensors(path, "model", model.state_dict(), info)
    with pytest.raises(ValueError, match=sentence) as error:
        LCRSER.load(path)
    assert str(path) in str(error.value)


def test_a_small_file_cannot_ask_for_much_memory(model, path):
    """A table of 2^31 rows takes a hundred times what there is."""
    config = {**CONFIG.to_dict(), "n_items": 2**31 - 1, "dim": 2048}
    save_tensors(path, "model", model.state_dict(), {**INFO, "config": config})
    with pytest.raises(ValueError, match=r"should have shape .*, the file has"):
        LCRSER.load(path)


def test_the_file_holds_plain_json_beside_the_tensors(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert LCRConfig.from_dict(json.loads(metadata["info"])["config"]) == CONFIG


def test_any_byte_is_checked(model, path):
    """Spaces of the header too, which no reader of the format would look at."""
    model.data_fingerprint = ""
    while b" " * 2 not in (whole := path.read_bytes()):
        model.data_fingerprint += "-"
        model.save(path)
    for place in (*range(0, len(whole), 41), whole.index(b" " * 2), len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"model\.safetensors: ") as caught:
            LCRSER.load(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    LCRSER.load(path)


# -- JSON, room and litter -----------------------------------------------------------------------

VALUE = {"title": "a", "shape": (1, 2), "mean": float("nan"), "rows": [{"n": 3, "mean": 0.25}]}


def test_json_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "value.json"
    save_json(path, "thing", VALUE)
    read = load_json(path, "thing")
    assert read.pop("mean") != read.get("mean")  # NaN
    assert read == {"title": "a", "shape": [1, 2], "rows": VALUE["rows"]}
    saved = path.read_bytes()
    save_json(path, "thing", VALUE)
    assert path.read_bytes() == saved


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.25", "0.35", "damaged, its content has another checksum"),
        ('"n": 3', '"m": 3', "damaged, its content has another checksum"),
        ('"thing"', '"other"', "damaged, or not a thing file"),
        ('"format_version": 2', '"format_version": 1', "format version 1, which has no checksum"),
        ("}", "", "damaged, not valid JSON"),
    ],
)
def test_damaged_json_is_refused(tmp_path, old, new, message):
    path = tmp_path / "value.json"
    save_json(path, "thing", VALUE)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_json(path, "thing")


def test_no_room_is_said_of_the_file(model, path):
    """The limit of a file's size fails as a full disk does: in the middle of a write."""
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            model.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_only_what_is_abandoned_is_removed(tmp_path):
    path = tmp_path / "file"
    written, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with replacing(path) as half:
                half.write_text("half")
                os.write(write_end, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        assert os.read(written, 1) == b"!"
        with replacing(path) as mine:
            mine.write_text("mine")
            assert len(list(tmp_path.iterdir())) == 2  # the child lives, and so its file
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(written)
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(path) as again:
        again.write_text("again")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_has_one_writer(tmp_path):
    with claimed(tmp_path / "run"):
        other = claimed(tmp_path / "run")
        with pytest.raises(ValueError, match="run: another process is writing into it"):
            other.__enter__()
        litter = tmp_path / "run" / "lcr" / ".model.safetensors.x1y2.partial"
        litter.parent.mkdir()
        litter.write_text("half")
        (litter.parent / ".mine").write_text("mine")
    with claimed(tmp_path / "run"):
        assert [p.name for p in litter.parent.iterdir()] == [".mine"]


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
