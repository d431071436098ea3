"""The Lightning module: loss, schedules, parameter groups, frozen parts, averages, and what a checkpoint holds."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torchmetrics.functional.classification import binary_auroc
from training_cases import fails, fit, fit_arguments, make_images, weights

from densenet_efficient.training.auroc import MeanAUROC
from densenet_efficient.training.averaging import AveragedWeights
from densenet_efficient.training.checkpoint import load_classifier, read_checkpoint
from densenet_efficient.training.classifier import Classifier
from densenet_efficient.training.data import FolderData, Task
from densenet_efficient.training.finish import interleaved
from densenet_efficient.training.parameter_groups import parameter_groups
from densenet_efficient.training.preprocessing import Preprocessing
from densenet_efficient.training.schedules import rate_factor

PREPROCESSING = Preprocessing(3, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), value_range=(0.0, 4095.0))
TWO = Task(["bright", "dark"], False, PREPROCESSING)


def classifier(task: Task = TWO, **options: Any) -> Classifier:
    return Classifier(task, network="densenet-bc-40-12", **options)


def folder(tmp_path: Path) -> FolderData:
    return FolderData(make_images(tmp_path / "images"), image_size=8, batch_size=4, num_workers=0)


def train(module: Classifier, data: FolderData, *callbacks: Callback, epochs: int = 1, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **quiet,
        **options,
    )
    trainer.fit(module, datamodule=data)
    return trainer


# ---- loss and schedule ----


def test_losses() -> None:
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    weighted = torch.tensor([0.5, 2.0])
    module = classifier()
    expected = F.cross_entropy(logits, labels, weighted, label_smoothing=0.1)
    torch.testing.assert_close(module.loss(logits, labels, 0.1, weighted), expected)
    several = classifier(Task(["a", "b"], True, PREPROCESSING))
    targets = torch.tensor([[0.0, 1.0]] * 5)
    expected = F.binary_cross_entropy_with_logits(logits, targets * 0.8 + 0.1, pos_weight=weighted)
    torch.testing.assert_close(several.loss(logits, targets, 0.2, weighted), expected)


@pytest.mark.parametrize(("multi_label", "labels"), [(False, [0, 1, 1]), (True, [[0, 1], [1, 1], [1, 0]])])
def test_losses_of_a_validation_are_plain(multi_label: bool, labels: list[Any]) -> None:
    """They tell trainings of other weights and smoothing apart."""
    task = Task(["a", "b"], multi_label, PREPROCESSING, class_weights=torch.tensor([0.5, 2.0]))
    module, logged = classifier(task, label_smoothing=0.2).eval(), {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[assignment]
    module.log_dict = lambda *_, **__: None  # type: ignore[assignment]
    images, targets = torch.rand(3, 3, 8, 8), torch.tensor(labels)
    targets = targets.float() if multi_label else targets
    module.validation_step((images, targets), 0)
    plain = F.binary_cross_entropy_with_logits if multi_label else F.cross_entropy
    torch.testing.assert_close(logged["val_loss"], plain(module(images), targets))


def test_each_process_and_step_draws_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seeds = classifier(), []
    for rank, step in ((0, 0), (1, 0), (0, 1), (0, 0)):
        loop = SimpleNamespace(total_batch_idx=step)
        monkeypatch.setattr(Classifier, "trainer", SimpleNamespace(fit_loop=loop))
        monkeypatch.setattr(Classifier, "global_rank", rank)
        module.on_train_batch_start((torch.empty(0), torch.empty(0)), 0)
        seeds.append(torch.initial_seed())
    assert len(set(seeds[:3])) == 3 and seeds[3] == seeds[0]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.0, False)])
def test_sgd_has_nesterov_momentum(momentum: float, nesterov: bool, tmp_path: Path) -> None:
    trainer = train(classifier(optimizer="sgd", momentum=momentum), folder(tmp_path))
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["nesterov"] == nesterov


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"precision": "bf16-mixed"}, True),
        ({"precision": "bf16-mixed", "gradient_clip_val": 1.0}, False),
        ({"plugins": [MixedPrecision("16-mixed", "cpu")], "gradient_clip_val": 1.0}, False),
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, False),
    ],
)
def test_weights_are_updated_in_one_pass_unless_gradients_are_clipped_or_scaled(
    optimizer: str, options: dict[str, Any], fused: bool, tmp_path: Path
) -> None:
    module = classifier(optimizer=optimizer)
    before = [parameter.clone() for parameter in module.parameters()]
    trainer = train(module, folder(tmp_path), **options)
    assert {group["fused"] for group in trainer.optimizers[0].param_groups} == {fused}
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert any(not torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))


def test_schedules() -> None:
    assert [rate_factor("steps", progress, 0) for progress in (0, 0.49, 0.5, 0.74)] == [1, 1, 0.1, 0.1]
    assert rate_factor("steps", 0.75, 0) == pytest.approx(0.01)
    assert [rate_factor("cosine", progress, 0.2) for progress in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx(
        [0.04, 0.52, 1, 0.5, 0]
    )
    assert rate_factor("constant", 0.9, 0) == 1
    assert rate_factor("cosine", 1, 1) == 1  # a run that is warmed up to its end


def test_discriminative_learning_rates_cover_every_parameter_once() -> None:
    model = classifier().model
    groups = parameter_groups(model, 0.1, 0.5, decay_norms=False)
    assert {group["name"].partition(",")[0]: group["lr"] for group in groups} == {
        "stage 0": pytest.approx(0.00625),
        "stage 1": pytest.approx(0.0125),
        "stage 2": pytest.approx(0.025),
        "stage 3": pytest.approx(0.05),
        "head": pytest.approx(0.1),
    }
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    parts = {parameter: name.removeprefix("features.") for name, parameter in model.named_parameters()}
    stages = {parts[key].partition(".")[0]: group["name"][:7] for group in groups for key in group["params"]}
    assert [stages[f"denseblock{number}"] for number in (1, 2, 3)] == ["stage 1", "stage 2", "stage 3"]
    followers = [stages[name] for name in ("conv0", "transition1", "transition2", "norm5")]
    assert followers == ["stage 0", "stage 1", "stage 2", "stage 3"]
    undecayed = {parameter for group in groups if "weight_decay" in group for parameter in group["params"]}
    assert undecayed == {parameter for parameter in model.parameters() if parameter.dim() == 1}


# ---- frozen parts ----


def test_a_stage_without_norms_has_no_group_of_them() -> None:
    groups = parameter_groups(classifier().model, 1.0, 1.0, decay_norms=False)
    assert [group["name"] for group in groups][:2] == ["stage 0", "stage 1"]


class Watch(Callback):
    """Remembers the weights, and the head's weight decay, at the end of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.decays: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})
        groups = trainer.optimizers[0].param_groups
        self.decays.append(next(group["weight_decay"] for group in groups if group["name"] == "head"))


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_head_alone_then_everything(tmp_path: Path) -> None:
    module, watch = classifier(head_epochs=1, head_learning_rate=0.01, learning_rate=1e-3), Watch()
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    train(module, folder(tmp_path), watch, epochs=2)
    assert changed(start, watch.states[0]) == {"classifier.weight", "classifier.bias"}
    assert changed(watch.states[0], watch.states[1]) == set(start)
    assert watch.decays == [0, 0.05]  # Adam, then AdamW


@pytest.mark.parametrize(
    ("limits", "head_batches"),
    [
        ({"epochs": 4}, 4),
        ({"epochs": 30, "max_steps": 6}, 4),
        ({"epochs": -1, "max_steps": 6}, 4),
        ({"epochs": 30, "max_steps": 3, "accumulate_grad_batches": 2}, 4),
        ({"epochs": 30, "max_steps": 3}, 3),
    ],
)
def test_the_head_alone_has_its_rate_in_just_its_epochs(
    limits: dict[str, int], head_batches: int, tmp_path: Path
) -> None:
    """Two of two batches each, however the run is limited."""

    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, bool]] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
            self.seen.append((rates["head"], rates["stage 0"] > 0))

    rates = Rates()
    train(classifier(head_epochs=2, head_learning_rate=0.01, warmup=0.5), folder(tmp_path), rates, **limits)
    assert len(rates.seen) >= head_batches
    assert [seen == (0.01, False) for seen in rates.seen] == [
        number < head_batches for number in range(len(rates.seen))
    ]


def test_a_run_without_an_end_needs_a_schedule_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "images")
    endless = ("--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01")
    error = fails(fit_arguments(images, tmp_path / "run", *endless), capsys)
    assert (
        "--trainer.max_epochs: --model.schedule cosine with --model.warmup 0.05 must know the end of the run" in error
    )
    assert "give --trainer.max_epochs or --trainer.max_steps" in error
    assert not list((tmp_path / "run").glob("*.ckpt"))
    assert fit(images, tmp_path / "run", *endless, "--model.schedule", "constant", "--model.warmup", "0") == 0


def test_a_training_of_the_head_alone_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "images")
    for epochs in (1, 2):
        told = f"--model.head_epochs 1 of --trainer.max_epochs {epochs}: the classifier alone is trained"
        options = ("--model.head_epochs", "1", "--trainer.max_epochs", str(epochs))
        assert fit(images, tmp_path / f"run {epochs}", *options) == 0
        assert (told in capsys.readouterr().err) is (epochs == 1)


def test_frozen_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    module = classifier(frozen_batch_norm=True)
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    train(module, folder(tmp_path), epochs=2)
    kept = set(start) - changed(start, module.model.state_dict())
    assert kept == {name for name in start if "running" in name or "batches_tracked" in name}


def test_averaged_weights_are_what_is_validated(tmp_path: Path) -> None:
    """They are exchanged behind autograd's back, and an efficient DenseNet packs its weights for inference."""

    class Check(Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
            fresh = classifier()
            fresh.model.load_state_dict(module.model.state_dict())
            assert torch.equal(fresh.model.eval()(batch[0]), module.model(batch[0]))

    module = classifier(learning_rate=0.01)
    train(module, folder(tmp_path), AveragedWeights(decay=0.5), Check(), epochs=3)


@pytest.mark.parametrize("options", [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 0.3, "cutmix": 1.0}])
def test_mixed_images_of_one_and_of_several_labels(options: dict[str, float]) -> None:
    for multi_label in (False, True):
        module = classifier(Task(["a", "b"], multi_label, PREPROCESSING), **options)
        labels = torch.eye(2).repeat(2, 1) if multi_label else torch.tensor([0, 1, 0, 1])
        assert module.mix is not None
        images, targets = module.mix(torch.rand(4, 3, 8, 8), labels)
        assert images.shape == (4, 3, 8, 8) and targets.shape == (4, 2)
        assert torch.isfinite(module.loss(module(images), targets))


def test_processes_share_the_images_among_them(tmp_path: Path) -> None:
    data = folder(tmp_path)
    whole = torch.cat([labels for _, labels in data.evaluation_loader(data.splits.train)])
    shares = []
    for rank in range(3):
        data._process = lambda rank=rank: (rank, 3)  # type: ignore[method-assign, misc]
        shares.append(torch.cat([labels for _, labels in data.evaluation_loader(data.splits.train)]))
    assert torch.equal(interleaved(shares), whole)


def test_a_loss_of_nan_stops_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "images")
    assert fit(images, tmp_path / "run", "--model.learning_rate", "1e38") == 2
    assert "the training loss became nan; lower --model.learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision_early_stopping_and_sgd(precision: str, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    options = ("--trainer.precision", precision, "--patience", "1", "--monitor", "val_accuracy")
    options += ("--model.optimizer", "sgd", "--model.schedule", "steps", "--trainer.max_epochs", "6")
    assert fit(images, tmp_path / "run", *options, "--model.learning_rate", "1e-6") == 0
    records = read_checkpoint(tmp_path / "run" / "last.ckpt")["callbacks"]["History"]["records"]
    assert len(records) < 6


# ---- checkpoints ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one epoch on bright and dark images."""
    folder = tmp_path_factory.mktemp("run")
    assert fit(make_images(folder / "images"), folder / "output", "--trainer.max_epochs", "1") == 0
    return folder / "output"


def test_a_checkpoint_is_a_whole_classifier(run: Path) -> None:
    saved = load_classifier(run / "best.ckpt")
    assert (saved.class_names, saved.multi_label) == (["bright", "dark"], False)
    assert saved.preprocessing.input_shape == (3, 8, 8)
    assert Preprocessing.from_dict(PREPROCESSING.as_dict()) == PREPROCESSING
    images = torch.randn(2, 3, 8, 8)
    module = classifier()
    module.load_state_dict(weights(run, "best.ckpt"))
    assert torch.equal(saved.model.eval()(images), module.eval()(images))


def test_training_starts_from_the_weights_of_a_checkpoint_of_other_classes(run: Path, tmp_path: Path) -> None:
    task = Task(["a", "b", "c"], False, PREPROCESSING)
    module = classifier(task, weights=str(run / "best.ckpt"))
    saved = load_classifier(run / "best.ckpt").model.state_dict()
    assert changed(saved, module.model.state_dict()) == {"classifier.weight", "classifier.bias"}


def test_a_checkpoint_of_other_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "images", names=("bright", "grey"))
    assert fit(images, tmp_path / "other", "--ckpt_path", str(run / "last.ckpt")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{run / 'last.ckpt'}: a checkpoint of another class list than the data" in error
    assert "only in the checkpoint: dark; only in the data: grey" in error
    assert (run / "last.ckpt").exists() and not list((tmp_path / "other").glob("*.*"))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_checkpoint(kept: float, run: Path, tmp_path: Path) -> None:
    content = (run / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RuntimeError, match="truncated"):
        load_classifier(tmp_path / "cut.ckpt")


def test_checkpoint_damaged_inside(run: Path, tmp_path: Path) -> None:
    content = (run / "best.ckpt").read_bytes()
    (tmp_path / "bad.ckpt").write_bytes(content.replace(b"state_dict", b"\xff" * 10))
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match="written by densenet-efficient fit"):
        load_classifier(tmp_path / "bad.ckpt")


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(run: Path, tmp_path: Path) -> None:
    content, whole = (run / "best.ckpt").read_bytes(), read_checkpoint(run / "best.ckpt")["state_dict"]
    refused = 0
    for position in range(7, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[position] ^= 16
        (tmp_path / "bad.ckpt").write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path / "bad.ckpt")["state_dict"]
        except RuntimeError:
            refused += 1
        else:  # a byte between the parts of the archive
            assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert refused > 30


def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "was_here"),)

    torch.save({"state_dict": Malicious()}, tmp_path / "archive.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(pickle.UnpicklingError, match="more than tensors and plain values"):
        load_classifier(tmp_path / "archive.ckpt")
    with pytest.raises(RuntimeError, match="not a checkpoint at all"):
        load_classifier(tmp_path / "bare.ckpt")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("densenet_efficient"), "not a checkpoint of densenet-efficient"),
        (lambda content: content["densenet_efficient"]["config"].update(growth_rate=5), "another architecture"),
        (lambda content: content["densenet_efficient"].pop("class_names"), "class_names"),
        (lambda content: content.pop("state_dict"), "state_dict"),
    ],
)
def test_checkpoints_that_lack_something(change: Any, message: str, run: Path, tmp_path: Path) -> None:
    content = read_checkpoint(run / "best.ckpt")
    change(content)
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(RuntimeError, match=message):
        load_classifier(tmp_path / "changed.ckpt")


def test_checkpoint_of_another_program(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.ckpt")
    with pytest.raises(RuntimeError, match="not a checkpoint of densenet-efficient"):
        load_classifier(tmp_path / "linear.ckpt")


def test_the_area_under_the_curve_is_of_labels_with_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 4, generator=generator)
    labels = (torch.rand(40, 4, generator=generator) < 0.5).long()
    labels[:, 1], labels[:, 3] = 1, 0
    metric = MeanAUROC(4)
    for part in range(0, 40, 10):
        metric.update(scores[part : part + 10], labels[part : part + 10])
    area = sum(binary_auroc(scores[:, label], labels[:, label]) for label in (0, 2)) / 2
    torch.testing.assert_close(metric.compute(), area)
    metric.reset()
    metric.update(scores[:, [1, 3]].repeat(1, 2), labels[:, [1, 3]].repeat(1, 2))
    assert metric.compute().isnan()
