"""Where reference labels come from: a registry, one short file per code, and executors that run them."""
