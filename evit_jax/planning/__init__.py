"""Plan search: finds the token plan for a target speed, from measured or estimated costs of a model's parts."""
