import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from mmsae.analyses.media import Media, mask_shares
from mmsae.analyses.recordings import MISSING, excerpt, quantised, spectrogram


def media(*rendered, seconds=10.0, limit=1e9, thumbnail=64):
    return Media(lambda i: rendered[i], thumbnail, seconds, limit)


def decoded(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def sound(seconds=2.0, rate=16_000, hz=440.0):
    t = np.arange(int(seconds * rate)) / rate
    samples = (0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32)
    return {"kind": "audio", "samples": samples, "rate": rate, "text": "a tone"}


def traces(seconds=4.0, rate=100.0, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((channels, int(seconds * rate))) * [[1e-3], [1.0], [1e4]] + [[0.0], [500.0], [-1e5]]
    return {"kind": "signal", "values": values, "rate": rate, "channels": list("abc"), "unit": "µV", "text": "noise"}


def test_sound_comes_back_within_a_level():
    clip = sound()
    clip["samples"][100] = 1.7  # clipped
    packed = media(clip)
    packed.add(0)
    (medium,) = packed.packed
    heard = decoded(medium["pcm"], "<i2") / 32767
    assert medium["rate"] == 16_000
    assert medium["seconds"] == 2
    assert np.abs(heard - np.clip(clip["samples"], -1, 1)).max() <= 0.5 / 32767 + 1e-7
    json.dumps(medium, allow_nan=False)


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_fast_sound_is_resampled_to_the_same_tone(rate):
    packed = media(sound(rate=rate, hz=1000))
    packed.add(0)
    heard = decoded(packed.packed[0]["pcm"], "<i2") / 32767
    assert len(heard) == pytest.approx(32_000, abs=1)
    t = np.arange(len(heard)) / 16_000
    inside = slice(500, -500)  # the filter has edges
    assert np.abs(heard - 0.5 * np.sin(2 * np.pi * 1000 * t))[inside].max() < 5e-3


@pytest.mark.parametrize("hz", [300, 1000, 5000])
def test_spectrogram_is_brightest_at_the_tone(hz):
    levels = spectrogram(sound(hz=hz)["samples"], 16_000)
    assert levels.dtype == np.uint8
    row = levels.mean(1).argmax()
    mels = 2595 * np.log10(1 + np.array([hz, 8000]) / 700)
    assert 1 - (row + 0.5) / len(levels) == pytest.approx(mels[0] / mels[1], abs=0.02)
    assert levels.shape[1] <= 330


def test_spectrogram_is_placed_in_time():
    clip = sound(seconds=4, hz=1000)["samples"]
    clip[: 2 * 16_000] = 0
    loud = spectrogram(clip, 16_000).max(0) > 200
    assert np.flatnonzero(loud)[0] / len(loud) == pytest.approx(0.5, abs=0.02)


def test_silence_and_a_click_have_a_spectrogram():
    assert spectrogram(np.zeros(800, np.float32), 8000).max() == 0
    assert spectrogram(np.ones(3, np.float32), 8000).size > 0


def test_signals_come_back_within_a_step_whatever_their_offset():
    signal = traces()
    signal["values"][1, 50:60] = np.nan
    packed = media(signal)
    packed.add(0)
    medium = packed.packed[0]
    step, offset = decoded(medium["step"], "<f4"), decoded(medium["offset"], "<f4")
    levels = decoded(medium["levels"], "<i2").reshape(3, -1)
    assert (levels[1, 50:60] == MISSING).all()
    assert (levels == MISSING).sum() == 10
    values = offset.astype(float)[:, None] + levels * step.astype(float)[:, None]
    known = levels != MISSING
    assert (np.abs(values - signal["values"])[known] <= (0.51 * step.astype(float)[:, None] * known)[known]).all()
    span = np.nanmax(signal["values"], 1) - np.nanmin(signal["values"], 1)
    assert (step < 1e-4 * span).all()
    json.dumps(medium, allow_nan=False)


def test_constant_and_missing_channels_are_kept():
    offset, step, levels = quantised(np.array([[7.0, 7.0], [np.nan, np.nan]]))
    assert offset[0] == 7
    assert (levels[0] == 0).all()
    assert (levels[1] == MISSING).all()
    assert np.isfinite(step).all()


def test_fast_signals_are_thinned_without_aliases():
    rate, t = 1000.0, np.arange(4000) / 1000
    fast = np.sin(2 * np.pi * 5 * t) + np.sin(2 * np.pi * 240 * t)  # the second cannot be shown at 250 Hz
    packed = media({"kind": "signal", "values": fast[None], "rate": rate, "channels": ["x"], "unit": "mV", "text": ""})
    packed.add(0)
    medium = packed.packed[0]
    shown = decoded(medium["offset"], "<f4") + decoded(medium["levels"], "<i2") * decoded(medium["step"], "<f4")
    assert medium["hz"] == 250
    assert len(shown) == 1000
    inside = slice(50, -50)
    assert np.abs(shown - np.sin(2 * np.pi * 5 * t[::4]))[inside].max() < 0.1


def test_excerpts_hold_their_window():
    assert excerpt(None, 10, (5, 1)) == 0
    assert excerpt(8.0, 10, (7, 1)) == 0
    assert excerpt(100.0, 10, None) == 0
    assert excerpt(100.0, 10, (50, 1)) == 45
    assert excerpt(100.0, 10, (0.5, 1)) == 0
    assert excerpt(100.0, 10, (99, 1)) == 90
    assert excerpt(100.0, 10, (20, 30)) == 20
    for begin in np.linspace(0, 90, 37):
        for length in (0.3, 5, 9.7, 10):
            start = excerpt(100.0, 10, (begin, length))
            assert start <= begin
            assert begin + length <= start + 10 + 1e-9


def test_a_sample_is_rendered_and_stored_once_per_excerpt():
    calls = []
    recording = traces(60.0)

    def render(i):
        calls.append(i)
        return recording

    packed = Media(render, 64, 10.0, 1e9)
    places = [packed.add(0, window) for window in ((30, 1), (30.2, 1), (50, 1), (30, 1))]
    assert places == [0, 0, 1, 0]
    assert calls == [0, 0]
    assert [m["start_ms"] for m in packed.packed] == [25_000, 45_000]
    assert packed.packed[0]["total"] == 60
    first = packed.packed[0]
    values = decoded(first["levels"], "<i2").reshape(3, -1)[1] * decoded(first["step"], "<f4")[1]
    values = values + decoded(first["offset"], "<f4")[1]
    assert np.abs(values - recording["values"][1, 2500:3500]).max() < 1e-3


def test_events_move_with_the_excerpt():
    recording = traces(60.0) | {"events": [[28.0, 29.0, "in"], [24.0, 26.0, "half"], [2.0, 3.0, "out"]]}
    packed = media(recording)
    packed.add(0, (30, 1))
    assert packed.packed[0]["events"] == [[3.0, 4.0, "in"], [-1.0, 1.0, "half"]]


def test_the_limit_is_kept_and_sound_goes_first():
    packed = media(*[sound(seconds=4) for _ in range(20)], limit=5e5)
    for i in range(20):
        packed.add(i)
    assert len(json.dumps(packed.packed)) < 5.1e5
    assert [bool(m.get("pcm")) for m in packed.packed[:4]] == [True, True, False, False]
    assert packed.packed[3]["kind"] == "audio"
    assert packed.cut_short == 18
    full = media(traces(), limit=100)
    full.add(0)
    assert full.packed == [{"kind": "other", "text": "noise (not stored: the page is full)"}]


def masked(size=(40, 40), box=(0, 0, 20, 40), value=3):
    mask = Image.new("L", size, 0)
    mask.paste(value, box)
    names = {0: "nothing", 3: "left"}
    return {"kind": "image", "image": Image.new("RGB", size), "text": "", "mask": mask, "labels": names}


def test_mask_keeps_its_values_and_their_names():
    packed = media(masked())
    packed.add(0)
    medium = packed.packed[0]
    values = np.asarray(opened(medium["mask"]))
    assert sorted(np.unique(values)) == [0, 3]
    assert (values[:, :20] == 3).all()
    assert [(e["value"], e["name"], e["share"]) for e in medium["legend"]] == [(0, "nothing", 0.5), (3, "left", 0.5)]
    red, green, blue, opaque = opened(medium["mask"]).convert("RGBA").getpixel((0, 0))
    assert f"#{red:02x}{green:02x}{blue:02x}" == medium["legend"][1]["colour"]
    assert opaque == 255
    assert opened(medium["mask"]).convert("RGBA").getpixel((39, 0))[3] == 0
    assert "image" not in medium
    json.dumps(medium)


def test_activation_is_shared_out_over_the_mask():
    packed = media(masked())
    packed.add(0)
    assert mask_shares(packed.packed[0], np.array([[1.0, 0], [0, 0]])) == pytest.approx([0, 1])
    assert mask_shares(packed.packed[0], np.array([[3.0, 1], [0, 0]])) == pytest.approx([0.25, 0.75])
    assert mask_shares(packed.packed[0], np.array([[-1.0]])) == pytest.approx([0.5, 0.5])
    assert mask_shares(packed.packed[0], np.zeros((2, 2))) is None
    assert mask_shares({"kind": "image"}, np.ones((2, 2))) is None


def test_a_square_map_lies_on_the_middle_of_an_oblong_mask():
    packed = media(masked((80, 40), (0, 0, 40, 40)))  # the middle square is half left, half nothing
    packed.add(0)
    square = np.array([[1.0, 0], [0, 0]])
    assert mask_shares(packed.packed[0], square) == pytest.approx([0, 1])
    assert mask_shares(packed.packed[0], np.ones((1, 1))) == pytest.approx([0.5, 0.5])
    assert mask_shares(packed.packed[0], np.array([[0, 1.0], [0, 0]]), whole=True) == pytest.approx([1, 0])
    assert mask_shares(packed.packed[0], np.array([[0, 0, 0, 1.0]])) == pytest.approx([1, 0])
