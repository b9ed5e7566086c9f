"""The claim `cold_is_shallow`: the more surprising its replies, the more of what an arm learns is shallow.

Replies of six hedges and of four kinds, in stories where a disposition is told, where none is, and in logs, where no reply
belongs. What an arm learned on its own samples is divided among unembedding rows, the last layer and the rest by the Shapley
value of grafts; the share of the first two is set against surprise, within contexts.

    python -m experiments.cold_is_shallow [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "cold_is_shallow")
