"""Which attention heads, and which tokens before it, make a latent fire?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmsae.analyses.base import Analysis
from mmsae.cores import RandomDictionary, SAECore
from mmsae.cores.linear import LinearCore
from mmsae.errors import MmsaeError, checked
from mmsae.hooks import capture, parse
from mmsae.latents import LatentStore
from mmsae.metrics.attention import blocks, by_source, encoder_rows, head_share, logit_effect, repeat_values
from mmsae.results import Plot, Result, Table

HALF = 0.5
"""Share from which a latent counts as one of a single head."""
FUSED = ("c_attn", "qkv_proj")  # queries, keys and values side by side, the values last
PER_HEAD = "query_key_value"  # of each head in turn
PROMOTED, STRONGEST = 3, 5


class HeadAttribution(Analysis):
    """Heads and source positions that latents read, for dictionaries on an attention layer's concatenated heads.

    The hook point is the input of the output projection: `transformer.h.5.attn.c_proj:input`,
    `model.layers.3.self_attn.o_proj:input` (arXiv 2406.17759). A head is the top head of a latent if it has the largest
    share of its decoder row. For the strongest examples the pre-activation is divided among heads and source
    positions, the attention pattern held fixed, where the source can show its pattern.

    Args:
        n_heads: Query heads; None takes them from the model.
        split: Where examples come from.
        n_latents: Latents whose examples are looked at: those of the most concentrated decoder rows.
        n_examples: Examples of each.
        n_bootstrap: Resamples of the latents for the intervals.
        seed: Of the resamples and the random dictionary.
    """

    def __init__(
        self,
        n_heads: int | None = None,
        split: str = "test",
        n_latents: int = 20,
        n_examples: int = 3,
        n_bootstrap: int = 200,
        seed: int = 0,
    ) -> None:
        self.n_heads = n_heads if n_heads is None else checked("n_heads", n_heads, 1)
        self.split, self.n_latents, self.n_examples = split, n_latents, n_examples
        self.n_bootstrap, self.seed = checked("n_bootstrap", n_bootstrap, 1), seed

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Shares of the decoder rows; then the examples, if the model is there."""
        stream = core.spec.input
        n_heads = self.n_heads or heads_of(data.source, stream, core.spec.d_in)
        if n_heads is None:
            said = f"not measured: {stream} is not known to be the heads of an attention layer; n_heads would tell"
            return Result(name="HeadAttribution", title=said)
        if list(core.outputs) != [stream]:
            raise MmsaeError(f"{type(core).__name__} does not write the heads that it reads: n_heads cannot be told.")
        live = np.flatnonzero(latents.firings)
        share = head_share(core.dictionary.detach().float().cpu(), n_heads)[live]
        chance = head_share(RandomDictionary(core.spec, core.d_latent, seed=self.seed).dictionary, n_heads)[live]
        if not len(live):
            return Result(name="HeadAttribution", title="not measured: no latent fires")
        numbers, table = self._concentration(share, chance)
        own = share.argmax(1).bincount(minlength=n_heads)
        result = Result(
            "HeadAttribution",
            f"{int((own > 1).sum())} of {n_heads} heads write more than one latent; the median latent has "
            f"{numbers['median_share']:.0%} of its norm in one head (random: {numbers['random/median_share']:.0%})",
            numbers | {"heads_of_many": float((own > 1).float().mean())},
            [table, self._heads(share, live)],
            [_histogram(share, chance)],
            settings={"n_heads": n_heads, "live latents": len(live), "split": self.split},
        )
        chosen = live[share.amax(1).argsort(descending=True)[: self.n_latents].numpy()]
        why = self._unreadable(core, latents, data, stream)
        if why:
            result.settings["examples"] = f"not measured: {why}"
        else:
            self._add_examples(result, core, latents, data, chosen, n_heads)  # type: ignore[arg-type]
        return result

    def _concentration(self, share: Tensor, chance: Tensor) -> tuple[dict[str, float], Table]:
        rng = np.random.default_rng(self.seed)
        draws = rng.integers(0, len(share), (self.n_bootstrap, len(share)))
        numbers: dict[str, float] = {}
        rows: list[list[Any]] = []
        for prefix, top in (("", share.amax(1).numpy()), ("random/", chance.amax(1).numpy())):
            row: list[Any] = ["random dictionary" if prefix else "dictionary"]
            for name, values, of in (("median_share", top, np.median), ("one_head", top >= HALF, np.mean)):
                low, high = np.quantile(of(values[draws], axis=1), [0.025, 0.975])
                numbers |= {f"{prefix}{name}": float(of(values)), f"{prefix}{name}/low": float(low),
                            f"{prefix}{name}/high": float(high)}  # fmt: skip
                row += [float(of(values)), f"{low:.3f} to {high:.3f}"]
            rows.append(row)
        columns = [
            "",
            "median share of the top head",
            "95 %",
            f"latents with ≥ {HALF:.0%} in one head",
            "95 % of these",
        ]
        return numbers, Table("How much of a latent one head writes", columns, rows)

    def _heads(self, share: Tensor, live: np.ndarray) -> Table:
        """Latents by top head."""
        rows: list[list[Any]] = []
        best, head = share.max(1)
        for h in range(share.shape[1]):
            own = (head == h).nonzero()[:, 0]
            strongest = share[:, h].argsort(descending=True, stable=True)[:STRONGEST].tolist()
            named = ", ".join(f"{live[i]} ({share[i, h]:.2f})" for i in strongest)
            median = float(best[own].median()) if len(own) else None
            rows.append([h, len(own), int((best[own] >= HALF).sum()), median, named])
        columns = ["head", "latents", f"with ≥ {HALF:.0%}", "median share", "largest shares"]
        return Table("Latents by top head; whether they mean one thing is for a reader to say", columns, rows)

    def _unreadable(self, core: SAECore, latents: LatentStore, data: Any, stream: str) -> str:
        """Why examples cannot be looked at; empty if they can."""
        if not isinstance(core, LinearCore):
            return f"{type(core).__name__} has no linear encoder"
        if data.source is None or not data.has_items:
            return "there is no model, only stored activations"
        if not hasattr(data.source.model, "set_attn_implementation"):
            return "the model does not show its attention pattern"
        if projection_of(data.source.model, stream) is None:
            return f"the values of {stream} cannot be read"
        if "position" not in latents.columns or (latents.columns["position"] < 0).any():
            return "pooled activations have no position"
        return ""

    def _add_examples(
        self, result: Result, core: LinearCore, latents: LatentStore, data: Any, chosen: np.ndarray, n_heads: int
    ) -> None:
        items, source = data.items(self.split), data.source
        seen: dict[int, tuple[Heads, list[str]]] = {}
        rows: list[list[Any]] = []
        agree, parts = [], []
        tops = head_share(core.dictionary.detach().float().cpu()[chosen], n_heads).max(1)
        for latent, top in zip(chosen.tolist(), tops.indices.tolist(), strict=True):
            encoder, constant = (t.detach().float().cpu() for t in encoder_rows(core, torch.tensor([latent])))
            for sample, row, value in latents.top_samples(latent, self.n_examples):
                item = items[int(latents.samples[0][sample])]
                if sample not in seen:
                    seen[sample] = read_heads(source, item, core.spec.input, n_heads), _tokens(data, item)
                heads, tokens = seen[sample]
                t = int(latents.columns["position"][row])
                part = by_source(heads.pattern[:, t : t + 1], heads.values, encoder)[0, 0]  # [n_heads, S]
                if abs(float(part.sum() + constant) - value) > 0.02 * abs(value):
                    said = f"not measured: codes of {type(core).__name__} are not its pre-activations"
                    result.settings["examples"] = said
                    return
                part = part * np.sign(value)
                by_position, strongest = part.sum(0), int(part.sum(1).argmax())
                s = int(by_position.argmax())
                share = float(by_position[s] / by_position.clamp_min(0).sum().clamp_min(1e-30))
                agree.append(float(strongest == top))
                parts.append(share)
                rows.append([latent, strongest, value, _at(tokens, t), _at(tokens, s), share])
        columns = ["latent", "top head", "activation", "fires at", "reads most from", "share"]
        promoted = promotes(source, core, torch.from_numpy(chosen))
        tokens_up = zip(chosen.tolist(), tops.indices.tolist(), tops.values.tolist(), promoted, strict=True)
        result.tables += [
            Table(
                "Most concentrated latents", ["latent", "top head", "share", "promotes"], [[*row] for row in tokens_up]
            ),
            Table("Their strongest examples, divided among heads and source positions", columns, rows),
        ]
        if agree:
            result.numbers |= {"top_head_agrees": float(np.mean(agree)), "source_share": float(np.mean(parts))}


class Heads(NamedTuple):
    """One attention layer at one example.

    Attributes:
        pattern: Attention weights `[n_heads, T, S]`.
        values: `[n_value_heads, S, d_head]`.
    """

    pattern: Tensor
    values: Tensor


def heads_of(source: Any, stream: str, d_in: int) -> int | None:
    """Query heads whose outputs lie side by side in a stream, or None if it is no such stream."""
    if source is None:
        return None
    point = parse(stream)
    if point.where != "input" or "." not in point.path:
        return None
    try:
        layer = source.model.get_submodule(point.path.rpartition(".")[0])
    except AttributeError:  # a stream of another name than its module
        return None
    if "attention" not in type(layer).__name__.lower():
        return None
    config = getattr(layer, "config", None)
    n_heads = getattr(config, "num_attention_heads", None) or getattr(layer, "num_heads", None)
    width = getattr(config, "head_dim", None) or getattr(layer, "head_dim", None)
    if not n_heads or d_in % n_heads or (width and n_heads * width != d_in):
        return None
    return int(n_heads)


def projection_of(model: nn.Module, stream: str) -> str | None:
    """Path of the module that computes the values of the heads in a stream."""
    parent = parse(stream).path.rpartition(".")[0]
    layer = model.get_submodule(parent)
    found = [name for name in ("v_proj", *FUSED, PER_HEAD) if hasattr(layer, name)]
    return f"{parent}.{found[0]}" if found else None


@contextmanager
def shown_pattern(model: Any) -> Iterator[None]:
    """Run the model with an attention that returns its pattern, and put back what it had."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def read_heads(source: Any, item: dict[str, Any], stream: str, n_heads: int) -> Heads:
    """Pattern and values of the attention layer behind a stream; refused if they do not give the stream."""
    model, projection = source.model, projection_of(source.model, stream)
    assert projection is not None
    parent, _, name = projection.rpartition(".")
    batch = source.collate([item])
    with shown_pattern(model), capture(model, [projection, stream, f"{parent}:output[1]"]) as found:
        source.forward(batch)
    projected, z, pattern = (found[key][0].float().cpu() for key in (projection, stream, f"{parent}:output[1]"))
    d_head = z.shape[-1] // n_heads
    if name == PER_HEAD:
        values = projected.unflatten(-1, (n_heads, 3, d_head))[..., 2, :]
    else:
        config = getattr(model.get_submodule(parent), "config", None)
        n_values = getattr(config, "num_key_value_heads", None) or n_heads
        values = blocks(projected[..., -n_values * d_head :], n_values)
    values = values.transpose(0, 1)  # [n_value_heads, S, d_head]
    mixed = torch.einsum("hts,hsd->thd", pattern, repeat_values(values, n_heads)).flatten(1)
    if (mixed - z).norm() > 1e-2 * z.norm():
        raise MmsaeError(f"pattern and values of {parent!r} do not give {stream!r}: this attention is of another kind.")
    return Heads(pattern, values)


def promotes(source: Any, core: LinearCore, latents: Tensor) -> list[str]:
    """Tokens whose logits each latent raises most, through the output projection and the unembedding alone."""
    out, layer = source.model.get_output_embeddings(), source.model.get_submodule(parse(core.spec.input).path)
    if out is None or not hasattr(source, "tokenizer"):
        return [""] * len(latents)
    w_o = layer.weight.t() if isinstance(layer, nn.Linear) else layer.weight  # Conv1D of GPT-2 is the other way round
    w_o, w_u = w_o.detach().float().cpu(), out.weight.detach().t().float().cpu()
    effect = logit_effect(core.dictionary[latents].detach().float().cpu(), w_o, w_u)
    words = source.tokenizer
    return [" ".join(repr(words.decode([i])) for i in row) for row in effect.topk(PROMOTED, -1).indices.tolist()]


def _histogram(share: Tensor, chance: Tensor) -> Plot:
    edges = np.linspace(0, 1, 41)
    lines = [{"label": name, "x": edges.tolist(), "y": np.histogram(of.amax(1).numpy(), bins=edges)[0].tolist()}
             for name, of in (("dictionary", share), ("random", chance))]  # fmt: skip
    return Plot("how much of its norm a latent has in one head", "share of the top head", "latents", lines, kind="bars")


def _tokens(data: Any, item: dict[str, Any]) -> list[str]:
    medium = data.render(item)
    return medium["tokens"] if medium["kind"] == "text" else []


def _at(tokens: list[str], position: int) -> str:
    return f"{tokens[position].strip()!r} at {position}" if position < len(tokens) else f"position {position}"
