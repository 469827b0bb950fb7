"""What every datamodule promises; a new one fails here until it has a case."""

import json

import numpy as np
import pytest
import recordings
import torch
from PIL import Image
from tiny import Vectors, identity_model, planted, vectors_source, write_store
from towers import CLAP_CONFIG, fashion, tone
from words import dialogue, save_llama, word_tokenizer

from datamodules import (
    ActivationDataModule,
    AudioFolder,
    Conversations,
    Dialogues,
    E4Sessions,
    EDFRecordings,
    HuggingFaceText,
    ImageFolder,
    ImageText,
    Prompts,
    ScenePrompts,
    SceneQuestions,
    Scenes,
    ScienceImages,
    SignalArrays,
    SimulatedE4Sessions,
    SimulatedECGs,
    Sounds,
    Stored,
    Stories,
    TextFiles,
    TorchvisionData,
    WFDBRecords,
)  # fmt: skip
from datamodules.base import SPLITS
from mmsae.errors import MmsaeError
from mmsae.sources import CLAP, CausalLM, Custom
from mmsae.subclasses import subclasses


def pictures(folder, n=20):
    for i in range(n):
        path = folder / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(path)
    return str(folder)


def arrays(folder, n=20):
    for i in range(n):
        np.save(folder / f"{i:02d}.npy", np.random.default_rng(i).integers(0, 60000, (8, 8), dtype=np.uint16))
    return str(folder)


def texts(folder, n=20):
    (folder / "a.txt").write_text("\n\n".join(f"document number {i}" for i in range(n)))
    return str(folder)


def prompts(folder, n=20):
    (folder / "prompts.txt").write_text("\n".join(f"picture number {i}" for i in range(n)))
    return str(folder / "prompts.txt")


def dialogues(folder, n=20):
    rows = [json.dumps({"messages": dialogue(f"the cat {i}", "sat on a mat")}) for i in range(n)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    return str(folder / "a.jsonl")


def rows_on_disk(folder, n=20):
    datasets = pytest.importorskip("datasets")
    if not (folder / "rows").exists():
        datasets.Dataset.from_dict({"text": [f"row number {i}" for i in range(n)]}).save_to_disk(folder / "rows")
    return str(folder / "rows")


def sounds(folder, n=20):
    soundfile = pytest.importorskip("soundfile")
    for i in range(n):
        path = folder / ("bell" if i % 2 else "horn") / f"{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(200 + 20 * i, 0.1), 16_000)
    return str(folder)


def captions(folder, n=20):
    pictures(folder, n)
    paths = sorted(folder.rglob("*.png"))
    rows = [f"{path},picture {i}" for i, path in enumerate(paths)]
    (folder / "captions.csv").write_text("\n".join(["file,text", *rows]))
    return str(folder / "captions.csv")


def conversations(folder, n=20):
    pictures(folder, n)
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
    rows = [json.dumps({"image": str(path), "conversations": turns}) for path in sorted(folder.rglob("*.png"))]
    (folder / "talks.jsonl").write_text("\n".join(rows))
    return str(folder / "talks.jsonl")


def chat_source(folder):
    return CausalLM(save_llama(folder / "model", word_tokenizer()), ["model.layers.0"], device="cpu")


def sound_source():
    return CLAP("none", ["audio_projection"], config=CLAP_CONFIG, device="cpu")


def image_source(side):
    return Custom(identity_model, ["0"], input_shape=[3, side, side], device="cpu")


def array_source(side):
    return Custom(identity_model, ["0"], inputs="array", input_shape=[3, side, side], device="cpu")


def text_source():
    """From the last two letters of a text to numbers, without a tokenizer."""
    source = Custom(identity_model, ["0"], modality="text", input_shape=[1, 2], device="cpu")
    source.example_items = lambda: [{"text": "ab", "sample_id": 0}]
    source.tensors = lambda items: {"input": torch.tensor([[[float(ord(c)) for c in i["text"][-2:]]] for i in items])}
    return source


def edfs(folder):
    pytest.importorskip("mne")
    return str(recordings.write_edfs(folder, n=5))


def sessions(folder):
    for i in range(4):
        if not (folder / f"S{i}").exists():
            recordings.write_e4(folder / f"S{i}", seconds=80, warm=33.0 + i)
    return str(folder)


def signal_arrays(folder):
    values = np.random.default_rng(0).normal(size=(12, 3, 200))
    np.savez(folder / "signals.npz", signals=values, sex=np.array(["f", "m"] * 6))
    return str(folder / "signals.npz")


CASES = {
    "ImageFolder": lambda tmp, **a: ImageFolder(pictures(tmp), source=image_source(8), **a),
    "Scenes": lambda tmp, **a: Scenes(n_train=12, n_val=5, n_test=5, source=image_source(64), **a),
    "ScienceImages": lambda tmp, **a: ScienceImages(arrays(tmp), source=array_source(8), channels=[0, 0, 0], **a),
    "Dialogues": lambda tmp, **a: Dialogues(dialogues(tmp), source=chat_source(tmp), **a),
    "HuggingFaceText": lambda tmp, **a: HuggingFaceText(rows_on_disk(tmp), source=text_source(), **a),
    "AudioFolder": lambda tmp, **a: AudioFolder(sounds(tmp), source=sound_source(), **a),
    "ImageText": lambda tmp, **a: ImageText(captions(tmp), source=image_source(8), **a),
    "Sounds": lambda tmp, **a: Sounds(n_train=12, n_val=5, n_test=5, source=sound_source(), **a),
    "TorchvisionData": lambda tmp, **a: TorchvisionData("FashionMNIST", fashion(tmp), source=image_source(28), **a),
    "Conversations": lambda tmp, **a: Conversations(conversations(tmp), source=image_source(8), **a),
    "SceneQuestions": lambda tmp, **a: SceneQuestions(n_train=12, n_val=5, n_test=5, source=image_source(64), **a),
    "Stories": lambda tmp, **a: Stories(n_train=12, n_val=5, n_test=5, source=text_source(), **a),
    "SimulatedE4Sessions": lambda tmp, **a: SimulatedE4Sessions(
        n_train=12, n_val=5, n_test=5, seconds=8, source=recordings.source(6), **a
    ),
    "SimulatedECGs": lambda tmp, **a: SimulatedECGs(n_train=12, n_val=5, n_test=5, source=recordings.source(12), **a),
    "WFDBRecords": lambda tmp, **a: WFDBRecords(
        str(recordings.write_wfdb(tmp, n=5)), source=recordings.source(12), window_s=2, labels=["Sex"], **a
    ),
    "EDFRecordings": lambda tmp, **a: EDFRecordings(edfs(tmp), source=recordings.source(3), window_s=1, **a),
    "E4Sessions": lambda tmp, **a: E4Sessions(
        sessions(tmp), labels_file="labels.csv", window_s=64, source=recordings.source(6), **a
    ),
    "SignalArrays": lambda tmp, **a: SignalArrays(
        signal_arrays(tmp), 100, labels=["sex"], source=recordings.source(3), window_s=1, **a
    ),
    "Prompts": lambda tmp, **a: Prompts(prompts(tmp), source=text_source(), **a),
    "ScenePrompts": lambda tmp, **a: ScenePrompts(n_train=12, n_val=5, n_test=5, source=text_source(), **a),
    "Stored": lambda tmp, **a: Stored(store=str(write_store(tmp, planted(300))), **a),
    "TextFiles": lambda tmp, **a: TextFiles(texts(tmp), source=text_source(), **a),
}


def ours():
    return {n: c for n, c in subclasses(ActivationDataModule).items() if c.__module__.startswith("datamodules.")}


def test_every_datamodule_has_a_case():
    assert set(CASES) == set(ours())


@pytest.fixture(params=sorted(CASES))
def name(request):
    return request.param


@pytest.fixture
def data(name, tmp_path):
    return CASES[name](tmp_path, batch_size=8, chunk_rows=64, examples_per_forward=4)


def content(item):
    keys = ("signal", "image", "audio", "text", "messages", "input")
    held = next(item[key] for key in keys if item.get(key) is not None)
    return np.asarray(held).tobytes() if isinstance(held, Image.Image | np.ndarray | torch.Tensor) else str(held)


def test_splits_never_overlap_and_never_change(data, name, tmp_path):
    if not data.has_items:
        with pytest.raises(MmsaeError, match="has no examples, only stored activations"):
            data.items("train")
        return
    found = {split: [content(data.items(split)[i]) for i in range(len(data.items(split)))] for split in SPLITS}
    assert all(found.values())
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(found[a]) & set(found[b])
    again = CASES[name](tmp_path)
    assert {s: [content(again.items(s)[i]) for i in range(len(again.items(s)))] for s in SPLITS} == found
    for split in SPLITS:
        assert [data.items(split)[i]["sample_id"] for i in range(len(found[split]))] == list(range(len(found[split])))


def test_every_row_comes_once_per_epoch(data):
    for loader, split in ((data.val_dataloader(), "val"), (data.test_dataloader(), "test")):
        rows = [batch["sample_id"] for batch in loader]
        assert len(rows) == len(loader)
        assert torch.equal(torch.cat(rows), torch.cat([b["sample_id"] for b in data.rows(split)]))
    data.columns = ["sample_id"]
    trained = torch.cat([batch["sample_id"] for batch in data.train_dataloader()]).sort().values
    in_order = torch.cat([batch["sample_id"] for batch in data.rows("train")])
    assert torch.equal(trained, in_order.sort().values)
    assert not torch.equal(torch.cat([b["sample_id"] for b in data.train_dataloader()]), in_order)  # shuffled


def test_rows_have_the_width_of_the_spec_and_lie_on_the_cpu(data):
    for batch in data.rows("val"):
        assert {name: x.shape[1] for name, x in batch["acts"].items()} == data.spec.streams
        assert {t.device.type for t in (*batch["acts"].values(), batch["sample_id"])} == {"cpu"}


def test_labels_are_indices_into_the_factors(data):
    names = data.value_names
    if not data.has_items or not names:
        return
    for split in SPLITS:
        for i in range(len(data.items(split))):
            for factor, value in data.items(split)[i]["labels"].items():
                assert 0 <= value < len(names[factor])
    for batch in data.rows("val"):
        assert {f"label.{factor}" for factor in names} <= set(batch)


def test_items_can_be_shown(data):
    if data.has_items:
        assert data.render(data.items("test")[0])["kind"] in ("image", "text", "audio", "signal")


def test_identity_is_json_and_differs_by_split(data):
    if not data.has_items:
        return
    train, val = data.identity("train"), data.identity("val")
    assert json.loads(json.dumps(train)) == train
    assert train != val


def test_neither_model_nor_store_is_told(name, tmp_path):
    CASES[name](tmp_path)
    files = ("TextFiles", "Dialogues", "HuggingFaceText", "ImageText", "Conversations")
    by_path = {key: {"path": str(tmp_path)} for key in files}
    by_root = {key: {"root": str(tmp_path)} for key in ("ImageFolder", "AudioFolder", "ScienceImages")}
    by_root |= {key: {"root": str(tmp_path)} for key in ("WFDBRecords", "EDFRecordings", "E4Sessions")}
    by_path["Prompts"] = {"path": str(tmp_path / "prompts.txt")}
    by_path["SignalArrays"] = {"path": str(tmp_path), "array_rate": 100}
    made = {**by_root, **by_path, "TorchvisionData": {"name": "FashionMNIST"}}.get(name, {})
    with pytest.raises(MmsaeError, match=rf"{name} needs activations: give --data\.source .* or --data\.store"):
        ours()[name](**made)


@pytest.mark.parametrize("argument", ["batch_size", "chunk_rows", "block_rows", "examples_per_forward"])
def test_sizes_are_checked(argument):
    with pytest.raises(MmsaeError, match=f"{argument}=0 is out of range"):
        Scenes(source=image_source(64), **{argument: 0})


def base(n=23, **arguments):
    data = ActivationDataModule(source=vectors_source(), examples_per_forward=4, **arguments)
    data.items = lambda split: Vectors(n, 0)
    return data


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_item_batches_go_on_and_are_shared(skip, world_size):
    seen = []
    for rank in range(world_size):
        whole = [b["sample_id"].tolist() for b in base().item_batches("train", 0, rank, world_size)]
        rest = [b["sample_id"].tolist() for b in base().item_batches("train", skip, rank, world_size)]
        assert rest == whole[skip:]
        seen += [i for batch in whole for i in batch]
    assert sorted(seen) == list(range(23))


def test_an_empty_split_is_told():
    data = base(0)
    for use in (lambda: data.item_batches("val"), data.train_dataloader):
        with pytest.raises(MmsaeError, match=r"the (val|train) split of ActivationDataModule is empty"):
            use()


def test_examples_without_a_model_are_told(tmp_path):
    data = Scenes(store=str(write_store(tmp_path, planted(50))))
    with pytest.raises(MmsaeError, match=r"running the model on Scenes needs --data\.source"):
        data.item_batches("test")
    assert data.source is None
    assert data.render(data.items("test")[0])["kind"] == "image"


def test_the_store_of_a_missing_split_is_named(tmp_path):
    with pytest.raises(MmsaeError, match=r"no activation store at .*train: make one with mmsae extract"):
        _ = Stored(store=str(tmp_path)).spec


def test_stored_rows_are_shared_by_ranks(tmp_path):
    from datamodules.base import Rows

    data = Stored(store=str(write_store(tmp_path, planted(300))), batch_size=64)
    parts = [torch.cat([b["sample_id"] for b in Rows(data, "val", rank, 2)]) for rank in range(2)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(300))
    for rank, whole in enumerate(parts):
        first, left = next(iter(Rows(data, "val", rank, 2))), Rows(data, "val", rank, 2, skip=1)
        assert len(list(left)) == len(left)
        assert torch.equal(torch.cat([b["sample_id"] for b in left]), whole[len(first["sample_id"]) :])
    assert [len(list(Rows(data, "val", r, 2))) for r in range(2)] == [len(Rows(data, "val", r, 2)) for r in range(2)]


def test_columns_ride_along(tmp_path):
    data = Stored(store=str(write_store(tmp_path, planted(300))), batch_size=64, columns=["sample_id"])
    assert set(next(iter(data.train_dataloader()))) == {"acts", "sample_id"}
    data = Stored(store=str(tmp_path), batch_size=64, columns=["nothing"])
    with pytest.raises(MmsaeError, match="carries no column 'nothing'; it has sample_id"):
        data.train_dataloader()
