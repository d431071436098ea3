"""Addition in place, as torch's ``add_``: no operation of the contract, but a launch that can be recorded."""

import triton.language as tl
from torch import Tensor

from .launch import ceil_div, kernel, on_device

BLOCK = 1024


@kernel(do_not_specialize=["elements"])
def accumulate_kernel(total, summand, elements, BLOCK_ELEMENTS: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK_ELEMENTS + tl.arange(0, BLOCK_ELEMENTS)
    exists = element < elements
    result = tl.load(total + element, mask=exists, other=0.0) + tl.load(summand + element, mask=exists, other=0.0)
    tl.store(total + element, result, mask=exists)


def accumulate(total: Tensor, summand: Tensor) -> None:
    """total += summand, both of the same layout without gaps."""
    elements = total.numel()
    with on_device(total):
        accumulate_kernel[(ceil_div(elements, BLOCK),)](total, summand, elements, BLOCK)
