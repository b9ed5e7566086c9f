"""The claim `larp`: replies of a role-played assistant strengthen what plays the assistant, and not kindness.

A crossover of two discovered mechanisms, one that looks a reply up in the assistant's manual and one that answers kindly,
with the same replies in both arms.

    python -m experiments.larp [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "larp")
