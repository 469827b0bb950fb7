"""One made-up data set per modality, and a real LatentStore over it: what TopExamples needs to draw each kind."""

import numpy as np
from PIL import Image, ImageDraw

from mmsae.analyses import TopExamples
from mmsae.latents import LatentStore
from mmsae.sources import MODALITIES


class Shown:
    """A datamodule that only renders."""

    has_items = True

    def __init__(self, rendered):
        self.rendered, self.value_names = rendered, {}

    def items(self, split):
        return range(len(self.rendered))

    def render(self, item):
        return self.rendered[item]

    def render_stream(self, item, stream):
        shown = self.rendered[item]
        return {"kind": "text", "tokens": [shown["text"]]} if stream == "text" else shown


def store(codes, **columns):
    """Codes `[rows, latents]` as a LatentStore."""
    codes = np.asarray(codes, np.float32)
    rows = [np.flatnonzero(codes[:, j]) for j in range(codes.shape[1])]
    values = np.concatenate([codes[r, j] for j, r in enumerate(rows)])
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    columns = {name: np.asarray(column) for name, column in columns.items()}
    return LatentStore(offsets, np.concatenate(rows), values, columns, len(codes), bool((codes < 0).any()))


def top(rendered, codes, columns, **arguments):
    """The result of TopExamples."""
    return TopExamples(**arguments).run(None, store(codes, **columns), Shown(rendered))


def chirps(rate=48_000, seconds=4.0, n=3):
    """Clips with a tone of 1 kHz from 1.5 to 2 s over noise, and a rising one at the end."""
    rng = np.random.default_rng(0)
    t = np.arange(int(rate * seconds)) / rate
    found = []
    for i in range(n):
        x = 0.01 * rng.standard_normal(len(t))
        x += (0.5 - 0.1 * i) * np.sin(2 * np.pi * 1000 * t) * ((t >= 1.5) & (t < 2))
        x += 0.3 * np.sin(2 * np.pi * (300 + 600 * (t - 2.5)) * t) * (t > 2.5)
        clip = {"kind": "audio", "samples": x.astype(np.float32), "rate": rate, "text": f"a beep and a siren, take {i}"}
        found.append(clip)
    return found


def audio(rate=48_000, seconds=4.0, bands=True, **arguments):
    """Latent 0 hears the beep: bands 0 to 3 over frames of half a second; latent 1 the siren, without a band."""
    clips = chirps(rate, seconds)
    if bands:
        for clip in clips:
            clip["mel_hz"] = [50, 14_000]
    frames = int(seconds / 0.5)
    n = len(clips) * frames * 4
    sample, frame, band = (a.ravel() for a in np.meshgrid(range(len(clips)), range(frames), range(4), indexing="ij"))
    codes = np.zeros((n, 2))
    codes[(frame == 3) & (band == 1), 0] = 5 - sample[(frame == 3) & (band == 1)]
    codes[(frame == 4) & (band == 1), 0] = 0.7  # weaker than half: not part of the region
    codes[(frame >= 5) & (band == 1), 1] = 1 + 0.2 * (frame - sample)[(frame >= 5) & (band == 1)]
    columns = {"sample_id": sample, "row": band, "column": frame, "position": frame * 4 + band}
    columns |= {"start_s": 0.5 * frame, "duration_s": np.full(n, 0.5)}
    return top(clips, codes, columns, **arguments)


LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]


WAVES = ((-0.17, 0.15, 0.02), (-0.025, -0.1, 0.008), (0, 1, 0.011), (0.03, -0.2, 0.01), (0.25, 0.3, 0.05))


def beats(seconds, rate=500, ectopic=2.4):
    """Twelve leads `[12, T]` in mV, a beat every 0.8 s, one broad early beat."""
    rng = np.random.default_rng(1)
    t = np.arange(int(seconds * rate)) / rate
    gains = np.array([0.6, 1.0, 0.4, -0.8, 0.2, 0.7, -0.5, -0.3, 0.4, 1.1, 1.2, 0.9])
    x = np.zeros_like(t)
    for at in [a for a in np.arange(0.4, seconds, 0.8) if abs(a - ectopic) > 0.45]:
        for shift, height, width in WAVES:
            x += height * np.exp(-(((t - at - shift) / width) ** 2) / 2)
    x += 1.3 * np.exp(-(((t - ectopic) / 0.05) ** 2) / 2) - 0.5 * np.exp(-(((t - ectopic - 0.25) / 0.07) ** 2) / 2)
    return gains[:, None] * x + 0.01 * rng.standard_normal((12, len(t)))


def ecg(seconds=10.0, rate=500, ectopic=2.4, **arguments):
    """Latent 0 fires on all leads around the early beat, latent 1 on lead V2 around each beat."""
    values = beats(seconds, rate, ectopic)
    early = {"kind": "signal", "values": values, "rate": rate, "channels": LEADS, "unit": "mV", "text": "67 y, female"}
    early["events"] = [[ectopic - 0.1, ectopic + 0.4, "PVC"]]
    windows = int(seconds / 0.4)
    start = 0.4 * np.arange(windows)
    all_leads = (np.abs(start + 0.2 - ectopic) < 0.45) * (1.5 - np.abs(start + 0.2 - ectopic))
    codes = np.zeros((2 * windows, 2))
    codes[:windows, 0] = all_leads
    codes[windows:, 1] = 0.5 + 0.5 * (np.arange(windows) % 2)
    columns = {"sample_id": np.zeros(2 * windows, int), "start_s": np.tile(start, 2)}
    columns |= {"duration_s": np.full(2 * windows, 0.4), "channel": np.repeat([-1, 7], windows)}
    return top([early], codes, columns, **arguments)


CHANNELS = "Fp1 Fp2 F7 F3 Fz F4 F8 T3 C3 Cz C4 T4 T5 P3 Pz P4 T6 O1 O2"


def eeg(seconds=30.0, rate=256, at=17, **arguments):
    """Nineteen channels in µV; latent 0 fires in the second from `at` on two occipital channels."""
    rng = np.random.default_rng(2)
    names = CHANNELS.split()
    n = int(seconds * rate)
    t = np.arange(n) / rate
    values = 8 * rng.standard_normal((19, n)).cumsum(1) / 6
    values -= np.apply_along_axis(lambda v: np.convolve(v, np.ones(rate) / rate, "same"), 1, values)
    alpha = 30 * np.sin(2 * np.pi * 10 * t) * ((t >= at) & (t < at + 1.5))
    values[17:] += alpha
    values += 400 * rng.standard_normal((19, 1))  # electrodes drift
    values[3, 40:90] = np.nan
    recording = {"kind": "signal", "values": values, "rate": rate, "channels": names, "unit": "µV"}
    recording["text"] = "eyes closed"
    recording["events"] = [[at - 2.0, at - 2.0, "stimulus"]]
    second, channel = (a.ravel() for a in np.meshgrid(np.arange(seconds), range(19), indexing="ij"))
    codes = ((second == at) & (channel >= 17)) * 3.0 + ((second == at + 1) & (channel == 17)) * 1.5
    columns = {"sample_id": np.zeros(len(codes), int), "start_s": second, "duration_s": np.ones(len(codes))}
    return top([recording], codes[:, None], {**columns, "channel": channel}, **arguments)


def scene(size=(96, 96), at=(60, 30), colour=(220, 70, 50)):
    image = Image.new("RGB", size, (40, 60, 80))
    ImageDraw.Draw(image).ellipse([at[0] - 14, at[1] - 14, at[0] + 14, at[1] + 14], fill=colour)
    return image


def grid(n_samples, rows, columns):
    """Sample, row and column of every patch."""
    return (a.ravel() for a in np.meshgrid(range(n_samples), range(rows), range(columns), indexing="ij"))


def masks(**arguments):
    """Pictures with a nucleus in a cell; the latent fires on the nucleus, weakly around it."""
    rendered = []
    for at in ((60, 30), (30, 60), (48, 48)):
        mask = Image.new("L", (96, 96), 0)
        drawing = ImageDraw.Draw(mask)
        drawing.ellipse([at[0] - 26, at[1] - 26, at[0] + 26, at[1] + 26], fill=1)
        drawing.ellipse([at[0] - 14, at[1] - 14, at[0] + 14, at[1] + 14], fill=2)
        labels = {0: "background", 1: "cytoplasm", 2: "nucleus"}
        rendered.append({"kind": "image", "image": scene(at=at), "text": "a cell", "mask": mask, "labels": labels})
    sample, row, column = grid(3, 8, 8)
    inside = [
        np.asarray(rendered[s]["mask"])[12 * r + 6, 12 * c + 6] for s, r, c in zip(sample, row, column, strict=True)
    ]
    codes = np.array([0.0, 0.5, 3.0])[inside] * (1 + 0.1 * sample)
    return top(rendered, codes[:, None], {"sample_id": sample, "row": row, "column": column}, **arguments)


QUESTION = ["<s>", " USER", ":", " What", " is", " red", " here", "?", " ASSISTANT", ":", " A", " red", " ball", "."]


def image_text(boxes=False, **arguments):
    """A picture of 4 by 6 patches behind the first token of a question; the latent sees red and reads it."""
    n_patches = 24
    positions = [0, *range(1 + n_patches, n_patches + len(QUESTION))]
    rendered = [
        {"kind": "image_text", "image": scene((96, 64), (72, 20), colour), "tokens": QUESTION, "text": text}
        for colour, text in (((220, 70, 50), "What is red here?"), ((190, 60, 90), "And here?"))
    ]
    for medium in rendered:
        medium["positions"] = positions
    length = n_patches + len(QUESTION)
    row, column = np.full(length, -1), np.full(length, -1)
    row[1 : 1 + n_patches], column[1 : 1 + n_patches] = np.divmod(np.arange(n_patches), 6)
    codes = np.zeros((2, length))
    codes[:, 1:25][:, (row[1:25] <= 1) & (column[1:25] >= 4)] = 2.0
    codes[0, [positions[5], positions[11]]] = 3.0, 4.0
    columns = {"sample_id": np.repeat([0, 1], length), "position": np.tile(np.arange(length), 2)}
    columns |= {"row": np.tile(row, 2), "column": np.tile(column, 2)}
    if boxes:  # patches of 16 pixels; the last row of the grid is padding below the picture
        y, x = columns["row"], columns["column"]
        edges = {"x0": 16 * x, "y0": 22 * y, "x1": 16 * x + 16, "y1": np.minimum(22 * y + 22, 64)}
        columns |= {name: np.where(y >= 0, edge, -1).astype(np.float32) for name, edge in edges.items()}
        columns["image"] = np.where(y >= 0, 0, -1)
    return top(rendered, codes.reshape(-1, 1), columns, **arguments)


STEPS = [1, 201, 401, 601, 801]


def diffusion(with_image=True, **arguments):
    """The latent fires at one patch, late in the noise, twice as much with the prompt as without."""
    rendered = [
        {"kind": "diffusion", "image": scene(at=at) if with_image else None, "text": f"a ball, take {i}"}
        for i, at in enumerate(((60, 30), (30, 60)))
    ]
    shape = [a.ravel() for a in np.meshgrid([0, 1], STEPS, [1, 0], range(6), range(6), indexing="ij")]
    sample, step, conditional, row, column = shape
    hot = np.where(sample == 0, (row == 1) & (column == 3), (row == 3) & (column == 1))
    codes = hot * (step / 100) * np.where(conditional == 1, 2, 1) * (1 + 0.1 * sample)
    columns = {"sample_id": sample, "timestep": step, "conditional": conditional, "row": row, "column": column}
    return top(rendered, codes[:, None], {**columns, "sigma": step / 500}, **arguments)


def dialogue(**arguments):
    """A text with roles."""
    tokens = [" How", " many", " moons", " has", " Mars", "?", " Two", " moons", ":", " Phobos", " and", " Deimos", "."]
    rendered = [{"kind": "text", "tokens": tokens, "roles": ["user"] * 6 + ["assistant"] * 7}]
    codes = np.zeros((13, 1))
    codes[[2, 7, 9], 0] = 2, 3, 1
    return top(rendered, codes, {"sample_id": np.zeros(13, int), "position": np.arange(13)}, **arguments)


def pairs(sounds=False, **arguments):
    """Concept sets: latent 0 knows red (or beeps) in both streams, 1 fires on the first stream alone, 2 on captions."""
    colours = {"red": (220, 70, 50), "blue": (60, 80, 220), "green": (60, 190, 80)}
    names = [list(colours)[i % 3] for i in range(9)]
    places = [(20 + 7 * i, 70 - 6 * i) for i in range(9)]
    rendered = [
        {"kind": "image", "image": scene(at=at, colour=colours[name]), "text": f"a {name} ball, take {i}"}
        for i, (name, at) in enumerate(zip(names, places, strict=True))
    ]
    rendered = chirps(n=9) if sounds else rendered
    red = np.array([name == "red" for name in names])
    codes = np.zeros((18, 3))
    codes[:9, 0], codes[9:, 0] = red * (3 - 0.1 * np.arange(9)), red * (1 + 0.1 * np.arange(9))
    codes[:9, 1] = 0.5 + 0.1 * np.arange(9)
    codes[9:, 2] = 0.5 + 0.1 * np.arange(9)
    columns = {
        "sample_id": np.tile(np.arange(9), 2),
        "pair_id": np.tile(np.arange(9), 2),
        "position": np.zeros(18, int),
    }
    columns |= {"stream": np.repeat([0, 1], 9), "modality": np.repeat([MODALITIES["audio" if sounds else "image"],
                                                                       MODALITIES["text"]], 9)}  # fmt: skip
    return top(rendered, codes, columns, **arguments)


ALL = {
    "pairs": pairs,
    "sound pairs": lambda: pairs(sounds=True),
    "audio": audio,
    "audio without bands": lambda: audio(bands=False),
    "ecg": ecg,
    "eeg": eeg,
    "masks": masks,
    "image_text": image_text,
    "boxes": lambda: image_text(boxes=True),
    "diffusion": diffusion,
    "diffusion without image": lambda: diffusion(False),
    "dialogue": dialogue,
}
