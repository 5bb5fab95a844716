"""Gradients of which each rank has a part: meshes, one exchange of exact sums, and sharded batches."""
