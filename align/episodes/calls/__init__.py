"""What a model's text says: thoughts, content, calls, and what only looks like a call. One file a format.

reply.py: what is read from a text
values.py: JSON of calls, strictly, and texts as values of a schema's types
scan.py: a text read once from its beginning to its end, whatever its format
hermes.py, llama.py, pythonic.py, xml.py, mistral.py, deepseek.py, lists.py, gemma.py: the formats
find.py: all of them by name, and the one that a chat template writes
"""

from align.episodes.calls.find import FORMATS, begins_thoughts, find_format
from align.episodes.calls.reply import CallFormat, Reply, ToolCall
from align.episodes.calls.scan import PLAIN

__all__ = ["FORMATS", "PLAIN", "CallFormat", "Reply", "ToolCall", "begins_thoughts", "find_format"]
