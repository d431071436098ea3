"""What the exactness suite is made of: pairs of models with equal weights, images, training steps, the judgement."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densenet_efficient import EfficientDenseNet, kernels
from densenet_efficient.reference import NaiveDenseNet

needs_native = pytest.mark.skipif(not kernels.cpu.is_available(), reason=f"no native backend: {kernels.cpu.obstacle()}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CPU_BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
GPU_BACKENDS = ["triton", "cuda"] if torch.cuda.is_available() else []
LEVELS = ["none", "bottleneck"]
VARIANTS = {
    "bc": {"bottleneck": True, "compression": 0.5},
    "b": {"bottleneck": True, "compression": 1.0},
    "c": {"bottleneck": False, "compression": 0.5},
    "plain": {"bottleneck": False, "compression": 1.0},
}
SMALL = {"growth_rate": 4, "block_config": (3, 2), "num_init_features": 6, "bn_size": 3, "num_classes": 5}
MODES = ["train", "eval", "frozen"]
FLOAT64_TOLERANCE = 1e-9
FLOAT64_FLOOR = 1e-12  # of what is zero but for rounding, as the gradient of a bias that a norm follows


def use_backend(name, monkeypatch):
    """Runs a test on this backend; on the GPU where it is one of a GPU, for models and images are made there."""
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, name)
    with torch.device("cuda" if name in GPU_BACKENDS else "cpu"):
        yield name


def randomise(model, seed=0):
    """Affine parameters of both signs and running statistics unlike fresh ones, in the model's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    random = {"generator": generator, "device": "cpu"}  # the same on every device
    for norm in norms_of(model):
        size = norm.num_features
        with torch.no_grad():
            if norm.affine:
                norm.weight.copy_(torch.randn(size, **random) + 0.5)
                norm.bias.copy_(torch.randn(size, **random) * 0.3)
            if norm.running_mean is not None:
                norm.running_mean.copy_(torch.randn(size, **random))
                norm.running_var.copy_(torch.rand(size, **random) * 3 + 0.2)
                norm.num_batches_tracked.fill_(7)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def make_pair(seed=0, dtype=torch.float64, mode="train", **arguments):
    """(naive, efficient) with equal random weights and buffers."""
    arguments = SMALL | arguments
    torch.manual_seed(seed)
    naive = NaiveDenseNet(**arguments)
    randomise(naive, seed)
    efficient = EfficientDenseNet(**arguments)
    efficient.load_state_dict(naive.state_dict())
    return tuple(set_mode(model.to(dtype), mode) for model in (naive, efficient))


def set_mode(model, mode):
    """ "train", "eval", "frozen" (training with every norm in eval) or "mixed" (every second norm in eval)."""
    model.train(mode != "eval")
    step = {"frozen": 1, "mixed": 2}.get(mode)
    for norm in norms_of(model)[::step] if step else []:
        norm.eval()
    return model


def make_images(*shape, seed=0, dtype=torch.float64, mean=0.0):
    """Random images [N, C, H, W] of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") + mean
    return images.to(torch.get_default_device(), dtype)


def step(model, images, seed=None):
    """One forward and backward of a loss that weighs every logit; everything a training step leaves, by name."""
    if images.is_floating_point() and not images.requires_grad:
        images = images.detach().requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)  # of the dropout
    logits = model(images)
    loss_of(logits).backward()
    return {"logits": logits, "images.grad": images.grad, **state_of(model)}


def trained(model, images, steps=3):
    """The state after ``steps`` of SGD; parameters as their change, which is what training made of them."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(images)).backward()
        optimizer.step()
    changes = {name: parameter - before[name] for name, parameter in model.named_parameters()}
    return changes | dict(model.named_buffers())


def loss_of(outputs):
    """A scalar with another gradient for each element of ``outputs``."""
    generator = torch.Generator().manual_seed(99)
    weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (outputs * weights.to(outputs.device)).sum()


def saved_bytes(model, images):
    """What autograd keeps for the backward, each storage once, without the parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    assert output.requires_grad
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def state_of(model):
    """Every parameter, its gradient, and every buffer, by name."""
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {**gradients, **dict(model.named_parameters()), **dict(model.named_buffers())}


def difference(actual, expected):
    """The norm of the difference, and that of ``expected``."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return (actual - expected).norm().item(), expected.norm().item()


def relative_error(actual, expected):
    error, size = difference(actual, expected)
    return error / size


def assert_close(actual, expected, tolerance=FLOAT64_TOLERANCE, floor=FLOAT64_FLOOR):
    """Tensors by name: the same names, None where None, and every one within ``tolerance`` of its own norm."""
    assert list(actual) == list(expected)
    assert {name for name in actual if actual[name] is None} == {name for name in expected if expected[name] is None}
    errors = {name: difference(actual[name], value) for name, value in expected.items() if value is not None}
    wrong = {
        name: (error, size)
        for name, (error, size) in errors.items()
        if not error <= tolerance * size + (floor if tolerance else 0)
    }
    assert not wrong, wrong


def gathered(results, suffix):
    """One vector of all results whose names end so."""
    return torch.cat([value.detach().double().flatten() for name, value in results.items() if name.endswith(suffix)])


GROUPS = {"logits": "logits", "gradients": ".grad", "means": "running_mean", "variances": "running_var"}


def group_errors(results, truth):
    """The relative error of the logits, of all gradients together, and of the running statistics together."""
    return {
        group: relative_error(gathered(results, suffix), gathered(truth, suffix))
        for group, suffix in GROUPS.items()
        if any(name.endswith(suffix) for name in truth)
    }


def global_average(features):
    """What stands between the features and the classifier."""
    return F.adaptive_avg_pool2d(F.relu(features), (1, 1)).flatten(1)


def count_calls(backend, monkeypatch):
    """Counts the backend's operations, and the results they are asked for, from now on."""
    calls = Counter()
    module = kernels.BACKENDS[backend]

    class Counting:
        def __getattr__(self, name):
            def call(*arguments):
                calls[name] += 1
                return getattr(module, name)(*arguments)

            return call

    monkeypatch.setitem(kernels.BACKENDS, backend, Counting())
    return calls
