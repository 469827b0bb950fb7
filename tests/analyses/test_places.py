"""Where latents fire, as TopExamples says it, on made-up data of every kind (`tests/modalities.py`)."""

import json
from dataclasses import asdict

import modalities
import numpy as np
import pytest

from mmsae.analyses.places import Places, StepProfile


def first(result, latent=0):
    return result.latents[latent]["examples"][0]


def test_windows_of_sound_are_cells_of_time_and_frequency():
    example = first(modalities.audio(bands=False))
    assert example["heat"] is None
    assert example["windows"] == [[1.5, 2.0, 0.25, 0.5, 5.0], [2.0, 2.5, 0.25, 0.5, pytest.approx(0.7)]]
    assert example["region"] == [1.5, 2.0]


def test_region_takes_in_strong_neighbours_on_both_sides():
    # the siren: activations 2, 2.2, 2.4 in the last frames, all at least half of the strongest
    result = modalities.audio()
    assert result.latents[1]["examples"][0]["region"] == [2.5, 4.0]


def test_excerpt_moves_the_windows():
    result = modalities.eeg(30.0, at=17)
    example = first(result)
    assert result.media[example["media"]]["start_ms"] == 12_000
    assert example["windows"] == [[5, 6, 17, 3.0], [5, 6, 18, 3.0], [6, 7, 17, 1.5]]
    assert example["region"] == [5, 7]


def test_short_regions_are_long_enough_to_hear_and_stay_inside():
    clip = modalities.chirps(8000, 1.0, 1)[0]
    columns = {"sample_id": np.zeros(10, int), "start_s": 0.1 * np.arange(10), "duration_s": np.full(10, 0.1)}
    codes = np.zeros((10, 2))
    codes[0, 0] = codes[5, 1] = 1
    result = modalities.top([clip], codes, columns)
    assert first(result)["region"] == pytest.approx([0, 0.2])
    assert first(result, 1)["region"] == pytest.approx([0.4, 0.7])
    assert first(result)["windows"] == [[0, pytest.approx(0.1), 0.0, 1.0, 1.0]]  # no bands: the whole height


@pytest.mark.parametrize("start", [np.nan, -1.0])
def test_embeddings_of_recordings_have_no_window(start):
    clip = modalities.chirps(8000, 1.0, 1)[0]
    columns = {"sample_id": [0], "start_s": [start], "duration_s": [start]}
    example = first(modalities.top([clip], [[2.0]], columns))
    assert example["windows"] == []
    assert example["note"] == "of the whole recording"


def test_negative_codes_count_by_their_size():
    clip = modalities.chirps(8000, 1.0, 1)[0]
    columns = {"sample_id": [0, 0], "start_s": [0.0, 0.5], "duration_s": [0.5, 0.5]}
    example = first(modalities.top([clip], [[1.0], [-4.0]], columns))
    assert example["activation"] == -4
    assert example["region"] == [0.5, 1.0]


def test_heat_of_diffusion_is_of_one_step_only():
    example = first(modalities.diffusion())
    heat = np.array(example["heat"])
    assert heat.shape == (6, 6)
    assert heat[3, 1] == pytest.approx(example["activation"])  # not the sum over steps and conditions
    assert np.count_nonzero(heat) == 1
    assert example["note"] == "timestep 801, σ 1.6, conditional"


def test_profile_is_the_mean_over_all_rows_of_a_step():
    step = np.repeat([10, 20, 30], 4)
    conditional = np.tile([1, 1, 0, 0], 3)
    rng = np.random.default_rng(0)
    codes = rng.random((12, 1)) * (rng.random((12, 1)) < 0.6)
    latents = modalities.store(codes, sample_id=np.arange(12), timestep=step, conditional=conditional)
    with_, without = StepProfile(latents).of(latents, 0)
    assert (with_["label"], without["label"]) == ("conditional", "unconditional")
    for line, condition in ((with_, 1), (without, 0)):
        wanted = [codes[(step == t) & (conditional == condition)].mean() for t in (10, 20, 30)]
        assert line["x"] == [10, 20, 30]
        assert line["y"] == pytest.approx(wanted, rel=1e-5)


def test_profile_over_many_timesteps_is_binned():
    step = np.random.default_rng(0).permutation(1000)
    codes = (step[:, None] >= 500) * 1.0
    latents = modalities.store(codes, sample_id=np.arange(1000), timestep=step)
    (line,) = StepProfile(latents).of(latents, 0)
    assert len(line["x"]) == 50
    assert line["label"] == ""
    assert all(y == (x > 500) for x, y in zip(line["x"], line["y"], strict=True) if abs(x - 500) > 20)


def test_boxes_put_tiles_onto_the_picture():
    example = first(modalities.image_text(boxes=True))
    heat = np.array(example["heat"])
    assert example["whole"]
    assert heat.shape == (32, 48)
    assert set(zip(*np.nonzero(heat), strict=True)) == {(y, x) for y in range(22) for x in range(32, 48)}


def test_the_strongest_tile_wins_and_other_pictures_are_left_out():
    rendered = [{"kind": "image", "image": modalities.scene((48, 48)), "text": ""}]
    n = 4
    columns = {"sample_id": np.zeros(n, int), "row": np.zeros(n, int), "column": np.zeros(n, int)}
    columns |= {"image": [0, 0, 1, 1], "x0": [0, 0, 0, 0], "y0": [0, 0, 0, 0], "x1": [48, 24, 48, 48], "y1": [48] * 4}
    codes = np.array([[1.0, 1.0], [3.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    result = modalities.top(rendered, codes, columns)
    heat = np.array(first(result)["heat"])
    assert (heat[:, :24] == 3).all()
    assert (heat[:, 24:] == 1).all()
    assert first(result, 1)["heat"] is None
    assert first(result, 1)["note"] == "strongest in picture 2, which is not shown"


def test_words_of_a_multimodal_model_are_found_by_their_positions():
    example = first(modalities.image_text())
    values = dict(zip(modalities.QUESTION, example["values"], strict=True))
    assert values[" red"] == 4  # the later of the two
    assert np.count_nonzero(example["values"]) == 2
    assert np.array(example["heat"]).shape == (4, 6)
    assert "note" not in example  # that it fires at words hides no map


def test_mask_shares_stand_at_the_example():
    example = first(modalities.masks())
    assert sum(example["shares"]) == pytest.approx(1)
    assert example["shares"][2] > 0.5


def test_without_medium_only_the_map_is_left():
    codes = [[1.0], [2.0]]
    latents = modalities.store(codes, sample_id=[0, 0], row=[0, 1], column=[0, 0], start_s=[0.0, 1.0])
    assert Places(latents).of(0, 0, 1, None) == {"heat": [[1.0], [2.0]], "values": None}


@pytest.mark.parametrize("name", modalities.ALL)
def test_results_are_plain_data(name):
    result = modalities.ALL[name]()
    assert json.loads(json.dumps(asdict(result), allow_nan=False)) == asdict(result)
