"""Colours and type of pictures and pages, light and dark; plain CSS, no scripts, nothing loaded."""

from __future__ import annotations

# Shades for amounts, from little to much; ink on them keeps a contrast of at least 4.5 : 1.
_LIGHT = ("#eef5ff", "#d6e6fd", "#b4d2fa", "#86b6f2", "#2f6fc0", "#17458a")
_DARK = ("#14243a", "#1a3354", "#214672", "#2b5a98", "#74acec", "#b7d8ff")
_INK_LIGHT = ("#1b1f24",) * 4 + ("#ffffff",) * 2
_INK_DARK = ("#e6edf3",) * 4 + ("#0d1117",) * 2
SHADES = len(_LIGHT)

# Colours of modules, as formats/contents.py calls them: (light, dark).
_MODULES = {
    "encoder1": ("#0f766e", "#2dd4bf"),
    "encoder2": ("#a21caf", "#e879f9"),
    "encoder3": ("#b45309", "#fbbf24"),
    "decoder": ("#1d4ed8", "#79a8ff"),
    "other": ("#6b7280", "#9ca3af"),
}

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"


def module_class(colour: str) -> str:
    """The CSS class that colours a module."""
    return f"m-{colour if colour in _MODULES else 'other'}"


def _theme(shades: tuple[str, ...], inks: tuple[str, ...], dark: bool) -> str:
    rules = [f".s{i}{{fill:{c}}}.i{i}{{fill:{inks[i]}}}" for i, c in enumerate(shades)]
    rules += [f".m-{key}{{fill:{pair[dark]}}}" for key, pair in _MODULES.items()]
    ground, ink, dim, line = (
        ("#0d1117", "#e6edf3", "#9aa4af", "#3d444d")
        if dark
        else ("#ffffff", "#1b1f24", "#57606a", "#cfd6dd")
    )
    rules += [f".ground{{fill:{ground}}}.ink{{fill:{ink}}}.dim{{fill:{dim}}}"]
    rules += [f".rule{{stroke:{line}}}.none{{fill:none;stroke:{line};stroke-dasharray:3 3}}"]
    return "".join(rules)


SVG_STYLE = (
    f"svg text{{font-family:{_FONT};font-size:12px}}"
    "svg .big{font-size:15px;font-weight:600}svg .bold{font-weight:600}"
    "svg .small{font-size:11px}"
    + _theme(_LIGHT, _INK_LIGHT, dark=False)
    + "@media (prefers-color-scheme:dark){"
    + _theme(_DARK, _INK_DARK, dark=True)
    + "}"
)

PAGE_STYLE = f"""
:root{{color-scheme:light dark;
--ground:#fff;--ink:#1b1f24;--dim:#57606a;--line:#cfd6dd;--band:#f5f7f9}}
@media (prefers-color-scheme:dark){{
:root{{--ground:#0d1117;--ink:#e6edf3;--dim:#9aa4af;--line:#3d444d;--band:#161b22}}}}
body{{margin:0;padding:1.5rem 2rem;background:var(--ground);color:var(--ink);
font:15px/1.5 {_FONT}}}
h1{{font-size:1.5rem;margin:0 0 .5rem}}h2{{font-size:1.15rem;margin:2rem 0 .5rem}}
p.lead{{font-size:1.05rem}}.quiet{{color:var(--dim)}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}}
th,td{{padding:.3rem .7rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}}
th{{color:var(--dim);font-weight:600;white-space:nowrap}}
td.n,th.n{{text-align:right;white-space:nowrap}}
tbody tr:nth-child(even){{background:var(--band)}}
td.name{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;
font-size:12px;overflow-wrap:anywhere;min-width:20rem}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.5rem 0}}
dt{{color:var(--dim)}}dd{{margin:0;overflow-wrap:anywhere}}
p,ul,dl{{max-width:60rem}}ul{{padding-left:1.2rem}}li{{overflow-wrap:anywhere}}
figure{{margin:1rem 0}}
"""
