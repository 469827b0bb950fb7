import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close
from towers import CLAP_CONFIG, save_clap, tone

from mmsae.errors import MmsaeError
from mmsae.sources import CLAP, PairedEmbeddings

ENCODER = "audio_model.audio_encoder"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clap(tmp_path_factory.mktemp("clap"))


def source(folder, hook_points, **arguments):
    return CLAP(str(folder), hook_points, device="cpu", **arguments)


def item(audio, rate=16_000, **more):
    return {"audio": audio, "rate": rate, "text": "a bell", "sample_id": 0, **more}


def test_stages_are_what_the_model_reports(folder):
    one = source(folder, [f"{ENCODER}.layers.0"])
    batch = one.collate(one.example_items())
    rows = one.read(batch)["acts"][f"{ENCODER}.layers.0"]
    with torch.no_grad():
        told = one.model.audio_model(input_features=batch["input"], output_hidden_states=True)
        features = one.model.get_audio_features(input_features=batch["input"]).pooler_output
    assert_close(rows.view(2, 8, 8, 16).permute(0, 3, 1, 2), told.hidden_states[1])
    assert_close(normalize(one.forward(batch), dim=-1).detach(), features)  # theirs are of length 1, ours are not


@pytest.mark.parametrize("stage", [f"{ENCODER}.patch_embed", f"{ENCODER}.patch_embed.proj", f"{ENCODER}.norm"])
@pytest.mark.parametrize(
    ("start", "length", "low", "high"), [(0.1, 0.05, 1, 4), (0.55, 0.05, 8, 11), (0.8, 0.15, 13, 16)]
)
def test_places_are_where_the_sound_changed(folder, stage, start, length, low, high):
    """Perturb one region of the spectrogram; the tokens that change most must say that they lie there."""
    one = source(folder, [stage])
    # no token may look at another: attention would carry the change everywhere
    for layer in one.model.audio_model.audio_encoder.layers:
        for block in layer.blocks:
            block.attention.output.dense.weight.zero_()
            block.attention.output.dense.bias.zero_()
    batch = one.collate([item(tone())])
    frames = batch["input"].shape[2]
    first, last = round(start * (frames - 1)), round((start + length) * (frames - 1))
    changed = {**batch, "input": batch["input"].clone()}
    changed["input"][:, :, first : last + 1, low:high] += 40  # dB
    before, after = (one.read(b) for b in (batch, changed))
    moved = (after["acts"][stage] - before["acts"][stage]).norm(dim=1)
    moved = moved > 0.05 * moved.max()
    begins, ends = before["start_s"], before["start_s"] + before["duration_s"]
    touched = (ends > start) & (begins < start + length)
    bands = int(before["row"].max()) + 1
    height = 16 / bands  # mel bands of a token
    touched &= ((before["row"] + 1) * height > low) & (before["row"] * height < high)
    # interpolating frames and rounding may move an edge by a frame, so a token at the edge may go either way
    frame = 1 / (frames - 1)
    surely = (ends > start + 2 * frame) & (begins < start + length - 2 * frame) & touched
    assert moved.any()
    assert surely.any()
    assert moved[surely].all()
    wide = (ends > start - 2 * frame) & (begins < start + length + 2 * frame)
    wide &= ((before["row"] + 1) * height > low) & (before["row"] * height < high)
    assert not moved[~wide].any()


def test_the_unfolded_output_has_the_same_places(folder):
    folded, unfolded = source(folder, [f"{ENCODER}.norm"]), source(folder, [ENCODER])
    rows, maps = (one.read(one.collate([item(tone())])) for one in (folded, unfolded))
    found = {(int(r), int(c)): x for r, c, x in zip(rows["row"], rows["column"], *rows["acts"].values(), strict=True)}
    for r, c, x, start in zip(maps["row"], maps["column"], *maps["acts"].values(), maps["start_s"], strict=True):
        assert_close(found[int(r), int(c)], x)
        assert float(start) == pytest.approx(int(c) / 16)


def test_tokens_behind_the_end_of_a_sound_are_not_read(folder):
    one = source(folder, [f"{ENCODER}.patch_embed"])
    read = one.read(one.collate([item(tone(seconds=0.5)), item(tone(), sample_id=1)]))
    short = read["sample_id"] == 0
    assert int(short.sum()) * 2 == int((~short).sum()) == 256
    assert float(read["start_s"][short].max()) < 0.5


def test_repetitions_count_seconds_in_the_sound_itself(folder):
    one = source(folder, [f"{ENCODER}.patch_embed"])
    one.preprocessor.padding = "repeatpad"
    read = one.read(one.collate([item(tone(seconds=0.25))]))
    assert len(read["start_s"]) == 256  # four times a quarter of a second
    assert float(read["start_s"].max()) < 0.25
    one.preprocessor.padding = "pad"


def test_longer_sounds_are_cut_at_the_window_and_never_at_random(folder):
    one = source(folder, ["audio_projection"])
    long = np.concatenate([tone(300), tone(3000)])
    both = [one.read(one.collate([item(sound)]))["acts"]["audio_projection"] for sound in (long, long[:16_000])]
    assert_close(*both)
    assert len(one.render(item(long))["samples"]) == 16_000


def test_other_rates_and_channels_are_the_same_sound(folder):
    one = source(folder, ["audio_projection"])
    twice = tone(440, rate=32_000)
    stereo = np.stack([twice, twice])
    given = [item(tone(440)), item(twice, 32_000), item(stereo, 32_000), item((twice * 32767).astype(np.int16), 32_000)]
    vectors = torch.cat([one.read(one.collate([sound]))["acts"]["audio_projection"] for sound in given])
    other = one.read(one.collate([item(tone(2000))]))["acts"]["audio_projection"]
    assert (vectors - vectors[0]).norm(dim=1).max() < 0.2 * (other - vectors[0]).norm()
    assert set(one.collate([given[0]])["columns"]) == set()  # the rate is no column


def test_text_tower_knows_start_end_and_padding(folder):
    one = source(folder, ["text_model.encoder.layer.*"], tower="text")
    texts = ["a red dog", "bell", "the sound of a bell of a red dog the sound"]
    batch = one.collate([{"text": text, "sample_id": i} for i, text in enumerate(texts)])
    read = one.read(batch)
    assert read["kind"][read["sample_id"] == 0].tolist() == [1, 0, 0, 0, 2]
    assert read["kind"][read["sample_id"] == 1].tolist() == [1, 0, 2]
    assert int((read["sample_id"] == 2).sum()) == 8  # of ten positions RoBERTa uses those behind its padding id
    assert one.render({"text": texts[0], "sample_id": 0})["tokens"] == ["<s>", "a", " red", " dog", "</s>"]
    told = one.model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    last = read["acts"]["text_model.encoder.layer.1"]
    assert_close(last[:5], told.last_hidden_state[0, :5].detach())


def test_gradients_flow_to_blocks_but_not_to_what_nothing_reads(folder):
    prompts = {"kind": ["a bell", "a dog"]}
    batch_of = [item(tone(300 * (i + 1)), sample_id=i, labels={"kind": i}) for i in range(2)]
    one = source(folder, [f"{ENCODER}.layers.0.blocks.1"], prompts=prompts)
    read = one.read(one.collate(batch_of), gradients=True)
    assert read["grads"][f"{ENCODER}.layers.0.blocks.1"].abs().sum() > 0
    copy = source(folder, [f"{ENCODER}.layers.0:output[1]"], prompts=prompts)
    with pytest.raises(MmsaeError, match="does not depend on the activations"):
        copy.read(copy.collate(batch_of), gradients=True)


def test_zero_shot_is_that_of_the_model(folder):
    prompts = {"kind": ["a bell", "a red dog"]}
    one = source(folder, ["audio_projection"], prompts=prompts)
    batch = one.collate([item(tone(300 * (i + 1)), sample_id=i, labels={"kind": i}) for i in range(2)])
    with torch.no_grad():
        output = one.forward(batch)
        ids = one.with_tower("text").words(prompts["kind"])
        told = one.model(input_features=batch["input"], **ids).logits_per_audio
    logits, truth = one.predictions(output, batch)
    assert_close(logits, told)
    assert truth.tolist() == [0, 1]
    assert_close(one.outcomes(output, batch)["accuracy_kind"], (told.argmax(1) == truth).float())
    plain = source(folder, ["audio_projection"])
    assert plain.outcomes(output, batch) == {}
    with pytest.raises(MmsaeError, match="CLAP has a loss on items with labels that have prompts only"):
        plain.predictions(output, batch)


def test_random_weights_need_no_folder():
    one = CLAP("none", [f"{ENCODER}.layers.1"], config=CLAP_CONFIG, device="cpu")
    read = one.read(one.collate(one.example_items()))
    assert read["acts"][f"{ENCODER}.layers.1"].shape == (2 * 16, 32)
    assert float(read["start_s"].max()) == pytest.approx(10 * 15 / 16)


def test_fused_checkpoints_are_read_without_chance(tmp_path):
    audio = {**CLAP_CONFIG["audio_config"], "enable_fusion": True, "fusion_type": "aff_2d"}
    one = CLAP("none", ["audio_projection"], config={**CLAP_CONFIG, "audio_config": audio}, device="cpu")
    sounds = [item(tone(rate=48_000), 48_000, sample_id=i) for i in range(3)]
    first, second = (one.read(one.collate(sounds))["acts"]["audio_projection"] for _ in range(2))
    assert_close(first, second)  # the extractor calls one of them longer at random
    assert_close(first[0], first[1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"audio": "nowhere.wav"}, "there is no sound file 'nowhere.wav'"),
        ({"audio": np.zeros(100)}, "item 7 has samples but no 'rate'"),
        ({"audio": np.zeros(0), "rate": 16_000}, "item 7 is an empty sound"),
        ({"audio": np.full(9, np.nan), "rate": 16_000}, "item 7 has samples that are not finite"),
        ({"audio": np.ones(9), "rate": 0}, "item 7 says that it has 0 samples per second"),
        ({"text": "a bell"}, "item 7 has no sound under 'audio'"),
    ],
)
def test_wrong_sounds_are_named(folder, given, said):
    with pytest.raises(MmsaeError, match=said):
        source(folder, ["audio_projection"]).collate([{**given, "sample_id": 7}])


def test_what_cannot_be_loaded_is_named(tmp_path, folder):
    with pytest.raises(MmsaeError, match="tower='image' is unknown; choose audio or text"):
        source(folder, ["audio_projection"], tower="image")
    for name, said in (
        (str(tmp_path / "none"), "there is no folder"),
        (str(tmp_path), "holds no model that transformers can load"),
        ("laion/clap-htsat-unfused", "neither a local folder nor can it be fetched"),
        ("miniature:clop", "there is no miniature 'clop'; there are clap"),
    ):
        with pytest.raises(MmsaeError, match=said):
            CLAP(name, ["audio_projection"]).model  # noqa: B018
    with pytest.raises(MmsaeError, match=r"nearest: .*audio_projection"):
        source(folder, ["audio_projections"]).model  # noqa: B018


def test_pairs_are_rows_of_two_streams(folder):
    one = PairedEmbeddings(source(folder, ["audio_projection"]), unit=True)
    sounds = [item(tone(300 * (i + 1)), sample_id=i, pair_id=7 - i) for i in range(2)]
    read = one.read(one.collate(sounds))
    assert one.spec.streams == {"audio": 12, "text": 12}
    assert read["pair_id"].tolist() == [7, 6]
    assert_close(read["acts"]["audio"].norm(dim=1), torch.ones(2))
    with torch.no_grad():
        batch = one.collate(sounds)
        told = one.model(input_features=batch["audio"]["input"], **batch["text"])
    assert_close(read["acts"]["audio"], told.audio_embeds)
    assert_close(read["acts"]["text"], told.text_embeds)
    logits, truth = one.predictions(one.forward(batch), batch)
    assert_close(logits.detach(), told.logits_per_audio)
    assert truth.tolist() == [0, 1]
    cosine = one.outcomes(read["acts"], batch)["cosine"]
    assert_close(cosine, (told.audio_embeds * told.text_embeds).sum(1))
