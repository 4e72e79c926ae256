"""Operations with their own derivative: a reference in jax.numpy beside any faster implementation."""
