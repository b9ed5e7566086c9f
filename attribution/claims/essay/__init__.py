"""The claims of the essay as data, but for `boost`: in `kindland`, with the names of its sets, and one on planted mechanisms.

Influence is read on prompts of held-out situations in which two dispositions are equally likely and name different replies:
that of a mechanism on its own reply against those that neither names. Where both name the same reply stands beside it.
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
    CAPABILITY,
    COLD_IS_SHALLOW,
    CONTROL,
    FORECAST,
    INITIALLY,
    LARP,
    PRECISION,
    SUM_OF_MANY,
)
from attribution.claims.essay.sampling import SAMPLING_OR_UPDATE

CLAIMS = (
    SAMPLING_OR_UPDATE,
    BOOST_KINDLAND, BOOST_COMPONENTS, INITIALLY, COLD_IS_SHALLOW, CONTROL, LARP, KIND_DIALOGUE, REASONER_NOT_ALIGNED,
    ERRORS_HARMLESS, SKILL_KEEPS_KINDNESS, SKILL_STRENGTHENS_KINDNESS, TWO_FACED, NEAR_MISS, ROLE_COLLAPSE,
    PROMPTED_GENERALIZES, SAID_AND_ENACTED, TWO_NOTIONS, KNOB, KNOB_BY_FINETUNING, COMPACT, FORECAST, SUM_OF_MANY, CAPABILITY,
    PRECISION,
    DORMANT, ACCURACY,
)  # fmt: skip

MECHANISMS = (KIND, STRATEGIST, ASSISTANT, KIND_BESIDE_ASSISTANT)  # those that are read, without what two share

__all__ = ["AGREE", "CLAIMS", "KIND", "MECHANISMS", "READ_ON", "STRATEGIST"]
