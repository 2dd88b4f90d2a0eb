"""Programs: torch.export gives a model's bits for every size, AOTInductor and ONNX its scores."""

import dataclasses
import importlib.util
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

from lcr_fast import cli, export
from lcr_fast.config import LCRConfig
from lcr_fast.serving.scorer import Scorer
from lcr_fast.testing import random_batch, random_model

SIZES = {"n_items": 60, "n_users": 9, "n_terms": 20, "n_queries": 11}
CONFIG = LCRConfig(
    **SIZES, dim=32, steps=2, max_search_len=4, max_rec_len=5, max_clicks=2, mlp_hidden=(16, 8)
)
EXAMPLE = Path(__file__).parents[1] / "examples" / "score.cpp"
# (B, C): one, none, and more of either than a program was traced with.
SHAPES = ((4, 7), (1, 1), (0, 3), (3, 0), (9, 40))
BACKENDS = [
    "cpp",
    pytest.param("reference", marks=pytest.mark.full),
    pytest.param("triton", marks=[pytest.mark.full, pytest.mark.gpu]),
]


def make(backend: str, dtype=torch.float32, **changes):
    config = CONFIG.replace(backend=backend, **changes)
    return random_model(config, torch.Generator().manual_seed(0), dtype).to(device_of(backend))


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def batches(config: LCRConfig, lengths=(0, 1, 3)):
    """Draw batches of all shapes, their histories as long as can be, and of these lengths."""
    generator = torch.Generator().manual_seed(1)
    for i, (n_users, n_candidates) in enumerate(SHAPES):
        batch = random_batch(config, n_users, n_candidates, generator)
        yield batch
        # Each length with each number of users would be more of the same.
        for length in lengths if i < 2 else lengths[:1]:
            yield batch.replace(
                rec_items=batch.rec_items[:, :length],
                rec_lengths=batch.rec_lengths.clamp(max=length),
                search_queries=batch.search_queries[:, :length],
                search_terms=batch.search_terms[:, :length, :length],
                search_clicks=batch.search_clicks[:, :length, :1],
                search_lengths=batch.search_lengths.clamp(max=length),
            )


def assert_same_scores(model, scorer):
    with torch.no_grad():
        for drawn in batches(model.config):
            batch = drawn.to(device_of(model.config.backend))
            assert torch.equal(scorer(batch), model(batch)), batch.candidates.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_gives_the_models_bits_for_every_size(backend, tmp_path):
    model, file, out = make(backend), tmp_path / "model.safetensors", tmp_path / "scorer.pt2"
    model.save(file)
    placed = ["--backend", backend, "--device", device_of(backend)]
    cli.main(["export", str(file), *placed, "-o", str(out)])
    assert_same_scores(model, export.load(out))
    names = {str(node.target) for node in torch.export.load(out).graph.nodes}
    assert any(name.startswith("lcr_fast.") for name in names) == (backend != "reference")


def test_a_program_reads_slices(tmp_path, monkeypatch, caplog):
    """Compiled code would take them for whole tensors, and is given none."""
    model, path = make("cpp", steps=1), tmp_path / "program.pt2"
    export.save(model, path, k=3)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    batch = random_batch(model.config, 8, 7, torch.Generator().manual_seed(4))
    every_other = batch.rows(slice(None, None, 2))
    exclude = batch.candidates[::2, :3]
    assert not every_other.rec_lengths.is_contiguous()
    found = export.load(path)(every_other, exclude)
    for mine, expected in zip(found, model.recommend(every_other, 3, exclude), strict=True):
        assert torch.equal(mine, expected)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda *given: given)
    given, of_exclude = export.load(path, "aoti")(every_other, exclude)
    assert all(tensor.is_contiguous() for tensor in (*vars(given).values(), of_exclude))


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"max_search_len": 1, "max_clicks": 1, "steps": 1},
        {"update": "search_first", "backend": "reference", "steps": 1},
        {"user_embedding": True, "seen_bonus": False, "query_encoder": "id", "readout": 0.5},
        {"score": "dot", "share_steps": False, "step_ffn": False},
    ],
    ids=str,
)
def test_programs_of_other_configs(changes, tmp_path):
    model, path = make(**{"backend": "cpp", **changes}), tmp_path / "program.pt2"
    export.save(model, path)
    scorer = export.load(path)
    full = [b for b in batches(model.config) if b.rec_items.shape[1] == model.config.max_rec_len]
    with torch.no_grad():
        for batch in full:
            assert torch.equal(scorer(batch), model(batch))


@pytest.mark.full
def test_a_program_in_halves_and_with_text():
    model = make("cpp", torch.bfloat16, item_text_dim=6, query_text_dim=3, steps=1)
    generator = torch.Generator().manual_seed(2)
    texts = (torch.randn(n + 1, d, generator=generator) for n, d in ((60, 6), (11, 3)))
    with pytest.raises(ValueError, match="call set_text"):
        export.program(model)
    model.set_text(*texts)
    assert_same_scores(model, export.program(model).module())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_catalogue(backend):
    model = make(backend)
    recommender = export.program(model, k=5).module()
    generator = torch.Generator().manual_seed(3)
    for drawn in batches(model.config):
        n_users, batch = len(drawn), drawn.to(device_of(backend))
        exclude = torch.randint(0, 70, (n_users, n_users), generator=generator).to(batch.device)
        for found, expected in zip(
            recommender(batch, exclude), model.recommend(batch, 5, exclude), strict=True
        ):
            assert torch.equal(found, expected)


def test_what_cannot_be_exported(tmp_path):
    model = make("cpp")
    with pytest.raises(ValueError, match="format must be one of pt2, aoti, onnx, got 'tf'"):
        export.save(model, tmp_path / "program", "tf")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        export.save(model, tmp_path / "program", k=0)
    with pytest.raises(ValueError, match="bfloat16 are for scores in the format aoti"):
        export.save(model, tmp_path / "program", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="an ONNX program scores candidates"):
        export.save(model, tmp_path / "program", "onnx", k=5)
    with pytest.raises(ValueError, match="onnx is not for PyTorch"):
        export.load(tmp_path / "program", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_training_model_goes_on_training():
    model = make("cpp").train()
    with pytest.raises(ValueError, match="k must be"):
        export.program(model, k=0)
    assert model.training


@pytest.mark.full
@pytest.mark.parametrize("changes", [{}, {"max_search_len": 0}], ids=str)
def test_onnx_runtime_scores_alike_for_every_size(tmp_path, changes):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    import onnx
    import onnxruntime

    model, path = make("cpp", **changes), tmp_path / "scorer.onnx"
    export.save(model, path, "onnx")
    file = onnx.load(path)
    assert [s.version for s in file.opset_import if s.domain == ""] == [export.OPSET]
    axes = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in file.graph.input}
    assert axes["search_terms"] == ["B", "" if changes else "L_s", "T"]
    assert axes["candidates"] == ["B", "C"]
    session = onnxruntime.InferenceSession(path)
    exact = make("reference", **changes).double()
    for batch in batches(model.config):
        feed = {i.name: getattr(batch, i.name).numpy() for i in session.get_inputs()}
        (scores,) = session.run(["scores"], feed)
        with torch.no_grad():
            expected = exact(batch).float()
        # float32 by another engine's arithmetic, which is not ours to hold to eager's error.
        torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Compile a model; return it and the package."""
    if shutil.which(get_cxx_compiler()) is None:
        pytest.skip("needs a C++ compiler")
    # Of this width a Scorer has the model's bits.
    model, path = make("cpp", dim=64), tmp_path_factory.mktemp("aoti") / "scorer.pt2"
    export.save(model, path, "aoti")
    return model, path


@pytest.mark.full
def test_a_compiled_program_gives_the_models_bits_for_every_size(package):
    model, path = package
    assert_same_scores(model, export.load(path, "aoti"))


@pytest.mark.full
def test_a_compiled_program_in_bfloat16(package, tmp_path):
    model, _ = package
    file, out = tmp_path / "model.safetensors", tmp_path / "scorer.pt2"
    model.save(file)
    options = ["--format", "aoti", "--dtype", "bfloat16", "--backend", "cpp"]
    cli.main(["export", str(file), *options, "-o", str(out)])
    scorer, program = Scorer(model, dtype=torch.bfloat16), export.load(out, "aoti")
    with torch.no_grad():
        for batch in batches(model.config):
            assert torch.equal(program(batch), scorer(batch))


@pytest.mark.full
def test_a_compiled_program_runs_without_python(package, tmp_path):
    """The C++ example finds the schemas of our operators in their library, not in Python."""
    from lcr_fast import _C

    model, path = package
    binary, file = tmp_path / "score", tmp_path / "batch.pt"
    command = [get_cxx_compiler(), "-std=c++20", str(EXAMPLE), "-o", str(binary)]
    command += [f"-I{folder}" for folder in include_paths()]
    for folder in library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    batch = next(batches(model.config))
    torch.save([getattr(batch, field.name) for field in dataclasses.fields(batch)], file)

    def run(*arguments):
        return subprocess.run([binary, *arguments], capture_output=True, text=True)

    ran = run(path, _C.__file__, file)
    assert ran.returncode == 0, ran.stderr
    scores = [[float(word) for word in line.split()] for line in ran.stdout.splitlines()]
    with torch.no_grad():
        assert torch.equal(torch.tensor(scores), export.load(path, "aoti")(batch))
    assert run(path, tmp_path / "missing.so", file).returncode == 1
    assert run(path, _C.__file__, tmp_path / "missing.pt").returncode == 1
