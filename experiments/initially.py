"""The claim `initially`: the crossover of two mechanisms at a tenth of the smaller arm's training gain.

The statistic of `boost_kindland`, read where both arms have gained equally little; what becomes of it stands beside it.

    python -m experiments.initially [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "initially")
