"""The claim `kind_dialogue`: replies of one described as kind strengthen kindness more than the same replies elsewhere.

Against an assistant, a reasoner, nobody in particular and a cruel one; beside it kind against misfitting replies. Tested for a
described character: these bases do not tell two people in one scene apart.

    python -m experiments.kind_dialogue [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "kind_dialogue")
