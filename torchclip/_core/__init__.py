"""What all of the package stands on: gathering the gradients of a call, their norms, and changes in place."""
