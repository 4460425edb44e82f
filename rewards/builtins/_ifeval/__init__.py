"""The 25 kinds of verifiable instructions of IFEval (2311.07911): what they are, and whether a text follows them."""

from rewards.builtins._ifeval.instructions import KINDS, Instruction, follows, parse

__all__ = ["KINDS", "Instruction", "follows", "parse"]
