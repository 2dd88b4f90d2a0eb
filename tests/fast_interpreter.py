"""Spare Triton's interpreter work that has no effect, most of its time.

And let that of Triton 3.6 count with NumPy 2.4.
"""

import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Patch Triton, for the rest of the process."""
    _sanitize_no_overflow()
    _patch_the_language_once()
    _remember_types()
    _call_builtins_directly()
    _broadcast_by_numpy()
    _combine_slices()
    _count_with_arrays_of_one()


def _sanitize_no_overflow() -> None:
    """Compute no overflow of integers, which it then would not assert."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_the_language_once() -> None:
    """Patch ``triton.language`` once a module, not for every call of a device function."""
    patched = set()

    def call(self, *arguments, **options):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call


def _remember_types() -> None:
    """Make a type once, not for every intermediate, with a table of all dtypes for each."""
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[tuple, dict] = {}  # attributes of block types, which nothing changes

    def block_type(self, element_ty, shape):
        if element_ty.is_ptr():
            make_block(self, element_ty, shape)
            return
        sizes = (s.value if isinstance(s, tl.constexpr) else s for s in shape)
        key = (element_ty.name, *sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            of_tensor = tl.tensor.__new__(tl.tensor)
            make_tensor(of_tensor, None, self)
            blocks[key] = vars(self) | {"of_tensor": vars(of_tensor)}
        vars(self).update(blocks[key])

    def tensor(self, handle, type):
        if of_tensor := getattr(type, "of_tensor", None):
            vars(self).update(of_tensor, handle=handle, type=type)
        else:
            make_tensor(self, handle, type)

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor

    np_dtype = interpreter._get_np_dtype
    of_scalar = functools.cache(np_dtype)
    interpreter._get_np_dtype = lambda type: (
        np_dtype(type) if type.scalar.is_ptr() else of_scalar(type.scalar)
    )


def _call_builtins_directly() -> None:
    """Call a builtin without the wrapper that only checks for the argument which is given here."""

    def patch_attr(obj, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)
        semantic = interpreter.interpreter_semantic

        def call(*arguments, **options):
            options["_semantic"] = semantic
            return function(*arguments, **options)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch_attr


def _broadcast_by_numpy() -> None:
    """Broadcast two operands at once, without steps that each make a tensor or copy a number."""

    def repeat(x, shape):
        if x.type.is_block() and x.handle.data.shape == shape:
            return x
        data = np.broadcast_to(x.handle.data, shape)
        return tl.tensor(interpreter.TensorHandle(data, x.dtype), tl.block_type(x.dtype, [*shape]))

    def broadcast(self, lhs, rhs):
        shapes = [x.handle.data.shape for x in (lhs, rhs) if x.type.is_block()]
        if not shapes:
            return lhs, rhs
        shape = shapes[0] if shapes[0] == shapes[-1] else np.broadcast_shapes(*shapes)
        return repeat(lhs, shape), repeat(rhs, shape)

    interpreter.TritonSemantic.broadcast_impl_value = broadcast


def _combine_slices() -> None:
    """Reduce an axis slice by slice, not element by element: in the same order, so to the bit."""
    of_elements = interpreter.ReduceOps.generic_reduce

    def generic_reduce(self, input):
        if self.axis is None:
            return of_elements(self, input)
        total: tuple = ()
        for slices in zip(*(np.moveaxis(x.handle.data, self.axis, 0) for x in input), strict=True):
            here = tuple(self.to_tensor(s, x.dtype) for s, x in zip(slices, input, strict=True))
            total = self.combine_fn.fn(*total, *here) if total else here
            total = total if isinstance(total, tuple) else (total,)
        shape = np.delete(input[0].handle.data.shape, self.axis)
        results = [t.handle.data.reshape(shape) for t in total]
        if self.keep_dims:
            results = [np.expand_dims(t, self.axis) for t in results]
        return [self.to_tensor(t, x.dtype) for t, x in zip(results, input, strict=True)]

    interpreter.ReduceOps.generic_reduce = generic_reduce


def _count_with_arrays_of_one() -> None:
    """Let a number be an array [1] where a loop counts: NumPy 2.4 makes no int of one."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor
