"""A reward of your own is a function from samples to scores. In a recipe: `rewards: [{use: brevity_reward.py:brevity}]`.

Try it without anything else: `python -c "import brevity_reward as b; from rewards import Sample; print(b.brevity([Sample('Yes.')]))"`
"""

from rewards import reward


@reward
def brevity(samples, *, words=20):
    return [1 / (1 + len(s.completion.split()) / words) for s in samples]
