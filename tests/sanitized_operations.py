"""Every operation of a GPU's backends on small cases: what compute-sanitizer watches in `python -m benchmarks.gpu`.

Only the operations are launched, no reference beside them: hazards in the libraries of others are not ours to find.
"""

import torch
from kernel_cases import Factory, cast, in_slot, run

from densenet_efficient.kernels import CONTRACT, cuda, gpu, triton

# An odd one in slots, which is accessed element by element; an even one in packed rows, in pieces of 16 bytes.
CASES = [((3, 7, 6, 17, 12), in_slot), ((2, 9, 20, 160, 32), torch.Tensor.clone)]


def main():
    device = torch.device("cuda", 0)
    reason = cuda.obstacle(device) or gpu.obstacle(device)
    assert reason is None, reason
    for backend in (cuda, triton):
        for operation in CONTRACT:
            for geometry, place in CASES:
                case = getattr(Factory(*geometry), operation)()
                run(backend, case, cast(case, torch.bfloat16, device), place)
            torch.cuda.synchronize()
            print(f"{backend.__name__} {operation}", flush=True)


if __name__ == "__main__":
    main()
