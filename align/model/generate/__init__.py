"""The engine of transformers: generation for machines without a faster one.

In the order of reading:

    facts.py: what is known of it before it is imported
    engine.py: requests, and the loop that draws a batch of them
    reading.py: prompts of unequal lengths, and the rows of a cache
    sampler.py: from logits to tokens and completions: random streams, ends
    weights.py: the versions that it is sent
"""
