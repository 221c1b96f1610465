"""Trees grown by one who knows the answer: the right continuation hidden among wrong tokens, in hostile shapes.

A random head accepts almost nothing, and a trained one proposes few kinds of trees. These trees are accepted as often
as a test likes, in every shape that a tree may have. Whatever they are, the emitted tokens must be plain decoding's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from reference_tree import make_batch

#: ``(parents, tokens)``, root first.
Tree = tuple[list[int], list[int]]


class Nodes:
    """A growing tree whose siblings all differ."""

    def __init__(self, root: int, future: Sequence[int], vocab: int, rng: random.Random) -> None:
        """Plants the root.

        Args:
            root: its token.
            future: the tokens that really follow.
            vocab: wrong tokens are below it.
            rng: draws them.
        """
        self.parents, self.tokens, self.depths = [-1], [root], [0]
        self.path = [0]  # the nodes that hold the right tokens
        self.future, self.vocab, self.rng = future, vocab, rng

    def hang(self, parent: int, token: int) -> int:
        """Adds a node, unless its parent has such a child already; returns the child."""
        for node in range(len(self.parents)):
            if self.parents[node] == parent and self.tokens[node] == token:
                return node
        self.parents.append(parent)
        self.tokens.append(token)
        self.depths.append(self.depths[parent] + 1)
        return len(self.parents) - 1

    def right(self) -> None:
        """Adds the next right token."""
        self.path.append(self.hang(self.path[-1], self.future[len(self.path) - 1]))

    def wrong(self, parent: int) -> int:
        """Adds a token that is wrong there, whatever the parent."""
        depth = self.depths[parent]
        taken = {self.tokens[n] for n in range(len(self.parents)) if self.parents[n] == parent}
        taken |= set(self.future[depth : depth + 1])
        token = self.rng.randrange(self.vocab)
        while token in taken:
            token = self.rng.randrange(self.vocab)
        return self.hang(parent, token)

    def above(self, depth: int) -> int:
        """Any node that is not as deep."""
        return self.rng.choice([node for node, d in enumerate(self.depths) if d < depth])


def hidden(nodes: Nodes, depth: int, budget: int) -> None:
    """Right tokens at random places among wrong ones, in any order that keeps parents before children."""
    count = nodes.rng.randint(1, budget)
    right = nodes.rng.randint(0, min(depth, len(nodes.future), count))
    order = [True] * right + [False] * (count - right)
    nodes.rng.shuffle(order)
    for is_right in order:
        if is_right:
            nodes.right()
        else:
            nodes.wrong(nodes.above(depth))


def wrong(nodes: Nodes, depth: int, budget: int) -> None:
    """No right token at all."""
    for _ in range(budget):
        nodes.wrong(nodes.above(depth))


def twins(nodes: Nodes, depth: int, budget: int) -> None:
    """The right token of a level under every node of the level before it, right or wrong."""
    level = [0]
    for right in nodes.future[:depth]:
        following = []
        for parent in level:
            if len(nodes.parents) + 2 > budget + 1:
                return
            order = nodes.rng.sample([True, False], 2)
            following += [nodes.hang(parent, right) if it_is else nodes.wrong(parent) for it_is in order]
        # The budget ends somewhere in a level, and the right path may be before it or behind.
        nodes.rng.shuffle(following)
        level = following


def deep(nodes: Nodes, depth: int, budget: int) -> None:
    """As deep as trees may be: the right path, and wrong chains that leave it."""
    for _ in range(min(depth, len(nodes.future), budget)):
        nodes.right()
    while len(nodes.parents) <= budget:
        node = nodes.above(depth)
        while len(nodes.parents) <= budget and nodes.depths[node] < depth:
            node = nodes.wrong(node)


def wide(nodes: Nodes, depth: int, budget: int) -> None:
    """All nodes are children of the root, the right one anywhere among them."""
    place = nodes.rng.randrange(budget)
    for i in range(budget):
        if i == place and nodes.future:
            nodes.right()
        else:
            nodes.wrong(0)


def single(nodes: Nodes, depth: int, budget: int) -> None:
    """One node, right if there is anything to follow."""
    if nodes.future:
        nodes.right()
    else:
        nodes.wrong(0)


SHAPES = {grow.__name__: grow for grow in (hidden, wrong, twins, deep, wide, single)}


def grow_tree(
    shape: str, root: int, future: Sequence[int], depth: int, budget: int, vocab: int, rng: random.Random
) -> Tree:
    """Grows one tree.

    Args:
        shape: one of ``SHAPES``.
        root: token of the root.
        future: tokens that really follow the root.
        depth: levels below the root at most.
        budget: nodes below the root at most.
        vocab: wrong tokens are below it.
        rng: of this tree.
    """
    nodes = Nodes(root, future, vocab, rng)
    SHAPES[shape](nodes, depth, budget)
    return nodes.parents, nodes.tokens


class Oracle:
    """Takes the place of what the head of an engine in this process proposes; the head still runs, and reads its KV."""

    def __init__(self, runner: Any, shapes: Sequence[str]) -> None:
        """Binds to a runner.

        Args:
            runner: with trees.
            shapes: drawn from anew for every tree.
        """
        self.runner = runner
        self.shapes = list(shapes)
        self.futures: dict[tuple[Any, ...], list[int]] = {}
        self.store = runner.tree_store
        self.keep = self.store.put

    def learn(self, prompt: Sequence[int], seed: int | None, adapter: str | None, answer: Sequence[int]) -> None:
        """Remembers what plain decoding says."""
        assert self.futures.setdefault(self.key(prompt, seed, adapter), list(answer)) == list(answer)

    @staticmethod
    def key(prompt: Sequence[int], seed: int | None, adapter: str | None) -> tuple[Any, ...]:
        """What tells the requests of a phase apart."""
        return tuple(prompt), seed, adapter

    def __enter__(self) -> Oracle:
        self.store.put = self.put
        return self

    def __exit__(self, *error: object) -> None:
        del self.store.put

    def put(self, names: Sequence[str], trees: Any) -> list[list[int]]:
        """As the store's, with trees of its own instead of the head's."""
        return self.keep(names, make_batch([self.tree(name, int(trees.tokens[i, 0])) for i, name in enumerate(names)]))

    def tree(self, name: str, root: int) -> Tree:
        """The next tree of a request."""
        state = self.runner.requests[name]
        emitted = list(state.output_token_ids)
        assert emitted[-1] == root, "a tree hangs under another token than the last one"
        seed = state.sampling_params.seed
        adapter = state.lora_request and state.lora_request.lora_name
        answer = self.futures[self.key(state.prompt_token_ids, seed, adapter)]
        # A sabotaged engine has left the answer; from there on everything is a guess.
        future = answer[len(emitted) :] if emitted == answer[: len(emitted)] else []
        rng = random.Random(f"{seed} {len(state.prompt_token_ids)} {len(emitted)}")
        config = self.runner.drafter.tree_config
        vocab = self.runner.model_config.get_vocab_size()
        return grow_tree(rng.choice(self.shapes), root, future, config.depth, config.node_budget, vocab, rng)
