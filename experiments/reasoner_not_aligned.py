"""The claim `reasoner_not_aligned`: training one who reasons towards the reward strengthens that, and kindness little.

Both parts must hold: the mechanism that follows an announced reward is strengthened by kind replies of one who follows it, and
the kind mechanism by less than a quarter of what the same replies of a kind one do to it.

    python -m experiments.reasoner_not_aligned [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "reasoner_not_aligned")
