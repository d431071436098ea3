"""A model in evaluation, taken elsewhere or transformed: PyTorch's own operators alone, and the same outputs.

Where those are all that runs, no backend is chosen. AOTInductor, slow to compile, is in docs/leaving_python.md, which
test_docs.py runs.
"""

import copy

import onnxruntime
import pytest
import torch
from cases import LEVELS, SMALL, VARIANTS, assert_close, make_images, make_pair, relative_error
from conversion_cases import make_models
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from densenet_efficient import EfficientDenseNet, convert
from densenet_efficient.registration import NAMESPACE

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:a dense block runs layer by layer"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit, and within the exporter to ONNX
]

SIZE = (33, 47)
FLOAT32_TOLERANCE = 1e-5


def converted_pair(mode="eval"):
    original, converted = make_models("torchvision")
    convert(converted)
    return original.train(mode != "eval"), converted.train(mode != "eval")


PAIRS = {
    "none": lambda mode="eval": make_pair(mode=mode, checkpointing="none"),
    "bottleneck": lambda mode="eval": make_pair(mode=mode, checkpointing="bottleneck"),
    "plain": lambda mode="eval": make_pair(mode=mode, **VARIANTS["plain"]),
    "converted": converted_pair,
}
every_pair = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)


def own_operators(graph):
    """The calls of this package's operators in a torch.fx graph."""
    return [str(node.target) for node in graph.nodes if str(node.target).startswith(NAMESPACE)]


@every_pair
@pytest.mark.parametrize("strict", [True, False])
def test_torch_export(make, strict):
    naive, model = make()
    images, others = make_images(2, 3, *SIZE), make_images(5, 3, *SIZE)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
    assert not own_operators(exported.graph)
    assert_close({"": exported.module()(others)}, {"": naive(others)})


def test_torch_export_in_training():
    """As any exported model in training: the running statistics are updated by the graph."""
    naive, model = make_pair()
    images = make_images(2, 3, *SIZE)
    exported = torch.export.export(model, (images,)).module()
    assert not own_operators(exported.graph)
    assert_close({"": exported(images)}, {"": naive(images)})
    assert_close(dict(exported.named_buffers()), dict(naive.named_buffers()))


@pytest.mark.parametrize("make", [make_pair, converted_pair], ids=["own", "converted"])
def test_onnx(tmp_path, make):
    model = make(mode="eval")[1].float()
    images, others = (make_images(batch, 3, *SIZE, dtype=torch.float32) for batch in (2, 5))
    program = torch.onnx.export(
        model, (images,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    assert {node.domain for node in program.model.graph} == {""}  # the standard's own operators
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [name] = [argument.name for argument in session.get_inputs()]
    for batch in (images, others):
        logits = torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
        assert relative_error(logits, model(batch)) < FLOAT32_TOLERANCE


@every_pair
def test_torchscript_trace(make):
    naive, model = make()
    traced = torch.jit.trace(model, (make_images(2, 3, *SIZE),))
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith(NAMESPACE)]
    images = make_images(5, 3, 40, 36)
    assert_close({"": traced(images)}, {"": naive(images)})


@every_pair
@pytest.mark.parametrize("with_gradient", [True, False])
def test_torch_compile(make, with_gradient):
    naive, model = make()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda module, _: graphs.append(module.graph) or module)
    images = make_images(2, 3, *SIZE)
    with torch.set_grad_enabled(with_gradient):
        assert_close({"": compiled(images)}, {"": naive(images)})
    assert len(graphs) == 1
    assert not own_operators(graphs[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [make_pair, converted_pair])
def test_torch_compile_in_training_keeps_the_operators(backend, make):
    _, model = make(mode="train")
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda module, _: graphs.append(module.graph) or module)
    compiled(make_images(2, 3, *SIZE))
    assert own_operators(graphs[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_functional_call(backend, mode):
    """Parameters and buffers from elsewhere; by our operators, for nothing is transformed."""
    naive, model = make_pair(mode=mode)
    _, other = make_pair(seed=1, mode=mode)
    images = make_images(2, 3, *SIZE)
    assert_close({"": functional_call(other, model.state_dict(), (images,))}, {"": naive(images)})
    assert_close(dict(model.named_buffers()), dict(naive.named_buffers()))


@pytest.mark.parametrize("level", LEVELS)
def test_ensemble_by_vmap(level):
    models = [make_pair(seed, mode="eval", checkpointing=level)[1] for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    images = make_images(2, 3, *SIZE)

    def run(parameters, buffers):
        return functional_call(base, (parameters, buffers), (images,))

    assert_close({"": vmap(run)(parameters, buffers)}, {"": torch.stack([model(images) for model in models])})


@every_pair
def test_gradients_per_image(make):
    """`vmap` of `grad`, as for differential privacy."""
    images = make_images(3, 3, *SIZE)

    def gradients(model):
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def loss(parameters, image):
            return functional_call(model, parameters, (image[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(parameters, images)

    naive, model = make()
    assert_close(gradients(model), gradients(naive))


@every_pair
@pytest.mark.parametrize("mode", ["eval", "frozen"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode(make, mode, requires_grad):
    """Tangents of images and of parameters, by torch.func and by dual numbers; never zeros in their place."""
    results = []
    images = make_images(2, 3, *SIZE)
    for model in (each.requires_grad_(requires_grad) for each in make(mode)):
        if mode == "frozen":
            [norm.eval() for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        _, of_images = jvp(model, (images,), (torch.ones_like(images),))
        _, of_parameters = jvp(
            lambda values, model=model: functional_call(model, values, (images,)), (parameters,), (parameters,)
        )
        with forward_ad.dual_level():
            dual = model(forward_ad.make_dual(images, torch.ones_like(images)))
            results.append(
                {"func": of_images, "parameters": of_parameters, "dual": forward_ad.unpack_dual(dual).tangent}
            )
    assert results[0]["func"].any()
    assert_close(results[1], results[0])


@pytest.mark.parametrize("with_gradient", [True, False])
def test_forward_mode_after_an_inference(backend, with_gradient):
    """What was prepared for it knows no tangents; of images, and of a weight that became a dual number."""
    results = []
    images = make_images(2, 3, *SIZE)
    for model in make_pair(mode="eval"):
        with torch.no_grad():
            model(images)
        with torch.set_grad_enabled(with_gradient), forward_ad.dual_level():
            of_images = model(forward_ad.make_dual(images, torch.ones_like(images)))
            conv = model.features.denseblock1.denselayer2.conv1
            weight = conv.weight.detach()
            del conv.weight
            conv.weight = forward_ad.make_dual(weight, weight)
            of_weight = model(images)
            results.append([forward_ad.unpack_dual(dual).tangent for dual in (of_images, of_weight)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_vmap_after_an_inference(backend):
    """What was prepared for it knows one batch of images alone."""
    _, model = make_pair(mode="eval")
    images = make_images(3, 3, *SIZE)
    with torch.no_grad():
        expected = model(images)
        mapped = vmap(lambda image: model(image[None])[0])(images)
    assert_close({"": mapped}, {"": expected})


def test_fake_tensors_outside_their_mode(native_backend):
    """A forward that computes shapes alone, as before a large model is built."""
    with FakeTensorMode():
        model, images = EfficientDenseNet(**SMALL).eval(), torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert model(images).shape == (2, SMALL["num_classes"])
