"""What the whole package uses: the gradients of a call, their norms, and changes in place."""
