"""Modules exchanged for ones that compute the same in fewer passes over memory. In order of reading: exchange, forms,
lora, norm, mlp, qkv and rotary."""
