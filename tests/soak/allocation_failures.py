"""Every allocation of a training step fails once; prints the number of failures and what they leaked, as JSON.

Started with `failing_allocations.cpp` preloaded, whose path is the first argument; the second is the stride: one in so
many allocations fails.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import loss_of, make_images, make_pair, norms_of

WARMING_STRIDE = 5
CONFIGURATIONS = [
    {"dtype": torch.float32, "checkpointing": "bottleneck"},
    {"dtype": torch.float32, "checkpointing": "none", "drop_rate": 0.2},
    {"dtype": torch.bfloat16, "checkpointing": "bottleneck"},
    {"dtype": torch.float64, "checkpointing": "none", "bottleneck": False},
]


class MemoryInUse(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")]


def memory_in_use():
    gc.collect()
    function = ctypes.CDLL(None).mallinfo2
    function.restype = MemoryInUse
    info = function()
    return info.uordblks + info.hblkhd


def train(model, images):
    torch.manual_seed(0)
    model.zero_grad()
    logits = model(images)
    loss_of(logits).backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


def buffers_after(steps, **configuration):
    """By number of steps, the buffers of each norm."""
    model, images = build(**configuration)
    states = []
    for _ in range(steps + 1):
        states.append([[buffer.clone() for buffer in norm.buffers()] for norm in norms_of(model)])
        train(model, images)
    return states


def build(**configuration):
    model = make_pair(**configuration)[1]
    return model, make_images(2, 3, 33, 34, dtype=configuration["dtype"])


def same(one, other):
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def fail_everywhere(library, stride, **configuration):
    """The failures, and the bytes that they leave in use beyond what the first few do.

    All of them twice, and the lesser growth: what libraries keep for a thread is taken when it first needs it, and on a
    busy machine that may be late. A leak is there every time.
    """
    model, images = build(**configuration)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = [value.clone() for value in train(model, images)]
    states = buffers_after(2, **configuration)
    growths = []
    for step in (WARMING_STRIDE * stride, stride, stride):
        before, failures, index = memory_in_use(), 0, 1
        while True:
            model.load_state_dict(start)
            library.fail_at(index)
            try:
                train(model, images)
                raised = False
            except (RuntimeError, MemoryError):
                raised = True
            reached = bool(library.has_failed())
            library.fail_at(0)
            if not reached:
                assert not raised
                break
            assert raised, f"allocation {index} failed, and nothing was raised"
            failures, index = failures + 1, index + step
            counts = {int(norm.num_batches_tracked) for norm in norms_of(model)}
            assert counts <= {7, 8}, counts
            for number, norm in enumerate(norms_of(model)):
                assert same(list(norm.buffers()), states[int(norm.num_batches_tracked) - 7][number]), index
            assert same(train(model, images), expected), f"after the failure of allocation {index}"
        growths.append(memory_in_use() - before)
    return failures, min(growths[1:])


def main():
    library, stride = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(2)
    results = [fail_everywhere(library, stride, **configuration) for configuration in CONFIGURATIONS]
    print(json.dumps({"failures": sum(count for count, _ in results), "leaked": max(bytes for _, bytes in results)}))


if __name__ == "__main__":
    main()
