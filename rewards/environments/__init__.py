"""Environments: what a policy acts in, one object an episode, each in a process of its own that can be killed.

    api.py          `@environment`, what a user's file needs
    spec.py         from a recipe's words to a loaded class, or to a list of functions; members.py: what it has
    schemas.py, docstrings.py, arguments.py: a method as a tool: its JSON schema, and whether a call fits it
    host.py, live.py, channel.py    the parent's side: a warm process, one episode, what passes
    zygote.py, keeper.py, family.py the warm process; of each episode the one that watches it and ends what it started
    episode.py, deadline.py, content.py     the episode's own process: requests, user code under deadlines, its answers

**Processes.** The zygote imports the user's module once and runs none of its code afterwards. For an episode it forks a
keeper, and the keeper the episode. Whatever an episode starts is a descendant of its keeper, also a daemon that left
its session, and is gone when the episode is. Each watches the one above: the parent's end is everybody's. Linux only.

**No sandbox.** A process keeps a run from harm by mistakes, not by intent: code that a model wrote belongs in
`rewards.sandbox`.
"""

from rewards.environments.api import environment
from rewards.environments.members import tool_schemas

__all__ = ["environment", "tool_schemas"]
