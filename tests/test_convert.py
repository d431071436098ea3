"""DenseNets of torchvision, timm, MONAI and torchxrayvision, converted in place: the same results, names, objects."""

import contextlib
import copy
import io
import pickle
import re
import warnings

import pytest
import timm
import torch
import torchvision
from cases import (
    LEVELS,
    MODES,
    assert_close,
    group_errors,
    loss_of,
    make_images,
    make_pair,
    needs_native,
    saved_bytes,
    state_of,
    step,
    trained,
)
from conversion_cases import MODELS, SOURCES, make_model, make_models
from pytorch_lightning import Trainer
from test_exactness import assert_errors_at_most_twice, low_precision_step
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from densenet_efficient import convert, revert
from densenet_efficient.conversion.modules import ConvertedBlock
from densenet_efficient.kept import beside

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

IMAGES = (3, 3, 33, 47)
LIBRARIES = ["torchvision", "timm", "MONAI", "torchxrayvision"]
PLAIN = [name for name in MODELS if "dropout" not in name]
every_model = pytest.mark.parametrize("name", MODELS)
every_library = pytest.mark.parametrize("name", LIBRARIES)
every_level = pytest.mark.parametrize("level", LEVELS)


def classes_of(model):
    return [type(module) for module in model.modules()]


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, ConvertedBlock)]


def seeded(model, seed=5):
    """Draws the same dropout in every forward of both models."""
    model.register_forward_pre_hook(lambda *_: torch.manual_seed(seed) and None)
    return model


@every_model
@every_level
def test_trains_like_the_original(backend, name, level):
    """Changes of the parameters, and buffers with num_batches_tracked, after three steps of SGD."""
    original, converted = map(seeded, make_models(name))
    convert(converted, checkpointing=level)
    images = make_images(*IMAGES)
    assert_close(trained(converted, images), trained(original, images))


@every_model
@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients(backend, name, mode):
    original, converted = make_models(name, mode)
    convert(converted)
    images = make_images(*IMAGES)
    assert_close(step(converted, images, seed=3), step(original, images, seed=3))


@every_library
@every_level
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_low_precision(backend, name, level, autocast):
    """At most twice the original's own error; bfloat16 by autocast."""
    errors = []
    for seed in range(5):
        original, converted = (model.float() for model in make_models(name, seed=seed))
        convert(converted, checkpointing=level)
        images = make_images(*IMAGES, seed=seed, dtype=torch.float32)
        truth = step(copy.deepcopy(original).double(), images.double())
        pair = (original, converted)
        errors.append(
            [group_errors(low_precision_step(model, images, torch.float32, autocast), truth) for model in pair]
        )
    assert_errors_at_most_twice(errors, 2e-2 if autocast else 1e-5)


@needs_native
@pytest.mark.parametrize("name", PLAIN)
def test_inference_is_prepared_once(native_backend, name):
    original, converted = make_models(name, "eval")
    convert(converted)
    images = make_images(*IMAGES)
    for _ in range(2):
        with torch.no_grad():
            assert_close({"": converted(images)}, {"": original(images)})
        assert all(beside(block).stage is not None for block in blocks_of(converted))
        for model in (original, converted):  # what was prepared may not outlive what it was made of
            torch.manual_seed(0)
            [nn.init.normal_(parameter) for parameter in model.parameters()]


@every_model
def test_names_and_objects_stay(name):
    original, converted = make_models(name)
    paths = dict(converted.named_modules())
    tensors = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
    convert(converted)
    assert dict(converted.named_modules()) == paths
    for path, tensor in {**dict(converted.named_parameters()), **dict(converted.named_buffers())}.items():
        assert tensors.pop(path) is tensor
    assert not tensors
    assert list(converted.state_dict()) == list(original.state_dict())
    converted.load_state_dict(original.state_dict())


@every_library
def test_an_optimizer_and_a_moving_average_from_before(backend, name):
    models = make_models(name)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    averages = [torch.optim.swa_utils.AveragedModel(model, use_buffers=True) for model in models]
    convert(models[1])
    for model, optimizer, average in zip(models, optimizers, averages, strict=True):
        for seed in range(2):
            optimizer.zero_grad()
            loss_of(model(make_images(*IMAGES, seed=seed))).backward()
            optimizer.step()
            average.update_parameters(model)
    for kind in (models, averages):
        assert_close(kind[1].state_dict(), kind[0].state_dict(), 1e-7)  # AdamW divides by small second moments


@every_model
def test_revert_restores_everything(backend, name):
    converted = make_model(name)
    original = copy.deepcopy(converted)
    convert(converted)
    assert classes_of(converted) != classes_of(original)
    revert(converted)
    assert classes_of(converted) == classes_of(original)
    assert [vars(module).keys() for module in converted.modules()] == [
        vars(module).keys() for module in original.modules()
    ]
    images = make_images(*IMAGES)
    assert_close(step(converted, images, seed=3), step(original, images, seed=3), 0)


@every_library
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(backend, name, duplicate):
    original, converted = make_models(name)
    convert(converted, checkpointing="none")
    other = duplicate(converted)
    assert classes_of(other) == classes_of(converted)
    assert {block.checkpointing for block in blocks_of(other)} == {"none"}
    images = make_images(*IMAGES)
    assert_close(step(other, images), step(original, images))
    assert all(parameter.grad is None for parameter in converted.parameters())
    revert(other)
    assert classes_of(other) == classes_of(original)


def test_a_saved_module_loads():
    converted = make_model("timm", "eval")
    convert(converted)
    stream = io.BytesIO()
    torch.save(converted, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    images = make_images(*IMAGES)
    assert_close({"": loaded(images)}, {"": converted(images)}, 0)


OUTSIDE = ["", "features", "features.norm0", "features.pool0", "features.denseblock1", "features.transition1.norm"]
OUTSIDE += ["features.transition1", "features.norm5"]


@every_library
@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("before", [True, False])
def test_hooks_around_what_is_fused(backend, name, path, before):
    """They see what they saw and may change it, and the blocks stay fused: no warning."""
    seen = []
    models = make_models(name)
    convert(models[1]) if not before else None
    for model in models:
        hook = model.get_submodule(path).register_forward_hook(lambda _, inputs, output: output * 1.5)
        assert hook
        model.get_submodule(path).register_forward_hook(lambda _, inputs, output: seen.append(output.detach().clone()))
    convert(models[1]) if before else None
    images = make_images(*IMAGES)
    results = [step(model, images) for model in models]
    assert_close(results[1], results[0])
    assert_close({"": seen[1]}, {"": seen[0]})
    assert len(seen) == 2


BEHIND = [("timm", path) for path in ("global_pool", "global_pool.pool", "global_pool.flatten", "head_drop")]
BEHIND += [("MONAI", f"class_layers{path}") for path in ("", ".relu", ".pool", ".flatten", ".out")]


@pytest.mark.parametrize(("name", "path"), BEHIND)
def test_hooks_behind_the_features(backend, name, path):
    seen, models = [], make_models(name)
    convert(models[1])
    for model in models:
        model.get_submodule(path).register_forward_hook(lambda _, inputs, output: seen.append(output) or output * 1.5)
    images = make_images(*IMAGES)
    results = [step(model, images) for model in models]
    assert_close(results[1], results[0])
    assert_close({"": seen[1]}, {"": seen[0]})


@pytest.mark.parametrize(("name", "head"), [("timm", "global_pool"), ("MONAI", "class_layers")])
def test_a_pooling_replaced_after_the_conversion(backend, name, head):
    models = make_models(name)
    convert(models[1])
    for model in models:
        model.get_submodule(head).pool = nn.AdaptiveAvgPool2d(2)
        parent, last = (model, "classifier") if name == "timm" else (model.class_layers, "out")
        torch.manual_seed(0)
        setattr(parent, last, nn.Linear(4 * getattr(parent, last).in_features, 5).double())
    images = make_images(*IMAGES)
    assert_close(step(models[1], images), step(models[0], images))


@every_library
@every_level
@pytest.mark.parametrize("path", ["features.denseblock1", "features.transition1", "features.norm5"])
def test_backward_hooks(backend, name, path, level):
    models = make_models(name)
    convert(models[1], checkpointing=level)
    seen = []
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # PyTorch refuses backward hooks around what works in place
        features = model.features
        model.forward = lambda x, features=features: features(x)  # likewise their relu_ behind the last norm
        model.get_submodule(path).register_full_backward_hook(lambda _, ours, theirs: seen.append((*ours, *theirs)))
    images = make_images(*IMAGES)
    assert_close(*(step(model, images) for model in reversed(models)))
    assert len(seen) == 2
    assert_close(*(dict(enumerate(gradients)) for gradients in reversed(seen)))


@every_library
@pytest.mark.parametrize("part", ["", "norm1", "conv1", "norm2", "conv2"])
def test_hooks_inside_a_converted_block(backend, name, part):
    """The block runs as the original does for as long as the hook is there, and says so once."""
    original, converted = make_models(name)
    convert(converted)
    seen = []
    path = "features.denseblock1.denselayer2" + (".layers" * (name == "MONAI" and part != "")) + f".{part}" * bool(part)
    handle = converted.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    images = make_images(*IMAGES)
    with pytest.warns(UserWarning, match="layer by layer.*denselayer2"):
        result = step(converted, images)
    assert_close(result, step(original, images))
    assert seen == [path]
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(images)
    assert len(seen) == 1


@every_library
def test_a_module_replaced_after_the_conversion(backend, name):
    models = make_models(name)
    convert(models[1])
    for model in models:
        layer = model.features.denseblock1.denselayer2
        layer = layer.layers if name == "MONAI" else layer
        layer.conv2 = nn.Conv2d(12, 4, 3, padding=1, bias=True).double()
        nn.init.constant_(layer.conv2.weight, 0.1)
        nn.init.constant_(layer.conv2.bias, 0.1)
    images = make_images(*IMAGES)
    with pytest.warns(UserWarning, match=r"layer by layer.*conv2"):
        result = step(models[1], images)
    assert_close(result, step(models[0], images))


def test_torchxrayvision_resizes_images(backend):
    """As with its pretrained weights."""
    models = make_models("torchxrayvision", "eval")
    for model in models:
        model.input_resolution, model.apply_sigmoid = 40, True
    convert(models[1])
    images = make_images(3, 3, 33, 33)
    features = [model.features2(images) for model in models]
    assert_close({"": features[1]}, {"": features[0]})
    assert_close({"": models[1](images)}, {"": models[0](images)})


def test_a_lightning_module_trains(backend, tmp_path):
    """Converted after its optimizer is made, as a callback would."""
    models = make_models("Lightning module")
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    loader = torch.utils.data.DataLoader(make_images(*IMAGES), batch_size=3)
    for model in models:
        if model is models[1]:
            model.on_train_start = lambda model=model: convert(model) and None
        trainer = Trainer(accelerator="cpu", max_epochs=3, logger=False, default_root_dir=tmp_path, **options)
        trainer.fit(model, loader)
    assert len(blocks_of(models[1])) == 2
    assert_close(models[1].state_dict(), models[0].state_dict())


def test_timm_switches_the_level(backend):
    original, converted = make_models("timm")
    convert(converted, checkpointing="none")
    for enable, level in ((True, "bottleneck"), (False, "none")):
        converted.set_grad_checkpointing(enable)
        assert {block.checkpointing for block in blocks_of(converted)} == {level}
        assert converted.features.denseblock1.denselayer1.grad_checkpointing is enable
    images = make_images(*IMAGES)
    assert_close(step(converted, images), step(original, images))


def test_timm_methods(backend):
    original, converted = make_models("timm", "eval")
    convert(converted)
    images = make_images(*IMAGES)
    results = []
    for model in (original, converted):
        last, inner = model.forward_intermediates(images)
        features = model.forward_features(images)
        results.append({"last": last, "features": features, "head": model.forward_head(features), "in": inner[1]})
        model.reset_classifier(0, "")
        results[-1]["without head"] = model(images)
    assert_close(*reversed(results))


@every_library
def test_compiles_to_a_full_graph(native_backend, name):
    original, converted = make_models(name)
    convert(converted)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    images = make_images(*IMAGES)
    with torch.no_grad():
        assert_close({"": compiled(images)}, {"": original(images)})


@pytest.mark.filterwarnings("ignore:.*trac", "ignore::DeprecationWarning")
def test_a_feature_net_is_traced(backend):
    original, converted = make_models("timm features", "eval")
    convert(converted)
    images = make_images(*IMAGES)
    assert_close({"": torch.jit.trace(converted, images)(images)}, {"": original(images)})


NODES = {"features.denseblock1": "block", "features.transition1": "transition", "features.norm5": "last"}


@every_library
@every_level
def test_fx_extracts_features(backend, name, level):
    """torch.fx sees the modules: the same features, which train alike, at the original's cost."""
    original, converted = make_models(name)
    convert(converted, checkpointing=level)
    results = []
    for model in (original, converted):
        said = pytest.warns(UserWarning, match="torch.fx traces") if model is converted else contextlib.nullcontext()
        with said:
            extractor = create_feature_extractor(model, NODES)
        features = extractor(make_images(*IMAGES))
        sum(map(loss_of, features.values())).backward()
        results.append(features | state_of(extractor))
    assert_close(results[1], results[0])


@every_library
@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_fx_sees_what_it_sees_of_the_original(name):
    """And nothing more, on which those who rewrite graphs fail, as torch.ao's quantisation."""
    original, converted = make_models(name)
    convert(converted)
    graphs = [torch.fx.symbolic_trace(model).graph for model in (original, converted)]
    seen = [[(node.op, node.target) for node in graph.nodes] for graph in graphs]
    assert len(seen[0]) > 30
    assert seen[1] == seen[0]


@pytest.mark.parametrize(
    "make",
    [torchvision.models.densenet201, lambda: timm.create_model("densenet201")],
    ids=["torchvision", "timm"],
)
def test_saves_a_tenth_of_the_memory(native_backend, make):
    model = make()
    images = make_images(4, 3, 64, 64, dtype=torch.float32)
    before = saved_bytes(model, images)
    convert(model)
    assert saved_bytes(model, images) * 10 < before


def test_sources_are_converted_at_all():
    """Otherwise every comparison above would compare a model with itself."""
    for name in MODELS:
        model = make_model(name)
        report = convert(model)
        blocks = [name for name, _ in model.named_modules() if re.search(r"denseblock\d$", name)]
        assert len(blocks_of(model)) == len(blocks) >= 2, report
    assert set(LIBRARIES) < set(SOURCES)


def converted(name):
    model = make_model(name)
    convert(model)
    return model


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("make", [lambda: converted("torchvision"), lambda: make_pair()[1]], ids=["converted", "own"])
def test_features_are_laid_out_as_the_images(backend, make, trains):
    """As torch's own modules leave them: contiguous ones for `view`, as many a forward has it."""
    model = make().double().train(trains)
    images = make_images(3, 3, 70, 64)
    with torch.set_grad_enabled(trains):
        contiguous = model.features(input=images)
        other = model.features(images.contiguous(memory_format=torch.channels_last))
    assert contiguous.view(3, -1).shape[1] > contiguous.shape[1]
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert_close({"": other}, {"": contiguous})
