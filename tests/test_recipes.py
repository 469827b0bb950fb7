"""Every recipe runs: the real command on the real model class, its weights random and its size a toy's."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from towers import CLAP_CONFIG, clip_config, save_clap, save_clip, tone

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


def test_the_attention_output_recipe_trains(language_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = '{"model_type": "gpt2", "vocab_size": 11, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128}'
    own = [
        f"--data.init_args.path={language_model / 'texts.txt'}",
        f"--data.init_args.source.init_args.model={language_model}",
        f"--data.init_args.source.init_args.config={config}",
    ]
    main(["fit", "--config", str(RECIPES / "gpt2_attention_output.yaml"), *own, *SMALL_CORE, *FAST])


def test_the_dialogue_recipe_trains(language_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = [{"role": "user", "content": "the old cat"}, {"role": "assistant", "content": "likes the red house"}]
    Path("dialogues.jsonl").write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(20)))
    config = (
        '{"model_type": "qwen2", "vocab_size": 11, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 19,'
        ' "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}'
    )
    template = "{% for message in messages %}{{ message.content }} <|endoftext|> {% endfor %}"
    own = [
        "--data.init_args.path=dialogues.jsonl",
        "--data.init_args.chunk_rows=64",
        f"--data.init_args.source.init_args.model={language_model}",
        f"--data.init_args.source.init_args.config={config}",
        f"--data.init_args.source.init_args.chat_template={template}",
    ]
    main(["fit", "--config", str(RECIPES / "qwen2_5_7b_instruct_fast.yaml"), *own, *SMALL_CORE, *FAST])


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


def test_the_microscopy_recipe_trains(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(10):
        tifffile.imwrite(
            f"{i}.tif", rng.integers(0, 4000, (70, 90), dtype=np.uint16), compression="zlib", tile=(16, 16)
        )
    hiera = (
        '{"model_type": "sam2_hiera_det_model", "hidden_size": 24, "blocks_per_stage": [1, 2, 7, 2],'
        ' "embed_dim_per_stage": [24, 48, 96, 192], "num_attention_heads_per_stage": [1, 2, 4, 8],'
        ' "window_size_per_stage": [8, 4, 8, 4], "global_attention_blocks": [5, 7, 9], "image_size": [128, 128]}'
    )
    vision = f'{{"backbone_config": {hiera}, "backbone_channel_list": [192, 96, 48, 24], "fpn_hidden_size": 32}}'
    own = [
        "--data.init_args.root=.",
        "--data.init_args.tile=64",
        "--data.init_args.examples_per_forward=4",
        f'--data.init_args.source.init_args.config={{"model_type": "sam2", "vision_config": {vision}}}',
    ]
    main(["fit", "--config", str(RECIPES / "sam2_hiera_microscopy_batchtopk.yaml"), *own, *SMALL_CORE, *FAST])


def test_the_clap_recipe_trains(tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    Path("sounds").mkdir()
    for i in range(5):
        soundfile.write(f"sounds/{i}.wav", tone(200 + 50 * i, 0.5), 16_000)
    own = [
        "--data.init_args.source.init_args.model=random",
        f"--data.init_args.source.init_args.config={json.dumps(CLAP_CONFIG)}",
    ]
    main(["fit", "--config", str(RECIPES / "clap_htsat_batchtopk.yaml"), *own, *SMALL_CORE, *FAST])


def test_the_siglip_recipe_trains(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [
        f"--data.init_args.root={pictures}",
        "--data.init_args.source.init_args.model=random",
        f"--data.init_args.source.init_args.config={json.dumps(clip_config('siglip'))}",
    ]
    main(["fit", "--config", str(RECIPES / "siglip_so400m_matryoshka.yaml"), *own, *SMALL_CORE, *FAST])


@pytest.mark.parametrize(
    "name",
    [
        "sounds_batchtopk", "scene_pairs_crosscoder", "ecg_jepa_topk", "stories_batchtopk", "scene_questions_batchtopk",
        "e4_miniature_batchtopk",
        "scene_questions_saev", "scene_pairs_gsae", "scene_pairs_vlsae", "sound_pairs_mgsae",
    ],
)  # fmt: skip
def test_the_recipes_of_miniatures_train(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--data.init_args.n_train=16", "--data.init_args.n_val=8", "--data.init_args.n_test=8"]
    main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *few, *SMALL_CORE, *FAST])


@pytest.mark.parametrize(
    ("name", "family", "layers", "core"),
    [
        ("llava_1_5_7b_topk", "llava", 25, "k=8"),
        ("qwen2_5_vl_3b_batchtopk", "qwen2_5_vl", 27, "k=8"),
        ("llava_next_mistral_saev", "llava_next", 16, "target_l0=8"),
        ("llava_next_vicuna_saev", "llava_next", 16, "k=8"),
        ("chameleon_7b_saev", "chameleon", 16, "target_l0=8"),
    ],
)
def test_the_multimodal_recipes_train(name, family, layers, core, pictures, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from tiny_lmm import save_lmm

    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "<image>\nwhat is the cat ?"}, {"from": "gpt", "value": "a red cat"}]
    rows = [json.dumps({"image": f"{i}.png", "conversations": turns}) for i in range(10)]
    Path("talks.jsonl").write_text("\n".join(rows))
    own = [
        "--data.init_args.path=talks.jsonl",
        f"--data.init_args.images={pictures}",
        "--data.init_args.chunk_rows=64",
        f"--data.init_args.source.init_args.model={save_lmm(tmp_path / 'model', family, layers=layers)}",
    ]
    core = f"--model.core.init_args.{core}"
    main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *own, *SMALL_CORE, core, *FAST])


@pytest.fixture
def captioned(pictures, tmp_path):
    """A table of pictures with captions."""
    words = ("red dog", "blue bell", "the sound", "a dog", "red bell")
    rows = [f"{pictures / f'{i}.png'},{words[i % 5]}" for i in range(10)]
    path = tmp_path / "pairs.csv"
    path.write_text("file,text\n" + "\n".join(rows))
    return path


@pytest.mark.parametrize("name", ["open_clip_vit_b_16_gsae", "open_clip_vit_b_32_vlsae"])
def test_the_recipes_of_pairs_train_on_open_clip(name, captioned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [
        f"--data.init_args.path={captioned}",
        "--data.init_args.source.init_args.model.init_args.pretrained=null",
        f"--data.init_args.source.init_args.model.init_args.config={TINY_CLIP.replace('64', '49408')}",
        "--model.core.init_args.k=8",
    ]
    main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *own, *SMALL_CORE, *FAST])


@pytest.mark.parametrize(("family", "point"), [("siglip", "vision_model.head"), ("clip", "visual_projection")])
def test_the_recipe_of_pairs_trains_on_siglip_and_clip(family, point, captioned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [
        f"--data.init_args.path={captioned}",
        f"--data.init_args.source.init_args.model.init_args.model={save_clip(tmp_path / family, family)}",
        f"--data.init_args.source.init_args.model.init_args.hook_points=[{point}]",
    ]
    main(["fit", "--config", str(RECIPES / "siglip_base_mgsae.yaml"), *own, *SMALL_CORE, *FAST])


def test_the_recipe_of_music_with_captions_trains(tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    Path("sounds").mkdir()
    for i in range(10):
        soundfile.write(f"sounds/{i}.wav", tone(200 + 50 * i, 0.5), 16_000)
    Path("captions.csv").write_text("file,text\n" + "".join(f"{i}.wav,sound of the bell\n" for i in range(10)))
    own = [f"--data.init_args.source.init_args.model.init_args.model={save_clap(tmp_path / 'clap')}"]
    main(["fit", "--config", str(RECIPES / "clap_music_mgsae.yaml"), *own, *SMALL_CORE, *FAST])


@pytest.mark.parametrize(
    ("name", "family", "layers"),
    [("llava_1_5_7b", "llava", 31), ("qwen2_5_vl_3b", "qwen2_5_vl", 27), ("scene_lmm", None, None)],
)
def test_the_two_stages_of_vl_sae_train_on_multimodal_models(name, family, layers, captioned, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from tiny_lmm import save_lmm

    monkeypatch.chdir(tmp_path)
    own = ["--data.init_args.n_train=16", "--data.init_args.n_val=8", "--data.init_args.n_test=8"]
    if family:
        model = save_lmm(tmp_path / "model", family, layers=layers)
        given = {"model": model, "dtype": "float32"}
        own = [f"--data.init_args.source.init_args.model.init_args.{key}={value}" for key, value in given.items()]
        own += [f"--data.init_args.path={captioned}"]
    small = ["--data.init_args.batch_size=8", "--trainer.accelerator=cpu", "--threads=1", "--model.lr_warmup_steps=0"]
    first = ["--model.core.init_args.d_latent=12", "--trainer.max_steps=2"]
    main(["fit", "--config", str(RECIPES / f"{name}_alignment.yaml"), *own, *small, *first])
    (run,) = Path("runs").glob("*")
    second = ["--model.core.init_args.d_latent=64", "--model.core.init_args.k=8", "--model.core.init_args.aligned=12"]
    second += [f"--model.alignment={run}", "--trainer.fast_dev_run=true"]
    main(["fit", "--config", str(RECIPES / f"{name}_vlsae.yaml"), *own, *small, *second])


def test_the_eeg_recipe_trains(tmp_path, monkeypatch):
    pytest.importorskip("mne")
    pytest.importorskip("braindecode", reason="no braindecode")
    from recordings import write_edfs

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "eeg"
    folder.mkdir()
    names = [f"E{i}" for i in range(4)]
    config = '{"n_chans": 4, "n_times": 160, "n_outputs": 2, "sfreq": 160}'
    own = [
        f"--data.init_args.root={write_edfs(folder, 5, names=names, rate=160)}",
        "--data.init_args.window_s=1",
        f"--data.init_args.source.init_args.config={config}",
    ]
    main(["fit", "--config", str(RECIPES / "eeg_motor_imagery_batchtopk.yaml"), *own, *SMALL_CORE, *FAST])


def test_the_recipe_of_wristbands_trains(tmp_path, monkeypatch):
    from recordings import write_e4

    monkeypatch.chdir(tmp_path)
    for i in range(4):
        write_e4(tmp_path / "e4" / f"S{i}", seconds=100)
    own = ["--data.init_args.root=e4", "--data.init_args.labels_file=labels.csv", "--data.init_args.stride_s=16"]
    main(["fit", "--config", str(RECIPES / "e4_sessions_batchtopk.yaml"), *own, *SMALL_CORE, *FAST])


@pytest.mark.parametrize(
    ("name", "kind", "own"),
    [
        ("sdxl_turbo_down_2_1_topk", "sdxl", ["size=16", "variant=null", "dtype=float32", "pictures=false"]),
        ("sd_1_5_up_1_1_batchtopk", "sd", ["steps=2", "dtype=float32"]),
    ],
)
def test_the_diffusion_recipes_train(name, kind, own, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from tiny_diffusion import save_pipeline

    monkeypatch.chdir(tmp_path)
    save_pipeline(kind, tmp_path / kind, deep=True)
    Path("prompts.txt").write_text("\n".join("abcdefghijkl"))
    given = [f"--data.init_args.source.init_args.{argument}" for argument in (f"model={tmp_path / kind}", *own)]
    main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *given, *SMALL_CORE, "--model.core.init_args.k=8", *FAST])


@pytest.mark.parametrize(
    ("name", "kind", "point"),
    [
        ("pixart_xl_temporal", "pixart", "transformer.transformer_blocks.1"),
        ("dit_xl_2_temporal", "dit", "transformer.transformer_blocks.1"),
        ("sd3_medium_batchtopk", "sd3", "transformer.transformer_blocks.0:delta[1]"),
        ("flux_schnell_topk", "flux", "transformer.transformer_blocks.1:delta[1]"),
    ],
)
def test_the_diffusion_transformer_recipes_train(name, kind, point, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from tiny_diffusion import save_pipeline

    monkeypatch.chdir(tmp_path)
    save_pipeline(kind, tmp_path / kind)
    sizes = ["size=16"] if kind in ("flux", "sd3") else []
    own = [f"model={tmp_path / kind}", f'hook_points=["{point}"]', "steps=2", "dtype=float32", *sizes]
    given = [f"--data.init_args.source.init_args.{argument}" for argument in own]
    data = ["--data=embedded_prompts.EmbeddedPrompts", f"--data.init_args.path={kind}.txt"]
    Path(f"{kind}.txt").write_text("any")
    if kind == "dit":  # reads names of classes, as anybody's file has them
        Path("classes.txt").write_text("\n".join(["cat", "dog", "hound"]))
        data = []
        given += ["--data.init_args.val_share=0.34", "--data.init_args.test_share=0.33"]
    main(
        [
            "fit",
            "--config",
            str(RECIPES / f"{name}.yaml"),
            *data,
            *given,
            *SMALL_CORE,
            "--model.core.init_args.k=8",
            *FAST,
        ]
    )


@pytest.mark.parametrize(
    "name", ["scene_diffusion_text_batchtopk", "scene_diffusion_up_batchtopk", "scene_diffusion_up_temporal"]
)
def test_the_recipes_that_steer_the_miniature_train(name, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    few = ["--data.init_args.n_train=4", "--data.init_args.n_val=2", "--data.init_args.source.init_args.steps=2"]
    main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *few, *SMALL_CORE, *FAST])


def test_the_recipe_of_a_text_encoder_of_diffusion_trains(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from tiny_diffusion import save_pipeline

    monkeypatch.chdir(tmp_path)
    save_pipeline("sd", tmp_path / "sd")
    Path("prompts.txt").write_text("\n".join("abcdefgh"))
    own = [f"model={tmp_path / 'sd'}", 'hook_points=["text_encoder.encoder.layers.1"]', "dtype=float32", "steps=2"]
    given = [f"--data.init_args.source.init_args.{argument}" for argument in own]
    main(
        [
            "fit",
            "--config",
            str(RECIPES / "sd_1_5_text_topk.yaml"),
            *given,
            *SMALL_CORE,
            "--model.core.init_args.k=8",
            *FAST,
        ]
    )


def test_the_miniature_diffusion_recipe_trains(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    few = ["--data.init_args.n_train=4", "--data.init_args.n_val=2", "--data.init_args.source.init_args.steps=2"]
    main(["fit", "--config", str(RECIPES / "scene_diffusion_batchtopk.yaml"), *few, *SMALL_CORE, *FAST])


def test_every_recipe_has_a_case():
    languages = {"gpt2_attention_output", "pythia_70m_jumprelu", "qwen2_5_7b_instruct_fast"}
    tested = {*CASES, *languages, "sam2_hiera_microscopy_batchtopk", "scenes_extract", "scenes_topk"}
    tested |= {"clap_htsat_batchtopk", "siglip_so400m_matryoshka", "sounds_batchtopk", "scene_pairs_crosscoder"}
    tested |= {"llava_1_5_7b_topk", "qwen2_5_vl_3b_batchtopk"}
    tested |= {"llava_next_mistral_saev", "llava_next_vicuna_saev", "chameleon_7b_saev", "scene_questions_saev"}
    tested |= {"e4_miniature_batchtopk", "e4_sessions_batchtopk"}
    tested |= {"ecg_jepa_topk", "eeg_motor_imagery_batchtopk", "stories_batchtopk", "scene_questions_batchtopk"}
    tested |= {"pixart_xl_temporal", "dit_xl_2_temporal", "sd3_medium_batchtopk", "flux_schnell_topk"}
    tested |= {"sd_1_5_text_topk", "scene_diffusion_text_batchtopk", "scene_diffusion_up_batchtopk"}
    tested |= {"scene_diffusion_up_temporal"}
    tested |= {"sdxl_turbo_down_2_1_topk", "sd_1_5_up_1_1_batchtopk", "scene_diffusion_batchtopk"}
    tested |= {"scene_pairs_gsae", "scene_pairs_vlsae", "sound_pairs_mgsae", "open_clip_vit_b_16_gsae"}
    tested |= {"open_clip_vit_b_32_vlsae", "siglip_base_mgsae", "clap_music_mgsae"}
    staged = ("llava_1_5_7b", "qwen2_5_vl_3b", "scene_lmm")
    tested |= {f"{name}_{stage}" for name in staged for stage in ("alignment", "vlsae")}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == tested
