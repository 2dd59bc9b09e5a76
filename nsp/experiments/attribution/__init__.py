"""Attribution from gradients, the choice of circuits, and their proof by exact patching."""
