"""The experiments of the papers behind this project, each one command: ``python -m experiments`` lists them."""
