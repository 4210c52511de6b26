"""Token reduction: static token plans, the keep-rate schedule, and the reducers."""
