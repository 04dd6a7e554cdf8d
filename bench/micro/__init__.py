"""pytest-benchmark's view of the operators: ``pytest bench/micro``. Ratios to a percent need turns: ``bench/timing.py`` has these."""
