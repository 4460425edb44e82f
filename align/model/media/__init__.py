"""Images and video in a row of tokens.

In the order of reading:

    support.py: which models are trained with them
    placeholders.py, features.py: where they stand, and what the tower makes of them
    prompt_inputs.py, sampled_placeholders.py: in a batch of prompts, and marks that a policy wrote itself
"""
