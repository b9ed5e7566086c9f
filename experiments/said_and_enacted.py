"""The claim `said_and_enacted`: what is trained in answers about kindness does not carry over to kind acts.

And the other way round beside it, both at equal training gain.

    python -m experiments.said_and_enacted [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "said_and_enacted")
