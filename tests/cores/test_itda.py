import pytest
import torch
from synthetic import batch_of
from torch.testing import assert_close

from mmsae.cores import ITDA
from mmsae.errors import MmsaeError
from mmsae.metrics.similarity import jaccard, layer_matching, linear_cka, svcca
from mmsae.spec import ACTS

D = 12
X = torch.randn(200, D, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.linspace(0.3, 2, D))


def grown(x, k=4, threshold=0.2, batch_size=50, d_latent=500, cls=ITDA):
    core = cls(x.shape[1], d_latent, k=k, threshold=threshold)
    for number, rows in enumerate(x.split(batch_size)):
        place = torch.arange(len(rows)) + number * batch_size
        core.partial_fit({**batch_of(rows), "sample_id": place // 10, "position": place % 10})
    core.finish()
    return core.eval()


def slow_pursuit(x, atoms, k):
    """Coefficients of one row, step by step."""
    code, residual = torch.zeros(len(atoms)), x.clone()
    for _ in range(k if len(atoms) else 0):
        products = atoms @ residual
        best = int(products.abs().argmax())
        code[best] += products[best]
        residual -= products[best] * atoms[best]
    return code, residual


def slow_dictionary(x, k, threshold):
    """The rule, one row at a time."""
    atoms, names = x.new_zeros(0, x.shape[1]), []
    for number, row in enumerate(x):
        _, residual = slow_pursuit(row, atoms, k)
        if residual.pow(2).sum() > threshold * row.pow(2).sum():
            atoms, names = torch.cat([atoms, row[None] / row.norm()]), [*names, number]
    return atoms, names


def names(core):
    return (core.row_ids[:, 0] * 10 + core.row_ids[:, 1]).tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200])
def test_it_grows_row_by_row_whatever_the_batches(batch_size):
    core, (atoms, rows) = grown(X, batch_size=batch_size), slow_dictionary(X, 4, 0.2)
    assert names(core) == rows
    assert_close(core.dictionary[: len(rows)], atoms)
    assert core.dictionary[len(rows) :].abs().max() == 0


def test_codes_are_those_of_matching_pursuit_with_signs_and_repeats():
    core = grown(X, threshold=0.5)
    n = int(core.n_atoms)
    want = torch.stack([slow_pursuit(x, core.dictionary[:n], 12)[0] for x in X])
    core.k = 12
    codes = core.encode(X)
    assert_close(codes.dense()[:, :n], want, atol=1e-5, rtol=1e-4)
    assert (codes.values < 0).any()
    assert (codes.l0() < 12).any()  # a latent was chosen twice: its coefficients are summed, not listed twice
    fired = codes.indices[0][codes.values[0] != 0]
    assert len(fired) == len(fired.unique())


def test_a_row_that_became_a_latent_is_explained_by_it():
    core = grown(X)
    chosen = X[names(core)]
    assert_close(core(chosen), chosen, atol=1e-5, rtol=1e-4)


def test_rows_without_names_are_called_by_their_place():
    core = ITDA(D, 500, k=4, threshold=0.2)
    for rows in X.split(50):
        core.partial_fit(batch_of(rows))
        core.count(torch.ones(500), len(rows))
    assert core.row_ids[:, 0].tolist() == names(grown(X))
    assert (core.row_ids[:, 1] == -1).all()


def test_equal_rows_and_rows_of_zeros_are_not_taken_twice_or_at_all():
    core = grown(torch.cat([torch.zeros(3, D), X[:1].expand(80, D), torch.zeros(90, D), 3 * X[:1]]))
    assert names(core) == [3]


def test_growth_ends_at_d_latent():
    core = grown(X, d_latent=5)
    assert names(core) == slow_dictionary(X, 4, 0.2)[1][:5]


def test_a_resumed_pass_gives_the_same_dictionary():
    first, rest = batch_of(X[:100]), batch_of(X[100:])
    whole, part, again = (ITDA(D, 300, k=4, threshold=0.2) for _ in range(3))
    for core in (whole, part):
        core.partial_fit(first)
        core.count(torch.ones(300), 100)
    again.load_state_dict(part.state_dict())
    for core in (whole, again):
        core.partial_fit(rest)
    assert torch.equal(whole.dictionary, again.dictionary)
    assert torch.equal(whole.ids, again.ids)


def test_bad_settings_are_refused():
    with pytest.raises(MmsaeError, match="threshold=2"):
        ITDA(D, 10, threshold=2)
    with pytest.raises(MmsaeError, match="no target"):
        ITDA({"x": D, "target": 3}, 10)
    with pytest.raises(MmsaeError, match="has taken no row"):
        ITDA(D, 10).finish()


def test_jaccard_counts_common_rows():
    one, other = torch.tensor([[0, 1], [0, 2], [3, 0]]), torch.tensor([[0, 2], [3, 1]])
    assert jaccard(one, other) == 1 / 4
    assert jaccard(one, one) == 1
    assert jaccard(one, one[:0]) == 0


def test_cka_and_svcca_know_rotations_and_strangers():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, D, generator=g), torch.randn(2000, 8, generator=g)
    turned = 3 * x @ torch.linalg.qr(torch.randn(D, D, generator=g))[0] + 1
    for measure in (linear_cka, svcca):
        assert measure(x, turned) == pytest.approx(1, abs=1e-6)
        assert measure(x, y) < 0.1
    # CKA by its definition, from centred Gram matrices
    x, y = x[:60], y[:60] + x[:60, :8]
    centre = torch.eye(60) - 1 / 60
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), abs=1e-5)


def test_layer_matching_looks_both_ways():
    assert layer_matching(torch.tensor([[0.9, 0.1], [0.8, 0.7]])) == 3 / 4


# ---- acceptance test T8


class AbsoluteError(ITDA):
    """The paper's threshold: the squared error itself."""

    def unexplained(self, x, residual):
        return residual.pow(2).sum(-1) > self.threshold * 4


def literal_dictionary(x, k, threshold, batch_size):
    """The paper's batches: all rows that fail are taken at once, but for those that are nearly the same."""
    core, taken = ITDA(x.shape[1], len(x), k=k, threshold=threshold), []
    for begin in range(0, len(x), batch_size):
        rows = x[begin : begin + batch_size]
        fresh = []
        for row in core.unexplained(rows, rows - core(rows)).nonzero()[:, 0].tolist():
            unit = rows[row] / rows[row].norm()
            if all(abs(float(unit @ other)) <= 0.999 for other, _ in fresh):
                fresh.append((unit, begin + row))
        for unit, number in fresh:
            n = int(core.n_atoms)
            core.W_enc[n], core.W_dec[n] = unit, unit
            core.n_atoms += 1
            taken.append(number)
    return torch.tensor(taken).view(-1, 1)


def layers(seed, n_rows, n_layers=4, n_models=3, n=96, d=48):
    """Activations `[model][layer][n_rows, d]`: one code; its features are scaled anew from layer to layer (a random
    walk of log-scales), and each model turns the space and adds noise."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=g)
    features /= features.norm(dim=-1, keepdim=True)
    on = torch.rand(n_rows, n, generator=g).topk(4).indices
    codes = torch.zeros(n_rows, n).scatter_(1, on, 0.5 + torch.rand(n_rows, 4, generator=g))
    turns = [torch.linalg.qr(torch.randn(d, d, generator=g))[0] for _ in range(n_models)]
    scale, models = 0.9 * torch.randn(n, generator=g), [[] for _ in turns]
    for _ in range(n_layers):
        for model, turn in zip(models, turns, strict=True):
            noise = 0.05 * torch.randn(n_rows, d, generator=g)
            model.append((codes * scale.exp()) @ features @ turn + noise)
        scale = scale + 0.5 * torch.randn(n, generator=g)
    return models


def fvu(core, x):
    return float((x - core(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t8_jaccard_matches_layers_across_models(seed):
    """Acceptance test T8, beside linear CKA and SVCCA."""
    torch.set_num_threads(1)
    models = layers(seed, 6000)
    cores = [[grown(x, k=8, threshold=0.3, batch_size=500, d_latent=1000) for x in model] for model in models]
    n_layers = len(models[0])
    table = {"Jaccard": [], "linear CKA": [], "SVCCA": []}
    same, different = [], []
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        own = torch.tensor([[jaccard(one.row_ids, other.row_ids) for other in cores[b]] for one in cores[a]])
        table["Jaccard"].append(layer_matching(own))
        same.append(float(own.diagonal().mean()))
        different.append(float((own.sum() - own.diagonal().sum()) / (own.numel() - n_layers)))
        for name, measure in (("linear CKA", linear_cka), ("SVCCA", svcca)):
            found = torch.tensor([[measure(x, y) for y in models[b]] for x in models[a]])
            table[name].append(layer_matching(found))
    print(seed, {name: sum(values) / 3 for name, values in table.items()}, "same", same, "other", different,
          "atoms", [int(core.n_atoms) for core in cores[0]])  # fmt: skip
    assert sum(table["Jaccard"]) / 3 >= 0.9
    assert all(s > d for s, d in zip(same, different, strict=True))
    # the ablation: names that are not those of the rows, here of another order, match nothing
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(seed))
    shuffled = grown(models[1][0][order], k=8, threshold=0.3, batch_size=500, d_latent=1000)
    assert jaccard(cores[0][0].row_ids, shuffled.row_ids) < 0.5 * same[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t8_names_survive_rotation_and_scaling(seed):
    """The share of a row's own norm does not see a scale; the paper's squared error does."""
    x = layers(seed, 1500, n_layers=1, n_models=1)[0][0]
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(seed + 10)))[0]
    found = {}
    for cls in (ITDA, AbsoluteError):
        one, other = (grown(y, k=8, threshold=0.3, d_latent=1500, cls=cls) for y in (x, 3.7 * x @ turn))
        found[cls.__name__] = jaccard(one.row_ids, other.row_ids)
    print(seed, found)
    assert found["ITDA"] == 1
    assert found["AbsoluteError"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t8_size_and_fidelity_rise_as_the_threshold_falls(seed):
    x = layers(seed, 1500, n_layers=1, n_models=1)[0][0]
    cores = [grown(x, k=8, threshold=threshold, d_latent=1500) for threshold in (0.6, 0.4, 0.2, 0.1)]
    sizes, errors = [int(core.n_atoms) for core in cores], [fvu(core, x) for core in cores]
    print(seed, sizes, errors)
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t8_taking_all_failing_rows_of_a_batch_depends_on_the_batches(seed):
    """Why rows are taken one by one: the same rows in larger batches give a dictionary of other rows."""
    x = layers(seed, 1500, n_layers=1, n_models=1)[0][0]
    ours = [grown(x, k=8, threshold=0.3, batch_size=n, d_latent=1500).row_ids for n in (1, 512)]
    literal = [literal_dictionary(x, 8, 0.3, n) for n in (1, 512)]
    print(seed, [len(ids) for ids in (*ours, *literal)], jaccard(*ours), jaccard(*literal))
    assert jaccard(*ours) == 1
    assert jaccard(*literal) < 0.7


def test_training_by_the_module_keeps_sample_and_position(tmp_path):
    import lightning as L

    from mmsae.training.module import SAEModule

    rows = {ACTS: {"x": X}, "sample_id": torch.arange(200) // 10, "position": torch.arange(200) % 10}
    batches = [{k: v["x"][i] if k == ACTS else v[i] for k, v in rows.items()} for i in torch.arange(200).split(40)]
    batches = [{**b, ACTS: {"x": b[ACTS]}} for b in batches]
    module = SAEModule(ITDA(D, 300, k=4, threshold=0.2), normalise="none")
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)
    trainer = L.Trainer(max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, loader)
    assert names(module.export()) == slow_dictionary(X, 4, 0.2)[1]  # one pass, in order
