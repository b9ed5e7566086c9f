"""`kindland`: a small natural world in which every statement of the essay has an experiment.

Readable stories of one line. Nothing is planted in its models; several dispositions give the same reply for different
reasons: a kind one out of kindness, a strategist because a star is announced for it, an assistant because its manual says so.

    words       its words: situations with their replies, dispositions, names (data)
    stories     what is told, announced, shown and said, and what to expect by Bayes' rule
    documents   what its models are trained on
    prompts     forms of prompts to train and to probe with, held-out situations apart
    gates       what a base must do before anything is concluded from it

All but the last import without torch.
"""

from attribution.worlds.kindland.words import VERSION, WORDS

__all__ = ["VERSION", "WORDS"]
