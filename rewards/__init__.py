"""Rewards as plugins: a five-line file, run where it cannot hurt a run.

`api` is all that a plugin needs; `pool` runs plugins in their own killable processes. Standard library only: no torch,
ray or vllm, so that plugins load and test in milliseconds. What a built-in needs beyond it, it imports when asked.
"""

from rewards.api import Context, Failure, Objective, PluginError, RewardError, Sample, Score, reward

__all__ = ["Context", "Failure", "Objective", "PluginError", "RewardError", "Sample", "Score", "reward"]
