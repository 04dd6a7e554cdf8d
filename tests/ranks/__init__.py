"""What is true on every one of several processes, and how they are started; ``tests/test_ranks.py`` runs it."""
