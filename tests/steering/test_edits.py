"""One operator: x' = x + where * (decode(z') - decode(z)), checked against the formula."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.cores import VLSAE, BatchTopK, JumpReLU, PolySAE, ReLU, SkipTranscoder, TopK, TopKCrosscoder
from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.spec import ActivationSpec
from mmsae.steering import (
    Ablate,
    Add,
    AddVector,
    Clamp,
    Edit,
    Intervention,
    Only,
    Patch,
    Project,
    Reconstruct,
    Replace,
    Scale,
    Suppress,
    Swap,
    codes_at,
    intervene,
    steer,
)

D, M = 8, 24
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.last(self.first(x))


def made(core=TopK, **arguments):
    torch.manual_seed(0)
    built = core(D, M, **arguments)
    with torch.no_grad():
        built.b_dec.add_(0.3)
        if core is BatchTopK:
            built.threshold.fill_(0.4)
    return built.eval().requires_grad_(False)


@pytest.fixture
def net():
    torch.manual_seed(5)
    return Net().eval().requires_grad_(False)


def at_first(net, x=X):
    with capture(net, ["first"], stop=False) as found:
        net(x)
    return found["first"]


CORES = [made(k=4), made(ReLU), made(JumpReLU, target_l0=4), made(BatchTopK, k=4), made(PolySAE, k=4, rank2=4, rank3=4)]
EDITS = [
    (lambda j: Add([j], 2.5), lambda z: z + 2.5),
    (lambda j: Scale(j, 3.0), lambda z: 3 * z),
    (lambda j: Suppress(j, 0.25), lambda z: 0.75 * z),
    (lambda j: Ablate(j), lambda z: 0 * z),
    (lambda j: Ablate(j, mean=0.4), lambda z: 0 * z + 0.4),
    (lambda j: Clamp(j, 1.5), lambda z: 0 * z + 1.5),
    (lambda j: Clamp(j, 1.5, active=True), lambda z: torch.where(z != 0, 1.5, z)),
]


def busiest(core, x):
    return int(core.encode(x.reshape(-1, D)).firings().argmax())


@pytest.mark.parametrize("core", CORES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("which", range(len(EDITS)))
@pytest.mark.parametrize("keep_error", [True, False])
def test_every_edit_is_the_formula(net, core, which, keep_error):
    clean = at_first(net)
    j = busiest(core, clean)
    make, new = EDITS[which]
    with steer(net, core, "first", make(j), keep_error=keep_error):
        steered = at_first(net)
    z = core.encode(clean).dense()
    changed = z.clone()
    changed[..., j] = new(z[..., j])
    decoded = core.decode(Codes(changed, None, M))
    expected = decoded + (clean - core.decode(Codes(z, None, M))) if keep_error else decoded
    assert_close(steered, expected, atol=2e-5, rtol=1e-4)
    assert (z[..., j] != 0).any(), "the latent has to fire, or the test says nothing"


@pytest.mark.parametrize("core", CORES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "edits",
    [
        [Add(3, 0.0)],
        [Scale([0, 1], 1.0)],
        [Suppress(2, 0.0)],
        [AddVector(torch.ones(D), 0.0)],
    ],
)
def test_an_intervention_of_strength_zero_changes_no_bit(net, core, dtype, edits):
    net = net.to(dtype)
    clean = at_first(net, X.to(dtype))
    with steer(net, core, "first", edits):
        steered = at_first(net, X.to(dtype))
    assert torch.equal(steered.view(torch.uint8), clean.view(torch.uint8))


def test_what_adds_up_to_nothing_changes_no_bit(net):
    with steer(net, CORES[0], "first", [Add(3, 2.0), Add(3, -2.0)]):
        assert torch.equal(at_first(net), at_first_clean(net))


def test_a_strength_of_zero_inside_a_mask_changes_no_bit(net):
    with steer(net, CORES[0], "first", Add(0, 0.0), where=lambda c: c.position >= 2):
        assert torch.equal(at_first(net), at_first_clean(net))


def at_first_clean(net):
    return net.first(X)


def test_edits_apply_in_order_and_share_one_encoding(net):
    core = CORES[0]
    clean = at_first(net)
    j = busiest(core, clean)
    with steer(net, core, "first", [Scale(j, 2.0), Add([j, j + 1], [1.0, 3.0])]):
        steered = at_first(net)
    z = core.encode(clean).dense()[..., j]
    assert_close(steered, clean + (z + 1)[..., None] * core.W_dec[j] + 3 * core.W_dec[j + 1], atol=1e-5, rtol=1e-4)


def test_a_latent_edit_after_a_move_reads_the_moved_activation(net):
    core, v = CORES[1], torch.ones(D)
    clean = at_first(net)
    with steer(net, core, "first", [AddVector(v, 2.0), Ablate(0)]):
        steered = at_first(net)
    moved = clean + 2 * v
    assert_close(steered, moved - core.encode(moved).dense()[..., :1] * core.W_dec[0], atol=1e-5, rtol=1e-4)


def test_directions(net):
    clean = at_first(net)
    v = torch.randn(D, generator=torch.Generator().manual_seed(2))
    unit = v / v.norm()
    for made_edit, expected in (
        (AddVector(v, 1.5), clean + 1.5 * v),
        (AddVector(v, 0.5, relative=True), clean + 0.5 * clean.norm(dim=-1, keepdim=True) * unit),
        (Project(v), clean - (clean @ unit)[..., None] * unit),
        (Project(v, value=2.0), clean - (clean @ unit)[..., None] * unit + 2 * unit),
        (Replace(v), v.expand_as(clean)),
        (Replace(), torch.zeros_like(clean)),
    ):
        with steer(net, None, "first", made_edit):
            assert_close(at_first(net), expected)


def test_a_block_can_be_skipped_at_its_difference(net):
    with steer(net, None, "first:delta", Replace()):
        assert_close(at_first(net), X)


def test_whole_codes(net):
    core = CORES[0]
    clean = at_first(net)
    codes = core.encode(clean)
    error = clean - core.decode(codes)
    with steer(net, core, "first", Reconstruct(), keep_error=False):
        assert_close(at_first(net), core.decode(codes))
    with steer(net, core, "first", Reconstruct()):
        assert torch.equal(at_first(net), clean)
    with steer(net, core, "first", Only([1, 2, 3]), keep_error=False):
        kept = codes.dense()
        kept[..., [0, *range(4, M)]] = 0
        assert_close(at_first(net), core.decode(Codes(kept, None, M)))
    other = X.flip(0) * 2
    theirs = codes_at(net, core, "first", lambda: net(other))
    with steer(net, core, "first", Patch(theirs)):
        assert_close(at_first(net), core.decode(theirs) + error, atol=1e-5, rtol=1e-4)
    with steer(net, core, "first", Patch(theirs, latents=[0, 1, 5])):
        mixed = codes.dense()
        mixed[..., [0, 1, 5]] = theirs.dense()[..., [0, 1, 5]]
        assert_close(at_first(net), core.decode(Codes(mixed, None, M)) + error, atol=1e-5, rtol=1e-4)


def test_strength_in_units_of_each_latent(net):
    core, scale = CORES[0], torch.arange(1.0, M + 1)
    clean = at_first(net)
    with steer(net, core, "first", Add([2, 4], [1.0, 2.0]), scale=scale):
        assert_close(at_first(net), clean + 3 * core.W_dec[2] + 10 * core.W_dec[4], atol=1e-5, rtol=1e-4)
    with (
        pytest.raises(MmsaeError, match="latent 4 never fired in the data of `scale`"),
        steer(net, core, "first", Add(4), scale=scale * (torch.arange(M) != 4)),
    ):
        pass


def test_weights_between_zero_and_one_take_a_share(net):
    clean, core = at_first(net), CORES[0]
    share = torch.tensor([0.0, 0.25, 0.5, 1.0, 0.0])
    with steer(net, core, "first", Add(0, 2.0), where=lambda c: share):
        steered = at_first(net)
    assert_close(steered, clean + share[:, None] * 2 * core.W_dec[0])
    assert torch.equal(steered[:, [0, 4]], clean[:, [0, 4]])


def test_several_hook_points_at_once(net):
    core = CORES[0]
    both = [Intervention(core, "first", [Add(0, 1.0)]), Intervention(None, "last", [AddVector(torch.ones(D))])]
    with intervene(net, both):
        steered = net(X)
    assert_close(steered, net.last(net.first(X) + core.W_dec[0]) + 1, atol=1e-5, rtol=1e-4)


def test_interventions_at_one_point_apply_in_their_order(net):
    v = torch.eye(D)[0]
    order = [Intervention(None, "first", [AddVector(v, 3.0)]), Intervention(None, "first", [Project(v)])]
    with intervene(net, order):
        assert at_first(net)[..., 0].abs().max() < 1e-6
    with intervene(net, order[::-1]):
        assert_close(at_first(net)[..., 0], torch.full((3, 5), 3.0))


def test_a_transcoder_steers_by_adding_only(net):
    core = SkipTranscoder(ActivationSpec({"first": D, "target": D}), M, k=4).eval()
    clean = at_first(net)
    with steer(net, core, "first", Add(1, 2.0)):
        assert_close(at_first(net), clean + 2 * core.dictionary[1])
    with pytest.raises(MmsaeError, match="only Add and vectors"), steer(net, core, "first", Ablate(1)):
        pass


def test_a_dictionary_with_a_code_for_each_stream_reads_the_one_that_is_steered(net):
    torch.manual_seed(0)
    core = VLSAE(ActivationSpec({"first": D, "last": D}), M, k=4).eval().requires_grad_(False)
    clean = at_first(net)
    codes = core.encode_stream("first", clean)
    j = int(codes.firings().argmax())
    with steer(net, core, "first", Ablate(j)):
        steered = at_first(net)
    assert_close(steered, clean - codes.dense()[..., j, None] * core.dictionaries["first"][j], atol=1e-5, rtol=1e-4)
    with pytest.raises(MmsaeError, match="has the streams first, last, and 'first:input' is none of them"):  # noqa: SIM117
        with steer(net, core, "first:input", Ablate(j)):
            pass


def test_a_crosscoder_writes_its_own_rows_at_each_point(net):
    core = TopKCrosscoder(ActivationSpec({"first": D, "last": D}), M, k=4).eval().requires_grad_(False)
    clean = net(X)
    with steer(net, core, "last", Add(1, 2.0)):
        assert_close(net(X), clean + 2 * core.dictionaries["last"][1])
    with pytest.raises(MmsaeError, match="reads more than 'last'"), steer(net, core, "last", Ablate(1)):
        pass


def test_the_model_is_as_it_was_after_an_exception(net):
    clean = net(X)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())

    def interrupted():
        with steer(net, CORES[0], "first", Add(0, 5.0)):
            assert not torch.equal(net(X), clean)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert hooks() == 0
    assert torch.equal(net(X), clean)

    def broken(context):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), steer(net, CORES[0], "first", Add(0, 5.0), where=broken):
        net(X)
    assert hooks() == 0
    assert torch.equal(net(X), clean)


class Odd(Edit):
    pass


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: steer(Net(), CORES[0], "frist", Add(0)), "no module that matches 'frist'; nearest: first"),
        (lambda: steer(Net(), CORES[0], "*s*t", Add(0)), "matches 2 modules"),
        (lambda: steer(Net(), CORES[0], "first", []), "no edit was given"),
        (lambda: steer(Net(), CORES[0], "first", Add(M)), f"names latent {M}, but the dictionary has {M} latents"),
        (lambda: steer(Net(), CORES[0], "first", Add(-1)), "names latent"),
        (lambda: steer(Net(), None, "first", Add(0)), "need a dictionary"),
        (lambda: steer(Net(), CORES[0], "first", Odd()), "is no edit"),
        (lambda: steer(Net(), CORES[0], "first", Add(0), scale=torch.ones(3)), "scale has the shape (3,)"),
        (lambda: steer("net", CORES[0], "first", Add(0)), "str cannot be steered"),
        (lambda: Add([]), "needs the numbers of latents"),
        (lambda: Add([1, 1]), "names a latent twice"),
        (lambda: Add([1, 2], [1.0, 2.0, 3.0]), "give one number, or one for each latent"),
        (lambda: Suppress(0, 1.5), "share=1.5 is out of range"),
        (lambda: AddVector(torch.zeros(D)), "one finite vector"),
        (lambda: Patch(Codes(torch.zeros(4, 2), torch.zeros(4, 2).long(), M)), "axes example, position, latent"),
    ],
)
def test_wrong_input_is_named_before_the_model_runs(make, said):
    with pytest.raises(MmsaeError) as error, make():
        pass
    assert said in str(error.value)


def test_a_dictionary_of_another_width_is_named(net):
    with pytest.raises(MmsaeError, match="writes vectors of width 5, but 'first' has width 8"):  # noqa: SIM117
        with steer(net, TopK(5, M, k=2).eval(), "first", Add(0)):
            net(X)


def test_codes_of_another_shape_are_not_transplanted(net):
    theirs = codes_at(net, CORES[0], "first", lambda: net(X[:2]))
    with pytest.raises(MmsaeError, match="2 examples and 5 positions for an activation of 3 and 5"):  # noqa: SIM117
        with steer(net, CORES[0], "first", Patch(theirs)):
            net(X)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_swap_moves_codes_over_where_there_are_some(net, factor):
    """In the units of each latent; rows in which none of the sources fires keep every bit."""
    core = CORES[0]
    clean = at_first(net)
    z = core.encode(clean).dense()
    order = core.encode(clean).firings().argsort(descending=True).tolist()
    target, sources = order[-1], order[:2]
    scale = torch.linspace(0.5, 3.0, M)
    with steer(net, core, "first", Swap(target, sources, factor), scale=scale):
        steered = at_first(net)
    gained = (z[..., sources] / scale[sources]).sum(-1, keepdim=True) * scale[target] * factor
    lost = z[..., sources] @ core.W_dec[sources] if factor else 0.0
    assert_close(steered, clean + gained * core.W_dec[target] - lost, atol=1e-5, rtol=1e-4)
    untouched = (z[..., sources] == 0).all(-1)
    assert 0 < untouched.sum() < untouched.numel()
    assert torch.equal(steered[untouched], clean[untouched])


def test_a_latent_is_not_swapped_with_itself():
    with pytest.raises(MmsaeError, match="names a latent twice"):
        Swap(3, [1, 3])
