"""Pictures, plots and pages of kept tokens and of training. They are drawn from arrays, and do not depend on models."""
