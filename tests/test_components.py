"""The partition is exact, everyone owns what the definition says, and first-order causes are derivatives."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from by_name import DENSE, MIXTURES

from attribution import uses
from attribution.components import Component, Components
from attribution.errors import ConfigError

IDS = torch.tensor([[1, 5, 9, 3, 17, 4, 4, 20]])
REMAINDER = {"keys", "values", "norms", "embedding", "final norm"}
ALSO = {
    "qwen2": {"biases"}, "gpt2": {"biases", "positions"}, "gpt_neo": {"biases", "positions"}, "gpt_neox": {"biases"},
    "phi": {"biases", "unembedding bias"}, **{family: {"router"} for family in MIXTURES},
}  # fmt: skip
WIDE = ("llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe")  # heads of 6, not 4


@pytest.fixture
def index(tiny, family, tied):
    return Components(tiny(family, tied))


def marked(index, name, *where):
    """Groups, with sizes, that own the elements of one parameter at these positions."""
    mark = torch.zeros_like(index.parts.model.state_dict()[name])
    mark[where] = 1
    total = index.reduce(lambda use: mark if use.name == name else None)
    owned = index.groups.assign(size=total.numpy())[total.numpy() > 0]
    return {(row.kind, row.layer, row.index, row.part): row.size for row in owned.itertuples(index=False)}


# The partition


def test_every_parameter_is_used_once_per_use(index):
    named = dict(index.parts.model.named_parameters(remove_duplicate=False))
    assert [use.name for use in index.uses] == list(named)
    assert all(use.parameter is named[use.name] for use in index.uses)


def test_every_element_is_in_exactly_one_group(index, tied):
    values = {use.name: torch.rand(use.parameter.shape, dtype=torch.float64) for use in index.uses}
    total = index.reduce(lambda use: values[use.name])
    assert total.shape == (index.group_count,) and (total > 0).all()
    assert total.sum().item() == pytest.approx(sum(v.sum().item() for v in values.values()), rel=1e-13)
    count = sum(parameter.numel() for parameter in index.parts.model.parameters())  # a tied matrix once
    assert index.sizes.sum().item() == count + tied * index.parts.unembedding.weight.numel()
    assert (index.sizes % 1 == 0).all() and (index.sizes > 0).all()


@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_sums_made_a_few_rows_at_a_time_are_those_of_the_whole(monkeypatch, index, block):
    pairs = {use.name: tuple(torch.rand(2, *use.values.shape, dtype=torch.float64)) for use in index.uses}
    whole, made = index.reduce(lambda use: pairs[use.name][0] * pairs[use.name][1]), []
    monkeypatch.setattr(uses, "BLOCK", (block, block))

    def product(left, right):
        made.append((left.numel(), len(left)))
        return left * right

    torch.testing.assert_close(index.reduce(lambda use: pairs[use.name], product), whole, rtol=1e-13, atol=0)
    assert all(elements <= block or rows == 1 for elements, rows in made)
    assert len(made) > len(index.uses) or block == 10**6
    use = index.uses[0]
    left, right = pairs[use.name]
    found = use.sums(left, right, of=lambda left, right: [left * right, left])
    torch.testing.assert_close(found, torch.cat([use.sums(both, of=lambda each: [each]) for both in (left * right, left)]))


@pytest.mark.parametrize("stacked", [700, 10**6])
def test_equal_uses_visited_together_have_the_sums_of_each(monkeypatch, tiny, family, stacked):
    index = Components(tiny(family))
    pairs = {use.name: tuple(torch.rand(2, *use.values.shape, dtype=torch.float64)) for use in index.uses}
    del pairs[index.uses[2].name]
    gradients = {name: pair[0] for name, pair in pairs.items()}
    monkeypatch.setattr(uses, "STACKED", (0, 0, 0))
    alone, causes = index.reduce(lambda use: pairs.get(use.name), torch.mul), index.first_order(gradients)
    monkeypatch.setattr(uses, "STACKED", (stacked, 0, 0))
    made = []

    def product(left, right):
        made.append(left.numel())
        return left * right

    torch.testing.assert_close(index.reduce(lambda use: pairs.get(use.name), product), alone, rtol=1e-13, atol=0)
    assert max(made) <= max(stacked, *(use.values.numel() for use in index.uses)) and len(made) < len(pairs)
    torch.testing.assert_close(index.first_order(gradients), causes, rtol=1e-13, atol=0)


@pytest.mark.parametrize("missing", [(), (0, 5, -1)])
def test_norms_and_causes_are_those_of_visits_of_their_own(index, missing):
    gradients = {use.name: torch.randn_like(use.values) for use in index.uses}
    for place in missing:
        del gradients[index.uses[place].name]
    weights, given, causes = index.norms_and_causes(gradients)
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(weights, index.reduce(lambda use: use.values, torch.square), **close)
    torch.testing.assert_close(given, index.reduce(lambda use: gradients.get(use.name), torch.square), **close)
    torch.testing.assert_close(causes, index.first_order(gradients), **close)
    assert causes.any() and (given == 0).any() == bool(missing)


def test_squares_of_half_precision_do_not_overflow(tiny):
    index = Components(tiny("llama"))
    large = torch.tensor(1000.0, dtype=torch.float16)
    found = index.reduce(lambda use: large.expand(use.values.shape), torch.square)
    torch.testing.assert_close(found, 1e6 * index.sizes, rtol=1e-6, atol=0)


def test_the_gradient_of_an_embedding_is_summed_in_float32(tiny):
    index, many = Components(tiny("llama", dtype=torch.bfloat16)), 1000  # in bfloat16 ones add up to 256
    found = index.embedding_gradient(torch.full((many,), 5), torch.ones(many, 16, dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and (found[5] == many).all() and found.sum() == many * 16


def test_every_single_element_has_one_owner(tiny, family):
    index = Components(tiny(family))
    for use in index.uses:
        for flat in torch.randint(use.parameter.numel(), (5,)):
            one = torch.zeros(use.parameter.numel())
            one[flat] = 1
            total = index.reduce(lambda u, use=use, one=one: one.view(use.parameter.shape) if u is use else None)
            assert total.sum() == 1 and total.max() == 1


def test_sizes_are_exact_above_the_integers_of_float32(tiny):
    index = Components(tiny("llama"))
    odd = torch.nn.Parameter(torch.zeros(1).expand(2**12 + 1, 2**12 + 1))
    index.parts.embedding.weight = odd
    embedding = index.groups.index[index.groups["part"] == "embedding"]
    assert index.sizes[int(embedding[0])] == (2**12 + 1) ** 2 > 2**24


def test_groups_and_table_name_everything_once(index, family):
    assert len(index) == len(index.table) == 2 * (4 + 20) + 23
    assert len(index.groups) == index.group_count
    assert not index.table.duplicated().any() and not index.groups.duplicated().any()
    rest = index.groups[index.remainder_mask.numpy()]
    assert set(rest["kind"]) == {"remainder"} and set(rest["part"]) == REMAINDER | ALSO.get(family, set())
    assert (rest["index"] == -1).all()
    assert set(rest[rest["part"].isin(["keys", "values", "norms"])]["layer"]) == {0, 1}
    output = index.groups.iloc[index.output_groups]
    assert (output["part"] == "writing").all()
    pd.testing.assert_frame_equal(output[["kind", "layer", "index"]].reset_index(drop=True), index.table)


# Ownership, against slices written by hand


def attention_by_hand(family, layer, head, kv_heads):
    """Where transformers' own code finds a head's part of the output, its queries, all keys and all values."""
    d, every = 6 if family in WIDE else 4, slice(None)
    mine = slice(head * d, (head + 1) * d)
    if family == "gpt2":  # weights are [in, out]
        path = f"transformer.h.{layer}.attn"
        fused = [(f"{path}.c_attn.weight", (every, where)) for where in (mine, slice(16, 32), slice(32, 48))]
        return d, [(f"{path}.c_proj.weight", (mine,)), *fused]
    if family == "gpt_neox":  # view(..., heads, 3 * head_dim).chunk(3)
        path, rows = f"gpt_neox.layers.{layer}.attention", torch.arange(48).view(4, 3, d)
        fused = [(f"{path}.query_key_value.weight", (where,)) for where in (rows[head, 0], rows[:, 1], rows[:, 2])]
        return d, [(f"{path}.dense.weight", (every, mine)), *fused]
    if family == "phi3":
        path, end = f"model.layers.{layer}.self_attn", 4 * d + kv_heads * d
        fused = [(f"{path}.qkv_proj.weight", (where,)) for where in (mine, slice(4 * d, end), slice(end, None))]
        return d, [(f"{path}.o_proj.weight", (every, mine)), *fused]
    path = f"transformer.h.{layer}.attn.attention" if family == "gpt_neo" else f"model.layers.{layer}.self_attn"
    out = {"gpt_neo": "out_proj", "phi": "dense"}.get(family, "o_proj")
    split = [(f"{path}.{part}_proj.weight", (mine if part == "q" else every,)) for part in "qkv"]
    return d, [(f"{path}.{out}.weight", (every, mine)), *split]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("head", [0, 3])
def test_a_head_owns_its_output_columns_and_query_rows(tiny, family, layer, head):
    index = Components(tiny(family))
    kv = index.parts.kv_heads
    d, (out, queries, keys, values) = attention_by_hand(family, layer, head, kv)
    assert marked(index, out[0], *out[1]) == {("head", layer, head, "writing"): d * 16}
    assert marked(index, queries[0], *queries[1]) == {("head", layer, head, "routing"): d * 16}
    for (name, where), part in ((keys, "keys"), (values, "values")):
        assert marked(index, name, *where) == {("remainder", layer, -1, part): kv * d * 16}


MLP = {  # output, inputs
    "gpt2": ("transformer.h.1.mlp.c_proj", ["transformer.h.1.mlp.c_fc"]),
    "gpt_neo": ("transformer.h.1.mlp.c_proj", ["transformer.h.1.mlp.c_fc"]),
    "gpt_neox": ("gpt_neox.layers.1.mlp.dense_4h_to_h", ["gpt_neox.layers.1.mlp.dense_h_to_4h"]),
    "phi": ("model.layers.1.mlp.fc2", ["model.layers.1.mlp.fc1"]),
    "phi3": ("model.layers.1.mlp.down_proj", ["model.layers.1.mlp.gate_up_proj"]),
}


@pytest.mark.parametrize("neuron", [0, 19])
@pytest.mark.parametrize("family", DENSE)  # test_experts.py has theirs
def test_a_neuron_owns_its_output_column_and_input_rows(tiny, family, neuron):
    index = Components(tiny(family))
    llama = ("model.layers.1.mlp.down_proj", ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"])
    out, inputs = MLP.get(family, llama)
    column = (neuron,) if family == "gpt2" else (slice(None), neuron)
    assert marked(index, f"{out}.weight", *column) == {("neuron", 1, neuron, "writing"): 16}
    rows = [neuron, 20 + neuron] if family == "phi3" else [neuron]  # gates before inputs
    for linear in inputs:
        for row in rows:
            where = (slice(None), row) if family == "gpt2" else (row,)
            assert marked(index, f"{linear}.weight", *where) == {("neuron", 1, neuron, "gating"): 16}
    if family in ("gpt2", "gpt_neo", "gpt_neox", "phi"):
        assert marked(index, f"{inputs[0]}.bias", neuron) == {("remainder", 1, -1, "biases"): 1}
    groups = index.groups
    gating = groups.index[(groups["kind"] == "neuron") & (groups["part"] == "gating")]
    assert set(index.sizes[gating].tolist()) == {16 * len(inputs) * len(rows)}


def test_a_row_owns_its_row_of_the_unembedding_and_none_of_the_embedding(index, family):
    embedding = {"gpt2": "transformer.wte", "gpt_neo": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}
    assert marked(index, "lm_head.weight", 22) == {("row", -1, 22, "writing"): 16}
    assert marked(index, f"{embedding.get(family, 'model.embed_tokens')}.weight", 22) == {
        ("remainder", -1, -1, "embedding"): 16
    }


# Sets of components


def test_positions_are_those_of_the_table(index):
    chosen = [Component("row", -1, 22), ("neuron", 1, 19), ("head", 1, 0), ("head", 1, 0), ("neuron", 0, 0), ("row", -1, 0)]
    found = index.positions(chosen)
    assert found.tolist() == sorted(set(found)) and len(found) == 5
    assert set(index.table.iloc[found].itertuples(index=False, name=None)) == {tuple(c) for c in chosen}
    assert index.positions(index.table.sample(frac=1, random_state=0)).tolist() == list(range(len(index)))
    assert index.positions([]).tolist() == []


@pytest.mark.parametrize(
    ("component", "said"),
    [
        (("haed", 0, 0), "unknown component kind 'haed'; expected head, neuron, row"),
        (("remainder", 0, -1), "unknown component kind 'remainder'"),
        (("head", 0, 4), "there is no head (0, 4); this model has 2 layers of 4 heads and 20 neurons, and 23 rows (layer -1)"),
        (("head", 2, 0), "there is no head (2, 0)"),
        (("head", -1, 0), "there is no head (-1, 0)"),
        (("neuron", 1, -1), "there is no neuron (1, -1)"),
        (("neuron", 1, 20), "there is no neuron (1, 20)"),
        (("row", 0, 3), "there is no row (0, 3)"),
        (("row", -1, 23), "there is no row (-1, 23)"),
    ],
)
def test_components_that_do_not_exist_are_refused(tiny, component, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Components(tiny("llama")).positions([("head", 0, 0), component])


def test_a_mask_covers_every_part_and_nothing_else(index):
    chosen = [("head", 1, 2), ("neuron", 0, 7), ("neuron", 1, 19), ("row", -1, 5)]
    mask = index.group_mask(index.positions(chosen)).numpy()
    groups = index.groups
    mine = [tuple(row) in chosen for row in groups[["kind", "layer", "index"]].itertuples(index=False)]
    assert mask.tolist() == mine and mask.sum() == 7
    everything = index.group_mask(np.arange(len(index))) | index.remainder_mask
    assert everything.all() and not (index.group_mask(np.arange(len(index))) & index.remainder_mask).any()


# Tied weights


def test_untied_parts_the_uses_and_restores_the_tie(tiny, family):
    model = tiny(family, tied=True)
    index, shared = Components(model), model.get_input_embeddings().weight
    names = [name for name, _ in model.named_parameters()]
    ids = IDS.clone()
    with torch.no_grad():
        logits = model(ids).logits
    with index.untied():
        assert model.lm_head.weight is not shared and model.get_input_embeddings().weight is shared
        assert not index.parts.tied
        assert torch.equal(model(ids).logits, logits)
        with index.untied():
            pass
        assert model.lm_head.weight is not shared
    assert model.lm_head.weight is model.get_input_embeddings().weight is shared
    with pytest.raises(KeyError), index.untied():
        raise KeyError
    assert model.lm_head.weight is shared and [name for name, _ in model.named_parameters()] == names


def test_untied_changes_nothing_where_nothing_is_tied(tiny):
    index = Components(tiny("llama"))
    weight = index.parts.unembedding.weight
    with index.untied():
        assert index.parts.unembedding.weight is weight


def test_gradients_of_tied_weights_part_by_use(tiny, family):
    model = tiny(family, tied=True, dtype=torch.float64)
    index = Components(model)
    metric(model).backward()
    whole = model.lm_head.weight.grad.clone()
    with index.untied():
        found = index.gradients(metric(model))
    embedding = next(use.name for use in index.uses if use.module is index.parts.embedding)
    assert found["lm_head.weight"].abs().max() > 0 and found[embedding].abs().max() > 0
    torch.testing.assert_close(found["lm_head.weight"] + found[embedding], whole)
    assert torch.equal(model.lm_head.weight.grad, whole)  # `.grad` is left alone


# First-order causes


def metric(model):
    """Log-odds of two tokens, in the model's own dtype."""
    logits = model(IDS[:, :-1]).logits[0, -2:]
    wanted = IDS[0, -2:, None]
    return (logits.gather(1, wanted)[:, 0] - logits.scatter(1, wanted, float("-inf")).logsumexp(1)).sum()


@torch.no_grad()
def finite_differences(index):
    """d metric / d scale of every component's output weights at scale 1; of a row, of what it has beyond the mean row."""
    parts, found = index.parts, []
    units = {"head": parts.head_dim, "neuron": 1}
    mean = parts.unembedding.weight.mean(0)
    for kind, layer, i in index.table.itertuples(index=False):
        if kind == "row":
            piece, fixed = parts.unembedding.weight[i], mean
        else:
            module = (parts.attention_out if kind == "head" else parts.mlp_out)[layer]
            mine = slice(i * units[kind], (i + 1) * units[kind])
            if kind == "neuron" and parts.experts > 1:
                piece = module.experts.down_proj[i // 4, :, i % 4]
            else:
                piece = module.weight[mine] if parts.row.transposed else module.weight[:, mine]
            fixed = 0.0
        intact, values = piece.clone(), []
        for scale in (1 + 1e-4, 1 - 1e-4):
            piece.copy_(fixed + scale * (intact - fixed))
            values.append(metric(parts.model))
        piece.copy_(intact)
        found.append((values[0] - values[1]) / 2e-4)
    return torch.stack(found)


def agree(index, causes, slopes):
    for kind in ("head", "neuron", "row"):
        mine = (index.table["kind"] == kind).to_numpy(copy=True)
        assert slopes[mine].abs().max() > 1e-2
        torch.testing.assert_close(causes[mine], slopes[mine], rtol=0, atol=1e-6 * slopes[mine].abs().max().item())


def test_first_order_causes_are_finite_differences(tiny, family, tied):
    model = tiny(family, tied, dtype=torch.float64)
    index = Components(model)
    with index.untied():
        gradients = index.gradients(metric(model))
        causes, slopes = index.first_order(gradients), finite_differences(index)
        agree(index, causes, slopes)
        with pytest.raises(AssertionError):  # the comparison can fail
            agree(index, index.first_order({name: torch.zeros_like(g) for name, g in gradients.items()}), slopes)


def test_the_cause_of_a_row_takes_no_part_in_a_common_shift(tiny):
    """Adding the same vector to every row moves all logits of a position alike: no row did anything."""
    model = tiny("llama", dtype=torch.float64)
    index = Components(model)
    rows = (index.table["kind"] == "row").to_numpy(copy=True)
    before = index.first_order(index.gradients(metric(model)))[rows]
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(16, dtype=torch.float64))
    torch.testing.assert_close(index.first_order(index.gradients(metric(model)))[rows], before)


def test_frozen_parameters_have_no_gradient(tiny):
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(False)
    found = Components(model).gradients(metric(model))
    assert "model.norm.weight" not in found and "lm_head.weight" in found
