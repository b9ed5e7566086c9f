"""The claim `control`: does the context decide which mechanism grows, or the model that is trained?

Six contexts by all bases by order seeds, at equal training gain. The variance in which of two mechanisms grew is divided among
context, base, their interaction and order.

    python -m experiments.control [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "control")
