"""A drop-in for torchvision's DenseNets, also where their user observes, replaces, freezes or takes them apart."""

import copy
import warnings
from collections import Counter, OrderedDict
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torchvision
from cases import (
    LEVELS,
    MODES,
    assert_close,
    count_calls,
    gathered,
    loss_of,
    make_images,
    make_pair,
    norms_of,
    randomise,
    relative_error,
    set_mode,
    step,
    trained,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize, prune

from densenet_efficient.models import create_model
from densenet_efficient.modules import DenseLayer
from densenet_efficient.reference import NaiveDenseLayer

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

TORCHVISION = ["densenet121", "densenet161", "densenet169", "densenet201"]
IMAGES = (3, 3, 33, 47)


def torchvision_pair(name, **arguments):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=5)
    randomise(theirs)
    ours = create_model(name, num_classes=5, **arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("name", TORCHVISION)
def test_takes_the_arguments_of_torchvisions_builders(name):
    arguments = {"weights": None, "progress": False, "bn_size": 2, "drop_rate": 0.1, "num_classes": 7}
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(**arguments, memory_efficient=True).state_dict()
        ours = create_model(name, **arguments, memory_efficient=True).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", TORCHVISION)
def test_trains_like_torchvision(native_backend, name):
    """The weights, their running statistics and num_batches_tracked after three steps, in float64."""
    theirs, ours = torchvision_pair(name)
    images = make_images(3, 3, 65, 70)
    assert_close(trained(ours.double(), images), trained(theirs.double(), images))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert {int(norm.num_batches_tracked) for norm in norms_of(theirs)} == {10}  # three more than `randomise` sets


@pytest.mark.parametrize("level", LEVELS)
def test_trains_like_torchvision_in_float32(backend, level):
    theirs, ours = torchvision_pair("densenet121", checkpointing=level)
    images = make_images(3, 3, 65, 70, dtype=torch.float32)
    truth = trained(copy.deepcopy(theirs).double(), images.double())
    naive, efficient = trained(theirs, images), trained(ours, images)
    for suffix in ("weight", "bias", "running_mean", "running_var"):
        expected = gathered(truth, suffix)
        bound = 2 * relative_error(gathered(naive, suffix), expected) + 1e-5
        assert relative_error(gathered(efficient, suffix), expected) <= bound, suffix


def test_evaluates_like_torchvision(backend):
    theirs, ours = torchvision_pair("densenet121")
    images = make_images(2, 3, 40, 56)
    with torch.no_grad():
        assert_close({"": ours.double().eval()(images)}, {"": theirs.double().eval()(images)})


# Observers: each registers something on a module and returns what it saw.


def forward_hook(module, seen):
    module.register_forward_hook(lambda *_: seen.append("forward"))


def forward_pre_hook(module, seen):
    module.register_forward_pre_hook(lambda *_: seen.append("forward_pre"))


def full_backward_hook(module, seen):
    module.register_full_backward_hook(lambda *_: seen.append("backward"))


def full_backward_pre_hook(module, seen):
    module.register_full_backward_pre_hook(lambda *_: seen.append("backward_pre"))


def own_forward(module, seen):
    original = module.forward
    module.forward = lambda *args: seen.append("own forward") or original(*args)


OBSERVERS = [forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook, own_forward]
LAYER = "features.denseblock1.denselayer2"
OUTSIDE_LAYERS = [
    "features",
    *(f"features.{name}" for name in ("conv0", "norm0", "relu0", "pool0", "denseblock1", "transition1", "norm5")),
    *(f"features.transition1.{name}" for name in ("norm", "relu", "conv", "pool")),
    "classifier",
]
INSIDE_LAYERS = [LAYER, *(f"{LAYER}.{name}" for name in ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2"))]


def without_inplace(model):
    """PyTorch refuses backward hooks around what works in place, in any model."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("observe", OBSERVERS)
@pytest.mark.parametrize("path", OUTSIDE_LAYERS + INSIDE_LAYERS)
def test_observers_see_every_call(backend, path, observe):
    naive, efficient = map(without_inplace, make_pair())
    seen = []
    observe(efficient.get_submodule(path), seen)
    images = make_images(*IMAGES)
    assert_close(step(efficient, images), step(naive, images))
    assert len(seen) == 1


def test_a_block_that_is_observed_says_so_once(backend):
    _, efficient = make_pair()
    efficient.get_submodule(LAYER).register_forward_hook(lambda *_: None)
    images = make_images(*IMAGES)
    with pytest.warns(UserWarning, match=r"layer by layer.*denselayer2 has a hook") as found:
        [efficient(images) for _ in range(3)]
    assert len(found) == 1


def test_a_block_that_is_not_observed_says_nothing(backend):
    _, efficient = make_pair()
    efficient.features.denseblock1.register_forward_hook(lambda *_: None)
    efficient.features.transition1.conv.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        efficient(make_images(*IMAGES))


def test_a_hook_that_is_removed_leaves_the_fused_block(backend, monkeypatch):
    _, efficient = make_pair()
    calls = count_calls(backend, monkeypatch)
    handle = efficient.get_submodule(LAYER).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="layer by layer"):
        efficient(make_images(*IMAGES))
    assert calls["bn_relu_conv1x1"] == 2  # those of the second block
    handle.remove()
    calls.clear()
    efficient(make_images(*IMAGES))
    assert calls["bn_relu_conv1x1"] == 5


GLOBAL_HOOKS = [
    module_hooks.register_module_forward_hook,
    module_hooks.register_module_forward_pre_hook,
    module_hooks.register_module_full_backward_hook,
    module_hooks.register_module_full_backward_pre_hook,
]


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_hooks_of_all_modules_see_every_module(backend, register):
    naive, efficient = map(without_inplace, make_pair())
    images = make_images(*IMAGES)
    expected = step(naive, images)
    names = {module: name for name, module in efficient.named_modules()}
    seen = Counter()
    handle = register(lambda module, *_: seen.update([names[module]]))
    try:
        result = step(efficient, images)
    finally:
        handle.remove()
    assert_close(result, expected)
    assert seen == Counter(names.values())


def test_hooks_that_change_the_output(backend):
    results = []
    for model in make_pair():
        model.get_submodule(f"{LAYER}.norm1").register_forward_hook(lambda _, inputs, output: output * 2 + 1)
        model.features.transition1.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))
        model.features.norm0.register_forward_hook(lambda _, inputs, output: output - 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results.append(step(model, make_images(*IMAGES)))
    assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_what_a_hook_keeps_of_a_layers_input_stays(backend):
    _, efficient = make_pair()
    kept = []
    for layer in efficient.features.denseblock1.values():
        layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    efficient(make_images(*IMAGES))
    assert [len(features) for features in kept] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_activation_checkpointing_of_the_layers(backend, drop_rate):
    """torch's own, which counts every batch twice in the naive model too."""
    pair = make_pair(drop_rate=drop_rate)
    for model in pair:
        apply_activation_checkpointing(
            model,
            partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
            lambda module: isinstance(module, (DenseLayer, NaiveDenseLayer)),
        )
    images = make_images(*IMAGES)
    naive, efficient = (step(model, images, seed=1) for model in pair)
    assert_close(efficient, naive)


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 0.5


class OwnConvolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean()


def replace(path, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path)
        torch.manual_seed(0)
        new = make(old)
        fitting = {key: value for key, value in old.state_dict().items() if shape_of(new, key) == value.shape}
        new.load_state_dict(fitting, strict=False)
        setattr(model.get_submodule(parent), name, new.double().train(old.training))

    return change


def shape_of(module, name):
    return getattr(module.state_dict().get(name), "shape", None)


def convolution_like(old, kind=nn.Conv2d, **options):
    names = ("in_channels", "out_channels", "kernel_size", "padding", "stride")
    return kind(**{name: getattr(old, name) for name in names} | {"bias": False} | options)


def parametrized(path):
    return lambda model: parametrize.register_parametrization(model.get_submodule(path), "weight", Centred())


def pruned(path):
    return lambda model: prune.l1_unstructured(model.get_submodule(path), "weight", 0.5)


REPLACEMENTS = {
    "relu1 -> LeakyReLU": replace(f"{LAYER}.relu1", lambda old: nn.LeakyReLU(0.1)),
    "relu2 -> GELU": replace(f"{LAYER}.relu2", lambda old: nn.GELU()),
    "norm1 -> subclass": replace(f"{LAYER}.norm1", lambda old: OwnBatchNorm(old.num_features)),
    "norm2 -> GroupNorm": replace(f"{LAYER}.norm2", lambda old: nn.GroupNorm(3, old.num_features)),
    "norm2 -> Identity": replace(f"{LAYER}.norm2", lambda old: nn.Identity()),
    "norm1 -> not affine": replace(f"{LAYER}.norm1", lambda old: nn.BatchNorm2d(old.num_features, affine=False)),
    "conv1 -> subclass": replace(f"{LAYER}.conv1", lambda old: convolution_like(old, OwnConvolution)),
    "conv1 -> bias": replace(f"{LAYER}.conv1", lambda old: convolution_like(old, bias=True)),
    "conv2 -> groups": replace(f"{LAYER}.conv2", lambda old: convolution_like(old, groups=2)),
    "conv2 -> reflect": replace(f"{LAYER}.conv2", lambda old: convolution_like(old, padding_mode="reflect")),
    "conv2 -> dilation": replace(f"{LAYER}.conv2", lambda old: convolution_like(old, dilation=2, padding=2)),
    "conv2 -> same": replace(f"{LAYER}.conv2", lambda old: convolution_like(old, padding="same")),
    "conv2 -> 1x1": replace(f"{LAYER}.conv2", lambda old: convolution_like(old, kernel_size=1, padding=0)),
    "another module": lambda model: model.get_submodule(LAYER).add_module("extra", nn.Identity()),
    "conv1 -> parametrized": parametrized(f"{LAYER}.conv1"),
    "conv2 -> pruned": pruned(f"{LAYER}.conv2"),
    "norm1 -> pruned": pruned(f"{LAYER}.norm1"),
    "transition norm -> subclass": replace("features.transition1.norm", lambda old: OwnBatchNorm(old.num_features)),
    "transition relu -> ELU": replace("features.transition1.relu", lambda old: nn.ELU()),
    "transition conv -> bias": replace("features.transition1.conv", lambda old: convolution_like(old, bias=True)),
    "transition conv -> parametrized": parametrized("features.transition1.conv"),
    "transition pool -> maximum": replace("features.transition1.pool", lambda old: nn.MaxPool2d(2)),
    "transition pool -> ceil": replace("features.transition1.pool", lambda old: nn.AvgPool2d(2, ceil_mode=True)),
    "transition pool -> divisor": replace("features.transition1.pool", lambda old: nn.AvgPool2d(2, divisor_override=3)),
    "transition -> Identity": replace("features.transition1.pool", lambda old: nn.Identity()),
    "conv0 -> stride 1": replace("features.conv0", lambda old: convolution_like(old, stride=1)),
    "conv0 -> dilation": replace("features.conv0", lambda old: convolution_like(old, dilation=2)),
    "conv0 -> bias": replace("features.conv0", lambda old: convolution_like(old, bias=True)),
    "conv0 -> same": replace("features.conv0", lambda old: convolution_like(old, stride=1, padding="same")),
    "conv0 -> parametrized": parametrized("features.conv0"),
    "norm0 -> Identity": replace("features.norm0", lambda old: nn.Identity()),
    "pool0 -> Identity": replace("features.pool0", lambda old: nn.Identity()),
    "pool0 -> dilation": replace("features.pool0", lambda old: nn.MaxPool2d(3, 2, 1, dilation=2)),
    "pool0 -> ceil": replace("features.pool0", lambda old: nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "pool0 -> 2x2": replace("features.pool0", lambda old: nn.MaxPool2d(2)),
    "norm5 -> subclass": replace("features.norm5", lambda old: OwnBatchNorm(old.num_features)),
    "norm5 -> Identity": replace("features.norm5", lambda old: nn.Identity()),
    "features -> Sequential": replace("features", lambda old: nn.Sequential(OrderedDict(old.named_children()))),
    "in place on the stem": replace("features.denseblock1", lambda old: nn.Sequential(nn.ELU(inplace=True), old)),
    "in place on a transition": replace("features.denseblock2", lambda old: nn.Sequential(nn.ELU(inplace=True), old)),
    "classifier -> Identity": replace("classifier", lambda old: nn.Identity()),
}


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("change", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_replaced_modules(backend, change, level):
    pair = make_pair(checkpointing=level)
    for model in pair:
        change(model)
    images = make_images(*IMAGES)
    naive, efficient = pair
    assert_close(step(efficient, images), step(naive, images))


class LoudLayer(DenseLayer):
    """A user's own layer."""

    def forward(self, x):
        return super().forward(x) * 2


def test_a_subclassed_layer(backend):
    naive, efficient = make_pair()
    old = efficient.get_submodule(LAYER)
    efficient.features.denseblock1["denselayer2"] = LoudLayer(10, 4, 3, 0.0).double()
    efficient.get_submodule(LAYER).load_state_dict(old.state_dict())
    naive.get_submodule(LAYER).register_forward_hook(lambda _, inputs, output: output * 2)
    images = make_images(*IMAGES)
    with pytest.warns(UserWarning, match=r"layer by layer.*LoudLayer"):
        result = step(efficient, images)
    assert_close(result, step(naive, images))


def test_a_module_appended_to_the_features(backend):
    pair = make_pair()
    for model in pair:
        model.features.add_module("extra", nn.LeakyReLU())
    images = make_images(*IMAGES)
    assert_close(*(step(model, images) for model in reversed(pair)))


def test_synchronised_norms(backend):
    """Outside a process group they are ordinary ones."""
    naive, efficient = make_pair()
    efficient = nn.SyncBatchNorm.convert_sync_batchnorm(efficient)
    images = make_images(*IMAGES)
    assert_close(step(efficient, images), step(naive, images))


def test_features_returned_are_never_modified(backend):
    """Neither by what follows in the forward, nor by the backward, nor by another step."""
    _, efficient = make_pair()
    kept = []
    for name in ("pool0", "denseblock1", "transition1", "denseblock2", "norm5"):
        module = efficient.features.get_submodule(name)
        module.register_forward_hook(lambda _, inputs, output: kept.append((output, output.detach().clone())))
    for seed in range(2):
        step(efficient, make_images(*IMAGES, seed=seed))
    assert len(kept) == 10
    assert all(torch.equal(output, copied) for output, copied in kept)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", range(9))
def test_parts_of_the_features(backend, stop, mode):
    """model.features, and any slice of it from the start."""
    results = []
    for model in make_pair(mode=mode):
        images = make_images(*IMAGES).requires_grad_()
        features = model.features[:stop](images) if stop < 8 else model.features(images)
        loss_of(features).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"": features, "images": images.grad, **gradients, **dict(model.named_buffers())})
    assert_close(results[1], results[0])


def test_features_of_a_block_may_be_used_in_place(backend):
    """As `F.relu(features, inplace=True)` does: the same gradients, or an error; never others."""
    naive, efficient = make_pair()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|modified inplace"):
        loss_of(efficient.features.denseblock1(make_images(2, 6, 7, 5)).relu_()).backward()
    results = []
    for model in (naive, efficient):
        images = make_images(*IMAGES).requires_grad_()
        loss_of(model.features(images).relu_()).backward()
        results.append({"images": images.grad})
    assert_close(results[1], results[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.contiguous_format])
def test_what_is_saved_may_be_kept_elsewhere(backend, level, memory_format):
    """As `torch.autograd.graph.save_on_cpu` keeps it in the host's memory, in a layout of its own if it is pinned."""
    naive, efficient = make_pair(checkpointing=level, drop_rate=0.2)
    images = make_images(*IMAGES)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.clone(memory_format=memory_format), lambda tensor: tensor
    ):
        result = step(efficient, images, seed=1)
    assert_close(result, step(naive, images, seed=1))


def test_distributed_data_parallel(backend, tmp_path):
    naive, efficient = make_pair()
    images = make_images(*IMAGES)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(efficient)
        result = step(parallel, images)
    finally:
        dist.destroy_process_group()
    assert_close({name.removeprefix("module."): value for name, value in result.items()}, step(naive, images))


def test_data_under_autocast_keeps_the_dtypes_of_torch(backend):
    """Logits as the classifier gives them, gradients and buffers in float32."""
    for model in make_pair(dtype=torch.float32):
        images = make_images(*IMAGES, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
            features = model.features(images)
        assert logits.dtype == torch.bfloat16
        assert features.dtype == torch.bfloat16
        loss_of(logits).backward()
        dtypes = {tensor.grad.dtype for tensor in (images, *model.parameters())}
        assert dtypes == {torch.float32}
        assert {norm.running_mean.dtype for norm in norms_of(model)} == {torch.float32}


def test_moves_between_dtypes(backend):
    naive, efficient = make_pair(dtype=torch.float32)
    naive, efficient = naive.double(), efficient.half().float().double()
    efficient.load_state_dict(naive.state_dict())
    images = make_images(*IMAGES)
    assert_close(step(efficient, images), step(naive, images))


def test_weights_changed_in_place_between_steps(backend):
    """As an optimizer, an exponential moving average or `load_state_dict` changes them: nothing is cached."""
    naive, efficient = make_pair()
    images = make_images(*IMAGES)
    for mode in ("train", "eval"):
        for model in (naive, efficient):
            set_mode(model, mode)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1).add_(0.01)
        assert_close(step(efficient, images), step(naive, images))


def test_a_weight_changed_between_forward_and_backward_is_noticed(backend):
    for model in make_pair():
        loss = loss_of(model(make_images(*IMAGES)))
        with torch.no_grad():
            model.get_parameter(f"{LAYER}.conv1.weight").mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
            loss.backward()
