"""The plan search: costs of blocks, and the plan that keeps the most tokens within a budget."""
