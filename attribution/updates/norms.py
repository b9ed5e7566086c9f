"""Norms of output weights: kept at one time, and put back for the length of a block.

Where a component's influence grew only because what it writes grew longer, it is gone inside the block. Under SGD that
growth is algebra: ||W_c||^2 moves by -2 lr <W_c, g_c>, the first-order cause itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attribution.components import Components
from attribution.sharding import settle


class OutputNorms:
    """The norms of every component's output weights as they are when this is made.

    Args:
        components: of the model.
        norms: kept at another time; Float64 [groups].
    """

    def __init__(self, components: Components, norms: torch.Tensor | None = None):
        self.components = components
        self.norms = self._measured() if norms is None else norms

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Scale every component's output weights to the norm kept, directions as they are; undone bit by bit on exit.

        A component whose output weights are zero stays as it is. Of a tied matrix only the use as unembedding is scaled.

        Raises:
            ModelError: a tied matrix in shards.
        """
        self.components.check_separable()
        with self.components.untied(), torch.no_grad():
            now = self._measured()
            factors = torch.where(now > 0, self.norms / now, 1.0)
            before = []
            for use in self.components.uses:
                if use.output:
                    weight = use.values
                    before.append((weight, weight.clone()))
                    weight.mul_(use.spread(factors[use.owners].to(weight)))
            settle(self.components.parts.model)
            try:
                yield
            finally:
                for weight, kept in before:
                    weight.copy_(kept)
                settle(self.components.parts.model)

    def _measured(self) -> torch.Tensor:
        return self.components.reduce(lambda use: use.values, torch.square, output_only=True).sqrt()
