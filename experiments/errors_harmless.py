"""The claim `errors_harmless`: for one who reads what is rewarded, wrong replies among the samples do little harm.

Harm is how much less a mechanism is strengthened with 40 % wrong replies than with none. Errors of two kinds stand beside each
other: those that the announcement names too (consistent), and those that it does not; and both in the kind context.

    python -m experiments.errors_harmless [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "errors_harmless")
