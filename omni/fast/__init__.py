"""Faster ways to compute what other rooms compute. Each is compared with the reference before it is used."""
