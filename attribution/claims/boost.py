"""The central claim, as data: finetuning strengthens the mechanism that caused the rewarded output (planted world).

Why delta is 0.10 of the influence before: in a pilot on other organisms the contrast was .51 nats where one mechanism is
worth ln 8 = 2.08 nats, so about .25 is expected; wrong partitions stayed below .15 nats, that is .07. So .10 lies above what
a wrong partition may show and below half of the expected effect.

Why the primary probes are those where both cues name the same reply. In a conflict A speaks for one reply and B against it;
where their effects add up, the sum of the contrast's numerators is the change of behaviour in arm A minus that in arm B,
*whatever the partition*: a complementary pair of wrong sets gives the same. Where both cues agree, the contrast changes its
sign with the partition and vanishes on average over wrong ones, so it reads where the change sits. The conflict reading
stands beside it, with the word that the same rule gives it. This was decided from the algebra, before any study was evaluated.

A first study, on other organisms (seeds 11 to 15), gave a contrast of .227 [.198, .257] and no usable null: of
four wrong partitions drawn at random, some shared most of a mechanism by chance and some had next to no influence, and the
two halves of the unrouted control are one arbitrary partition of it, not its mean. Before a second five (seeds 21
to 25) were looked at, the nulls were therefore defined anew: wrong partitions are half the one mechanism and half the other,
and eight of them are averaged; the control is averaged over its halves and the same eight. Nothing else was changed.

That study gave .185 [.124, .246], with the control and identical arms null, and wrong partitions void: a wrong set's change
was divided by its *own* influence before, which in these organisms is often next to nothing, so that the quotient measured
the divisor. Before the organisms shipped now (seeds 31 to 35) were looked at, a third and last change was declared: nulls are
in the unit of delta, a fraction of the *real* mechanisms' influence before, and a null that is a mean over partitions is void
if the mean absolute influence of its sets is under a quarter of the real ones'. On the organisms looked at before, that gives
.009 [.001, .016]. Statistic, cell and delta are as they were first declared, but for the probes. The unrouted control is one
model and the same in all three studies, so it was not new in the last.
"""

from attribution.claims.claim import IDENTICAL, WRONG_PARTITIONS, Cell, Claim, Threshold

UNROUTED = "unrouted control"

BOOST = Claim(
    id="boost",
    statement=(
        "Finetuning a mature LLM strengthens the processes inside the LLM that actually caused the LLM to produce the "
        "output you rated highly."
    ),
    statistic=(
        "How much more each mechanism is strengthened in its own arm than in the other's, as a fraction of its influence "
        "before: [dI_A(arm A) - dI_A(arm B)] / I_A(before) + [dI_B(arm B) - dI_B(arm A)] / I_B(before)."
    ),
    unit="fraction of the influence before",
    cell=Cell(
        world="planted",
        recipe="sft",
        optimizer="AdamW",
        arms=("A", "B"),
        mechanisms=("A", "B"),
        reference="zero",
        probes="agree",
        # The effect is the fall of logit(reply that cue A names) - logit(contrast). In a conflict cue B names the contrast.
        signs={"conflict": (1, -1), "agree": (1, 1)},
        matching="kl",
        control="planted/unrouted",
    ),
    delta=0.10,
    nulls=(WRONG_PARTITIONS, UNROUTED, IDENTICAL),
    null_definitions={
        WRONG_PARTITIONS: "mean over eight partitions that are half the one mechanism and half the other in every layer and "
        "kind, in units of the real mechanisms' influences before",
        UNROUTED: "the model without routes, mean over its halves and the same eight partitions, in units of the organisms' "
        "mean influences before",
        IDENTICAL: "two seeds of one arm, as if they were the two arms",
    },
    gates=(
        Threshold(name="organisms", meaning="organisms with a matched pair of arms", relation=">=", value=5),
        Threshold(name="noise", meaning="smallest influence before, in units of its split-half error", relation=">", value=5),
        Threshold(name="balance", meaning="largest ratio of the two influences before", relation="<=", value=3),
        Threshold(name="lr0", meaning="largest change of an influence with learning rate 0", relation="=", value=0),
        Threshold(
            name="gain", meaning="smallest rise of the metric on an arm's own training samples (nats)", relation=">", value=0
        ),
    ),
    exclusions=(
        "A pair of arms (one organism, one seed) in which an arm does not reach the matching target is listed and left out.",
        "Training runs that failed are listed; a pair that lacks an arm is left out.",
        "Nothing else is left out: a value that is not a number makes the estimate not a number.",
    ),
)
