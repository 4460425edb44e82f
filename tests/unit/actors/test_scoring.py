"""What plugins see of completions: those that an engine sampled, and those that rows brought."""

import numpy as np

from align.actors.scoring import samples_of
from align.protocols.fleet import Completion, Group, PromptItem


def completion(versions: list[int]) -> Completion:
    ids = np.array([5, 6, 7], np.int32)
    return Completion(ids, np.zeros(len(versions), np.float32), np.array(versions, np.int32), "an answer", "eos")


def test_the_version_is_that_of_the_last_token_and_none_for_answers_that_rows_brought() -> None:
    prompt = PromptItem(0, np.array([1]), 1, ({"role": "user", "content": "?"},))
    seen = samples_of([Group(prompt, (completion([3, 3, 4]), completion([-1, -1, -1])))])
    assert [sample.policy_version for sample in seen] == [4, -1]
    assert [sample.completion for sample in seen] == ["an answer", "an answer"]
