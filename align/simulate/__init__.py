"""An online stage on a virtual clock: the loop of a real run, over parts that only take time.

In the order of reading:

    stage.py, parts.py, fleet.py, engine.py, lengths.py: one stage, its trainer and scorer, its engines, completions
    workload.py, inputs.py, measured.py: how long everything takes: a flag, a finished run, a default
    advice.py: which staleness, and how many engines
"""
