import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from datamodules import SimulatedECGs
from mmsae.encoders import ECGJEPA, SignalTransformer, read_encoder, write_encoder
from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.miniatures.ecgs import BEATS, LEADS
from mmsae.sources import Custom, Signal
from mmsae.sources.weights import located

TINY = {"n_channels": 3, "patch": 5, "dim": 16, "depth": 2, "heads": 2}


def items(n=2, channels=3, samples=50, **further):
    x = torch.randn(n, channels, samples, generator=torch.Generator().manual_seed(0))
    return [{"signal": x[i], "rate": 50.0, "sample_id": i, **further} for i in range(n)]


def tiny(hook_points=("blocks.*", "norm"), **arguments):
    return Signal("SignalTransformer", list(hook_points), config=TINY, device="cpu", **arguments)


def miniature(**arguments):
    return Signal("miniature:ecg_jepa", ["norm"], device="cpu", **arguments)


def folder(path, **preprocess):
    write_encoder(path, ECGJEPA(**TINY), {"model": "ECGJEPA", "config": TINY, "preprocess": preprocess}, torch.float32)
    return Signal(str(path), ["norm"], device="cpu")


def test_rows_are_the_tokens_of_the_encoder():
    source = tiny()
    read = source.read(source.collate(items()))
    with torch.no_grad(), capture(source.model, ["blocks.0"], stop=False) as first:
        tokens = source.model(torch.stack([item["signal"] for item in items()]))
    assert_close(read["acts"]["norm"].view(2, 11, 16), tokens)
    assert_close(read["acts"]["blocks.0"].view(2, 11, 16), first["blocks.0"])
    assert source.spec.streams == {"blocks.0": 16, "blocks.1": 16, "norm": 16}
    assert read["kind"].view(2, 11)[0].tolist() == [3] + [0] * 10
    assert_close(read["start_s"].view(2, 11)[1], torch.tensor([0.0] + [i / 10 for i in range(10)]))
    assert read["duration_s"].view(2, 11)[0].tolist() == pytest.approx([1.0] + [0.1] * 10)
    assert read["channel"].unique().tolist() == [-1]
    assert read["rate"].unique().tolist() == [50.0]


def test_the_token_that_changes_is_the_one_at_that_second_and_channel():
    config = {**TINY, "tokens": "channels", "n_registers": 0}
    source = Signal("SignalTransformer", ["blocks.0:input"], config=config, device="cpu")
    before, changed = items(1), items(1)
    changed[0]["signal"][2, 31:34] += 1  # channel 2, from .6 to .7 s
    a, b = (source.read(source.collate(x)) for x in (before, changed))
    row = (a["acts"]["blocks.0:input"] - b["acts"]["blocks.0:input"]).abs().amax(1) > 1e-6
    assert a["channel"][row].tolist() == [2]
    assert a["start_s"][row].tolist() == pytest.approx([0.6])
    assert a["duration_s"][row].tolist() == pytest.approx([0.1])


def test_every_token_carries_the_event_of_its_window():
    events = [[0.0, 0.23, "a"], [0.23, 0.5, "b"], [0.5, 0.54, "unheard of"]]
    source = tiny(["norm"], drop_special=True)
    read = source.read(source.collate(items(1, events=events, event_names=("a", "b"))))
    assert read["label.event"].tolist() == [0, 0, 1, 1, 1, -1, -1, -1, -1, -1]  # .2 to .3 s is more of b
    many = [[0.0, 0.03, "a"], [0.03, 0.07, "b"], [0.07, 0.1, "a"]]  # together the two are longer
    read = source.read(
        source.collate([*items(1, events=many, event_names=("b", "a")), {**items(2)[1], "sample_id": 3}])
    )
    assert read["label.event"].view(2, 10)[:, :2].tolist() == [[1, -1], [-1, -1]]
    read = source.read(source.collate([{**item, "rate": None} for item in items(1, events=events, event_names="ab")]))
    assert read["label.event"].tolist() == [-1] * 10  # seconds are unknown
    assert all(math.isnan(t) for t in read["start_s"])


def test_pooled_rows_have_no_place():
    source = tiny(["norm"], positions="mean")
    read = source.read(source.collate(items()))
    with torch.no_grad():
        tokens = source.model(torch.stack([item["signal"] for item in items()]))
    assert_close(read["acts"]["norm"], tokens[:, 1:].mean(1))  # without the register
    assert read["position"].tolist() == [-1, -1]


def test_the_miniature_reads_leads_in_any_order_as_it_was_trained():
    source = miniature()
    data = SimulatedECGs(n_train=4, n_val=1, n_test=1, source=source)
    item = data.items("train")[2]
    order = [11, 0, 5, 3, 8, 1, 2, 10, 4, 7, 6, 9]
    mixed = {**item, "signal": item["signal"][order], "channels": [LEADS[i].upper() for i in order]}
    a, b = (source.read(source.collate([one])) for one in (item, mixed))
    assert_close(a["acts"]["norm"], b["acts"]["norm"])
    encoder, content = read_encoder(located("miniature:ecg_jepa"))
    mean, std = (torch.tensor(content["preprocess"][key])[:, None] for key in ("mean", "std"))
    with torch.no_grad():
        assert_close(a["acts"]["norm"], encoder(((item["signal"] - mean) / std).clamp(-5, 5)[None])[0])
    assert a["label.event"][1:].min() >= 0
    assert a["label.class"].unique().tolist() == [item["labels"]["class"]]
    assert set(BEATS) == set(data.value_names["event"])


def test_data_that_are_standardised_are_not_standardised_again(tmp_path):
    source = folder(tmp_path, mean=[1.0, 2.0, 3.0], std=[2.0, 2.0, 2.0], clip=5.0, unit="mV", rate=50)
    x = items(1, unit="standard deviations")
    assert_close(source.collate(x)["input"][0], x[0]["signal"].clamp(-5, 5))
    x = items(1, unit="mV")
    assert_close(source.collate(x)["input"][0], (x[0]["signal"] - torch.tensor([[1.0], [2.0], [3.0]])) / 2)
    source.standardise = "window"
    found = source.collate(items(1, unit="µV"))["input"][0]
    assert_close(found.mean(1), torch.zeros(3), atol=1e-6, rtol=0)


def test_what_is_shown_is_what_was_recorded():
    known = {"unit": "mV", "events": [[0.0, 1.0, "beat"]], "text": "of somebody"}
    item = {**items(1, **known)[0], "channels": ["a", "b", "c"]}
    shown = miniature().render(item)
    assert shown.pop("values").shape == (3, 50)
    assert shown == {"kind": "signal", "rate": 50.0, "channels": ["a", "b", "c"], **known}


def test_weights_of_ones_own(tmp_path):
    other = SignalTransformer(**TINY)
    torch.save(other.state_dict(), tmp_path / "model.pt")
    assert_close(tiny(checkpoint=tmp_path / "model.pt").model.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ({"rate": 500.0}, "item 0 has 500 Hz, but .* was trained at 50: set data.rate"),
        ({"channels": ["A", "B", "X"]}, "item 0 has no channel c; it has A, B, X"),
        ({"unit": "µV"}, "item 0 is in µV, but .* was trained on mV"),
        ({"signal": torch.full((3, 50), torch.nan)}, "the signal of item 0 is not finite"),
        ({"signal": torch.zeros(50)}, r"has the shape \(50,\); give \[channels, samples\]"),
        ({"signal": torch.zeros(2, 50)}, "item 0 has 2 channels, but .* reads 3: set data.channels"),
        ({"signal": None}, "item 0 has no 'signal'"),
        ({"signal": torch.zeros(3, 4)}, "at least 5 samples"),
    ],
)
def test_signals_that_do_not_fit_are_named(further, said, tmp_path):
    source = folder(tmp_path, rate=50, channels=["a", "b", "c"], unit="mV", mean=[0.0] * 3, std=[1.0] * 3)
    with pytest.raises(MmsaeError, match=said):
        source.read(source.collate([{**items(1)[0], **further}]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Signal("miniature:ecg", ["norm"]), "there is no miniature 'ecg'"),
        (lambda: Signal("./nowhere", ["norm"]), "there is no encoder in './nowhere'"),
        (lambda: Signal("ECGJEPA", ["norm"], config={"width": 3}), "ECGJEPA cannot be built with config"),
        (lambda: Signal("ECGJEPA", ["norm"], checkpoint="no.pt"), "there is no weight file 'no.pt'"),
        (lambda: Signal("miniature:ecg_jepa", ["norm"], checkpoint="no.safetensors"), "there is no weight file"),
        (lambda: Signal("ECGJEPA", ["norm"], layout="space"), "layout='space' is unknown"),
        (lambda: Signal("ECGJEPA", ["norm"], standardise="all"), "standardise='all' is unknown"),
        (lambda: tiny(["block.0"]), "no module that matches 'block.0'"),
    ],
)
def test_what_cannot_be_loaded_is_named(make, said):
    with pytest.raises(MmsaeError, match=said):
        make().model  # noqa: B018


def test_a_missing_braindecode_is_named():
    try:
        import braindecode  # noqa: F401
    except ImportError:
        with pytest.raises(
            MmsaeError, match=r"the model 'EEGConformer' needs braindecode.* pip install 'mmsae\[eeg\]'"
        ):
            Signal("EEGConformer", ["transformer.0"]).model  # noqa: B018
    else:
        with pytest.raises(MmsaeError, match="nearest: EEGConformer"):
            Signal("EEGConformr", ["transformer.0"]).model  # noqa: B018


EEG = {"n_chans": 4, "n_times": 640, "n_outputs": 3, "sfreq": 160}


@pytest.mark.parametrize(
    ("model", "point", "width", "n_windows", "per_channel"),
    [
        ("EEGConformer", "transformer.1", 40, 37, False),
        ("ShallowFBCSPNet", "pool", 40, 37, False),
        ("EEGNet", "pool_1", 16, 160, False),
        ("BIOT", "encoder.transformer", 256, 5, True),
    ],
)
def test_models_of_braindecode(model, point, width, n_windows, per_channel):
    pytest.importorskip("braindecode", reason="no braindecode")
    config = EEG if model in ("EEGConformer", "BIOT") else {k: v for k, v in EEG.items() if k != "sfreq"}
    source = Signal(model, [point], config=config, task="classification", device="cpu")
    x = [{**item, "rate": 160.0, "labels": {"class": 2}} for item in items(2, 4, 640)]
    read = source.read(source.collate(x))
    n = n_windows * (4 if per_channel else 1)
    assert read["acts"][point].shape == (2 * n, width)
    assert read["start_s"].view(2, n)[0, 1] == pytest.approx(4.0 / n_windows)
    assert read["channel"].unique().tolist() == ([0, 1, 2, 3] if per_channel else [-1])
    _, output, _ = source.run(source.collate(x))
    assert source.outcomes(output, source.collate(x))["cross_entropy"].shape == (2,)
    with pytest.raises(MmsaeError, match=r"item 0 has 600 samples, but .* reads 640"):
        source.collate(items(1, 4, 600))


def test_labram_has_a_class_token_and_tokens_of_channels():
    pytest.importorskip("braindecode", reason="no braindecode")
    config = {"n_chans": 4, "n_times": 800, "n_outputs": 3, "sfreq": 200}
    source = Signal("Labram", ["blocks.0"], config=config, device="cpu")
    x = [{**items(1, 4, 800)[0], "rate": 200.0, "channels": ["Fp1", "cz", "O1", "O2"]}]
    read = source.read(source.collate(x))
    assert read["kind"].tolist() == [1] + [0] * 16
    assert read["channel"].tolist() == [-1] + [c for c in range(4) for _ in range(4)]
    assert read["start_s"].tolist() == [0.0] + [0.0, 1.0, 2.0, 3.0] * 4
    x[0]["channels"][0] = "EMG"
    with pytest.raises(MmsaeError, match="Labram does not know the channel EMG"):
        source.read(source.collate(x))


def test_any_module_reads_signals_through_custom():
    net = nn.Sequential(nn.Flatten(), nn.Linear(150, 8))
    source = Custom(net, ["1"], inputs="signal", modality="signal", input_shape=[3, 50], device="cpu")
    read = source.read(source.collate(items()))
    assert_close(read["acts"]["1"], net(torch.stack([item["signal"] for item in items()])).detach())
    assert read["modality"].tolist() == [3, 3]
