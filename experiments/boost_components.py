"""The claim `boost_components`, of single heads and neurons: does what a component caused predict how much it grows?

Growth in the kind arm over the strategist arm is predicted in bases on which nothing was fitted, with and without what each
component caused on the arms' own samples, beside what any gradient would do: opportunity, activity, weight norm and layer.

    python -m experiments.boost_components [--model …] [--seeds 2] [--quick]
"""

from experiments.claims import script

if __name__ == "__main__":
    script(__doc__, "boost_components")
