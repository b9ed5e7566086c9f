"""Claims about a knob for kindness, finetuning and how compact it is; two notions of kindness; and how good scores are."""

from __future__ import annotations

from attribution.claims.claim import MeasuredClaim, Setting, Threshold
from attribution.claims.essay.common import BASES, EXCLUSIONS

_WHERE = Setting(world="kindland", recipe="sft", optimizer="AdamW", reference="none", arms=("cold",))  # it carries over

KNOB = MeasuredClaim(
    id="knob",
    statement="They have some understanding of what kindness is, and there should in principle be a way to locate that inside "
    "the LLM and turn up the knob.",
    statistic="How much more the kind reply of one who is only tall, in held-out situations, is raised by adding the direction "
    "that tells kind speakers from plain ones, before the middle layer, than on average by those of five other dispositions, "
    "as long",
    unit="nats of log-odds",
    cell=_WHERE.model_copy(update={"arms": (), "recipe": "none", "optimizer": "none"}),
    delta=1.4,
    gates=(BASES.model_copy(update={"meaning": "bases"}),),
    exclusions=EXCLUSIONS[2:],
    note="Nothing is trained here.",
)

KNOB_BY_FINETUNING = MeasuredClaim(
    id="knob_by_finetuning",
    statement="Is finetuning on kind acts a turn of the knob for kindness?",
    statistic="How much more the shift of the stream, by finetuning on kind replies of whom nothing is told, points along the "
    "direction of kindness than on average along those of five other dispositions: cosines before the middle layer, of one who "
    "is only tall, without what writes trained replies directly",
    unit="cosine",
    cell=_WHERE,
    delta=0.1,
    gates=(
        BASES.model_copy(update={"meaning": "bases"}),
        Threshold(name="ceiling", meaning="smallest cosine of the shifts of two seeds, over bases", relation=">=", value=0.3),
    ),
    exclusions=EXCLUSIONS[1:],
)

COMPACT = MeasuredClaim(
    id="compact",
    statement="Is what finetuning on kind acts does to a model compact?",
    statistic="How many times fewer heads, neurons and rows than there are bring about 80 % of the gain in kindness of one who "
    "is only tall, by finetuning on kind replies of whom nothing is told, chosen on one half of the prompts and read on the "
    "other, in powers of ten",
    unit="powers of ten",
    cell=_WHERE,
    delta=1.0,
    gates=(
        BASES.model_copy(update={"meaning": "bases"}),
        Threshold(name="gain", meaning="smallest gain on the prompts that are read, over bases (nats)", relation=">", value=0),
    ),
    exclusions=("Where all components together do not bring 80 % about, the value is 0.", *EXCLUSIONS[1:]),
    note="Supported means that less than a tenth of all components suffice.",
)

TWO_NOTIONS = MeasuredClaim(
    id="two_notions",
    statement="this verbalized notion of kindness might not be the same as their internal conception which powers simulations "
    "of nice characters.",
    statistic="How far the correlation of the effects of single components, on answering about kindness and on acting kindly, "
    "stays below what halves of the same prompts allow: 1 - correlation / ceiling, mean over heads and neurons",
    unit="1 - correlation, in units of the ceiling",
    cell=_WHERE.model_copy(update={"arms": (), "recipe": "none", "optimizer": "none", "reference": "resample"}),
    delta=0.25,
    gates=(
        BASES.model_copy(update={"meaning": "bases"}),
        Threshold(
            name="ceiling", meaning="smallest ceiling of that correlation, over bases and kinds", relation=">=", value=0.5
        ),
    ),
    exclusions=EXCLUSIONS[2:],
    note="Nothing is trained here. Supported means two notions, as far as single components tell.",
)

ACCURACY = MeasuredClaim(
    id="accuracy",
    statement="How good is a score of a component, causally?",
    statistic="Rank correlation, over 200 random sets of a tenth of all heads and neurons, of the sum of their first-order "
    "causes with the effect of ablating the set",
    unit="Spearman's rho",
    cell=Setting(world="planted", recipe="sft", optimizer="AdamW", reference="zero", arms=("A",)),
    delta=0.5,
    gates=(BASES,),
    exclusions=EXCLUSIONS[1:],
    note="The linear graft score, of update shares and grafts, stands beside it; every method and its rivals in accuracy.md.",
)
