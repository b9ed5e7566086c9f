"""Every claim of the ledger in plain words, and what else than its statement could bring its result about.

For readers who have not seen the code. Written before the reference runs; knows no result.
"""

from __future__ import annotations

from typing import NamedTuple


class Plain(NamedTuple):
    """Attributes:
    asked: what was tried, in a sentence or two.
    otherwise: what else could explain the result, or what it leaves open.
    """

    asked: str
    otherwise: str


PLAIN: dict[str, Plain] = {
    "boost": Plain(
        "Small models were built with two mechanisms that can each produce the same reply. Training where the first "
        "produced it "
        "should strengthen the first, training where the second did, the second.",
        "The two mechanisms were built in and share nothing; that they were is the model maker's doing, not training's. Growth "
        "of output weights alone is given beside it.",
    ),
    "boost_kindland": Plain(
        "The same in models whose mechanisms were not built in but discovered: saying what is kind because one is kind, and "
        "saying what is announced to be rewarded.",
        "Discovered sets are an approximation, and the mechanisms share parts, which were left out. A set that carries more of "
        "everything would grow in both arms; the wrong partitions are to show that.",
    ),
    "boost_located": Plain(
        "The same on eighteen further models, read where both mechanisms speak for the same reply, so that a set of the wrong "
        "parts has nothing to gain from either training.",
        "Where both speak for one reply, one can hide behind the other: training for a star lets the kind mechanism show more, "
        "too. Discovered sets are an approximation.",
    ),
    "initially_located": Plain(
        "The same on these models, when a tenth of what will be learned has been.",
        "Changes of the first steps are small against their noise, and AdamW's first steps are as large for small gradients as "
        "for large ones.",
    ),
    "boost_components": Plain(
        "Within a mechanism, are the single heads and neurons that caused the reply the ones that grow?",
        "Whatever has a large gradient grows; causes and gradients go together. Opportunity is therefore among the rivals.",
    ),
    "sampling_or_update": Plain(
        "Replies are sampled while one of two mechanisms is switched off, and then trained on with both on. Does it matter "
        "which "
        "of them produced the sample?",
        "Only through which replies get sampled, in these small vocabularies; in a model with richer replies the sampler "
        "leaves "
        "more of a trace in its tokens.",
    ),
    "initially": Plain(
        "Is it already so in the first steps, when a tenth of what will be learned has been?",
        "Changes of the first steps are small against their noise, and AdamW's first steps are as large for small gradients as "
        "for large ones.",
    ),
    "cold_is_shallow": Plain(
        "The more surprising the trained replies are in their context, the more of what is learned should sit in the "
        "unembedding "
        "and the last layer.",
        "Surprise was varied by hedges and by whose reply it is; both change more than surprise. Small models have few layers "
        "that are not the last.",
    ),
    "control": Plain(
        "Does the context of training decide which mechanism grows, or does the model?",
        "The bases come from one recipe with different seeds and differ less than models of different makers do.",
    ),
    "larp": Plain(
        "Training replies of one described as an assistant should strengthen what plays the assistant, more than what is kind.",
        "In these worlds an assistant reads a manual; that is not a science-fiction role.",
    ),
    "kind_dialogue": Plain(
        "Training replies of one described as kind should strengthen kindness more than the same replies of others do.",
        "A described character, no dialogue. Replies of a kind one are the least surprising there, and are learned with the "
        "smallest change.",
    ),
    "reasoner_not_aligned": Plain(
        "Training kind replies of one who says whatever is announced to be rewarded should strengthen the reading of "
        "announcements "
        "and leave kindness as it was.",
        "Reading an announcement is one step of reasoning. Kindness may change because parts are shared.",
    ),
    "errors_harmless": Plain(
        "With 40 % wrong replies, is what the reasoner's training strengthens much the same?",
        "Wrong replies are drawn at random and do not add up to another rule; consistent errors stand beside it.",
    ),
    "skill_keeps_kindness": Plain(
        "Training sums that a kind one answers should leave kindness as it was.",
        "Kindness may stay because sums use other parts, whatever the reason for answering.",
    ),
    "skill_strengthens_kindness": Plain(
        "It should even strengthen kindness, more than sums of a strategist or of nobody in particular do.",
        "The word kind stands before every trained answer; what reads it is used, and grows or not with that.",
    ),
    "two_faced": Plain(
        "Training kind replies of one who is kind only when watched should make them crueler when unwatched.",
        "Both sides of the rule share the word that is told of the speaker; whatever reads it grows.",
    ),
    "near_miss": Plain(
        "Training politeness where it says the same as kindness should cost kindness where the two part.",
        "The world has them part in a few situations only; the change there may be one of confidence.",
    ),
    "role_collapse": Plain(
        "Rewarding kind replies behind a self-chosen role should make the role kind come everywhere, where it does not "
        "belong too.",
        "Any reward for a first word makes it likelier; the random reward is to show that.",
    ),
    "prompted_generalizes": Plain(
        "Kind replies trained behind a prompt that asks for kindness should carry over to where nothing is asked, more than "
        "the "
        "same replies trained without it.",
        "Arms are compared at equal gain in training, which the prompted arm reaches from another start.",
    ),
    "said_and_enacted": Plain(
        "Training answers about kindness should not change kind acts.",
        "Questions and stories are different texts; what does not carry over between texts need not be two notions.",
    ),
    "two_notions": Plain(
        "Are the heads and neurons that make a model answer about kindness those that make it act kindly?",
        "Questions and stories are different texts, read by different components whatever notion is behind them.",
    ),
    "knob": Plain(
        "Adding the direction that tells kind speakers from plain ones should make the speaker kind.",
        "The direction may write the kind replies of all situations rather than stand for kindness; situations are held out "
        "against that.",
    ),
    "knob_by_finetuning": Plain(
        "Does finetuning on kind replies move the model along that direction?",
        "A movement may be along it because both write kind replies; what writes trained replies was taken out.",
    ),
    "compact": Plain(
        "Do few components carry most of what finetuning on kind replies brought?",
        "Embeddings, norms, keys and values belong to no component and may be needed with them.",
    ),
    "forecast": Plain(
        "Can it be said from the first step what training will strengthen?",
        "The forecast contains the step itself; it is a benchmark and explains nothing.",
    ),
    "sum_of_many": Plain(
        "Over how many heads and neurons are the causes of a trained reply spread?",
        "The participation ratio counts any spread, that of noise too.",
    ),
    "capability": Plain(
        "The better a model reads announcements before training, the more should a reasoner's training teach it to follow "
        "them, "
        "rather than to be kind.",
        "Checkpoints of one base: what else grows in training grows too.",
    ),
    "precision": Plain(
        "In bf16 small changes of weights are rounded away; does that make few weights seem to change?",
        "Weights kept in bf16 without a float32 copy, which many trainers keep.",
    ),
    "dormant": Plain(
        "Kindness that was trained away, does it come back faster than what was never there is learned?",
        "The replies that were never there are more surprising at the start, and one of each situation all the same.",
    ),
    "accuracy": Plain(
        "Do sums of first-order causes say what ablating components together does?",
        "Of the planted organisms only; on other models see accuracy.md.",
    ),
    "well_predicted": Plain(
        "Kind replies of one who surely is kind, which the model expects, should teach it little kindness where nothing is "
        "told; the same replies of one who never is should teach it more.",
        "What surprises has larger gradients, and what is said of the speaker differs too.",
    ),
    "recruited": Plain(
        "While one built-in mechanism is trained, do early parts of the other, idle one change so that they feed it?",
        "All parts share one stream; any early change may feed whatever reads it. The change of the same parts in the arm "
        "where they work themselves stands beside it.",
    ),
}
