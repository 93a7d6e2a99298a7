"""What the statements are evaluated on: matrices with structure, and small networks."""
