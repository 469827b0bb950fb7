"""Windows of recordings: splits by subject, preparation, and every format, whole and damaged."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import source, write_e4, write_edf, write_edfs, write_wfdb
from torch.testing import assert_close

from datamodules import E4Sessions, EDFRecordings, SignalArrays, SimulatedECGs, WFDBRecords
from datamodules.signals import interpolated, resampled
from mmsae.errors import MmsaeError
from mmsae.miniatures.ecgs import LEADS, ECGs
from mmsae.sources import Signal

DATA = Path(os.environ.get("MMSAE_DATA", Path(__file__).parents[3] / "shared" / "data"))


def needs_data(name):
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"no MMSAE_DATA/{name}")


def waves(n, channels=3, samples=300, seed=0):
    return np.random.default_rng(seed).normal(size=(n, channels, samples)).astype(np.float32)


def arrays(folder, n=12, **arguments):
    values = waves(n)
    known = {"signals": values, "sex": np.array(["f", "m"] * (n // 2)), "who": np.arange(n) // 2, "leads": list("xyz")}
    np.savez(folder / "a.npz", **known)
    given = {"array_rate": 100, "labels": ["sex"], "subject": "who", "names": "leads", "window_s": 0.7, **arguments}
    return values, SignalArrays(str(folder / "a.npz"), source=source(3), **given)


def all_items(data, split):
    return [data.items(split)[i] for i in range(len(data.items(split)))]


# ---- windows and splits


def test_windows_of_a_subject_are_in_one_split(tmp_path):
    values, data = arrays(tmp_path, val_share=0.2, test_share=0.3)
    found = {split: all_items(data, split) for split in ("train", "val", "test")}
    owners = {split: {item["subject"] for item in items} for split, items in found.items()}
    assert sorted(itertools.chain(*owners.values())) == list(range(6))
    assert sum(map(len, found.values())) == 12 * 4  # 4 whole windows of .7 s in 3 s
    for item in itertools.chain(*found.values()):
        first = round(item["offset_s"] * 100)
        assert_close(item["signal"], torch.from_numpy(values[item["recording"]][:, first : first + 70]))
        assert data.factors["sex"][item["labels"]["sex"]] == "fm"[item["recording"] % 2]
        assert item["channels"] == ["x", "y", "z"]


def test_windows_overlap_by_their_stride_and_may_be_whole(tmp_path):
    _, data = arrays(tmp_path, stride_s=0.35, val_share=0.2, test_share=0.2)
    offsets = [item["offset_s"] for item in all_items(data, "val") if item["recording"] % 2 == 0]
    assert offsets == pytest.approx([0.35 * k for k in range(7)])
    _, data = arrays(tmp_path, window_s=0, val_share=0.2, test_share=0.2)
    assert {item["signal"].shape for item in all_items(data, "val")} == {(3, 300)}


def test_a_cut_in_time_leaves_out_what_lies_across(tmp_path):
    _, data = arrays(tmp_path, n=2, window_s=0.25, split_by="time", val_share=0.2, test_share=0.2)
    found = {split: [i["offset_s"] for i in all_items(data, split) if not i["recording"]] for split in ("train", "val")}
    assert found["train"] == pytest.approx([0.25 * k for k in range(7)])  # up to 1.75 of 1.8 s
    assert found["val"] == pytest.approx([2.0])


def test_one_subject_cannot_be_cut_by_subject(tmp_path):
    _, data = arrays(tmp_path, n=2)
    with pytest.raises(MmsaeError, match=r"1 subjects: .* split_by='recording' or 'time' would cut within them"):
        data.items("train")


def test_channels_are_picked_and_put_in_order(tmp_path):
    values, data = arrays(tmp_path, channels=["Z", "x."], val_share=0.2, test_share=0.2)
    item = data.items("train")[0]
    assert item["channels"] == ["z", "x"]
    assert_close(item["signal"], torch.from_numpy(values[item["recording"]][[2, 0], :70]))
    _, data = arrays(tmp_path, channels=["x", "V1"])
    with pytest.raises(MmsaeError, match=r"a\.npz\[\d+\] has no channel V1; it has x, y, z"):
        data.items("train")[0]


def test_standardised_by_the_training_recordings_alone(tmp_path):
    values, data = arrays(tmp_path, standardise="train", window_s=0, val_share=0.2, test_share=0.2)
    train = torch.cat([item["signal"] for item in all_items(data, "train")], 1)
    assert_close(train.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(train.std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    seen = values[[item["recording"] for item in all_items(data, "train")]]
    item = data.items("test")[0]
    expected = (values[item["recording"]] - seen.mean((0, 2))[:, None]) / seen.std((0, 2))[:, None]
    assert_close(item["signal"], torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    assert item["unit"] == "standard deviations"
    _, data = arrays(tmp_path, standardise="recording", window_s=0)
    assert_close(data.items("train")[0]["signal"].std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_gaps_are_interpolated_and_empty_channels_named():
    gaps = np.array([[np.nan, 1, np.nan, 3, np.nan], [0, 0, 0, 0, 0.0]])
    assert interpolated(gaps, ["a", "b"], "r").tolist() == [[1, 1, 2, 3, 3], [0, 0, 0, 0, 0]]
    with pytest.raises(MmsaeError, match=r"channel b of night\.edf holds no numbers"):
        interpolated(np.array([[1.0, 2.0], [np.nan, np.nan]]), ["a", "b"], "night.edf")


@pytest.mark.parametrize(("rate", "wanted"), [(360, 100), (128, 100), (160, 128), (4, 32), (257, 100)])
def test_resampling_keeps_a_slow_wave_and_an_offset(rate, wanted):
    t, t_wanted = (np.arange(20 * r) / r for r in (rate, wanted))
    found = resampled((34 + np.sin(2 * np.pi * 0.5 * t))[None], rate, wanted)
    assert found.shape == (1, 20 * wanted)
    inner = slice(3 * wanted, -3 * wanted)  # without the borders, where the filter has to guess
    np.testing.assert_allclose(found[0, inner], 34 + np.sin(2 * np.pi * 0.5 * t_wanted)[inner], atol=0.04)


def test_only_what_fits_stays_in_memory(tmp_path):
    _, data = arrays(tmp_path, cache_mb=0)
    all_items(data, "train")
    assert len(data._read) == 1


# ---- NumPy


def test_a_npy_file_is_mapped(tmp_path):
    np.save(tmp_path / "a.npy", waves(12))
    data = SignalArrays(str(tmp_path / "a.npy"), 100, source=source(3), window_s=3, scale=2.0)
    item = data.items("train")[0]
    assert_close(item["signal"], torch.from_numpy(2 * waves(12)[item["recording"]]))
    assert isinstance(data._arrays["signals"], np.memmap)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.write_bytes(b"PK\x03\x04 broken"), r"a\.npz is no \.npy or \.npz file"),
        (lambda p: np.savez(p, other=waves(2)), "has no array 'signals'; it has other"),
        (lambda p: np.savez(p, signals=waves(2)[0]), r"has the shape \(3, 300\); give \[recordings"),
        (lambda p: np.savez(p, signals=waves(4), sex=np.zeros(3)), "'sex' of .* give one value per recording"),
    ],
)
def test_damaged_arrays_are_named(make, said, tmp_path):
    make(tmp_path / "a.npz")
    with pytest.raises(MmsaeError, match=said):
        SignalArrays(str(tmp_path / "a.npz"), 100, labels=["sex"], source=source(3))


# ---- WFDB


def records(folder, **arguments):
    return WFDBRecords(
        str(folder), source=source(12), **{"window_s": 2, "val_share": 0.25, "test_share": 0.25, **arguments}
    )


def test_s1_wfdb_comes_back_as_it_was_written(tmp_path):
    data = records(write_wfdb(tmp_path), window_s=0, labels=["Sex", "Dx"])
    for item in itertools.chain(*(all_items(data, split) for split in ("train", "val", "test"))):
        written = ECGs("train", 4, seconds=4, rate=250)[item["recording"]]["signal"]
        assert_close(item["signal"], written, atol=1e-3, rtol=0)
        assert data.factors["Sex"][item["labels"]["Sex"]] == "FM"[item["recording"] % 2]
        assert item["labels"]["Dx:0"] == (1 if item["recording"] % 2 == 0 else 0)
        assert data.factors["Dx:1"] == ("present",)
        assert (item["rate"], item["unit"], item["channels"]) == (250.0, "mV", list(LEADS))
        assert [name for *_, name in item["events"]] == ["normal", "ventricular", "normal"]
        assert [start for start, *_ in item["events"]] == pytest.approx([0.8, 1.8, 3.0])
    rows = next(iter(data.rows("val")))
    assert rows["label.event"].unique().tolist() == [-1, 0, 1]


def test_rhythms_are_stretches(tmp_path):
    data = records(write_wfdb(tmp_path), annotations="rhythm")
    assert data.recordings[0].events == [[0.4, 4.0, "AFIB"]]
    assert data.factors == {"event": ("AFIB",)}


def damaged(harm):
    def make(folder):
        write_wfdb(folder)
        harm(folder)

    return make


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "p1.hea").unlink(), r"p1\.dat has no header: put its \.hea file beside it"),
        (lambda f: (f / "p1.dat").unlink(), r"the header names .*p1\.dat, which is not there"),
        (lambda f: cut_off(f / "p1.dat", 700), r"p1\.dat is cut off: 24000 bytes by its header, 700 there"),
        (lambda f: (f / "p2.hea").write_text("p2 twelve 250\n"), r"p2\.hea is no WFDB header"),
        (lambda f: (f / "p2.hea").write_text(""), r"p2\.hea is no WFDB header"),
        (lambda f: (f / "p3.atr").write_bytes(b"\xff"), r"the annotations .*p3\.atr cannot be read"),
    ],
)
def test_damaged_wfdb_is_named_before_anything_runs(harm, said, tmp_path):
    write_wfdb(tmp_path)
    harm(tmp_path)
    with pytest.raises(MmsaeError, match=said) as error:
        records(tmp_path)
    assert "\n" not in str(error.value)


def cut_off(path, n):
    path.write_bytes(path.read_bytes()[:n])


def test_a_folder_without_records_and_a_comment_that_is_not_there_are_told(tmp_path):
    with pytest.raises(MmsaeError, match=r"data\.root=.* holds no \.hea file"):
        records(tmp_path)
    with pytest.raises(MmsaeError, match=r"p0\.hea has no comment 'Age'"):
        records(write_wfdb(tmp_path), labels=["Age"])


def test_a_lead_of_nothing_is_named(tmp_path):
    wfdb = pytest.importorskip("wfdb")
    signal = np.random.default_rng(0).normal(size=(1000, 2))
    wfdb.wrsamp("a", 250, ["mV"] * 2, ["I", "II"], p_signal=signal, fmt=["16"] * 2, write_dir=str(tmp_path))
    digital = np.fromfile(tmp_path / "a.dat", "<i2")
    digital[1::2] = -32768  # WFDB's mark of a missing sample
    digital.tofile(tmp_path / "a.dat")
    data = WFDBRecords(str(tmp_path), source=source(2), split_by="time", window_s=1)
    with pytest.raises(MmsaeError, match=r"channel II of .*a\.hea holds no numbers"):
        data.items("train")[0]


# ---- EDF


def recordings(folder, n=4, bdf=False, **arguments):
    write_edfs(folder, n, bdf)
    given = {"window_s": 1, "val_share": 0.25, "test_share": 0.25, **arguments}
    return EDFRecordings(str(folder), source=source(3, 16), **given)


@pytest.mark.parametrize("bdf", [False, True])
def test_edf_comes_back_as_it_was_written(bdf, tmp_path):
    pytest.importorskip("mne")
    data = recordings(tmp_path, bdf=bdf, windows="events")
    assert data.subjects == ["S000", "S001", "S002", "S003"]
    assert data.factors == {"event": ("T0", "T1"), "class": ("T0", "T1")}
    for item in all_items(data, "train"):
        expected = [100 * np.random.default_rng([item["recording"], c]).normal(size=512).clip(-3, 3) for c in range(3)]
        first = int(item["offset_s"] * 128)
        wanted = torch.tensor(np.stack(expected)[:, first : first + 128], dtype=torch.float32)
        assert_close(item["signal"], wanted, atol=0.05, rtol=0)  # a step of the 16 bits is .03 µV
        assert item["labels"]["class"] == int(item["offset_s"]) % 2
        assert item["channels"] == ["Fc5", "C3", "Cz"]
        assert (item["unit"], item["rate"]) == ("µV", 128.0)
    assert next(iter(data.rows("val")))["label.event"].unique().tolist() == [-1, 0, 1]


def test_channels_of_other_rates_and_names_are_brought_together(tmp_path):
    pytest.importorskip("mne")
    t = [np.arange(4 * rate) / rate for rate in (128, 64)]
    values = [50 * np.sin(2 * np.pi * 2 * x) for x in t]
    write_edf(tmp_path / "a.edf", values, [128, 64], ["EEG Cz", "EEG Pz"])
    given = {"split_by": "time", "window_s": 2, "rate": 100, "channels": ["PZ", "Cz"], "test_share": 0}
    item = EDFRecordings(str(tmp_path), source=source(2), val_share=0.5, **given).items("train")[0]
    assert item["signal"].shape == (2, 200)
    inside = item["signal"][:, 30:-30]
    assert_close(inside[0], inside[1], atol=2.0, rtol=0)  # microvolts, of 50


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda p: cut_off(p, 2000), r"S001R01\.edf is cut off: \d+ bytes by its header, 2000 there"),
        (lambda p: cut_off(p, 100), r"the header of .*S001R01\.edf is damaged"),
        (lambda p: p.write_bytes(b"no recording at all" * 100), r"the header of .*S001R01\.edf is damaged"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"1280    ", b"2560    ")), "is damaged"),
    ],
)
def test_damaged_edf_is_named_before_anything_runs(harm, said, tmp_path):
    pytest.importorskip("mne")
    recordings(tmp_path)
    harm(tmp_path / "S001R01.edf")
    with pytest.raises(MmsaeError, match=said) as error:
        EDFRecordings(str(tmp_path), source=source(3))
    assert "\n" not in str(error.value)


# ---- Empatica E4


def sessions(root, n=3, **arguments):
    for i in range(n):
        if not (root / f"S{i}").exists():
            write_e4(root / f"S{i}")
    given = {"window_s": 20, "val_share": 0.3, "test_share": 0.3, "labels_file": "labels.csv", **arguments}
    encoder = source(len(given.get("channels") or range(6)), 32, tokens="channels", n_registers=0)
    return E4Sessions(str(root), source=encoder, **given)


def test_e4_channels_are_aligned_and_in_their_units(tmp_path):
    data = sessions(tmp_path, channels=["BVP", "ACC_z", "TEMP", "HR", "IBI"])
    item = data.items("train")[1]
    assert data.recordings[0].seconds == pytest.approx(190)  # HR starts ten seconds late
    assert item["signal"].shape == (5, 640)
    assert item["channels"] == ["BVP", "ACC_z", "TEMP", "HR", "IBI"]
    means = item["signal"].mean(1)
    assert means[1:].tolist() == pytest.approx([1 / 3**0.5, 34, 70, 0.8], abs=1e-3)
    t = 10 + item["offset_s"] + np.arange(640) / 32
    np.testing.assert_allclose(item["signal"][0, 32:-32], 50 * np.sin(2 * np.pi * 1.2 * t)[32:-32], atol=1.0)
    assert data.factors == {"event": ("rest", "stress")}
    assert data.recordings[0].events == [[0.0, 50.0, "rest"], [50.0, 190.0, "stress"]]


def test_e4_tokens_are_channels_and_seconds(tmp_path):
    rows = next(iter(sessions(tmp_path).rows("val")))
    first = rows["sample_id"] == 0
    assert rows["channel"][first].tolist() == [c for c in range(6) for _ in range(20)]
    assert rows["start_s"][first].tolist() == [float(s) for _ in range(6) for s in range(20)]
    assert rows["label.event"][first].unique().tolist() == [0]
    assert rows["label.event"][rows["sample_id"] == 4].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "EDA.csv").unlink(), r"there is no .*EDA\.csv; a session needs it"),
        (lambda f: (f / "EDA.csv").write_text("1\n4\n0.5\n"), r"EDA\.csv starts 1599999999 s apart"),
        (lambda f: shorter(f / "BVP.csv"), r"BVP\.csv ends 100 s apart from the other files"),
        (
            lambda f: (f / "TEMP.csv").write_text("1600000000\n4\nwarm\n"),
            r"TEMP\.csv holds something else than numbers",
        ),
        (lambda f: (f / "ACC.csv").write_text("1600000000\n32\n1\n"), r"ACC\.csv is no E4 file: 3 columns"),
        (lambda f: (f / "labels.csv").write_text("a,b\n1,2\n3,4\n"), r"labels\.csv is no table with the columns time"),
    ],
)
def test_damaged_sessions_are_named_before_anything_runs(harm, said, tmp_path):
    sessions(tmp_path)
    harm(tmp_path / "S1")
    with pytest.raises(MmsaeError, match=said):
        sessions(tmp_path)


def shorter(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[: 2 + len(lines) // 2]))


def test_what_an_e4_does_not_have_is_told(tmp_path):
    with pytest.raises(MmsaeError, match="an E4 has no channel 'EEG'; it has ACC_x"):
        sessions(tmp_path, channels=["EEG"])
    with pytest.raises(MmsaeError, match="holds no session"):
        E4Sessions(str(tmp_path / "nowhere"), source=source(6))


# ---- simulated, and real


def test_simulated_records_are_items_with_beats():
    data = SimulatedECGs(n_train=3, n_val=2, n_test=2, source=source(12))
    item = data.items("val")[1]
    assert data.render(item)["events"] == item["events"]
    assert data.factors["event"] == ("normal", "ventricular")
    assert next(iter(data.rows("val")))["heart_rate"].unique().numel() == 2


@needs_data("ecg_mitbih")
def test_beats_of_real_records():
    pytest.importorskip("wfdb")
    root = str(DATA / "ecg_mitbih")
    data = WFDBRecords(root, source=source(2), window_s=10, rate=100, val_share=0.3, test_share=0.3)
    counts = {r.subject: [name for *_, name in r.events] for r in data.recordings}
    assert {s: (names.count("normal"), names.count("ventricular")) for s, names in counts.items()} == {
        "100": (2239, 1), "208": (1586, 992), "800": (1846, 6)
    }  # fmt: skip
    item = data.items("train")[3]
    assert item["signal"].shape == (2, 1000)


@needs_data("ecg_12lead_cinc2021")
def test_the_miniature_reads_real_twelve_lead_records():
    pytest.importorskip("wfdb")
    reader = Signal("miniature:ecg_jepa", ["norm"], device="cpu")
    data = WFDBRecords(str(DATA / "ecg_12lead_cinc2021"), source=reader, window_s=5, rate=100, labels=["Sex", "Dx"])
    rows = next(iter(data.rows("test")))
    assert rows["acts"]["norm"].shape == (4 * 51, 64)
    assert set(data.factors["Dx:426783006"]) == {"absent", "present"}  # sinus rhythm


@needs_data("eeg_motor_imagery")
def test_real_eeg_has_more_alpha_with_closed_eyes():
    pytest.importorskip("mne")
    given = {"window_s": 4, "split_by": "recording", "val_share": 0.3, "test_share": 0.3}
    data = EDFRecordings(str(DATA / "eeg_motor_imagery"), source=source(3), channels=["O1", "OZ", "O2"], **given)
    assert data.subjects == ["S001"]
    share = {}
    for split in ("train", "val", "test"):
        for item in all_items(data, split):
            power = np.abs(np.fft.rfft(item["signal"].numpy(), axis=1)) ** 2
            f = np.fft.rfftfreq(item["signal"].shape[1], 1 / item["rate"])
            alpha = power[:, (f >= 8) & (f <= 12)].mean() / power[:, (f >= 1) & (f <= 40)].mean()
            share.setdefault(item["recording"], []).append(alpha)
    assert np.median(share[1]) > 2 * np.median(share[0])  # R02 closed, R01 open


@needs_data("e4_stress")
def test_s14_a_real_session():
    given = {"labels_file": "labels_1hz.csv", "time_column": "Time(sec)", "label_column": "Label", "split_by": "time"}
    data = E4Sessions(str(DATA / "e4_stress"), source=source(6, 32, tokens="channels"), **given)
    assert data.subjects == ["S02"]
    whole = data.prepared(0)
    assert np.linalg.norm(whole.values[:3], axis=0).mean() == pytest.approx(1, abs=0.05)  # g
    assert data.factors == {"event": ("0", "1")}
    with_heart = E4Sessions(str(DATA / "e4_stress"), source=source(2, 32), channels=["HR", "EDA"], split_by="time")
    assert with_heart.recordings[0].seconds == pytest.approx(3554, abs=1.5)
