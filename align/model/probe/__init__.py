"""The two-tree probe. In order of reading: choose, verdict, own, rows, trace, float32, loud, conditions,
rotary_lengths, give_back."""
