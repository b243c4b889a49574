"""The fidelity stage: what quantisation and drafting cost in exactness, in logits and in right answers."""
