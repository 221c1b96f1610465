"""One round: draft, verify, commit. Ignorant of the engine it runs in."""
