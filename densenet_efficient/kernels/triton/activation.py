"""Device functions of BN-ReLU: the activation as every kernel computes it, and what its backward is made of."""

import triton
import triton.language as tl


@triton.jit
def activate(x, scale, shift, dtype: tl.constexpr):
    """relu(x * scale + shift), computed in the dtype of ``scale`` and rounded to ``dtype``; NaN stays NaN."""
    normalised = tl.fma(x.to(scale.dtype), scale, shift)
    return tl.maximum(normalised, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def mask_gradient(gradient, activation):
    """``gradient`` where the activation, as rounded, is positive or NaN, and zero elsewhere."""
    return tl.where(activation.to(gradient.dtype) <= 0, 0.0, gradient)


@triton.jit
def project(gradient, x, mean, slope, offset):
    """gradient + offset + (x - mean) * slope, the projection of a batch norm's backward, in the dtype of ``mean``."""
    return tl.fma(x.to(mean.dtype) - mean, slope, gradient.to(mean.dtype) + offset)


@triton.jit
def deposit(grad, place, gradient, factor, inside, ACCUMULATE: tl.constexpr):
    """Leaves ``factor * gradient`` in ``grad``, or adds it to what is there."""
    result = gradient * factor
    if ACCUMULATE:
        result = tl.fma(gradient, factor, tl.load(grad + place, mask=inside, other=0.0).to(gradient.dtype))
    tl.store(grad + place, result.to(grad.dtype.element_ty), mask=inside)
