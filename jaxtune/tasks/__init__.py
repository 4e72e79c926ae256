"""Small training tasks that ship with jaxtune: generated from a seed, nothing to download."""
