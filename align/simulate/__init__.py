"""An online stage on a virtual clock: the loop of a real run, over parts that only take time."""
