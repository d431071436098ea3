"""FC-DenseNets: the paper's networks, equal to the naive ones, and with a fraction of their memory."""

import copy

import pytest
import torch
from cases import (
    assert_close,
    gathered,
    loss_of,
    make_images,
    randomise,
    relative_error,
    set_mode,
    step,
    trained,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.feature_extraction import create_feature_extractor

from densenet_efficient.modules import run_block
from densenet_efficient.reference import NaiveFCDenseNet
from densenet_efficient.segmentation import FCDenseNet, FCDenseNet56, FCDenseNet67, FCDenseNet103

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

SMALL = {"growth_rate": 4, "block_config": (2, 3, 2), "num_init_features": 6, "num_classes": 5}
SIZES = [(12, 16), (13, 15), (4, 4), (7, 30)]


def make_pair(seed=0, dtype=torch.float64, mode="train", **arguments):
    """(naive, efficient) with equal random weights and buffers; without dropout unless asked for."""
    arguments = SMALL | {"drop_rate": 0.0} | arguments
    torch.manual_seed(seed)
    naive = NaiveFCDenseNet(**arguments)
    randomise(naive, seed)
    efficient = FCDenseNet(**arguments)
    efficient.load_state_dict(naive.state_dict())
    return tuple(set_mode(model.to(dtype), mode) for model in (naive, efficient))


def counted_as_the_authors_do(model):
    """Their code counts running statistics too, and gives every convolution a bias (a batch norm follows ours)."""
    statistics = sum(buffer.numel() for name, buffer in model.named_buffers() if "running" in name)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    biases = sum(convolution.out_channels for convolution in convolutions if convolution.bias is None)
    return sum(parameter.numel() for parameter in model.parameters()) + statistics + biases


@pytest.mark.parametrize(
    ("network", "depth", "count", "in_the_paper"),
    [
        (FCDenseNet56, 56, 1_397_963, 1.5),
        (FCDenseNet67, 67, 3_502_923, 3.5),
        (FCDenseNet103, 103, 9_425_163, 9.4),
        (FCDenseNet, 103, 9_425_163, 9.4),
    ],
)
def test_parameters_of_the_paper(network, depth, count, in_the_paper):
    """Table 3 of the paper. For its FC-DenseNet56 the authors' code gives 1.40 M, a tenth less than is printed."""
    with torch.device("meta"):
        model = network()
    assert sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules()) == depth
    assert counted_as_the_authors_do(model) == count
    assert count / 1e6 == pytest.approx(in_the_paper, abs=0.05 if depth > 56 else 0.11)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.2}
    assert {module.drop_rate for module in model.modules() if hasattr(module, "drop_rate")} == {0.2}


def test_channels_of_the_paper():
    """Table 2: after each block of FC-DenseNet103 (its 578 is a misprint of 576)."""
    with torch.device("meta"):
        model = FCDenseNet103()
    down = [transition.conv.in_channels for transition in model.transitions_down]
    up = [block["denselayer1"].norm1.num_features + len(block) * 16 for block in model.up_blocks]
    assert down == [112, 192, 304, 464, 656]
    assert up == [1088, 816, 576, 384, 256]


def test_initialises_like_the_naive_model():
    torch.manual_seed(3)
    naive = NaiveFCDenseNet(**SMALL)
    torch.manual_seed(3)
    assert_close(FCDenseNet(**SMALL).state_dict(), naive.state_dict(), tolerance=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen", "mixed"])
def test_equals_the_naive_model(backend, size, mode):
    """Logits per pixel, gradients and buffers, for sizes that the poolings divide and others."""
    naive, efficient = make_pair(mode=mode)
    images = make_images(2, 3, *size)
    result = step(efficient, images)
    assert result["logits"].shape == (2, 5, *size)
    assert_close(result, step(naive, images))


@pytest.mark.parametrize("size", SIZES[:2])
def test_dropout_equals_the_naive_model(backend, size):
    """The same random numbers, in the layers and in the transitions down."""
    naive, efficient = make_pair(drop_rate=0.3)
    images = make_images(2, 3, *size)
    assert_close(step(efficient, images, seed=1), step(naive, images, seed=1))


def test_trains_like_the_naive_model(backend):
    naive, efficient = make_pair(block_config=(2, 2, 2, 1))
    images = make_images(2, 3, 21, 19)
    assert_close(trained(efficient, images), trained(naive, images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(backend, dtype):
    """At most twice the naive model's error; bfloat16 by autocast."""
    naive, efficient = make_pair(dtype=torch.float32)
    images = make_images(2, 3, 21, 19, dtype=torch.float32)
    truth = step(copy.deepcopy(naive).double(), images.double())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        results = [step(model, images) for model in (naive, efficient)]
    for suffix in ("logits", ".grad", "running_mean", "running_var"):
        expected = gathered(truth, suffix)
        bound = 2 * relative_error(gathered(results[0], suffix), expected) + 1e-5
        assert relative_error(gathered(results[1], suffix), expected) <= bound, suffix


@pytest.mark.parametrize("size", SIZES[:2])
def test_inference_equals_the_naive_model(backend, size):
    naive, efficient = make_pair(mode="eval", drop_rate=0.3)
    images = make_images(2, 3, *size)
    with torch.inference_mode():
        for _ in range(2):  # the second time from what the first has prepared
            assert_close({"": efficient(images)}, {"": naive(images)})


@pytest.mark.parametrize("frozen", ["down_blocks", "transitions_down", "transitions_up", "up_blocks", "norm", "conv"])
def test_frozen_parameters(backend, frozen):
    results = []
    for model in make_pair():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        results.append(step(model, make_images(2, 3, 13, 15)))
    assert_close(*reversed(results))


@pytest.mark.parametrize("path", ["down_blocks.0", "transitions_down.0", "transitions_down.1.conv", "up_blocks.1"])
def test_hooks_see_every_call(backend, path):
    naive, efficient = make_pair()
    seen = []
    efficient.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    images = make_images(2, 3, 13, 15)
    assert_close(step(efficient, images), step(naive, images))
    assert seen == [path]


def test_a_transition_down_whose_block_nobody_else_reads(backend):
    _, model = make_pair()
    block, transition = model.down_blocks[0], model.transitions_down[0]
    images = make_images(2, block.denselayer1.norm1.num_features, 13, 15)
    results = []
    for run in (lambda x: run_block(block, transition, x)[0], lambda x: transition(block.forward_by_layers(x))):
        model.zero_grad()
        x = images.clone().requires_grad_()
        out = run(x)
        loss_of(out).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"out": out, "images": x.grad, **gradients})
    assert_close(*results)


def test_another_dropout_in_a_transition_down(backend):
    pair = make_pair(drop_rate=0.3)
    for model in pair:
        model.transitions_down[0].drop.p = 0.0
    images = make_images(2, 3, 13, 15)
    assert_close(*(step(model, images, seed=1) for model in reversed(pair)))


@pytest.mark.parametrize(
    ("name", "module"), [("drop", nn.Identity()), ("pool", nn.MaxPool2d(2, ceil_mode=True))], ids=["drop", "pool"]
)
def test_a_changed_transition_down(backend, name, module):
    pair = make_pair()
    for model in pair:
        setattr(model.transitions_down[0], name, module)
    images = make_images(2, 3, 13, 15)
    assert_close(*(step(model, images) for model in reversed(pair)))


def test_compiles_to_a_full_graph(backend):
    _, efficient = make_pair()
    compiled = torch.compile(copy.deepcopy(efficient), fullgraph=True, backend="aot_eager")
    images = make_images(2, 3, 13, 15)
    result = step(compiled, images)
    assert_close({name.replace("_orig_mod.", ""): value for name, value in result.items()}, step(efficient, images))
    torch._dynamo.reset()


def test_exports():
    naive, efficient = make_pair(mode="eval")
    images = make_images(2, 3, 13, 15)
    exported = torch.export.export(efficient, (images,))
    assert not [node for node in exported.graph.nodes if "densenet_efficient" in str(node.target)]
    assert_close({"": exported.module()(images)}, {"": naive(images)})


def test_fx_traces_its_modules(backend):
    naive, efficient = make_pair()
    with pytest.warns(UserWarning, match="torch.fx traces"):
        extractor = create_feature_extractor(efficient, {"classifier": "logits"})
    images = make_images(2, 3, 13, 15)
    assert_close(extractor(images), {"logits": naive(images)})


@pytest.mark.parametrize("shape", [(2, 4, 13, 15), (3, 13, 15)])
def test_images_of_another_shape(backend, shape):
    _, efficient = make_pair()
    with pytest.raises((RuntimeError, ValueError), match=r"to have 3 channels, but got 4|expected 4D input"):
        efficient(make_images(*shape))


def test_too_small_images(backend):
    for model in make_pair():
        with pytest.raises(RuntimeError, match="Output size is too small"):
            model(make_images(2, 3, 3, 16))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_config": ()}, ValueError, "block_config must name the layers of at least one block"),
        ({"block_config": 5}, TypeError, "block_config must be a sequence of ints"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate must be in"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
    ],
)
def test_impossible_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FCDenseNet(**arguments)


def kept_for_the_backward(network, *arguments):
    """MiB that autograd keeps of one 360x480 image, each storage once, without parameters and buffers; nothing runs."""
    with FakeTensorMode():
        model = network(*arguments)
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.empty(1, 3, 360, 480))
        assert output.requires_grad
        return sum(storage.nbytes() for address, storage in kept.items() if address not in own) / 2**20


@pytest.mark.parametrize(
    ("growth_rate", "block_config", "naive", "ours"),
    [(12, (4,) * 6, 2535, 328), (16, (5,) * 6, 4302, 483), (16, (4, 5, 7, 10, 12, 15), 4032, 456)],
    ids=["56", "67", "103"],
)
def test_memory_kept_at_360x480(growth_rate, block_config, naive, ours):
    """The figures of docs/features.md."""
    assert kept_for_the_backward(NaiveFCDenseNet, growth_rate, block_config) == pytest.approx(naive, abs=0.5)
    assert kept_for_the_backward(FCDenseNet, growth_rate, block_config) == pytest.approx(ours, abs=0.5)
