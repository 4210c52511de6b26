"""Token reduction: static plans, the schedule that walks through them, and the reducers."""
