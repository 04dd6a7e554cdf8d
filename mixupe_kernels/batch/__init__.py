"""The batch the model sees: what is drawn, and the rows that are made of it."""
