"""Token labels: label maps, alignment of the maps with crops, and MixToken."""
