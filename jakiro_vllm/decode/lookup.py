"""Drafts from a request's own text: where it repeats itself, what followed before is likely to follow again.

Such a draft (prompt lookup) needs no forward of the head and is a chain, as long as one likes. Whether it comes true
depends on how much is repeated: after m tokens of agreement the next one agrees, too, with a probability that is
learnt for greedy requests and for those that sample, by m. A chain's j-th token needs all before it:

    P(j | m) = prod_{i < j} P(agrees | m + i agreed)

At first that is m / (m + 1), with m the least of its class: a rule of succession.

B requests, W tokens of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from jakiro_vllm.decode.costs import Bools, Floats, Integers
from jakiro_vllm.kernels.lookup import look_up

#: Agreement beyond which a search ends, and which counts as endless.
LONGEST = 64
#: Least agreement of each class whose probability is learnt.
CLASSES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Lookup:
    """Finds continuations, and learns from what really followed how likely they are, drafted or not."""

    #: What the first guess counts for, in tokens.
    PRIOR = 4.0
    #: Of the counts, what one step leaves.
    FADE = 0.998
    #: Steps after which what was learnt is applied.
    APPLY = 8

    def __init__(self, width: int) -> None:
        """Knows nothing yet.

        Args:
            width: W.
        """
        self.width = width
        agreed = np.array(CLASSES, dtype=np.float64)
        self._prior = self.PRIOR * agreed / (agreed + 1)
        self._tried = np.full((2, len(CLASSES)), self.PRIOR)
        self._agreed = np.tile(self._prior, (2, 1))
        # Agreement of m tokens belongs to class _class[m]; 0 is none, and is never asked for.
        lengths = np.arange(LONGEST + width + 1).clip(1, LONGEST)
        self._class = np.searchsorted(CLASSES, lengths, side="right") - 1
        self._classes: list[int] = self._class.tolist()
        self._chances: Floats | None = None
        self._steps = 0
        #: By request: the latest continuation, and how much it repeated.
        self._found: dict[str, tuple[list[int], int]] = {}

    def find(self, names: Sequence[str], texts: Tensor, rows: Tensor, lengths: Tensor) -> tuple[Tensor, Integers]:
        """Looks for continuations, which ``followed`` will judge.

        Args:
            names: of the requests.
            texts: ``[R, L] int32`` token ids.
            rows: ``[B] int64`` of each request's text.
            lengths: ``[B] int64`` its tokens.

        Returns:
            ``(tokens [B, W] int64, repeated [B] int64)``: what may follow, -1 where nothing is known; how many tokens
            at the end of each text were said before.
        """
        tokens, repeated = look_up(texts, rows, lengths, self.width, LONGEST)
        self._found.update(zip(names, zip(tokens.tolist(), repeated.tolist(), strict=True), strict=True))
        return tokens, repeated.numpy()

    def followed(self, names: Sequence[str], emitted: Sequence[Sequence[int]], random: Bools) -> None:
        """Learns from what each request emitted after its latest continuation.

        Args:
            names: of the requests.
            emitted: tokens of each.
            random: ``[B]`` whether the request samples.
        """
        self._tried += (1 - self.FADE) * (self.PRIOR - self._tried)
        self._agreed += (1 - self.FADE) * (self._prior - self._agreed)
        for name, tokens, sort in zip(names, emitted, random.astype(int).tolist(), strict=True):
            chain, repeated = self._found.pop(name, ((), 0)) if tokens else ((), 0)
            if not repeated:
                continue
            # Tokens behind the first disagreement say nothing, and neither do those that were not emitted.
            for token, drafted in zip(tokens, chain, strict=False):
                self._tried[sort, self._classes[repeated]] += 1
                if token != drafted:
                    break
                self._agreed[sort, self._classes[repeated]] += 1
                repeated += 1
        self._steps += 1
        if self._steps % self.APPLY == 0:
            self._chances = None

    def chances(self, repeated: Integers, random: Bools) -> Floats:
        """``[B, W]`` probabilities that the target's samples reach each token of a chain.

        Args:
            repeated: ``[B]`` as of ``find``.
            random: ``[B]`` whether the request samples.
        """
        if self._chances is None:
            next_one = (self._agreed / self._tried)[:, self._class]
            steps = np.arange(LONGEST + 1)[:, None] + np.arange(self.width)
            self._chances = next_one[:, steps].cumprod(axis=2)
            self._chances[:, 0] = 0.0
        return self._chances[random.astype(int), repeated]

    def forget(self, name: str) -> None:
        """A request has ended."""
        self._found.pop(name, None)
