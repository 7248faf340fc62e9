"""Videos, for a framework that only knows pictures and sounds by itself."""
