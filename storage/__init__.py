"""Remembers: runs, generations, bands, labels and models in MongoDB (``store``), or in memory (``memory``)."""
