"""The other side of a server: starting one, asking it, and noting when what came."""
