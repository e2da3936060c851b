"""One pure step, and the loop around it."""
