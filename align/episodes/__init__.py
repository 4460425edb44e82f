"""Episodes: a model that calls tools and goes on, turn by turn, on token ids as they were sampled.

In the order of reading:

    calls/: what a model's text says: thoughts, content, calls, and what only looks like a call
    joins.py, join_checks.py: what is appended to sampled ids so that the next turn can be sampled, and its proof
    renders.py, spoken.py, tools_as_text.py: what a template writes of messages and of tools
    guard.py: text of environments that becomes no added token
"""
