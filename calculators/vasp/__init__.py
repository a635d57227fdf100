"""VASP: settings, presets, POTCARs, the program, and what its output says. ``entry`` is what the registry takes."""
