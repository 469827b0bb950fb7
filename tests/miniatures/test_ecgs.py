import numpy as np
import pytest
from numpy.testing import assert_array_equal

from mmsae.errors import MmsaeError
from mmsae.miniatures.ecgs import BEATS, CLASSES, FACTORS, LEADS, ECGs

FIRST = (3, [0.078932, -0.023950])  # class, and millivolts of I and V1 after one second


@pytest.fixture(scope="module")
def records():
    ecgs = ECGs("test", 200)
    return [ecgs.record(i) for i in range(200)]


def of(records, name):
    return [record for record in records if CLASSES[record.labels["class"]] == name]


def test_a_record_is_a_pure_function_of_split_seed_and_index():
    a, b = ECGs("train", 20), ECGs("train", 50)
    assert_array_equal(b[13]["signal"], a[13]["signal"])
    assert_array_equal(a[-7]["signal"], a[13]["signal"])
    assert a[13]["signal"].shape == (12, 500)
    others = (ECGs("val", 20), ECGs("train", 20, seed=1))
    assert all(not np.array_equal(other[13]["signal"], a[13]["signal"]) for other in others)


def test_the_first_record_is_what_it_always_was():
    """A generator that changes makes the weights that ship, and every figure, those of other data."""
    record = ECGs("train", 1).record(0)
    assert record.labels["class"] == FIRST[0]
    np.testing.assert_allclose(record.signal[[0, 6], 100], FIRST[1], atol=1e-5)


def test_s1_limb_leads_obey_einthoven_without_noise():
    clean = ECGs("test", 50, noise=0).arrays()[0]
    lead = dict(zip(LEADS, clean.transpose(1, 0, 2), strict=True))
    assert np.abs(lead["I"] + lead["III"] - lead["II"]).max() < 1e-5
    assert np.abs(lead["aVR"] + lead["aVL"] + lead["aVF"]).max() < 1e-5
    noisy = ECGs("test", 50).arrays()[0]
    assert np.abs(noisy[:, 0] + noisy[:, 2] - noisy[:, 1]).max() > 0.05


def test_classes_are_as_frequent_and_name_rhythm_and_morphology(records):
    counts = np.bincount([r.labels["class"] for r in records], minlength=5)
    assert counts.min() > 20
    for record in records:
        name = {factor: FACTORS[factor][value] for factor, value in record.labels.items()}
        assert (name["rhythm"] == "fibrillation") == (name["class"] == "fibrillation")
        assert (name["morphology"] == "normal") == (name["class"] in ("normal", "fibrillation", "ectopic"))


def test_ventricular_beats_are_in_ectopic_records_alone(records):
    for record in records:
        names = {name for *_, name in record.beats}
        assert ("ventricular" in names) == (CLASSES[record.labels["class"]] == "ectopic")
        assert names <= set(BEATS)
        ends = [end for _, end, _ in record.beats]
        assert record.beats[0][0] == 0
        assert ends[-1] == 5
        assert [start for start, *_ in record.beats][1:] == ends[:-1]


def test_fibrillation_is_irregular(records):
    def spread(record):
        lengths = np.array([end - start for start, end, _ in record.beats[1:-1]])
        return lengths.std() / lengths.mean()

    assert np.median([spread(r) for r in of(records, "fibrillation")]) > 0.08
    assert np.median([spread(r) for r in of(records, "normal")]) < 0.04


def test_blocked_beats_are_broad(records):
    def steepest(record):
        return np.abs(np.diff(record.signal[1])).max() / np.ptp(record.signal[1])

    blocked = np.median([steepest(r) for r in of(records, "bundle branch block")])
    assert blocked < 0.8 * np.median([steepest(r) for r in of(records, "normal")])


def test_what_does_not_exist_is_told():
    with pytest.raises(MmsaeError, match="no split 'tset'"):
        ECGs("tset", 3)
    with pytest.raises(IndexError):
        ECGs("test", 3)[3]
