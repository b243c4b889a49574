"""Neural networks: the target transformer, its linear layers, and the ReDrafter."""
