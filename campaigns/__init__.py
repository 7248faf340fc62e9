"""Long searches for inputs that omni gets wrong: chance makes them, and a seed repeats them."""
