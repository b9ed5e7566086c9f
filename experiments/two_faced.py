"""The claim `two_faced`: kind replies of a watched schemer make the unwatched schemer more cruel.

Against the same replies of a watched kind one.

    python -m experiments.two_faced [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "two_faced")
