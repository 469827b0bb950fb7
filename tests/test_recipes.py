"""Every recipe runs: the real command on the real model class, its weights random and its size a toy's."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsae.cli.main import main

RECIPES = Path(__file__).parent.parent / "recipes"
FAST = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--threads=1"]
SMALL_CORE = ["--model.core.init_args.d_latent=64", "--data.init_args.batch_size=8"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A GPT-NeoX of Pythia's kind and a tokenizer, as `from_pretrained` finds them in a folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("neox")
    vocabulary = ["<unk>", "<|endoftext|>", "the", "a", "cat", "dog", "sees", "likes", "red", "old", "house"]
    words = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = transformers.GPTNeoXConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=64
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    (folder / "texts.txt").write_text("\n\n".join(["the old cat likes the red house", "a dog sees the cat"] * 20))
    return folder


TINY_CLIP = (
    '{"embed_dim": 32, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 10, "head_width": 16},'
    ' "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}}'
)
CASES = {
    "open_clip_vit_b_32_topk": [
        "--data.init_args.source.init_args.pretrained=null",
        f"--data.init_args.source.init_args.config={TINY_CLIP}",
    ],
    "dinov2_vit_s_batchtopk": [
        "--data.init_args.source.init_args.pretrained=false",
        "--data.init_args.source.init_args.image_size=28",
        '--data.init_args.source.init_args.config={"depth": 10, "embed_dim": 32, "num_heads": 2}',
    ],
    "resnet50_matryoshka": [
        "--data.init_args.source.init_args.weights=null",
        "--data.init_args.source.init_args.image_size=48",
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_picture_recipes_train(name, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [f"--data.init_args.root={pictures}", "--data.init_args.examples_per_forward=4"]
    main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *own, *CASES[name], *SMALL_CORE, *FAST])


def test_the_language_model_recipe_trains(language_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [
        f"--data.init_args.path={language_model / 'texts.txt'}",
        f"--data.init_args.source.init_args.model={language_model}",
    ]
    main(["fit", "--config", str(RECIPES / "pythia_70m_jumprelu.yaml"), *own, *SMALL_CORE, *FAST])


def test_the_demo_recipes_go_from_scenes_to_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--data.init_args.n_train=64", "--data.init_args.n_val=48", "--data.init_args.n_test=48", "--threads=1"]
    main(["extract", "--config", str(RECIPES / "scenes_extract.yaml"), *few, "--trainer.accelerator=cpu"])
    short = ["--trainer.max_steps=30", "--data.init_args.batch_size=256", "--model.core.init_args.d_latent=128"]
    main(["fit", "--config", str(RECIPES / "scenes_topk.yaml"), *few, *short])
    main(["evaluate", "--run", "runs/demo", "--threads=1"])
    main(["report", "--run", "runs/demo"])
    page = Path("runs/demo/report.html").read_text()
    assert "AUROC" in page
    assert "data:image/webp;base64," in page
    assert "accuracy digit" in page


def test_every_recipe_has_a_case():
    tested = {*CASES, "pythia_70m_jumprelu", "scenes_extract", "scenes_topk"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == tested
