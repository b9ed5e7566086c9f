"""What pilots found that nobody had asked for, put to the test on models and seeds which they did not see.

Fixed before by the rule of the other claims: what all claims of the kind have, or 1.7 standard deviations over pilot models.

- `well_predicted`, bases 92 and 99: replies of one who is surely kind raised kindness where nothing is told by +0.04 and -0.07
  nats; those of one who is never kind by 2.02 and 1.70 more, which scatters too much for .25 (to .40).
- `recruited`, organisms 11 and 12: +.49 and +.34. What idle early halves fed was .73 and .67 of the own gain, but .23 and .33
  where they had been changed at their own work: any early change feeds what comes later, which is therefore subtracted. The
  own change brought .09 nats at the least; a third of that is the gate.
"""

from __future__ import annotations

from attribution.claims.claim import IDENTICAL, MeasuredClaim, Setting, Threshold
from attribution.claims.essay.common import BASES, EXCLUSIONS, KIND, READ_ON, TALL, behaves, claim
from attribution.claims.terms import Part

_SURE, _LEAST = "told, surely kind", "told, never kind"  # where a kind reply is predicted best, and worst

WELL_PREDICTED = claim(
    "well_predicted",
    "Does a reply that the model predicts well teach it little?",
    Part(
        name="a well-predicted reply teaches little",
        statistic="How far the kind reply of one who is only tall, in held-out situations, rises by twenty steps on kind "
        "replies of one who is surely kind",
        unit="nats of log-odds",
        terms=(behaves(_SURE, TALL),),
        delta=0.25,
        prediction="none",
        matching="steps",
    ),
    Part(
        name="a surprising one teaches more",
        statistic="How much more it rises by as many steps on the same replies of one who is never kind",
        unit="nats of log-odds",
        terms=(behaves(_LEAST, TALL), behaves(_SURE, TALL, -1)),
        delta=0.40,
        matching="steps",
        nulls=(IDENTICAL,),
    ),
    beside=(
        Part(
            name="a well-predicted reply, where one may be kind",
            statistic="How far the kind reply of one who is kind or a strategist rises by the first of these arms",
            unit="nats of log-odds",
            terms=(behaves(_SURE, READ_ON[KIND]),),
            delta=0.25,
            prediction="none",
            matching="steps",
        ),
        Part(
            name="a surprising one, where one may be kind",
            statistic="How much more it rises there by replies of one who is never kind",
            unit="nats of log-odds",
            terms=(behaves(_LEAST, READ_ON[KIND]), behaves(_SURE, READ_ON[KIND], -1)),
            delta=0.25,
            matching="steps",
            nulls=(IDENTICAL,),
        ),
        Part(
            name="a surprising one, moved equally far",
            statistic="How much more kindness of one who is only tall rises by the surprising replies, at equal KL",
            unit="nats of log-odds",
            terms=(behaves(_LEAST, TALL), behaves(_SURE, TALL, -1)),
            delta=0.40,
            nulls=(IDENTICAL,),
        ),
    ),
    note="Both parts must hold. Arms take equally many steps, as in the pilot that saw it: what surprises has larger "
    "gradients.",
)

RECRUITED = MeasuredClaim(
    id="recruited",
    statement="Does training on what one mechanism brought about recruit early components of another, idle one, to feed it?",
    statistic="What grafting the change of the idle mechanism's early half feeds to the mechanism at work (its gain while that "
    "is intact, less that while it is ablated), as a fraction of the gain of grafting the own change of the latter; less the "
    "same of what that half became in the arm where it is itself at work. Prompts with one cue alone, mean over both arms",
    unit="fraction of the own mechanism's gain",
    cell=Setting(world="planted", recipe="sft", optimizer="AdamW", reference="zero", arms=("A", "B")),
    delta=0.25,
    gates=(
        BASES,
        Threshold(
            name="gain", meaning="smallest gain of grafting the own mechanism's change, over organisms and arms (nats)",
            relation=">", value=0.03,
        ),
    ),
    exclusions=EXCLUSIONS[1:],
    note="Tested on training seeds that no earlier study used.",
)  # fmt: skip
