"""The claim `boost_kindland`, where nothing is planted: each of two discovered mechanisms in its own arm and in the other's.

Arms train the same kind replies: one in the words of a kind one, one in those of a strategist to whom a star is announced for
them. Influence of both mechanisms is read on held-out situations where either may speak. Nulls: wrong partitions of the two
mechanisms, and two seeds of one arm.

    python -m experiments.boost_kindland [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "boost_kindland")
