"""Trees that wait for their verification."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from reference_tree import make_batch, random_parents

from jakiro_vllm.decode.store import TreeStore
from jakiro_vllm.tree.batch import TreeBatch

NODES = 12

Tree = tuple[list[int], list[int]]


def random_tree(rng: random.Random, size: int | None = None) -> Tree:
    size = size or rng.randint(2, NODES)
    return random_parents("random", size, rng), [rng.randrange(100) for _ in range(size)]


def chain(drafts: Sequence[int]) -> Tree:
    return list(range(-1, len(drafts))), [0, *drafts]


def assert_trees(found: TreeBatch, expected: Sequence[Tree]) -> None:
    """Equal topology and draft tokens; the root's token is not the store's business."""
    wanted = make_batch(expected, width=NODES)
    assert found.num_nodes.tolist() == [len(parents) for parents, _ in expected]
    for i, (parents, tokens) in enumerate(expected):
        count = len(parents)
        assert found.tokens[i, 1:count].tolist() == tokens[1:]
        for name in ("parents", "depths", "ancestors"):
            assert getattr(found, name)[i, :count].tolist() == getattr(wanted, name)[i, :count].tolist(), name


@pytest.fixture
def store() -> TreeStore:
    return TreeStore(NODES, "cpu")


def test_trees_come_back_by_name(store: TreeStore, rng: random.Random) -> None:
    trees = {name: random_tree(rng) for name in "abcd"}
    drafts = store.put(list("abcd"), make_batch(list(trees.values())))
    assert drafts == [tokens[1:] for _, tokens in trees.values()]
    assert len(store) == 4
    order = "cadb"
    assert_trees(store.gather(order, [trees[name][1][1:] for name in order]), [trees[name] for name in order])


def test_a_prefix_keeps_its_topology(store: TreeStore, rng: random.Random) -> None:
    parents, tokens = random_tree(rng, NODES)
    store.put(["a"], make_batch([(parents, tokens)]))
    for count in range(1, NODES + 1):
        found = store.gather(["a"], [tokens[1:count]])
        assert_trees(found, [(parents[:count], tokens[:count])])
    # Asking does not use a tree up, and a tuple is as good as a list.
    assert_trees(store.gather(["a"], [tuple(tokens[1:])]), [(parents, tokens)])


@pytest.mark.parametrize(
    "scheduled",
    [
        pytest.param([5, 9, 7], id="other-token"),
        pytest.param([6, 7], id="not-from-the-start"),
        pytest.param([5, 6, 7, 8], id="longer"),
        pytest.param([-1, -1, -1, -1], id="more-placeholders"),
    ],
)
def test_anything_else_becomes_a_chain(scheduled: list[int], store: TreeStore) -> None:
    store.put(["a"], make_batch([([-1, 0, 0, 0], [4, 5, 6, 7])]))
    assert_trees(store.gather(["a"], [scheduled]), [chain(scheduled)])
    # The stored tree is still there.
    assert_trees(store.gather(["a"], [[5, 6, 7]]), [([-1, 0, 0, 0], [4, 5, 6, 7])])


@pytest.mark.parametrize("struck", [[5, -1, 7, 8], [-1, 6, -1, -1], [5, 6, -1], [-1, -1]])
def test_struck_nodes_keep_the_topology(struck: list[int], store: TreeStore) -> None:
    """What a grammar strikes out is never accepted; the others stay where they are."""
    parents = [-1, 0, 0, 1, 1]
    store.put(["a", "b"], make_batch([(parents, [4, 5, 6, 7, 8])] * 2))
    found = store.gather(["b", "a"], [[5, 6, 7, 8], struck])
    count = len(struck) + 1
    assert_trees(found, [(parents, [4, 5, 6, 7, 8]), (parents[:count], [4, *struck])])
    assert_trees(store.gather(["a"], [[5, 6, 7, 8]]), [(parents, [4, 5, 6, 7, 8])])


def test_parents_of_the_drafts(store: TreeStore) -> None:
    store.put(["a", "b"], make_batch([([-1, 0, 0, 1, 1], [4, 5, 6, 7, 8]), ([-1, 0], [1, 2])]))
    assert store.parents("a") == [-1, -1, 0, 0]
    assert store.parents("b") == [-1]


def test_requests_that_were_never_seen(store: TreeStore) -> None:
    """Without drafts the root alone, whether or not anything is stored yet; with drafts a chain."""
    assert_trees(store.gather(["x", "y"], [[], [3, 4]]), [([-1], [0]), chain([3, 4])])
    store.put(["a"], make_batch([([-1, 0, 0], [4, 5, 6])]))
    expected = [([-1], [0]), ([-1, 0, 0], [4, 5, 6]), chain([5, 6])]
    assert_trees(store.gather(["x", "a", "y"], [[], [5, 6], [5, 6]]), expected)
    assert len(store) == 1


def test_an_empty_batch(store: TreeStore) -> None:
    assert store.gather([], []).batch_size == 0


def test_a_new_tree_replaces_the_old_one(store: TreeStore, rng: random.Random) -> None:
    store.put(["a"], make_batch([random_tree(rng, NODES)]))
    small = random_tree(rng, 3)
    store.put(["a"], make_batch([small]))
    assert len(store) == 1
    assert_trees(store.gather(["a"], [small[1][1:]]), [small])
    # Nothing of the old tree is behind the new one.
    longer = [*small[1][1:], 1]
    assert_trees(store.gather(["a"], [longer]), [chain(longer)])


def test_an_unscheduled_request_keeps_its_tree(store: TreeStore, rng: random.Random) -> None:
    waiting = random_tree(rng)
    store.put(["waiting", "b"], make_batch([waiting, random_tree(rng)]))
    for _ in range(5):
        other = random_tree(rng)
        store.put(["b"], make_batch([other]))
        store.gather(["b"], [other[1][1:]])
    assert_trees(store.gather(["waiting"], [waiting[1][1:]]), [waiting])


def test_discarded_trees_are_forgotten(store: TreeStore, rng: random.Random) -> None:
    tree = random_tree(rng)
    store.put(["a"], make_batch([tree]))
    store.discard("a")
    store.discard("a")
    store.discard("never seen")
    assert len(store) == 0
    drafts = tree[1][1:]
    assert_trees(store.gather(["a"], [drafts]), [chain(drafts)])


def test_slots_are_used_again(store: TreeStore, rng: random.Random) -> None:
    for round_ in range(30):
        names = [f"{round_}-{i}" for i in range(10)]
        store.put(names, make_batch([random_tree(rng) for _ in names]))
        for name in names:
            store.discard(name)
    assert store._trees.batch_size == 16


def test_grows_with_the_number_of_requests(store: TreeStore, rng: random.Random) -> None:
    trees: dict[str, Tree] = {}
    for first in range(0, 100, 10):  # past 16, 32 and 64 requests
        names = [str(i) for i in range(first, first + 10)]
        trees |= {name: random_tree(rng) for name in names}
        store.put(names, make_batch([trees[name] for name in names]))
    names = list(trees)
    rng.shuffle(names)
    assert_trees(store.gather(names, [trees[name][1][1:] for name in names]), [trees[name] for name in names])


def test_any_history(store: TreeStore, rng: random.Random) -> None:
    """Random puts, discards and gathers against a dictionary."""
    known: dict[str, Tree] = {}
    for _ in range(200):
        names = rng.sample([str(i) for i in range(40)], rng.randint(1, 12))
        action = rng.randrange(3)
        if action == 0:
            new = [random_tree(rng) for _ in names]
            store.put(names, make_batch(new, width=max(len(p) for p, _ in new)))
            known |= dict(zip(names, new, strict=True))
        elif action == 1:
            for name in names:
                store.discard(name)
                known.pop(name, None)
        else:
            scheduled, expected = [], []
            for name in names:
                parents, tokens = known.get(name, ([-1], [0]))
                count = rng.randint(1, len(parents))
                scheduled.append(tokens[1:count])
                expected.append((parents[:count], tokens[:count]))
            assert_trees(store.gather(names, scheduled), expected)
        assert len(store) == len(known)


def test_a_full_tree_of_64_nodes(rng: random.Random) -> None:
    store = TreeStore(64, "cpu")
    parents, tokens = random_parents("chain", 64, rng), list(range(64))
    store.put(["a"], make_batch([(parents, tokens)]))
    found = store.gather(["a"], [tokens[1:]])
    assert torch.equal(found.ancestors, make_batch([(parents, tokens)]).ancestors)
    strange = [9] * 63
    assert int(store.gather(["a"], [strange]).ancestors[0, 63]) == -1


def test_a_chain_is_known_as_one_until_another_tree_takes_its_place(store: TreeStore) -> None:
    tree, chain = make_batch([([-1, 0, 0], [4, 5, 6])]), make_batch([([-1, 0, 1], [4, 5, 6])])
    store.put(["a"], tree)
    assert store.may_branch("a")
    assert store.may_branch("unknown")
    store.put(["a"], chain, branch=False)
    assert not store.may_branch("a")
    assert_trees(store.gather(["a"], [[5, 6]]), [([-1, 0, 1], [4, 5, 6])])
    store.put(["a"], tree)
    assert store.may_branch("a")
    store.put(["a"], chain, branch=False)
    store.discard("a")
    assert store.may_branch("a")
