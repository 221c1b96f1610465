"""A seeded storm of requests against servers: behind benchmarks/storm.py and its test."""
