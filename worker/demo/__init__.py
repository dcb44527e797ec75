"""A fake Letta server and the demo that runs on it.

``FakeLetta`` (fake_letta.py) is used by ``letta-ingest demo`` and by the whole test suite; production code
never imports this package.
"""
