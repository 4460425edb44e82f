"""The two-tree probe: is a packed forward the model's own? and what if not.

In the order of reading:

    choose.py, faults.py, verdict.py: layouts are tried, what is wrong with one, and which is chosen
    own.py, rows.py: the model's own values, and of which rows
    trace.py, float32.py, loud.py, conditions.py: how computations are compared
    give_back.py, rotary_lengths.py: exchanges taken back, rows that are too long
"""
