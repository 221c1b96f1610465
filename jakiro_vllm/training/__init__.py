"""Training a head for any target, and the embedded pair. Knows vLLM only through its public classes."""
