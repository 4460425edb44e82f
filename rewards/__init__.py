"""Rewards as plugins: a five-line file, run where it cannot hurt a run.

`api` is all that a plugin needs; `pool` runs plugins in their own killable processes. Standard library only: no torch,
ray or vllm, so that plugins load and test in milliseconds. What a built-in needs beyond it, it imports when asked.

In the order of reading:

    api.py, builtins/: the interface, and ours
    find.py, plugin.py, signatures.py, naming.py, describe.py: from a recipe's word to a function, and what it is
        called
    pool.py, execution.py, batches.py, budget.py, cache.py, verdict.py: a list of samples to a table of scores and
        failures
    team.py, worker.py, connection.py, answers.py, wire.py, process.py: processes: several, one, what passes, the
        other side
    trial.py: a plugin tried on completions that are there
    sandbox/: where programs that a policy wrote are run
    environments/: what a policy acts in over several turns
"""

from rewards.api import Context, Failure, Objective, PluginError, RewardError, Sample, Score, reward
from rewards.environments.api import environment

__all__ = ["Context", "Failure", "Objective", "PluginError", "RewardError", "Sample", "Score", "environment", "reward"]
