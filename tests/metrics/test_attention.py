import pytest
import torch
from synthetic import scores, train
from torch.testing import assert_close

from mmsae.cores import ReLU, TopK
from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.metrics.attention import blocks, by_head, by_source, encoder_rows, head_share, logit_effect, repeat_values

H, D_HEAD, T = 6, 16, 12


def trained_like(cls, d, **arguments):
    """Weights that are not those of the start, with biases."""
    g = torch.Generator().manual_seed(0)
    core = cls(d, 2 * d, **arguments)
    with torch.no_grad():
        core.W_enc.add_(0.3 * torch.randn(core.W_enc.shape, generator=g))
        core.b_enc.copy_(torch.randn(2 * d, generator=g))
        core.b_dec.copy_(torch.randn(d, generator=g))
    return core.eval().requires_grad_(False)


@pytest.mark.parametrize("core", [trained_like(TopK, H * D_HEAD, k=4), trained_like(ReLU, H * D_HEAD)],
                         ids=["centred", "not centred"])  # fmt: skip
@pytest.mark.parametrize("n_values", [6, 3, 1])
def test_t15_parts_sum_to_the_pre_activation(core, n_values):
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(2, H, T, T, generator=g).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    pattern, values = scores.softmax(-1), torch.randn(2, n_values, T, D_HEAD, generator=g)
    z = (pattern @ repeat_values(values, H)).transpose(1, 2).flatten(-2)  # [2, T, H * d_head]
    latents = torch.tensor([0, 5, 191])
    rows, constant = encoder_rows(core, latents)
    want = core.pre_activations(z)[..., latents]
    heads, sources = by_head(z, rows, H), by_source(pattern, values, rows)
    assert sources.shape == (2, T, 3, H, T)
    assert_close(heads.sum(-1) + constant, want, atol=1e-5, rtol=1e-5)
    assert_close(sources.sum(-1), heads, atol=1e-5, rtol=1e-5)
    assert sources[:, 3, :, :, 4:].abs().max() == 0  # later tokens have no part
    # the ablation: one source position taken out of the pattern takes just its part away
    cut = pattern.clone()
    cut[..., 2] = 0
    without = (cut @ repeat_values(values, H)).transpose(1, 2).flatten(-2)
    assert_close(want - core.pre_activations(without)[..., latents], sources[..., 2].sum(-1), atol=1e-5, rtol=1e-5)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config), "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.v_proj"


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
                        attn_implementation="eager")  # fmt: skip
    return GPT2LMHeadModel(config), "transformer.h.1.attn.c_proj", "transformer.h.1.attn.c_attn"


@pytest.mark.parametrize("build", [llama, gpt2])
@torch.no_grad()
def test_parts_sum_to_the_pre_activation_in_models_of_transformers(build):
    torch.manual_seed(0)
    model, output, projection = build()
    model.eval()
    for weight in model.parameters():
        weight.mul_(3)  # away from a uniform pattern
    ids = torch.randint(0, 50, (3, 10), generator=torch.Generator().manual_seed(0))
    with capture(model, [f"{output}:input", projection], stop=False) as acts:
        pattern = model(input_ids=ids, output_attentions=True).attentions[1]
    z, values = acts[f"{output}:input"], acts[projection]
    values = blocks(values[..., -32:], 4) if build is gpt2 else blocks(values, 2)
    core = trained_like(TopK, 32, k=4)
    rows, constant = encoder_rows(core, torch.arange(64))
    want = core.pre_activations(z)
    assert_close(by_head(z, rows, 4).sum(-1) + constant, want, atol=1e-5, rtol=1e-5)
    sources = by_source(pattern, values.transpose(1, 2), rows)
    assert_close(sources.sum((-1, -2)) + constant, want, atol=1e-5, rtol=1e-5)
    # the ablation: heads that take each other's values do not give what the model computed
    if build is llama:
        wrong = by_source(pattern, values.transpose(1, 2).repeat(1, 2, 1, 1), rows)
        assert (wrong.sum((-1, -2)) + constant - want).abs().max() > 0.01


@torch.no_grad()
def test_logit_effects_are_those_of_the_model_without_its_final_norm():
    torch.manual_seed(0)
    model, output, _ = gpt2()
    layer, out = model.get_submodule(output), model.get_output_embeddings()
    rows = torch.randn(5, 32)
    want = out(layer(rows) - layer(torch.zeros(1, 32)))
    assert_close(logit_effect(rows, layer.weight, out.weight.T), want, atol=1e-5, rtol=1e-5)


def test_shares_are_norms_of_blocks():
    rows = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 3.0]])
    assert_close(head_share(rows, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.25, 0.75]]))


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(MmsaeError, match="n_heads=5 does not divide the width 32"):
        head_share(torch.zeros(3, 32), 5)
    with pytest.raises(MmsaeError, match="4 query heads cannot share 3 value heads"):
        repeat_values(torch.zeros(3, 2, 2), 4)


# ---- acceptance test T15


def planted(seed, n=48):
    """Unit features `[n, H * D_HEAD]` and their heads: one for the first half, three for the others."""
    g = torch.Generator().manual_seed(seed)
    features, where = torch.zeros(n, H, D_HEAD), torch.zeros(n, H, dtype=torch.bool)
    for i in range(n):
        heads = torch.randperm(H, generator=g)[: 1 if i < n // 2 else 3]
        features[i, heads] = torch.randn(len(heads), D_HEAD, generator=g)
        where[i, heads] = True
    features = features.flatten(1)
    return features / features.norm(dim=-1, keepdim=True), where


def rows_of(features, n_rows, seed):
    g = torch.Generator().manual_seed(seed)
    on = torch.rand(n_rows, len(features), generator=g) < 4 / len(features)
    x = (on * (0.5 + torch.rand(on.shape, generator=g))) @ features
    return x + 0.02 * torch.randn(x.shape, generator=g)


def attributed(dictionary, features, where):
    """Share of found features whose latent has its largest blocks in just their heads, for one head and for three."""
    cosines = features @ (dictionary / dictionary.norm(dim=-1, keepdim=True)).T
    best, latent = cosines.max(1)
    share = head_share(dictionary[latent], H)
    rank = share.argsort(-1, descending=True).argsort(-1)
    right = ((rank < where.sum(-1, keepdim=True)) == where).all(-1)
    half = len(features) // 2
    return float(right[:half].float().mean()), float(right[half:].float().mean()), best, share.amax(-1)


@pytest.mark.slow
def test_t15_planted_heads_are_found():
    found = []
    for seed in (0, 1, 2):
        features, where = planted(seed)
        torch.manual_seed(seed)
        core = train(TopK(H * D_HEAD, 64, k=4), rows_of(features, 40_000, seed + 100), 1200, 256, seed)
        held_out = rows_of(features, 4000, seed + 200)
        rows = core.dictionary.detach()
        one, three, best, top = attributed(rows, features, where)
        # the ablation: dimensions dealt out to heads at random know no heads
        order = torch.randperm(H * D_HEAD, generator=torch.Generator().manual_seed(seed))
        shuffled = head_share(rows[:, order], H)
        blind = attributed_by(shuffled, features, rows, where)
        print(seed, "one", one, "three", three, "median cosine", float(best.median()),
              "median top share, one head", float(top[:24].median()), "shuffled", blind,
              "fvu", scores(core.eval(), held_out, features).fvu)  # fmt: skip
        found.append((one, three, blind))
    one, three, blind = (torch.tensor(values).mean() for values in zip(*found, strict=True))
    assert one >= 0.95
    assert three >= 0.95
    assert blind < 0.4


def attributed_by(share, features, rows, where):
    latent = (features @ (rows / rows.norm(dim=-1, keepdim=True)).T).argmax(1)[: len(features) // 2]
    return float(where[: len(latent)].float().gather(1, share[latent].argmax(-1)[:, None]).mean())
