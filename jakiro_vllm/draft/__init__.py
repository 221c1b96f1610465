"""The draft head: plain PyTorch, ignorant of vLLM."""
