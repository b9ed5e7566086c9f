"""The claim `forecast`: can it be said before training what a dataset will strengthen in this model?

Before every run of the pool, what its first step would strengthen is computed from gradients; after it, what was strengthened
is measured. Rank correlation over arms, mechanisms and probe sets, in every base; beside it, after fewer steps.

    python -m experiments.forecast [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "forecast")
