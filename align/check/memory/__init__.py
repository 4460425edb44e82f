"""How much memory a stage takes: `sizes` of a model, the `plan` of a process, what a `stage` asks, and `advice`."""
