"""The claim `capability`: does it depend on what the model can do already?

The reasoner's arm and the kind arm on checkpoints of one base, from early to late in its training: what more the former does
for following an announced cruel reward, against how well the checkpoint followed announcements before.

    python -m experiments.capability [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "capability")
