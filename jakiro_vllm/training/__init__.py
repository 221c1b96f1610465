"""Training: so far what the embedded pair needs. Knows vLLM only through its public classes."""
