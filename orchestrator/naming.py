"""Readable names for runs, safe as a directory name on every system."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.settings import NamingSettings

_UNSAFE = re.compile(r"[^A-Za-z0-9._+=,@-]+")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?$")
# No name is longer, however it came about.
_MAX_BYTES = 200
_SUFFIX_BYTES = 9  # "-" and eight hexadecimal digits


def run_name(hyperparams: Mapping[str, Any], settings: NamingSettings, fingerprint: str) -> str:
    """The name of a run: at most ``settings.max_bytes`` bytes of ASCII.

    Args:
        hyperparams: dotted key to plain value, in the order of the command line.
        settings: the naming table.
        fingerprint: hexadecimal identity; its first eight digits end a name that was cut.
    """
    shown = {key: value for key, value in hyperparams.items() if key not in settings.drop}
    ordered = [key for key in settings.keys if key in shown]
    ordered += [key for key in shown if key not in settings.keys]
    labels = _default_labels(shown)
    parts = (_part(key, shown[key], labels[key], settings) for key in ordered)
    name = safe_file_name(settings.separator.join(part for part in parts if part))
    if len(name) > min(settings.max_bytes, _MAX_BYTES):
        room = max(min(settings.max_bytes, _MAX_BYTES) - _SUFFIX_BYTES, 1)
        name = with_suffix(safe_file_name(name[:room].rstrip("._-")), fingerprint)
    return name


def with_suffix(name: str, fingerprint: str) -> str:
    """The name that a second run gets whose name is taken by another config."""
    return f"{name[: _MAX_BYTES - _SUFFIX_BYTES]}-{fingerprint[:8]}"


def safe_file_name(text: str) -> str:
    """ASCII without separators, quotes, spaces or a leading dot or dash; never empty."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    ascii_text = "".join(letters).encode("ascii", "replace").decode("ascii")
    name = _UNSAFE.sub("-", ascii_text).strip("-. ")
    if not name:
        return "default"
    return f"{name}_" if _RESERVED.fullmatch(name) else name


def _default_labels(hyperparams: Mapping[str, Any]) -> dict[str, str]:
    """The last part of each dotted key; the whole key where two would read the same."""
    last = {key: re.split(r"[./]", key)[-1] for key in hyperparams}
    texts = list(last.values())
    return {
        key: label if texts.count(label) == 1 else key.replace("/", ".")
        for key, label in last.items()
    }


def _part(key: str, value: Any, default_label: str, settings: NamingSettings) -> str:
    spec = settings.keys.get(key, default_label)
    table: Mapping[str, Any] = spec if hasattr(spec, "get") else {"label": spec}
    if isinstance(value, bool):
        words = {str(word).lower(): text for word, text in table.items()}
        if str(value).lower() in words:
            return str(words[str(value).lower()] or "")
    label = table.get("label", default_label)
    if isinstance(value, str) and (parts := int(table.get("parts") or 0)) > 0:
        value = ".".join(value.split(".")[-parts:])
    text = value_text(value, str(table.get("format", settings.float_format)))
    return settings.separator.join(word for word in (str(label or ""), text) if word)


def value_text(value: Any, float_format: str = "g") -> str:
    """A value as a name shows it: ``1.0`` reads ``1``, ``True`` reads ``true``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = format(value, float_format)
        # The default format keeps six digits: where that loses some, write all of them.
        return repr(value) if float_format == "g" and repr(float(text)) != repr(value) else text
    if isinstance(value, (list, tuple)):
        return "-".join(value_text(item, float_format) for item in value)
    if hasattr(value, "items"):
        return "-".join(f"{key}-{value_text(item, float_format)}" for key, item in value.items())
    return str(value)
