"""Steering while a language model writes: caches, padding, beams, generated tokens only."""

import pytest
import torch
from torch.testing import assert_close

from mmsae.cores import TopK
from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.steering import Ablate, Add, AddVector, At, Between, Generated, TokenIds, steer

pytest.importorskip("transformers")
V, D = 40, 16
PROMPT = torch.tensor([[5, 9, 11, 7, 20, 6]])


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=1, max_position_embeddings=64, **size))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=64, n_embd=D, n_layer=3, n_head=2))


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    size = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=V, max_position_embeddings=64, **size))


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=V, head_dim=8, num_key_value_heads=1, max_position_embeddings=64, **size)
    )


LAYER = {llama: "model.layers.1", gpt2: "transformer.h.1", neox: "gpt_neox.layers.1", gemma2: "model.layers.1"}
MODELS = list(LAYER)


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def case(request):
    torch.manual_seed(3)
    model = request.param().eval().requires_grad_(False)
    for parameter in model.parameters():  # so that an edit moves the choice of tokens
        parameter.data.mul_(3) if parameter.dim() > 1 else None
    core = TopK(D, 48, k=4).eval().requires_grad_(False)
    return model, LAYER[request.param], core


def written(model, n=12, **arguments):
    given = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | arguments
    given.setdefault("attention_mask", torch.ones_like(PROMPT))
    return model.generate(PROMPT, **given)


MASKS = [
    None,
    Between(8),
    Between(2, 9),
    At([3, 7, 11]),
    lambda c: c.position % 2 == 0,
    TokenIds([5, 9, 20, 1, 2, 3]),
    Generated(prompt_length=6),
]


@pytest.mark.parametrize("where", MASKS, ids=["all", "from", "between", "at", "even", "ids", "generated"])
def test_with_and_without_a_cache_the_same_tokens_come(case, where):
    model, layer, core = case
    with steer(model, core, layer, [Add(3, 6.0), Ablate([5, 6])], where=where):
        with_cache, without = written(model), written(model, use_cache=False)
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, written(model)), "the edit must show, or the test says nothing"


def test_only_what_is_generated_moves(case):
    model, layer, core = case
    seen = []

    def note(context):
        seen.append((context.start, context.shape[1], Generated()(context).tolist()))
        return Generated()(context)

    with steer(model, core, layer, Add(3, 6.0), where=note):
        written(model, 4)
    assert seen == [(0, 6, [False] * 6), (6, 1, [True]), (7, 1, [True]), (8, 1, [True])]


def test_the_prompt_alone_moves(case):
    model, layer, core = case
    counts = []

    def prompt(context):
        weight = ~Generated()(context)
        counts.append(int(weight.sum()))
        return weight

    with steer(model, core, layer, Add(3, 6.0), where=prompt):
        written(model, 4)
    assert counts == [6, 0, 0, 0]


def test_without_a_cache_generated_needs_the_length_of_the_prompt(case):
    model, layer, core = case
    with pytest.raises(MmsaeError, match="Generated\\(prompt_length"):  # noqa: SIM117
        with steer(model, core, layer, Add(3, 6.0), where=Generated()):
            written(model, use_cache=False)


def test_earlier_positions_do_not_change_at_all(case):
    model, layer, core = case
    clean = model(PROMPT).logits
    with steer(model, core, layer, Add(3, 6.0), where=At([3])):
        steered = model(PROMPT).logits
    assert torch.equal(clean[:, :3], steered[:, :3])
    assert (clean[:, 3:] - steered[:, 3:]).abs().amax(-1).min() > 1e-4


def test_padding_in_front_does_not_count(case):
    model, layer, core = case
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), PROMPT], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    position = (mask.cumsum(1) - 1).clamp_min(0)
    # what is compared is where the edit lands: attention to padding differs by rounding
    found = {}
    for name, ids, given in (
        ("bare", PROMPT, {"attention_mask": torch.ones_like(PROMPT)}),
        ("padded", padded, {"attention_mask": mask, "position_ids": position}),
    ):
        with (
            steer(model, core, layer, Add(3, 6.0), where=At([2])),
            capture(model, [layer], stop=False) as steered,
        ):
            model(ids, **given)
        with capture(model, [layer], stop=False) as clean:
            model(ids, **given)
        found[name] = (steered[layer] - clean[layer])[0].abs().amax(-1) > 0
    assert found["bare"].tolist() == [False, False, True, False, False, False]
    assert found["padded"].tolist() == [False] * 3 + found["bare"].tolist()


def test_beams_are_steered_too(case):
    model, layer, _ = case
    v = AddVector(torch.randn(D, generator=torch.Generator().manual_seed(4)), 3.0)
    with steer(model, None, layer, v):
        beams = written(model, num_beams=3), written(model, num_beams=3, use_cache=False)
    assert torch.equal(*beams)


def test_static_caches(case):
    model, layer, core = case
    with steer(model, core, layer, Add(3, 6.0), where=Between(4, 9)):
        static = written(model, cache_implementation="static")
        dynamic = written(model)
    assert torch.equal(static, dynamic)


def test_half_precision_and_autocast(case):
    model, layer, core = case
    expected = core.dictionary[3] * 2
    with torch.autocast("cpu", torch.bfloat16):
        with capture(model, [layer], stop=False) as clean:
            model(PROMPT)
        with steer(model, core, layer, Add(3, 2.0)), capture(model, [layer], stop=False) as steered:
            model(PROMPT)
    moved = steered[layer].float() - clean[layer].float()
    assert_close(moved.mean((0, 1)), expected, atol=0.05, rtol=0.05)
    model = model.to(torch.bfloat16)
    clean = model(PROMPT).logits
    with steer(model, core, layer, [Add(3, 2.0)]):
        assert model(PROMPT).logits.dtype == torch.bfloat16
    assert torch.equal(model(PROMPT).logits, clean)


def test_what_is_recorded_as_hidden_states_is_steered_too(case):
    model, layer, core = case
    model(PROMPT, output_hidden_states=True)  # transformers installs its own hooks now
    clean = model(PROMPT, output_hidden_states=True)
    with steer(model, core, layer, Add(3, 6.0)):
        steered = model(PROMPT, output_hidden_states=True)
    assert not torch.equal(steered.logits, clean.logits)
    assert_close(
        steered.hidden_states[2] - clean.hidden_states[2], (6 * core.W_dec[3]).expand(1, 6, D), atol=1e-4, rtol=1e-4
    )


def test_compiled_models_are_steered_and_are_not_afterwards():
    torch.manual_seed(3)
    model = llama().eval().requires_grad_(False)
    core = TopK(D, 48, k=4).eval().requires_grad_(False)
    for make in ("whole", "inside"):
        compiled = torch.compile(model, backend="eager") if make == "whole" else model
        if make == "inside":
            model.compile(backend="eager")
        clean = compiled(PROMPT).logits
        for _ in range(2):
            with steer(compiled, core, "model.layers.1", Add(3, 6.0)):
                assert not torch.allclose(compiled(PROMPT).logits, clean, atol=1e-3)
            assert torch.equal(compiled(PROMPT).logits, clean)


def test_a_model_first_compiled_while_it_is_steered_does_not_stay_so():
    torch.manual_seed(3)
    model = llama().eval().requires_grad_(False)
    clean = model(PROMPT).logits
    compiled = torch.compile(model, backend="eager")
    with steer(compiled, TopK(D, 48, k=4).eval(), "model.layers.1", Add(3, 6.0)):
        assert not torch.allclose(compiled(PROMPT).logits, clean, atol=1e-3)
    assert_close(compiled(PROMPT).logits, clean)


def test_a_model_in_ddp_is_steered(tmp_path):
    import torch.distributed as dist

    torch.manual_seed(3)
    model = llama().eval()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with steer(wrapped, TopK(D, 48, k=4).eval(), "model.layers.1", Add(3, 6.0), where=At([3])), torch.no_grad():
            steered = wrapped(PROMPT).logits
        with torch.no_grad():
            clean = wrapped(PROMPT).logits
    finally:
        dist.destroy_process_group()
    assert torch.equal(steered[:, :3], clean[:, :3])
    assert not torch.allclose(steered[:, 3:], clean[:, 3:], atol=1e-3)
