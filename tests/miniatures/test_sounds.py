import numpy as np
import pytest

from mmsae.errors import MmsaeError
from mmsae.miniatures.sounds import (
    FACTORS,
    FUNDAMENTAL,
    RATE,
    Sounds,
    compose,
    mentions,
    vocabulary,
    zero_shot_prompts,
)


def named(**values):
    return {factor: FACTORS[factor].index(value) for factor, value in values.items()}


def found(wanted, n=5, split="train"):
    """The first n sounds that have these values."""
    sounds = Sounds(split, 2000)
    labels = sounds.labels()
    agree = np.all([labels[f] == v for f, v in wanted.items()], axis=0)
    return [sounds[i]["audio"] for i in np.flatnonzero(agree)[:n]]


def energy(sound):
    """Power in twenty parts of a tenth of a second."""
    return np.square(sound.reshape(20, -1)).mean(1)


def test_a_sound_is_a_function_of_its_arguments():
    one, again = Sounds("train", 50, 3), Sounds("train", 10, 3)
    assert (one[7]["audio"] == again[7]["audio"]).all()
    assert one[7]["text"] == again.captions()[7]
    assert one[7]["labels"] == {f: values[7] for f, values in again.labels().items()}
    assert (one[-1]["audio"] == one[49]["audio"]).all()
    for other in (Sounds("val", 50, 3)[7], Sounds("train", 50, 4)[7], one[8]):
        assert not np.array_equal(one[7]["audio"], other["audio"])
    assert float(np.abs(one[7]["audio"]).sum()) == pytest.approx(346.39, rel=0.001)  # for good


def test_sounds_are_finite_and_within_bounds():
    sounds = Sounds("test", 60)
    for i in range(60):
        audio = sounds[i]["audio"]
        assert audio.dtype == np.float32
        assert audio.shape == (2 * RATE,)
        assert np.abs(audio).max() <= 1


@pytest.mark.parametrize("pitch", FACTORS["pitch"])
def test_pitch_is_where_it_is_said_to_be(pitch):
    for sound in found(named(timbre="whistle", pitch=pitch, noise="clean")):
        hertz = np.fft.rfftfreq(2 * RATE, 1 / RATE)[np.abs(np.fft.rfft(sound)).argmax()]
        assert FUNDAMENTAL[pitch] * 0.97 < hertz < FUNDAMENTAL[pitch] * 1.45


def test_loudness_is_that_of_the_tone():
    levels = {
        value: [np.sqrt(energy(sound).max()) for sound in found(named(loudness=value, noise="clean"), 20)]
        for value in FACTORS["loudness"]
    }
    assert max(levels["faint"]) < min(levels["loud"])


def test_rhythm_is_when_it_sounds():
    for sound in found(named(rhythm="early", noise="clean")):
        assert energy(sound)[:8].sum() > 100 * energy(sound)[10:].sum()
    for sound in found(named(rhythm="late", noise="clean")):
        assert energy(sound)[10:].sum() > 100 * energy(sound)[:10].sum()
    for sound in found(named(rhythm="held", timbre="buzzer", noise="clean")):
        assert energy(sound).min() > 0.3 * energy(sound).max()


def test_captions_state_what_is_true():
    sounds = Sounds("test", 300)
    words = set(vocabulary())
    for i, caption in enumerate(sounds.captions()):
        stated, labels = mentions(caption), sounds._sound(i)[1]
        assert stated
        assert stated.items() <= labels.items()
        assert set(caption.split()) <= words
    for factor, values in FACTORS.items():
        for index, prompt in enumerate(zero_shot_prompts(factor)):
            assert mentions(prompt) == {factor: index}
        assert len(set(zero_shot_prompts(factor))) == len(values)
    every = dict.fromkeys(FACTORS, 0)
    assert mentions(compose(every, 1, 1, 1)) == every


def test_wrong_arguments_are_told():
    with pytest.raises(MmsaeError, match="no split 'dev'; they have train, val, test"):
        Sounds("dev", 5)
    with pytest.raises(MmsaeError, match=r"no factor 'timber'; nearest: timbre"):
        zero_shot_prompts("timber")
    with pytest.raises(IndexError):
        Sounds("val", 5)[5]
