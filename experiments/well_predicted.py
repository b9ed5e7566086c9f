"""The claim `well_predicted`: a reply that the model predicts well teaches it little, a surprising one more.

Arms train the same kind replies, of one who is said to be surely kind and of one who never is.

    python -m experiments.well_predicted [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "well_predicted")
