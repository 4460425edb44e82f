"""Modules exchanged for ones that compute the same in fewer passes over memory.

In the order of reading:

    exchange.py, forms.py: which modules are exchanged, and how their code is known
    lora.py, norm.py, mlp.py, qkv.py, rotary.py: what for
"""
