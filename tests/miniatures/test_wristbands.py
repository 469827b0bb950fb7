import numpy as np
import pytest
from numpy.testing import assert_array_equal

from mmsae.errors import MmsaeError
from mmsae.miniatures.wristbands import CHANNELS, EVENTS, FACTORS, GRAVITY, WINDOWS, Wristbands

FIRST = (
    {"activity": 3, "arousal": 0, "posture": 0, "pulse": 2},
    [1.1543, 0.3442, -0.4685, -26.9797, 0.5891, 32.2162],  # g, g, g, BVP, microsiemens, degrees after 100 samples
)


@pytest.fixture(scope="module")
def windows():
    found = Wristbands("test", 320)
    return [found.window(i) for i in range(320)]


def of(windows, factor, value):
    return [w for w in windows if FACTORS[factor][w.labels[factor]] == value]


def spread(windows, channel):
    """Mean deviation within a window."""
    return np.mean([w.signal[CHANNELS.index(channel)].std() for w in windows])


def test_a_window_is_a_pure_function_of_split_seed_and_index():
    a, b = Wristbands("train", 20), Wristbands("train", 50)
    assert_array_equal(b[13]["signal"], a[13]["signal"])
    assert_array_equal(a[-7]["signal"], a[13]["signal"])
    assert a[13]["signal"].shape == (6, 1024)
    others = (Wristbands("val", 20), Wristbands("train", 20, seed=1))
    assert all(not np.array_equal(other[13]["signal"], a[13]["signal"]) for other in others)


def test_the_first_window_is_what_it_always_was():
    """A generator that changes makes the weights that ship, and every figure, those of other data."""
    window = Wristbands("train", 1).window(0)
    assert window.labels == FIRST[0]
    np.testing.assert_allclose(window.signal[:, 100], FIRST[1], atol=1e-4)


def test_eight_windows_are_of_one_wearer():
    items = [Wristbands("train", 40)[i] for i in range(16)]
    assert [item["subject"] for item in items] == [0] * WINDOWS + [1] * WINDOWS
    warmth = [float(item["signal"][5].mean()) for item in items]
    assert np.std(warmth[:8]) < abs(np.mean(warmth[:8]) - np.mean(warmth[8:]))


def test_factors_are_independent_and_all_occur(windows):
    for factor in ("activity", "arousal", "posture"):
        counts = np.bincount([w.labels[factor] for w in windows], minlength=len(FACTORS[factor]))
        assert counts.min() > 0.7 * len(windows) / len(FACTORS[factor])
    table = np.zeros((4, 2))
    for w in windows:
        table[w.labels["activity"], w.labels["arousal"]] += 1
    assert table.min() > 20


def test_each_cause_does_what_it_should(windows):
    moved = [spread(of(windows, "activity", name), "ACC_x") for name in ("still", "gesturing", "walking", "running")]
    assert moved == sorted(moved)
    assert moved[0] < 0.02 < 10 * moved[0] < moved[3]
    for name, direction in GRAVITY.items():
        found = np.mean([w.signal[:3].mean(1) for w in of(of(windows, "activity", "still"), "posture", name)], 0)
        assert found @ direction / np.linalg.norm(found) / np.linalg.norm(direction) > 0.95
    relative = {
        name: np.mean([w.signal[4].std() / w.signal[4].mean() for w in of(windows, "arousal", name)])
        for name in FACTORS["arousal"]
    }
    assert relative["stressed"] > 1.3 * relative["calm"]  # of the skin: it responds more often
    rate = [np.mean([w.heart_rate for w in of(windows, "arousal", name)]) for name in FACTORS["arousal"]]
    assert rate[1] - rate[0] == pytest.approx(14, abs=6)
    for w in windows:
        assert w.labels["pulse"] == int(w.heart_rate >= 75) + int(w.heart_rate >= 100)


def test_events_lie_in_their_windows_and_are_what_they_say(windows):
    for w in windows:
        assert all(0 <= start < end <= 32 and name in EVENTS for start, end, name in w.events)
        gestures = [event for event in w.events if event[2] == "movement"]
        assert not gestures or FACTORS["activity"][w.labels["activity"]] == "gesturing"
    calm, stressed = (
        np.mean([sum(e[2] == "skin response" for e in w.events) for w in of(windows, "arousal", name)])
        for name in FACTORS["arousal"]
    )
    assert stressed > 2 * calm
    # the pulse is where it should be in the spectrum, without movement
    for w in of(windows, "activity", "still")[:20]:
        wave = w.signal[3] - w.signal[3].mean()
        power = np.abs(np.fft.rfft(wave)) ** 2
        hertz = np.fft.rfftfreq(len(wave), 1 / 32)
        inside = (hertz > 0.8) & (hertz < 2)
        assert hertz[inside][power[inside].argmax()] * 60 == pytest.approx(w.heart_rate, rel=0.12)


def test_what_does_not_exist_is_told():
    with pytest.raises(MmsaeError, match="have no split 'training'"):
        Wristbands("training", 3)
    with pytest.raises(IndexError, match="none of index 3"):
        Wristbands("train", 3).window(3)
