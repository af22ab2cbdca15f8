"""The forward pass: word for word (reference), and rewritten (fused)."""
