"""Methods of dropping tokens on equal terms: the same data, budgets, seeds and multiply-accumulates."""
