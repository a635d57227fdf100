"""The science of al-loop: pure functions over frozen data (see ``types`` and ``protocols``)."""
