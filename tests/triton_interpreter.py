"""Mends where Triton's interpreter computes otherwise than a card, and where it computes the same again.

It keeps bfloat16 as its bits in uint16, rounds float32 to it towards zero and multiplies the bits in place of the
numbers; it rounds the product of a fused multiply-add; and it sums one after the other where a card sums in a tree.
That of Triton 3.6 makes an index of an array with one number, which NumPy refuses from 2.4 on.
At each call of a function by a kernel it replaces the language by its own anew, and it looks up dtypes in a table that
it makes each time: without that it takes two thirds of the time.
"""

import functools
import inspect
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend():
    builder_cast, builder_dot, builder_fma = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
        InterpreterBuilder.create_fma,
    )

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return builder_cast(self, source, target)

    def create_dot(self, left, right, *others):
        return builder_dot(self, as_float32(left), as_float32(right), *others)

    def create_fma(self, factor, other, summand):
        if summand.dtype.scalar != tl.float32:
            return builder_fma(self, factor, other, summand)
        exact = factor.data.astype(np.float64) * other.data + summand.data
        return TensorHandle(exact.astype(np.float32), tl.float32)

    def tree_sum(self, operand):
        data = np.moveaxis(operand.handle.data, self.axis, 0)
        while len(data) > 1:  # lengths are powers of two
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        return self.to_tensor(np.moveaxis(data, 0, self.axis) if self.keep_dims else data[0], operand.dtype)

    look_up, patch_language = interpreter._get_np_dtype, interpreter._patch_lang
    look_up_once = functools.cache(look_up)

    def np_dtype(dtype):
        scalar = dtype.scalar
        return look_up(scalar) if scalar.is_ptr() else look_up_once(scalar)

    def patch_language_once(function):
        languages = [
            value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, core)
        ]
        if languages and not any(core.is_builtin(language.arange) for language in languages):
            return SimpleNamespace(restore=lambda: None)  # within a kernel, which restores it
        return patch_language(function)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_index
    interpreter._patch_lang = patch_language_once
    interpreter._get_np_dtype = np_dtype
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_trunc = cast_impl
    InterpreterBuilder.create_dot, InterpreterBuilder.create_fma = create_dot, create_fma
    interpreter.ReduceOps.sum = tree_sum


def as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.from_numpy(handle.data.view(np.int16))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)
