"""The claims of the essay as data, but for `boost`: in `kindland`, with the names of its sets, and three on planted mechanisms.

Influence is read on prompts of held-out situations in which two dispositions are equally likely and name different replies:
that of a mechanism on its own reply against those that neither names. Where both name the same reply stands beside it.

Cells, δ and exclusions were fixed on two bases that no result rests on, 92 and 99 (`experiments.pilot`, results/pilot.md):

- Where both dispositions name the same reply the one mechanism masks the other: the influence of the strategist's was a sixth
  of the kind one's there, and half to a third on own replies in conflict. The latter became the primary reading.
- δ is what had been proposed, unless five bases that scatter as the pilot's see twice that with less than 80 % power: then 1.7
  standard deviations over bases, rounded up. That moved `boost_kindland` (.10 to .30), `kind_dialogue` (.10 to .20),
  `reasoner_not_aligned` (.10 to .25, the strengthening), both claims on skills (.10 to .25), `two_faced` (.25 to 1.25),
  `role_collapse` (.05 to .12) and `knob` (.5 to 1.4, of +4.9 and +3.9). `boost_components` stays: on two bases each is
  predicted from a single one, not from four.
  `larp` stays: on base 92 one of its mechanisms has no influence of its own, which its gates refuse.
- Sums that were not trained are hardly learned (half of the headroom is out of reach), so that skill is read on trained ones,
  and their arms are four times as long.
- Finetuning on kind replies of one who is maybe kind hardly reaches those of whom nothing is told (+0.06 nats on base 92), so
  that the knob and compactness are read in the arm of whom nothing is told (+2.5).
- Replies of another situation are always the same of each. Drawn anew for every sample, as in the pilot, all that can be
  learned of them is which words are frequent, which is shallow by construction.
- Replies that were never there begin far below those that were trained away, and what is surprising rises fast: `dormant`
  counts both from one level, which takes 24 and 33 steps of the former. δ stays at .5 (+.95 and +.92).
- `boost_located` and `initially_located` were declared after `boost_kindland` and `initially` had come out inconclusive on the
  shipped bases, and are tested on eighteen others, 56 to 73. Of mechanisms that are each read on their own reply a wrong
  partition grows half as much by construction, which is no null; where both name the same reply it can be one. Bases scatter
  far more than the two of the pilot did, while seeds of one hardly do, so that bases are many. For these two the shipped bases,
  with a training seed of their own, are the pilot (`experiments.boost_located --pilot`, results/pilot_located.md): a power of
  80 % at 2 δ with sixteen bases takes .75 standard deviations, rounded up to .50 and .03. Evidence asks that both influences be
  above their error and within a factor 3: a base in which they are not is left out before it is trained, where the claims
  before fail as a whole.
- A few heads have nearly all of the effect of all components, so that notions are compared by heads and neurons apart.
"""

from attribution.claims.essay.behaviour import (
    DORMANT,
    NEAR_MISS,
    PROMPTED_GENERALIZES,
    ROLE_COLLAPSE,
    SAID_AND_ENACTED,
    TWO_FACED,
)
from attribution.claims.essay.common import AGREE, ASSISTANT, KIND, KIND_BESIDE_ASSISTANT, READ_ON, STRATEGIST
from attribution.claims.essay.kindness import (
    ERRORS_HARMLESS,
    KIND_DIALOGUE,
    REASONER_NOT_ALIGNED,
    SKILL_KEEPS_KINDNESS,
    SKILL_STRENGTHENS_KINDNESS,
)
from attribution.claims.essay.knob import ACCURACY, COMPACT, KNOB, KNOB_BY_FINETUNING, TWO_NOTIONS
from attribution.claims.essay.mechanisms import (
    BOOST_COMPONENTS,
    BOOST_KINDLAND,
    BOOST_LOCATED,
    CAPABILITY,
    COLD_IS_SHALLOW,
    CONTROL,
    FORECAST,
    INITIALLY,
    INITIALLY_LOCATED,
    LARP,
    PRECISION,
    SUM_OF_MANY,
)
from attribution.claims.essay.sampling import SAMPLING_OR_UPDATE
from attribution.claims.essay.surprises import RECRUITED, WELL_PREDICTED

CLAIMS = (
    SAMPLING_OR_UPDATE,
    BOOST_KINDLAND, BOOST_COMPONENTS, INITIALLY, COLD_IS_SHALLOW, CONTROL, LARP, KIND_DIALOGUE, REASONER_NOT_ALIGNED,
    ERRORS_HARMLESS, SKILL_KEEPS_KINDNESS, SKILL_STRENGTHENS_KINDNESS, TWO_FACED, NEAR_MISS, ROLE_COLLAPSE,
    PROMPTED_GENERALIZES, SAID_AND_ENACTED, TWO_NOTIONS, KNOB, KNOB_BY_FINETUNING, COMPACT, FORECAST, SUM_OF_MANY, CAPABILITY,
    PRECISION,
    DORMANT, ACCURACY, WELL_PREDICTED, RECRUITED, BOOST_LOCATED, INITIALLY_LOCATED,
)  # fmt: skip

MECHANISMS = (KIND, STRATEGIST, ASSISTANT, KIND_BESIDE_ASSISTANT)  # those that are read, without what two share

__all__ = ["AGREE", "CLAIMS", "KIND", "MECHANISMS", "READ_ON", "STRATEGIST"]
