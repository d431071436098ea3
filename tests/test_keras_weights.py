"""Weights of keras.applications' DenseNets: outputs as Keras computes them, from every format of its files."""

import copy
import os

os.environ["KERAS_BACKEND"] = "torch"  # before it is imported

import h5py
import keras
import numpy as np
import pytest
import torch
from cases import assert_close, make_images

from densenet_efficient import EfficientDenseNet121, load_weights
from densenet_efficient.models import create_model
from densenet_efficient.weights.keras_files import EPSILON

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras, a thousand times
]
SIZE = (45, 39)  # at which an error in padding or pooling shows
CLASSES = 7
KERAS_CALL = keras.layers.BatchNormalization.call


def normalise(norm, inputs, training=None, mask=None):
    """Keras's batch norm without its cast to float32, which it makes even where everything is float64."""
    statistics = norm.moving_mean, norm.moving_variance
    return keras.ops.batch_normalization(inputs, *statistics, norm.axis, norm.beta, norm.gamma, norm.epsilon)


@pytest.fixture(scope="module", autouse=True)
def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.layers.BatchNormalization, "call", normalise)
        yield patch
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def make_keras(application):
    """Keras's network with random weights and statistics."""
    keras.utils.set_random_seed(0)
    model = application(weights=None, classes=CLASSES, input_shape=(*SIZE, 3))
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean = generator.normal(size=(3, layer.gamma.shape[0]))
            layer.set_weights([gamma + 0.5, beta * 0.3, mean, generator.uniform(0.2, 3.2, mean.shape)])
    return model


@pytest.fixture(scope="module")
def keras121(float64):
    return make_keras(keras.applications.DenseNet121)


def save_as_keras2(model, path):
    """As the files that keras.applications downloads: names with slashes and ":0", listed in attributes in pieces."""
    with h5py.File(path, "w") as file:
        layers = [(layer.name.replace("_conv", "/conv").replace("_bn", "/bn"), layer.weights) for layer in model.layers]
        for index, start in enumerate(range(0, len(layers), 30)):
            file.attrs[f"layer_names{index}"] = [name.encode() for name, _ in layers[start : start + 30]]
        for name, weights in layers:
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{weight.name}:0".encode() for weight in weights]
            for weight in weights:
                group[f"{name}/{weight.name}:0"] = weight.numpy()


SAVES = {
    "model.keras": lambda model, path: model.save(path),
    "model.h5": lambda model, path: model.save(path),
    "model.weights.h5": lambda model, path: model.save_weights(path),
    "densenet121_weights_tf_dim_ordering_tf_kernels.h5": save_as_keras2,
}


def run_keras(model, images):
    return model(images.permute(0, 2, 3, 1).numpy(), training=False).detach()


def without_top(model):
    return keras.Model(model.input, model.get_layer("relu").output)


def assert_features_of_keras(model, original):
    images = make_images(2, 3, *SIZE)
    expected = run_keras(without_top(original), images).permute(0, 3, 1, 2)
    assert_close({"": model.eval().features(images).relu()}, {"": expected})


def assert_outputs_of_keras(model, original, activation=lambda logits: logits.softmax(1), tolerance=1e-6):
    """Keras pools in float32, even where everything is float64."""
    images = make_images(2, 3, *SIZE)
    assert_close({"": activation(model.eval()(images))}, {"": run_keras(original, images)}, tolerance)


@pytest.mark.parametrize(("name", "save"), SAVES.items(), ids=SAVES)
def test_every_format(keras121, tmp_path, name, save):
    save(keras121, tmp_path / name)
    model = EfficientDenseNet121(num_classes=CLASSES).double()
    assert load_weights(model, tmp_path / name) == []
    assert_features_of_keras(model, keras121)
    assert_outputs_of_keras(model, keras121)
    assert {norm.eps for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d)} == {EPSILON}


def test_keras_as_it_is(float64, keras121, tmp_path):
    keras121.save_weights(tmp_path / "model.weights.h5")
    model = EfficientDenseNet121.from_pretrained(tmp_path / "model.weights.h5", num_classes=CLASSES)
    with float64.context() as patch:
        patch.setattr(keras.layers.BatchNormalization, "call", KERAS_CALL)
        assert_outputs_of_keras(model.double(), keras121, tolerance=1e-5)


@pytest.mark.parametrize("number", [169, 201])
def test_the_deeper_networks(tmp_path, number):
    original = make_keras(getattr(keras.applications, f"DenseNet{number}"))
    path = tmp_path / "model.weights.h5"
    original.save_weights(path)
    model = create_model(f"densenet{number}", num_classes=CLASSES).double()
    assert load_weights(model, path) == []
    assert_features_of_keras(model, original)
    assert_outputs_of_keras(model, original)


def test_without_the_top(keras121, tmp_path):
    path = tmp_path / "notop.weights.h5"
    without_top(keras121).save_weights(path)
    model = EfficientDenseNet121(num_classes=3).double()
    classifier = copy.deepcopy(model.classifier.state_dict())
    notes = load_weights(model, path)
    assert notes == ["no classifier was loaded: the weights have none, the model keeps its own of 3"]
    assert_close(model.classifier.state_dict(), classifier, 0)
    assert_features_of_keras(model, keras121)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_model_built_on_one(keras121, tmp_path, suffix):
    layers = [without_top(keras121), keras.layers.GlobalAveragePooling2D(), keras.layers.Dropout(0.2, seed=1)]
    original = keras.Sequential([keras.Input((*SIZE, 3)), *layers, keras.layers.Dense(3)])
    path = tmp_path / f"model{suffix}"
    original.save(path)
    model = EfficientDenseNet121(num_classes=3).double()
    assert load_weights(model, path) == []
    assert_outputs_of_keras(model, original, activation=lambda logits: logits)


def test_another_number_of_classes_and_channels(keras121, tmp_path):
    path = tmp_path / "model.weights.h5"
    keras121.save_weights(path)
    assert load_weights(EfficientDenseNet121(num_classes=3, in_channels=1), path) == [
        "the classifier of 7 classes was not loaded: the model has 3",
        "features.conv0.weight was adapted from 3 input channels to 1",
    ]


def test_from_pretrained_and_the_epsilon_that_stays(keras121, tmp_path):
    keras121.save_weights(tmp_path / "model.weights.h5")
    model = EfficientDenseNet121.from_pretrained(tmp_path / "model.weights.h5", num_classes=CLASSES)
    model.save_pretrained(tmp_path / "saved")
    again = EfficientDenseNet121.from_pretrained(tmp_path / "saved")
    assert again.features.norm5.eps == again.features.norm0.eps == EPSILON
    assert_close(again.state_dict(), model.state_dict(), 0)


def assert_refused(model, path, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_weights(model, path)
    assert_close(model.state_dict(), before, 0)
    assert model.features.norm5.eps == 1e-5


def test_another_network(keras121, tmp_path):
    path = tmp_path / "model.weights.h5"
    keras121.save_weights(path)
    assert_refused(
        create_model("densenet169", num_classes=CLASSES),
        path,
        "a network with 120 Conv2d, conv1_conv to conv5_block16_2_conv; this EfficientDenseNet169 has 168$",
    )
    with h5py.File(tmp_path / "dense.weights.h5", "w") as file:
        file["layers/dense/vars/0"], file["layers/dense/vars/1"] = np.zeros((4, 2)), np.zeros(2)
    assert_refused(EfficientDenseNet121(), tmp_path / "dense.weights.h5", "with 0 Conv2d, none; .* has 120$")


def test_every_layer_that_does_not_fit_is_named(keras121, tmp_path):
    path = tmp_path / "model.weights.h5"
    keras121.save_weights(path)
    with h5py.File(path, "a") as file:
        file["layers/normalization/vars/0"] = np.zeros(3)
        bias = np.array(file["layers/batch_normalization/vars/1"])
        del file["layers/batch_normalization/vars/1"]
        file["layers/batch_normalization/vars/1"] = np.concatenate([bias, bias])
    assert_refused(
        EfficientDenseNet121(num_classes=CLASSES),
        path,
        r"121: unknown layers/normalization of Keras; features\.norm0\.bias of shape \[128\] instead of \[64\]$",
    )


def test_norms_of_different_epsilons(tmp_path):
    layers = [keras.layers.BatchNormalization(epsilon=epsilon) for epsilon in (1e-3, 1e-5)]
    keras.Sequential([keras.Input((4, 4, 3)), *layers]).save(tmp_path / "model.keras")
    assert_refused(EfficientDenseNet121(), tmp_path / "model.keras", r"model\.keras .*epsilons, \[1e-05, 0\.001\]")


def test_bfloat16(tmp_path):
    """Stored as bytes without a type."""
    network = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(2, 3, dtype="bfloat16", use_bias=False)])
    network.save_weights(tmp_path / "model.weights.h5")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3, bias=False))
    assert load_weights(model, tmp_path / "model.weights.h5") == []
    expected = torch.from_numpy(network.get_weights()[0].astype("float32")).permute(3, 2, 0, 1)
    assert_close(model.state_dict(), {"0.weight": expected}, 0)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_files_of_another_format(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"neither a zip archive nor HDF5")
    assert_refused(EfficientDenseNet121(), path, f"cannot read .*model{suffix} as a file of Keras")
    with pytest.raises(FileNotFoundError):
        load_weights(EfficientDenseNet121(), tmp_path / f"missing{suffix}")


def test_a_file_without_layers(tmp_path):
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        file.create_group("layers")
    assert_refused(EfficientDenseNet121(), tmp_path / "model.weights.h5", "it holds no layers with weights$")


@pytest.mark.parametrize("link", ["external link", "external data", "virtual"])
def test_nothing_is_read_from_other_files(tmp_path, link):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["layers/conv2d/vars/0"] = np.zeros((1, 1, 1, 1))
    (tmp_path / "secret").write_bytes(bytes(8))
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("layers/conv2d/vars")
        if link == "external link":
            group["0"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "layers/conv2d/vars/0")
        elif link == "external data":
            group.create_dataset("0", (1, 1, 1, 1), "f8", external=[(str(tmp_path / "secret"), 0, 8)])
        else:
            layout = h5py.VirtualLayout((1, 1, 1, 1), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "layers/conv2d/vars/0", (1, 1, 1, 1))
            group.create_virtual_dataset("0", layout)
    assert_refused(EfficientDenseNet121(), path, "stands in another file, which is not opened")
