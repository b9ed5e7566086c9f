"""Norms kept and put back, against a plain loop over columns."""

import pytest
import torch

from attribution.components import Components
from attribution.updates.norms import OutputNorms


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_component_has_its_old_norm_inside_and_its_own_afterwards(tiny, family, tied):
    model = tiny(family, tied=tied)
    components = Components(model)
    parts = components.parts

    def norms(weights: bool = False):
        """Norms of output weights, by hand: columns of heads and of neurons, rows of the unembedding."""
        found = []
        for layer in range(parts.depth):
            for module, width in ((parts.attention_out[layer], parts.head_dim), (parts.mlp_out[layer], 1)):
                matrix = module.weight if parts.row.transposed else module.weight.T  # [features, width]
                found.append(matrix.detach().unflatten(0, (-1, width)).flatten(1))
        found.append(parts.unembedding.weight.detach())
        return found if weights else [each.norm(dim=1) for each in found]

    before = norms()
    kept = OutputNorms(components)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        parts.mlp_out[0].weight.view(-1)[:] *= 5
    grown = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    directions, after = norms(weights=True), norms()
    with kept.restored():
        for then, inside, changed in zip(before, norms(), after, strict=True):
            assert torch.allclose(then, inside, rtol=1e-5) and not torch.allclose(inside, changed, rtol=1e-2)
        for was, now in zip(directions, norms(weights=True), strict=True):
            assert torch.allclose(torch.cosine_similarity(was, now), torch.ones(len(was)), atol=1e-5)
        if tied:
            assert torch.equal(parts.embedding.weight, grown[name_of(model, parts.embedding)])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, grown[name])
    assert (parts.unembedding.weight is parts.embedding.weight) == tied


def name_of(model, module) -> str:
    return next(name for name, found in model.named_modules() if found is module) + ".weight"


def test_a_component_without_output_weights_stays_without(tiny):
    model = tiny("llama")
    components = Components(model)
    kept = OutputNorms(components)
    with torch.no_grad():
        components.parts.mlp_out[1].weight[:, 3] = 0
    with kept.restored():
        assert torch.equal(components.parts.mlp_out[1].weight[:, 3], torch.zeros(16))
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_an_error_inside_leaves_the_weights_as_they_were(tiny):
    model = tiny("llama")
    kept = OutputNorms(Components(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), kept.restored():
        raise KeyError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
