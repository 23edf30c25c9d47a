"""What is in a checkpoint, decoded, and beside its model or another checkpoint."""
