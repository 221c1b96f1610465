"""Lossless tree speculative decoding with Jakiro draft heads, as a vLLM plugin."""

__version__ = "0.1.0"
