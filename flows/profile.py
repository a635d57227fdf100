"""The active Prefect profile: pointed at our server by ``up``, put back by ``down``; all else in PREFECT_HOME stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def point_at(api_url: str) -> dict[str, Any] | None:
    """Writes our server's address into the active profile and lets Prefect load plug-ins.

    Returns:
        What ``restore`` needs, as plain values; None if the profile already said so.
    """
    from prefect.context import get_settings_context
    from prefect.settings import get_current_settings, load_profiles, save_profiles

    name, path = get_settings_context().profile.name, Path(str(get_current_settings().profiles_path))
    profiles = load_profiles()
    before = profiles[name].to_environment_variables() if name in profiles.names else {}
    wrote = {"PREFECT_API_URL": api_url, "PREFECT_PLUGINS_ENABLED": "true"}
    if all(before.get(key, "").lower() == value for key, value in wrote.items()):
        return None
    saved = {"path": str(path), "name": name, "existed": path.exists()}
    changes: dict[Any, Any] = dict(wrote)
    profiles.update_profile(name, changes)
    save_profiles(profiles)
    return saved | {"wrote": wrote, "replaced": {key: before.get(key) for key in wrote}}


def restore(saved: Mapping[str, Any]) -> None:
    """Undoes ``point_at`` wherever the profile still says what it wrote; what the user changed since then stays."""
    from prefect.settings import load_profiles, save_profiles, temporary_settings

    path, name = Path(saved["path"]), saved["name"]
    if not path.exists():
        return
    with temporary_settings({"profiles_path": path}):
        profiles = load_profiles()
        if name not in profiles.names:
            return
        now = profiles[name].to_environment_variables()
        back = {key: saved["replaced"][key] for key, value in saved["wrote"].items() if now.get(key) == value}
        profiles.update_profile(name, back)
        save_profiles(profiles)
        only_defaults = (
            load_profiles(include_defaults=False).to_dict()["profiles"].items() <= _default_profiles().items()
        )
    if only_defaults and not saved["existed"]:
        path.unlink()


def _default_profiles() -> dict[str, Any]:
    from prefect.settings import DEFAULT_PROFILES_PATH, load_profiles, temporary_settings

    with temporary_settings({"profiles_path": DEFAULT_PROFILES_PATH}):
        return dict(load_profiles(include_defaults=False).to_dict()["profiles"])
