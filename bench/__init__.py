"""Benchmarks: ``python -m bench cpu | gpu | step | quality | demo | aot``. Every figure in a document comes from here."""
