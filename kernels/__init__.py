"""Kernels, each with a plain PyTorch reference, a fast version and a wrapper that picks by device.

Nothing here knows the rest of the package.
"""
