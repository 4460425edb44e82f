"""Trees -> microbatches, under a budget of tokens and one of patches; for several ranks, the same number for each.

This decides only how a batch is computed: losses divide by global counts, so every split gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from align.protocols.trees import Medium, Segment, Tree


@dataclass(frozen=True)
class Budget:
    """What one microbatch may hold: tokens of its row, and patches of its media (None: any number)."""

    tokens: int
    patches: int | None = None

    def less(self, size: Tree | Segment) -> Budget:
        return Budget(self.tokens - _tokens(size), None if self.patches is None else self.patches - _patches(size))

    def holds(self, *sizes: Tree | Segment) -> bool:
        fits = sum(map(_tokens, sizes)) <= self.tokens
        return fits and (self.patches is None or sum(map(_patches, sizes)) <= self.patches)


def _tokens(size: Tree | Segment) -> int:
    return size.tokens if isinstance(size, Tree) else len(size)


def _patches(size: Tree | Segment) -> int:
    return sum(medium.patches for medium in size.media)


def split_to_budget(tree: Tree, budget: Budget, keep_together: bool) -> list[Tree]:
    """Parts of a tree that fit the budget, each repeating the trunk and its media; pairs stay whole (`keep_together`),
    and so do branches that are one sequence: losses sum over all its tokens.

    Where the trunk's media alone are too many patches, more parts would only repeat them: as many patches as the trunk
    with one branch has are allowed then.
    """
    if budget.patches is not None and tree.branches and _patches(tree.trunk) > budget.patches:
        least = _patches(tree.trunk) + max(sum(map(_patches, unit)) for unit in tree.units)
        budget = replace(budget, patches=least)
    if budget.holds(tree) or keep_together or len(tree.units) < 2:
        return [tree]
    parts: list[list[Segment]] = [[]]
    room = budget.less(tree.trunk)
    for unit in tree.units:
        if parts[-1] and not room.holds(*unit):
            parts.append([])
            room = budget.less(tree.trunk)
        parts[-1] += unit
        for branch in unit:
            room = room.less(branch)
    return [replace(tree, branches=tuple(part)) for part in parts]


def plan_microbatches(
    trees: Sequence[Tree], max_tokens: int, *, keep_together: bool, max_patches: int | None = None
) -> list[list[Tree]]:
    """Best-fit decreasing by tokens, under a budget of tokens and one of patches; deterministic: ties go to the lower
    id.

    A tree larger than the budget is a microbatch of its own. Within a microbatch trees stand in order of id, and
    microbatches in order of their first tree, so the arithmetic does not depend on the order of arrival.
    """
    budget = Budget(max_tokens, max_patches)
    parts = [part for tree in trees for part in split_to_budget(tree, budget, keep_together)]
    order = sorted(range(len(parts)), key=lambda i: (-parts[i].tokens, parts[i].id, i))
    bins: list[tuple[Budget, list[int]]] = []  # (what is free, part indices)
    for i in order:
        fitting = [b for b in range(len(bins)) if bins[b][0].holds(parts[i])]
        if fitting:
            best = min(fitting, key=lambda b: (bins[b][0].tokens, b))
            bins[best] = (bins[best][0].less(parts[i]), [*bins[best][1], i])
        else:
            bins.append((budget.less(parts[i]), [i]))
    microbatches = [sorted(members, key=lambda i: (parts[i].id, i)) for _, members in bins]
    microbatches.sort(key=lambda members: (parts[members[0]].id, members[0]))
    return [[parts[i] for i in members] for members in microbatches]


@dataclass(frozen=True)
class Microbatch:
    """What one rank computes at a time.

    counted: False where it only keeps the rank in step with the others (they have one microbatch more): its loss is
    multiplied by 0, its metrics and pre-pass values are dropped. idle_media: where others have media and this has none,
    one of theirs: a tower that learns runs on every rank, or on none.
    """

    trees: list[Tree]
    counted: bool = True
    idle_media: tuple[Medium, ...] = ()


def assign(sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Longest processing time first (Graham 1969): the largest goes to the least loaded bin; ties to the bin with
    fewer, then the lower. The fullest bin holds at most 4/3 - 1/(3 bins) of the least possible. Indices ascend."""
    shares: list[list[int]] = [[] for _ in range(bins)]
    loads = [0] * bins
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(bins), key=lambda b: (loads[b], len(shares[b]), b))
        shares[least].append(i)
        loads[least] += sizes[i]
    return [sorted(share) for share in shares]


def plan_ranks(
    trees: Sequence[Tree], max_tokens: int, *, keep_together: bool, ranks: int, max_patches: int | None = None
) -> list[list[Microbatch]]:
    """Microbatches of every rank: balanced by tokens, the same number for each, the same whatever the order of `trees`.

    On one rank this is `plan_microbatches`. On more, trees are spread evenly over a multiple of `ranks` microbatches
    where the budget allows, and cut finer (groups between branches) where there would be less of them than ranks.
    """
    planned = plan_microbatches(trees, max_tokens, keep_together=keep_together, max_patches=max_patches)
    if ranks == 1 or not planned:
        return [[Microbatch(group) for group in planned] for _ in range(ranks)]
    planned = _spread(trees, planned, Budget(max_tokens, max_patches), keep_together, ranks)
    shares = assign([sum(tree.tokens for tree in group) for group in planned], ranks)
    rounds = max(len(share) for share in shares)
    least = min((tree for group in planned for tree in group), key=lambda tree: (tree.tokens, tree.id))
    idle = Microbatch([least], counted=False)
    plan = [[Microbatch(planned[i]) for i in share] + [idle] * (rounds - len(share)) for share in shares]
    return [list(share) for share in zip(*map(_in_step, zip(*plan, strict=True)), strict=True)]


def _in_step(together: tuple[Microbatch, ...]) -> list[Microbatch]:
    """What the ranks compute at one time; those without media get the smallest of the others'."""
    media = [[medium for tree in part.trees for medium in tree.media] for part in together]
    least = min((m for own in media for m in own), key=lambda m: (m.patches, m.key), default=None)
    return [
        part if own or least is None else replace(part, idle_media=(least,))
        for part, own in zip(together, media, strict=True)
    ]


def _spread(
    trees: Sequence[Tree], planned: list[list[Tree]], limit: Budget, keep_together: bool, ranks: int
) -> list[list[Tree]]:
    """`planned` again as a multiple of `ranks` microbatches of about one size, or as it is where that cannot be."""
    wanted = -(-len(planned) // ranks) * ranks
    budgets = [limit.tokens]
    if len(planned) < ranks:
        budget = -(-sum(tree.tokens for tree in trees) // ranks)
        while budget > 1:
            budgets.append(budget)
            budget = budget * 3 // 4
        budgets.append(1)
    ordered = sorted(trees, key=lambda tree: tree.id)
    for budget in budgets:
        aim = Budget(budget, limit.patches)
        parts = [part for tree in ordered for part in split_to_budget(tree, aim, keep_together)]
        if len(parts) < wanted:
            continue
        even = [[parts[i] for i in share] for share in assign([part.tokens for part in parts], wanted)]
        if all(len(group) == 1 or limit.holds(*group) for group in even):
            return even
    return planned if len(planned) >= ranks else plan_microbatches(trees, 1, keep_together=keep_together)
