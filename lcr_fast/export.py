"""Models as programs: ``torch.export``, AOTInductor packages that run without Python, and ONNX.

A program takes batches of any number of users, events, terms, clicks and candidates, up to the
lengths that the model reads, and does what the model does in evaluation on one backend, whose ops
stand in it as ``lcr_fast::...``. Importing this module tells torch what a Batch is made of;
:func:`load` does that too.
"""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from lcr_fast.batch import Batch
from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER, evaluating
from lcr_fast.serving.scorer import Scorer, obstacle
from lcr_fast.storage import replacing

Format = Literal["pt2", "aoti", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
#: The ONNX operator set of ``onnx`` files.
OPSET = 20
_FIELDS = tuple(field.name for field in dataclasses.fields(Batch))
_ONNX_BYTES = 2 << 30
_B = 3  # users to trace with

torch.export.register_dataclass(Batch, serialized_type_name="lcr_fast.Batch")
torch.serialization.add_safe_globals([Batch])  # of the inputs that a program was traced with


class _Traced(nn.Module):
    """Scores the batch's candidates: [B, C]."""

    def __init__(self, model: LCRSER | Scorer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        with _SizesUnasked():
            return self.model(batch)


class _Recommender(nn.Module):
    """Finds the k best unseen items of the catalogue: ids and scores, [B, k]."""

    def __init__(self, model: LCRSER, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k

    def forward(self, batch: Batch, exclude: Tensor) -> tuple[Tensor, Tensor]:
        with _SizesUnasked():
            return self.model.recommend(batch, self.k, exclude)


class _SizesUnasked(TorchFunctionMode):
    """Trace products and attention in the form in which torch runs them.

    Its rules for their shapes ask whether a size that could be broadcast is 1, and a program that
    has answered no would refuse a history of one event. Said explicitly, there is nothing to ask.
    """

    _PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self._PRODUCTS and all(t.ndim == 3 for t in args):
            left, right = args
            return torch.bmm(left.expand(right.shape[0], -1, -1), right)
        if function is F.scaled_dot_product_attention:
            query, key, _ = args
            mask = kwargs["attn_mask"].expand(*query.shape[:-1], key.shape[-2])
            kwargs = {**kwargs, "attn_mask": mask}
        return function(*args, **kwargs)


def program(model: LCRSER, *, k: int | None = None) -> ExportedProgram:
    """Export a model: ``program(model).module()(batch)`` gives the very bits of ``model(batch)``.

    With ``k`` it is ``model.recommend(batch, k, exclude)``, ``exclude`` int64 [B, X]. What is
    dynamic, from 0 on: B, C and X, the terms of a query; up to the config's limits the events of
    either history and the clicks of a search, but where a limit is 1 exactly 1. Tensors have to be
    contiguous, which :func:`load` sees to. Ids and lengths are not checked as the model checks
    them: on the reference an id out of range is an IndexError and a length is not seen. Raises
    ValueError where text vectors are missing, ``k`` is below 1, the model has exits or row 0 of a
    table is not 0.
    """
    _refuse_exits(model)
    if k is None:
        return _trace(model, _Traced(model))
    exclude = torch.zeros(_B, 2, dtype=torch.int64, device=model.head.target_weight.device)
    return _trace(model, _Recommender(model, k), exclude)


def _refuse_exits(model: LCRSER) -> None:
    if model.exits is not None:
        raise ValueError("a model that leaves early is no program: export the one without exits")


def _trace(model: LCRSER, module: nn.Module, exclude: Tensor | None = None) -> ExportedProgram:
    from torch.fx.experimental import _config as tracing

    inputs: tuple[Any, ...] = (_example(model.config).to(model.head.target_weight.device),)
    sizes = _dynamic(model.config)
    shapes: list[Any] = [[{a: sizes[name] for a, name in axes.items()} for axes in _axes()]]
    if exclude is not None:
        inputs = (*inputs, exclude)
        shapes.append({0: sizes["B"], 1: sizes["X"]})
    model.check_padding()
    # Sizes of 0 and 1 are sizes like any other: without the patch they would be refused.
    as_any = tracing.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with evaluating(model), torch.no_grad(), as_any:
        return torch.export.export(module, inputs, dynamic_shapes=tuple(shapes))


def _example(config: LCRConfig) -> Batch:
    """Make a batch to trace with; only its sizes matter, and that no free one is 0 or 1."""
    B, C, T, M = _B, 5, 4, config.max_clicks
    search, rec = config.max_search_len, config.max_rec_len
    shapes = {
        "rec_items": (B, rec),
        "search_queries": (B, search),
        "search_terms": (B, search, T),
        "search_clicks": (B, search, M),
        "candidates": (B, C),
    }
    return Batch(**{name: torch.zeros(shapes.get(name, B), dtype=torch.int64) for name in _FIELDS})


def _axes() -> list[dict[int, str]]:
    """Name the axes of a Batch's fields, in their order."""
    axes = {
        "rec_items": {1: "L_r"},
        "search_queries": {1: "L_s"},
        "search_terms": {1: "L_s", 2: "T"},
        "search_clicks": {1: "L_s", 2: "M"},
        "candidates": {1: "C"},
    }
    return [{0: "B", **axes.get(name, {})} for name in _FIELDS]


def _limits(config: LCRConfig) -> dict[str, int]:
    """Say how long axes may be; the others are unlimited."""
    return {"L_s": config.max_search_len, "L_r": config.max_rec_len, "M": config.max_clicks}


def _dynamic(config: LCRConfig) -> dict[str, Any]:
    """Say between which sizes each axis may be."""
    limits = _limits(config)
    unlimited = {name: Dim(name, min=0) for name in ("B", "T", "C", "X")}
    # An axis of one place is that or nothing: torch would make two programs of it.
    limited = {
        name: Dim(name, min=0, max=limit) if limit > 1 else Dim.STATIC
        for name, limit in limits.items()
    }
    return {**unlimited, **limited}


def save(
    model: LCRSER,
    path: str | Path,
    format: Format = "pt2",
    *,
    k: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model as a program, replacing ``path`` atomically; ``k`` as for :func:`program`.

    - ``pt2``: what ``torch.export`` makes of it.
    - ``aoti``: compiled by AOTInductor, which takes a C++ compiler and its time; where a Scorer can
      serve the model, that is what is compiled, a single operator, with products in ``dtype``;
      nothing is kept of the items, which would be in the file. Also for processes without Python,
      which pass the tensors of a Batch in the order of its fields (``examples/score.cpp``). They
      have to be contiguous: of others compiled code makes wrong scores, and does not say so.
    - ``onnx``: operator set ``OPSET``, on the reference whatever the model's backend, scores of
      candidates alone. Inputs are named as the fields of a Batch, the output ``scores``. Any axis
      may be empty.

    Raises ValueError where :func:`program` does, and for a format that cannot hold the model.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    _refuse_exits(model)
    if dtype != torch.float32 and (format != "aoti" or k is not None):
        raise ValueError(f"products in {dtype} are for scores in the format aoti")
    if format == "onnx":
        _check_onnx(model, k)
        made = _onnx_program(program(_on_reference(model)), model.config)
        with replacing(path) as temporary:
            made.save(temporary, external_data=False)
        return
    write = {"pt2": _write_pt2, "aoti": _compile}[format]
    if format == "aoti" and k is None and (dtype != torch.float32 or obstacle(model) is None):
        scorer = Scorer(model, dtype=dtype, keep_items=False)
        exported = _trace(model, _Traced(scorer))  # one operator, and nothing to compile
    else:
        exported = program(model, k=k)
    with replacing(path) as temporary:
        write(exported, temporary)


def load(path: str | Path, format: Format = "pt2") -> Callable[..., Any]:
    """Read what :func:`save` wrote: a function of a Batch, and of ``exclude`` where it has k.

    A program is code: read none that you would not run. ONNX is for other readers: ValueError.
    """
    made: Callable[..., Any]
    if format == "pt2":
        with open(path, "rb") as file:
            made = torch.export.load(file).module()
    elif format == "aoti":
        from torch._inductor import aoti_load_package

        made = aoti_load_package(path)
    else:
        raise ValueError(f"a program in the format {format} is not for PyTorch")

    def run(batch: Batch, *exclude: Tensor) -> Any:
        # Slices and transposed tensors: compiled code would read them as if they were none.
        fields = {name: tensor.contiguous() for name, tensor in vars(batch).items()}
        return made(Batch(**fields), *(t.contiguous() for t in exclude))

    return run


def _write_pt2(exported: ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(exported, file)
    with path.open("rb") as file:  # by its temporary name torch would say that it is no .pt2
        torch.export.load(file)  # torch writes what it cannot read: better no file than such a one


def _compile(exported: ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    # The compiler insists on the end of the name.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        package = Path(folder) / "program.pt2"
        aoti_compile_and_package(exported, package_path=str(package))
        package.replace(path)


# -- ONNX -----------------------------------------------------------------------------------------


def _check_onnx(model: LCRSER, k: int | None) -> None:
    if k is not None:
        raise ValueError("an ONNX program scores candidates; for the catalogue use pt2 or aoti")
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"format onnx needs the package {package}: pip install 'lcr-fast[onnx]'"
            )
    state = (*model.parameters(), *model.buffers())
    if sum(t.numel() * t.element_size() for t in state) >= _ONNX_BYTES:
        raise ValueError("an ONNX file holds less than 2 GiB, and the model's tensors are larger")


def _on_reference(model: LCRSER) -> LCRSER:
    """Make a model with the same tensors whose ops run on the reference.

    It may read an event and a click even where the model reads none, see _fill_empty_axes().
    """
    config = model.config
    copy = LCRSER(config.replace(
        backend="reference", max_search_len=max(config.max_search_len, 1),
        max_rec_len=max(config.max_rec_len, 1), max_clicks=max(config.max_clicks, 1),
    ))  # fmt: skip
    copy.set_text(model.item_text, model.query_text)
    state = model.state_dict()
    for name in ("search_position", "rec_position"):
        missing = len(getattr(copy, name)) - len(state[name])
        state[name] = F.pad(state[name], (0, 0, 0, missing))
    copy.copy_state(state)
    return copy.cpu()


def _onnx_program(exported: ExportedProgram, config: LCRConfig) -> torch.onnx.ONNXProgram:
    import onnx_ir
    from onnxscript import opset20 as op

    def searchsorted(rows, values, **_):
        """Count what is less, for ONNX has no such search; the lists are histories."""
        less = op.Less(op.Unsqueeze(rows, [-2]), op.Unsqueeze(values, [-1]))
        return op.ReduceSum(op.Cast(less, to=onnx_ir.DataType.INT64), [-1], keepdims=0)

    made = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
        input_names=list(_FIELDS),
        output_names=["scores"],
        custom_translation_table={torch.ops.aten.searchsorted.Tensor: searchsorted},
    )
    assert made is not None  # it is where the program is written to a file at once
    graph, limits = made.model.graph, _limits(config)
    # The axes' names, in place of torch's symbols; what is never read has no place.
    names = {}
    for value, axes in zip(graph.inputs, _axes(), strict=True):
        sizes = list(_known(value.shape))
        for axis, name in axes.items():
            names[str(sizes[axis])] = name
            sizes[axis] = 0 if limits.get(name) == 0 else name
        value.shape = onnx_ir.Shape(sizes)
    for value in graph.outputs:
        value.shape = onnx_ir.Shape([names[str(size)] for size in _known(value.shape)])
    _fill_empty_axes(graph)
    return made


def _fill_empty_axes(graph: Any) -> None:
    """Pad histories and clicks to one place at least: other engines do not attend to nothing."""
    for value, axes in zip(graph.inputs, _axes(), strict=True):
        least = [int(axes.get(axis) in ("L_s", "L_r", "M")) for axis in range(len(value.shape))]
        if any(least):
            users = [(use.node, use.idx) for use in value.uses()]
            nodes, filled = _padded(value, least)
            graph.insert_before(graph[0], nodes)
            for node, index in users:
                node.replace_input_with(index, filled)


def _padded(value: Any, least: list[int]) -> tuple[list[Any], Any]:
    """Make the nodes that pad a tensor with zeros to the ``least`` sizes, and their result."""
    import onnx_ir

    nodes = []

    def add(kind: str, *inputs: Any, **attributes: Any) -> Any:
        nodes.append(onnx_ir.node(kind, inputs, attributes))
        return nodes[-1].outputs[0]

    def constant(numbers: list[int]) -> Any:
        return add("Constant", value=onnx_ir.tensor(numbers, onnx_ir.DataType.INT64))

    nothing = constant([0] * len(least))
    missing = add("Max", add("Sub", constant(least), add("Shape", value)), nothing)
    padded = add("Pad", value, add("Concat", nothing, missing, axis=0))
    padded.dtype = value.dtype
    return nodes, padded


def _known(shape: Any) -> Any:
    assert shape is not None  # of what was traced
    return shape
