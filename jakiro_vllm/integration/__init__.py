"""The only room that touches vLLM's internals.

``plugin`` is loaded by every vLLM process; it changes nothing unless the method ``jakiro`` is selected.
"""
