"""Sources, transforms and the input pipeline. Knows no model and imports no jax: Grain's workers import it again."""
