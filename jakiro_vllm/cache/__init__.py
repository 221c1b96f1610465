"""Which row of a step ends up in which slot of the KV cache."""
