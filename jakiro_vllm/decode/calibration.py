"""What the head's word is worth: how often nodes were accepted that it gave a certain probability.

M nodes of any trees.
"""

from __future__ import annotations

import numpy as np

from jakiro_vllm.decode.costs import Bools, Floats, Integers


class Calibration:
    """How often a node is accepted, by the log-probability that the head gave its path; its kinds apart.

    A greedy target takes its best token for certain, so a head's 0.6 may come true nine times of ten; a head may be too
    sure of itself; and the level that it foresees without a forward is less certain than its word.
    """

    CENTERS = -np.array([0.002, 0.01, 0.03, 0.08, 0.15, 0.25, 0.4, 0.6, 0.9, 1.3, 1.8, 2.4, 3.2, 4.2, 5.5, 7.5, 10.0])
    #: Of a request that samples; of a level without a forward of its own. Kinds are sums of these.
    RANDOM, FORESEEN, KINDS = 1, 2, 4
    #: What the head's own word counts for, in nodes.
    PRIOR = 2.0
    #: Of the counts, what one step leaves.
    FADE = 0.998

    def __init__(self) -> None:
        self._seen = np.full((self.KINDS, len(self.CENTERS)), self.PRIOR)
        self._accepted = self.PRIOR * np.exp(np.broadcast_to(self.CENTERS, self._seen.shape))
        self._edges = (self.CENTERS[1:] + self.CENTERS[:-1]) / 2
        self._rates: Floats | None = None

    def learn(self, scores: Floats, accepted: Bools, kinds: Integers) -> None:
        """Counts verified nodes.

        Args:
            scores: ``[M]`` log-probabilities of their paths.
            accepted: ``[M]``.
            kinds: ``[M]``.
        """
        places = kinds, np.searchsorted(-self._edges, -scores)
        prior = self.PRIOR * np.exp(self.CENTERS)
        self._seen += (1 - self.FADE) * (self.PRIOR - self._seen)
        self._accepted += (1 - self.FADE) * (prior - self._accepted)
        np.add.at(self._seen, places, 1.0)
        np.add.at(self._accepted, places, accepted.astype(np.float64))
        self._rates = None

    def __call__(self, scores: Floats, kinds: Integers) -> Floats:
        """Probabilities of acceptance, never higher for a lower score.

        Args:
            scores: any shape, -inf for what is no node.
            kinds: of a shape that broadcasts to it.
        """
        if self._rates is None:
            self._rates = np.minimum.accumulate(self._accepted / self._seen, axis=1)  # centers descend
        found = [np.interp(-scores, -self.CENTERS, rates) for rates in self._rates]
        return np.where(np.isneginf(scores), 0.0, np.choose(kinds, found))
