"""Colours and type of pictures and pages, light and dark; plain CSS, no scripts, nothing loaded."""

from __future__ import annotations

# Pixels of the pictures of a page: on a phone, on half a screen, on a whole one.
WIDTHS = {"narrow": 360, "medium": 736, "wide": 1320}

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


def _theme(dark: bool) -> str:
    rules = [f".m-{key}{{fill:{pair[dark]}}}" for key, pair in _MODULES.items()]
    ground, ink, dim, line, cell = (
        ("#0d1117", "#e6edf3", "#9aa4af", "#3d444d", "#161b22")
        if dark
        else ("#ffffff", "#1b1f24", "#57606a", "#cfd6dd", "#f8fafb")
    )
    rules += [f".ground{{fill:{ground}}}.ink{{fill:{ink}}}.dim{{fill:{dim}}}"]
    rules += [f".rule{{stroke:{line}}}.none{{fill:none;stroke:{line};stroke-dasharray:3 3}}"]
    rules += [f".cell{{fill:{cell};stroke:{line}}}.track{{fill:{line};fill-opacity:.5}}"]
    # Words stand on tints: ink on them keeps a contrast of at least 4.5 : 1.
    rules += [f".tint{{fill-opacity:{0.35 if dark else 0.22}}}.stripe{{stroke:{ground}}}"]
    return "".join(rules)


SVG_STYLE = (
    f"svg text{{font-family:{_FONT};font-size:12px}}"
    "svg .big{font-size:15px;font-weight:600}svg .bold{font-weight:600}"
    "svg .small{font-size:11px}svg .stripe{fill:none;stroke-width:2;stroke-opacity:.8}"
    + _theme(dark=False)
    + "@media (prefers-color-scheme:dark){"
    + _theme(dark=True)
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
.narrow,.medium,.wide{{width:100%;height:auto;max-width:100rem}}.narrow{{max-width:35rem}}
.medium,.wide{{display:none}}
@media (max-width:759px){{body{{padding:1rem .75rem}}td.name{{min-width:12rem}}}}
@media (min-width:760px){{.narrow{{display:none}}.medium{{display:block}}}}
@media (min-width:1240px){{.medium{{display:none}}.wide{{display:block}}}}
"""
