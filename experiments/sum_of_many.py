"""The claim `sum_of_many`: over how many components are the causes of a reply spread?

The participation ratio of exact single ablations, over heads and neurons, on the samples that an arm trains on; beside it, of
influence and of strengthening. Whether the claim about mechanisms holds of single components is `boost_components`.

    python -m experiments.sum_of_many [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "sum_of_many")
