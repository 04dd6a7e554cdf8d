"""The loss of a batch, the terms it is made of, and what is measured of it."""
