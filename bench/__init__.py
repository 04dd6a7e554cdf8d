"""Benchmarks: ``python -m bench cpu | gpu | step | compare | quality | demo | aot``. Every figure in a document comes from here."""
