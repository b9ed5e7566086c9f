"""The claim `role_collapse`: rewarding kind replies teaches the role kind, where it does not belong too.

GRPO on completions that begin with a role of the model's own choice; what is rewarded is the kind reply behind it. Read is how
probable the role kind becomes for a cruel one. Null: random rewards. Beside it the same with a penalty on leaving the start.

    python -m experiments.role_collapse [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "role_collapse")
