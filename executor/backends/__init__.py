"""One module a backend; each imports its engine inside the functions that need it, if at all."""
