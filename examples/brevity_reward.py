"""A reward of your own: a function from samples to scores.

In a recipe: `rewards: [{use: brevity_reward.py:brevity, args: {words: 50}}]`. It is a plain function, so a test is one
line: `assert brevity([Sample("Yes.")]) > brevity([Sample("Yes, of course.")])`.
"""

from rewards import reward


@reward
def brevity(samples, *, words=20):
    return [1 / (1 + len(s.completion.split()) / words) for s in samples]
