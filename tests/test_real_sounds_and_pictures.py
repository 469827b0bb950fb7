"""Real spoken digits, photographs, cells, drawn scenes and emoji, when the data are at hand."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import AudioFolder, ImageFolder, ImageText
from mmsae.sources import CLAP, PairedEmbeddings, SceneCLIP, Timm

DATA = Path(os.environ.get("MMSAE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def needs(name):
    reason = f"no {name} beside the repository: set MMSAE_DATA to its folder"
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=reason)


@needs("fsdd")
def test_spoken_digits_are_read_split_by_speaker(tmp_path):
    pytest.importorskip("soundfile")
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    files = sorted((DATA / "fsdd" / "wav").glob("*.wav"))
    rows = [(path.name, words[int(path.name[0])], path.stem.split("_")[1]) for path in files]
    table = tmp_path / "captions.csv"
    table.write_text("file,text,speaker\n" + "".join(f"{','.join(row)}\n" for row in rows))
    source = CLAP("miniature:clap", ["audio_model.audio_encoder.norm"], device="cpu")
    data = AudioFolder(
        str(DATA / "fsdd" / "wav"), str(table), group="speaker", val_share=0, test_share=0.5, source=source
    )
    items = [data.items(split)[i] for split in ("train", "test") for i in range(len(data.items(split)))]
    assert len(items) == 20
    assert len({path["audio"].split("_")[1] for path in items[:10]}) == 1
    batch = source.read(source.collate(items))
    longest = max(len(source.render(item)["samples"]) / 16_000 for item in items)
    assert float(batch["start_s"].max()) < longest  # nothing behind the end of a word
    assert float(batch["start_s"].max()) > longest - 0.25


@needs("coco_cc")
def test_photographs_have_the_class_of_their_masks(tmp_path):
    """Sky lies above grass, sand and water, in the labels of patches as in life."""
    folder = DATA / "coco_cc"
    with (folder / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["other", *sorted({segment["supercategory"] for row in rows for segment in json.loads(row["segments"])})]
    for row in rows:
        mask = np.asarray(Image.open(folder / row["mask"]))
        table = np.zeros(256, np.uint8)
        for segment in json.loads(row["segments"]):
            table[segment["index"]] = names.index(segment["supercategory"])
        Image.fromarray(table[mask]).save(tmp_path / Path(row["mask"]).name)
    source = Timm("vit_tiny_patch16_224", ["blocks.0"], positions="patches", config={"depth": 1}, device="cpu")
    data = ImageFolder(
        str(folder / "images"), val_share=0, test_share=0.5, masks=str(tmp_path), mask_names=names, source=source
    )
    found = [batch for split in ("train", "test") for batch in data.rows(split)]
    label, row = (torch.cat([batch[key] for batch in found]) for key in ("label.mask", "row"))
    assert len(label) == 26 * 196
    assert data.value_names["mask"] == names
    sky, ground = (row[label == names.index(name)].float() for name in ("sky", "ground"))
    assert len(sky) > 100
    assert sky.mean() + 3 < ground.mean()
    shown = data.render(data.items("test")[0])
    assert shown["mask"].size == shown["image"].size
    # over whole pictures the shares of patches are those of pixels, apart from what the crop takes away
    areas = dict.fromkeys(names, 0.0)
    for one in rows:
        for segment in json.loads(one["segments"]):
            areas[segment["supercategory"]] += segment["area"] / len(rows)
    shares = [float((label == i).float().mean()) for i in range(len(names))]
    assert np.corrcoef(shares[1:], [areas[name] for name in names[1:]])[0, 1] > 0.95


@needs("cells_bbbc038")
def test_cells_are_brighter_than_what_is_around_them():
    held = np.load(DATA / "cells_bbbc038" / "nuclei_60.npz")
    items = [
        {
            "image": Image.fromarray(held["images"][i]).convert("RGB"),
            "mask": (held["instances"][i] > 0).astype(np.uint8),
            "sample_id": i,
        }
        for i in range(12)
    ]
    source = Timm("vit_tiny_patch16_224", ["patch_embed.proj:input"], config={"depth": 1}, device="cpu")
    batch = source.collate(items)
    read = source.read(batch)
    assert read["label.mask"].unique().tolist() == [0, 1]
    pixels = read["acts"]["patch_embed.proj:input"].mean(1)
    assert pixels[read["label.mask"] == 1].mean() > pixels[read["label.mask"] == 0].mean() + 0.1


@needs("nlvr")
def test_drawn_scenes_are_pairs(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(DATA / "nlvr" / "nlvr_pairs.parquet", columns=["id", "sentence", "label", "image"])
    kept = [row for row in rows.slice(0, 80).to_pylist() if row["label"]]
    lines = []
    for i, row in enumerate(kept):
        (tmp_path / f"{i}.png").write_bytes(row["image"])
        lines.append(json.dumps({"image": f"{i}.png", "caption": row["sentence"]}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = PairedEmbeddings(SceneCLIP(["visual"], device="cpu"))
    data = ImageText(str(tmp_path / "pairs.jsonl"), source=source)
    rows = [batch for split in ("train", "val", "test") for batch in data.rows(split)]
    assert sum(len(batch["pair_id"]) for batch in rows) == len(kept)
    assert data.spec.streams == {"image": 128, "text": 128}


@needs("emoji")
def test_emoji_go_through_shards(tmp_path):
    import io
    import tarfile

    parquet = pytest.importorskip("pyarrow.parquet")
    names = parquet.read_table(DATA / "emoji" / "emoji_meta.parquet", columns=["name"])["name"].to_pylist()
    images = np.load(DATA / "emoji" / "emoji_48px_rgba.npz")["images"][:60]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, pixels in enumerate(images):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            for suffix, content in (("png", stream.getvalue()), ("txt", names[i].encode())):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = ImageText(str(tmp_path), source=SceneCLIP(["visual"], device="cpu"))
    items = [data.items(split)[i] for split in ("train", "val", "test") for i in range(len(data.items(split)))]
    assert sorted(item["text"] for item in items) == sorted(names[:60])


@needs("coco_cc")
@pytest.mark.parametrize("name", ["open_clip_vit_b_16_gsae", "open_clip_vit_b_32_vlsae", "llava_1_5_7b_alignment"])
def test_recipes_of_pairs_run_on_photographs_with_captions(name, tmp_path, monkeypatch):
    """As written, with the table of COCO; only the models are small and untrained."""
    from test_recipes import FAST, RECIPES, TINY_CLIP
    from tiny_lmm import save_lmm

    from mmsae.cli.main import main

    monkeypatch.chdir(tmp_path)
    with (DATA / "coco_cc" / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    said = {row["file"]: " and a ".join(part.split(":")[0] for part in row["things"].split(";")) for row in rows}
    table = tmp_path / "pairs.csv"
    table.write_text(
        "file,text\n" + "".join(f"{file},a photo of a {words or 'scene'}\n" for file, words in said.items())
    )
    own = [f"--data.path={table}", f"--data.root={DATA / 'coco_cc'}", "--data.val_share=0.2", "--data.test_share=0.2"]
    if name.startswith("llava"):
        own += [f"--data.source.model.model={save_lmm(tmp_path / 'model', 'llava', layers=31)}"]
        own += ["--data.source.model.dtype=float32", "--data.batch_size=8"]
        main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *own, *FAST])
        return
    own += ["--data.source.model.pretrained=null", f"--data.source.model.config={TINY_CLIP.replace('64', '49408')}"]
    quick = ["--trainer.max_steps=20", "--trainer.accelerator=cpu", "--threads=1", "--data.batch_size=8"]
    small = ["--model.core.d_latent=64", "--model.core.k=8", "--model.lr_warmup_steps=1"]
    main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *own, *quick, *small])
    (run,) = Path("runs").glob("*")
    main(["evaluate", f"--run={run}", "--analyses=[CrossModal,TopExamples]", "--threads=1"])
    numbers = json.loads((run / "results.json").read_text())["CrossModal"]
    assert 0 <= numbers["dictionary/jaccard"] <= 1
    shown = json.loads((run / "results" / "TopExamples.json").read_text())
    kinds = {shown["media"][e["media"]]["kind"] for latent in shown["latents"] for e in latent["examples"]}
    assert kinds == {"image", "text"}
    assert any("a photo of a" in medium.get("tokens", [""])[0] for medium in shown["media"])
    main(["report", f"--run={run}"])
    assert "Strongest" in (run / "report.html").read_text()
