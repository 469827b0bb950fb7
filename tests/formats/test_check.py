"""What the check of a conversion sees, and what it forgives."""

import torch

from mmsae.cores import BatchTopK, ReLU, TopK
from mmsae.formats.check import answer_of, compare, random_rows


def filled(core):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        if isinstance(core, BatchTopK):
            core.threshold.fill_(0.8)
    return core.eval()


def test_a_dictionary_agrees_with_itself():
    core = filled(TopK(8, 16, k=3))
    difference = compare(core, answer_of(core), random_rows(core))
    assert difference.agrees
    assert (difference.codes, difference.reconstructions, difference.l0) == (0, 0, 3)


def test_a_small_error_in_one_weight_is_seen():
    core, other = filled(ReLU(8, 16)), filled(ReLU(8, 16))
    with torch.no_grad():
        other.b_enc[3] += 1e-3
    difference = compare(core, answer_of(other), random_rows(core), other.dictionary)
    assert not difference.agrees
    assert 1e-4 < difference.codes < 2e-3


def test_an_error_in_the_decoder_or_a_nan_is_seen():
    core, other = filled(TopK(8, 16, k=3)), filled(TopK(8, 16, k=3))
    with torch.no_grad():
        other.W_dec[3] *= 1.01  # the change of unit does not hide it
    assert not compare(core, answer_of(other), random_rows(core), other.dictionary).agrees
    with torch.no_grad():
        other.W_dec[3] = torch.nan
    assert not compare(core, answer_of(other), random_rows(core)).agrees


def test_another_unit_of_codes_is_no_difference_but_is_said():
    core, other = filled(ReLU(8, 16)), filled(ReLU(8, 16))
    other.rescale(torch.full((16,), 4.0))
    difference = compare(core, answer_of(other), random_rows(core), other.dictionary)
    assert difference.agrees
    assert "codes change unit by up to 4" in str(difference)
    assert not compare(core, answer_of(other), random_rows(core)).agrees


def test_rows_on_the_edge_of_a_threshold_are_left_out_and_too_many_are_no_agreement():
    core = filled(BatchTopK(8, 16, k=3))
    x = random_rows(core, 64)
    edge = core.pre_activations(x[40:41]).max().detach()  # row 40 lies on it
    core.threshold.fill_(float(edge))
    difference = compare(core, answer_of(core), x)
    assert difference.n_undecided >= 1
    assert difference.agrees
    assert not compare(core, answer_of(core), x[40:41]).agrees
