"""Which latent knows which factor: AUROC and best F1 of single columns against known labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

CHUNK = 1024
"""Columns handled at a time, to bound the memory."""


def auroc(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every column for every binary label, ties counted half.

    Args:
        features: `[n, m]`.
        labels: bool `[n, v]`.

    Returns:
        `[v, m]`; NaN for labels that are all true or all false.
    """
    n = len(features)
    positive = labels.sum(0).astype(np.float64)
    pairs = positive * (n - positive)
    out = np.empty((labels.shape[1], features.shape[1]))
    for start in range(0, features.shape[1], CHUNK):
        ranks = rankdata(features[:, start : start + CHUNK], axis=0)  # average ranks
        with np.errstate(invalid="ignore", divide="ignore"):
            wins = labels.T.astype(np.float64) @ ranks - (positive * (positive + 1) / 2)[:, None]
            out[:, start : start + CHUNK] = wins / pairs[:, None]
    return out


def best_f1(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best F1 of "column >= threshold" for every column and binary label, and the threshold that reaches it.

    Args:
        features: `[n, m]`.
        labels: bool `[n, v]`.

    Returns:
        F1 `[v, m]` and thresholds `[v, m]`.
    """
    n, m = features.shape
    positive = labels.sum(0)
    scores, thresholds = np.zeros((labels.shape[1], m)), np.zeros((labels.shape[1], m))
    cut = np.arange(1, n + 1)[:, None]  # how many are called positive
    for start in range(0, m, CHUNK):
        block = features[:, start : start + CHUNK]
        order = np.argsort(-block, axis=0, kind="stable")
        ranked = np.take_along_axis(block, order, axis=0)
        # a threshold cannot separate equal values
        possible = np.vstack([ranked[:-1] != ranked[1:], np.ones((1, block.shape[1]), bool)])
        for value in range(labels.shape[1]):
            hits = labels[:, value][order].cumsum(0)
            f1 = np.where(possible, 2 * hits / (cut + positive[value]), 0)
            best = f1.argmax(0)
            columns = np.arange(block.shape[1])
            scores[value, start : start + CHUNK] = f1[best, columns]
            thresholds[value, start : start + CHUNK] = ranked[best, columns]
    return scores, thresholds


class Recovery(NamedTuple):
    """For each label, the best single column, chosen on one split and scored on another.

    Attributes:
        by_auroc: Column with the best AUROC, `[v]`.
        auroc: Its AUROC on the scoring split, `[v]`.
        by_f1: Column with the best F1, `[v]`.
        f1: F1 on the scoring split at the threshold from the choosing split, `[v]`.
        predicted: Decisions behind `f1`, bool `[n, v]`.
    """

    by_auroc: np.ndarray
    auroc: np.ndarray
    by_f1: np.ndarray
    f1: np.ndarray
    predicted: np.ndarray


def recover(chosen_on: tuple[np.ndarray, np.ndarray], scored_on: tuple[np.ndarray, np.ndarray]) -> Recovery:
    """Choose columns on one split and score them on another.

    Args:
        chosen_on: Features `[n, m]` and labels bool `[n, v]` of the choosing split.
        scored_on: The same of the scoring split.
    """
    (x, y), (x_test, y_test) = chosen_on, scored_on
    by_auroc = np.nan_to_num(auroc(x, y)).argmax(1)
    f1, thresholds = best_f1(x, y)
    by_f1 = f1.argmax(1)
    values = np.arange(y.shape[1])
    predicted = x_test[:, by_f1] >= thresholds[values, by_f1]
    tested = auroc(x_test[:, by_auroc], y_test)[values, values]
    return Recovery(by_auroc, tested, by_f1, f1_score(predicted, y_test), predicted)


def f1_score(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """F1 of each column of decisions, `[v]`; 0 where nothing is positive."""
    hits = (predicted & labels).sum(0)
    return 2 * hits / np.maximum(predicted.sum(0) + labels.sum(0), 1)
