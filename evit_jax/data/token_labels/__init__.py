"""Token labels: label maps, their alignment with crops, and MixToken."""
