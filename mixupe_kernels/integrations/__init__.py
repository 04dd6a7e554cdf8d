"""The loops of other libraries, with their own means: each module imports its library, and this package none of them."""
