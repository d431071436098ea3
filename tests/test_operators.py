"""The operators as autograd, torch.compile, export, copying and pickling see them."""

import copy
import io
import math
import pickle

import pytest
import torch
from cases import LEVELS, MODES, VARIANTS, assert_close, loss_of, make_images, make_pair, needs_native, state_of, step
from kernel_cases import Factory, cast
from torch._subclasses import FakeTensorMode

from densenet_efficient import EfficientDenseNet
from densenet_efficient import stem as stem_module
from densenet_efficient.kernels import CONTRACT
from densenet_efficient.operators import dense_stage, dense_stage_backward, stem, stem_backward

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES, CHANNELS, GROWTH_RATE, WIDTH, LAYERS = 2, 3, 2, 4, 2
EXITS = ["transition", "transition down", "head", "none"]
ALONE = (None, "")  # counts and group of a process by itself


class StageArguments:
    """Those of `dense_stage` for a small stage; ``frozen``: the second norm1 and the exit's use running statistics."""

    def __init__(
        self,
        bottleneck=True,
        stage_exit="transition",
        frozen=False,
        dropout=False,
        saved=0,
        evaluation=False,
        size=(3, 5),
        dilation=1,
    ):
        self.generator = torch.Generator().manual_seed(0)
        self.bottleneck, self.exit, self.frozen = bottleneck, stage_exit, frozen
        self.saved = saved
        self.x = self.normal(IMAGES, CHANNELS, *size)
        self.dilations = [dilation] * LAYERS
        one, three = [1] * len(size), [3] * len(size)
        total = CHANNELS + LAYERS * GROWTH_RATE
        self.parameters, self.running, self.uses_running = [], [], []
        for index in range(LAYERS):
            channels = CHANNELS + index * GROWTH_RATE
            self.add_norm(self.parameters, channels, evaluation or (frozen and index == 1))
            if bottleneck:
                self.parameters.append(self.normal(WIDTH, channels, *one))
                self.add_norm(self.parameters, WIDTH, evaluation)
            channels = WIDTH if bottleneck else channels
            self.parameters.append(self.normal(GROWTH_RATE, channels, *three))
        self.exit_parameters = []
        if stage_exit != "none":
            self.add_norm(self.exit_parameters, total, evaluation or frozen)
        if stage_exit.startswith("transition"):
            self.exit_parameters.append(self.normal(4, total, *one))
        rows = IMAGES * math.prod(size)
        kept = [torch.rand(rows, GROWTH_RATE, generator=self.generator) > 0.3 for _ in range(LAYERS)]
        if stage_exit == "transition down":
            kept.append(torch.rand(rows, 4, generator=self.generator) > 0.3)
        self.masks, self.drop_rate = (kept, 0.3) if dropout else ([], 0.0)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def add_norm(self, parameters, channels, uses_running):
        parameters += [self.normal(channels) + 0.5, self.normal(channels)]
        self.uses_running.append(uses_running)
        if uses_running:
            self.running += [self.normal(channels), self.normal(channels).square() + 0.5]

    @property
    def differentiable(self):
        return [self.x, *self.parameters, *self.exit_parameters]

    @property
    def values(self):
        epsilons = [1e-5] * len(self.uses_running)
        return [epsilons, self.uses_running, self.bottleneck, self.dilations, self.exit, self.drop_rate]

    def with_tensors(self, x, *tensors):
        """The operator's arguments, with these as its differentiable ones."""
        count = len(self.parameters)
        groups = [list(tensors[:count]), list(tensors[count:]), self.running, self.masks]
        return (x, *groups, *self.values, self.saved, *ALONE)

    def requiring_grad(self):
        return [tensor.clone().requires_grad_() for tensor in self.differentiable]


STAGES = {
    f"{'bottleneck' if bottleneck else 'plain'}-{stage_exit}-{'saved' if saved else 'recomputed'}": StageArguments(
        bottleneck, stage_exit, saved=saved
    )
    for bottleneck in (True, False)
    for stage_exit in EXITS
    for saved in (LAYERS, 0)
} | {
    "frozen-transition": StageArguments(frozen=True),
    "frozen-head": StageArguments(stage_exit="head", frozen=True, saved=LAYERS),
    "evaluation": StageArguments(evaluation=True),
    "last-saved": StageArguments(saved=1),
    "dropout": StageArguments(dropout=True),
    "dropout-down": StageArguments(bottleneck=False, stage_exit="transition down", dropout=True),
    "plain-dropout": StageArguments(bottleneck=False, dropout=True, saved=LAYERS),
    "1D": StageArguments(size=(6,), saved=LAYERS),
    "3D": StageArguments(size=(3, 2, 3)),
    "dilated": StageArguments(dilation=2),
}
every_stage = pytest.mark.parametrize("arguments", STAGES.values(), ids=STAGES)


@every_stage
def test_gradcheck_of_a_stage(backend, arguments):
    outputs = slice(0, 2) if arguments.exit != "none" else slice(1, 2)

    def out_and_features(*tensors):
        return dense_stage(*arguments.with_tensors(*tensors))[outputs]

    assert torch.autograd.gradcheck(out_and_features, arguments.requiring_grad())


def stem_arguments(frozen=False, save=False, size=(11, 14)):
    generator = torch.Generator().manual_seed(0)
    dims = len(size)
    shapes = [(2, 3, *size), (4, 3, *[7] * dims), (4,), (4,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    running = [tensors[2] * 0.1, tensors[3].square() + 0.5] if frozen else []
    return tensors, (running, [2] * dims, [3] * dims, 1e-5, save, *ALONE)


every_stem = pytest.mark.parametrize(
    ("frozen", "save", "size"),
    [
        *[(frozen, save, (11, 14)) for frozen in (True, False) for save in (True, False)],
        (False, True, (13,)),
        (False, False, (5, 4, 7)),
    ],
)


@every_stem
def test_gradcheck_of_the_stem(backend, frozen, save, size):
    tensors, values = stem_arguments(frozen, save, size)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *tensors: stem(*tensors, *values)[0], tensors, fast_mode=len(size) == 3)


@every_stage
def test_opcheck_of_a_stage(backend, arguments):
    torch.library.opcheck(dense_stage, arguments.with_tensors(*arguments.requiring_grad()))


@every_stage
@pytest.mark.parametrize("needed", ["all", "some", "input", "features"])
def test_opcheck_of_the_backward_of_a_stage(backend, arguments, needed):
    tensors = arguments.differentiable
    out, *saved = dense_stage(*arguments.with_tensors(*tensors))
    wanted = {
        "all": [True] * len(tensors),
        "some": [index % 3 == 1 for index in range(len(tensors))],
        "input": [index == 0 for index in range(len(tensors))],
        "features": [True] * len(tensors),  # the exit's too, which nothing reaches
    }[needed]
    out_grad = None if arguments.exit == "none" or needed == "features" else torch.ones_like(out)
    features_grad = torch.ones_like(saved[0]) if out_grad is None or needed == "some" else None
    groups = arguments.with_tensors(*tensors)[1:5]
    torch.library.opcheck(
        dense_stage_backward, (out_grad, features_grad, *saved, *groups, *arguments.values, wanted, *ALONE)
    )


@every_stem
def test_opcheck_of_the_stem(backend, frozen, save, size):
    tensors, values = stem_arguments(frozen, save, size)
    torch.library.opcheck(stem, (*[tensor.clone().requires_grad_() for tensor in tensors], *values))
    out, *saved = stem(*tensors, *values)
    x, *parameters = tensors
    needed = [save, True, frozen, True]
    geometry = values[:4]
    torch.library.opcheck(stem_backward, (torch.ones_like(out), x, *saved, *parameters, *geometry, needed, *ALONE))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", CONTRACT)
def test_opcheck_of_a_native_operation(operation, dtype):
    arguments = cast(getattr(Factory(2, 4, 6, 5, 3), operation)(), dtype)
    arguments = {
        name: torch.nan_to_num(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    torch.library.opcheck(getattr(torch.ops.densenet_efficient, operation).default, tuple(arguments.values()))


def inference_arguments(dtype=torch.float32):
    """Of a stage of two layers, 6 + 2 * 4 channels on 2 images of 4x6, and its transition to 7 channels."""
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    norms = [torch.rand(4, channels, dtype=vector) for channels in (6, 8, 10, 8, 14)]
    shapes = [(8, 6, 1, 1), (4, 8, 3, 3), (8, 10, 1, 1), (4, 8, 3, 3), (7, 14, 1, 1)]
    packed = [torch.ops.densenet_efficient.packed_weight(torch.randn(shape), dtype) for shape in shapes]
    x, features, out = (torch.rand(shape, dtype=dtype) for shape in [(48, 6), (48, 14), (12, 7)])
    return {
        "x": x, "height": 4, "width": 6, "bottleneck_channels": 8, "growth_rate": 4, "affines": norms[:4],
        "packed": packed[:4], "exit_affine": norms[4], "exit_packed": packed[4], "window": [2, 2],
        "features": features, "out": out,
    }  # fmt: skip


def inference_stem_arguments(dtype):
    x, weight, out = (torch.rand(shape, dtype=dtype) for shape in [(1, 3, 9, 8), (5, 3, 3, 3), (6, 5)])
    return {
        "x": x, "weight": weight, "stride": [2, 2], "padding": [1, 1],
        "scale": torch.rand(5), "shift": torch.rand(5), "out": out,
    }  # fmt: skip


INFERENCE = {"dense_stage_inference": inference_arguments, "conv_bn_relu_max_pool": inference_stem_arguments}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INFERENCE)
def test_opcheck_of_the_inference(name, dtype):
    """It runs outside autograd and every trace, so the schema is all there is."""
    operator = getattr(torch.ops.densenet_efficient, name).default
    torch.library.opcheck(operator, tuple(INFERENCE[name](dtype).values()), test_utils="test_schema")


# Of memory, of the machine's speed, and of weights before an inference: neither autograd nor a trace sees them.
OUTSIDE_TRACES = {
    "packed_weight": (torch.rand(4, 6, 3, 3), torch.bfloat16),
    "empty_kept": (torch.rand(1), [2, 3]),
    "return_freed_memory": (),
    "cpu_product_rate": (torch.float32, 1e-3),
}


@needs_native
@pytest.mark.parametrize("name", OUTSIDE_TRACES)
def test_opcheck_outside_traces(name):
    operator = getattr(torch.ops.densenet_efficient, name).default
    torch.library.opcheck(operator, OUTSIDE_TRACES[name], test_utils="test_schema")


@needs_native
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.rand(47, 6), "x must have one row per pixel"),
        ("x", torch.rand(48, 12)[:, ::2], "x must have unit column stride"),
        ("x", torch.rand(48, 6, dtype=torch.float64), "packed must be what packed_weight gives"),
        ("affines", [torch.rand(4, 6), *[torch.rand(4, 8)] * 3], "affines must be contiguous"),
        ("bottleneck_channels", 7, "packed must be what packed_weight gives"),
        ("bottleneck_channels", 0, "packed must be what packed_weight gives"),
        ("growth_rate", 0, "Expected channels"),
        ("affines", [torch.rand(4, 6)], "one entry per convolution"),
        ("exit_affine", torch.rand(4, 13), "affines must be contiguous"),
        ("exit_affine", torch.rand(14, 4).t(), "affines must be contiguous"),
        ("exit_affine", None, "Expected exit_affine with out"),
        ("exit_packed", torch.zeros(3, dtype=torch.uint8), "packed must be what packed_weight gives"),
        ("window", [5, 1], "Expected a window that fits"),
        ("features", torch.rand(48, 15), "features must have shape"),
        ("out", torch.rand(11, 7), "out must have shape"),
    ],
)
def test_impossible_arguments_of_the_inference(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.densenet_efficient.dense_stage_inference(**inference_arguments() | {name: value})


@pytest.mark.large
@needs_native
def test_inference_on_images_more_than_2_to_the_31_bytes_apart():
    arguments = inference_arguments(torch.bfloat16)
    torch.ops.densenet_efficient.dense_stage_inference(**arguments)
    apart = {}
    for name in ("x", "features", "out"):
        shape = arguments[name].shape
        view = torch.empty(shape[0] * 2**27, dtype=torch.bfloat16).as_strided(shape, (2**27, 1))
        apart[name] = view.copy_(arguments[name]) if name == "x" else view
    torch.set_num_threads(2)  # of an image each
    torch.ops.densenet_efficient.dense_stage_inference(**arguments | apart)
    for name in ("features", "out"):
        assert torch.equal(apart[name], arguments[name])


@needs_native
def test_only_convolutions_of_a_dense_layer_are_packed():
    with pytest.raises(RuntimeError, match=r"weight must have shape \[K, C, 1, 1\] or \[K, C, 3, 3\]"):
        torch.ops.densenet_efficient.packed_weight(torch.rand(4, 4, 5, 5), torch.float32)


def test_every_operator_is_checked_above():
    """Against the registry, so that a new operator cannot be forgotten."""
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "densenet_efficient" in name}
    ours = {"dense_stage", "dense_stage_backward", "stem", "stem_backward"}
    loops = {"dense_layers", "dense_layers_backward"}  # in test_native_layers.py
    assert registered <= ours | set(CONTRACT) | INFERENCE.keys() | OUTSIDE_TRACES.keys() | loops
    assert ours <= registered


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", ["bc", "plain"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_a_full_graph(backend, variant, level, mode):
    _, model = make_pair(mode=mode, checkpointing=level, **VARIANTS[variant])
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    images = make_images(2, 3, 33, 47)
    for _ in range(2):
        expected = step(model, images)
        result = step(compiled, images)
        assert_close({name.replace("_orig_mod.", ""): value for name, value in result.items()}, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("arguments", [{}, {"bottleneck": False}], ids=str)
def test_gradients_of_a_channels_last_model_are_laid_out_as_torch_compile_expects(backend, arguments):
    """Inductor stops where strides are others than those of the fake tensors."""
    _, model = make_pair(**arguments)
    model.to(memory_format=torch.channels_last)
    parameters = list(model.parameters())

    def strides():
        images = torch.zeros(2, 3, 18, 14, dtype=torch.float64)
        return [gradient.stride() for gradient in torch.autograd.grad(model(images).sum(), parameters)]

    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = strides()
    assert strides() == expected


def test_compiles_with_inductor(backend):
    _, model = make_pair(block_config=(1,), small_inputs=True, checkpointing="none")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    images = make_images(2, 3, 6, 5)
    expected = step(model, images)
    result = step(compiled, images)
    assert_close({name.replace("_orig_mod.", ""): value for name, value in result.items()}, expected)
    torch._dynamo.reset()


def test_compiled_once_for_sizes_that_change(backend):
    _, model = make_pair()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((33, 47), (40, 36), (65, 33)):
        images = make_images(3, 3, *size)
        result = {name.replace("_orig_mod.", ""): value for name, value in step(compiled, images).items()}
        assert_close(result, step(model, images))
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_exports(backend, variant):
    _, model = make_pair(mode="eval", **VARIANTS[variant])
    images = make_images(2, 3, 33, 47)
    exported = torch.export.export(model, (images,))
    assert_close({"": exported.module()(images)}, {"": model(images)})
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    assert_close({"": torch.export.load(stream).module()(images)}, {"": model(images)})


def test_exports_with_any_batch(backend):
    _, model = make_pair(mode="eval")
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (make_images(2, 3, 33, 47),), dynamic_shapes=((batch, None, None, None),))
    images = make_images(5, 3, 33, 47)
    assert_close({"": exported.module()(images)}, {"": model(images)})


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_trains_on_like_its_original(backend, duplicate, level):
    _, model = make_pair(checkpointing=level, drop_rate=0.2)
    images = make_images(2, 3, 33, 47)
    step(model, images, seed=1)
    other = duplicate(model)
    assert_close(state_of(other), state_of(model) | gradients_unless_kept(other))
    for each in (model, other):
        each.zero_grad()
    assert_close(step(other, images, seed=2), step(model, images, seed=2), tolerance=0)


def gradients_unless_kept(model):
    """The gradients of ``model``, which pickling leaves behind and copying takes along."""
    return {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("arguments", [{}, {"small_inputs": True}, {"bottleneck": False}], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_a_second_derivative_is_refused(backend, arguments, level):
    _, model = make_pair(checkpointing=level, **arguments)
    images = make_images(2, 3, 33, 47).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(model(images)), images, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*NaiveDenseNet"):
        gradient.square().sum().backward()


def test_a_second_derivative_of_the_parameters_is_refused(backend):
    _, model = make_pair()
    parameters = list(model.features.parameters())
    gradients = torch.autograd.grad(loss_of(model(make_images(2, 3, 33, 47))), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        sum(gradient.square().sum() for gradient in gradients).backward()


@pytest.mark.parametrize("shape", [(2, 3, 201), (2, 3, 71, 45), (2, 3, 37, 33, 35)])
def test_a_large_image_runs_backward_in_bands(shape, monkeypatch):
    """With the same result, whatever is left for the last band."""
    torch.manual_seed(0)
    model = EfficientDenseNet(4, (1,), 8, num_classes=3, spatial_dims=len(shape) - 2).double()
    images = torch.randn(shape, dtype=torch.float64)
    gradients = []
    for pixels in (stem_module.PIXELS_OF_A_BAND, 100):
        monkeypatch.setattr(stem_module, "PIXELS_OF_A_BAND", pixels)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append(model.features.conv0.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
