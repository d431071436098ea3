"""What is made of the test images after a training: whose figures they are, and who reports them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from densenet_efficient.training import finish
from densenet_efficient.training.checkpoint import TrainingImages, marks_of
from densenet_efficient.training.evaluation import Evaluation
from densenet_efficient.training.finish import evaluate, report_run
from densenet_efficient.training.samples import Samples, Splits

CLASSIFIER: Any = SimpleNamespace(trained_on=TrainingImages())
LABELS = torch.tensor([0, 1, 1])
LOGITS = torch.zeros(3, 2)


class OneBatch(SimpleNamespace):
    """A trainer that tests with one batch, of these logits and labels."""

    def test(self, classifier: Any, **_: Any) -> None:
        for callback in self.callbacks:
            callback.on_test_batch_end(self, classifier, {"logits": self.logits, "labels": self.labels}, None, 0)


def samples(labels: Tensor) -> Samples:
    names = [f"{number}.png" for number in range(len(labels))]
    return Samples(names, labels, groups=[f"patient of {name}" for name in names])


def evaluated(splits: Splits, logits: Tensor, labels: Tensor) -> Evaluation:
    trainer: Any = OneBatch(callbacks=[], logits=logits, labels=labels, received_sigterm=False)
    task = SimpleNamespace(class_names=splits.class_names, multi_label=labels.dim() == 2)
    tested = splits.validation if splits.test is None else splits.test
    data: Any = SimpleNamespace(task=task, splits=splits, test_samples=tested, root=Path())
    found = evaluate(trainer, CLASSIFIER, data)
    assert not trainer.callbacks  # so that another evaluation begins with none of these
    return found


def of(labels: Tensor, test: Samples | None = None) -> Splits:
    return Splits(["a", "b"], samples(labels), samples(labels), test)


def test_images_that_chose_the_epoch_are_told_from_others() -> None:
    validated, tested = of(LABELS), of(LABELS, samples(LABELS))
    both = Splits(["a", "b"], validated.train, validated.validation, validated.validation)
    found = [evaluated(splits, LOGITS, LABELS) for splits in (validated, tested, both)]
    assert [one.split for one in found] == ["validation", "test", "test"]
    assert [one.chose_epoch for one in found] == [True, False, True]


def test_some_batches_are_of_the_first_images() -> None:
    found = evaluated(of(LABELS), LOGITS[:2], LABELS[:2])
    assert found.sources == ["0.png", "1.png"]
    assert found.groups == ["patient of 0.png", "patient of 1.png"]


def test_several_labels_are_taken_as_they_are() -> None:
    labels = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    found = evaluated(of(labels), LOGITS, labels)
    assert found.labels.tolist() == labels.tolist()
    assert np.unique(found.probabilities) == [0.5]


def test_confident_predictions_keep_their_order() -> None:
    """In float32 all three would be certain."""
    logits = torch.tensor([[0.0, 20.0], [0.0, 25.0], [0.0, 30.0]])
    first, second, third = evaluated(of(LABELS), logits, LABELS).probabilities[:, 1]
    assert first < second < third < 1


def test_one_process_alone_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "evaluate", lambda *_: None)
    other: Any = SimpleNamespace(is_global_zero=False)
    report_run(other, CLASSIFIER, other, tmp_path, history=[], config="")
    assert not list(tmp_path.iterdir())


def test_one_process_alone_says_that_a_model_knows_its_images(capsys: pytest.CaptureFixture[str]) -> None:
    data = SimpleNamespace(splits=of(LABELS), root=Path())
    known = TrainingImages(marks_of(data.splits.train.sources, data.root))
    for is_global_zero in (False, True):
        known.warn(SimpleNamespace(datamodule=data, is_global_zero=is_global_zero))
    said = capsys.readouterr().err
    assert said.startswith("the model was trained on 3 of the 3 images of the validation split, so its figures flatter")
    assert said.endswith("(files are told by their path in the data and their size)\n")
    assert said.count("\n") == 1


def test_what_was_trained_on_is_unknown_with_any_other_data_or_after_an_unknown_part() -> None:
    data = SimpleNamespace(splits=of(LABELS), root=Path())
    none = torch.empty(0, dtype=torch.int64)
    for marks, module in ((none, None), (None, data)):
        images = TrainingImages(marks)
        images.begin(SimpleNamespace(datamodule=module))
        assert images.count(data.splits.train.sources, data.root) is None


def test_what_is_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finish, "evaluate", lambda *_: evaluated(of(LABELS), LOGITS, LABELS))
    monkeypatch.setattr(finish, "_compare", lambda *_: {})
    monkeypatch.setattr(finish, "collect_mistakes", lambda *_: [])
    monkeypatch.setattr(finish, "write_report", lambda *_: ["report.html"])
    trainer: Any = SimpleNamespace(is_global_zero=True)
    classifier: Any = SimpleNamespace(network="densenet121", model=SimpleNamespace(config={}))
    report_run(trainer, classifier, trainer, tmp_path, history=[], config="", comparison=True)
    assert "Wrote memory.png, report.html into" in " ".join(capsys.readouterr().out.split())
