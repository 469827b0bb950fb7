"""Every recipe's data with something wrong in them: one sentence, before any training."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recordings import write_e4, write_edfs, write_wfdb
from towers import CLAP_CONFIG, tone
from words import save_llama, word_tokenizer

from mmsae.sources.weights import located

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--model.core.init_args.d_latent=64", "--data.init_args.batch_size=8", "--threads=1"]
SMALL += ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
WINDOWS = ["--data.rate=100", "--data.window_s=5", "--data.val_share=0.2", "--data.test_share=0.2"]


def words(recipe, *own):
    return ["fit", "--config", str(RECIPES / f"{recipe}.yaml"), *own, *SMALL]


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


def pictures(folder, n=6):
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def ecgs(harm, *more):
    write_wfdb(Path("ecgs"), n=6, seconds=6, rate=100)
    harm(Path("ecgs"))
    return words("ecg_jepa_topk", "--data=WFDBRecords", "--data.root=ecgs", *WINDOWS, *more)


def sounds(harm):
    soundfile = pytest.importorskip("soundfile")
    Path("sounds").mkdir()
    for i in range(6):
        soundfile.write(f"sounds/{i}.wav", tone(200 + 50 * i, 0.5), 16_000)
    harm(Path("sounds"))
    model = [f"--data.init_args.source.init_args.config={json.dumps(CLAP_CONFIG)}"]
    model += ["--data.init_args.source.init_args.model=random"]
    return words("clap_htsat_batchtopk", "--data.init_args.root=sounds", *model)


def images(harm):
    pictures(Path("pictures"))
    harm(Path("pictures"))
    model = ["pretrained=false", "image_size=28", 'config={"depth": 10, "embed_dim": 32, "num_heads": 2}']
    own = [f"--data.init_args.source.init_args.{argument}" for argument in model]
    return words("dinov2_vit_s_batchtopk", "--data.init_args.root=pictures", *own)


def wide(path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path, np.full((40, 48), 4000, np.uint16))


def texts(content, file="a.txt", harm=lambda model: None):
    folder = Path("texts")
    folder.mkdir()
    (folder / file).write_bytes(content)
    model = save_llama(Path("model"), word_tokenizer(), num_hidden_layers=4)
    harm(Path(model))
    own = [f"model={model}", "hook_points=[model.layers.3]"]
    given = [f"--data.init_args.source.init_args.{argument}" for argument in own]
    return words("pythia_70m_jumprelu", "--data.init_args.path=texts", *given)


def conversations(rows):
    pictures(Path("pictures"))
    Path("talks.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    own = ["model=miniature:lmm", "hook_points=[model.language_model.layers.2]", "dtype=float32"]
    given = [f"--data.init_args.source.init_args.{argument}" for argument in own]
    return words(
        "llava_1_5_7b_topk", "--data.init_args.path=talks.jsonl", "--data.init_args.images=pictures", *given,
        "--model.core.init_args.k=8",
    )  # fmt: skip


def shards(harm):
    pictures(Path("pictures"))
    with tarfile.open("shard.tar", "w") as tar:
        for i in range(6):
            for suffix, content in (("png", Path(f"pictures/{i}.png").read_bytes()), ("txt", b"a red three")):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    harm(Path("shard.tar"))
    return words("scene_pairs_crosscoder", "--data=ImageText", "--data.path=shard.tar")


def bands(harm):
    write_edfs(Path("."), 5, names=["a", "b"], rate=160)
    harm(Path("S003R01.edf"))
    given = "--data.init_args.source.init_args"
    model = [f"{given}.model=SignalTransformer", f"{given}.hook_points=[norm]"]
    model += [f'{given}.config={{"n_channels": 2, "patch": 16, "dim": 16, "depth": 1, "heads": 2}}']
    return words(
        "eeg_motor_imagery_batchtopk", "--data.init_args.root=.", "--data.init_args.window_s=1", *model,
        "--model.core.init_args.k=4",
    )  # fmt: skip


def wrists(harm):
    for i in range(4):
        write_e4(Path("e4") / f"S{i}", seconds=100)
    harm(Path("e4/S2"))
    own = ["--data.init_args.root=e4", "--data.init_args.labels_file=labels.csv", "--data.init_args.window_s=8"]
    return words("e4_sessions_batchtopk", *own)


def without_weights(folder):
    shutil.copytree(located("miniature:ecg_jepa"), "encoder")
    Path("encoder/model.safetensors").unlink()


TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red three"}]
GOOD = [{"image": f"{i}.png", "conversations": TURNS} for i in range(6)]
CASES = {
    "a WFDB record without its header": (lambda: ecgs(lambda f: (f / "p5.hea").unlink()), "p5.dat has no header"),
    "a WFDB record that is cut off": (lambda: ecgs(lambda f: cut(f / "p5.dat", 900)), "p5.dat is cut off"),
    "records of another rate": (lambda: ecgs(lambda f: None, "--data.rate=250"), "250 Hz, but miniature:ecg_jepa"),
    "an encoder without weights": (
        lambda: ecgs(without_weights, "--data.source.model=encoder"), "there is no weight file",
    ),
    "a hook point that is not there": (
        lambda: ecgs(lambda f: None, "--data.source.hook_points=[blocks.7]"), "no module that matches 'blocks.7'",
    ),
    "an EDF file that is cut off": (lambda: bands(lambda p: cut(p, 2000)), "S003R01.edf is cut off"),
    "an EDF file of text": (lambda: bands(lambda p: p.write_text("hello")), "the header of S003R01.edf is damaged"),
    "a session without skin conductance": (lambda: wrists(lambda f: (f / "EDA.csv").unlink()), "there is no e4/S2/EDA"),
    "a session whose movement is cut off": (lambda: wrists(lambda f: cut(f / "ACC.csv", 5000)), "apart from the other"),
    "a sound that is cut off, of any split": (lambda: sounds(lambda f: cut(f / "3.wav", 5000)), "3.wav' is cut off"),
    "a sound without samples": (lambda: sounds(lambda f: cut(f / "2.wav", 44)), "2.wav"),
    "text that is called a sound": (lambda: sounds(lambda f: (f / "2.wav").write_text("hi")), "2.wav' cannot be read"),
    "a folder without sounds": (lambda: sounds(lambda f: [p.unlink() for p in f.iterdir()]), "holds no sounds"),
    "a picture that is cut off": (lambda: images(lambda f: [cut(p, 900) for p in f.iterdir()]), "cannot be read"),
    "a TIFF of 16 bits": (lambda: images(lambda f: wide(f / "0.tif")), "read it with --data=ScienceImages"),
    "a folder without pictures": (lambda: images(lambda f: [p.unlink() for p in f.iterdir()]), "holds no pictures"),
    "text in another encoding": (lambda: texts("a café".encode("latin-1")), "is not UTF-8 text"),
    "a Parquet file that is damaged": (lambda: texts(b"PAR1" + bytes(99), "a.parquet"), "cannot be read as Parquet"),
    "a model without weights": (
        lambda: texts(b"the cat sat", harm=lambda m: (m / "model.safetensors").unlink()), "holds no model",
    ),
    "a model without a tokenizer": (
        lambda: texts(b"the cat sat", harm=lambda m: [p.unlink() for p in m.glob("tokenizer*")]), "holds no tokenizer",
    ),
    "a conversation without its picture": (
        lambda: conversations([*GOOD, {"conversations": TURNS}]), "there is an <image> but no picture for it",
    ),
    "a picture that a conversation names": (
        lambda: conversations([*GOOD, {"image": "9.png", "conversations": TURNS}]), "there is no picture",
    ),
    "a shard that is cut off": (lambda: shards(lambda p: cut(p, 3000)), "cannot be read (unexpected end of data)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_sentence_before_any_training(name, refused):
    make, said = CASES[name]
    assert said in refused(*make())


def test_a_weight_file_that_diffusers_lacks_is_one_sentence(refused):
    """It logs an error of its own besides."""
    pytest.importorskip("diffusers")
    from tiny_diffusion import save_pipeline

    save_pipeline("sd", Path("sd"), deep=True)
    Path("sd/unet/diffusion_pytorch_model.safetensors").unlink()
    Path("prompts.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\ni\nj")
    own = ["--data.init_args.path=prompts.txt", "--data.init_args.source.init_args.model=sd"]
    said = refused(*words("sd_1_5_up_1_1_batchtopk", *own))
    assert "the folder 'sd' holds no pipeline that diffusers can load" in said


def test_without_a_connection_the_sentence_comes_at_once(refused, monkeypatch):
    """The hub's library would try again for most of a minute."""
    import time

    from huggingface_hub import constants

    from mmsae.sources import weights

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    weights.hub_or_cache.cache_clear()
    start = time.monotonic()
    said = refused(*texts_of_a_hub())
    assert "neither a local folder nor can it be fetched from the hub" in said
    assert time.monotonic() - start < 15
    assert constants.HF_HUB_OFFLINE
    weights.hub_or_cache.cache_clear()


def texts_of_a_hub():
    Path("a.txt").write_text("the cat\n\n" * 30)
    return words("pythia_70m_jumprelu", "--data.init_args.path=a.txt")
