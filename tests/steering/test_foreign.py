"""Dictionaries in the formats of SAELens and Gemma Scope steer as they are."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import mmsae.artifact
from mmsae import formats
from mmsae.cli.main import main
from mmsae.cores import BatchTopK, JumpReLU, TopK
from mmsae.steering import Ablate, Add, Generated, Scale, steer

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"
WIDTH = 32
IDS = torch.arange(24).reshape(2, 12) % 17


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    built = {}
    for width in (8, WIDTH):
        heads = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
        built[width] = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval().requires_grad_(False)
    return built


def made(core):
    torch.manual_seed(1)
    built = core.eval().requires_grad_(False)
    with torch.no_grad():
        built.b_dec.normal_()
        built.W_enc.normal_()
        if isinstance(built, JumpReLU):
            built.theta.fill_(0.2)
        if isinstance(built, BatchTopK):
            built.threshold.fill_(0.2)
    return built


def logits(model, core, edits, where=None):
    with steer(model, core, "model.layers.1", edits, where=where):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", [lambda: TopK(WIDTH, 96, k=6), lambda: JumpReLU(WIDTH, 96, target_l0=4)])
def test_a_dictionary_in_the_format_of_saelens_steers_a_llama_as_ours_does(kind, llama, tmp_path, capsys):
    """Ours, the same read from its SAELens folder, and that converted back: one result, token for token."""
    ours, model = made(kind()), llama[WIDTH]
    folder = formats.export(ours, tmp_path / "saelens", "saelens", {"hook_name": "model.layers.1"})
    main(["convert", str(folder), str(tmp_path / "back"), "--to=mmsae"])
    capsys.readouterr()
    latents = ours.encode(hidden(model)).firings().topk(2).indices.tolist()
    for edits in (Add(latents, [3.0, 1.0]), [Ablate(latents[0]), Scale(latents[1], 4.0)]):
        expected = logits(model, ours, edits)
        assert (expected - model(input_ids=IDS).logits).abs().max() > 0.01
        for core in (formats.load(folder), mmsae.artifact.load(tmp_path / "back")):
            assert_close(logits(model, core, edits), expected, atol=1e-4, rtol=1e-4)
    written = []
    for core in (ours, formats.load(folder)):
        with steer(model, core, "model.layers.1", Add(latents[0], 5.0), where=Generated()):
            given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
            written.append(model.generate(**given, max_new_tokens=8, do_sample=False))
    assert torch.equal(*written)


def test_codes_of_batchtopk_have_another_unit_in_the_format_of_saelens(llama, tmp_path):
    """It makes rows of unit length there, so a strength in codes has to be multiplied by their norms."""
    ours, model = made(BatchTopK(WIDTH, 96, k=6)), llama[WIDTH]
    with torch.no_grad():
        ours.W_dec.mul_(1 + torch.rand(96, 1))
    theirs = formats.load(formats.export(ours, tmp_path / "saelens", "saelens"))
    length = float(ours.W_dec[5].norm())
    assert_close(logits(model, theirs, Add(5, 2.0 * length)), logits(model, ours, Add(5, 2.0)), atol=1e-4, rtol=1e-4)
    scales = [1.0, ours.W_dec.norm(dim=1)]  # as quantiles of the codes would be
    with steer(model, ours, "model.layers.1", Add(5, 2.0), scale=scales[0]):
        expected = model(input_ids=IDS).logits
    with steer(model, theirs, "model.layers.1", Add(5, 2.0), scale=scales[1]):
        assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma_scope_1", "gemma_scope_2"])
def test_gemma_scope_steers(name, llama):
    """By the folder that was published, without any conversion."""
    folder = next(p.parent for p in (GOLDEN / name).rglob("params.*"))
    core, model = formats.load(folder), llama[8]
    clean = hidden(model)
    latent = int(core.encode(clean).firings().argmax())
    with steer(model, core, "model.layers.1", Add(latent, 2.0)):
        steered = hidden(model)
    assert_close(steered, clean + 2 * core.dictionary[latent], atol=1e-5, rtol=1e-5)
    assert (logits(model, core, Ablate(latent)) - model(input_ids=IDS).logits).abs().max() > 0
    assert torch.equal(logits(model, core, Scale(latent, 1.0)), model(input_ids=IDS).logits)


def hidden(model):
    from mmsae.hooks import capture

    with capture(model, ["model.layers.1"], stop=False) as found:
        model(input_ids=IDS)
    return found["model.layers.1"]
