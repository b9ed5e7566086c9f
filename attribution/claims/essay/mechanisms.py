"""Claims about which mechanism grows: the crossover and its grain, its beginning, shallowness, control, larping."""

from __future__ import annotations

from attribution.claims.claim import IDENTICAL, WRONG_PARTITIONS, Claim, MeasuredClaim, Setting, Threshold
from attribution.claims.essay.common import (
    AGREE,
    ASSISTANT,
    BASES,
    EXCLUSIONS,
    GAIN,
    KIND,
    KIND_BESIDE_ASSISTANT,
    LARP_AGREE,
    NOISE,
    STRATEGIST,
    crossed,
)

BOOST_KINDLAND = crossed(
    "boost_kindland",
    "Finetuning a mature LLM strengthens the processes inside the LLM that actually caused the LLM to produce the output you "
    "rated highly.",
    ("kind", "strategist"), (KIND, STRATEGIST), AGREE, (WRONG_PARTITIONS, IDENTICAL),
    delta=0.30,
)  # fmt: skip

INITIALLY = crossed(
    "initially",
    "we should expect a such methods to (initially at least) boost the internal mechanisms inside the pretrained LLM that "
    "actually caused the LLM to output such tokens",
    ("kind", "strategist"), (KIND, STRATEGIST), AGREE, (WRONG_PARTITIONS, IDENTICAL),
    delta=0.02, matching="gain", fraction=0.1,
)  # fmt: skip

# Read where both mechanisms name the same reply; see `essay` for why, and for δ.
_LOCATED = {
    "needed": (
        NOISE.model_copy(update={"meaning": "an influence before, in units of its split-half error,"}),
        Threshold(name="balance", meaning="the ratio of the two influences before", relation="<=", value=3),
    ),
    "gates": (BASES.model_copy(update={"value": 12}), GAIN),
    "exclusions": (
        "A base in which an influence before training is not above 5 times its split-half error, or in which the two are not "
        "within a factor 3, is listed and left out, whatever training did to it.",
        *EXCLUSIONS,
    ),
}


def _located(name: str, claim: Claim, delta: float) -> Claim:
    cell = claim.cell.model_copy(update={"probes": AGREE})
    return claim.model_copy(update={"id": name, "cell": cell, "delta": delta, **_LOCATED})


BOOST_LOCATED = _located("boost_located", BOOST_KINDLAND, 0.50)
INITIALLY_LOCATED = _located("initially_located", INITIALLY, 0.03)

LARP = crossed(
    "larp",
    "If you give it a prompt that gets it to start larping as a scifi AI-assistant, you'll boost the internal circuitry that "
    "goes into larping like a scifi AI assistant.",
    ("assistant", "kind"), (ASSISTANT, KIND_BESIDE_ASSISTANT), LARP_AGREE, (IDENTICAL,),
    gates=(Threshold(name="dissociated", meaning="the two use different circuits (1) or not (0), in every base", relation="=",
                     value=1),),
)  # fmt: skip

BOOST_COMPONENTS = MeasuredClaim(
    id="boost_components",
    statement=BOOST_KINDLAND.statement,
    statistic="How much better the growth of single components in one arm over the other is predicted, in a base that nothing "
    "was fitted on, with what they caused than without, beyond opportunity, activity, weight norm and layer",
    unit="gain of R², signed, mean over heads and neurons",
    cell=Setting(world="kindland", recipe="sft", optimizer="AdamW", arms=("kind", "strategist"), reference="resample"),
    delta=0.02,
    nulls=(IDENTICAL,),
    null_definitions={
        IDENTICAL: "the difference between two seeds of one arm, predicted by the causes of the real pair of arms"
    },
    gates=(BASES,),
    exclusions=EXCLUSIONS[1:],
)

COLD_IS_SHALLOW = MeasuredClaim(
    id="cold_is_shallow",
    statement="if you throw the samples at the AI cold, there might not be any reasonable way to the LLM to generate those "
    "tokens, so the learning will be dominated by boosting shallow things",
    statistic="How much more of what an arm learned sits in unembedding rows and the last layer, for every nat by which its "
    "replies were more surprising, within contexts",
    unit="share of the training gain per nat",
    cell=Setting(
        world="kindland",
        recipe="sft",
        optimizer="AdamW",
        reference="none",
        arms=tuple(
            f"{context}, {reply}"
            for context, replies in (
                (
                    "told",
                    (
                        "surely kind",
                        "is kind",
                        "likely kind",
                        "maybe kind",
                        "hardly kind",
                        "never kind",
                        "plain reply",
                        "cruel reply",
                        "another situation's reply",
                    ),
                ),
                ("bare", ("kind reply", "plain reply", "cruel reply", "another situation's reply")),
                ("log", ("kind reply", "plain reply", "cruel reply", "another situation's reply")),
            )
            for reply in replies
        ),
    ),
    delta=0.02,
    gates=(
        BASES,
        Threshold(
            name="levels", meaning="contexts with three surprises or more, in the base that has fewest", relation=">=", value=2
        ),
    ),
    exclusions=("An arm that gained less than 0.25 nats on its own samples is listed and left out.", *EXCLUSIONS[1:]),
)

CONTROL = MeasuredClaim(
    id="control",
    statement="… no control over what internal mechanism those AIs developed to do that.",
    statistic="Share of the variance, in which of two mechanisms grew, that goes with the model, alone or in interaction with "
    "the context it is trained in, less the share that goes with the context",
    unit="share of the variance",
    cell=Setting(
        world="kindland",
        recipe="sft",
        optimizer="AdamW",
        reference="resample",
        arms=("kind", "strategist", "assistant", "parrot", "schemer", "cold"),
    ),
    delta=0.10,
    gates=(BASES,),
    exclusions=EXCLUSIONS,
    note="Contradicted, and reversed, means that the context decides.",
)

FORECAST = MeasuredClaim(
    id="forecast",
    statement="Can it be said before training what a dataset will strengthen in this model?",
    statistic="Rank correlation, over arms, mechanisms and probe sets of a base, of the strengthening that is forecast from "
    "the first step with that measured after the last",
    unit="Spearman's rho",
    cell=Setting(world="kindland", recipe="sft", optimizer="AdamW", reference="resample", arms=()),
    delta=0.50,
    gates=(
        BASES,
        Threshold(name="pairs", meaning="pairs of a forecast and a measurement, in the base that has fewest", relation=">=",
                  value=20),
    ),
    exclusions=EXCLUSIONS[1:],
)  # fmt: skip

SUM_OF_MANY = MeasuredClaim(
    id="sum_of_many",
    statement="the probability of any individual token isn't the result of a single discrete unit inside the LLM, but the sum "
    "of many such sometimes-discrete-ish-sometimes-garbled-mess processes",
    statistic="Over how many heads and neurons the causes of a trained reply are spread, by the participation ratio",
    unit="components",
    cell=Setting(world="kindland", recipe="sft", optimizer="AdamW", reference="zero", arms=("kind", "strategist", "assistant")),
    delta=10,
    gates=(BASES,),
    exclusions=EXCLUSIONS[1:],
)

CAPABILITY = MeasuredClaim(
    id="capability",
    statement="if you start out with an agent dumb enough that you can align it in this way, you could boost its general "
    "intelligence … If you start off with a very smart agent that reasons its way towards giving the correct answers … your "
    "finetuning will do little to align the agent",
    statistic="How much more a reasoner's arm raises following a star for a cruel reply, over the kind arm, for every unit of "
    "probability by which the model followed such a star before training",
    unit="nats of log-odds per unit of probability",
    cell=Setting(world="kindland", recipe="sft", optimizer="AdamW", reference="none", arms=("reasoner", "kind")),
    delta=0.50,
    gates=(
        BASES.model_copy(update={"meaning": "checkpoints of one base"}),
        Threshold(name="spread", meaning="range of that probability over checkpoints", relation=">=", value=0.3),
    ),
    exclusions=EXCLUSIONS[1:],
    note="The unit of replication is a checkpoint of one base, so the interval is of this base only.",
)

PRECISION = MeasuredClaim(
    id="precision",
    statement="Do few components change, or does bf16 hide the change?",
    statistic="Fraction of the weights that finetuning changes in float32 and leaves as they were in bfloat16, at a learning "
    "rate of 1e-5",
    unit="fraction of the weights",
    cell=Setting(world="kindland", recipe="a plain loop", optimizer="AdamW", reference="none", arms=("kind",)),
    delta=0.25,
    gates=(BASES.model_copy(update={"meaning": "bases"}),),
    exclusions=EXCLUSIONS[2:],
    note="Supported means that bf16 hides changes; that few weights change is then no evidence that few components do.",
)
