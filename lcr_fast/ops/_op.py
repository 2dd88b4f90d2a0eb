"""What an op is: its registered passes, its backends, and one rule for all of them.

A new backend is a :class:`Backend` in an op's list, a new op an :class:`Op`; see
docs/adding-a-backend.md.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from lcr_fast.ops._dispatch import choose_backend
from lcr_fast.ops._extension import extension_error, has_kernel
from lcr_fast.precision import without_autocast

_LIBRARY = torch.library.Library("lcr_fast", "FRAGMENT")
# What the fields of a call are in a schema.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    tuple[Tensor, ...]: "Tensor[]",
    int: "int",
    float: "float",
    bool: "bool",
    list[int]: "int[]",
}

#: What lengths may be; fused ops convert them to int64.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# torch's fused attention on CPUs has no second derivatives, and none in forward mode, either.
_PLAIN = "backend='reference' within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"


class Case(Protocol):
    """All that decides which backends can serve a call."""

    @property
    def device(self) -> str:
        """The device of the call's tensors, such as ``cpu`` and ``cuda``."""
        ...


class Backend(NamedTuple):
    """One implementation of an op."""

    name: str  # as callers ask for it
    prefix: str  # of its registered passes: lcr_fast::<prefix><op>
    devices: tuple[str, ...]  # where ``auto`` prefers it to the reference
    obstacle: Callable[[Any], str | None]  # of a case: None, or why it cannot be served
    # Of each pass. None: C++ defines and implements them, for programs without Python too.
    launchers: Sequence[Callable[..., Any]] = ()


def kernel(module: str, name: str) -> Callable[..., Any]:
    """Name a launcher in lcr_fast.kernels, which is imported when it is first called.

    Schemas are known before Triton is: importing this package must not import it.
    """

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"lcr_fast.kernels.{module}"), name)(*arguments)

    return launch


class Op:
    """An op of the package: passes that every backend registers alike, and the choice of one.

    ``call`` is a NamedTuple with a field for each argument of the forward pass, in that order, and
    ``results`` names the tensors that it returns. An op with ``gradients``, fields of the call, has
    a backward pass too: of the gradients of the results, the call and what was saved it makes the
    gradients of those fields. The two are registered as ``<op>_fwd`` and ``<op>_bwd``, an only pass
    as ``<op>``. Results that ``saved`` names are for the backward pass alone; the forward pass of
    such an op takes one more argument, a bool that asks for them. Absent tensors of an op with
    gradients are empty ones.

    ``fake`` gives the results for a call (and the bool), right in shape and dtype, without a number
    in them. A gradient has its field's shape, or what ``fake_gradients`` gives for it. ``beyond``
    says why no backend will serve a case, which is the reference's alone.
    """

    def __init__(
        self,
        name: str,
        call: Any,
        results: tuple[str, ...],
        fake: Callable[..., Any],
        backends: Sequence[Backend],  # the preferred first; the reference serves every op
        *,
        gradients: tuple[str, ...] = (),
        saved: tuple[str, ...] = (),
        fake_gradients: Mapping[str, Callable[[Any], Tensor]] | None = None,
        beyond: Callable[[Any], str | None] = lambda case: None,
    ) -> None:
        self.name, self.call, self.results, self.backends = name, call, results, tuple(backends)
        self.gradients, self.saved = gradients, saved
        self._fake_results, self._fake_gradients = fake, fake_gradients or {}
        self._beyond = beyond
        kinds = {field: _TYPES[kind] for field, kind in call.__annotations__.items()}
        arguments = [f"{kind} {field}" for field, kind in kinds.items()]
        forward = _schema(
            [*arguments, *(["bool save"] if saved else [])], ["Tensor"] * len((*results, *saved))
        )
        #: Schema and fake of each pass, by the name that a backend's prefix is put before.
        self.passes: dict[str, tuple[str, Callable[..., Any]]] = {name: (forward, self._fake)}
        if gradients:
            backward = _schema(
                [
                    *(f"Tensor d{result}" for result in results),
                    *arguments,
                    *(f"Tensor {result}" for result in saved),
                ],
                [kinds[field] for field in gradients],
            )
            self.passes = {
                f"{name}_fwd": (forward, self._fake),
                f"{name}_bwd": (backward, self._fake_backward),
            }
        self._prefixes: dict[str, str] = {}
        self._outdated: set[str] = set()
        # Looked up once: torch.compile cannot trace the question.
        self._built: dict[tuple[str, str], bool] = {}
        for backend in backends:
            self.register(backend)

    def register(self, backend: Backend) -> None:
        """Register the passes of a backend, with their fakes, as the constructor does."""
        self._prefixes[backend.name] = backend.prefix
        built = {"cpu", "cuda"}
        for i, (name, (schema, fake)) in enumerate(self.passes.items()):
            name = backend.prefix + name
            if backend.launchers:
                _LIBRARY.define(name + schema)
                for device in built:  # cpu: kernels may be interpreted
                    _LIBRARY.impl(name, backend.launchers[i], device.upper())
            built = {device for device in built if has_kernel(name, device)}
            if built and not backend.launchers:
                defined = getattr(torch.ops.lcr_fast, name).default._schema
                if defined != _C.parse_schema(f"lcr_fast::{name}{schema}"):
                    self._outdated.add(backend.name)
                    built = set()
            if built:
                torch.library.register_fake(f"lcr_fast::{name}", fake)
        self._built |= {(backend.name, device): device in built for device in ("cpu", "cuda")}

    def _fake(self, *arguments: Any) -> Any:
        n = len(self.call._fields)
        return self._fake_results(self.call(*arguments[:n]), *arguments[n:])

    def _fake_backward(self, *arguments: Any) -> Any:
        call = self.call(*arguments[len(self.results) :][: len(self.call._fields)])
        return tuple(
            self._fake_gradients[field](call)
            if field in self._fake_gradients
            else torch.empty_like(part)
            if isinstance(part := getattr(call, field), Tensor)
            else [torch.empty_like(t) for t in part]
            for field in self.gradients
        )

    @property
    def implementations(self) -> tuple[str, ...]:
        return ("reference", *(b.name for b in self.backends))

    # -- the choice -----------------------------------------------------------------------------

    def _obstacle(self, backend: Backend, case: Case) -> str | None:
        if not backend.launchers:
            if case.device not in backend.devices:
                return f"it needs {' or '.join(map(str.upper, backend.devices))} tensors"
            if (error := extension_error()) is not None:
                return f"the C++ extension is not built ({error})"
            if backend.name in self._outdated:
                return "the C++ extension was built from other sources: build it again"
            if not self._built[backend.name, case.device]:
                return f"the C++ extension was built without it for {case.device.upper()} tensors"
        return backend.obstacle(case) or self._beyond(case)

    def obstacles(self, case: Case) -> dict[str, str | None]:
        """List the implementations, the preferred first, each with None or what prevents it.

        Behind the reference are those that are never chosen by themselves, such as an interpreter.
        """
        before = [b for b in self.backends if case.device in b.devices]
        behind = [b for b in self.backends if case.device not in b.devices]
        return {
            **{b.name: self._obstacle(b, case) for b in before},
            "reference": None,
            **{b.name: self._obstacle(b, case) for b in behind},
        }

    def of_model(self, backend: str, case: Case | None = None) -> str:
        """Give what to ask of this op where a model asks all of its ops for ``backend``.

        That is ``auto`` where the op has no such backend, and in a case of the reference's alone.
        """
        beyond = case is not None and self._beyond(case) is not None
        return backend if backend in self.implementations and not beyond else "auto"

    def choose(self, backend: str, case: Case, *, notice: bool = False) -> str:
        """Choose what serves a call: see :func:`lcr_fast.ops.choose_backend`.

        With ``notice`` the log says, once, why ``auto`` is not the device's preferred backend.
        """
        for first in self.backends:  # the ordinary call, without the list of all
            if case.device in first.devices:
                if backend in ("auto", first.name) and self._obstacle(first, case) is None:
                    return first.name
                break
        available = self.obstacles(case)
        preferred = next(iter(available)) if notice else None
        return choose_backend(self.name, backend, available, preferred)

    # -- the call -------------------------------------------------------------------------------

    def run(self, backend: str, name: str, *arguments: Any) -> Any:
        """Run one of the registered passes of a backend."""
        return getattr(torch.ops.lcr_fast, self._prefixes[backend] + name)(*arguments)

    def __call__(
        self,
        backend: str,
        call: Any,
        finish: Mapping[str, Callable[[Any, Tensor], Tensor]] | None = None,
    ) -> Any:
        """Run a fused backend; where a gradient is asked for, its backward pass will be run too.

        ``finish`` makes a field's gradient, where it is wanted, of the call and what the backward
        pass returns for it. Second derivatives, those in forward mode (jvp, dual tensors) and those
        of ``torch.func`` are the reference's alone: RuntimeError. ValueError where some tensors are
        on the meta device.
        """
        self._refuse_meta(call)
        if forward_ad._current_level >= 0:  # an integer: -1 outside of forward mode
            self._refuse_tangents(backend, call)
        if not torch.compiler.is_compiling() and _C._are_functorch_transforms_active():
            self._refuse_batches(backend, call)
        if not self.gradients:
            return self.run(backend, self.name, *call)
        if torch.is_grad_enabled():
            tensors = _tensors(call)
            if any(t.requires_grad for t in tensors):
                if not torch.compiler.is_compiling() and _C._are_functorch_transforms_active():
                    raise RuntimeError(
                        f"{self.name} on {backend} has no gradients within torch.func: ask for "
                        "backend='reference'"
                    )
                return _Recorded.apply(self, backend, finish or {}, _form(call), *tensors)
        if not self.saved:
            return self.run(backend, f"{self.name}_fwd", *call)
        return self.run(backend, f"{self.name}_fwd", *call, False)[: len(self.results)]

    def _refuse_meta(self, call: Any) -> None:
        """Raise ValueError for tensors without numbers beside others: torch would run the fake."""
        if call[0].is_meta:
            return
        for field, part in zip(call._fields, call, strict=True):
            for t in part if isinstance(part, tuple) else (part,):
                if isinstance(t, Tensor) and t.is_meta:
                    raise ValueError(
                        f"{self.name} got {field} on the meta device, which holds no numbers, and "
                        f"{call._fields[0]} on {call[0].device}"
                    )

    def _refuse_batches(self, backend: str, call: Any) -> None:
        """Raise RuntimeError where torch.func.vmap maps over a tensor of a call."""
        if any(_C._functorch.is_batchedtensor(t) for t in _tensors(call)):
            raise RuntimeError(
                f"{self.name} on {backend} is not mapped by torch.func.vmap: ask for "
                "backend='reference'"
            )

    def _refuse_tangents(self, backend: str, call: Any) -> None:
        """Raise RuntimeError where a tensor of a call has a tangent, which would be lost."""
        if any(forward_ad.unpack_dual(t).tangent is not None for t in _tensors(call)):
            raise RuntimeError(
                f"{self.name} on {backend} has no derivatives in forward mode: ask for {_PLAIN}"
            )


class _Recorded(torch.autograd.Function):
    """Saves a call, and what the forward pass returns to be saved; all else is computed again."""

    @staticmethod
    def forward(ctx, op, backend, finish, form, *tensors):
        call, saved = _filled(form, tensors), ()
        if op.saved:
            results = op.run(backend, f"{op.name}_fwd", *call, True)
            results, saved = results[: len(op.results)], results[len(op.results) :]
        else:
            results = op.run(backend, f"{op.name}_fwd", *call)
        ctx.op, ctx.backend, ctx.finish, ctx.form = op, backend, finish, form
        ctx.save_for_backward(*tensors, *saved)
        return results

    @staticmethod
    def backward(ctx, *upstream):
        arguments = (ctx.op, ctx.backend, ctx.finish, ctx.form, ctx.needs_input_grad[4:])
        # With create_graph=True these gradients have a derivative that no backend computes.
        # AOTAutograd's compiled backward passes refuse it by themselves.
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            gradients = _Gradients.apply(*arguments, *upstream, *ctx.saved_tensors)
        else:
            gradients = _gradients(*arguments, *upstream, *ctx.saved_tensors)
        return (None, None, None, None, *gradients)  # first of what is not a tensor


class _Gradients(torch.autograd.Function):
    """Computes gradients that are part of a graph, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, op, backend, *arguments):
        ctx.op, ctx.backend = op, backend
        return _gradients(op, backend, *arguments)

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError(
            f"{ctx.op.name} on {ctx.backend} has no second derivatives: ask for {_PLAIN}"
        )


def _gradients(
    op: Op, backend: str, finish: Mapping, form: Any, wanted: Sequence[bool], *tensors: Tensor
) -> tuple[Tensor | None, ...]:
    """Run a backward pass: a gradient for each tensor of the call, None where there is none.

    ``tensors`` are the gradients of the results, the tensors of the call, and what was saved.
    """
    results, n = len(op.results), len(tensors) - len(op.saved)
    call, saved = _filled(form, tensors[results:n]), tensors[n:]
    upstream = [gradient.contiguous() for gradient in tensors[:results]]
    with without_autocast(upstream[0].device.type):  # torch's products of a launcher too
        returned = op.run(backend, f"{op.name}_bwd", *upstream, *call, *saved)
    if len(op.gradients) == 1:
        returned = (returned,)
    by_field = dict(zip(op.gradients, returned, strict=True))
    gradients: list[Tensor | None] = []
    for field, part in zip(form._fields, form, strict=True):
        gradient = by_field.get(field)
        if isinstance(part, tuple):
            gradients.extend(part if gradient is None else gradient)
        elif part is None:
            if field in finish:
                gradient = finish[field](call, gradient) if wanted[len(gradients)] else None
            gradients.append(gradient)
    return tuple(gradients)


def _schema(arguments: Sequence[str], results: Sequence[str]) -> str:
    returned = results[0] if len(results) == 1 else f"({', '.join(results)})"
    return f"({', '.join(arguments)}) -> {returned}"


def _tensors(call: Any) -> list[Tensor]:
    """List the tensors of a call, in the order of its fields."""
    tensors: list[Tensor] = []
    for part in call:
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, tuple):
            tensors.extend(part)
    return tensors


def _form(call: Any) -> Any:
    """Put None in the place of each tensor: what may be kept of a call beside saved tensors."""
    return type(call)(
        *(
            None
            if isinstance(part, Tensor)
            else (None,) * len(part)
            if isinstance(part, tuple)
            else part
            for part in call
        )
    )


def _filled(form: Any, tensors: Sequence[Tensor]) -> Any:
    """Put tensors in their places: the inverse of :func:`_form`."""
    rest = iter(tensors)
    return type(form)(
        *(
            next(rest)
            if part is None
            else tuple([next(rest) for _ in part])
            if isinstance(part, tuple)
            else part
            for part in form
        )
    )
