"""Token trees: what they are, how they grow, and which path is accepted. Pure functions on batched tensors.

Shapes: B sequences, N nodes (root included), W candidates, K beam width.
"""
