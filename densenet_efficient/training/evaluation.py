"""How good a classifier is on labelled images, with bootstrap confidence intervals.

A bootstrap sample gives each image a weight, the number of times it was drawn; of patients with several images, the
patients are drawn. Every figure here is a function of such weights, so that it is computed for many samples at once;
with weights of one it is the figure itself.

Where all samples agree, as of five images that are all right, they tell nothing: then a share has Wilson's interval
(1927, "Probable inference, the law of succession, and statistical inference"), and another figure none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES, CHUNK = 1000, 100
CONFIDENCE = 0.95
AGREEMENT = 1e-12  # between the least and the greatest of samples that agree but for rounding
# Whose areas under the ROC curve get intervals. Nobody reads a thousand of them, and each takes time as all images do.
MAX_RESAMPLED_AREAS = 100
CALIBRATION_BINS = 15
PER_CLASS = ("recall", "precision", "f1", "auroc")


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
    trained_on: int | None = None  # how many of them the model was trained on, where it is known
    groups: Sequence[str] | None = None  # N names, of patients for one; without them each image is of its own

    @cached_property
    def decisions(self) -> Array:
        """[N, K] of zeros and ones: the most probable class, or those of at least a half."""
        if self.multi_label:
            return (self.probabilities >= 0.5).astype(float)
        return np.eye(len(self.class_names))[self.probabilities.argmax(1)]

    @cached_property
    def correct(self) -> Array:
        """[N, 1]. Of several labels per image: whether all are right."""
        return (self.decisions == self.labels).all(1, keepdims=True).astype(float)

    @cached_property
    def members(self) -> NDArray[np.intp]:
        """[N], the index of each image's group."""
        names = np.arange(len(self.labels)) if self.groups is None else np.asarray(self.groups)
        return np.unique(names, return_inverse=True)[1]

    @cached_property
    def hits(self) -> Array:
        """[N, K] of zeros and ones: what was rightly given."""
        return self.decisions * self.labels


def summarise(evaluation: Evaluation, seed: int = 0) -> dict[str, Any]:
    """All figures, each as its value and the bounds of its 95 % interval; None where it is not defined.

    Of more than `MAX_RESAMPLED_AREAS` classes the areas under the ROC curves have no intervals.
    """
    intervals = with_intervals(evaluation, seed)
    classes = {
        class_name: {"images": int(evaluation.labels[:, index].sum())}
        | {name: intervals[name][index] for name in PER_CLASS}
        for index, class_name in enumerate(evaluation.class_names)
    }
    areas = [entry["value"] for entry in intervals["auroc"] if entry["value"] is not None]
    overall = {name: entries[0] for name, entries in intervals.items() if name not in PER_CLASS}
    return {
        "split": evaluation.split,
        "chose_epoch": evaluation.chose_epoch,
        "trained_on": evaluation.trained_on,
        "images": len(evaluation.labels),
        "grouped": len(set(evaluation.members)) < len(evaluation.labels),
        "multi_label": evaluation.multi_label,
        **overall,
        "macro_auroc": float(np.mean(areas)) if areas else None,
        "expected_calibration_error": calibration(evaluation)[1],
        "classes": classes,
        "confusion": (confusions(evaluation) if evaluation.multi_label else confusion(evaluation)).tolist(),
    }


def with_intervals(evaluation: Evaluation, seed: int) -> dict[str, list[dict[str, float | None]]]:
    """Value, low and high of each figure: one entry, or one per class."""
    count, num_classes = evaluation.labels.shape
    cells = [roc_cells(evaluation.probabilities[:, k], evaluation.labels[:, k]) for k in range(num_classes)]
    once = np.ones((1, count))
    values = figures(evaluation, once) | {"auroc": aurocs(cells, once)}
    drawn: dict[str, list[Array]] = {name: [] for name in values}
    for weights in _bootstrap_weights(evaluation.members, seed):
        sample = figures(evaluation, weights)
        if num_classes <= MAX_RESAMPLED_AREAS:
            sample["auroc"] = aurocs(cells, weights)
        for name, figure in sample.items():
            drawn[name].append(figure)
    counts = _independent_counts(evaluation)
    return {name: _intervals(value[0], drawn[name], counts.get(name)) for name, value in values.items()}


def _independent_counts(evaluation: Evaluation) -> dict[str, list[int]]:
    """Of how many groups the figures are shares that are shares."""
    wholes = {
        "accuracy": np.ones((len(evaluation.labels), 1)),
        "recall": evaluation.labels,
        "precision": evaluation.decisions,
    }
    return {
        name: [len(np.unique(evaluation.members[column > 0])) for column in whole.T] for name, whole in wholes.items()
    }


def _bootstrap_weights(members: NDArray[np.intp], seed: int) -> Iterator[Array]:
    generator, count = np.random.default_rng(seed), members.max(initial=-1) + 1
    for _ in range(RESAMPLES // CHUNK):
        draws = [np.bincount(generator.integers(count, size=count), minlength=count)[members] for _ in range(CHUNK)]
        yield np.stack(draws).astype(float)


def _intervals(values: Array, drawn: list[Array], counts: list[int] | None) -> list[dict[str, float | None]]:
    """Of each of the values [C], with the samples [B, C] drawn, if any; ``counts`` [C] of those that are shares."""
    samples = np.concatenate(drawn) if drawn else np.empty((0, len(values)))
    return [
        _interval(value, column, count)
        for value, column, count in zip(values, samples.T, counts or [0] * len(values), strict=True)
    ]


def _interval(value: float, samples: Array, count: int) -> dict[str, float | None]:
    entry = {"value": None if np.isnan(value) else float(value), "low": None, "high": None}
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return entry
    if np.ptp(defined) > AGREEMENT:
        low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    elif count:
        low, high = _wilson(value, count)
    else:
        return entry
    return entry | {"low": float(low), "high": float(high)}


def _wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share of so many."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    width = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return max(min(centre - width, share), 0.0), min(max(centre + width, share), 1.0)  # of 0 and 1 but for rounding


# ---- figures: of weights [B, N], one row per bootstrap sample ----


def figures(evaluation: Evaluation, weights: Array) -> dict[str, Array]:
    """Those of decisions: [B, 1] of all classes, [B, K] of each.

    The recall of a class without images is NaN, the precision of one that was never given 0. The precision and the F1
    of a class that neither is nor was given are 0 where that is so of all images, and NaN where it is so of a sample
    alone, which says nothing of the class.
    """
    hits, given, right = weights @ evaluation.hits, weights @ evaluation.decisions, weights @ evaluation.labels
    recall = _divide(hits, right)
    seen = (given + right > 0) | ~(evaluation.decisions + evaluation.labels).any(0)
    precision, f1 = (
        np.where(seen, np.nan_to_num(_divide(*parts)), np.nan) for parts in ((hits, given), (2 * hits, given + right))
    )
    result = {
        "accuracy": weights @ evaluation.correct / weights.sum(1, keepdims=True),
        "macro_f1": _divide(np.nansum(f1, 1, keepdims=True), seen.sum(1, keepdims=True)),
        "recall": recall,
        "precision": precision,
        "f1": f1,
    }
    if not evaluation.multi_label:
        result["balanced_accuracy"] = np.nanmean(recall, 1, keepdims=True)
    return result


def roc_cells(scores: Array, labels: Array) -> NDArray[np.intp]:
    """[N]. In which of the cells each image of one class falls whose counts give the area under the ROC curve.

    For each score that a positive has there are three, in rising order: the negatives below it (and above the score
    before), the negatives of that very score, and the positives of it. So a class is sorted once for all samples.
    """
    thresholds = np.unique(scores[labels > 0])
    below, up_to = (np.searchsorted(thresholds, scores, side) for side in ("left", "right"))
    return (3 * below + (up_to - below) * (1 + labels)).astype(np.intp)


def aurocs(cells: Sequence[NDArray[np.intp]], weights: Array) -> Array:
    """[B, K], the area under each class's ROC curve against all others; NaN where one side is empty."""
    return np.stack([_auroc(of_class, weights) for of_class in cells], 1)


def _auroc(cells: NDArray[np.intp], weights: Array) -> Array:
    """The chance that a positive scores above a negative, ties counting half (Mann-Whitney)."""
    size = 3 * (cells.max() // 3 + 1)
    counts = np.stack([np.bincount(cells, row, size) for row in weights]).reshape(len(weights), -1, 3)
    between, ties, positives = np.moveaxis(counts, 2, 0)
    below = np.cumsum(between + ties, 1) - ties / 2
    return _divide((positives * below).sum(1), positives.sum(1) * (between + ties).sum(1))


def _divide(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


# ---- curves ----


def confusion(evaluation: Evaluation) -> NDArray[np.int64]:
    """[K, K], of single labels: rows are what is right, columns what was predicted."""
    return (evaluation.labels.T @ evaluation.decisions).astype(np.int64)


def confusions(evaluation: Evaluation) -> NDArray[np.int64]:
    """[K, 2, 2], of several labels: per class, rows are absent and present, columns not given and given."""
    hits, given, present = (part.sum(0) for part in (evaluation.hits, evaluation.decisions, evaluation.labels))
    neither = len(evaluation.labels) - given - present + hits
    return np.stack([neither, given - hits, present - hits, hits], 1).reshape(-1, 2, 2).astype(np.int64)


def roc_curve(scores: Array, labels: Array) -> tuple[Array, Array]:
    """False and true positive rates, from (0, 0) to (1, 1), of scores that have both positives and negatives."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
    positives, negatives = np.cumsum(labels[order])[ends], np.cumsum(1 - labels[order])[ends]
    return np.r_[0, negatives / negatives[-1]], np.r_[0, positives / positives[-1]]


def calibration(evaluation: Evaluation) -> tuple[list[dict[str, float]], float]:
    """Per bin of confidence the mean confidence, how often it was right, and its share; and the expected error.

    Confidence is the probability of the predicted class; of several labels per image, each class's own (Guo et al.
    2017, "On calibration of modern neural networks", arXiv:1706.04599).
    """
    if evaluation.multi_label:
        confidence, right = evaluation.probabilities.ravel(), evaluation.labels.ravel()
    else:
        confidence = evaluation.probabilities.max(1)
        right = evaluation.hits.sum(1)
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
        distance = np.abs(evaluation.probabilities - evaluation.labels)
        image, column = np.unravel_index(np.argsort(-distance, axis=None, kind="stable"), distance.shape)
        wrong = evaluation.decisions != evaluation.labels
        return [(int(i), int(k), int(k)) for i, k in zip(image, column, strict=True) if wrong[i, k]][:count]
    right, given = evaluation.labels.argmax(1), evaluation.probabilities.argmax(1)
    wrong = np.flatnonzero(right != given)
    order = wrong[np.argsort(evaluation.probabilities[wrong, right[wrong]], kind="stable")]
    return [(int(i), int(given[i]), int(right[i])) for i in order[:count]]
