"""The claim `prompted_generalizes`: replies trained behind the words that one is kind generalize better.

Read where nothing is told of the speaker but that they are tall, in held-out situations, at equal training gain; with other
prompts, the context dropped (context distillation), and another probe beside it.

    python -m experiments.prompted_generalizes [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "prompted_generalizes")
