"""What follows the training: the evaluation, the report, and if wanted the naive implementation beside ours."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from densenet_efficient.argument_checks import levels_of
from densenet_efficient.training.checkpoint import probabilities_of, says_trained_on
from densenet_efficient.training.classifier import Classifier
from densenet_efficient.training.comparison import (
    CURVE_INPUT_SHAPE,
    PerImplementation,
    compare,
    compare_memory,
    comparison_table,
    configs_by_depth,
)
from densenet_efficient.training.data import ImageData
from densenet_efficient.training.evaluation import Evaluation, summarise
from densenet_efficient.training.pictures import draw_memory
from densenet_efficient.training.report import collect_mistakes, versions, write_report

MEMORY_PICTURE = "memory.png"
MEMORY_DEPTHS = (22, 46, 70, 100)  # of the memory picture


class CollectOutputs(Callback):
    """Keeps what `test_step` gives, in the order of the images, from all processes."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader: int = 0,
    ) -> None:
        self.logits.append(outputs["logits"].cpu())
        self.labels.append(outputs["labels"].cpu())

    def gathered(self) -> tuple[Tensor, Tensor]:
        if not self.logits:
            raise ValueError("--trainer.limit_test_batches leaves no image to evaluate; leave it out")
        mine = torch.cat(self.logits), torch.cat(self.labels)
        if not torch.distributed.is_initialized():
            return mine
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, mine)
        logits, labels = (interleaved([share[part] for share in shares]) for part in (0, 1))
        return logits, labels


def interleaved(shares: list[Tensor]) -> Tensor:
    """The inverse of giving every process each world-size-th image."""
    result = shares[0].new_empty((sum(map(len, shares)), *shares[0].shape[1:]))
    for rank, share in enumerate(shares):
        result[rank :: len(shares)] = share
    return result


def evaluate(trainer: Trainer, classifier: Classifier, data: ImageData) -> Evaluation:
    """Run the classifier over the test images; over the validation images where there are none."""
    collector = CollectOutputs()
    trainer.callbacks.append(collector)  # type: ignore[attr-defined]
    try:
        trainer.test(classifier, datamodule=data, verbose=False)
    finally:
        trainer.callbacks.remove(collector)  # type: ignore[attr-defined]
    if trainer.received_sigterm:  # in the last batch, where Lightning does not look
        raise SIGTERMException
    logits, labels = collector.gathered()
    task, splits = data.task, data.splits
    samples = data.test_samples.subset(range(len(labels)))  # all of them, unless --trainer.limit_test_batches is given
    indicators = labels if task.multi_label else torch.nn.functional.one_hot(labels, len(task.class_names))
    return Evaluation(
        task.class_names,
        task.multi_label,
        probabilities_of(logits.double(), task.multi_label).numpy(),
        indicators.double().numpy(),
        list(samples.sources),
        "validation" if splits.test is None else "test",
        splits.test is None or splits.test is splits.validation,
        classifier.trained_on.count(samples.sources, data.root),
        samples.groups,
    )


def report_run(
    trainer: Trainer,
    classifier: Classifier,
    data: ImageData,
    output: Path,
    *,
    history: list[dict[str, float]],
    config: str,
    comparison: bool = False,
) -> None:
    """Evaluate the classifier as it is and write the report into `output`; print the main figures."""
    evaluation = evaluate(trainer, classifier, data)
    if not trainer.is_global_zero:
        return
    console = Console()
    summary = summarise(evaluation)
    console.print(_summary_table(summary))
    if evaluation.trained_on:
        print(says_trained_on(evaluation.trained_on, summary["images"], evaluation.split), file=sys.stderr)
    metrics: dict[str, Any] = {"network": classifier.network, "config": classifier.model.config, "history": history}
    metrics |= {"evaluation": summary, "versions": versions()}
    written = []
    if comparison:
        metrics |= _compare(classifier, data, output, console)
        written.append(MEMORY_PICTURE)
    written += write_report(output, evaluation, metrics, collect_mistakes(classifier, data, evaluation), config)
    console.print(f"Wrote {', '.join(written)} into {output}")


def _compare(classifier: Classifier, data: ImageData, output: Path, console: Console) -> dict[str, Any]:
    """The naive implementation beside the efficient one: a table, and a picture of memory against depth."""
    device = str(next(classifier.model.parameters()).device)
    with console.status("Measuring naive and efficient"):
        result = compare(
            classifier.model, data.preprocessing.input_shape, data.val_dataloader(), data.batch_size, device
        )
    memory: dict[int, PerImplementation] = {}
    level = levels_of(classifier.model.checkpointing, len(classifier.model.config["block_config"]))[0]
    configs = configs_by_depth(MEMORY_DEPTHS, level)
    for depth, config in track(configs.items(), "Measuring memory against depth", console=console, transient=True):
        memory[depth] = compare_memory(config, CURVE_INPUT_SHAPE, device)
    draw_memory(memory, level, output / MEMORY_PICTURE)
    console.print(comparison_table(result))
    return {"comparison": asdict(result), "mib_per_image_at_depth": memory}


def _summary_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['images']} images of the {summary['split']} split")
    for column in ("", "value", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        if name in summary:
            entry = summary[name]
            bounds = "" if entry["low"] is None else f"{entry['low']:.2%} to {entry['high']:.2%}"
            all_labels = name == "accuracy" and summary["multi_label"]
            table.add_row("all labels right" if all_labels else name.replace("_", " "), f"{entry['value']:.2%}", bounds)
    if summary["macro_auroc"] is not None:
        table.add_row("mean area under the ROC curve", f"{summary['macro_auroc']:.4f}", "")
    return table
