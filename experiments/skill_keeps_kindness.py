"""The claims `skill_keeps_kindness` and `skill_strengthens_kindness`: sums, answered because one is kind.

Arms train right sums of a kind one, a cruel one, a strategist and nobody in particular, and the kind mechanism is read. Both
claims need the skill to have grown by half of its headroom.

    python -m experiments.skill_keeps_kindness [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "skill_keeps_kindness", "skill_strengthens_kindness")
