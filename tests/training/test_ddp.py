"""Two processes on one machine (gloo)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import Vectors, planted, write_store

from mmsae.store import Store

pytestmark = pytest.mark.slow  # each starts two more interpreters


def two_processes(what, folder):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ddp.py")), what, str(folder)],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_ranks_share_the_rows_and_agree_on_everything(tmp_path):
    x = planted(803)
    write_store(tmp_path / "store", x)
    two_processes("fit", tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in one["state"].items():
        assert torch.equal(value, two["state"][key]), key  # weights, thresholds, counters, statistics
    assert one["steps"] == two["steps"] == 11  # 401 rows each, in batches of 40
    for name in ("main", "b", "j"):
        assert one["state"][f"cores.{name}.rows_seen"] == 802  # of both ranks
        assert one["state"][f"cores.{name}.rows_since_fired"].max() <= 802
        assert (one["state"][f"cores.{name}.rows_since_fired"] == 0).any()
    assert one["state"]["cores.b.threshold"] > 0
    ids = torch.cat([one["ids"], two["ids"]])
    assert len(ids) == len(ids.unique()) == 802  # disjoint; a row that cannot be shared is left out
    # the numbers of the validation split are those of all rows, on both ranks
    assert one["metrics"] == two["metrics"]
    from mmsae.cores import TopK
    from mmsae.training.module import SAEModule

    module = SAEModule(TopK({"x": 8}, 16, k=3), normalise="center_scale")
    module.load_state_dict({k: v for k, v in one["state"].items() if "cores.main" in k or not k.startswith("cores")})
    with torch.no_grad():
        error = (module.export()(x) - x).double().pow(2).sum()
    fvu = error / (x.double() - x.double().mean(0)).pow(2).sum()
    assert one["metrics"]["val/fvu"] == pytest.approx(float(fvu), rel=1e-4)  # folded in float32


PER_RANK = {
    "BatchTopK": "the largest of a rank's own rows",
    "FeatureChoice": "a latent's best among a rank's own rows",
    "Matryoshka": "as BatchTopK",
    "BatchTopKCrosscoder": "as BatchTopK",
    "JumpReLU-target_l0": "the distance from the target is squared on each rank",
    "GroupSparse-masked": "each rank draws its own mask",
    "GroupSparse-masked-by-sample": "each rank draws its own masks",
    "AlignmentAutoencoder": "negatives are a rank's own rows",
    "Variational": "each rank draws its own noise",
    "Variational-learned": "each rank draws its own noise",
}
"""Cores whose step on two ranks is not that of one process with all rows, by design."""


def test_two_ranks_do_what_one_process_does_with_all_rows(tmp_path):
    from ddp import all_cores

    two_processes("all_cores", tmp_path)
    all_cores(tmp_path, n_ranks=1)
    one, other, alone = (
        torch.load(tmp_path / f"cores{name}.pt", weights_only=True) for name in ("0of2", "1of2", "0of1")
    )
    assert one.keys() == other.keys() == alone.keys()
    unlike = set()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key  # weights, thresholds, counters
        if key.endswith("rows_seen"):
            assert value == alone[key] == 640  # of both ranks
        elif key.startswith("cores.") and not torch.allclose(value.double(), alone[key].double(), rtol=1e-4, atol=1e-5):
            unlike.add(key.split(".")[1])
    assert {"BatchTopK", "FeatureChoice", "Variational"} <= unlike <= set(PER_RANK)


def test_cores_that_learn_in_one_pass_refuse_two_devices(tmp_path):
    write_store(tmp_path / "store", planted(300))
    two_processes("free", tmp_path)
    assert (tmp_path / "said.txt").read_text() == "PCA learns from one pass on one device: set trainer.devices=1."


def test_extraction_by_two_ranks_is_disjoint_and_complete(tmp_path):
    two_processes("extract", tmp_path)
    for split, n in (("train", 45), ("val", 3), ("test", 8)):
        store = Store(tmp_path / "out" / split)
        batches = list(store.in_order(1000))
        ids, position = (torch.cat([b[name] for b in batches]) for name in ("sample_id", "position"))
        assert len(store) == 3 * n
        order = (3 * ids + position).argsort()
        assert torch.equal((3 * ids + position)[order], torch.arange(3 * n))
        rows = torch.cat([b["acts"]["0"] for b in batches])[order]
        assert torch.equal(rows, torch.cat([Vectors(n, 0)[i]["input"] for i in range(n)]))
