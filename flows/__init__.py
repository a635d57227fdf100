"""Orchestration: run files, the Prefect flow, services, reports and the command line."""

__version__ = "0.1.0"
