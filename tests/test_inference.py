"""Inference without a gradient: what is prepared once gives the same results, and never outlives its sources."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cases import FLOAT64_TOLERANCE, VARIANTS, make_images, make_pair, needs_native, norms_of, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from densenet_efficient import inference, operators
from densenet_efficient.kept import beside
from densenet_efficient.modules import DenseBlock

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, DenseBlock)]


def logits_of(model, images):
    with torch.inference_mode():
        return model(images)


def assert_equal_to_a_fresh_copy(model, images):
    """A copy has nothing prepared, and is put together anew."""
    torch.testing.assert_close(logits_of(model, images), logits_of(copy.deepcopy(model), images), rtol=0, atol=0)


@pytest.fixture
def no_operator(monkeypatch):
    """Lets a test fail that runs a stage as it is run in training."""

    def refuse(*args):
        raise AssertionError("a stage ran as in training")

    monkeypatch.setattr(operators, "dense_stage", refuse)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 3, 33, 47), (3, 3, 64, 40), (2, 3, 224, 32)], ids=str)
def test_float64(no_operator, variant, shape):
    naive, efficient = make_pair(mode="eval", **VARIANTS[variant])
    images = make_images(*shape)
    for x in (images, images.to(memory_format=torch.channels_last), images[:, :, ::2]):
        torch.testing.assert_close(logits_of(efficient, x), logits_of(naive, x), rtol=FLOAT64_TOLERANCE, atol=1e-9)
    x = logits_of(efficient.to(memory_format=torch.channels_last), images)
    torch.testing.assert_close(x, logits_of(naive, images), rtol=FLOAT64_TOLERANCE, atol=1e-9)


@pytest.mark.parametrize("images", [1, 2])
def test_contiguous_features(no_operator, images):
    """Without a stem before it, a stage gets them as the first convolution gives them; one image's rows are a view."""
    naive, efficient = make_pair(mode="eval", small_inputs=True)
    x = make_images(images, 3, 9, 12)
    torch.testing.assert_close(logits_of(efficient, x), logits_of(naive, x), rtol=FLOAT64_TOLERANCE, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision(no_operator, variant, dtype):
    """At most twice the naive model's error, plus a floor for what rounding does to a sum of few terms."""
    arguments = {"growth_rate": 16, "num_init_features": 32} | VARIANTS[variant]
    truth, _ = make_pair(mode="eval", **arguments)
    naive, efficient = make_pair(mode="eval", dtype=dtype, **arguments)
    images = make_images(4, 3, 64, 64, dtype=dtype)
    expected = logits_of(truth, images.double())
    naive_error, error = ((logits_of(model, images).double() - expected).norm() for model in (naive, efficient))
    assert error <= 2 * naive_error + torch.finfo(dtype).eps * expected.norm()


def test_autocast_prepares_each_dtype(no_operator):
    _, model = make_pair(mode="eval", dtype=torch.float32)
    images = make_images(2, 3, 64, 64, dtype=torch.float32)
    exact = logits_of(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        low = logits_of(model, images)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.1, atol=0.1)
    assert set(inference.kept_stage(blocks_of(model)[-1], model.features.norm5).prepared) == {
        torch.float32,
        torch.bfloat16,
    }


def test_what_was_prepared_is_kept(no_operator):
    _, model = make_pair(mode="eval")
    images = make_images(2, 3, 64, 64)
    first = logits_of(model, images)
    consumers = [model.features.transition1, model.features.norm5]
    stages = [inference.kept_stage(*pair) for pair in zip(blocks_of(model), consumers, strict=True)]
    assert None not in stages
    torch.testing.assert_close(logits_of(model, images), first, rtol=0, atol=0)
    assert stages == [inference.kept_stage(*pair) for pair in zip(blocks_of(model), consumers, strict=True)]


def scale_weight(model):
    with torch.no_grad():
        model.features.denseblock1.denselayer2.conv1.weight.mul_(2)


def take_an_optimizer_step(model):
    model(make_images(2, 3, 64, 64)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def assign_data(model):
    weight = model.features.denseblock2.denselayer1.conv2.weight
    weight.data = weight.data * 2


def assign_data_that_differ_in_one_element(model):
    weight = model.features.denseblock1.denselayer2.conv1.weight
    other = weight.data.clone()
    other[1, 5] += 5
    weight.data = other


def replace_parameter(model):
    conv = model.features.transition1.conv
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def replace_module(model):
    layer = model.features.denseblock1.denselayer1
    conv = nn.Conv2d(layer.conv2.in_channels, layer.conv2.out_channels, 3, padding=1, bias=False)
    layer.conv2 = conv.double().eval()


def replace_layer(model):
    layer = copy.deepcopy(model.features.denseblock1.denselayer1)
    with torch.no_grad():
        layer.conv1.weight.mul_(2)
    model.features.denseblock1.denselayer1 = layer


def load_another_state(model):
    other = copy.deepcopy(model)
    randomise(other, seed=5)
    model.load_state_dict(other.state_dict())


def load_another_state_by_assignment(model):
    other = copy.deepcopy(model)
    randomise(other, seed=6)
    model.load_state_dict(other.state_dict(), assign=True)


def train_the_statistics(model):
    with torch.no_grad():
        model.train()(make_images(4, 3, 64, 64, seed=3))
    model.eval()


def change_epsilon(model):
    model.features.norm5.eps = 0.5


def add_a_hook(model):
    model.features.denseblock2.denselayer1.conv2.register_forward_hook(lambda module, inputs, output: 2 * output)


class DoublingConvolution(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def append_a_module(model):
    model.features.add_module("extra", nn.Tanh())


def change_the_class(model):
    model.features.denseblock1.denselayer2.conv1.__class__ = DoublingConvolution


def update_in_inference_mode(model):
    with torch.inference_mode():
        model.features.denseblock2.denselayer2.norm2.weight.mul_(3)


def move_to_another_dtype_and_back(model):
    scale_weight(model.float())
    model.double()


def scale_all_through_data(model):
    """As averages of weights are often kept: no tensor's version is raised, here and in the next three."""
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def initialise_through_data(model):
    nn.init.normal_(model.features.denseblock2.denselayer1.conv1.weight.data)


def write_through_numpy(model):
    model.features.denseblock1.denselayer2.norm1.running_var.numpy()[:] = 2.0


def take_a_fused_step_after_validation(model):
    images = make_images(2, 3, 64, 64)
    model(images).square().sum().backward()
    logits_of(model, images)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def write_one_element_and_say_so(model):
    """The sample of a tensor may miss it, as the README says, with the remedy."""
    weight = model.features.denseblock1.denselayer2.conv1.weight
    weight.data[1, 5] += 5
    torch.autograd.graph.increment_version(weight)


CHANGES = [
    scale_weight,
    take_an_optimizer_step,
    assign_data,
    assign_data_that_differ_in_one_element,
    replace_parameter,
    replace_module,
    replace_layer,
    load_another_state,
    load_another_state_by_assignment,
    train_the_statistics,
    change_epsilon,
    add_a_hook,
    append_a_module,
    change_the_class,
    update_in_inference_mode,
    move_to_another_dtype_and_back,
    scale_all_through_data,
    initialise_through_data,
    write_through_numpy,
    take_a_fused_step_after_validation,
    write_one_element_and_say_so,
]


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_model_shows(change):
    _, model = make_pair(mode="eval")
    images = make_images(2, 3, 64, 64)
    before = logits_of(model, images)
    change(model)
    assert not torch.equal(logits_of(model, images), before)
    assert_equal_to_a_fresh_copy(model, images)


@pytest.mark.parametrize("offset", [0, 3])
def test_a_snapshot_of_a_weight_whose_memory_was_freed(offset):
    """As FSDP frees it between uses: its values cannot be looked at, and come back as they were."""
    from densenet_efficient._C import ModuleSnapshot

    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(torch.zeros(offset + 64 * 64)[offset:].view(64, 64))
    memory = linear.weight.untyped_storage()
    size = memory.nbytes()
    memory.resize_(0)
    snapshot = ModuleSnapshot([linear], with_values=True)
    assert snapshot.matches([linear])
    memory.resize_(size)
    assert not snapshot.matches([linear])


def test_batch_statistics_are_not_prepared():
    naive, efficient = make_pair(mode="mixed")
    images = make_images(3, 3, 64, 64)
    for _ in range(2):
        torch.testing.assert_close(logits_of(efficient, images), logits_of(naive, images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(efficient.state_dict(), naive.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["norm0", "denseblock2.denselayer1.norm1", "transition1.norm", "norm5"])
def test_batch_statistics_of_one_norm(path):
    pair = make_pair(mode="eval")
    images = make_images(3, 3, 64, 64)
    for model in pair:
        model.features.get_submodule(path).train()
    for _ in range(2):
        naive, efficient = (logits_of(model, images) for model in pair)
        torch.testing.assert_close(efficient, naive, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(model.state_dict() for model in reversed(pair)), rtol=1e-9, atol=1e-9)


def test_a_dispatch_mode_sees_the_operators():
    """Also after something was prepared."""
    _, model = make_pair(mode="eval")
    images, seen = make_images(2, 3, 64, 64), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **kwargs or {})

    with torch.no_grad():
        model(images)
        with Watch():
            model(images)
    assert {operators.stem, operators.dense_stage} <= seen
    assert torch.ops.densenet_efficient.dense_stage_inference.default not in seen


def test_dropout_of_layers_in_training():
    """Their norms are frozen: the outputs are drawn, as many ask for to see how sure a network is."""
    naive, efficient = make_pair(mode="frozen", drop_rate=0.5)
    images = make_images(2, 3, 64, 64)
    found = []
    for model in (naive, efficient):
        torch.manual_seed(0)
        found.append(logits_of(model, images))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert not torch.equal(logits_of(efficient, images), found[1])


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_a_hook_for_all_modules():
    """It sees every module, also after something was prepared."""
    _, model = make_pair(mode="eval")
    images = make_images(2, 3, 64, 64)
    expected, seen = logits_of(model, images), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        torch.testing.assert_close(logits_of(model, images), expected, rtol=1e-9, atol=1e-9)
    finally:
        handle.remove()
    assert set(norms_of(model)) <= set(seen)


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "place", ["denseblock1.denselayer2.conv1", "denseblock2.denselayer1.conv2", "transition1.conv"]
)
def test_a_weight_of_another_shape_is_refused(place, dtype):
    """Also where its packed form has as many bytes, for these are padded."""
    _, model = make_pair(dtype=dtype, mode="eval")
    conv = model.features.get_submodule(place)
    conv.weight = nn.Parameter(conv.weight[:, :-1].detach().clone())
    with pytest.raises(RuntimeError, match="weight of size"):
        logits_of(model, make_images(2, 3, 64, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "place", ["denseblock1.denselayer2.conv1", "denseblock2.denselayer1.conv2", "transition1.conv"]
)
def test_a_convolution_of_another_dtype_is_refused_as_in_training(place, dtype):
    """Also where it became so after an inference; under autocast every dtype is cast, and none is refused."""
    _, model = make_pair(dtype=torch.float32, mode="eval")
    images = make_images(2, 3, 64, 64, dtype=torch.float32)
    logits_of(model, images)
    model.features.get_submodule(place).to(dtype)
    if dtype == torch.float32:
        assert logits_of(model, images).dtype == dtype
        return
    with pytest.raises(RuntimeError, match="should be the same") as in_training:
        model(images)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="should be the same") as error:
            logits_of(model, images)
        assert str(error.value) == str(in_training.value)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits_of(model, images).dtype == torch.bfloat16


def test_parameters_made_in_inference_mode():
    """They tell nobody when they change, so nothing of them is kept."""
    naive, _ = make_pair(mode="eval")
    with torch.inference_mode():
        _, model = make_pair(mode="eval")
    images = make_images(2, 3, 64, 64)
    torch.testing.assert_close(logits_of(model, images), logits_of(naive, images), rtol=1e-9, atol=1e-9)
    with torch.inference_mode():
        for norm in norms_of(model):
            norm.bias.add_(1)
    assert not torch.allclose(logits_of(model, images), logits_of(naive, images))


@pytest.mark.parametrize("make", [torch.ones, lambda size: torch.eye(size).to_sparse()], ids=["inference", "sparse"])
def test_attributes_without_a_version_or_an_address(no_operator, make):
    """They are told apart by their identity alone."""
    _, efficient = make_pair(mode="eval")
    images = make_images(2, 3, 33, 47)
    expected = logits_of(efficient, images)
    with torch.inference_mode():
        efficient.features.denseblock1.seen = make(3)
    for _ in range(2):
        assert torch.equal(logits_of(efficient, images), expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layer", ["denseblock2", "denseblock2.denselayer1", "denseblock2.denselayer1.conv2"])
@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_a_hook_that_leads_back_to_the_model_does_not_keep_it_alive(mode, layer):
    """As those of Grad-CAM tools do."""

    class Tool:
        def __init__(self, model):
            self.model = model
            model.features.get_submodule(layer).register_forward_hook(self.see)

        def see(self, module, inputs, output):
            pass

    def run(model):
        with torch.set_grad_enabled(mode == "train"):
            model(make_images(2, 3, 33, 47))

    _, model = make_pair(mode=mode)
    run(model)
    tool = Tool(model)
    run(model)
    alive = weakref.ref(model)
    del model, tool
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_attribute_that_leads_back_to_the_model_does_not_keep_it_alive(mode):
    _, model = make_pair(mode=mode)
    model.features.denseblock2.owner = [model]
    with torch.set_grad_enabled(mode == "train"):
        model(make_images(2, 3, 33, 47))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_nothing_prepared_is_saved():
    _, model = make_pair(mode="eval")
    size = len(pickle.dumps(model))
    logits_of(model, make_images(2, 3, 64, 64))
    saved = pickle.dumps(model)
    assert len(saved) < size + 200  # the names of what is empty
    for other in (pickle.loads(saved), copy.deepcopy(model)):
        assert all(beside(block).stage is None for block in blocks_of(other))
    assert all(beside(block).stage is not None for block in blocks_of(model))


def test_features_alone(no_operator):
    naive, efficient = make_pair(mode="eval")
    images = make_images(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(efficient.features(images), naive.features(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 3, 40, 40), (2, 3, 64, 64)], ids=str)
def test_bad_images_are_refused_as_in_training(size):
    _, model = make_pair(mode="eval", dtype=torch.float32)
    logits_of(model, make_images(*size, dtype=torch.float32))
    for wrong, error in [
        (torch.zeros(2, 3, 4, 4), "too small"),
        (torch.zeros(2, 4, 64, 64), "channels"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.float64), "same"),
    ]:
        with pytest.raises(RuntimeError, match=error):
            logits_of(model, wrong)


@pytest.mark.parametrize("images", [1, 5, 8])
def test_several_threads_share_the_images(images):
    """Five: one is left over, for both."""
    _, model = make_pair(mode="eval", dtype=torch.float32)
    x = make_images(images, 3, 64, 64, dtype=torch.float32)
    expected = logits_of(model, x)
    torch.set_num_threads(2)
    torch.testing.assert_close(logits_of(model, x), expected, rtol=0, atol=0)


class Embedded(Dataset):
    """A data set whose items pass through a model, in whichever process reads them."""

    def __init__(self, model, images):
        self.model, self.images = model, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return logits_of(self.model, self.images[index : index + 1])[0].clone()


@pytest.mark.own_process
@pytest.mark.parametrize("threads", [1, 2])
def test_workers_forked_after_the_parent_has_run(threads):
    torch.set_num_threads(threads)
    _, model = make_pair(mode="eval", dtype=torch.float32)
    images = make_images(6, 3, 64, 64, dtype=torch.float32)
    expected = torch.stack([logits_of(model, images[index : index + 1])[0] for index in range(6)])
    loader = DataLoader(Embedded(model, images), 2, num_workers=2, multiprocessing_context="fork", timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=0, atol=0)
