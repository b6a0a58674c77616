"""What the README of a data set declares: which files are which split, as the hub reads it from its first lines."""

from pathlib import Path
from typing import Any


def declared_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that a folder's ``README.md`` declares.

    Empty where it declares none, several configurations of which none is the default, or files that are not there.
    """
    configurations = [entry for entry in _front_matter(folder / "README.md") if isinstance(entry, dict)]
    defaults = [entry for entry in configurations if entry.get("default") or entry.get("config_name") == "default"]
    if len(configurations) != 1 and len(defaults) != 1:
        return {}
    patterns = _patterns((defaults or configurations)[0].get("data_files"))
    files = {
        split: [file for pattern in those for file in _matches(folder, pattern)] for split, those in patterns.items()
    }
    return files if all(files.values()) else {}


def _front_matter(readme: Path) -> list[Any]:
    """The field ``configs``; nothing of a README without it, or with one that is no YAML."""
    try:
        text = readme.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    parts = text.split("---", 2)
    if parts[0].strip() or len(parts) < 3:
        return []
    import yaml

    try:
        fields = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    configs = fields.get("configs") if isinstance(fields, dict) else None
    return configs if isinstance(configs, list) else []


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Patterns by split; nothing where they name no split."""
    patterns: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("split"), str):
            return {}
        path = entry.get("path")
        those = [path] if isinstance(path, str) else path
        if not isinstance(those, list) or not all(isinstance(pattern, str) for pattern in those):
            return {}
        patterns.setdefault(entry["split"], []).extend(those)
    return patterns


def _matches(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(file for file in folder.glob(pattern) if file.is_file())
    except (ValueError, NotImplementedError, OSError):  # an empty or an absolute pattern
        return []
