"""The trainer as a plain class. No Ray.

In the order of reading:

    trainer.py, spec.py, policy.py: pack, forward, loss, backward, update, publish, save; what it is told; what it
        trains
    packer.py, prepass.py, metrics.py, signal.py: trees to microbatches, a pass before the step, sums over microbatches
        and ranks, whether there is a signal
    optim.py, strategy.py, zero.py, zero_engine.py, ranks.py: the update, and how parameters lie on ranks
    state.py, numerics.py, arithmetic.py, memory.py, sizes.py: what a resumed run needs, what values depend on, dtypes,
        freed memory, what is trained of a model
"""
