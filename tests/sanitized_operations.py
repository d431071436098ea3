"""Every operation of a GPU's backends on small cases: what compute-sanitizer watches in `python -m benchmarks.gpu`.

Only the operations are launched, no reference beside them: hazards in the libraries of others are not ours to find.
"""

import torch
from kernel_cases import Factory, cast, run

from densenet_efficient.kernels import CONTRACT, cuda, gpu, triton

GEOMETRIES = [(2, 5, 4, 32, 48), (3, 7, 6, 17, 12), (1, 9, 20, 150, 32)]


def main():
    device = torch.device("cuda", 0)
    reason = cuda.obstacle(device) or gpu.obstacle(device)
    assert reason is None, reason
    for backend in (cuda, triton):
        for operation in CONTRACT:
            for geometry in GEOMETRIES:
                for dtype in (torch.bfloat16, torch.float32):
                    case = getattr(Factory(*geometry), operation)()
                    run(backend, case, cast(case, dtype, device))
                    run(backend, case, cast(case, dtype, device), torch.Tensor.clone)
            torch.cuda.synchronize()
            print(f"{backend.__name__} {operation}", flush=True)


if __name__ == "__main__":
    main()
