"""Losslessness, exactly: the distribution of what a step emits, over all samples that the target can make.

Compared is the joint distribution of the first L tokens of a request: those that a step emits, and behind them plain
sampling until there are L, so that steps of different length are comparable. On the other side stands the target
that decodes one token after the other. Probabilities are float64, every sequence of samples is walked, nothing is
drawn. T = V**L texts, R sequences of samples, N nodes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from reference_target import Settings, Target, text_distribution
from reference_tree import depths_of, make_batch, random_parents
from torch import Tensor

from jakiro_vllm.tree.batch import TreeBatch
from jakiro_vllm.tree.walk import Accepted, Sample, walk, walk_sampled

#: Sums of products of a few float64 probabilities.
FP64 = 1e-12
#: What a biased rule differs by, at least.
VISIBLE = 0.01

#: V, and the most levels below the root.
WORLDS = ((3, 4), (4, 3), (5, 3))
PENALTIES = {
    "none": {},
    "repetition": {"repetition": 1.7},
    "presence": {"presence": 0.9},
    "frequency": {"frequency": 0.8},
    "all": {"repetition": 0.6, "presence": -0.5, "frequency": 1.1},
}
TRUNCATIONS = list(itertools.product((0.0, 0.3, 0.7, 1.0, 1.5), (0, 1, 2, 3), (1.0, 0.9, 0.5)))


@dataclass
class Case:
    """A tree under a target, in one step.

    Attributes:
        parents: of each node.
        tokens: of each node; -1 is a placeholder, which no sample equals.
        target: the target.
    """

    parents: list[int]
    tokens: list[int]
    target: Target

    def __post_init__(self) -> None:
        self.depths = depths_of(self.parents)
        #: Of each node, carried from parent to child as a walk does; what hangs under a placeholder is never reached.
        self.states = [self.target.start]
        for parent, token in zip(self.parents[1:], self.tokens[1:], strict=True):
            above = self.states[parent]
            self.states.append(self.target.advance(above, token) if token >= 0 else above)
        before = len(self.target.start.text)
        self.logits = torch.stack([self.target.logits[state.text[before:]] for state in self.states])

    def distributions(self, settings: Settings) -> Tensor:
        """``[N, V]`` what a sample at each node is drawn from."""
        return self.target.processed(self.logits, self.states, settings)

    def batch(self, rows: int) -> TreeBatch:
        """The tree, ``rows`` times."""
        return make_batch([(self.parents, self.tokens)]).select(torch.zeros(rows, dtype=torch.int64))


def filled(parents: list[int], vocab: int, rng: random.Random) -> list[int]:
    """Tokens for a tree: distinct siblings while there are enough, and a few placeholders."""
    tokens = [rng.randrange(vocab)]
    for node, parent in enumerate(parents[1:], 1):
        taken = {tokens[other] for other in range(1, node) if parents[other] == parent}
        free = [token for token in range(vocab) if token not in taken] or list(range(vocab))
        tokens.append(rng.choice(free) if rng.random() > 0.05 else -1)
    return tokens


def full(vocab: int, depth: int) -> list[int]:
    """Parents of the tree that has every text."""
    parents, level = [-1], [0]
    for _ in range(depth):
        parents += [node for node in level for _ in range(vocab)]
        level = list(range(len(parents) - len(level) * vocab, len(parents)))
    return parents


def shapes(vocab: int, depth: int, rng: random.Random) -> Iterator[list[int]]:
    """Parents of trees that are no deeper than ``depth``."""
    yield [-1]
    yield list(range(-1, depth))
    yield [-1] + [0] * vocab
    yield full(vocab, 2 if vocab > 3 else 3)
    for shape in ("random", "binary", "narrow", "narrow"):
        parents = random_parents(shape, 24, rng)
        depths = depths_of(parents)
        chosen = [node for node in range(24) if depths[node] <= depth]
        yield [chosen.index(parents[node]) if node else -1 for node in chosen]


def all_cases() -> list[Case]:
    """Trees of every shape, each under a target of its own."""
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    return [
        Case(parents, filled(parents, vocab, rng), Target(vocab, depth + 1, generator, rng.randrange(3)))
        for vocab, depth in WORLDS
        for parents in shapes(vocab, depth, rng)
    ]


CASES = all_cases()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few thousand numbers: threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Rule = Callable[[TreeBatch, Sample, int], Accepted]


def by_levels(case: Case, table: Tensor, plain: Tensor, rule: Rule = walk) -> Tensor:
    """``[T]`` distribution of the text under ``walk``; row t of the batch draws the tokens of text t.

    A draw counts with its probability at the node where it is made, one that is not made counts evenly.

    Args:
        case: the tree.
        table: ``[N, V]`` what is drawn from at each node.
        plain: ``[C, V]`` what is drawn from behind the step.
        rule: in place of ``walk``.
    """
    target = case.target
    weights = torch.ones(len(target.texts), dtype=torch.float64)
    drawn = []

    def sample(step: int, nodes: Tensor, active: Tensor) -> Tensor:
        drawn.append(target.texts[:, step])
        weights.mul_(table[nodes, drawn[-1]].where(active, 1 / target.vocab))
        return drawn[-1]

    accepted = rule(case.batch(len(weights)), sample, target.length - 1)
    weights /= target.vocab ** (target.length - len(drawn))
    return text_distribution(target, accepted.tokens, weights, target.remaining(plain))


def walked(case: Case, samples: Tensor, weights: Tensor, plain: Tensor) -> Tensor:
    """``[T]`` distribution of the text under ``walk_sampled``, given what every node samples: ``[R, N]``, ``[R]``."""
    accepted = walk_sampled(case.batch(len(samples)), samples, case.target.length - 1)
    return text_distribution(case.target, accepted.tokens, weights, case.target.remaining(plain))


def one_by_level(case: Case, table: Tensor, plain: Tensor) -> Tensor:
    """Every sequence of one sample per level, whatever its node; it counts as the walk's own nodes have it."""
    texts, depths = case.target.texts, torch.tensor(case.depths)
    samples = texts[:, depths]
    accepted = walk_sampled(case.batch(len(texts)), samples, case.target.length - 1)
    made = table[accepted.path, texts].where(accepted.tokens >= 0, 1 / case.target.vocab)
    return walked(case, samples, made.prod(dim=1), plain)


def every_row_by_itself(case: Case, table: Tensor, plain: Tensor) -> Tensor:
    """Every combination of independent samples of all nodes."""
    nodes, vocab = table.shape
    samples = torch.cartesian_prod(*[torch.arange(vocab)] * nodes).view(-1, nodes)
    return walked(case, samples, table[torch.arange(nodes), samples].prod(dim=1), plain)


def one_draw_for_a_depth(case: Case, table: Tensor, plain: Tensor) -> Tensor:
    """All nodes of a depth turn one uniform draw into their tokens, so that they are as dependent as can be.

    What each node takes changes at finitely many values of the draw; each stretch between them counts its length.
    """
    depths = torch.tensor(case.depths)
    sums = table.cumsum(dim=1)
    options = []  # per depth: stretches of the draw
    for depth in range(int(depths.max()) + 1):
        ends = torch.cat([torch.tensor([0.0, 1.0]).double(), sums[depths == depth].flatten().clamp(max=1)]).unique()
        options.append([((a + b) / 2, b - a) for a, b in itertools.pairwise(ends.tolist())])
    combined = torch.tensor(list(itertools.product(*options)), dtype=torch.float64)  # [R, depths, 2]
    draws, weights = combined[:, depths, 0], combined[..., 1].prod(dim=1)
    samples = (draws.unsqueeze(2) > sums).sum(dim=2).clamp(max=table.shape[1] - 1)
    return walked(case, samples, weights, plain)


def difference(found: Tensor, case: Case, plain: Tensor) -> float:
    """Of two distributions of the text, at most."""
    assert abs(float(found.sum()) - 1) < FP64
    return float((found - case.target.remaining(plain)[:, 0]).abs().max())


@pytest.mark.parametrize("grammar", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("penalties", PENALTIES)
def test_a_step_is_distributed_as_the_target(penalties: str, grammar: bool) -> None:
    """Every temperature with every top-k and top-p; the trees take turns."""
    turns = itertools.cycle(CASES)
    for temperature, top_k, top_p in TRUNCATIONS:
        settings = Settings(temperature, top_k, top_p, grammar=grammar, **PENALTIES[penalties])
        for case in itertools.islice(turns, 5):
            table, plain = case.distributions(settings), case.target.plain(settings)
            assert difference(by_levels(case, table, plain), case, plain) < FP64
            assert difference(one_by_level(case, table, plain), case, plain) < FP64


POSITIONAL = {
    "bad words": {"bad_words": ((1,), (2, 2), (0, 0, 2))},
    "min tokens": {"min_tokens": 3},
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_bans_that_follow_the_path(name: str) -> None:
    for case, temperature in itertools.product(CASES, (0.0, 0.7)):
        settings = Settings(temperature, **POSITIONAL[name])
        table, plain = case.distributions(settings), case.target.plain(settings)
        assert difference(by_levels(case, table, plain), case, plain) < FP64
        assert difference(one_by_level(case, table, plain), case, plain) < FP64


@pytest.mark.parametrize("coupling", [every_row_by_itself, one_draw_for_a_depth])
def test_rows_that_the_walk_does_not_visit_do_not_matter(coupling: Callable) -> None:
    """However the samples of one depth depend on each other; those of different depths must not."""
    compared = 0
    for case in CASES:
        nodes, vocab = len(case.tokens), case.target.vocab
        if vocab**nodes > 5**5:
            case = Case(case.parents[:5], case.tokens[:5], case.target)  # a prefix of a tree is a tree
        for temperature, penalties in itertools.product((0.0, 0.7, 1.5), ("none", "all")):
            settings = Settings(temperature, top_p=0.9, grammar=True, **PENALTIES[penalties])
            table, plain = case.distributions(settings), case.target.plain(settings)
            assert difference(coupling(case, table, plain), case, plain) < FP64
            compared += len(case.tokens) > 1
    assert compared > 100


def test_there_is_something_to_compare() -> None:
    """Trees of all kinds, that really accept and reject, under settings that really change the target."""
    sizes = [len(case.tokens) for case in CASES]
    assert min(sizes) == 1
    assert max(sizes) == 40
    assert {max(case.depths) for case in CASES} == {0, 1, 2, 3, 4}
    elsewhere, changed = 0, dict.fromkeys(("grammar", "top-k", *PENALTIES, *POSITIONAL), 0)
    for case in CASES:
        table, plain = case.distributions(Settings()), case.target.plain(Settings())
        placed = [(p, t) for p, t in zip(case.parents[1:], case.tokens[1:], strict=True) if t >= 0]
        assert all(0 < float(table[parent, token]) < 1 for parent, token in placed)
        elsewhere += len({token for _, token in placed}) < len(set(placed))
        for name, values in {"grammar": {"grammar": True}, "top-k": {"top_k": 2}, **PENALTIES, **POSITIONAL}.items():
            other = case.target.remaining(case.target.plain(Settings(**values)))[:, 0]
            changed[name] += float((other - case.target.remaining(plain)[:, 0]).abs().max()) > VISIBLE
    assert elsewhere > 10, "hardly a token under several parents"
    assert changed.pop("none") == 0
    assert min(changed.values()) > len(CASES) // 2, changed


# Negative controls: each of these is a walk that one might write, and the comparison above must fail for it.


def first_child(trees: TreeBatch, sample: Sample, max_depth: int) -> Accepted:
    """Takes the first child, whatever the target samples."""

    def biased(step: int, nodes: Tensor, active: Tensor) -> Tensor:
        sampled = sample(step, nodes, active)
        children = (trees.parents == nodes.unsqueeze(1)) & (trees.tokens >= 0)
        child = trees.tokens.gather(1, children.int().argmax(dim=1, keepdim=True)).squeeze(1)
        return child.where(children.any(dim=1), sampled)

    return walk(trees, biased, max_depth)


def second_chance(trees: TreeBatch, sample: Sample, max_depth: int) -> Accepted:
    """Harder to see: draws again when no child holds the first sample."""

    def biased(step: int, nodes: Tensor, active: Tensor) -> Tensor:
        sampled = sample(step, nodes, active)
        children = (trees.parents == nodes.unsqueeze(1)) & (trees.tokens >= 0)
        held = (children & (trees.tokens == sampled.unsqueeze(1))).any(dim=1)
        return sampled.where(held, (sampled + 1) % 3)

    return walk(trees, biased, max_depth)


def in_any_branch(trees: TreeBatch, sample: Sample, max_depth: int) -> Accepted:
    """Goes on to any node of the next depth that holds the token, under another parent too."""
    above = trees.depths - 1  # all nodes of a depth hang under its first
    first = (trees.depths.unsqueeze(1) == above.unsqueeze(2)).int().argmax(dim=2)
    return walk(replace(trees, parents=first.where(above >= 0, -1)), sample, max_depth)


def root_grammar(case: Case, settings: Settings) -> Tensor:
    """The mask of the path is ignored: every node has the root's."""
    states = [replace(state, grammar=0) for state in case.states]
    return case.target.processed(case.logits, states, settings)


def root_text(case: Case, settings: Settings) -> Tensor:
    """Penalties do not follow the ancestors: every node has the root's counts."""
    states = [replace(state, text=case.states[0].text) for state in case.states]
    return case.target.processed(case.logits, states, settings)


def raw_bonus(case: Case, settings: Settings) -> Tensor:
    """The bonus token of a path that was accepted to its end skips the processors."""
    table = case.distributions(settings)
    leaves = [node for node in range(len(case.parents)) if node not in case.parents]
    table[leaves] = case.logits[leaves].softmax(dim=1)
    return table


def draft_scores(case: Case, settings: Settings) -> Tensor:
    """Children are tried in proportion to the draft's scores, and accepted where the target finds them typical."""
    table = case.distributions(settings)
    biased = table.clone()
    for node, own in enumerate(table):
        children = [n for n in range(len(case.parents)) if case.parents[n] == node and case.tokens[n] >= 0]
        if not children:
            continue
        threshold = min(0.3, 0.5 * float(torch.special.entr(own).sum().neg().exp()))
        scores = torch.linspace(1, 2, len(children), dtype=torch.float64)
        biased[node] = 0
        for child, score in zip(children, scores / scores.sum(), strict=True):
            token = case.tokens[child]
            if own[token] >= threshold:
                biased[node, token] += score
            else:
                biased[node] += score * own
    return biased


def next_branch(case: Case, settings: Settings) -> Tensor:
    """A node sees the branch beside its own: its distribution is that of the next node of its depth."""
    table, depths = case.distributions(settings), torch.tensor(case.depths)
    for depth in depths.unique():
        table[depths == depth] = table[depths == depth].roll(1, dims=0)
    return table


@pytest.mark.parametrize("rule", [first_child, second_chance, in_any_branch], ids=lambda rule: rule.__name__)
def test_a_biased_rule_is_noticed(rule: Rule) -> None:
    worst = 0.0
    for case in CASES:
        settings = Settings(0.7, top_p=0.9)
        table, plain = case.distributions(settings), case.target.plain(settings)
        worst = max(worst, difference(by_levels(case, table, plain, rule), case, plain))
    assert worst > VISIBLE


@pytest.mark.parametrize("walking", [by_levels, one_by_level])
@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        (root_grammar, Settings(1.0, grammar=True)),
        (root_text, Settings(1.0, **PENALTIES["repetition"])),
        (root_text, Settings(1.0, **PENALTIES["presence"])),
        (root_text, Settings(1.0, **PENALTIES["frequency"])),
        (root_text, Settings(1.0, bad_words=((2, 2),))),
        (root_text, Settings(1.0, min_tokens=3)),
        (raw_bonus, Settings(0.7, top_k=2)),
        (raw_bonus, Settings(1.0, **PENALTIES["all"])),
        (draft_scores, Settings(1.0)),
        (draft_scores, Settings(0.7, top_p=0.9)),
        (next_branch, Settings(1.0)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_biased_sampling_is_noticed(sampling: Callable, settings: Settings, walking: Callable) -> None:
    worst = 0.0
    for case in CASES:
        plain = case.target.plain(settings)
        worst = max(worst, difference(walking(case, sampling(case, settings), plain), case, plain))
    assert worst > VISIBLE
