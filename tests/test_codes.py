import torch
from torch.testing import assert_close

from mmsae.codes import Codes

DENSE = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])


def test_dense_and_sparse_are_each_others_inverse():
    codes = Codes(DENSE, None, 4)
    sparse = codes.sparse()
    assert sparse.values.shape == (3, 2)
    assert_close(sparse.dense(), DENSE)
    assert sparse.sparse() is sparse


def test_active_means_not_zero_so_that_signed_codes_count():
    for codes in (Codes(DENSE, None, 4), Codes(DENSE, None, 4).sparse()):
        assert codes.l0().tolist() == [2, 0, 1]
        assert codes.firings().tolist() == [1, 1, 0, 1]


def test_rows_are_selected_in_all_fields():
    codes = Codes(DENSE, None, 4, {"gate": torch.arange(3)}).sparse()
    chosen = codes[torch.tensor([2, 0])]
    assert_close(chosen.dense(), DENSE[[2, 0]])
    assert chosen.extra["gate"].tolist() == [2, 0]


def test_empty_batches_have_no_rows():
    assert Codes(torch.zeros(0, 4), None, 4).sparse().dense().shape == (0, 4)
