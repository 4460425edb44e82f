"""What crosses processes, and the three protocols that stages speak to. Standard library and numpy only.

Stages know Trees, Groups and score tables. Who packs them, on which device and in which process they are computed,
is the business of whoever implements `Trainer`, `Scorer` and `Fleet`: Ray actors in a run, plain classes in a test,
a virtual clock in the simulator.

In the order of reading, by who speaks it:

    trees.py: data, trainer and losses: a training example and its parts
    trainer.py: stages and the policy: updates, log-probabilities, what is published
    fleet.py: stages and engines: prompts, completions, how they are drawn
    scorer.py: stages and rewards: scores of completions, and those that could not be had
    ends.py: all engines: what ends a turn, and the text of one
"""
