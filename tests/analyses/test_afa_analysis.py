import numpy as np
import pytest
import torch
from tiny import planted, stored, write_store

from mmsae.analyses import AFA
from mmsae.cores import AbsTopK, Crosscoder, Neurons, PolySAE, TopK
from mmsae.latents import LatentStore
from mmsae.metrics.afa import afa
from mmsae.report.plots import draw
from mmsae.results import Result

X = planted(600)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    columns = {"position": torch.arange(600) % 4}
    return stored(write_store(tmp_path_factory.mktemp("store"), X, columns=columns))


def run(core, data, **arguments):
    core = core.eval()
    return AFA(**arguments).run(core, LatentStore.build(core, data.rows("test")), data)


def orthonormal():
    return torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]


@pytest.mark.parametrize("core", [TopK({"x": 8}, 16, k=3), AbsTopK({"x": 8}, 16, k=3)], ids=["TopK", "AbsTopK"])
def test_numbers_are_means_of_the_measure(core, data):
    found, result = afa(core, X)["x"], run(core, data)
    gap = ((found.norm**2 - found.estimate**2).abs() / found.estimate**2).double()
    assert result.numbers["ratio"] == pytest.approx(float((found.estimate / found.norm).mean()), rel=1e-4)
    assert result.numbers["within_1/4"] == pytest.approx(float((gap <= 0.25).double().mean()), abs=1e-9)
    assert result.numbers["epsilon"] == pytest.approx(float((gap / 15).clamp_max(1).mean()), rel=1e-4)
    assert result.numbers["error"] == pytest.approx(float(found.error.mean()), rel=1e-4)
    correlation = np.corrcoef(found.norm.detach(), found.estimate.detach())[0, 1]
    assert result.numbers["correlation"] == pytest.approx(correlation, rel=1e-4)


def test_an_orthonormal_dictionary_lies_on_the_diagonal(data):
    core = Neurons({"x": 8})
    core.W_dec.data = core.W_enc.data = orthonormal()
    numbers = run(core, data).numbers
    assert numbers["ratio"] == pytest.approx(1, abs=1e-5)
    assert numbers["within_1/4"] == 1
    assert numbers["epsilon"] < 1e-5
    # the ablation: the same directions twice are not orthogonal, and the norms say so
    twice = TopK({"x": 8}, 16, k=16)
    with torch.no_grad():
        twice.W_dec.copy_(torch.cat([orthonormal(), orthonormal()]))
        twice.W_enc.copy_(twice.W_dec / 2)
    assert run(twice, data).numbers["ratio"] < 0.8


def test_intervals_hold_the_means_and_shrink_with_rows(data):
    torch.manual_seed(0)
    core = TopK({"x": 8}, 16, k=3)
    few, many = run(core, data, n_rows=50), run(core, data)
    assert (few.settings["rows"], many.settings["rows"]) == (50, 600)
    for name in ("ratio", "within_1", "epsilon", "error"):
        assert many.numbers[f"{name}/low"] <= many.numbers[name] <= many.numbers[f"{name}/high"]
    assert (few.numbers["ratio/high"] - few.numbers["ratio/low"]) > 1.5 * (
        many.numbers["ratio/high"] - many.numbers["ratio/low"]
    )


def test_the_plot_has_the_papers_bands(data):
    plot = run(TopK({"x": 8}, 16, k=3), data).plots[0]
    points, *rules = plot.lines
    assert plot.kind == "points"
    assert len(points["x"]) == 600
    slopes = sorted(line["y"][1] / line["x"][1] for line in rules)
    assert slopes == pytest.approx(sorted((1 / (1 + c)) ** 0.5 for c in (0, 0.25, -0.25, 0.5, -0.5, 1)))
    svg = draw(plot)
    assert "c = ½" in svg
    assert svg.count("<use") >= 600


def test_histograms_end_at_the_99th_percentile(data):
    core = TopK({"x": 8}, 16, k=3)
    _, epsilon, _ = run(core, data).plots
    values = afa(core, X)["x"].epsilon.detach()
    assert sum(epsilon.lines[0]["y"]) == int((values <= values.quantile(0.99)).sum())
    assert epsilon.lines[0]["x"][-1] <= float(values.quantile(0.99)) + 1e-6


def test_rows_of_zeros_and_silent_codes_give_finite_numbers(tmp_path):
    data = stored(write_store(tmp_path, torch.cat([X[:100], torch.zeros(20, 8)])))
    core = TopK({"x": 8}, 16, k=3)
    with torch.no_grad():
        core.b_enc.fill_(-1e6)
    result = run(core, data)
    assert result.settings["rows"] == 100
    assert all(np.isfinite(v) for v in result.numbers.values())
    assert result.numbers["epsilon"] == 1  # nothing explains a norm that no latent and no bias has
    for plot in result.plots:
        draw(plot)


def test_activations_of_zeros_are_told(tmp_path):
    data = stored(write_store(tmp_path, torch.zeros(100, 8)))
    assert run(TopK({"x": 8}, 16, k=3), data).title == "not measured: all activations are 0"


def test_each_stream_has_its_own_table_and_plots():
    torch.manual_seed(0)
    core = Crosscoder({"a": 8, "b": 5}, 20, init_norm=1.0).eval()
    batches = [{"acts": {"a": X[i : i + 50], "b": torch.randn(50, 5)}, "sample_id": torch.arange(50)} for i in (0, 50)]

    class Data:
        def rows(self, split):
            return batches

    result = AFA().run(core, LatentStore.build(core, batches), Data())
    assert [table.title.split(":")[0] for table in result.tables] == ["a", "b"]
    assert len(result.plots) == 6
    assert {"a/ratio", "b/ratio"} <= set(result.numbers)


def test_decoders_with_products_are_told_in_a_sentence(data):
    result = run(PolySAE({"x": 8}, 16, k=3, rank2=4, rank3=2), data)
    assert isinstance(result, Result)
    assert result.title.startswith("not measured: AFA needs latents that each add one vector")
