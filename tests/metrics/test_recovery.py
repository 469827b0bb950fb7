import numpy as np
import pytest
from sklearn.metrics import f1_score as sklearn_f1
from sklearn.metrics import roc_auc_score

from mmsae.metrics import recovery
from mmsae.metrics.recovery import auroc, best_f1, f1_score, recover

RNG = np.random.default_rng(0)
FEATURES = {
    "distinct": RNG.normal(size=(80, 7)),
    "ties": RNG.integers(0, 4, (80, 7)).astype(float),
    "sparse": np.maximum(RNG.normal(size=(80, 7)) - 1, 0).astype(np.float32),
    "constant": np.ones((80, 7)),
}
LABELS = np.stack([RNG.random(80) < share for share in (0.05, 0.3, 0.9)], axis=1)
LABELS[0] = True


@pytest.mark.parametrize("kind", FEATURES)
def test_auroc_is_that_of_scikit_learn(kind):
    found = auroc(FEATURES[kind], LABELS)
    want = [[roc_auc_score(y, x) for x in FEATURES[kind].T] for y in LABELS.T]
    assert found == pytest.approx(np.array(want), abs=1e-12)


def test_auroc_of_one_class_is_not_a_number():
    labels = np.stack([np.ones(80, bool), np.zeros(80, bool)], axis=1)
    assert np.isnan(auroc(FEATURES["distinct"], labels)).all()


def brute(x, y):
    """Best F1 of `x >= threshold` over all thresholds that occur, by scikit-learn."""
    return max(sklearn_f1(y, x >= threshold, zero_division=0) for threshold in np.unique(x))


@pytest.mark.parametrize("kind", FEATURES)
def test_best_f1_is_that_of_all_thresholds(kind):
    x = FEATURES[kind]
    scores, thresholds = best_f1(x, LABELS)
    for v, y in enumerate(LABELS.T):
        for j in range(x.shape[1]):
            assert scores[v, j] == pytest.approx(brute(x[:, j], y), abs=1e-12)
            # the threshold that is given reaches the score that is given
            assert sklearn_f1(y, x[:, j] >= thresholds[v, j]) == pytest.approx(scores[v, j], abs=1e-12)


def test_many_columns_are_the_same_in_chunks(monkeypatch):
    whole = auroc(FEATURES["ties"], LABELS), *best_f1(FEATURES["ties"], LABELS)
    monkeypatch.setattr(recovery, "CHUNK", 2)
    parts = auroc(FEATURES["ties"], LABELS), *best_f1(FEATURES["ties"], LABELS)
    for a, b in zip(whole, parts, strict=True):
        assert np.array_equal(a, b)


def test_random_labels_are_not_recovered():
    """The best of 500 columns looks good on the split it was chosen on; the score must not."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 200, 500)), rng.random((2, 200, 20)) < 0.5
    chosen = auroc(x[0], y[0]).max(1).mean()
    found = recover((x[0], y[0]), (x[1], y[1]))
    assert chosen > 0.6  # what choosing and scoring on one split would report
    # one AUROC of 100 against 100 has a standard error of 0.041, the mean of 20 of 0.009
    assert found.auroc.mean() == pytest.approx(0.5, abs=0.03)
    leaked = recover((x[0], y[0]), (x[0], y[0]))
    assert leaked.auroc.mean() == pytest.approx(chosen)


def test_the_threshold_comes_from_the_choosing_split():
    x, y = np.arange(10.0)[:, None], (np.arange(10) >= 6)[:, None]
    found = recover((x, y), (x + 3, y))  # the same order three units higher
    assert found.auroc.tolist() == [1.0]
    assert found.predicted[:, 0].tolist() == [False] * 3 + [True] * 7
    assert found.f1[0] == pytest.approx(2 * 4 / (7 + 4))


def test_planted_columns_are_found():
    y = np.random.default_rng(2).random((2, 300, 4)) < 0.3
    x = np.random.default_rng(3).normal(size=(2, 300, 50))
    for split in range(2):
        x[split][:, [7, 11, 13, 17]] += 8 * y[split]
    found = recover((x[0], y[0]), (x[1], y[1]))
    assert found.by_auroc.tolist() == found.by_f1.tolist() == [7, 11, 13, 17]
    assert found.f1.min() > 0.98


def test_f1_of_nothing_is_zero():
    none, some = np.zeros((5, 1), bool), np.ones((5, 1), bool)
    assert f1_score(none, none).tolist() == f1_score(none, some).tolist() == f1_score(some, none).tolist() == [0.0]
    assert f1_score(some, some).tolist() == [1.0]


def test_inputs_are_not_changed():
    x, y = FEATURES["ties"].copy(), LABELS.copy()
    recover((x, y), (x, y))
    assert np.array_equal(x, FEATURES["ties"])
    assert np.array_equal(y, LABELS)
