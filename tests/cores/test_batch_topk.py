import pytest
import torch
from synthetic import batch_of, flat, scores, train
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.cores import BatchTopK
from mmsae.errors import MmsaeError

X = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))


def test_budget_is_shared_by_the_rows_while_training():
    core = BatchTopK(10, 24, k=3).train()
    codes = core.encode(X)
    assert codes.l0().sum() == 150
    assert codes.l0().unique().numel() > 1
    kept = codes.dense()
    pre = core.pre_activations(X).relu()
    assert pre[kept == 0].max() <= kept[kept != 0].min()
    assert_close(kept[kept != 0], pre[kept != 0])


def test_unset_threshold_is_an_error_not_a_relu():
    core = BatchTopK(10, 24, k=3).eval()
    with pytest.raises(MmsaeError, match="no inference threshold"):
        core.encode(X)
    nothing = Codes(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64), 24)
    core.after_step(1, nothing)  # a step in which nothing fires measures nothing
    assert core.threshold == -1


def test_threshold_is_the_running_mean_of_the_smallest_kept():
    core = BatchTopK(10, 24, k=3, threshold_decay=0.9)
    indices = torch.arange(4).expand(2, 4)
    core.after_step(1, Codes(torch.tensor([[0.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]), indices, 24))
    assert core.threshold == 2
    core.after_step(2, Codes(torch.tensor([[0.0, 1.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]), indices, 24))
    assert float(core.threshold) == pytest.approx(1.9, abs=1e-12)
    core.after_step(3, Codes(torch.zeros(2, 4), indices, 24))
    assert float(core.threshold) == pytest.approx(1.9, abs=1e-12)


def test_threshold_is_saved_in_float64():
    core = BatchTopK(10, 24, k=3)
    core.threshold.fill_(0.1)
    state = core.state_dict()
    assert state["threshold"].dtype == torch.float64
    again = BatchTopK(10, 24, k=3)
    again.load_state_dict(state)
    assert_close(again.eval().encode(X).dense(), core.eval().encode(X).dense())


def test_threshold_gives_the_l0_and_fvu_of_training():
    """The claim: a code that does not depend on its neighbours, at the same price."""
    data = flat(32, 24, 3, seed=0)
    torch.manual_seed(0)
    core = train(BatchTopK(24, 32, k=3), data.rows(10_000, 1), 600, 256, seed=2)
    held = data.rows(5000, 3)
    batch, threshold = scores(core, held, data.features, mode="train"), scores(core, held, data.features)
    assert threshold.fvu == pytest.approx(batch.fvu, rel=0.05)
    assert threshold.l0 == pytest.approx(batch.l0, rel=0.05)
    core.threshold.fill_(0)  # and a ReLU does not
    assert scores(core, held, data.features).l0 > 1.2 * batch.l0


def test_config_has_all_arguments():
    core = BatchTopK(10, 24, k=3, aux_coefficient=0.1, k_aux=4, dead_after=5, threshold_decay=0.5)
    assert core.config == {
        "spec": {"x": 10}, "d_latent": 24, "k": 3, "aux_coefficient": 0.1, "k_aux": 4, "dead_after": 5,
        "threshold_decay": 0.5,
    }  # fmt: skip
    assert core.losses(batch_of(X)).terms.keys() == {"reconstruction", "aux"}
