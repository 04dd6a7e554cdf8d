"""Benchmarks, of what is timed: ``python -m bench`` lists them. What is trained is in experiments/."""
