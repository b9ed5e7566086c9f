"""The claim `near_miss`: politeness, which agrees with kindness wherever it is trained, costs kindness where the two part.

Against the same replies of a kind one.

    python -m experiments.near_miss [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "near_miss")
