import gc
import weakref
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmsae.containers import find, put
from mmsae.errors import MmsaeError
from mmsae.hooks import HookPoint, capture, edit, from_positions, parse, resolve, to_positions

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.runs = 0

    def forward(self, hidden_states):
        self.runs += 1
        return hidden_states + self.mlp(hidden_states)


class Net(nn.Module):
    """Blocks called with keywords only, one of them returns `wrap(tensor)`."""

    def __init__(self, wrap=lambda x: x, unwrap=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(11)])
        self.wrapped = Wrapped(wrap)
        self.unwrap = unwrap
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(hidden_states=x)
        return self.unwrap(self.wrapped(x))


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x * 2)


def hooks_left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_globs_stay_in_one_component_and_keep_the_order_of_the_model():
    names = [point.name for point in resolve(Net(), ["blocks.*", "blocks.1?.mlp", "blocks.10", "blocks.2:output"])]
    assert names == [*(f"blocks.{i}" for i in range(11)), "blocks.10.mlp"]


@pytest.mark.parametrize("text", ["a.b", "a:input", "a:output[1]", "a:output[last_hidden_state]", "a:delta", ":output"])
def test_a_hook_point_is_read_back_from_its_name(text):
    assert parse(text).name == text
    assert parse("a:output") == HookPoint("a") == parse("a")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("blocs.0", "Net has no module that matches 'blocs.0'; nearest: blocks.0"),
        ("blocks", "write 'blocks.*'"),
        ("blocks.0.mlp.weight", "is a parameter, not a module"),
        ("blocks.0:out", "cannot be read; write path, path:input"),
    ],
)
def test_what_is_not_there_is_named(pattern, said):
    with pytest.raises(MmsaeError) as error:
        resolve(Net(), [pattern])
    assert said in str(error.value)


def test_capture_reads_inputs_outputs_and_differences_of_keyword_only_blocks():
    net = Net()
    with capture(net, ["blocks.3:input", "blocks.3", "blocks.3:delta", "blocks.3.mlp"], stop=False) as acts:
        net(X)
    by_hand = X
    for block in net.blocks[:3]:
        by_hand = block(by_hand)
    assert_close(acts["blocks.3:input"], by_hand)
    assert_close(acts["blocks.3:delta"], net.blocks[3].mlp(by_hand))
    assert_close(acts["blocks.3"], by_hand + acts["blocks.3:delta"])
    assert not any(tensor.requires_grad for tensor in acts.values())


def test_capture_stops_the_forward_after_the_last_point():
    net = Net()
    with capture(net, ["blocks.4", "blocks.2"]) as acts:
        net(X)
        pytest.fail("the body of the with goes on after the stop")
    assert [block.runs for block in net.blocks] == [1] * 5 + [0] * 6
    assert set(acts) == {"blocks.4", "blocks.2"}
    with capture(net, ["blocks.0:input"]):  # before the module runs
        net(X)
    assert net.blocks[0].runs == 1
    assert hooks_left(net) == 0


def test_the_models_own_exception_handling_does_not_swallow_the_stop():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            try:
                return self.net(x)
            except Exception:
                return None

    model = Careful()
    with capture(model, ["net.blocks.0"]) as acts:
        model(X)
        pytest.fail("went on after the stop")
    assert acts["net.blocks.0"].shape == X.shape


def test_captures_may_be_nested():
    net = Net()
    with capture(net, ["blocks.0", "blocks.9"]) as outer:
        with capture(net, ["blocks.2"]) as inner:
            net(X)
        net(X)
    assert set(inner) == {"blocks.2"}
    assert set(outer) == {"blocks.0", "blocks.9"}


def test_hooks_are_removed_after_an_error():
    net = Net()
    with pytest.raises(ZeroDivisionError), capture(net, ["blocks.*"]), edit(net, {"blocks.0": torch.relu}):
        raise ZeroDivisionError
    assert hooks_left(net) == 0


def test_nothing_of_the_forward_pass_is_kept_after_the_stop():
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            intermediate = x * 3
            seen.append(weakref.ref(intermediate))
            return self.net(intermediate) + intermediate

    seen, model = [], Big()
    gc.disable()
    try:
        with torch.no_grad(), capture(model, ["net.blocks.0"]):
            model(X)
        assert seen[0]() is None  # else a GPU fills up until the garbage collector happens to run
    finally:
        gc.enable()


def test_what_never_runs_is_named():
    net = Net()
    with pytest.raises(MmsaeError, match=r"'unused' of Net did not run"), capture(net, ["unused", "blocks.0"]):
        net(X)
    with pytest.raises(MmsaeError, match=r"'unused' of Net did not run"), edit(net, {"unused": torch.relu}):
        net(X)


def test_captured_tensors_survive_in_place_writing():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
    with torch.no_grad(), capture(net, ["0", "1:input", "2"]) as acts:
        net(X)
    assert_close(acts["0"], net[0](X))
    assert_close(acts["1:input"], net[0](X))
    assert acts["0"].min() < 0


Pair = namedtuple("Pair", "text image")


@dataclass(frozen=True)
class Output:
    image: torch.Tensor
    more: object = None


def model_output():
    from transformers.modeling_outputs import BaseModelOutput

    return lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x, x))


CONTAINERS = {
    "tensor": (lambda x: x, lambda y: y, ""),
    "tuple": (lambda x: (x, None), lambda y: y[0], ""),
    "one_tuple": (lambda x: (x,), lambda y: y[0], ""),
    "second": (lambda x: (x[:, :2], x), lambda y: y[1], "[1]"),
    "last": (lambda x: (x[:, :2], x), lambda y: y[-1], "[-1]"),
    "after_none": (lambda x: (None, x), lambda y: y[1], ""),
    "list": (lambda x: [x, 3], lambda y: y[0], ""),
    "dict": (lambda x: {"n": 3, "image": x}, lambda y: y["image"], "[image]"),
    "named_tuple": (lambda x: Pair(x[:, :1], x), lambda y: y.image, "[image]"),
    "dataclass": (lambda x: Output(x, "kept"), lambda y: y.image, "[image]"),
    "model_output": (lambda x: model_output()(x), lambda y: y.last_hidden_state, "[last_hidden_state]"),
    "model_output_index": (lambda x: model_output()(x), lambda y: y[0], "[0]"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_edits_act_inside_every_container_and_keep_its_type(kind):
    wrap, unwrap, select = CONTAINERS[kind]
    types = []
    net = Net(wrap, lambda y: (types.append(type(y)), unwrap(y))[1])
    plain = net(X)
    point = f"wrapped:output{select}"
    with edit(net, {point: lambda x: x + 1}), capture(net, [point], stop=False) as acts:
        edited = net(X)
    assert_close(edited, plain + 1)
    assert_close(*acts.values(), edited)
    assert types[0] is types[1]
    assert_close(net(X), plain)


def test_put_leaves_the_original_and_the_other_entries_alone():
    original = Output(X, "kept")
    new = put(original, find(original, None, "here")[0], X + 1)
    assert original.image is X
    assert new.more == "kept"


def test_edits_of_inputs_and_differences():
    net = Net()
    with edit(net, {"blocks.5:input": lambda x: x * 0}), capture(net, ["blocks.5:input", "blocks.5"]) as acts:
        net(X)
    assert acts["blocks.5:input"].abs().max() == 0
    assert_close(acts["blocks.5"], net.blocks[5](torch.zeros_like(X)))
    with edit(net, {"blocks.5:delta": torch.zeros_like}), capture(net, ["blocks.5:input", "blocks.5"]) as acts:
        net(X)
    assert_close(acts["blocks.5"], acts["blocks.5:input"])


@pytest.mark.parametrize("edit_first", [True, False])
def test_capture_sees_edits_whichever_was_opened_first(edit_first):
    net = Net()
    change = edit(net, {"blocks.1": torch.zeros_like})
    read = capture(net, ["blocks.1"])
    with change if edit_first else read as first, read if edit_first else change as second:
        net(X)
    acts = second if edit_first else first
    assert acts["blocks.1"].abs().max() == 0


def test_an_edit_keeps_the_dtype_of_the_model():
    net = Net().to(torch.bfloat16)
    with edit(net, {"blocks.1": lambda x: x.float() + 1}):
        assert net(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("function", "said"), [(lambda x: None, "returned NoneType"), (lambda x: x[:1], r"returned shape \(1, 5, 8\)")]
)
def test_an_edit_that_returns_something_else_is_refused(function, said):
    net = Net()
    with pytest.raises(MmsaeError, match=said), edit(net, {"blocks.1": function}):
        net(X)
    with pytest.raises(MmsaeError, match="two edits name"), edit(net, {"blocks.1": function, "blocks.[1]": function}):
        pass


@pytest.mark.parametrize(
    ("wrap", "point", "said"),
    [
        (lambda x: "words", "wrapped", "gives no tensor but str"),
        (lambda x: (x,), "wrapped:output[3]", r"no tensor at \[3\]; there is \[0\] Tensor"),
        (lambda x: x, "wrapped:output[0]", "plain tensor"),  # trap: [0] would be the first example
        (lambda x: (x[:, :2], x), "wrapped:delta", r"choose another output with 'wrapped:delta\[1\]'"),
    ],
)
def test_what_is_no_tensor_is_explained(wrap, point, said):
    net = Net(wrap)
    with pytest.raises(MmsaeError, match=said), capture(net, [point]):
        net(X)


def clip_text():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=50, projection_dim=8, **size)
    return CLIPTextModelWithProjection(config).eval()


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(**size, vocab_size=50, num_key_value_heads=2)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=49)).eval()


@torch.no_grad()
def test_edits_reach_llava_although_transformers_hooked_the_layer_first():
    model = llava()
    ids = torch.tensor([[1, 49, 49, 49, 49, 5]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def logits():
        return model(input_ids=ids, pixel_values=pixels).logits

    before = logits()  # installs the hooks of transformers
    with edit(model, {"model.vision_tower.encoder.layers.1": lambda x: x + 3}):
        after = logits()
    assert (after - before).abs().max() > 1e-3
    layer = model.get_submodule("model.vision_tower.encoder.layers.1")
    handle = layer.register_forward_hook(lambda module, args, output: output + 3)  # the same without prepend
    assert_close(logits(), before)
    handle.remove()


@torch.no_grad()
def test_edits_reach_the_hidden_states_that_a_text_encoder_reports():
    model = clip_text()
    ids = torch.tensor([[1, 5, 7, 2]])
    before = model(ids, output_hidden_states=True).hidden_states
    with edit(model, {"text_model.encoder.layers.1": lambda x: x + 3}):
        after = model(ids, output_hidden_states=True).hidden_states
    assert_close(after[2], before[2] + 3)
    with capture(model, ["text_model.encoder.layers.*"]) as acts:
        model(ids)
    for i, tensor in enumerate(acts.values()):
        assert_close(tensor, before[i + 1])


@pytest.mark.parametrize(
    ("shape", "last", "grid"),
    [((2, 5, 8), False, None), ((2, 8), False, None), ((2, 8, 3, 4), False, (3, 4)), ((2, 3, 4, 8), True, (3, 4))],
)
def test_positions_and_back(shape, last, grid):
    tensor = torch.randn(shape)
    rows, found = to_positions(tensor, last)
    assert found == grid
    assert rows.shape[-1] == 8
    assert_close(from_positions(rows, shape, last), tensor)
    if grid:
        pixel = tensor[1, 2, 3] if last else tensor[1, :, 2, 3]
        assert_close(rows[1, 2 * 4 + 3], pixel)


def test_a_tensor_without_positions_is_refused():
    with pytest.raises(MmsaeError, match="has no positions"):
        to_positions(torch.zeros(3))
