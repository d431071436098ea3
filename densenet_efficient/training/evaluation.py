"""How good a classifier is on labelled images, with bootstrap confidence intervals.

A bootstrap sample gives each image a weight, the number of times it was drawn. Every figure here is a function of such
weights, so that it is computed for many samples at once; with weights of one it is the figure itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES, CHUNK = 1000, 100
CONFIDENCE = 0.95
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """The probabilities that a classifier gave to N images of K classes, and what was right."""

    class_names: list[str]
    multi_label: bool
    probabilities: Array  # [N, K]
    labels: Array  # [N, K], zeros and ones
    sources: Sequence[Any]  # N paths, or images as arrays
    split: str  # which images these are
    chose_epoch: bool = False  # whether the best epoch was chosen by them

    @property
    def decisions(self) -> Array:
        """[N, K] of zeros and ones: the most probable class, or those of at least a half."""
        if self.multi_label:
            return (self.probabilities >= 0.5).astype(float)
        return np.eye(len(self.class_names))[self.probabilities.argmax(1)]


def summarise(evaluation: Evaluation, seed: int = 0) -> dict[str, Any]:
    """All figures, each as its value and the bounds of its 95 % interval; None where it is not defined."""
    functions: dict[str, Callable[[Array], Array]] = {
        "accuracy": lambda weights: accuracy(evaluation, weights),
        "macro_f1": lambda weights: f1_scores(evaluation, weights).mean(1),
    }
    if not evaluation.multi_label:
        functions["balanced_accuracy"] = lambda weights: np.nanmean(recalls(evaluation, weights), 1)
    per_class = {"recall": recalls, "precision": precisions, "f1": f1_scores, "auroc": aurocs}
    for name, function in per_class.items():
        functions[name] = lambda weights, function=function: function(evaluation, weights)  # type: ignore[misc]
    intervals = with_intervals(functions, len(evaluation.labels), seed)
    classes = {
        class_name: {"images": int(evaluation.labels[:, index].sum())}
        | {name: intervals[name][index] for name in per_class}
        for index, class_name in enumerate(evaluation.class_names)
    }
    areas = [entry["value"] for entry in intervals["auroc"] if entry["value"] is not None]
    overall = {name: entries[0] for name, entries in intervals.items() if name not in per_class}
    return {
        "split": evaluation.split,
        "chose_epoch": evaluation.chose_epoch,
        "images": len(evaluation.labels),
        **overall,
        "macro_auroc": float(np.mean(areas)) if areas else None,
        "expected_calibration_error": calibration(evaluation)[1],
        "classes": classes,
        "confusion": None if evaluation.multi_label else confusion(evaluation).tolist(),
    }


def with_intervals(
    functions: dict[str, Callable[[Array], Array]], count: int, seed: int
) -> dict[str, list[dict[str, float | None]]]:
    """For each function of weights [B, N] that gives [B] or [B, K]: value, low and high, one entry per column."""
    values = {name: np.atleast_2d(function(np.ones((1, count))).reshape(1, -1)) for name, function in functions.items()}
    drawn: dict[str, list[Array]] = {name: [] for name in functions}
    for weights in _bootstrap_weights(count, seed):
        for name, function in functions.items():
            drawn[name].append(function(weights).reshape(len(weights), -1))
    result = {}
    for name in functions:
        samples = np.concatenate(drawn[name])
        result[name] = [_interval(values[name][0, column], samples[:, column]) for column in range(samples.shape[1])]
    return result


def _bootstrap_weights(count: int, seed: int) -> Iterator[Array]:
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES // CHUNK):
        yield generator.multinomial(count, np.full(count, 1 / count), CHUNK).astype(float)


def _interval(value: float, samples: Array) -> dict[str, float | None]:
    defined = samples[~np.isnan(samples)]
    if np.isnan(value) or not len(defined):
        return {"value": None, "low": None, "high": None}
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


# ---- figures: of weights [B, N], one row per bootstrap sample ----


def accuracy(evaluation: Evaluation, weights: Array) -> Array:
    """[B]. Of several labels per image: how often all are right."""
    correct = (evaluation.decisions == evaluation.labels).all(1)
    return weights @ correct.astype(float) / weights.sum(1)


def recalls(evaluation: Evaluation, weights: Array) -> Array:
    """[B, K], NaN for a class without images."""
    return _divide(weights @ (evaluation.decisions * evaluation.labels), weights @ evaluation.labels)


def precisions(evaluation: Evaluation, weights: Array) -> Array:
    """[B, K], 0 for a class that was never predicted."""
    predicted = weights @ evaluation.decisions
    return np.nan_to_num(_divide(weights @ (evaluation.decisions * evaluation.labels), predicted))


def f1_scores(evaluation: Evaluation, weights: Array) -> Array:
    """[B, K], 0 for a class that neither is nor was predicted."""
    both = weights @ (evaluation.decisions * evaluation.labels)
    return np.nan_to_num(_divide(2 * both, weights @ (evaluation.decisions + evaluation.labels)))


def aurocs(evaluation: Evaluation, weights: Array) -> Array:
    """[B, K], the area under each class's ROC curve against all others; NaN where one side is empty."""
    columns = range(len(evaluation.class_names))
    return np.stack([_auroc(evaluation.probabilities[:, k], evaluation.labels[:, k], weights) for k in columns], 1)


def _auroc(scores: Array, labels: Array, weights: Array) -> Array:
    """The chance that a positive scores above a negative, ties counting half (Mann-Whitney)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])  # of groups of equal scores
    positives = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1)
    negatives = np.add.reduceat(weights[:, order] * (1 - labels[order]), starts, axis=1)
    below = np.cumsum(negatives, 1) - negatives
    return _divide((positives * (below + negatives / 2)).sum(1), positives.sum(1) * negatives.sum(1))


def _divide(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


# ---- curves ----


def confusion(evaluation: Evaluation) -> NDArray[np.int64]:
    """[K, K], of single labels: rows are what is right, columns what was predicted."""
    return (evaluation.labels.T @ evaluation.decisions).astype(np.int64)


def roc_curve(scores: Array, labels: Array) -> tuple[Array, Array]:
    """False and true positive rates, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
    positives, negatives = np.cumsum(labels[order])[ends], np.cumsum(1 - labels[order])[ends]
    return np.r_[0, negatives / max(negatives[-1], 1)], np.r_[0, positives / max(positives[-1], 1)]


def calibration(evaluation: Evaluation) -> tuple[list[dict[str, float]], float]:
    """Per bin of confidence the mean confidence, how often it was right, and its share; and the expected error.

    Confidence is the probability of the predicted class; of several labels per image, each class's own (Guo et al.
    2017, "On calibration of modern neural networks", arXiv:1706.04599).
    """
    if evaluation.multi_label:
        confidence, right = evaluation.probabilities.ravel(), evaluation.labels.ravel()
    else:
        confidence = evaluation.probabilities.max(1)
        right = (evaluation.decisions * evaluation.labels).sum(1)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    entries = [
        {"confidence": confidence[bins == b].mean(), "right": right[bins == b].mean(), "share": (bins == b).mean()}
        for b in range(CALIBRATION_BINS)
        if (bins == b).any()
    ]
    error = sum(entry["share"] * abs(entry["confidence"] - entry["right"]) for entry in entries)
    return [{name: float(value) for name, value in entry.items()} for entry in entries], float(error)


def worst_mistakes(evaluation: Evaluation, count: int) -> list[tuple[int, int, int]]:
    """Up to `count` of the most confident mistakes, as image, class given and right class.

    Of several labels per image the two classes are the same: one that was wrongly seen or missed.
    """
    if evaluation.multi_label:
        wrong = np.abs(evaluation.probabilities - evaluation.labels)
        image, column = np.unravel_index(np.argsort(-wrong, axis=None, kind="stable"), wrong.shape)
        pairs = [(int(i), int(k), int(k)) for i, k in zip(image, column, strict=True) if wrong[i, k] > 0.5]
        return pairs[:count]
    right, given = evaluation.labels.argmax(1), evaluation.probabilities.argmax(1)
    wrong = np.flatnonzero(right != given)
    order = wrong[np.argsort(evaluation.probabilities[wrong, right[wrong]], kind="stable")]
    return [(int(i), int(given[i]), int(right[i])) for i in order[:count]]
