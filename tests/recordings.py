"""Recordings in the formats of their fields, small and as the makers write them, and an encoder that reads any."""

import struct

import numpy as np
import pytest

from mmsae.miniatures.ecgs import LEADS, ECGs
from mmsae.sources import Signal


def source(n_channels, patch=10, **further):
    config = {"n_channels": n_channels, "patch": patch, "dim": 8, "depth": 1, "heads": 1, **further}
    return Signal("SignalTransformer", ["norm"], config=config, device="cpu")


def write_wfdb(folder, n=4, seconds=4, rate=250, names=LEADS):
    wfdb = pytest.importorskip("wfdb")
    folder.mkdir(exist_ok=True)
    for i in range(n):
        signal = ECGs("train", n, seconds=seconds, rate=rate)[i]["signal"][: len(names)].numpy()
        wfdb.wrsamp(
            f"p{i}", fs=rate, units=["mV"] * len(names), sig_name=list(names), p_signal=signal.T.astype(float),
            fmt=["16"] * len(names), write_dir=str(folder), comments=[f"Sex: {'FM'[i % 2]}", f"Dx: 1,{i % 2}"],
        )  # fmt: skip
        wfdb.wrann(
            f"p{i}", "atr", np.array([100, 300, 600, 900]), symbol=["+", "N", "V", "N"],
            aux_note=["(AFIB", "", "", ""], write_dir=str(folder),
        )  # fmt: skip
    return folder


def write_edf(path, values, rates, names, bdf=False):
    """Microvolts `[C, T_c]`, one record a second, with an annotation every second of an EDF+ file."""
    n_seconds, C = len(values[0]) // rates[0], len(values)
    annotations = 30  # samples of the annotations' channel
    counts = [*rates, annotations]
    limit = 8388607 if bdf else 32767
    fields = [
        [*names, "BDF Annotations" if bdf else "EDF Annotations"], [""] * (C + 1), ["uV"] * C + [""],
        [-1000] * C + [-1], [1000] * C + [1], [-limit - 1] * (C + 1), [limit] * (C + 1), [""] * (C + 1), counts,
        [""] * (C + 1),
    ]  # fmt: skip
    widths = (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)
    start = (b"\xffBIOSEMI" if bdf else b"0       ") + b"X X X X".ljust(80) + b"Startdate X X X X".ljust(80)
    head = start + b"01.01.20" + b"00.00.00" + str(256 * (C + 2)).encode().ljust(8)
    head += (b"BDF+C" if bdf else b"EDF+C").ljust(44) + str(n_seconds).encode().ljust(8) + b"1".ljust(8)
    head += str(C + 1).encode().ljust(4)
    body = b"".join(str(v).encode().ljust(w) for column, w in zip(fields, widths, strict=True) for v in column)
    width = 3 if bdf else 2
    records = b""
    for s in range(n_seconds):
        for channel, rate in zip(values, rates, strict=True):
            digital = np.round((channel[s * rate : (s + 1) * rate] + 1000) / 2000 * (2 * limit + 1)) - limit - 1
            records += b"".join(struct.pack("<i", int(v))[:width] for v in digital)
        note = f"+{s}\x14\x14\x00" + (f"+{s}\x151\x14T{s % 2}\x14\x00")
        records += note.encode().ljust(width * annotations, b"\x00")
    path.write_bytes(head + body + records)


def write_e4(folder, seconds=200, start=1_600_000_000, warm=34.0):
    folder.mkdir(parents=True)
    for name, rate, columns, value in (
        ("ACC", 32, 3, 64 / 3**0.5), ("BVP", 64, 1, None), ("EDA", 4, 1, 0.5), ("TEMP", 4, 1, warm), ("HR", 1, 1, 70.0)
    ):  # fmt: skip
        begin, n = (start + 10, seconds - 10) if name == "HR" else (start, seconds * rate)
        rows = np.full((n, columns), value) if value else 50 * np.sin(2 * np.pi * 1.2 * np.arange(n) / rate)[:, None]
        head = np.array([[begin] * columns, [rate] * columns])
        np.savetxt(folder / f"{name}.csv", np.concatenate([head, rows]), delimiter=",", fmt="%.6f")
    beats = "\n".join(f"{20 + 0.8 * i:.6f},0.800000" for i in range(100))
    (folder / "IBI.csv").write_text(f"{start}.000000, IBI\n{beats}\n")
    rows = "\n".join(f"{start + i},{'stress' if i >= 60 else 'rest'}" for i in range(seconds))
    (folder / "labels.csv").write_text(f"time,label\n{rows}\n")
    return folder


def write_edfs(folder, n=4, bdf=False, names=("Fc5.", "C3..", "Cz.."), rate=128, seconds=4):
    """One file for each of n subjects; channel c of subject i is drawn from seed [i, c]."""
    for i in range(n):
        draw = [np.random.default_rng([i, c]).normal(size=seconds * rate) for c in range(len(names))]
        values = [100 * x.clip(-3, 3) for x in draw]
        write_edf(folder / f"S{i:03d}R01.{'bdf' if bdf else 'edf'}", values, [rate] * len(names), list(names), bdf)
    return folder
