"""Pictures, plots and pages of what a model keeps and of its training. They draw from arrays and know no model."""
